"""The compiled step engine: samples of SashimiAR in real time on a CPU.

`Engine.run` gives what the plain recurrence and `sample` give for the same uniforms, from native
code (realtime.cpp) that is compiled on first use. Where it cannot be, the plain loop serves.
The variable SASHIMI_ENGINE: `off` never uses the engine; `on` demands it and raises where it
cannot be had.

The recurrence of an S4 layer, per feature, in one sweep over its states (glossary and D, g as in
s4.py). Each state is turned by the phase of its P, so that P is real, and

    k = B (dt/2 u) + P (feed_s s + feed_u u)      feed_s = -g dt/2, feed_u = feed_s sum(Q D B)
    x' = a (x + k) + k                            s' = sum P Re(x' + a x')
    y = 2 Re sum c x' + D u

P and B do not depend on the feature when the layer's (Lambda, P, B) are tied: four numbers per pair
of states are then all that is read besides the states. Nothing is divided by P.
"""

import contextlib
import ctypes
import functools
import logging
import math
import mmap
import os
import time
import weakref
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cauchy_kernel import build
from rawaudio.errors import UserError
from rawaudio.sampling import PRECISIONS, start_state
from sashimi import mulaw
from sashimi.backbone import Block, State
from sashimi.s4 import S4, equal

log = logging.getLogger(__name__)

STEPS_PER_CALL = 1 << 14  # of all clips together: native code is not interrupted, Ctrl-C waits
TRIAL_STEPS, TRIAL_EVERY = 64, 1 << 14  # one thread or all? tried for so many steps, so often
BOUND = 2e-3  # of what float16 may change in the logits where precision="auto" chooses

POINTERS = ("plan", "weights", "state", "start", "uniforms", "log_p", "logits", "classes")
SIZES = ("position", "clips", "steps", "all_clips", "all_steps", "per", "threads", "top_k")
FLOATS = ("guidance", "temperature", "nucleus")


class _Job(ctypes.Structure):
    """As in realtime.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS]
    _fields_ += [(name, ctypes.c_int64) for name in SIZES]
    _fields_ += [(name, ctypes.c_float) for name in FLOATS]


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled library, or None; and where from, or why not."""
    try:
        path = build.cached_library(Path(__file__).with_name("realtime.cpp"))
        return ctypes.CDLL(str(path)), str(path)
    except (build.BuildError, OSError) as error:
        log.warning("sashimi: generating without the engine, slower: %s", error)
        return None, str(error)


