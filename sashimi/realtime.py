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

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cauchy_kernel import build
from rawaudio.sampling import PRECISIONS, start_state
from sashimi import mulaw
from sashimi.backbone import Block, State
from sashimi.s4 import S4, equal

if TYPE_CHECKING:
    from rawaudio.model import Model

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("realtime.cpp")
STEPS_PER_CALL = 1 << 14  # of all clips together: native code is not interrupted, Ctrl-C waits
TRIAL_STEPS, TRIAL_EVERY = 64, 1 << 14  # one thread or all? tried for so many steps, so often


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled library, or None; and where from, or why not."""
    try:
        path = build.cached_library("cpu", SOURCE)
        lib = ctypes.CDLL(str(path))
    except (build.BuildError, OSError) as error:
        log.warning("sashimi: generating without the engine, slower: %s", error)
        return None, str(error)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    lib.sashimi_lanes.restype = integer
    lib.sashimi_sizes.argtypes = [pointer] * 3
    lib.sashimi_run.argtypes = [
        *[pointer] * 3, *[integer] * 6, ctypes.c_float,
        *[pointer] * 2, ctypes.c_float, integer, ctypes.c_float,
        *[pointer] * 3,
    ]  # fmt: skip
    return lib, str(path)


class Engine:
    """Samples n clips with compiled code, from silence or from a given state.

    Weights are packed once per model, and again only after parameters change.

    Args:
        model: a SashimiAR in float32 on the CPU.
        n: clips.
        precision: of the weights of the matrix products, "float32" or "bfloat16"; sums are
            float32 in any case.
        threads: exactly this many, at most two per clip. If None, one or all of torch's threads
            and this process's cores, whichever a trial now and then shows to be faster: two that
            share a clip wait for each other often, and long if another process has their core.
            The result does not depend on it.
        rows: conditions of the clips, int64 (n, C); nothing is told if None.
        guidance: see `conditions.guided`; 1 is off.

    Raises:
        RuntimeError: where `available` says no.
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        model: Model,
        n: int,
        precision: str = "float32",
        threads: int | None = None,
        rows: Tensor | None = None,
        guidance: float = 1.0,
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r}: must be float32 or bfloat16")
        if n < 1 or (threads is not None and threads < 1):
            raise ValueError(f"n={n}, threads={threads}: both must be at least 1")
        ok, why = self.available(model)
        if not ok:
            raise RuntimeError(f"no engine: {why}")
        self.n, self.guidance, self.per = n, guidance, 1 if guidance == 1 else 2
        most = min(torch.get_num_threads(), _cores()) if threads is None else threads
        self.threads = min(most, 2 * n)
        self._seconds: dict[int, float] | None = {} if threads is None and most > 1 else None
        self._next_trial, self._warm = TRIAL_EVERY, False
        self.position = 0  # samples absorbed so far
        self._lib = _library()[0]
        self._packed = _pack(model, precision, self._lib)
        self._state = _zeros(n * self.per * self._packed.record).view(n * self.per, -1)
        if model.conditions:
            self.load_state(start_state(model, n, rows, guidance))

    @staticmethod
    def available(model: Model) -> tuple[bool, str]:
        """Whether the engine serves this model, and where from or why not.

        Raises DemandError, a ValueError, with SASHIMI_ENGINE=on if it does not.
        """
        wanted = os.environ.get("SASHIMI_ENGINE", "")
        if wanted not in ("", "on", "off"):
            raise build.DemandError(f"SASHIMI_ENGINE={wanted!r}: must be on or off")
        if wanted == "off":
            return False, "SASHIMI_ENGINE=off"
        weight = model.head.weight
        if weight.device.type != "cpu" or any(p.dtype != torch.float32 for p in model.parameters()):
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
        packed, pieces = self._packed, []
        told = state.global_ or [None] * len(state.s4)
        for x, constant, a, p, phase in zip(state.s4, told, *packed.rotation, strict=True):
            x = x * phase.conj()  # (n, H, M)
            lanes = _lanes(torch.view_as_real(x), 1, packed.lanes)  # (n, H/W, W, M, 2)
            pieces.append(lanes.permute(0, 1, 3, 4, 2))
            pieces.append(_lanes((p * (x + a * x).real).sum(-1), 1, packed.lanes))
            if constant is not None:
                pieces.append(_lanes(constant, 1, packed.lanes))
        for pair in zip(state.down, state.up, strict=True):
            pieces += [_lanes(x, 2, packed.lanes) for x in pair]
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
        total = uniforms.shape[0]
        shapes = {
            "q": (q, (self.n,), torch.int64),
            "uniforms": (uniforms, (total, self.n), uniforms.dtype),
            "log_p": (log_p, (self.n,), torch.float64),
            "logits_out": (logits_out, (self.n, total, mulaw.N_CLASSES), torch.float32),
        }
        for name, (x, shape, dtype) in shapes.items():
            if x is None:
                continue
            if x.shape != shape or x.dtype != dtype or x.device.type != "cpu":
                raise ValueError(f"{name}: expected {dtype} {shape} on the CPU")
            if name in ("log_p", "logits_out") and not x.is_contiguous():
                raise ValueError(f"{name}: must be contiguous, as it is written to")
        if top_k is not None and not 1 <= top_k <= mulaw.N_CLASSES:
            raise ValueError(f"top_k={top_k}: must be from 1 to {mulaw.N_CLASSES}")
        if not 0 <= int(q.min()) <= int(q.max()) < mulaw.N_CLASSES:
            raise ValueError(f"q: classes must be from 0 to {mulaw.N_CLASSES - 1}")
        q, uniforms = q.contiguous(), uniforms.float().contiguous()
        out = torch.empty(self.n, total, dtype=torch.int64)
        at, most = 0, max(TRIAL_STEPS, STEPS_PER_CALL // self.n)
        while at < total:
            threads, steps = self._threads_and_steps(min(most, total - at))
            start = time.perf_counter()
            self._lib.sashimi_run(
                self._packed.plan, self._packed.weights.data_ptr(), self._state.data_ptr(),
                self.position, self.n, steps, total, threads, self.per, self.guidance,
                q.data_ptr(), uniforms[at].data_ptr(), temperature, top_k or mulaw.N_CLASSES,
                nucleus_p,
                None if log_p is None else log_p.data_ptr(),
                None if logits_out is None else logits_out[:, at].data_ptr(),
                out[:, at].data_ptr(),
            )  # fmt: skip
            if self._seconds is not None and steps >= TRIAL_STEPS:
                self._seconds[threads] = (time.perf_counter() - start) / steps
            at += steps
            self.position += steps
            q = out[:, at - 1].contiguous()
        return out

    def _threads_and_steps(self, steps: int) -> tuple[int, int]:
        """How the next call, of at most so many steps, is to be made."""
        if self._seconds is None:
            return self.threads, steps
        if steps < TRIAL_STEPS:  # over before threads pay
            return 1, steps
        if not self._warm:  # the first touch of the memory would count against whoever is tried
            self._warm = True
            return 1, TRIAL_STEPS // 2
        for threads in (self.threads, 1):
            if threads not in self._seconds:
                return threads, TRIAL_STEPS
        best = min(self._seconds, key=self._seconds.get)
        if self.position >= self._next_trial:
            self._next_trial = self.position + TRIAL_EVERY
            self._seconds = {best: self._seconds[best]}
        return best, min(steps, TRIAL_EVERY)


def _cores() -> int:
    """Cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- packing ------------------------------------------------------------------------------


@dataclass
class _Packed:
    """A model as realtime.cpp reads it."""

    plan: ctypes.Array  # sizes, see Model in realtime.cpp
    weights: Tensor  # float32, in the order of execution
    lanes: int  # floats of a vector, W
    record: int  # floats of a clip's state
    rotation: tuple[list[Tensor], ...]  # a (H, M), |P| (S, M), phase (S, M) of every S4 layer


_cache: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _pack(model: Model, precision: str, lib: ctypes.CDLL) -> _Packed:
    """The packed model; the last one as long as no parameter changes."""
    parameters, cache = list(model.parameters()), _cache.setdefault(model, {})
    if "seen" not in cache or not equal(parameters, cache["seen"]):
        cache.clear()
        cache["seen"] = [p.detach().clone() for p in parameters]
    if precision not in cache:
        cache[precision] = _Packer(model, precision, lib).pack()
    return cache[precision]


class _Packer:
    """Lays out all weights of a model, in the order in which realtime.cpp takes them."""

    def __init__(self, model: Model, precision: str, lib: ctypes.CDLL):
        self.model, self.half, self.lib = model, precision == "bfloat16", lib
        self.lanes: int = lib.sashimi_lanes()
        self.pieces: list[Tensor] = []
        self.rotation: tuple[list[Tensor], ...] = ([], [], [])

    @torch.no_grad()
    def pack(self) -> _Packed:
        model, backbone = self.model, self.model.backbone
        self.add(_lanes(model.embedding.weight, 1, self.lanes))
        for i, p in enumerate(backbone.pool):
            self.blocks(backbone.down[i])
            self.halves(backbone.down_pool[i], in_groups=p)
        self.blocks(backbone.center)
        for i in reversed(range(len(backbone.pool))):
            self.halves(backbone.up_pool[i], out_groups=backbone.pool[i])
            self.blocks(backbone.up[i])
        self.norm(backbone.norm)
        self.halves(model.head)
        return self.finish()

    def finish(self) -> _Packed:
        c, pool = self.model.config, self.model.backbone.pool
        tied = all(p.shape[0] == 1 for p in self.rotation[1])
        sizes = [c.d_model, c.expand, c.ff, c.d_state // 2, c.unet, c.glu, tied, self.half,
                 bool(c.conditions), len(pool), *pool, *self.model.backbone.n_layers]  # fmt: skip
        plan = (ctypes.c_int64 * len(sizes))(*sizes)
        counts = (ctypes.c_int64 * 2)()
        self.lib.sashimi_sizes(plan, ctypes.addressof(counts), ctypes.addressof(counts) + 8)
        weights = _zeros(counts[0])
        if weights.numel() != sum(x.numel() for x in self.pieces):
            raise AssertionError("realtime.py and realtime.cpp disagree about the weights")
        torch.cat(self.pieces, out=weights)
        return _Packed(plan, weights, self.lanes, counts[1], self.rotation)

    def add(self, x: Tensor) -> None:
        """Append x, padded to whole vectors."""
        x = x.float().flatten()
        self.pieces.append(F.pad(x, (0, -len(x) % self.lanes)))

    def norm(self, norm: nn.LayerNorm) -> None:
        self.add(_lanes(norm.weight, 0, self.lanes))
        self.add(_lanes(norm.bias, 0, self.lanes))

    def matrix(self, weight: Tensor, bias: Tensor) -> None:
        """(rows, columns) -> (rows / W, columns, W), or bfloat16 (rows / W, columns / 2, W, 2)."""
        weight = _lanes(_lanes(weight, 1, 2), 0, self.lanes)  # (rows / W, W, columns / 2, 2)
        if self.half:
            weight = weight.transpose(1, 2).bfloat16().contiguous().view(torch.float32)
        else:
            weight = weight.permute(0, 2, 3, 1)
        self.add(weight)
        self.add(bias)

    def halves(self, linear: nn.Linear, out_groups: int = 1, in_groups: int = 0) -> None:
        """A matrix in two halves of its columns.

        Each group of outputs is padded by itself, and each of inputs if their number is given.
        """
        bias = _lanes(linear.bias.view(out_groups, -1), 1, self.lanes).flatten()
        weight = _lanes(linear.weight.view(out_groups, -1, linear.in_features), 1, self.lanes)
        weight = weight.flatten(0, 2)
        if in_groups:
            weight = _lanes(weight.unflatten(1, (in_groups, -1)), 2, self.lanes).flatten(1)
        middle = -(-weight.shape[1] // self.lanes) // 2 * self.lanes
        self.matrix(weight[:, :middle], bias)
        self.matrix(weight[:, middle:], torch.zeros_like(bias))

    def blocks(self, blocks: list[Block]) -> None:
        for block in blocks:
            self.norm(block.norm)
            if isinstance(block.layer, S4):
                self.s4(block.layer)
                continue
            first, second = block.layer[0], block.layer[3]
            self.matrix(first.weight, first.bias)
            self.halves(second)

    def s4(self, layer: S4) -> None:
        layer.forget()  # it may not have seen what made us pack again
        p, b, dt, d, _, g, qdb = layer.woodbury()
        feed_s = -(g * dt)[:, 0] / 2
        feed_u = feed_s * qdb[:, 0]
        phase = torch.where(p == 0, 1, p.sgn())
        p, b, c = p.abs(), b * phase.conj(), layer.setup_rnn()[-1] * phase
        a = 4 / dt * d - 1
        a_c = torch.stack([a.real, a.imag, 2 * c.real, -2 * c.imag], -1)  # (H, M, 4)
        self.add(_lanes(a_c, 0, self.lanes).permute(0, 2, 3, 1))
        p_b = torch.stack([p, b.real, b.imag], -1)  # (S, M, 3)
        self.add(p_b if len(p) == 1 else _lanes(p_b, 0, self.lanes).permute(0, 2, 3, 1))
        for x in (dt[:, 0] / 2, feed_s, feed_u, layer.D):
            self.add(_lanes(x, 0, self.lanes))
        for kept, x in zip(self.rotation, (a, p, phase), strict=True):
            kept.append(x.to(torch.complex64 if x.is_complex() else torch.float32))
        self.halves(layer.output, out_groups=layer.output.out_features // layer.d_model)


def _lanes(x: Tensor, dim: int, lanes: int) -> Tensor:
    """Dimension `dim` of size H -> two of sizes ceil(H / W), W; padded with zeros."""
    after = x.dim() - 1 - dim
    x = F.pad(x, [0] * (2 * after) + [0, -x.shape[dim] % lanes])
    return x.unflatten(dim, (-1, lanes))


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
