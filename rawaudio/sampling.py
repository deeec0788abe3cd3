"""The sampling loop: classes drawn from logits, one step after another, by one of two runners.

`Plain` is the reference: one step of the recurrence after another, on any device. `Graph` is for
GPUs: a step is hundreds of small kernels, and launching them from Python takes milliseconds; but
the coarse tiers run on a fixed plan that repeats after prod(pool) samples, so that one period,
sampling included, is recorded once as a CUDA graph and replayed in one launch.
(`realtime.Engine`, compiled for CPUs, has the same interface.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rawaudio.conditions import guided, in_pairs
from sashimi.mulaw import N_CLASSES

if TYPE_CHECKING:
    from rawaudio.model import Model

PRECISIONS = ("float32", "bfloat16")  # of a runner's weights; the second for compiled ones alone


def sample(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    nucleus_p: float = 1.0,
) -> Tensor:
    """Classes (n,) from logits (n, 256) by inverse CDF of uniforms (n,) in [0, 1).

    Temperature first, then top_k, then the nucleus: the smallest set of most likely classes whose
    probability reaches nucleus_p (arXiv:1904.09751); with 1.0 nothing is cut off.

    A class of probability zero is never drawn, however the prefix sums are rounded: a GPU adds in
    parallel, and what stands beside such a class may differ from its neighbour in the last bit.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probs = logits.softmax(-1)
    if nucleus_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all likelier classes
        kept = before < nucleus_p
        kept[:, 0] = True
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.where(kept, 0.0))
    cdf = probs.cumsum(-1).where(probs > 0, 0.0)
    total = cdf.amax(-1, keepdim=True)
    # Strictly below the total, so that there is a class above it.
    below = total.nextafter(torch.zeros_like(total))
    target = torch.minimum(uniforms.float()[:, None] * total, below)
    return (cdf > target).byte().argmax(-1)  # the first one


def log_likelihood(logits: Tensor, q: Tensor) -> Tensor:
    """Log-probability of classes q (...,) under logits (..., 256), in nats, float32."""
    return logits.float().log_softmax(-1).gather(-1, q.unsqueeze(-1)).squeeze(-1)


def start_state(model: Model, n: int, rows: Tensor | None, guidance: float) -> Any:
    """The state before the first sample of n clips with conditions `rows` (n, C), none if None.

    With guidance, of 2n: each clip is followed by its twin, which is told nothing.
    """
    rows = model.told.rows(n, {}) if rows is None else rows
    return model.default_state(rows if guidance == 1 else in_pairs(rows))


def step(model: Model, q: Tensor, state: Any, guidance: float) -> tuple[Tensor, Tensor, Any]:
    """Classes (n,) -> the model's own logits (n, 256), those to sample from, and the next state."""
    if guidance == 1:
        logits, state = model.step(q, state)
        return logits, logits, state
    logits, state = model.step(q.repeat_interleave(2), state)
    return logits[::2], guided(logits[::2], logits[1::2], guidance), state


class Plain:
    """The recurrence of n clips, step by step: the reference of `Engine`, and its stand-in.

    rows: conditions of the clips, (n, C), none if None; guidance: see `guided`, 1 is off.
    """

    def __init__(self, model: Model, n: int, rows: Tensor | None = None, guidance: float = 1.0):
        self.model, self.guidance = model, guidance
        model.setup_rnn()
        self.state = start_state(model, n, rows, guidance)

    def load_state(self, state: Any) -> None:
        """Go on from this state, which is updated in place."""
        self.state = state

    @torch.no_grad()
    def run(
        self,
        q: Tensor,
        uniforms: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        nucleus_p: float = 1.0,
        log_p: Tensor | None = None,
        logits_out: Tensor | None = None,
    ) -> Tensor:
        """The next T classes of every clip, int64 (n, T); arguments as in `Engine.run`."""
        out = torch.empty(len(q), len(uniforms), dtype=torch.int64, device=q.device)
        for t, uniform in enumerate(uniforms):
            logits, chosen, self.state = step(self.model, q, self.state, self.guidance)
            out[:, t] = q = sample(chosen, uniform, temperature, top_k, nucleus_p)
            if log_p is not None:
                log_p += log_likelihood(logits, q)
            if logits_out is not None:
                logits_out[:, t] = logits
        return out


