"""The functions of the package: what they are given is checked here, and worked out in ops.py."""

from __future__ import annotations

import torch

from . import ops


def nplr_kernel(
    Lambda: torch.Tensor,
    P: torch.Tensor,
    B: torch.Tensor,
    Ct: torch.Tensor,
    dt: torch.Tensor,
    L: int,
) -> torch.Tensor:
    """Spectrum of the kernel of a diagonal-plus-low-rank state space; differentiable once.

    With A = diag(Lambda) - P P* and its bilinear discretisation Ab, Bb at step dt, returns Khat
    such that torch.fft.irfft(Khat, n=L) is K[l] = C Ab^l Bb, l = 0 .. L-1. M = N/2 states are
    stored; their conjugates are implied, in Lambda, P, B and Ct alike.
    Source: S4, arXiv:2111.00396, algorithm 1; A = diag(Lambda) - P P* as in SaShiMi,
    arXiv:2202.09729, which keeps Re(Lambda) < 0 and so every pole off the nodes.

    Args:
        Lambda: (S, M) complex, diagonal of A, per unit of time; S is H, or 1 if all features
            share it. A pole dt Lambda on a node (real part 0) gives inf or nan.
        P: (S, M) complex, the rank-one part of A.
        B: (S, M) complex.
        Ct: (H, M) or (C, H, M) complex, C (I - Ab^L); C channels share all else.
        dt: (H,) real, step.
        L: length in samples, at least 1.

    Returns:
        (H, L//2+1), or (C, H, L//2+1), complex as Ct. complex64 is accurate to a few 1e-7 of
        the largest |K|: poles and nodes are compared in double.

    Raises:
        TypeError, ValueError: naming the argument that is not as above. Values that are not
            finite are an error too (on a GPU, not while a CUDA graph is captured).
    """
    args = {"Lambda": Lambda, "P": P, "B": B, "Ct": Ct, "dt": dt}
    for name, x in args.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"nplr_kernel: {name} must be a tensor, not {type(x).__name__}")
    if Ct.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(f"nplr_kernel: Ct must be complex64 or complex128, not {Ct.dtype}")
    real = torch.float32 if Ct.dtype == torch.complex64 else torch.float64
    if dt.dtype in (torch.float16, torch.bfloat16):  # autocast may hand these over
        args["dt"] = dt = dt.to(real)
    for name, x in args.items():
        dtype = real if name == "dt" else Ct.dtype
        if x.dtype != dtype:
            raise TypeError(f"nplr_kernel: {name} must be {dtype} with this Ct, not {x.dtype}")
        if x.device != Ct.device:
            raise ValueError(f"nplr_kernel: {name} is on {x.device}, Ct on {Ct.device}")
    if Ct.dim() not in (2, 3) or 0 in Ct.shape:
        raise ValueError(f"nplr_kernel: Ct must be (H, M) or (C, H, M), not {tuple(Ct.shape)}")
    n_features, n_states = Ct.shape[-2:]
    if dt.shape != (n_features,):
        raise ValueError(f"nplr_kernel: dt must be (H,) = ({n_features},), not {tuple(dt.shape)}")
    for name in ("Lambda", "P", "B"):
        shape = tuple(args[name].shape)
        if shape not in ((n_features, n_states), (1, n_states)) or shape != tuple(Lambda.shape):
            raise ValueError(
                f"nplr_kernel: {name} must be (S, M) with M = {n_states}, S = {n_features} or 1, "
                f"the same S in Lambda, P and B; not {shape}"
            )
    if isinstance(L, bool) or not isinstance(L, (int, torch.SymInt)):
        raise TypeError(f"nplr_kernel: L must be an int, not {type(L).__name__}")
    if L < 1:
        raise ValueError(f"nplr_kernel: L must be at least 1, not {L}")
    channels = Ct if Ct.dim() == 3 else Ct[None]
    # The compiled operations take one or two channels at a time.
    parts = [ops.nplr(Lambda, P, B, part, dt, L) for part in channels.split(2)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out if Ct.dim() == 3 else out[0]


def cauchy_mult(
    v: torch.Tensor, z: torch.Tensor, w: torch.Tensor, symmetric: bool = True
) -> torch.Tensor:
    """Cauchy sums sum_n v_n / (z_j - w_n), differentiable once, in bounded memory.

    With `symmetric` (both halves of conjugate pairs, one of them stored) each term has its
    partner conj(v_n) / (z_j - conj(w_n)) added. A pole on a node, w_n = z_j, gives inf or nan.

    Args:
        v: (..., N) complex numerators.
        z: (L,) complex nodes.
        w: (..., N) complex poles; v and w broadcast against each other.

    Returns:
        (..., L) in the type of v.

    Raises:
        TypeError, ValueError: naming the argument whose type, device or shape does not fit.
    """
    for name, x in (("v", v), ("z", z), ("w", w)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"cauchy_mult: {name} must be a tensor, not {type(x).__name__}")
        if x.dtype not in (torch.complex64, torch.complex128) or x.dtype != v.dtype:
            raise TypeError(
                f"cauchy_mult: v, z and w must all be complex64 or all complex128; {name} is "
                f"{x.dtype}"
            )
        if x.device != v.device:
            raise ValueError(f"cauchy_mult: {name} is on {x.device}, v on {v.device}")
    if z.dim() != 1:
        raise ValueError(f"cauchy_mult: z must be (L,), not {tuple(z.shape)}")
    try:
        v, w = torch.broadcast_tensors(v, w)
    except RuntimeError:
        shapes = f"v {tuple(v.shape)} and w {tuple(w.shape)}"
        raise ValueError(f"cauchy_mult: {shapes} do not broadcast") from None
    if v.dim() == 0:
        raise ValueError("cauchy_mult: v and w must be (..., N)")
    out = ops.cauchy(v.reshape(-1, v.shape[-1]), z, w.reshape(-1, w.shape[-1]), symmetric)
    return out.reshape(*v.shape[:-1], len(z))
