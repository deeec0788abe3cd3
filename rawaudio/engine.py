"""The compiled step engine: samples of an autoregressive model in real time on a CPU.

`Engine.run` gives what the plain recurrence and `sample` give for the same uniforms, from native
code that is compiled on first use: sashimi/engine.h, and a file for each network. Where it cannot
be, the plain loop serves. The variable SASHIMI_ENGINE: `off` never uses the engine; `on` demands it
and raises where it cannot be had.
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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cauchy_kernel import build
from rawaudio.errors import UserError
from rawaudio.sampling import PRECISIONS, start_state
from sashimi import mulaw
from sashimi.s4 import equal

log = logging.getLogger(__name__)

STEPS_PER_CALL = 1 << 14  # of all clips together: native code is not interrupted, Ctrl-C waits
TRIAL_STEPS, TRIAL_EVERY = 64, 1 << 14  # one thread or all? tried for so many steps, so often
BOUND = 2e-3  # of what float16 may change in the logits where precision="auto" chooses

POINTERS = ("plan", "weights", "state", "start", "uniforms", "log_p", "logits", "classes")
SIZES = ("position", "clips", "steps", "all_clips", "all_steps", "per", "threads", "top_k")
FLOATS = ("guidance", "temperature", "nucleus")


class _Job(ctypes.Structure):
    """As in engine.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS]
    _fields_ += [(name, ctypes.c_int64) for name in SIZES]
    _fields_ += [(name, ctypes.c_float) for name in FLOATS]


@functools.cache
def library(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """The compiled library of a network's C++ file, or None; and where from, or why not."""
    try:
        path = build.cached_library(source)
        return ctypes.CDLL(str(path)), str(path)
    except (build.BuildError, OSError) as error:
        log.warning("sashimi: generating without the engine, slower: %s", error)
        return None, str(error)


class Engine:
    """Samples n clips with compiled code, from silence or from a given state.

    Weights are packed once per model, and again only after parameters change.

    Args:
        model: one with `COMPILED`, in float32 on the CPU.
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
        self._packed = pack(model, self.precision)
        self._state = zeros(n * self.per * self._packed.record).view(n * self.per, -1)
        if model.conditions or not self._packed.STARTS_AT_ZERO:
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
        why = model.COMPILED.unserved(model)
        if str(model.device) != "cpu" or any(p.dtype != torch.float32 for p in model.parameters()):
            why = f"the model is {model.dtype} on {model.device}, not float32 on cpu"
        lib, why = (None, why) if why else library(model.COMPILED.SOURCE)
        ok = lib is not None
        if not ok and wanted == "on":
            raise build.DemandError(f"SASHIMI_ENGINE=on: {why}")
        return ok, why

    @torch.no_grad()
    def load_state(self, state: Any) -> None:
        """Go on from a state of the network, as `absorb` or `step` left it."""
        self._state.copy_(self._packed.records(state))
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
            library(self._packed.SOURCE)[0].engine_run(ctypes.byref(job))
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


class Compiled:
    """All weights of a model, in the order in which its C++ file takes them.

    `plan` has the sizes, see Model there; a clip's state is `record` floats. `lanes(x, dim)` makes
    a dimension of size H two of sizes ceil(H / W), W, padded with zeros. W is that of this
    processor, or `width`: then nothing is compiled.

    What a network adds:

        SOURCE             its C++ file
        pack(model)        adds its weights; the plan
        records(state)     a state of the network as records (clips, record)
        unserved(model)    why the engine does not serve this model, or nothing
        STARTS_AT_ZERO     whether the records of clips that are told nothing begin with zeros
    """

    SOURCE: Path
    STARTS_AT_ZERO = False

    def __init__(self, model: nn.Module, half: bool, width: int | None = None):
        lib = library(self.SOURCE)[0] if width is None else None
        self.width, self.half = width or lib.engine_lanes(), half
        self.lanes = functools.partial(_split, size=self.width)
        self._pieces: list[Tensor] = []
        sizes = self.pack(model)
        self.plan, counts = (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_int64 * 2)()
        n_weights = sum(x.numel() for x in self._pieces)
        if lib is not None:
            lib.engine_sizes(self.plan, counts)
            self.record = counts[1]
            if n_weights != counts[0]:
                raise AssertionError(f"{self.SOURCE} and {type(self).__name__} disagree on weights")
        self.weights = zeros(n_weights)
        torch.cat(self._pieces, out=self.weights)
        del self._pieces

    def pack(self, model: nn.Module) -> list[int]:
        raise NotImplementedError

    def records(self, state: Any) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def unserved(model: nn.Module) -> str:
        return ""

    def grouped(self, x: Tensor, dim: int, groups: int = 1) -> Tensor:
        """A dimension of so many groups, each padded to whole vectors."""
        return self.lanes(x.unflatten(dim, (groups, -1)), dim + 1).flatten(dim, dim + 2)

    def add(self, *tensors: Tensor) -> None:
        """Append tensors, each padded to whole vectors."""
        for x in tensors:
            self._pieces.append(self.grouped(x.float().flatten(), 0))

    def matrix(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """(rows, columns) -> (rows / W, columns, W), columns made even; no bias is one of zeros."""
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        weight = self.lanes(_split(weight, 1, 2).flatten(1), 0).transpose(1, 2)
        if self.half:
            if (weight.abs() > torch.finfo(torch.float16).max).any():
                raise UserError("precision=float16: the model has weights beyond 65,504")
            weight = weight.half().flatten().view(torch.float32)
        self.add(weight, bias)


_cache: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


@torch.no_grad()
def pack(model: nn.Module, precision: str, width: int | None = None) -> Compiled:
    """The packed model; the last one as long as no parameter changes."""
    cache = _current(model)
    if (precision, width) not in cache:
        cache[precision, width] = model.COMPILED(model, precision == "float16", width)
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


def zeros(floats: int) -> Tensor:
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
