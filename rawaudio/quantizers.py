"""Quantisers: how a model's 256 classes stand for audio. `config.quantizer` names one of them.

    mulaw             torchaudio's mu-law, see sashimi/mulaw.py
    mulaw-published   mu-law as state-spaces/s4 rounds it
    linear            256 equal steps, as its models of Beethoven have them

The last two (src/dataloaders/audio.py of state-spaces/s4) give class 128 the value 0 exactly. Their
data sets stretch every clip, or piece of a recording, from its lowest to its highest sample to full
scale; a model therefore knows stretched audio alone, and that is what its prefixes and `nll` take,
as its clips are: encode(decode(q)) == q.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rawaudio.errors import UserError
from sashimi import mulaw
from sashimi.mulaw import LOG1P_MU, MU, N_CLASSES

SILENCE = mulaw.SILENCE  # of all of them: the class of 0.0, and the input before a clip's first


@dataclass(frozen=True)
class Quantizer:
    """encode and decode have the arguments and errors of those of sashimi/mulaw.py."""

    encode: Callable[..., Tensor]  # audio in [-1, 1] -> classes
    decode: Callable[..., Tensor]  # classes -> audio
    stretch: Callable[[Tensor], Tensor]  # a recording (T,) -> audio as the model knows it
    # the whole of a recording (T,) -> classes, as data sets have them; None: as `encode`
    of_recording: Callable[[Tensor], Tensor] | None = None


def _published(
    compand: Callable[[Tensor], Tensor], expand: Callable[[Tensor], Tensor]
) -> Quantizer:
    """compand: audio, from 0 to 1 -> [0, 1]; expand: class / 128 - 1 -> audio in [-1, 1]."""

    def encode(x: Tensor, *, check: bool = True, name: str = "x") -> Tensor:
        x = mulaw.checked_audio(x, check, name)
        return (compand((x + 1) / 2) * N_CLASSES + 0.005).to(torch.int64).clamp(max=MU)

    def decode(q: Tensor, *, check: bool = True) -> Tensor:
        return expand(mulaw.checked_classes(q, check).to(torch.float32) / 128 - 1)

    def of_recording(wav: Tensor) -> Tensor:
        return (compand(_from_zero_to_one(wav)) * 255.99 + 0.005).to(torch.int64)

    return Quantizer(encode, decode, lambda wav: 2 * _from_zero_to_one(wav) - 1, of_recording)


def _from_zero_to_one(wav: Tensor) -> Tensor:
    low, high = wav.aminmax()
    return (wav - low) / (high - low + 1e-6)


def _compand(u: Tensor) -> Tensor:
    x = 2 * u - 1
    return (x.sign() * (MU * (x + 1e-8).abs()).log1p() / LOG1P_MU + 1) / 2


def _expand(x: Tensor) -> Tensor:
    return x.sign() * ((x.abs() * LOG1P_MU).exp() - 1) / MU


QUANTIZERS = {
    "mulaw": Quantizer(mulaw.encode, mulaw.decode, lambda wav: wav),
    "mulaw-published": _published(_compand, _expand),
    "linear": _published(lambda u: u, lambda x: x),
}
MULAW = QUANTIZERS["mulaw"]


def quantizer(name: str) -> Quantizer:
    """The quantiser of that name; UserError if there is none."""
    if name not in QUANTIZERS:
        raise UserError(f"quantizer={name}: must be {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]
