"""The functions of the package, and the registered operation `cauchy_kernel::nplr` behind one.

The operation is opaque to autocast and to torch.compile and picks its backend when it runs.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import native, plain

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
SMALL = 1 << 20  # up to so many (feature, state, node) triples float32 is computed in double


def nplr_kernel(Lambda: Tensor, P: Tensor, B: Tensor, Ct: Tensor, dt: Tensor, L: int) -> Tensor:
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
            finite are an error too on a CPU; on a GPU the host would have to wait for them.
    """
    states = {"Lambda": Lambda, "P": P, "B": B}
    _check_tensors("nplr_kernel", Ct=Ct, dt=dt, **states)
    dt = dt.to(REAL[Ct.dtype])
    if Ct.dim() not in (2, 3) or 0 in Ct.shape:
        raise ValueError(f"nplr_kernel: Ct must be (H, M) or (C, H, M), not {tuple(Ct.shape)}")
    n_features, n_states = Ct.shape[-2:]
    if dt.shape != (n_features,):
        raise ValueError(f"nplr_kernel: dt must be (H,) = ({n_features},), not {tuple(dt.shape)}")
    for name, x in states.items():
        shape = tuple(x.shape)
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
    parts = [nplr(Lambda, P, B, part, dt, L) for part in channels.split(2)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out if Ct.dim() == 3 else out[0]


def cauchy_mult(v: Tensor, z: Tensor, w: Tensor, symmetric: bool = True) -> Tensor:
    """Cauchy sums sum_n v_n / (z_j - w_n), differentiable, in bounded memory.

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
    _check_tensors("cauchy_mult", v=v, z=z, w=w)
    if z.dim() != 1:
        raise ValueError(f"cauchy_mult: z must be (L,), not {tuple(z.shape)}")
    try:
        v, w = torch.broadcast_tensors(v, w)
    except RuntimeError:
        shapes = f"v {tuple(v.shape)} and w {tuple(w.shape)}"
        raise ValueError(f"cauchy_mult: {shapes} do not broadcast") from None
    if v.dim() == 0:
        raise ValueError("cauchy_mult: v and w must be (..., N)")

    def sums(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
        out = (v[..., None] / (z - w[..., None])).sum(-2)
        return out + (v.conj()[..., None] / (z - w.conj()[..., None])).sum(-2) if symmetric else out

    size = max(1, plain.block_size(v.device) // max(1, v.numel()))
    blocks = [  # of nodes; the backward pass computes them again, one at a time
        checkpoint(sums, v, part, w, use_reentrant=False, preserve_rng_state=False)
        for part in z.split(size)
    ]
    return torch.cat(blocks, -1)


class NotFinite(ValueError):
    """What a kernel is made of holds NaN or infinity."""


def _check_tensors(function: str, **tensors: Tensor) -> None:
    """All complex in the type of the first, dt real in the same precision; on the same device."""
    like, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, not {type(x).__name__}")
        if first.dtype not in REAL:
            raise TypeError(f"{function}: {like} must be complex64 or complex128, not {x.dtype}")
        dtype = REAL[first.dtype] if name == "dt" else first.dtype
        halved = name == "dt" and x.dtype in (torch.float16, torch.bfloat16)  # by autocast
        if x.dtype != dtype and not halved:
            raise TypeError(f"{function}: {name} must be {dtype} with this {like}, not {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{function}: {name} is on {x.device}, {like} on {first.device}")


@torch.library.custom_op("cauchy_kernel::nplr", mutates_args=())
def nplr(Lambda: Tensor, P: Tensor, B: Tensor, Ct: Tensor, dt: Tensor, length: int) -> Tensor:
    """Spectrum (C, H, L//2+1); the arguments are those of `nplr_kernel`, Ct (C, H, M)."""
    if dt.device.type == "cpu":  # the host would have to wait for a GPU, in every layer
        for name, x in zip(("Lambda", "P", "B", "Ct", "dt"), (Lambda, P, B, Ct, dt), strict=True):
            if not x.isfinite().all():
                raise NotFinite(f"nplr_kernel: {name} holds values that are not finite")
    with torch.autocast(dt.device.type, enabled=False):
        coefficients = plain.coefficients(Lambda, P, B, Ct, dt)
        shape = *Ct.shape[:2], length // 2 + 1
        out = Ct.new_empty(shape, dtype=_working_type(Ct, length))
        native.forward(*coefficients, plain.nodes(length, dt.device), out)
        if length % 2 == 0:
            out[:, :, -1] = plain.last_node(*coefficients)
    return out.to(Ct.dtype)


def nplr_gradients(
    grad: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, Ct: Tensor, dt: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of the spectrum -> gradients of Lambda, P, B, Ct, dt."""
    with torch.autocast(dt.device.type, enabled=False):
        coefficients = plain.coefficients(Lambda, P, B, Ct, dt)
        grad = grad.to(_working_type(Ct, length)).contiguous()
        d = native.backward(grad, *coefficients, plain.nodes(length, dt.device))
        d_last = grad[:, :, -1].real if length % 2 == 0 else None
        grads = plain.coefficients_backward(d, d_last, *coefficients, Lambda, P, B, Ct, dt)
        # Contiguous, as torch.compile is told below; sums over axes need not be.
        return tuple(g.contiguous() for g in grads)


nplr_backward = torch.library.custom_op("cauchy_kernel::nplr_backward", mutates_args=())(
    nplr_gradients
)


def _working_type(Ct: Tensor, length: int) -> torch.dtype:
    """Few sums may cancel to nothing, and double costs nothing there; many share one scale."""
    small = Ct.shape[1] * Ct.shape[2] * (length // 2 + 1) <= SMALL
    return torch.complex128 if small else Ct.dtype


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.length = inputs
    ctx.save_for_backward(*tensors)


nplr.register_fake(
    lambda Lambda, P, B, Ct, dt, length: Ct.new_empty(*Ct.shape[:2], length // 2 + 1)
)
nplr_backward.register_fake(lambda grad, *args: tuple(x.new_empty(x.shape) for x in args[:-1]))
nplr.register_autograd(
    lambda ctx, grad: (*nplr_backward(grad, *ctx.saved_tensors, ctx.length), None),
    setup_context=_save,
)
