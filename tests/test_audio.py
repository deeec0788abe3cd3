"""Reading, writing and resampling: what comes back is the audio, or one clear error."""

import math
import os
import struct

import numpy as np
import pytest
import soundfile
import torch

from rawaudio import audio
from rawaudio.audio import AudioError


def tone(n=4000, rate=8000, hz=440.0, peak=0.5):
    return (peak * np.sin(2 * np.pi * hz * np.arange(n) / rate)).astype(np.float32)


# reading


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".aiff"])
def test_16_bit_files_are_read_exactly(tmp_path, suffix):
    pcm = np.arange(-32768, 32768, 7, dtype=np.int16)
    soundfile.write(tmp_path / f"a{suffix}", pcm, 8000, subtype="PCM_16")
    wav, rate = audio.read(tmp_path / f"a{suffix}")
    assert rate == 8000 and wav.dtype == torch.float32
    assert torch.equal(wav, torch.from_numpy(pcm).float() / 32768)


@pytest.mark.parametrize("suffix", [".ogg", ".mp3"])
def test_lossy_files_are_read_nearly(tmp_path, suffix):
    if suffix == ".mp3" and "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile has no mp3")
    x = tone(8000, 16000)
    soundfile.write(tmp_path / f"a{suffix}", x, 16000)
    wav, rate = audio.read(str(tmp_path / f"a{suffix}"))  # a string will do
    assert rate == 16000 and wav.shape == (8000,)
    assert np.abs(wav.numpy() - x)[500:-500].max() < 0.05


def test_every_known_suffix_is_lower_case_and_has_a_dot():
    assert all(s.startswith(".") and s == s.lower() for s in audio.AUDIO_SUFFIXES)


def test_stereo_is_mixed_down_to_the_mean(tmp_path):
    left, right = tone(), tone(hz=900)
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], 1), 8000, subtype="FLOAT")
    wav, _, _, channels = audio.decode(tmp_path / "s.wav")
    assert channels == 2
    np.testing.assert_allclose(wav.numpy(), (left + right) / 2, atol=1e-7)


def test_one_sample_is_a_clip(tmp_path):
    soundfile.write(tmp_path / "one.wav", tone(1) + 0.25, 8000)
    assert audio.read(tmp_path / "one.wav")[0].tolist() == [0.25]


def test_overshoot_of_float_files_is_clipped(tmp_path):
    soundfile.write(tmp_path / "hot.wav", 3 * tone(), 8000, subtype="FLOAT")
    wav, _ = audio.read(tmp_path / "hot.wav")
    np.testing.assert_allclose(wav.numpy(), (3 * tone()).clip(-1, 1), atol=1e-7)


def patched(path, data_size, riff_size):
    raw = bytearray(path.read_bytes())
    assert raw[36:40] == b"data"
    raw[4:8], raw[40:44] = struct.pack("<I", riff_size), struct.pack("<I", data_size)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "data_size, riff_size",
    [(0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (0, 0xFFFFFFFF), (0x7FFFF000, 0x7FFFF024)],
)
def test_streamed_wavs_whose_size_was_never_filled_in_are_read_whole(
    tmp_path, data_size, riff_size
):
    path = tmp_path / "stream.wav"
    soundfile.write(path, tone(), 8000)
    whole, _ = audio.read(path)
    patched(path, data_size, riff_size)
    assert torch.equal(audio.read(path)[0], whole)


def test_a_wav_with_chunks_before_and_after_the_samples_is_read(tmp_path):
    path = tmp_path / "chunks.wav"
    soundfile.write(path, tone(), 8000)
    whole, _ = audio.read(path)
    raw = path.read_bytes()
    note = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"  # odd size: padded to even
    raw = raw[:36] + note + raw[36:] + note
    path.write_bytes(raw[:4] + struct.pack("<I", len(raw) - 8) + raw[8:])
    assert torch.equal(audio.read(path)[0], whole)


# every file that cannot be used: AudioError with the file's name, the reason and a way out


def expect(path, kind, *words):
    with pytest.raises(AudioError) as caught:
        audio.read(path)
    error = caught.value
    assert isinstance(error, ValueError) and error.kind == kind
    message = str(error)
    assert message.startswith(str(path)) and ";" in message and "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_file(tmp_path):
    expect(tmp_path / "none.wav", "not found")


