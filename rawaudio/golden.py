"""Outputs that published weights must go on giving, as JSON can hold them."""

import hashlib
import itertools
from typing import Any

import torch
from torch import Tensor

from rawaudio.model import Model
from rawaudio.sampling import Plain, shift
from sashimi.mulaw import SILENCE

MARGIN = 1e-5  # between a uniform and the edges of its class: processors round logits by 2e-6


@torch.no_grad()
def autoregressive(model: Model) -> dict[str, Any]:
    """Logits for a fixed input, and the SHA-256 of classes from the plain loop.

    The seed is the first one whose classes no processor's rounding can change.
    """
    logits = model(golden_input())[0, 99::100]  # (3, 256)
    for seed in itertools.count():
        q = golden_classes(model, seed)
        if margin(model, q, golden_uniforms(seed)) >= MARGIN:
            digest = hashlib.sha256(q.to(torch.uint8).numpy()).hexdigest()
            return {"logits": rounded(logits), "seed": seed, "sha256": digest}


def golden_input() -> Tensor:
    """Classes (1, 300)."""
    return torch.tensor([[(37 * t + 11 * t * t) % 256 for t in range(300)]])


def golden_uniforms(seed: int) -> Tensor:
    """(400, 1) in [0, 1)."""
    return torch.rand(400, 1, generator=torch.Generator().manual_seed(seed))


def golden_classes(model: Model, seed: int) -> Tensor:
    """Classes (1, 400) from the plain loop, nothing cut off."""
    silence = torch.full((1,), SILENCE, device=model.device)
    return Plain(model, 1).run(silence, golden_uniforms(seed).to(model.device))


def margin(model: Model, q: Tensor, uniforms: Tensor) -> float:
    """The least distance, in probability, between a uniform and an edge of the class it chose."""
    edges = model(shift(q))[0].double().softmax(-1).cumsum(-1)[:, :-1]
    return (edges - uniforms).abs().min().item()


@torch.no_grad()
def diffusion(model: Model) -> dict[str, Any]:
    """Noise, that of the model told the last value of each condition, and audio."""
    t = torch.arange(1000, dtype=torch.float64)
    x = torch.stack([(t * t / 700).sin(), 0.1 * (t / 5).sin()]).float()
    steps = torch.tensor([0.75 * (len(model.alpha_bar) - 1), 3.0])
    rng = torch.Generator().manual_seed(0)
    wav = model.unconditional_generate(1, steps=4, generator=rng, length=2000)
    told = {name: values[-1] for name, values in model.conditions.items()}
    return {
        "noise": rounded(model(x, steps)[:, ::50]),
        "told": rounded(model(x, steps, **told)[:, ::50]),
        "audio": rounded(wav[:, ::50]),
    }


def adversarial(model: Model) -> dict[str, Any]:
    """Audio of two latents, and of the first when the last value of each condition is told."""
    z = model.latents(2, torch.Generator().manual_seed(0))
    told = {name: values[-1] for name, values in model.conditions.items()}
    wavs = [model.generate_from_latent(z), model.generate_from_latent(z[:1], **told)]
    return {"audio": rounded(torch.cat(wavs)[:, ::20])}


def rounded(x: Tensor) -> list[list[float]]:
    """Numbers (rows, columns) to six digits."""
    return [[float(f"{v:.6g}") for v in row] for row in x.tolist()]