class Graph:
    """The recurrence of n clips, a period at a time; `run` is that of `Plain`.

    The state, the last classes and a period's uniforms live in tensors of their own, which the
    recorded kernels read and write.
    """

    def __init__(self, model: Model, n: int, rows: Tensor | None = None, guidance: float = 1.0):
        self.model, self.n, self.guidance = model, n, guidance
        model.setup_rnn()
        self.period = model.period
        self.state = start_state(model, n, rows, guidance)
        device = model.device
        self.q = torch.zeros(n, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(self.period, n, device=device)
        self.classes = torch.zeros(n, self.period, dtype=torch.int64, device=device)
        self.logits = torch.zeros(n, self.period, N_CLASSES, device=device)
        self.log_p = torch.zeros(n, dtype=torch.float64, device=device)
        self._recorded: dict[tuple, torch.cuda.CUDAGraph] = {}

    def load_state(self, state: Any) -> None:
        """Go on from this state, which is copied."""
        for mine, other in zip(self.state.tensors(), state.tensors(), strict=True):
            mine.copy_(other)
        self.state.position = state.position

    @torch.no_grad()
    def run(
        self,
        q: Tensor,
        uniforms: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        nucleus_p: float = 1.0,
        log_p: Tensor | None = None,
        logits_out: Tensor | None = None,
    ) -> Tensor:
        """The next T classes of every clip, int64 (n, T); arguments as in `Engine.run`."""
        how = (temperature, top_k, nucleus_p)
        wanted = (log_p is not None, logits_out is not None)
        total = len(uniforms)
        out = torch.empty(self.n, total, dtype=torch.int64, device=q.device)
        self.q.copy_(q)
        self.log_p.zero_()
        at = 0
        while at < total:
            # Whole periods from the record; what comes before and after them step by step.
            ahead = self.period - self.state.position % self.period
            steps = min(ahead, total - at)
            self.uniforms[:steps] = uniforms[at : at + steps]
            if steps == self.period:
                self._replay(how, wanted)
            else:
                self._steps(how, wanted, steps)
            self.state.position += steps
            out[:, at : at + steps] = self.classes[:, :steps]
            if logits_out is not None:
                logits_out[:, at : at + steps] = self.logits[:, :steps]
            at += steps
        if log_p is not None:
            log_p += self.log_p
        return out

    def _steps(self, how: tuple, wanted: tuple[bool, bool], count: int) -> None:
        """`count` steps from the tensors of this object into them; the position stays."""
        state = self.state.copy()
        q = self.q
        for i in range(count):
            logits, chosen, state = step(self.model, q, state, self.guidance)
            q = sample(chosen, self.uniforms[i], *how)
            self.classes[:, i] = q
            if wanted[0]:
                self.log_p += log_likelihood(logits, q)
            if wanted[1]:
                self.logits[:, i] = logits
        self.q.copy_(q)
        for mine, new in zip(self.state.tensors(), state.tensors(), strict=True):
            if mine is not new:
                mine.copy_(new)

    def _replay(self, how: tuple, wanted: tuple[bool, bool]) -> None:
        """One period that starts where all tiers are due together."""
        if self.q.device.type != "cuda":
            return self._steps(how, wanted, self.period)
        if (how, wanted) not in self._recorded:
            self._recorded[how, wanted] = self._record(how, wanted)
        self._recorded[how, wanted].replay()

    def _record(self, how: tuple, wanted: tuple[bool, bool]) -> torch.cuda.CUDAGraph:
        kept = [self.q, self.log_p, *self.state.tensors()]
        before = [x.clone() for x in kept]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces outside the record
            self._steps(how, wanted, self.period)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._steps(how, wanted, self.period)
        for x, old in zip(kept, before, strict=True):
            x.copy_(old)
        return graph
