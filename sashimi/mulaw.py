"""mu-law: audio in [-1, 1] <-> 256 classes, finer near zero where the ear is.

    q = encode(wav)          # float (..., T) in [-1, 1]  ->  int64 (..., T) in 0..255
    wav = decode(q)          # any integer dtype          ->  float32 in [-1, 1]

Companding F(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu) with mu = 255 (ITU-T G.711's curve), then
255 uniform steps. Formulas and rounding are those of torchaudio's `mu_law_encoding` and
`mu_law_decoding`: same classes, same values. Silence is class 128; because 256 classes have no
middle, decode(128) is 8.6e-5, not 0. Models that stretch each clip to full scale or round
another way (state-spaces) are not interchangeable with these classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rawaudio.arguments import floats, tensor

N_CLASSES = 256
SILENCE = 128  # the class of 0.0, and the input before a clip's first sample
MU = N_CLASSES - 1
LOG1P_MU = math.log1p(MU)

# Filters and lossy decoders overshoot full scale a little; audio on another scale (int16 held as
# float) overshoots by thousands. What lies between is for the caller to decide.
OVERSHOOT = 1e-3


def encode(x: Tensor, *, check: bool = True, name: str = "x") -> Tensor:
    """Classes of audio.

    x: floating point, any shape (empty too), values in [-1, 1]; numpy's too. Computed
    in x's own precision, float16 and bfloat16 in float32. Returns int64 of the same shape and
    device, 0..255.

    Values up to 1 + OVERSHOOT are clamped to full scale. Larger ones and NaN raise ValueError;
    a dtype that is not floating point raises TypeError. `check=False` saves the look at the
    values (a wait for the GPU): everything is then clamped, and NaN gives an arbitrary class.
    name: what the errors call x.
    """
    x = floats(name, x, check_finite=False)
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if check and x.numel():
        peak = x.detach().abs().amax().item()
        if math.isnan(peak):
            raise ValueError(f"{name} holds NaN")
        if peak > 1 + OVERSHOOT:
            raise ValueError(
                f"{name}: expected audio in [-1, 1]; the largest magnitude here is {peak:g}. "
                f"Divide by it (or by 32768 if this is int16 audio), or clamp to [-1, 1]"
            )
    x = x.clamp(-1, 1)
    y = x.sign() * (MU * x.abs()).log1p() / LOG1P_MU
    return ((y + 1) / 2 * MU + 0.5).to(torch.int64)


def decode(q: Tensor, *, check: bool = True) -> Tensor:
    """Audio of classes: the value at the middle of each.

    q: any integer dtype, any shape, 0..255; numpy's too. Returns float32 in [-1, 1], same shape
    and device. encode(decode(q)) == q.

    Classes outside 0..255 raise ValueError; a dtype that is not an integer raises TypeError.
    `check=False` saves the look at the values (a wait for the GPU); uint8 never needs it.
    """
    q = tensor("q", q)
    if q.is_floating_point() or q.is_complex() or q.dtype == torch.bool:
        raise TypeError(
            f"mulaw.decode takes integer classes 0..{MU}, not {q.dtype}; "
            f"logits become classes by argmax or sampling, audio by mulaw.encode"
        )
    if check and q.dtype != torch.uint8 and q.numel():
        low, high = torch.stack(q.aminmax()).tolist()  # one wait, not two
        if low < 0 or high > MU:
            raise ValueError(f"mulaw.decode takes classes 0..{MU}; these run from {low} to {high}")
    y = q.to(torch.float32) / MU * 2 - 1
    return y.sign() * ((y.abs() * LOG1P_MU).exp() - 1) / MU
