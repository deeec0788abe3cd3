"""One period of the recurrence as a program of `torch.export`, for runtimes of one's own.

    program = export_period(model)                      # torch.export.save(program, "period.pt2")
    run, state = program.module(), first_state(model, 1, label="seven")
    q = torch.tensor([SILENCE])                         # the class before the first sample
    classes, logits, state = run(q, torch.rand(model.period, 1), state)
    q = classes[:, -1]                                  # and so on, a period after the other

A period is prod(pool) samples, after which the coarse tiers are due again. The program holds the
weights and has real tensors alone: few runtimes know complex ones.
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from rawaudio.arguments import integer
from rawaudio.errors import UserError
from rawaudio.model import Model
from rawaudio.sampling import check_sampling, sample
from sashimi.backbone import State
from sashimi.mulaw import N_CLASSES
from sashimi.s4 import S4


@torch.no_grad()
def export_period(
    model: Model,
    n: int = 1,
    temperature: float | None = None,
    top_k: int | None = None,
    nucleus_p: float | None = None,
) -> torch.export.ExportedProgram:
    """The program (q, uniforms, state) -> (classes, logits, state) of a SashimiAR, for n clips.

    q: int64 (n,), the classes before; uniforms: float (period, n) in [0, 1); state: a list of
    tensors, see `first_state`. classes: int64 (n, period); logits: (n, period, 256). The settings
    of `sample` are fixed in it, the model's own where None. Raises ValueError for bad ones.
    """
    if not hasattr(model, "backbone") or not hasattr(model, "period"):
        raise UserError(f"a {type(model).__name__}: expected a SashimiAR")
    c, n = model.config, integer("n", n)
    temperature = c.temperature if temperature is None else temperature
    nucleus_p = c.nucleus_p if nucleus_p is None else nucleus_p
    check_sampling(temperature, nucleus_p)
    top_k = None if top_k is None else integer("top_k", top_k, 1, N_CLASSES)
    period = _Period(model, (temperature, top_k, nucleus_p))
    q = torch.zeros(n, dtype=torch.int64, device=model.device)
    uniforms = torch.zeros(model.period, n, device=model.device)
    return torch.export.export(period, (q, uniforms, first_state(model, n)))


@torch.no_grad()
def first_state(model: Model, n: int, **told: Any) -> list[Tensor]:
    """The state before the first sample of n clips, as the program takes it; told: see `Model`."""
    tensors = model.default_state(model.told.rows(n, told)).tensors()
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors]


class _Period(nn.Module):
    def __init__(self, model: Model, sampling: tuple):
        super().__init__()
        self.model, self.sampling = copy.deepcopy(model).eval(), sampling
        state = model.default_state(model.told.rows(1, {}))
        self.sizes = [len(x) for x in (state.s4, state.global_, state.down, state.up)]
        for layer in self.model.modules():
            if isinstance(layer, S4):
                constants = [(x.real.clone(), x.imag.clone()) for x in layer.setup_rnn()]
                layer.step = functools.partial(_real_step, layer, constants)

    def forward(self, q: Tensor, uniforms: Tensor, state: list[Tensor]) -> tuple:
        rest = iter(state)
        moving = State(0, *([next(rest) for _ in range(size)] for size in self.sizes))
        classes, logits = [], []
        for uniform in uniforms.unbind(0):
            y, moving = self.model.step(q, moving)
            q = sample(y, uniform, *self.sampling)
            classes.append(q)
            logits.append(y)
        return torch.stack(classes, 1), torch.stack(logits, 1), moving.tensors()


def _real_step(layer: S4, constants: list, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`S4.step` without complex numbers: state (B, H, M, 2)."""
    a, p, q, b, c = constants
    re, im = state.unbind(-1)
    s, u = 2 * (q[0] * re - q[1] * im).sum(-1, keepdim=True), u.unsqueeze(-1)
    re, im = (
        a[0] * re - a[1] * im - p[0] * s + b[0] * u,
        a[0] * im + a[1] * re - p[1] * s + b[1] * u,
    )
    y = 2 * (c[0] * re - c[1] * im).sum(-1) + layer.D * u[..., 0]
    return layer.project(y), torch.stack([re, im], -1)