def test_folder(tmp_path):
    expect(tmp_path, "not a file", "directory")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    expect(tmp_path / "pipe.wav", "not a file")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "locked.wav"
    soundfile.write(path, tone(), 8000)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)  # chmod does not stop a superuser
    expect(path, "unreadable", "Permission denied")


def test_empty_file(tmp_path):
    (tmp_path / "empty.wav").touch()
    expect(tmp_path / "empty.wav", "empty", "0 bytes")


@pytest.mark.parametrize("suffix", [".wav", ".aiff"])
def test_file_without_samples(tmp_path, suffix):
    soundfile.write(tmp_path / f"a{suffix}", tone(0), 8000)
    expect(tmp_path / f"a{suffix}", "empty", "no samples")


@pytest.mark.parametrize("name", ["text.wav", "text.mp3", "text.raw", "text"])
def test_non_audio(tmp_path, name):
    (tmp_path / name).write_text("this is not audio\n" * 50)
    expect(tmp_path / name, "not audio", ".flac")


@pytest.mark.parametrize("keep", [44, 45, 1000, -1])
def test_truncated_wav(tmp_path, keep):
    path = tmp_path / "cut.wav"
    soundfile.write(path, tone(), 8000)
    path.write_bytes(path.read_bytes()[:keep])
    expect(path, "truncated", "8,000 data bytes")


@pytest.mark.parametrize("suffix", [".flac", ".aiff"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_other_formats_cut_short(tmp_path, suffix, part):
    path = tmp_path / f"cut{suffix}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 40_000)
    soundfile.write(path, noise, 8000)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(part * len(raw))])
    with pytest.raises(AudioError) as caught:
        audio.read(path)
    assert caught.value.kind in ("truncated", "damaged", "not audio")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity(tmp_path, bad):
    x = tone()
    x[7:10] = bad
    soundfile.write(tmp_path / "nan.wav", x, 8000, subtype="FLOAT")
    expect(tmp_path / "nan.wav", "NaN or infinity", "3 of 4,000")


def test_int16_values_stored_as_float(tmp_path):
    soundfile.write(tmp_path / "loud.wav", 30000 * tone(), 8000, subtype="FLOAT")
    expect(tmp_path / "loud.wav", "wrong scale", "32768")


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_a_sample_rate_that_no_audio_has_is_a_damaged_header(tmp_path, rate):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), 8000)
    raw = path.read_bytes()
    path.write_bytes(raw[:24] + struct.pack("<I", rate) + raw[28:])
    with pytest.raises(AudioError, match=f"absurd sample rate .{rate:,} Hz"):
        audio.read(path, 8000)


def test_a_name_that_is_not_utf8_is_refused_in_words_that_can_be_printed(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    try:
        soundfile.write(tmp_path / "a.wav", tone(), 8000)
        os.rename(tmp_path / "a.wav", path)
    except OSError:
        pytest.skip("names are always UTF-8 here")
    with pytest.raises(AudioError) as caught:
        audio.read(os.fsdecode(path))
    assert str(caught.value).encode().endswith(b"caf\\udce9.wav: name is not UTF-8; rename it")


# files whose header does not tell their length, or that cannot be sought in


def music(n, rate=16000, seed=0):
    """Chords, loud in the first tenth: frames of variable bit rate are long there."""
    rng = np.random.default_rng(seed)
    t = np.arange(n) / rate
    x = sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(100, 3000, 12)) / 24
    loud = np.where(np.arange(n) < n // 10, 1, 0.01)
    return ((x + 0.2 * rng.standard_normal(n)) * loud * 0.8).astype(np.float32)


def write_mp3(path, x, rate=16000, headed=False, tag=0, **settings):
    """An mp3 file, its Info frame removed unless `headed`, after a tag of so many bytes."""
    if "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile has no mp3")
    soundfile.write(path, x, rate, format="MP3", **settings)
    raw = path.read_bytes()
    if not headed:
        sync = raw[raw.index(b"\xff") :][:2]
        info = max(raw.find(b"Xing"), raw.find(b"Info"))
        assert info > 0
        raw = raw[raw.index(sync, info) :]
    size = bytes(tag >> shift & 127 for shift in (21, 14, 7, 0))
    path.write_bytes((b"ID3\x03\x00\x00" + size + bytes(tag) if tag else b"") + raw)


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("tag", [0, 60_000])
def test_an_mp3_is_read_to_its_end_whatever_its_header_lacks(tmp_path, mode, tag):
    x = music(160_000)
    write_mp3(tmp_path / "headed.mp3", x, headed=True, tag=tag, bitrate_mode=mode)
    write_mp3(tmp_path / "bare.mp3", x, tag=tag, bitrate_mode=mode)
    headed, rate = audio.read(tmp_path / "headed.mp3")
    bare, _ = audio.read(tmp_path / "bare.mp3")
    assert len(headed) == len(x) and 0 <= len(bare) - len(x) < 3 * 1152  # the encoder's padding
    delay = (
        int(np.argmax(np.correlate(bare[:20_000].numpy(), headed[2000:10_000].numpy(), "valid")))
        - 2000
    )
    assert torch.allclose(
        bare[delay:][4000:-2000], headed[4000 : len(bare) - delay - 2000], atol=1e-5
    )
    for name, wav in {"headed": headed, "bare": bare}.items():
        assert audio.duration(tmp_path / f"{name}.mp3") == len(wav) / rate


