"""The registered operations, `cauchy_kernel::nplr` and `cauchy_kernel::cauchy`.

Each is opaque to autocast and to torch.compile and picks its backend by device when it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, plain

SMALL = 1 << 20  # up to so many (feature, state, node) triples float32 is computed in double


def _working_type(Ct: Tensor, length: int) -> torch.dtype:
    """Few sums may cancel to nothing, and double costs nothing there; many share one scale."""
    small = Ct.shape[1] * Ct.shape[2] * (length // 2 + 1) <= SMALL
    return torch.complex128 if small else Ct.dtype


def _check_finite(**tensors: Tensor) -> None:
    """One look for all; on a GPU it waits for the parameters, so not while a graph is captured."""
    if tensors["dt"].is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if not torch.stack([x.isfinite().all() for x in tensors.values()]).all():
        bad = next(name for name, x in tensors.items() if not x.isfinite().all())
        raise ValueError(f"nplr_kernel: {bad} holds values that are not finite")


@torch.library.custom_op("cauchy_kernel::nplr", mutates_args=())
def nplr(Lambda: Tensor, P: Tensor, B: Tensor, Ct: Tensor, dt: Tensor, length: int) -> Tensor:
    """Spectrum (C, H, L//2+1); the arguments are those of `nplr_kernel`, Ct (C, H, M)."""
    _check_finite(Lambda=Lambda, P=P, B=B, Ct=Ct, dt=dt)
    with torch.autocast(dt.device.type, enabled=False):
        coefficients = plain.coefficients(Lambda, P, B, Ct, dt)
        shape = *Ct.shape[:2], length // 2 + 1
        out = Ct.new_empty(shape, dtype=_working_type(Ct, length))
        native.forward(*coefficients, plain.nodes(length, dt.device), out)
        if length % 2 == 0:
            out[:, :, -1] = plain.last_node(*coefficients)
    return out.to(Ct.dtype)


@nplr.register_fake
def _(Lambda, P, B, Ct, dt, length):
    return Ct.new_empty(*Ct.shape[:2], length // 2 + 1)


@torch.library.custom_op("cauchy_kernel::nplr_backward", mutates_args=())
def nplr_backward(
    grad: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, Ct: Tensor, dt: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of the spectrum -> gradients of Lambda, P, B, Ct, dt."""
    with torch.autocast(dt.device.type, enabled=False):
        coefficients = plain.coefficients(Lambda, P, B, Ct, dt)
        grad = grad.to(_working_type(Ct, length)).contiguous()
        d = native.backward(grad, *coefficients, plain.nodes(length, dt.device))
        d_last = grad[:, :, -1].real if length % 2 == 0 else None
        grads = plain.coefficients_backward(d, d_last, *coefficients, Lambda, P, B, Ct, dt)
        # contiguous, as the line below promises to torch.compile; sums over axes need not be
        return tuple(g.contiguous() for g in grads)


@nplr_backward.register_fake
def _(grad, Lambda, P, B, Ct, dt, length):
    return tuple(x.new_empty(x.shape) for x in (Lambda, P, B, Ct, dt))


def _nplr_setup(ctx, inputs, output):
    *tensors, ctx.length = inputs
    ctx.save_for_backward(*tensors)


def _nplr_autograd(ctx, grad):
    return *nplr_backward(grad, *ctx.saved_tensors, ctx.length), None


nplr.register_autograd(_nplr_autograd, setup_context=_nplr_setup)


@torch.library.custom_op("cauchy_kernel::cauchy", mutates_args=())
def cauchy(v: Tensor, z: Tensor, w: Tensor, symmetric: bool) -> Tensor:
    """v, w (F, N), z (L,) -> (F, L)."""
    return plain.cauchy_forward(v, z, w, symmetric)


@cauchy.register_fake
def _(v, z, w, symmetric):
    return v.new_empty(v.shape[0], z.shape[0])


@torch.library.custom_op("cauchy_kernel::cauchy_backward", mutates_args=())
def cauchy_backward(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, z, w."""
    return plain.cauchy_backward(grad, v, z, w, symmetric)


@cauchy_backward.register_fake
def _(grad, v, z, w, symmetric):
    return torch.empty_like(v), torch.empty_like(z), torch.empty_like(w)


def _cauchy_setup(ctx, inputs, output):
    *tensors, ctx.symmetric = inputs
    ctx.save_for_backward(*tensors)


def _cauchy_autograd(ctx, grad):
    return *cauchy_backward(grad, *ctx.saved_tensors, ctx.symmetric), None


cauchy.register_autograd(_cauchy_autograd, setup_context=_cauchy_setup)


def _vmap_by_loop(op) -> None:
    def rule(info, dims, *args):
        pairs = list(zip(args, dims, strict=True))
        rows = [
            op(*(x if dim is None else x.select(dim, i) for x, dim in pairs))
            for i in range(info.batch_size)
        ]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows), 0
        return tuple(map(torch.stack, zip(*rows, strict=True))), (0,) * len(rows[0])

    op.register_vmap(rule)


for _op in (nplr, nplr_backward, cauchy, cauchy_backward):
    _vmap_by_loop(_op)
