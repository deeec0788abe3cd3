"""Mel spectrograms, as vocoders take them."""

import math

import numpy as np
import pytest
import torch

from rawaudio.mel import log_mel, mel_filters


def test_mel_filters_are_slaney_triangles():
    """Peaks: 66.7 Hz per mel up to 1 kHz, factors of 6.4^(1/27) above; area 1 each over Hz."""
    rate, n_fft = 16000, 2**16
    filters = mel_filters(rate, 40, n_fft)
    assert filters.shape == (40, n_fft // 2 + 1) and filters.min() >= 0
    np.testing.assert_allclose(filters.sum(1) * rate / n_fft, 1, atol=1e-3)
    top = 15 + math.log(8) / (math.log(6.4) / 27)  # mels of 8 kHz
    mels = np.arange(1, 41) * top / 41
    hertz = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    np.testing.assert_allclose(filters.argmax(1) * rate / n_fft, hertz, atol=0.3)


def test_log_mel_of_a_tone_peaks_in_its_band():
    """One frame per hop, rounded up; the loudest band holds the tone; silence is log 1e-5."""
    t = torch.arange(16000) / 16000
    mel = log_mel(torch.stack([torch.sin(2 * math.pi * 1000 * t), 0 * t]), 16000)
    assert mel.shape == (2, 80, 63) and mel.dtype == torch.float32
    assert (mel[1] - math.log(1e-5)).abs().max() < 1e-4
    peak = mel_filters(16000, 80, 1024)[:, 64].argmax()  # 1000 Hz is bin 64
    assert (mel[0, :, 5:-5].argmax(0) == peak).all() and -1 < mel[0].max() < 4


def test_log_mel_frames_sit_on_their_samples():
    """A click in samples [i hop, (i + 1) hop) is loudest in frame i; any number of clips."""
    wav = torch.zeros(3, 2, 1000)
    wav[..., 5 * 64 + 32] = 1
    mel = log_mel(wav, 8000, 20, 256, 64)
    assert mel.shape == (3, 2, 20, 16) and (mel.exp().sum(-2).argmax(-1) == 5).all()
    assert log_mel(wav[..., :1], 8000).shape == (3, 2, 80, 1)


def test_log_mel_refuses_what_makes_no_spectrogram():
    wav = torch.zeros(1, 100)
    for bad in (dict(wav=wav[:, :0]), dict(wav=wav.sum()), dict(hop=0), dict(n_fft=100),
                dict(n_mels=0), dict(sample_rate=0)):  # fmt: skip
        with pytest.raises(ValueError, match="wav of shape|sample_rate="):
            log_mel(**dict(wav=wav, sample_rate=8000) | bad)
