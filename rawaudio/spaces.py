"""Where a model's clips lie: its latents z or, of models that have them, its styles w."""

from typing import Any

import torch
from torch import Tensor

from rawaudio.errors import UserError
from rawaudio.model import Model


class Space:
    """Points (n, ...) that a model makes clips of: drawn, walked between, and heard.

    name: "z" or "w"; None is w where there is one. steps: passes of a diffusion model. UserError
    for a model without such points.
    """

    def __init__(self, model: Model, name: str | None = None, steps: int | None = None):
        styles = hasattr(model, "z2w")
        if not hasattr(model, "generate_from_latent"):
            raise UserError(f"{model.KIND} model has no latents; choose another with model=")
        if name == "w" and not styles:
            raise UserError(f"space=w: {model.KIND} model of this kind has no styles; space=z")
        if steps is not None and not hasattr(model, "invert"):
            raise UserError(f"steps={steps}: {model.KIND} model has no steps")
        self.model, self.name = model, name or ("w" if styles else "z")
        self.options = {} if steps is None else {"steps": steps}

    def draw(self, n: int, rng: torch.Generator, **told: Any) -> tuple[Tensor, dict[str, list]]:
        """n points of the clips that `model.generate(n, generator=rng, **told)` makes, and what
        these are told."""
        told = self.model.draw_conditions(n, rng, **told)
        z = self.model.latents(n, rng)
        return (self.model.z2w(z, **told) if self.name == "w" else z), told

    def between(self, a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
        """On the way from a to b, with t from 0 to 1: straight in w, on the sphere in z."""
        return a + t * (b - a) if self.name == "w" else self.model.between(a, b, t)

    def hear(self, points: Tensor, told: dict[str, list], progress: bool = False) -> Tensor:
        """Clips (n, length) of points; styles know what they are told."""
        if self.name == "w":
            return self.model.generate_from_w(points, progress=progress)
        return self.model.generate_from_latent(points, progress=progress, **self.options, **told)