def test_an_mp3_whose_header_tells_its_length_is_read_without_a_word(tmp_path, capfd):
    write_mp3(tmp_path / "a.mp3", music(16_000), headed=True)
    assert len(audio.read(tmp_path / "a.mp3")[0]) == 16_000
    assert capfd.readouterr() == ("", "")


def test_mp3_inside_of_wav_is_read_to_its_end(tmp_path):
    write_mp3(tmp_path / "a.mp3", music(160_000), bitrate_mode="VARIABLE")
    raw = (tmp_path / "a.mp3").read_bytes()
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 16000, 4000, 1, 0, 12, 1, 2, 144, 1, 0)
    chunks = {b"fmt ": form, b"fact": struct.pack("<I", 160_000), b"data": raw}
    body = b"".join(
        k + struct.pack("<I", len(v)) + v + bytes(len(v) % 2) for k, v in chunks.items()
    )
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body)
    assert torch.equal(audio.read(tmp_path / "a.wav")[0], audio.read(tmp_path / "a.mp3")[0])


def test_a_cut_mp3_whose_header_tells_its_length_is_truncated(tmp_path):
    path = tmp_path / "cut.mp3"
    write_mp3(path, music(160_000), headed=True)
    path.write_bytes(path.read_bytes()[:-5000])
    expect(path, "truncated", "of 160,000 samples")


def write_kind(path, kind, x, rate=8000):
    """A file of format and encoding `kind`, such as "WAV GSM610"."""
    if kind == "MP3":
        return write_mp3(path, x, rate)
    file_format, encoding = kind.split()[:2]
    if encoding not in soundfile.available_subtypes(file_format):
        pytest.skip(f"this libsndfile has no {kind}")
    soundfile.write(path, x, rate, format=file_format, subtype=encoding)
    if kind == "FLAC PCM_16 unknown":  # the total number of samples: 36 bits of the first block
        raw = bytearray(path.read_bytes())
        raw[21] &= 0xF0
        raw[22:26] = bytes(4)
        path.write_bytes(raw)


ODD = [
    "WAV GSM610", "WAV G721_32", "AU G723_24", "AU G723_40", "WAV NMS_ADPCM_16",
    "WAV NMS_ADPCM_24", "WAV NMS_ADPCM_32", "AIFF DWVW_16", "FLAC PCM_16 unknown",
]  # fmt: skip
USUAL = ["WAV PCM_16", "WAV FLOAT", "WAV MS_ADPCM", "AIFF PCM_24", "FLAC PCM_16", "OGG VORBIS"]


@pytest.mark.parametrize("kind", ODD)
def test_formats_that_cannot_be_sought_in_are_read_whole(tmp_path, kind):
    write_kind(tmp_path / "a", kind, x := tone(40_000))
    wav, rate = audio.read(tmp_path / "a")
    assert 0 <= len(wav) - len(x) <= 320 and audio.duration(tmp_path / "a") == len(wav) / rate
    assert np.corrcoef(wav[: len(x)], x)[0, 1] > 0.97


