"""Reading, writing and resampling: what comes back is the audio, or one clear error."""

import math
import os
import struct
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch

from rawaudio import audio
from rawaudio.audio import AudioError


def tone(n=4000, rate=8000, hz=440.0, peak=0.5):
    return (peak * np.sin(2 * np.pi * hz * np.arange(n) / rate)).astype(np.float32)


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


def write_kind(path, kind, x, rate=8000):
    """A file of format and encoding `kind`, such as "WAV GSM610"."""
    if kind == "MP3":
        return write_mp3(path, x, rate)
    file_format, encoding = kind.split()[:2]
    if encoding not in soundfile.available_subtypes(file_format):
        pytest.skip(f"this libsndfile has no {kind}")
    soundfile.write(path, x, rate, format=file_format, subtype=encoding)
    if kind == "FLAC PCM_16 unknown":  # the total number of samples: 36 bits of the first block
        raw = path.read_bytes()
        path.write_bytes(raw[:21] + bytes([raw[21] & 0xF0, 0, 0, 0, 0]) + raw[26:])


def touch(root, *paths):
    for path in paths or [""]:
        path = Path(root, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def patch(path, begin, *numbers):
    """Little-endian uint32 in place of what the file holds from `begin` on."""
    raw = path.read_bytes()
    patched = struct.pack(f"<{len(numbers)}I", *numbers)
    path.write_bytes(raw[:begin] + patched + raw[begin + len(patched) :])


EXACT = ["WAV PCM_16", "FLAC PCM_16", "FLAC PCM_16 unknown", "AIFF PCM_16"]
USUAL = ["WAV PCM_24", "WAV FLOAT", "WAV MS_ADPCM", "OGG VORBIS", "MP3"]
UNSEEKABLE = ["WAV GSM610", "WAV G721_32", "AU G723_24", "AU G723_40", "WAV NMS_ADPCM_16",
              "WAV NMS_ADPCM_24", "WAV NMS_ADPCM_32", "AIFF DWVW_16"]  # fmt: skip


@pytest.mark.parametrize("kind", [*EXACT, *USUAL, *UNSEEKABLE])
def test_every_format_is_read_whole_and_in_parts(tmp_path, kind):
    t = np.arange(40_000) / 8000
    x = np.float32(
        (0.5 * np.sin(2 * np.pi * (200 + 60 * t) * t) * 32768).round() / 32768
    )  # a sweep
    write_kind(tmp_path / "a", kind, x)
    wav, rate = audio.read(str(tmp_path / "a"))  # a string will do
    assert rate == 8000 and audio.duration(tmp_path / "a") == len(wav) / rate
    if kind in EXACT:
        assert torch.equal(wav, torch.from_numpy(x))
    assert 0 <= len(wav) - len(x) <= (3 * 1152 if kind == "MP3" else 320)  # padding
    delay = np.argmax(np.correlate(wav[:8_000].numpy(), x[:4_000], "valid"))
    assert np.corrcoef(wav[delay:][: len(x) - delay], x[: len(x) - delay])[0, 1] > 0.97
    for start, stop in [(0, 0.25), (1, 2), (4.2, 4.2001), (4.5, None), (4.9, 99)]:
        part = audio.decode(tmp_path / "a", start=start, stop=stop).wav
        expected = wav[round(start * rate) : None if stop is None else round(stop * rate)]
        assert part.shape == expected.shape and len(part) > 0, (start, stop)
        assert torch.allclose(part, expected, atol=1e-6 if kind == "MP3" else 0, rtol=0)
    for start, stop in [(6, 7), (1e306, None), (1, 1.00001)]:
        with pytest.raises(AudioError, match="too short .no samples from .* to "):
            audio.decode(tmp_path / "a", start=start, stop=stop)


@pytest.mark.parametrize("start, stop", [(-1, None), (2, 2), (3, 1), (math.nan, None)])
def test_parts_that_are_none_are_refused(start, stop):
    with pytest.raises(ValueError, match="0 <= start < stop"):
        audio.decode("a.wav", start=start, stop=stop)


@pytest.mark.parametrize(
    "written, expected",
    [(np.stack([tone(), tone(hz=900)], 1), (tone() + tone(hz=900)) / 2),  # mixed down
     (3 * tone(), (3 * tone()).clip(-1, 1)),  # overshoot
     (tone(1) + 0.25, [0.25])],  # one sample is a clip
)  # fmt: skip
def test_what_is_read_is_mono_within_full_scale(tmp_path, written, expected):
    soundfile.write(tmp_path / "a.wav", written, 8000, subtype="FLOAT")
    wav, _, _, channels = audio.decode(tmp_path / "a.wav")
    assert channels == written.ndim and wav.dtype == torch.float32
    np.testing.assert_allclose(wav.numpy(), expected, atol=1e-7)


def test_streamed_wavs_whose_size_was_never_filled_in_are_read(tmp_path):
    path, most = tmp_path / "stream.wav", 0xFFFFFFFF
    soundfile.write(path, tone(), 8000)
    whole, _ = audio.read(path)
    for data, riff in ((most, most), (0, 0), (0, most), (0x7FFFF000, 0x7FFFF024)):
        patch(path, 4, riff)
        patch(path, 40, data)
        assert torch.equal(audio.read(path)[0], whole)


def test_a_wav_with_chunks_before_and_after_the_samples_is_read(tmp_path):
    path = tmp_path / "chunks.wav"
    soundfile.write(path, tone(), 8000)
    whole, _ = audio.read(path)
    raw = path.read_bytes()
    note = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"  # odd size: padded to even
    path.write_bytes(raw[:36] + note + raw[36:] + note)
    patch(path, 4, len(raw) + 2 * len(note) - 8)
    assert torch.equal(audio.read(path)[0], whole)


def refused(path):
    with pytest.raises(AudioError) as caught:
        audio.read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and ";" in message and "\n" not in message
    return caught.value.kind, message


BROKEN = np.where(np.arange(4000) // 3 == 2, math.nan, tone())


def sound(x, rate=8000):
    """Writes these samples; a rate that no audio has is patched in."""

    def write(path):
        soundfile.write(path, x, 8000, subtype="FLOAT")
        if rate != 8000:
            patch(path, 24, rate)

    return write


def text(path):
    path.write_text("this is not audio\n" * 50)


BROKEN = np.where(np.arange(4000) // 3 == 2, math.nan, tone())
NO_AUDIO = [  # name, what makes it, the kind of error and a word of its message
    ("none.wav", lambda path: None, "not found", ""), ("folder.wav", os.mkdir, "not a file", ""),
    ("pipe.wav", getattr(os, "mkfifo", os.mkdir), "not a file", ""),
    ("empty.wav", touch, "empty", ""), ("a.wav", text, "not audio", ".flac"),
    ("a.mp3", text, "not audio", ".flac"), ("a.raw", text, "not audio", ".flac"),
    ("a", text, "not audio", ".flac"), ("a.wav", sound(tone(0)), "empty", "no samples"),
    ("a.aiff", sound(tone(0)), "empty", "no samples"),
    ("a.wav", sound(BROKEN), "NaN or infinity", "3 of 4,000"),
    ("a.wav", sound(np.nan_to_num(BROKEN, nan=math.inf)), "NaN or infinity", "3 of 4,000"),
    ("a.wav", sound(30000 * tone()), "wrong scale", "32768"),
    *[("a.wav", sound(tone(), rate), "absurd sample rate", f"{rate:,} Hz")
      for rate in (1, 999, 768_001, 2**31 - 1)],
]  # fmt: skip


@pytest.mark.parametrize("name, write, kind, words", NO_AUDIO)
def test_what_is_no_audio_is_refused(tmp_path, name, write, kind, words):
    write(tmp_path / name)
    found, message = refused(tmp_path / name)
    assert found == kind and words in message


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".aiff", ".mp3"])
def test_files_cut_short_are_refused(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 40_000)
    if suffix == ".mp3":
        write_mp3(path, noise, headed=True)
    else:
        soundfile.write(path, noise, 8000)
    whole = path.read_bytes()
    for part in (0.999, 0.5, 0.02, 0.00055):
        path.write_bytes(whole[: int(part * len(whole))])
        kind, message = refused(path)
        assert kind in ("truncated", "damaged", "not audio")
        assert suffix != ".wav" or kind == "truncated" and "of 80,000 data bytes" in message


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "locked.wav"
    path.touch()
    refusing = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(type(path), "open", refusing)  # chmod does not stop a superuser
    kind, message = refused(path)
    assert kind == "unreadable" and "Permission denied" in message


def test_a_name_that_is_not_utf8_is_refused_in_words_that_can_be_printed(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    try:
        open(path, "wb").close()
    except OSError:
        pytest.skip("names are always UTF-8 here")
    with pytest.raises(AudioError) as caught:
        audio.read(os.fsdecode(path))
    assert str(caught.value).encode().endswith(b"caf\\udce9.wav: name is not UTF-8; rename it")


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("tag", [0, 60_000])
def test_an_mp3_is_read_to_its_end_whatever_its_header_lacks(tmp_path, mode, tag, capfd):
    """Without a word."""
    x = music(160_000)
    write_mp3(tmp_path / "headed.mp3", x, headed=True, tag=tag, bitrate_mode=mode)
    write_mp3(tmp_path / "bare.mp3", x, tag=tag, bitrate_mode=mode)
    headed, rate = audio.read(tmp_path / "headed.mp3")
    bare, _ = audio.read(tmp_path / "bare.mp3")
    assert len(headed) == len(x) and 0 <= len(bare) - len(x) < 3 * 1152  # the encoder's padding
    match = np.correlate(bare[:20_000].numpy(), headed[2000:10_000].numpy(), "valid")
    delay = int(np.argmax(match)) - 2000
    same = headed[4000 : len(bare) - delay - 2000]
    assert torch.allclose(bare[delay:][4000:-2000], same, atol=1e-5)
    for name, wav in {"headed": headed, "bare": bare}.items():
        assert audio.duration(tmp_path / f"{name}.mp3") == len(wav) / rate
    assert capfd.readouterr() == ("", "")


def test_mp3_inside_of_wav_is_read_to_its_end(tmp_path):
    write_mp3(tmp_path / "a.mp3", music(160_000), bitrate_mode="VARIABLE")
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 16000, 4000, 1, 0, 12, 1, 2, 144, 1, 0)
    raw = (tmp_path / "a.mp3").read_bytes()
    body = b"WAVE"
    for name, chunk in {b"fmt ": form, b"fact": struct.pack("<I", 160_000), b"data": raw}.items():
        body += name + struct.pack("<I", len(chunk)) + chunk + bytes(len(chunk) % 2)
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert torch.equal(audio.read(tmp_path / "a.wav")[0], audio.read(tmp_path / "a.mp3")[0])


def test_what_lies_around_a_part_is_not_decoded(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.flac", np.zeros((200_000, 2)), 8000)
    sizes, read = [], audio._Stream.read

    def count(self, frames, **settings):
        sizes.append(frames)
        return read(self, frames, **settings)

    monkeypatch.setattr(audio._Stream, "read", count)
    monkeypatch.setattr(audio, "BLOCK", 8_000)
    assert len(audio.decode(tmp_path / "a.flac", start=20, stop=21).wav) == 8_000
    assert sum(sizes) == 8_000 + audio.RUN_UP and max(sizes) <= 4_000  # two channels


def test_a_part_before_damage_is_read(tmp_path):
    path = tmp_path / "cut.flac"
    soundfile.write(path, music(160_000), 8000)
    whole, _ = audio.read(path)
    path.write_bytes(path.read_bytes()[:-2000])
    refused(path)
    assert torch.equal(audio.decode(path, start=2, stop=3).wav, whole[16_000:24_000])


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(tmp_path, "root/b/1.wav", "root/b/.x.wav", "root/.h/2.wav", "elsewhere/3.FLAC")
    (root / "a").symlink_to(root / "b")  # the same files as in b, which is no link
    (root / "b" / "loop").symlink_to(root)
    (root / "c").symlink_to(elsewhere)
    (root / "d").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root / "c")
    assert audio.find(root) == [root / "b/1.wav", root / "c/3.FLAC"]


def test_a_folder_that_cannot_be_looked_into_is_left_out_by_name(tmp_path, monkeypatch, caplog):
    touch(tmp_path, "a/1.wav", "lost+found/2.wav")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("lost+found"):  # chmod does not stop a superuser
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert audio.find(tmp_path) == [tmp_path / "a/1.wav"]
    assert f"left out the folder {tmp_path}/lost+found: Permission denied" in caplog.text


def test_what_is_read_is_written_back_exactly(tmp_path):
    path = tmp_path / "new" / "folder" / "a.wav"
    pcm = torch.arange(-32768, 32768, dtype=torch.int16)
    audio.write(path, pcm.float() / 32768, 16000)
    back, rate = audio.read(path)
    assert rate == 16000 and torch.equal(back * 32768, pcm.float())
    info = soundfile.info(path)
    assert (info.format, info.subtype, info.channels) == ("WAV", "PCM_16", 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_floating_point_tensor_is_written_and_clipped_not_wrapped(tmp_path, dtype):
    x = torch.tensor([1.0, 1.0005, -1.0005, -1.0, 0.5], dtype=dtype, requires_grad=True)
    audio.write(tmp_path / "a.wav", x, 8000)
    audio.write(tmp_path / "b.wav", x.detach().float().numpy(), 8000)
    expected = [32767, 32767, -32768, -32768, 16384]
    assert (audio.read(tmp_path / "a.wav")[0] * 32768).tolist() == expected
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


@pytest.mark.parametrize(
    "wav, rate, error, words",
    [(torch.tensor([0.0, math.nan]), 8000, ValueError, "NaN"),
     (torch.tensor([0.0, math.inf]), 8000, ValueError, "infinity"),
     (torch.tensor([0.0, 1.2]), 8000, ValueError, "1.2"),
     (torch.zeros(2, 100), 8000, ValueError, r"\(2, 100\)"),
     (torch.zeros(0), 8000, ValueError, "T >= 1"), (torch.tensor(0.5), 8000, ValueError, r"\(T,\)"),
     (torch.zeros(9, dtype=torch.int16), 8000, TypeError, "32768"),
     *[(torch.zeros(9), rate, ValueError, "sample_rate=") for rate in (0, 8000.5, True)]],
)  # fmt: skip
def test_bad_audio_is_refused_and_nothing_is_written(tmp_path, wav, rate, error, words):
    with pytest.raises(error, match=words):
        audio.write(tmp_path / "new" / "a.wav", wav, rate)
    with pytest.raises(ValueError, match=r"\.wav"):
        audio.write(tmp_path / "new" / "a.flac", torch.zeros(9), 8000)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    audio.write(path, torch.tensor([0.5]), 8000)
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        audio.write(path, torch.tensor([0.25]), 8000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]
    assert audio.read(path)[0].tolist() == [0.5]


@pytest.mark.parametrize("sr_in, sr_out", [(8000, 16000), (44100, 16000), (16000, 8000)])
def test_a_tone_keeps_its_frequency_and_height(sr_in, sr_out):
    y = audio.resample(torch.from_numpy(tone(sr_in, sr_in, hz=1000)), sr_in, sr_out)
    assert y.shape == (sr_out,) and y.dtype == torch.float32
    assert np.abs(y.numpy() - tone(sr_out, sr_out, hz=1000))[400:-400].max() < 2e-3


def test_resampled_audio_does_not_fold_back_nor_ring_beyond_full_scale():
    high = torch.from_numpy(tone(16000, 16000, hz=5000))
    assert audio.resample(high, 16000, 8000)[400:-400].abs().max() < 0.01
    square = torch.ones(1000) - 2 * (torch.arange(1000) // 50 % 2)
    assert audio.resample(square, 8000, 16000).abs().max() <= 1


def test_the_length_is_the_ceiling_and_batches_go_through():
    x = torch.rand(2, 3, 1001) - 0.5
    y = audio.resample(x, 16000, 8000)
    assert y.shape == (2, 3, 501)
    assert torch.equal(y[1, 2], audio.resample(x[1, 2], 16000, 8000))
    assert torch.equal(audio.resample(x, 8000, 8000), x)
    assert audio.resample(torch.zeros(0), 8000, 16000).shape == (0,)


@pytest.mark.parametrize("block", [2000, 7777])
@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 44_101])
def test_read_resamples_in_blocks_as_at_once(tmp_path, monkeypatch, rate, block):
    soundfile.write(tmp_path / "a.wav", np.stack([music(20_000), tone(20_000)], 1), 16_000)
    wav, _ = audio.read(tmp_path / "a.wav")
    monkeypatch.setattr(audio, "BLOCK", 2 * block)
    resampled, new_rate = audio.read(tmp_path / "a.wav", rate)
    expected = audio.resample(wav, 16_000, rate)
    assert new_rate == rate and torch.allclose(resampled, expected, atol=1e-6, rtol=0)


def test_impossible_rates_and_integer_samples_are_refused():
    for rates in [(0, 8000), (8000, 0), (8000, -1), (8000, 16000.0)]:
        with pytest.raises(ValueError, match="sr_.*: must be an integer"):
            audio.resample(torch.zeros(10), *rates)
    with pytest.raises(TypeError, match="floating-point"):
        audio.resample(torch.zeros(10, dtype=torch.int16), 8000, 16000)