class Engine:
    """Samples n clips with compiled code, from silence or from a given state.

    Weights are packed once per model, and again only after parameters change.

    Args:
        model: a SashimiAR in float32 on the CPU.
        n: clips.
        precision: of the weights of matrices, "float32", "float16", or "auto": float16 if the
            logits of some first steps stay within `BOUND`, which the log tells. Sums are float32.
        threads: at most two per clip. If None, one or all of torch's threads, whichever a trial
            now and then shows to be faster: two that share a clip wait for each other often, and
            long if another process has their core. The result is the same.
        rows: conditions of the clips, int64 (n, C); nothing is told if None.
        guidance: see `conditions.guided`; 1 is off.

    Raises:
        RuntimeError: where `available` says no.
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        n: int,
        precision: str = "float32",
        threads: int | None = None,
        rows: Tensor | None = None,
        guidance: float = 1.0,
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r}: must be {' or '.join(PRECISIONS)}")
        if n < 1 or (threads is not None and threads < 1):
            raise ValueError(f"n={n}, threads={threads}: both must be at least 1")
        ok, why = self.available(model)
        if not ok:
            raise RuntimeError(f"no engine: {why}")
        self.precision = _chosen(model) if precision == "auto" else precision
        self.n, self.guidance, self.per = n, guidance, 1 if guidance == 1 else 2
        self.position = 0  # samples absorbed so far
        most = min(torch.get_num_threads() if threads is None else threads, 2 * n)
        self._counts = [most, 1] if threads is None and most > 1 else [most]  # of threads, to try
        self._trials = [1, most, 1]  # the first is slow, as it touches the memory
        self._next_trial = TRIAL_EVERY
        self._seconds: dict[int, float] = {}  # of a step, by count
        self._packed = _pack(model, self.precision)
        self._state = _zeros(n * self.per * self._packed.record).view(n * self.per, -1)
        if model.conditions:
            self.load_state(start_state(model, n, rows, guidance))

    @staticmethod
    def available(model: nn.Module) -> tuple[bool, str]:
        """Whether the engine serves this model, and where from or why not.

        Raises DemandError, a ValueError, with SASHIMI_ENGINE=on if it does not.
        """
        wanted = os.environ.get("SASHIMI_ENGINE", "")
        if wanted not in ("", "on", "off"):
            raise build.DemandError(f"SASHIMI_ENGINE={wanted!r}: must be on or off")
        if wanted == "off":
            return False, "SASHIMI_ENGINE=off"
        weight = model.head.weight
        if model.config.scalar_norm != "none":
            ok, why = False, f"scalar_norm={model.config.scalar_norm} is not compiled"
        elif weight.device.type != "cpu" or any(
            p.dtype != torch.float32 for p in model.parameters()
        ):
            ok, why = False, f"the model is {weight.dtype} on {weight.device}, not float32 on cpu"
        else:
            lib, why = _library()
            ok = lib is not None
        if not ok and wanted == "on":
            raise build.DemandError(f"SASHIMI_ENGINE=on: {why}")
        return ok, why

    @torch.no_grad()
    def load_state(self, state: State) -> None:
        """Go on from the state of the backbone, as `Sashimi.forward` or `step` left it."""
        pieces, lanes = [], self._packed.lanes
        told = state.global_ or [None] * len(state.s4)
        for x, constant, (a, p, phase) in zip(state.s4, told, self._packed.rotation, strict=True):
            x = x * phase.conj()  # (n, H, M)
            halves = lanes(torch.view_as_real(x), 1)  # (n, H/W, W, M, 2)
            pieces += [halves.permute(0, 1, 3, 4, 2), lanes((p * (x + a * x).real).sum(-1), 1)]
            if constant is not None:
                pieces.append(lanes(constant, 1))
        for pair in zip(state.down, state.up, strict=True):
            pieces += [lanes(x, 2) for x in pair]
        self._state.copy_(torch.cat([x.flatten(1) for x in pieces], 1))
        self.position = state.position

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
        """The next T classes of every clip, int64 (n, T).

        Args:
            q: int64 (n,), the classes before.
            uniforms: float (T, n) in [0, 1), one for each class.
            temperature, top_k, nucleus_p: as in `sample`.
            log_p: float64 (n,), to which the log-likelihood of the classes is added, in nats
                (temperature 1, nothing cut off).
            logits_out: float32 (n, T, 256), filled with the logits of every step, without guidance.

        Raises:
            ValueError: for tensors of another shape or type, classes or top_k outside their range.
        """
        q, uniforms = q.contiguous(), uniforms.float().contiguous()
        total, classes = len(uniforms), mulaw.N_CLASSES
        for name, x, shape, dtype in (
            ("q", q, (self.n,), torch.int64),
            ("uniforms", uniforms, (total, self.n), torch.float32),
            ("log_p", log_p, (self.n,), torch.float64),
            ("logits_out", logits_out, (self.n, total, classes), torch.float32),
        ):
            if x is None:
                continue
            if x.shape != shape or x.dtype != dtype or not x.is_cpu or not x.is_contiguous():
                raise ValueError(f"{name}: expected {dtype} {shape} on the CPU, contiguous")
        if top_k is not None and not 1 <= top_k <= classes:
            raise ValueError(f"top_k={top_k}: must be from 1 to {classes}")
        if not 0 <= int(q.min()) <= int(q.max()) < classes:
            raise ValueError(f"q: classes must be from 0 to {classes - 1}")
        out = torch.empty(self.n, total, dtype=torch.int64)
        job = _Job(
            ctypes.addressof(self._packed.plan),
            self._packed.weights.data_ptr(),
            self._state.data_ptr(),
            clips=self.n,
            all_clips=self.n,
            all_steps=total,
            per=self.per,
            top_k=top_k or classes,
            guidance=self.guidance,
            temperature=temperature,
            nucleus=nucleus_p,
            log_p=None if log_p is None else log_p.data_ptr(),
        )
        done = 0
        while done < total:
            steps = min(total - done, max(TRIAL_STEPS, STEPS_PER_CALL // self.n))
            job.threads, job.steps = self._threads_and_steps(steps)
            job.position, job.start = self.position, q.data_ptr()
            job.uniforms, job.classes = uniforms[done].data_ptr(), out[:, done].data_ptr()
            job.logits = None if logits_out is None else logits_out[:, done].data_ptr()
            start = time.perf_counter()
            _library()[0].sashimi_run(ctypes.byref(job))
            if job.steps >= TRIAL_STEPS:
                self._seconds[job.threads] = (time.perf_counter() - start) / job.steps
            done += job.steps
            self.position += job.steps
            q = out[:, done - 1].contiguous()
        return out

    def _threads_and_steps(self, steps: int) -> tuple[int, int]:
        """Those of the next call, of at most so many steps."""
        if len(self._counts) == 1:
            return self._counts[0], steps
        if steps < TRIAL_STEPS:  # over before threads pay
            return 1, steps
        if self.position >= self._next_trial:
            self._next_trial = self.position + TRIAL_EVERY
            self._trials = list(self._counts)
        if self._trials:
            return self._trials.pop(), TRIAL_STEPS
        return min(self._counts, key=self._seconds.get), min(steps, TRIAL_EVERY)


# ---- packing ------------------------------------------------------------------------------


class _Packed:
    """All weights of a model, in the order in which realtime.cpp takes them.

    `plan` has the sizes, see Model there; a clip's state is `record` floats. `rotation`: a (H, M),
    |P| (S, M) and its phase (S, M) of every S4 layer. `lanes(x, dim)` makes a dimension of size H
    two of sizes ceil(H / W), W, padded with zeros. W is that of this processor, or `width`.
    """

    def __init__(self, model: nn.Module, half: bool, width: int | None = None):
        lib, backbone, c = _library()[0] if width is None else None, model.backbone, model.config
        self._width, self._half = width or lib.sashimi_lanes(), half
        self.lanes = functools.partial(_split, size=self._width)
        self._pieces: list[Tensor] = []
        self.rotation: list[tuple[Tensor, Tensor, Tensor]] = []
        pools = list(enumerate(backbone.pool))
        self._add(self.lanes(model.embedding.weight, 1))
        for i, pool in pools:
            self._blocks(backbone.down[i])
            self._halves(backbone.down_pool[i], in_groups=pool)
        self._blocks(backbone.center)
        for i, pool in reversed(pools):
            self._halves(backbone.up_pool[i], out_groups=pool)
            self._blocks(backbone.up[i])
        self._add(backbone.norm.weight, backbone.norm.bias)
        self._halves(model.head)

        tied = all(len(p) == 1 for _, p, _ in self.rotation)
        sizes = [c.d_model, c.expand, c.ff, c.d_state // 2, c.unet, c.glu, tied, half,
                 bool(c.conditions), len(pools), *backbone.pool, *backbone.n_layers]  # fmt: skip
        self.plan, counts = (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_int64 * 2)()
        n_weights = sum(x.numel() for x in self._pieces)
        if lib is not None:
            lib.sashimi_sizes(self.plan, counts)
            self.record = counts[1]
            if n_weights != counts[0]:
                raise AssertionError("realtime.py and realtime.cpp disagree about the weights")
        self.weights = _zeros(n_weights)
        torch.cat(self._pieces, out=self.weights)
        del self._pieces

    def _add(self, *tensors: Tensor) -> None:
        """Append tensors, each padded to whole vectors."""
        for x in tensors:
            self._pieces.append(self.lanes(x.float().flatten(), 0).flatten())

    def _matrix(self, weight: Tensor, bias: Tensor) -> None:
        """(rows, columns) -> (rows / W, columns, W), columns made even."""
        weight = self.lanes(_split(weight, 1, 2).flatten(1), 0).transpose(1, 2)
        if self._half:
            if (weight.abs() > torch.finfo(torch.float16).max).any():
                raise UserError("precision=float16: the model has weights beyond 65,504")
            weight = weight.half().flatten().view(torch.float32)
        self._add(weight, bias)

    def _halves(self, linear: nn.Linear, out_groups: int = 1, in_groups: int = 0) -> None:
        """In two halves of the columns; groups of outputs, and inputs if any, are padded apart."""
        bias = self.lanes(linear.bias.view(out_groups, -1), 1).flatten()
        weight = linear.weight.view(out_groups, -1, linear.in_features)
        weight = self.lanes(weight, 1).flatten(0, 2)
        if in_groups:
            weight = self.lanes(weight.unflatten(1, (in_groups, -1)), 2).flatten(1)
        middle = -(-weight.shape[1] // self._width) // 2 * self._width
        self._matrix(weight[:, :middle], bias)
        self._matrix(weight[:, middle:], torch.zeros_like(bias))

    def _blocks(self, blocks: list[Block]) -> None:
        for block in blocks:
            self._add(block.norm.weight, block.norm.bias)
            if isinstance(block.layer, S4):
                self._s4(block.layer)
            else:
                first, second = block.layer[0], block.layer[3]
                self._matrix(first.weight, first.bias)
                self._halves(second)

    def _s4(self, layer: S4) -> None:
        layer.forget()  # it may not have seen what made us pack again
        p, b, dt, d, _, g, qdb = layer.woodbury()
        feed_s = -(g * dt)[:, 0] / 2
        phase = torch.where(p == 0, 1, p.sgn())
        p, b, c = p.abs(), b * phase.conj(), layer.setup_rnn()[-1] * phase
        a = 4 / dt * d - 1
        a_c = torch.stack([a.real, a.imag, 2 * c.real, -2 * c.imag], -1)  # (H, M, 4)
        p_b = torch.stack([p, b.real, b.imag], -1)  # (S, M, 3)
        a_c, lanes_p_b = (self.lanes(x, 0).permute(0, 2, 3, 1) for x in (a_c, p_b))
        self._add(a_c, p_b if len(p) == 1 else lanes_p_b)
        self._add(dt[:, 0] / 2, feed_s, feed_s * qdb[:, 0], layer.D)
        self.rotation.append((a.to(torch.complex64), p.float(), phase.to(torch.complex64)))
        self._halves(layer.output, out_groups=layer.output.out_features // layer.d_model)


@torch.no_grad()
def packed_for(model: nn.Module, precision: str, width: int) -> tuple[list[int], Tensor, Tensor]:
    """A SashimiAR in vectors of `width` floats, for live.cpp: plan, weights and told.

    told (values of all conditions, R): what a value adds to the input of every S4 layer, "not told"
    first; a clip's sum is its constants. (0, 0) without conditions.
    """
    packed = _pack(model, precision, width)
    sizes = [1 + len(values) for values in model.conditions.values()]
    told = torch.zeros(0, 0)
    if sizes:
        rows = torch.block_diag(*(torch.arange(n)[:, None] for n in sizes))  # one value each
        constants = model.default_state(rows).global_
        told = torch.cat([packed.lanes(x, 1).flatten(1) for x in constants], 1)
        told[sizes[0] :] -= told[0]
    return list(packed.plan), packed.weights, told


_cache: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _pack(model: nn.Module, precision: str, width: int | None = None) -> _Packed:
    """The packed model; the last one as long as no parameter changes."""
    cache = _current(model)
    if (precision, width) not in cache:
        cache[precision, width] = _Packed(model, precision == "float16", width)
    return cache[precision, width]


def _current(model: nn.Module) -> dict:
    """What is kept of a model, emptied when a parameter has changed."""
    parameters, cache = list(model.parameters()), _cache.setdefault(model, {})
    if "seen" not in cache or not equal(parameters, cache["seen"]):
        cache.clear()
        cache["seen"] = [p.detach().clone() for p in parameters]
    return cache


def _chosen(model: nn.Module) -> str:
    """What "auto" stands for: float16 where that keeps the logits; tried once for these weights."""
    cache = _current(model)
    if "auto" not in cache:
        try:
            error = _error_of_float16(model)
        except UserError:
            error = math.inf
        cache["auto"] = "float16" if error <= BOUND else "float32"
        log.info("precision=auto: %s; float16 would change logits by %.1e", cache["auto"], error)
    return cache["auto"]


def _error_of_float16(model: nn.Module, clips: int = 4) -> float:
    """Largest change of the logits over some first steps, as long as the same classes are drawn."""
    uniforms = torch.rand(TRIAL_STEPS, clips, generator=torch.Generator().manual_seed(0))
    classes, logits = [], []
    for precision in ("float32", "float16"):
        logits.append(torch.empty(clips, TRIAL_STEPS, mulaw.N_CLASSES))
        start = torch.full((clips,), mulaw.SILENCE)
        engine = Engine(model, clips, precision, threads=1)
        classes.append(engine.run(start, uniforms, logits_out=logits[-1]))
    same = (classes[0] == classes[1]).cumprod(1)
    error = (logits[0] - logits[1]).abs().amax(2)
    return (error * F.pad(same[:, :-1], (1, 0), value=1)).max().item()


def _split(x: Tensor, dim: int, size: int) -> Tensor:
    """A dimension -> two, the second of this size; padded with zeros."""
    after = x.dim() - 1 - dim
    x = F.pad(x, [0] * (2 * after) + [0, -x.shape[dim] % size])
    return x.unflatten(dim, (-1, size))


def _zeros(floats: int) -> Tensor:
    """float32 zeros, in huge pages where the system has them: reading them misses fewer tables."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(floats)
    page = 1 << 21
    memory = mmap.mmap(-1, floats * 4 + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.float32)
    start = -whole.data_ptr() % page // 4
    return whole[start : start + floats]
