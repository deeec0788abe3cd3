"""How clips are drawn: classes from logits, one step of a recurrence after another.

`Walk` draws what a user asks for, with a runner: `Plain` is the reference, one step of the
recurrence after another, on any device. `Graph` is for GPUs: a step is hundreds of small kernels,
and launching them from Python takes milliseconds; but the coarse tiers run on a fixed plan that
repeats after prod(pool) samples, so that one period, sampling included, is recorded once as a CUDA
graph and replayed in one launch. (`engine.Engine`, compiled for CPUs, has the same interface.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rawaudio.arguments import check_generator, floats, integer, number
from rawaudio.conditions import guided
from rawaudio.errors import UserError
from rawaudio.model import Model, in_eval
from sashimi.mulaw import N_CLASSES, SILENCE

PRECISIONS = ("auto", "float32", "float16")  # of a runner's weights; float16: compiled ones alone
# Uniforms are drawn this many steps at a time, whatever the chunk: same generator, same audio.
UNIFORM_BLOCK = 1024


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
        inside = before < nucleus_p
        inside[:, 0] = True
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.where(inside, 0.0))
    cdf = probs.cumsum(-1).where(probs > 0, 0.0)
    total = cdf.amax(-1, keepdim=True)
    # Strictly below the total, so that there is a class above it.
    below = total.nextafter(torch.zeros_like(total))
    target = torch.minimum(uniforms.float()[:, None] * total, below)
    return (cdf > target).byte().argmax(-1)  # the first one


def check_sampling(temperature: float, nucleus_p: float) -> None:
    """ValueError for a temperature or nucleus that nothing can be sampled with."""
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature={temperature}: must be a positive number")
    if not 0 < nucleus_p <= 1:
        raise UserError(f"nucleus_p={nucleus_p}: must be above 0 and at most 1")


def shift(q: Tensor) -> Tensor:
    """The network's input for classes q (B, L): silence, then all but the last."""
    return F.pad(q[:, :-1], (1, 0), value=SILENCE)


# ---- runners ------------------------------------------------------------------------------------


def start_state(model: Model, n: int, rows: Tensor | None, guidance: float) -> Any:
    """The state before the first sample of n clips with conditions `rows` (n, C), none if None.

    With guidance, of 2n: each clip is followed by its twin, see `Model.untold`.
    """
    rows = model.told.rows(n, {}) if rows is None else rows
    if guidance != 1:
        rows = torch.stack([rows, model.untold(rows)], 1).flatten(0, 1)
    return model.default_state(rows)


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
        classes = torch.empty(len(q), len(uniforms), dtype=torch.int64, device=q.device)
        self._draw(q, uniforms, (temperature, top_k, nucleus_p), (classes, log_p, logits_out))
        return classes

    def _draw(self, q: Tensor, uniforms: Tensor, sampling: tuple, outputs: tuple) -> None:
        """`run` into its outputs: classes, log_p and logits_out."""
        self.state = self._steps(self.state, q, uniforms, sampling, outputs)

    def _steps(
        self, state: Any, q: Tensor, uniforms: Tensor, sampling: tuple, outputs: tuple
    ) -> Any:
        """One step for each row of uniforms, from a state; the state after them."""
        classes, log_p, logits_out = outputs
        for t, uniform in enumerate(uniforms):
            if self.guidance == 1:
                logits, state = self.model.step(q, state)
                chosen = logits
            else:
                both, state = self.model.step(q.repeat_interleave(2), state)
                logits = both[::2]
                chosen = guided(logits, both[1::2], self.guidance)
            classes[:, t] = q = sample(chosen, uniform, *sampling)
            if log_p is not None:
                log_p += logits.float().log_softmax(-1).gather(-1, q[:, None])[:, 0]
            if logits_out is not None:
                logits_out[:, t] = logits
        return state


