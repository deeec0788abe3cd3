"""The backbone's blocks on a CPU, x + layer(norm(x)) in one compiled operation each.

blocks.cpp does what `Block` does in plain PyTorch, which is the reference and serves elsewhere: in
double, on a GPU, with dropout, for odd sizes, without a compiler, and with SASHIMI_KERNEL=torch.
Under autocast to bfloat16 it rounds the factors of matrix products, where the processor has
instructions for that, and nothing else.

The convolution of an S4 block is that of `S4.convolve`; its kernel is an argument (channels, L, H).
"""

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cauchy_kernel import build

log = logging.getLogger(__name__)

POINTERS = ("x", "told", "norm_weight", "norm_bias", "w1", "w1_t", "b1", "w2", "w2_t", "b2",
            "skip", "kernel", "spectrum", "conv", "y", "d_y", "d_x", "d_told", "d_norm_weight",
            "d_norm_bias", "d_w1", "d_b1", "d_w2", "d_b2", "d_skip", "d_kernel")  # fmt: skip
SIZES = ("clips", "length", "features", "inner", "channels", "points", "half", "threads")


class _Problem(ctypes.Structure):
    """As in blocks.cpp."""

    _fields_ = [(x, ctypes.c_void_p) for x in POINTERS] + [(x, ctypes.c_int64) for x in SIZES]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None where there is none: one line in the log says why."""
    if os.environ.get("SASHIMI_KERNEL") == "torch":
        return None
    try:
        return ctypes.CDLL(str(build.cached_library(Path(__file__).with_name("blocks.cpp"))))
    except (build.BuildError, OSError) as error:
        log.warning("sashimi: blocks run as plain PyTorch, slower: %s", error)
        return None


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled operations take a block with this input and this weight of its norm."""
    sequences = x.dim() == 3 and x.numel() > 0 and x.device.type == "cpu"
    if not sequences or weight.dtype != torch.float32:
        return False
    width = _width()
    return width > 0 and len(weight) % width == 0


def constant(function: Callable) -> None:
    """torch.compiler.assume_constant_result, without its import of the compiler, which takes a
    second: torch.compile calls the function instead of looking into it."""
    function._dynamo_marked_constant = True


def _width() -> int:
    """Features of a vector, 0 without compiled code."""
    return library().sashimi_vector() if library() else 0


constant(_width)


def halved() -> bool:
    """Whether autocast asks for products of bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _run(function: str, shape: torch.Size, half: bool = False, **tensors: Tensor | None) -> None:
    """Calls a function of blocks.cpp for blocks of this shape; outputs are among the tensors."""
    for name, x in tensors.items():
        if x is not None and (not x.is_contiguous() or x.data_ptr() % 64):
            tensors[name] = x.clone(memory_format=torch.contiguous_format)
    problem = _Problem(**{name: x.data_ptr() for name, x in tensors.items() if x is not None})
    problem.clips, problem.length, problem.features = shape
    problem.inner = len(tensors["b1"]) if "b1" in tensors else 0
    problem.channels = len(tensors["kernel"]) if "kernel" in tensors else 0
    problem.points, problem.half = points(problem.length), half
    problem.threads = torch.get_num_threads()
    getattr(library(), function)(ctypes.byref(problem))


@functools.cache
def points(length: int) -> int:
    """Complex points of the transform with which sequences of this length are convolved: the least
    number from there on that has no prime factors but 2, 3 and 5."""
    digits = range(length.bit_length())
    odd = (3**i * 5**k for i in digits for k in digits)
    return min(f << (-(-length // f) - 1).bit_length() for f in odd)


def _like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


# ---- feed-forward -------------------------------------------------------------------------------


@torch.library.custom_op("sashimi::feed_forward", mutates_args=())
def feed_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    b2: Tensor, half: bool,
) -> Tensor:  # fmt: skip
    """x (B, L, H) + W2 gelu(W1 norm(x) + b1) + b2; w1 (R, H), w2 (H, R)."""
    (y,) = _like(x)
    _run("sashimi_feed_forward", x.shape, half, x=x, norm_weight=norm_weight, norm_bias=norm_bias,
         w1_t=w1.t(), b1=b1, w2_t=w2.t(), b2=b2, y=y)  # fmt: skip
    return y


@torch.library.custom_op("sashimi::feed_forward_backward", mutates_args=())
def feed_forward_backward(
    d_y: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor,
    w2: Tensor, b2: Tensor, half: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the seven tensors."""
    grads = _like(x, norm_weight, norm_bias, w1, b1, w2, b2)
    names = ("d_x", "d_norm_weight", "d_norm_bias", "d_w1", "d_b1", "d_w2", "d_b2")
    _run("sashimi_feed_forward_backward", x.shape, half, d_y=d_y, x=x, norm_weight=norm_weight,
         norm_bias=norm_bias, w1=w1, w1_t=w1.t(), b1=b1, w2=w2,
         **dict(zip(names, grads, strict=True)))  # fmt: skip
    return grads


