"""Filters that change the number of frames, as matrices: short signals need no convolution.

    y = x @ upsampling(frames, 2, cutoff).T         # (..., frames) -> (..., 2 frames)

StyleGAN3 (arXiv:2106.12423) puts each nonlinearity between an upsampling and a downsampling, so
that it makes no frequencies that fold. Beyond the ends of a signal are zeros.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

REACH = 8  # taps of a filter on each side of its centre, for each factor 2
BETA = 2.5  # of the Kaiser window


def taps(factor: int, cutoff: float | None = None) -> Tensor:
    """A windowed sinc, (REACH factor + 1,), double.

    cutoff: as a fraction of half the sampling rate that the filter works at; None: 1 / factor.
    """
    cutoff = 1 / factor if cutoff is None else cutoff
    n = torch.arange(REACH * factor + 1, dtype=torch.float64, device="cpu") - REACH * factor // 2
    window = torch.kaiser_window(len(n), False, BETA, dtype=torch.float64, device="cpu")
    return cutoff * torch.sinc(cutoff * n) * window


def smoothing(frames: int, filter: Tensor) -> Tensor:
    """The matrix (frames, frames) of a symmetric filter."""
    impulses = torch.eye(frames, dtype=filter.dtype, device="cpu")[:, None]
    return F.conv1d(impulses, filter[None, None], padding=len(filter) // 2)[:, 0].T


def upsampling(frames: int, factor: int, cutoff: float | None = None) -> Tensor:
    """The matrix (factor frames, frames): zeros between the samples, then the filter. No gain."""
    return smoothing(factor * frames, taps(factor, cutoff))[:, ::factor]


def downsampling(frames: int, cutoff: float | None = None) -> Tensor:
    """The matrix (ceil(frames / 2), frames): the filter, then every second sample."""
    return smoothing(frames, taps(2, cutoff))[::2]


def cutoffs(first: float, last: float, layers: int, critical: int) -> list[float]:
    """Cutoffs before and after each layer: from `first` in equal ratios to `last`, where the last
    `critical` layers are."""
    ratio, rising = last / first, layers - critical
    return [first * ratio ** min(1.0, i / rising) for i in range(layers + 1)]