class Graph(Plain):
    """The recurrence of n clips, a period at a time.

    The state, the last classes and a period's uniforms live in tensors of their own, which the
    recorded kernels read and write.
    """

    def __init__(self, model: Model, n: int, rows: Tensor | None = None, guidance: float = 1.0):
        super().__init__(model, n, rows, guidance)
        period, device = model.period, model.device
        self.q = torch.zeros(n, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(period, n, device=device)
        self.classes = torch.zeros(n, period, dtype=torch.int64, device=device)
        self.logits = torch.zeros(n, period, N_CLASSES, device=device)
        self.log_p = torch.zeros(n, dtype=torch.float64, device=device)
        self._recorded: dict[tuple, torch.cuda.CUDAGraph] = {}

    def load_state(self, state: Any) -> None:
        """Go on from this state, which is copied."""
        for mine, other in zip(self.state.tensors(), state.tensors(), strict=True):
            mine.copy_(other)
        self.state.position = state.position

    def _draw(self, q: Tensor, uniforms: Tensor, sampling: tuple, outputs: tuple) -> None:
        classes, log_p, logits_out = outputs
        # what a record depends on
        plan = sampling, log_p is not None, logits_out is not None
        period, start = len(self.uniforms), 0
        self.q.copy_(q)
        self.log_p.zero_()
        while start < len(uniforms):
            # Whole periods from the record; what comes before and after them step by step.
            count = min(period - self.state.position % period, len(uniforms) - start)
            end = start + count
            self.uniforms[:count] = uniforms[start:end]
            if count == period and q.device.type == "cuda":
                if plan not in self._recorded:
                    self._recorded[plan] = self._record(plan)
                self._recorded[plan].replay()
            else:
                self._in_place(plan, count)
            self.state.position += count
            classes[:, start:end] = self.classes[:, :count]
            if logits_out is not None:
                logits_out[:, start:end] = self.logits[:, :count]
            start = end
        if log_p is not None:
            log_p += self.log_p

    def _in_place(self, plan: tuple, count: int) -> None:
        """`count` steps from the tensors of this object into them; the position stays."""
        sampling, with_log_p, with_logits = plan
        outputs = (
            self.classes,
            self.log_p if with_log_p else None,
            self.logits if with_logits else None,
        )
        state = self._steps(self.state.copy(), self.q, self.uniforms[:count], sampling, outputs)
        self.q.copy_(self.classes[:, count - 1])
        for mine, new in zip(self.state.tensors(), state.tensors(), strict=True):
            if mine is not new:
                mine.copy_(new)

    def _record(self, plan: tuple) -> torch.cuda.CUDAGraph:
        """One period, which starts where all tiers are due together."""
        tensors = [self.q, self.log_p, *self.state.tensors()]
        before = [x.clone() for x in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces outside the record
            self._in_place(plan, len(self.uniforms))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._in_place(plan, len(self.uniforms))
        for x, old in zip(tensors, before, strict=True):
            x.copy_(old)
        return graph


def runner_of(
    model: Model,
    n: int,
    precision: str = "float32",
    rows: Tensor | None = None,
    guidance: float = 1.0,
) -> Any:
    """What steps n clips with conditions `rows` fastest: the model's engine, `Graph`, or `Plain`.

    UserError for a precision that needs an engine where there is none.
    """
    rows = model.told.rows(n, {}) if rows is None else rows
    engine, why = model.engine(n, precision, rows, guidance)
    if engine is not None:
        return engine
    if precision == "float16":
        raise UserError(f"precision={precision} needs the compiled engine: {why}")
    runner = Graph if model.device.type == "cuda" else Plain
    return runner(model, n, rows, guidance)


# ---- what a user asks for -----------------------------------------------------------------------


@dataclass
class Walk:
    """The recurrence of n clips, from silence or a prefix: arguments of `generate`, checked."""

    model: Model
    n: int
    prefix: Any  # once checked, classes (n, T), T = 0 without a prefix
    temperature: float | None
    top_k: int | None
    nucleus_p: float | None
    precision: str
    guidance: float | None
    generator: torch.Generator | None
    told: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("temperature", "nucleus_p"):
            value = getattr(self, name)
            value = getattr(self.model.config, name) if value is None else value
            setattr(self, name, number(name, value))
        check_sampling(self.temperature, self.nucleus_p)
        if self.top_k is not None:
            self.top_k = integer("top_k", self.top_k, 1, N_CLASSES)
        if self.precision not in PRECISIONS:
            raise UserError(f"precision={self.precision}: must be {' or '.join(PRECISIONS)}")
        self.prefix = self._classes_of(self.prefix)
        self.guidance = self.model.checked_guidance(self.guidance)
        check_generator(self.generator)
        self.rows = self.model.told.draw(self.n, self.told, self.generator)  # (n, C)

    def _classes_of(self, prefix: Any) -> Tensor:
        if prefix is None:
            return torch.zeros(self.n, 0, dtype=torch.int64, device=self.model.device)
        prefix = floats("prefix", prefix, check_finite=False)
        if prefix.dim() not in (1, 2) or (prefix.dim() == 2 and prefix.shape[0] not in (1, self.n)):
            raise ValueError(
                f"prefix of shape {tuple(prefix.shape)}: expected (samples,) or ({self.n}, samples)"
            )
        q = self.model.quantizer.encode(prefix, name="prefix")
        return q.to(self.model.device).expand(self.n, -1)

    def blocks(
        self, count: int | None, chunk: int, log_p: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield `count` classes (endless if None) after the prefix, int64 (n, <= chunk) each.

        `log_p` (n,), if given, gathers the log-likelihood of the prefix and all that follows.
        """
        with in_eval(self.model):
            runner = runner_of(self.model, self.n, self.precision, self.rows, self.guidance)
            device = self.generator.device if self.generator is not None else "cpu"
            source = {"generator": self.generator, "device": device}
            sampling = self.temperature, self.top_k, self.nucleus_p
            q, made = self._start(runner, log_p), 0
            while count is None or made < count:
                end, parts = made + chunk if count is None else min(made + chunk, count), []
                while made < end:
                    offset = made % UNIFORM_BLOCK
                    if offset == 0:
                        uniforms = torch.rand(UNIFORM_BLOCK, self.n, **source).to(self.model.device)
                    part = uniforms[offset : offset + end - made]
                    parts.append(runner.run(q, part, *sampling, log_p))
                    q, made = parts[-1][:, -1], made + len(part)
                yield torch.cat(parts, 1)

    def _start(self, runner: Any, log_p: Tensor | None) -> Tensor:
        """The class before the first that is drawn, (n,); a prefix becomes the runner's state."""
        if not self.prefix.shape[1]:
            return torch.full((self.n,), SILENCE, device=self.model.device)
        state = start_state(self.model, self.n, self.rows, self.guidance)
        per_clip = 1 if self.guidance == 1 else 2
        inputs = shift(self.prefix).repeat_interleave(per_clip, 0)
        features = (y[::per_clip] for y in self.model.pieces(inputs, self.rows, state))
        if log_p is not None:
            log_p += self.model.log_p_of(features, self.prefix).sum(1, dtype=torch.float64)
        for _ in features:  # what no likelihood has asked for
            pass
        runner.load_state(state)
        return self.prefix[:, -1]