# ---- S4 -----------------------------------------------------------------------------------------


@torch.library.custom_op("sashimi::spectrum", mutates_args=())
def spectrum(kernel: Tensor) -> Tensor:
    """Kernel (channels, L, H) -> its spectrum, in the order in which `s4` reads it."""
    channels, length, features = kernel.shape
    out = kernel.new_empty(features, points(length) // 2 + 1, 4)
    _run("sashimi_spectrum", (1, length, features), kernel=kernel, spectrum=out)
    return out


@torch.library.custom_op("sashimi::s4_known", mutates_args=())
def s4_known(
    x: Tensor, told: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, spectrum: Tensor,
    skip: Tensor, weight: Tensor, bias: Tensor, half: bool,
) -> Tensor:  # fmt: skip
    """`s4` of a known spectrum, without gradients."""
    (y,) = _like(x)
    _forward(y, y, x, told, norm_weight, norm_bias, spectrum, skip, weight, bias, half)
    return y


@torch.library.custom_op("sashimi::s4", mutates_args=())
def s4(
    x: Tensor, told: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, kernel: Tensor,
    skip: Tensor, weight: Tensor, bias: Tensor, half: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + project(gelu(v)) and v = kernel * u + skip u, for u = norm(x) + told.

    x (B, L, H), told (B, H), kernel (channels, L, H), weight (H, H) or, with a gate, (2H, H).
    """
    y, conv = _like(x, x)
    _forward(y, conv, x, told, norm_weight, norm_bias, spectrum(kernel), skip, weight, bias, half)
    return y, conv


def _forward(y, conv, x, told, norm_weight, norm_bias, spectrum, skip, weight, bias, half) -> None:
    _run("sashimi_s4", x.shape, half, x=x, told=told, norm_weight=norm_weight, norm_bias=norm_bias,
         spectrum=spectrum, skip=skip, w1_t=weight.t(), b1=bias, conv=conv, y=y)  # fmt: skip


@torch.library.custom_op("sashimi::s4_backward", mutates_args=())
def s4_backward(
    d_y: Tensor, conv: Tensor, x: Tensor, told: Tensor | None, norm_weight: Tensor,
    norm_bias: Tensor, kernel: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, half: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the eight tensors from x on; that of `told` is empty where it is None."""
    d_told = x.new_empty(0 if told is None else len(x), x.shape[2])
    d_skip = x.new_empty(len(x), x.shape[2])  # of each clip
    outputs = _like(x, norm_weight, norm_bias, kernel, weight, bias)
    d_x, d_norm_weight, d_norm_bias, d_kernel, d_weight, d_bias = outputs
    _run("sashimi_s4_backward", x.shape, half, d_y=d_y, conv=conv, x=x, told=told,
         norm_weight=norm_weight, norm_bias=norm_bias, kernel=kernel, spectrum=spectrum(kernel),
         skip=skip, w1=weight, w1_t=weight.t(), b1=bias, d_x=d_x, d_told=d_told, d_skip=d_skip,
         d_norm_weight=d_norm_weight, d_norm_bias=d_norm_bias, d_kernel=d_kernel, d_w1=d_weight,
         d_b1=d_bias)  # fmt: skip
    return [d_x, d_told, d_norm_weight, d_norm_bias, d_kernel, d_skip.sum(0), d_weight, d_bias]


# ---- what autograd and torch.compile are told ---------------------------------------------------


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.half = inputs
    extra = output[1:] if isinstance(output, tuple) else ()
    ctx.save_for_backward(*extra, *tensors)


def _feed_forward_gradients(ctx, d_y):
    return *feed_forward_backward(d_y, *ctx.saved_tensors, ctx.half), None


def _s4_gradients(ctx, d_y, _):
    d_x, d_told, *grads = s4_backward(d_y, *ctx.saved_tensors, ctx.half)
    return d_x, d_told if len(d_told) else None, *grads, None


feed_forward.register_fake(lambda x, *_: _like(x)[0])
feed_forward.register_autograd(_feed_forward_gradients, setup_context=_save)
feed_forward_backward.register_fake(lambda d_y, *args: _like(*args[:-1]))
spectrum.register_fake(lambda k: k.new_empty(k.shape[2], points(k.shape[1]) // 2 + 1, 4))
s4_known.register_fake(lambda x, *_: _like(x)[0])
s4.register_fake(lambda x, *_: tuple(_like(x, x)))
s4.register_autograd(_s4_gradients, setup_context=_save)
s4_backward.register_fake(
    lambda d_y, conv, x, told, *args: [
        *_like(x), x.new_empty(0 if told is None else len(x), x.shape[2]), *_like(*args[:-1])
    ]
)  # fmt: skip
