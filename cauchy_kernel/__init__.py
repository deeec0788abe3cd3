"""The Cauchy kernel of S4: spectra of state-space kernels, fused, in O(H L) memory.

    >>> Khat = cauchy_kernel.nplr_kernel(Lambda, P, B, Ct, dt, L)  # (H, L//2+1)
    >>> K = torch.fft.irfft(Khat, n=L)                             # (H, L)

Compiled for the CPU and for CUDA on first use, plain PyTorch (plain.py) where that cannot be;
`python -m cauchy_kernel` tells which, `python -m cauchy_kernel.benchmark` what it gains.
"""

from .functions import NotFinite, cauchy_mult, nplr_kernel

__all__ = ["NotFinite", "cauchy_mult", "nplr_kernel"]
