"""Reading, writing and resampling: what comes back is the audio, or one clear error."""

import math
import os
import struct

import numpy as np
import pytest
import soundfile
import torch

from sashimi import audio
from sashimi.audio import AudioError


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


@pytest.mark.parametrize("rates", [(0, 8000), (8000, 0), (8000, -1), (8000, 16000.0)])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ValueError, match="sample rate"):
        audio.resample(torch.zeros(10), *rates)


def test_integer_samples_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        audio.resample(torch.zeros(10, dtype=torch.int16), 8000, 16000)