@pytest.mark.parametrize("part", [(0, 0.25), (1, 2), (4.2, 4.2001), (4.5, None), (4.9, 99)])
@pytest.mark.parametrize("kind", [*ODD, *USUAL, "MP3"])
def test_a_part_is_that_part_of_the_whole_file(tmp_path, kind, part):
    write_kind(tmp_path / "a", kind, music(40_000))
    (whole, rate), (start, stop) = audio.read(tmp_path / "a"), part
    found = audio.decode(tmp_path / "a", start=start, stop=stop).wav
    expected = whole[round(start * rate) : None if stop is None else round(stop * rate)]
    assert found.shape == expected.shape and len(found) > 0
    assert torch.allclose(found, expected, atol=1e-6 if kind == "MP3" else 0, rtol=0)


def test_what_lies_around_a_part_is_not_decoded(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.flac", np.zeros((200_000, 2)), 8000)
    asked, read = [], audio._Stream.read

    def count(self, frames, **how):
        asked.append(frames)
        return read(self, frames, **how)

    monkeypatch.setattr(audio._Stream, "read", count)
    monkeypatch.setattr(audio, "BLOCK", 8_000)
    assert len(audio.decode(tmp_path / "a.flac", start=20, stop=21).wav) == 8_000
    assert sum(asked) == 8_000 + audio.RUN_UP and max(asked) <= 4_000  # two channels


def test_a_part_before_damage_is_read(tmp_path):
    path = tmp_path / "cut.flac"
    soundfile.write(path, music(160_000), 8000)
    whole, _ = audio.read(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(AudioError):
        audio.read(path)
    assert torch.equal(audio.decode(path, start=2, stop=3).wav, whole[16_000:24_000])


@pytest.mark.parametrize("kind", ["WAV PCM_16", "WAV GSM610", "MP3", "FLAC PCM_16 unknown"])
@pytest.mark.parametrize("start, stop", [(6, 7), (99, None), (1e306, None), (1, 1.00001)])
def test_a_part_without_samples_is_refused(tmp_path, kind, start, stop):
    write_kind(tmp_path / "a", kind, tone(40_000))
    with pytest.raises(AudioError, match="too short .no samples from .* to "):
        audio.decode(tmp_path / "a", start=start, stop=stop)


@pytest.mark.parametrize("start, stop", [(-1, None), (2, 2), (3, 1), (math.nan, None)])
def test_a_part_that_is_none_is_refused(tmp_path, start, stop):
    soundfile.write(tmp_path / "a.wav", tone(), 8000)
    with pytest.raises(ValueError, match="0 <= start < stop"):
        audio.decode(tmp_path / "a.wav", start=start, stop=stop)


# folders


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for path in ("root/b/1.wav", "root/b/.x.wav", "root/.h/2.wav", "elsewhere/3.FLAC"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (root / "a").symlink_to(root / "b")  # the same files as in b, which is no link
    (root / "b" / "loop").symlink_to(root)
    (root / "c").symlink_to(elsewhere)
    (root / "d").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root / "c")
    assert audio.find(root) == [root / "b/1.wav", root / "c/3.FLAC"]


def test_a_folder_that_cannot_be_looked_into_is_left_out_by_name(tmp_path, monkeypatch, caplog):
    for path in ("a/1.wav", "lost+found/2.wav"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("lost+found"):  # chmod does not stop a superuser
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert audio.find(tmp_path) == [tmp_path / "a/1.wav"]
    assert f"left out the folder {tmp_path}/lost+found: Permission denied" in caplog.text


# writing


def test_what_is_read_is_written_back_exactly(tmp_path):
    pcm = torch.arange(-32768, 32768, dtype=torch.int16)
    audio.write(tmp_path / "new" / "folder" / "a.wav", pcm.float() / 32768, 16000)
    back, rate = audio.read(tmp_path / "new" / "folder" / "a.wav")
    assert rate == 16000 and torch.equal(back * 32768, pcm.float())
    info = soundfile.info(tmp_path / "new" / "folder" / "a.wav")
    assert (info.format, info.subtype, info.channels) == ("WAV", "PCM_16", 1)


def test_full_scale_and_rounding_beyond_it_are_clipped_not_wrapped(tmp_path):
    audio.write(tmp_path / "a.wav", torch.tensor([1.0, 1.0005, -1.0005, -1.0]), 8000)
    assert (audio.read(tmp_path / "a.wav")[0] * 32768).tolist() == [32767, 32767, -32768, -32768]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_floating_point_tensor_is_written(tmp_path, dtype):
    x = torch.tensor([0.0, 0.5, -0.25], dtype=dtype, requires_grad=True)
    audio.write(tmp_path / "a.wav", x, 8000)
    audio.write(tmp_path / "b.wav", x.detach().float().numpy(), 8000)
    assert audio.read(tmp_path / "a.wav")[0].tolist() == [0.0, 0.5, -0.25]
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


@pytest.mark.parametrize(
    "wav, rate, error, words",
    [
        (torch.tensor([0.0, math.nan]), 8000, ValueError, "NaN"),
        (torch.tensor([0.0, math.inf]), 8000, ValueError, "infinity"),
        (torch.tensor([0.0, 1.2]), 8000, ValueError, "1.2"),
        (torch.zeros(2, 100), 8000, ValueError, r"\(2, 100\)"),
        (torch.zeros(0), 8000, ValueError, "T >= 1"),
        (torch.tensor(0.5), 8000, ValueError, r"\(T,\)"),
        (torch.zeros(9, dtype=torch.int16), 8000, TypeError, "32768"),
        (torch.zeros(9), 0, ValueError, "sample rate"),
        (torch.zeros(9), 8000.5, ValueError, "sample rate"),
        (torch.zeros(9), True, ValueError, "sample rate"),
    ],
)
def test_bad_audio_is_refused_and_nothing_is_written(tmp_path, wav, rate, error, words):
    with pytest.raises(error, match=words):
        audio.write(tmp_path / "new" / "a.wav", wav, rate)
    assert list(tmp_path.iterdir()) == []


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.wav"):
        audio.write(tmp_path / "a.flac", torch.zeros(9), 8000)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    audio.write(path, torch.tensor([0.5]), 8000)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        audio.write(path, torch.tensor([0.25]), 8000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]
    assert audio.read(path)[0].tolist() == [0.5]


# resampling


@pytest.mark.parametrize("sr_in, sr_out", [(8000, 16000), (44100, 16000), (16000, 8000)])
def test_a_tone_keeps_its_frequency_and_height(sr_in, sr_out):
    x = torch.from_numpy(tone(sr_in, sr_in, hz=1000))
    y = audio.resample(x, sr_in, sr_out)
    assert y.shape == (sr_out,) and y.dtype == torch.float32
    expected = tone(sr_out, sr_out, hz=1000)
    assert np.abs(y.numpy() - expected)[400:-400].max() < 2e-3


def test_what_the_new_rate_cannot_hold_does_not_fold_back():
    x = torch.from_numpy(tone(16000, 16000, hz=5000))
    assert audio.resample(x, 16000, 8000)[400:-400].abs().max() < 0.01


def test_the_length_is_the_ceiling_and_batches_go_through():
    x = torch.rand(2, 3, 1001) - 0.5
    y = audio.resample(x, 16000, 8000)
    assert y.shape == (2, 3, 501)
    assert torch.equal(y[1, 2], audio.resample(x[1, 2], 16000, 8000))
    assert torch.equal(audio.resample(x, 8000, 8000), x)
    assert audio.resample(torch.zeros(0), 8000, 16000).shape == (0,)


def test_ringing_stays_within_full_scale():
    square = torch.ones(1000) - 2 * (torch.arange(1000) // 50 % 2)
    assert audio.resample(square, 8000, 16000).abs().max() <= 1


def test_read_resamples_on_request(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 8000)
    wav, rate = audio.read(tmp_path / "a.wav", sample_rate=16000)
    assert rate == 16000 and wav.shape == (8000,)


@pytest.mark.parametrize("block", [2000, 7777])
@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 44_100, 44_101])
def test_resampling_in_blocks_is_resampling_at_once(tmp_path, monkeypatch, rate, block):
    soundfile.write(tmp_path / "a.wav", np.stack([music(20_000), tone(20_000)], 1), 16_000)
    wav, _ = audio.read(tmp_path / "a.wav")
    monkeypatch.setattr(audio, "BLOCK", 2 * block)
    found, _ = audio.read(tmp_path / "a.wav", rate)
    assert torch.allclose(found, audio.resample(wav, 16_000, rate), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rates", [(0, 8000), (8000, 0), (8000, -1), (8000, 16000.0)])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ValueError, match="sample rate"):
        audio.resample(torch.zeros(10), *rates)


def test_integer_samples_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        audio.resample(torch.zeros(10, dtype=torch.int16), 8000, 16000)
