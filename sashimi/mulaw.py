"""mu-law: audio in [-1, 1] <-> 256 classes, finer near zero where the ear is.

Companding F(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu) with mu = 255 (ITU-T G.711's curve), then
255 uniform steps. Formulas and rounding are those of torchaudio's `mu_law_encoding` and
`mu_law_decoding`. 256 classes have no middle: decode(SILENCE) is 8.6e-5, not 0. Models that stretch
each clip to full scale or round another way (state-spaces) cannot interchange their classes.
"""

import math

import torch
from torch import Tensor

from rawaudio.arguments import floats, tensor
from rawaudio.errors import UserError

SILENCE = 128  # the class of 0.0, and the input before a clip's first sample
N_CLASSES = 256
MU = N_CLASSES - 1
LOG1P_MU = math.log1p(MU)
OVERSHOOT = 1e-3  # of filters and lossy decoders; int16 audio held as float overshoots by thousands


def encode(x: Tensor, *, check: bool = True, name: str = "x") -> Tensor:
    """Classes of audio: int64, 0..255, of x's shape and device.

    x: floating point, any shape, in [-1, 1]; up to 1 + OVERSHOOT is clamped. float16 and bfloat16
    are computed in float32. Raises ValueError, which calls x by `name`, for larger values and NaN,
    TypeError for other dtypes. `check=False` saves the look at the values (a wait for the GPU):
    all are clamped, and NaN gives an arbitrary class.
    """
    x = checked_audio(x, check, name)
    y = x.sign() * (MU * x.abs()).log1p() / LOG1P_MU
    return ((y + 1) / 2 * MU + 0.5).to(torch.int64)


def decode(q: Tensor, *, check: bool = True) -> Tensor:
    """Audio of classes, the value at the middle of each: float32, of q's shape and device.

    q: any integer dtype and shape, 0..255. encode(decode(q)) == q. Raises ValueError for classes
    outside of that, TypeError for other dtypes. `check=False` saves the look at the values.
    """
    q = checked_classes(q, check)
    y = q.to(torch.float32) / MU * 2 - 1
    return y.sign() * ((y.abs() * LOG1P_MU).exp() - 1) / MU


def checked_audio(x: Tensor, check: bool, name: str) -> Tensor:
    """What `encode` takes, float32 or wider, clamped to [-1, 1]; errors as there."""
    x = floats(name, x, check_finite=False)
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if check and x.numel():
        peak = x.detach().abs().amax().item()
        if not peak <= 1 + OVERSHOOT:
            what = "it holds NaN" if math.isnan(peak) else f"the largest magnitude here is {peak:g}"
            way_out = "divide by it, or by 32768 if this is int16 audio, or clamp to [-1, 1]"
            raise UserError(f"{name}: expected audio in [-1, 1]; {what}: {way_out}")
    return x.clamp(-1, 1)


def checked_classes(q: Tensor, check: bool) -> Tensor:
    """What `decode` takes; errors as there."""
    q = tensor("q", q)
    if q.is_floating_point() or q.is_complex() or q.dtype == torch.bool:
        raise TypeError(f"mulaw.decode takes integer classes 0..{MU}, not {q.dtype}")
    if check and q.dtype != torch.uint8 and q.numel():
        low, high = torch.stack(q.aminmax()).tolist()  # one wait for the GPU, not two
        if low < 0 or high > MU:
            raise UserError(f"mulaw.decode takes classes 0..{MU}; these run from {low} to {high}")
    return q
