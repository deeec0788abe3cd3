"""The Cauchy kernel of S4: spectra of state-space kernels, fused, in O(H L) memory.

    >>> Khat = cauchy_kernel.nplr_kernel(Lambda, P, B, Ct, dt, L)  # (H, L//2+1)
    >>> K = torch.fft.irfft(Khat, n=L)                             # (H, L)

Compiled for the CPU and for CUDA on first use, plain PyTorch (plain.py) where that cannot be;
`python -m cauchy_kernel` tells which, `python -m cauchy_kernel.benchmark` what it gains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .functions import cauchy_mult, nplr_kernel

__all__ = ["cauchy_mult", "nplr_kernel"]


def __getattr__(name: str) -> Any:
    """The functions, when one is asked for: the commands answer --help without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import functions

    return getattr(functions, name)
