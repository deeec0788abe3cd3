"""What users give to the models: taken as what it means, or refused with the argument's name.

Numbers may be numpy's or tensors of one element, arrays may be numpy's or nested lists.
"""

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rawaudio.errors import UserError


def integer(name: str, value: Any, least: int = 1, most: float = math.inf) -> int:
    """The integer `value`; UserError for other things, true and false, and outside the range."""
    try:
        number = least - 1 if _is_bool(value) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        span = f", at least {least}" if most == math.inf else f" from {least} to {most}"
        raise UserError(f"{name}={value}: must be an integer{span}")
    return number


def number(name: str, value: Any) -> float:
    """The number `value`; UserError for text, true and false, and what is no single number."""
    try:
        if not _is_bool(value) and not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise UserError(f"{name}={value}: must be a number")


def tensor(name: str, value: Any) -> Tensor:
    """Numbers as a tensor, the same one if it is one; TypeError for what holds no numbers."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(np.array(value))  # a copy: of any strides, and to be written to
    except (TypeError, ValueError):
        hint = f"expected a tensor or an array of numbers, not {type(value).__name__}"
        raise TypeError(f"{name}: {hint}") from None


def floats(name: str, value: Any, check_finite: bool = True) -> Tensor:
    """The same for floating-point numbers; UserError for values that are not finite."""
    value = tensor(name, value)
    if not value.is_floating_point():
        hint = f"not {value.dtype}; int16 audio is scaled to [-1, 1] by x / 32768"
        raise TypeError(f"{name}: expected floating-point numbers, {hint}")
    if check_finite and not value.isfinite().all():
        raise UserError(f"{name} holds values that are not finite")
    return value


def clips(name: str, value: Any, check_finite: bool = True) -> Tensor:
    """Floating-point (clips, samples >= 1); UserError for other shapes."""
    value = floats(name, value, check_finite)
    if value.dim() != 2 or value.shape[1] == 0:
        raise UserError(f"{name} of shape {tuple(value.shape)}: expected (clips, samples >= 1)")
    return value


def check_generator(generator: Any) -> None:
    """TypeError for what is no torch.Generator, a seed above all."""
    if not isinstance(generator, torch.Generator | None):
        hint = "expected a torch.Generator, as made by torch.Generator().manual_seed(0)"
        raise TypeError(f"generator={generator}: {hint}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == torch.bool
