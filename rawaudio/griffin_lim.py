"""Griffin-Lim: audio for log-mel spectrograms, without weights.

Phases are found that agree with the magnitudes, from frame to overlapping frame (fast Griffin-Lim,
Perraudin et al. 2013). Magnitudes of the bins are the smallest that give the mel bands.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from rawaudio.mel import mel_filters

ITERATIONS, MOMENTUM = 60, 0.99


def griffin_lim(
    mel: Tensor, sample_rate: int, n_fft: int, hop: int, iterations: int = ITERATIONS
) -> Tensor:
    """Log-mel spectrograms (B, bands, F) as `log_mel` makes them -> audio (B, F hop).

    The phases begin at random, always the same, so the same spectrogram gives the same audio.
    """
    frames = mel.shape[2]
    magnitude = _bins(mel.float().exp(), sample_rate, n_fft)
    rng = torch.Generator().manual_seed(0)
    angle = 2 * torch.pi * torch.rand(magnitude.shape[1:], generator=rng).to(mel.device)
    phase = torch.polar(torch.ones_like(angle), angle)
    window = torch.hann_window(n_fft, device=mel.device)
    weight = _overlapped(window.square()[None, :, None].expand(1, n_fft, frames), hop)
    weight = weight.clamp(min=1e-3 * float(weight.max()))

    def audio(spectrum: Tensor) -> Tensor:
        pieces = torch.fft.irfft(spectrum, n_fft, dim=1) * window[:, None]
        return _overlapped(pieces, hop) / weight

    before = 0.0
    for _ in range(iterations):
        wav = audio(magnitude * phase)
        spectrum = torch.fft.rfft(wav.unfold(1, n_fft, hop) * window, dim=2).mT
        ahead = spectrum + MOMENTUM * (spectrum - before)
        phase, before = ahead / ahead.abs().clamp(min=1e-9), spectrum
    left = (n_fft - hop) // 2
    return audio(magnitude * phase)[:, left : left + frames * hop]


def _overlapped(pieces: Tensor, hop: int) -> Tensor:
    """The sum (B, (F - 1) hop + n) of pieces (B, n, F), each `hop` after the one before."""
    _, n, frames = pieces.shape
    length = (frames - 1) * hop + n
    return F.fold(pieces, (1, length), (1, n), stride=(1, hop))[:, 0, 0]


def _bins(mel: Tensor, sample_rate: int, n_fft: int) -> Tensor:
    """Magnitudes (B, bins, F) of mel magnitudes (B, bands, F)."""
    inverse = _inverse(sample_rate, mel.shape[1], n_fft).to(mel.device)
    return (inverse @ mel).clamp(min=0)


@functools.cache
def _inverse(sample_rate: int, n_mels: int, n_fft: int) -> Tensor:
    return torch.linalg.pinv(mel_filters(sample_rate, n_mels, n_fft))
