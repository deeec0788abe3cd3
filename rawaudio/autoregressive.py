"""The autoregressive task: models over mu-law classes, their likelihood, and clips from them.

    p(clip) = prod_t p(q[t] | q[0..t-1]),   q[t] in 0..255,   q[-1] = 128 (silence)

A network sees the class of the previous sample and gives 256 logits for the next one; the first
sample is predicted from class 128. (mu-law: WaveNet, arXiv:1609.03499.)
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawaudio import golden
from rawaudio.arguments import clips, integer, tensor
from rawaudio.batches import Batch, sample_batches
from rawaudio.config import setting
from rawaudio.data import ClipDataset
from rawaudio.engine import Compiled, Engine
from rawaudio.errors import UserError
from rawaudio.family import Task
from rawaudio.model import Model, ModelConfig, bare
from rawaudio.progress import watched
from rawaudio.quantizers import Quantizer, quantizer
from rawaudio.sampling import UNIFORM_BLOCK, Walk, check_sampling, shift
from sashimi import mulaw

PER_PASS = 2**16  # samples of all clips that go through the network at once, for the memory
PER_HEAD = 2**15  # samples whose logits exist at once: 32 MiB


@dataclass
class AutoregressiveSettings(ModelConfig):
    """Settings of every autoregressive model."""

    temperature: float = setting(1.0, "of generated clips when none is given; divides the logits")
    nucleus_p: float = setting(1.0, "the same for the nucleus: likeliest classes, (0, 1]")
    quantizer: str = setting(
        "mulaw", "how classes are made of audio; mulaw-published, linear: those of state-spaces"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampling(self.temperature, self.nucleus_p)
        quantizer(self.quantizer)


class Autoregressive(Model):
    """A model over classes of audio. `model(x)`: classes int64 (B, L) -> logits (B, L, 256).

    Position t of the logits is the distribution of the class that follows x[:, t].

    What a network adds:

        head                     module: features (..., D) -> logits (..., 256)
        default_state(rows)      the state before the first sample of clips with these conditions
        absorb(x, state)         classes (B, L) that follow a state -> features (B, L, D), in
                                 parallel; the state becomes the one after them
        setup_rnn()              prepares `step`, again after parameters change
        carry(state, rows)       the same state without its history, told these conditions: what
                                 `tbptt` needs; not every network has it
        step(x, state)           classes (B,) -> logits (B, 256) and the next state
        period                   steps after which the recurrence does the same work again
        longest_pass             samples of a clip that go through `absorb` at once, at most
        COMPILED                 the network for the compiled engine, see engine.py; not every one
                                 has it

    A state has `position`, samples absorbed so far; `tensors()`, all its tensors; and `copy()`,
    another state of the same tensors.
    """

    config: AutoregressiveSettings
    head: nn.Module
    period = 1
    longest_pass = PER_PASS
    COMPILED: type[Compiled] | None = None

    @property
    def quantizer(self) -> Quantizer:
        """How its classes are made of audio."""
        return quantizer(self.config.quantizer)

    def forward(
        self, x: Tensor, rows: Tensor | None = None, state: Any = None, **told: Any
    ) -> Tensor:
        """Classes, integers (B, L) -> logits (B, L, 256), in parallel.

        told: conditions by name; what is not given is not told. rows: the same as indices (B, C),
        see `Conditions`. state: what x follows, which becomes the state after it; none: the start
        of the clips. Raises ValueError for other shapes and for classes outside 0..255,
        TypeError for audio.
        """
        x = tensor("x", x)
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"x: expected integer classes, not {x.dtype}; mulaw.encode makes them")
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (clips, samples >= 1)")
        x = x.to(self.device, torch.int64)
        rows = self.told.rows(len(x), told) if rows is None else rows
        try:
            y = self.features(x, rows) if state is None else self.absorb(x, state)
            return self.head(y)
        except IndexError:
            raise ValueError(f"x: classes must be from 0 to {mulaw.N_CLASSES - 1}") from None

    def features(self, x: Tensor, rows: Tensor) -> Tensor:
        """Classes (B, L) from the start of clips, conditions (B, C) -> (B, L, D), in parallel."""
        return self.absorb(x, self.default_state(rows))

    def pieces(self, x: Tensor, rows: Tensor, state: Any = None) -> Iterator[Tensor]:
        """Features of x (B, L), a piece (B, l, D) after the other, in bounded memory.

        state: the one that x follows, `default_state(rows)` if None; it is updated.
        """
        periods = min(PER_PASS // max(1, len(x)), self.longest_pass) // self.period
        size = max(1, periods) * self.period
        if state is None and x.shape[1] <= size:
            yield self.features(x, rows)
            return
        state = self.default_state(rows) if state is None else state
        for part in x.split(size, 1):
            yield self.absorb(part, state)

    def engine(self, n: int, precision: str, rows: Tensor, guidance: float) -> tuple[Any, str]:
        """A compiled runner, with the interface of `sampling.Plain`, or None; and why."""
        if self.COMPILED is None:
            return None, f"{type(self).__name__} has none"
        available, why = Engine.available(self)
        return Engine(self, n, precision, rows=rows, guidance=guidance) if available else None, why

    # ---------------------------------------------------------------- likelihood

    @torch.no_grad()
    def nll(self, wavs: Tensor, lengths: Tensor | None = None, **told: Any) -> Tensor:
        """Negative log-likelihood of clips in nats per sample, (N,), in parallel over time.

        Divide by ln 2 for bits. In the model's own mode (with dropout in train mode), without
        gradients: a training loss is the cross-entropy of `forward`. Long clips go through in
        pieces: memory grows with them by the clips themselves alone.

        Args:
            wavs: float (N, T) in [-1, 1] at the model's sample rate; published quantisers: clips
                stretched to full scale, see quantizers.py.
            lengths: int (N,), samples of each clip that count; the rest is padding. All if None.
            told: conditions by name.

        Raises ValueError for other shapes, values outside [-1, 1] or NaN, lengths outside 1..T;
        TypeError for wavs or lengths of another type.
        """
        q, lengths = self._clips(wavs, lengths)
        total = self._total_log_p(q, lengths, self.told.rows(len(q), told))
        return (-total / lengths).to(self.dtype)

    @torch.no_grad()
    def classify(
        self, wavs: Tensor, lengths: Tensor | None = None, by: str | None = None, **told: Any
    ) -> Tensor:
        """Probabilities (N, values) of a condition's values given the clips, by Bayes' rule.

        p(value | clip) ~ p(clip | value) share(value): one pass for each value. Arguments as in
        `nll`; by: the condition, the first one if None; told: other conditions that are known.
        """
        names = list(self.told.values)
        by = names[0] if by is None and names else by
        if by not in names or by in told:
            known = ", ".join(names) or "none: this model cannot be told anything"
            raise ValueError(f"by={by}: expected a condition that is not told ({known})")
        q, lengths = self._clips(wavs, lengths)
        log_p = [
            self._total_log_p(q, lengths, self.told.rows(len(q), {**told, by: value}))
            for value in self.told.values[by]
        ]
        shares = torch.tensor(self.told.counts[by], dtype=torch.float64, device=self.device)
        return (torch.stack(log_p, 1) + shares.log()).softmax(1).float()

    def _clips(self, wavs: Any, lengths: Any) -> tuple[Tensor, Tensor]:
        """Classes (N, T) of clips and their lengths (N,), checked, on the model's device."""
        q = self.quantizer.encode(clips("wavs", wavs, check_finite=False), name="wavs")
        q = q.to(self.device)
        n, t = q.shape
        if lengths is None:
            return q, torch.full((n,), t, device=q.device)
        lengths = tensor("lengths", lengths).to(q.device)
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths: expected integers, not {lengths.dtype}")
        if lengths.shape != (n,) or not ((lengths >= 1) & (lengths <= t)).all():
            raise ValueError(f"lengths must be ({n},) integers from 1 to {t}")
        return q, lengths

    def _total_log_p(self, q: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Log-likelihood (N,) of the first `lengths` classes of q (N, T), in double."""
        counts = torch.arange(q.shape[1], device=q.device) < lengths[:, None]
        return (self.log_p(shift(q), q, rows) * counts).sum(1, dtype=torch.float64)

    @torch.no_grad()
    def log_p(self, x: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        """Log-probability of each class of `target` (B, L) after the inputs x (B, L): (B, L), nats.

        In bounded memory. rows: conditions (B, C).
        """
        if not len(x):
            return torch.zeros(x.shape, device=self.device)
        groups = (v.split(max(1, PER_PASS // x.shape[1])) for v in (x, rows, target))
        return torch.cat(
            [self.log_p_of(self.pieces(x, rows), q) for x, rows, q in zip(*groups, strict=True)]
        )

    def log_p_of(self, features: Iterable[Tensor], target: Tensor) -> Tensor:
        """The same from the `pieces` of x: few logits exist at once."""
        log_p, start = [], 0
        for y in features:
            q = target[:, start : start + y.shape[1]]
            start += y.shape[1]
            parts = zip(y.flatten(0, 1).split(PER_HEAD), q.flatten().split(PER_HEAD), strict=True)
            losses = [F.cross_entropy(_full(self.head(a)), b, reduction="none") for a, b in parts]
            log_p.append(-torch.cat(losses).view_as(q))
        return torch.cat(log_p, 1)

    # ---------------------------------------------------------------- generation

    def unconditional_generate(
        self, N: int, nucleus_p: float | None = None, **settings: Any
    ) -> Tensor:
        """N clips of `config.clip_length` samples, float (N, T) in [-1, 1].

        `generate`, under the name that all models have. A model with conditions is told values
        drawn by their shares of the training set. nucleus_p=1.0 with temperature=1.0 leaves the
        distribution as it is: ancestral sampling.
        """
        return self.generate(N, nucleus_p=nucleus_p, **settings)

    @torch.no_grad()
    def generate(
        self,
        n: int,
        length: int | None = None,
        prefix: Tensor | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        nucleus_p: float | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        return_log_likelihood: bool = False,
        precision: str = "float32",
        guidance: float | None = None,
        **told: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """n clips, float (n, length) in [-1, 1] on the model's device.

        Args:
            n: clips.
            length: samples per clip, the prefix included; `config.clip_length` if None.
            prefix: float (T,), continued by every clip, or (n, T), one for each, at the model's
                sample rate. The clips begin with it, as its classes give it back.
            temperature: > 0; divides the logits. `config.temperature` if None.
            top_k: sample among the k most likely classes and those equal to the k-th, 1..256.
            nucleus_p: sample among the most likely classes that hold this much probability, (0, 1];
                1.0 cuts nothing off. `config.nucleus_p` if None.
            generator, guidance, told: see `Model`.
            progress: show a progress bar.
            return_log_likelihood: also return (n,) nats per sample of each whole clip under the
                model itself (temperature 1, nothing cut off, no guidance), equal to -nll(clips)
                with the same conditions.
            precision: of the weights, "float32", or "float16" where the compiled engine serves:
                faster, with logits, audio and likelihoods of the rounded weights. "auto" takes
                float16 where that changes logits by less than 2e-3, and tells the log.

        Raises ValueError for an argument outside its range.
        """
        n = integer("n", n)
        length = integer("length", self.config.clip_length if length is None else length)
        walk = Walk(
            self, n, prefix, temperature, top_k, nucleus_p, precision, guidance, generator, told
        )
        count = length - walk.prefix.shape[1]
        if count < 0:
            raise UserError(f"prefix of {length - count} samples is longer than length={length}")
        log_p = None
        if return_log_likelihood:
            log_p = torch.zeros(n, dtype=torch.float64, device=self.device)
        made = walk.blocks(count, UNIFORM_BLOCK, log_p)
        made = watched(made, "generating", count, "samples of each clip", UNIFORM_BLOCK, progress)
        wavs = self.quantizer.decode(torch.cat([walk.prefix, *made], 1), check=False)
        return wavs if log_p is None else (wavs, (log_p / length).float())

    def stream(
        self,
        n: int = 1,
        length: int | None = None,
        chunk: int | None = None,
        prefix: Tensor | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        nucleus_p: float | None = None,
        generator: torch.Generator | None = None,
        precision: str = "float32",
        guidance: float | None = None,
        **told: Any,
    ) -> Iterator[Tensor]:
        """Yield n clips as they are made: float (n, chunk), the last chunk maybe shorter.

        length: new samples in all, endless if None. chunk: samples, 20 ms if None. A prefix is
        continued but not repeated. Otherwise as `generate`, and the same audio.
        """
        n = integer("n", n)
        chunk = max(1, self.sample_rate // 50) if chunk is None else integer("chunk", chunk)
        length = None if length is None else integer("length", length)
        walk = Walk(
            self, n, prefix, temperature, top_k, nucleus_p, precision, guidance, generator, told
        )

        def chunks() -> Iterator[Tensor]:
            with torch.no_grad():
                for q in walk.blocks(length, chunk):
                    yield self.quantizer.decode(q, check=False)

        return chunks()  # a generator of its own, so that bad arguments raise at the call

    # ---------------------------------------------------------------- for the command `generate`

    KIND = "an autoregressive"
    SAMPLING = ("temperature", "top_k", "nucleus_p")
    SETTINGS = (*SAMPLING, "precision", "prefix", "play")

    def make(self, cfg, n, source, length, told, generator, progress) -> tuple[Tensor, list[float]]:
        """n clips (n, length), and their log-likelihoods. source: prefixes (n, T) or None."""
        settings = {name: getattr(cfg, name) for name in (*self.SAMPLING, "precision", "guidance")}
        settings |= {"generator": generator, "progress": progress, "return_log_likelihood": True}
        wavs, log_likelihood = self.generate(n, length, source, **settings, **told)
        return wavs, log_likelihood.tolist()

    def described(self, cfg: Any) -> list[str]:
        """How clips were made, in words, for their page."""
        words = ["Sorted by exact log-likelihood, lowest first", f"seed {cfg.seed}"]
        words += [f"temperature {cfg.temperature:g}", f"nucleus {cfg.nucleus_p:g}"]
        return words + ([f"top {cfg.top_k}"] if cfg.top_k else [])


def _full(logits: Tensor) -> Tensor:
    """In float32 at least: autocast makes less of them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ---- the task -----------------------------------------------------------------------------------


def bits_per_sample(model: Autoregressive, ds: ClipDataset, batch_size: int = 16) -> float:
    """Mean of -log2 p over every sample of the data set; the model in its own mode."""
    if ds.quantizer != model.config.quantizer:
        raise ValueError(f"{model.config.quantizer} models cannot score {ds.quantizer} classes")
    batches = sample_batches(ds, batch_size, None, shuffle=False)
    bits, samples = zip(*((total_bits(model, b), int(b["samples"])) for b in batches), strict=True)
    return math.fsum(bits) / sum(samples)


@torch.no_grad()
def total_bits(model: Autoregressive, batch: Batch) -> float:
    """`masked_bits` without gradients, in bounded memory however long the clips are."""
    x, target, mask = (batch[k].to(model.device) for k in ("x", "target", "mask"))
    log_p = model.log_p(x, target.masked_fill(~mask, 0), model.rows_of(batch, len(x)))
    return -log_p.masked_fill(~mask, 0).sum(dtype=torch.float64).item() / math.log(2)


def masked_bits(model: nn.Module, batch: Batch, state: Any = None) -> Tensor:
    """Sum of -log2 p over the real samples of a batch from `sample_batches`; differentiable.

    state: what the batch follows, none: it is the start of the clips; moved on.
    """
    own = bare(model)
    x, mask, target = (batch[k].to(own.device, non_blocking=True) for k in ("x", "mask", "target"))
    logits = model(x, rows=own.rows_of(batch, len(x)), state=state)
    target = target.masked_fill(~mask, -100)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum")
    return loss / math.log(2)


class BitsTask(Task):
    """Bits per sample are minimised."""

    pcm, unit, axis, scale = False, "bits", "bits per sample", math.log(2)
    golden = staticmethod(golden.autoregressive)

    def batches(self, ds: ClipDataset, batch_size: int, rng: Any, **options: Any) -> Iterator:
        return sample_batches(ds, batch_size, self.length, rng, **options)

    def loss(
        self, model: nn.Module, batch: Batch, place: tuple[int, int], rng: Callable,
        state: Any = None,
    ) -> Tensor:  # fmt: skip
        return masked_bits(model, batch, state)

    def validate(
        self, model: Autoregressive, ds: ClipDataset, batch_size: int, shard: tuple[int, int]
    ) -> tuple[float, float]:
        total = count = 0.0
        for batch in sample_batches(ds, batch_size, None, shuffle=False, shard=shard):
            total += total_bits(model, batch)
            count += int(batch["samples"])
        return total, count

    @staticmethod
    def scores(model: Autoregressive, ds: ClipDataset) -> dict[str, float]:
        return {"bits": bits_per_sample(model, ds)}
