"""SashimiAR: the autoregressive model over mu-law classes.

    p(clip) = prod_t p(q[t] | q[0..t-1]),   q[t] in 0..255,   q[-1] = 128 (silence)

The network sees the class of the previous sample and gives 256 logits for the next one; the first
sample is predicted from class 128. (SaShiMi, arXiv:2202.09729; mu-law: WaveNet, arXiv:1609.03499.)
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawaudio.arguments import check_generator, clips, floats, integer, number, tensor
from rawaudio.conditions import Conditions, ToldByName, in_pairs
from rawaudio.config import AutoregressiveConfig, check_guidance, check_sampling
from rawaudio.errors import UserError
from rawaudio.progress import watched
from rawaudio.sampling import Graph, Plain
from sashimi import mulaw
from sashimi.backbone import Sashimi, State
from sashimi.realtime import PRECISIONS, Engine
from sashimi.s4 import FullPrecision

# Uniforms are drawn this many steps at a time, whatever the chunk: same generator, same audio.
UNIFORM_BLOCK = 1024
PER_PASS = 2**16  # samples of all clips that go through the network at once, for the memory
PER_HEAD = 2**15  # samples whose logits exist at once: 32 MiB


class SashimiAR(ToldByName, FullPrecision):
    """Autoregressive SaShiMi. `model(x)`: classes int64 (B, L) -> logits (B, L, 256).

    Position t of the logits is the distribution of the class that follows x[:, t].

    A model that was trained with conditions (`model.conditions`) can be told them by name wherever
    clips go in or come out, one value for all or a list of one for each clip:
    model.generate(4, label="seven"), model.nll(wavs, label=["one", "two"]).
    """

    def __init__(self, config: AutoregressiveConfig | None = None):
        super().__init__()
        self.config = c = config or AutoregressiveConfig()
        self.embedding = nn.Embedding(mulaw.N_CLASSES, c.d_model)
        self.backbone = Sashimi(
            d_model=c.d_model, n_layers=c.n_layers, pool=c.pool, expand=c.expand, ff=c.ff,
            d_state=c.d_state, unet=c.unet, dropout=c.dropout, glu=c.glu, tied=c.tied,
            l_max=c.tier_lengths or c.l_max, d_global=c.d_condition if c.conditions else 0,
        )  # fmt: skip
        self.told = Conditions(c.conditions, c.condition_counts, c.d_condition)
        for name, parameter in self.backbone.named_parameters():
            if name.endswith("from_global.bias"):  # told nothing, the same as without conditions
                nn.init.zeros_(parameter)
        self.head = nn.Linear(c.d_model, mulaw.N_CLASSES)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(
        self, x: Tensor, state: State | None = None, rows: Tensor | None = None, **told
    ) -> Tensor:
        """Classes, integers (B, L) -> logits (B, L, 256), in parallel.

        told: conditions by name; what is not given is not told. rows: the same as indices (B, C),
        see `Conditions`. state: as in `Sashimi.absorb`; it holds them.

        Raises ValueError for other shapes and for classes outside 0..255, TypeError for audio.
        """
        return self.head(self.features(x, state, rows, **told))

    def features(
        self, x: Tensor, state: State | None = None, rows: Tensor | None = None, **told
    ) -> Tensor:
        """What the head sees, (B, L, D); arguments as in `forward`."""
        x = tensor("x", x)
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"x: expected integer classes, not {x.dtype}; mulaw.encode makes them")
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (clips, samples >= 1)")
        try:
            embedded = self.embedding(x.to(self.device, torch.int64))
        except IndexError:
            raise ValueError(f"x: classes must be from 0 to {mulaw.N_CLASSES - 1}") from None
        if state is not None:
            if told or rows is not None:
                raise ValueError("conditions: the state holds them, see default_state")
            return self.backbone.absorb(embedded, state)
        rows = self.told.rows(len(x), told) if rows is None else rows
        return self.backbone(embedded, self.told(rows))

    def pieces(self, x: Tensor, rows: Tensor, state: State | None = None) -> Iterator[Tensor]:
        """`features` of x (B, L), a piece (B, l, D) after the other, in bounded memory.

        What a piece costs beside its samples does not depend on its length, which should be long;
        kernels, which are kept, are doubled for it only once. state: as in `forward`.
        """
        stride, longest = self.backbone.period, 2 * self.backbone.l_max
        while longest < 2**13:
            longest *= 2
        size = max(1, min(PER_PASS // max(1, len(x)), longest) // stride) * stride
        if state is None and x.shape[1] > size:
            state = self.default_state(rows)
        for part in x.split(size, 1):
            yield self.features(part, state, rows if state is None else None)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One sample: classes int64 (B,) -> logits (B, 256) and the next state.

        The first state, `default_state`, holds the conditions.
        """
        y, state = self.backbone.step(self.embedding(x), state)
        return self.head(y), state

    def default_state(self, rows: Tensor) -> State:
        """State before the first sample of clips with these conditions, (B, C); C may be 0."""
        return self.backbone.default_state(len(rows), self.told(rows))

    @torch.no_grad()
    def nll(self, wavs: Tensor, lengths: Tensor | None = None, **told) -> Tensor:
        """Negative log-likelihood of clips in nats per sample, (N,), in parallel over time.

        Divide by ln 2 for bits. In the model's own mode (with dropout in train mode), without
        gradients: a training loss is the cross-entropy of `forward`. Long clips go through in
        pieces: memory grows with them by the clips themselves alone.

        Args:
            wavs: float (N, T) in [-1, 1] at the model's sample rate.
            lengths: int (N,), samples of each clip that count; the rest is padding. All if None.
            told: conditions by name; what is not given is not told.

        Raises:
            ValueError: for other shapes, values outside [-1, 1] or NaN, lengths outside 1..T.
            TypeError: for wavs or lengths of another type.
        """
        q, lengths = self._clips(wavs, lengths)
        total = self._total_log_p(q, lengths, self.told.rows(len(q), told))
        return (-total / lengths).to(self.head.weight.dtype)

    @torch.no_grad()
    def classify(
        self, wavs: Tensor, lengths: Tensor | None = None, by: str | None = None, **told
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
        q = mulaw.encode(clips("wavs", wavs, check_finite=False), name="wavs").to(self.device)
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
        parts = [self._log_p(self.pieces(x, rows), q) for x, rows, q in zip(*groups, strict=True)]
        return torch.cat(parts)

    def _log_p(self, pieces: Iterable[Tensor], target: Tensor) -> Tensor:
        """The same from what the head sees, (B, l, D) each: few logits exist at once."""
        out, at = [], 0
        for y in pieces:
            q = target[:, at : at + y.shape[1]]
            at += y.shape[1]
            parts = zip(y.flatten(0, 1).split(PER_HEAD), q.flatten().split(PER_HEAD), strict=True)
            losses = [F.cross_entropy(_full(self.head(a)), b, reduction="none") for a, b in parts]
            out.append(-torch.cat(losses).view_as(q))
        return torch.cat(out, 1)

    # ---------------------------------------------------------------- generation

    def unconditional_generate(
        self,
        N: int,
        nucleus_p: float | None = None,
        *,
        temperature: float | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        **told,
    ) -> Tensor:
        """N clips of `config.clip_length` samples, float (N, T) in [-1, 1].

        A model with conditions is told values drawn by their shares of the training set.

        nucleus_p: sample from the most likely classes that hold this much probability, (0, 1].
            With it and temperature 1.0 the distribution is left as it is: ancestral sampling. For
            both, None is the model's own, chosen for how its clips sound. The other arguments are
            `generate`'s.
        """
        return self.generate(
            N,
            nucleus_p=nucleus_p,
            temperature=temperature,
            guidance=guidance,
            generator=generator,
            progress=progress,
            **told,
        )

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
        **told,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """n clips, float (n, length) in [-1, 1] on the model's device.

        Args:
            n: clips.
            length: samples per clip, the prefix included; `config.clip_length` if None.
            prefix: float (T,), continued by every clip, or (n, T), one for each, at the model's
                sample rate. The clips begin with it, as mu-law gives it back.
            temperature: > 0; divides the logits. `config.temperature` if None.
            top_k: sample among the k most likely classes and those equal to the k-th, 1..256.
            nucleus_p: sample among the most likely classes that hold this much probability, (0, 1];
                1.0 cuts nothing off. `config.nucleus_p` if None.
            generator: source of randomness; torch's default one on the CPU if None. The same
                state of the same generator gives the same clips.
            progress: show a progress bar.
            return_log_likelihood: also return (n,) nats per sample of each whole clip under the
                model itself (temperature 1, nothing cut off, no guidance), equal to -nll(clips)
                with the same conditions.
            precision: of the weights, "float32", or "bfloat16" where the compiled engine serves:
                faster, with logits, audio and likelihoods of the rounded weights.
            guidance: how far logits are pushed from those of the model told nothing (see
                `conditions.guided`), at least 0; 1 is off, others cost twice. `config.guidance` if
                None.
            told: conditions by name, a value for all clips or a list of one for each. What is not
                given is drawn by the shares of the training set, see `draw_conditions`.

        Raises:
            ValueError: for an argument outside its range.
        """
        n = integer("n", n)
        length = integer("length", self.config.clip_length if length is None else length)
        q_prefix, how = self._prepare(n, prefix, temperature, top_k, nucleus_p, precision)
        rows, guidance = self._conditions(n, told, guidance, generator)
        start = q_prefix.shape[1]
        if start > length:
            raise UserError(f"prefix of {start} samples is longer than length={length}")
        blocks, log_p = [q_prefix], torch.zeros(n, dtype=torch.float64, device=self.device)
        samples = self._classes(
            q_prefix, length - start, UNIFORM_BLOCK, how, rows, guidance, generator,
            log_p if return_log_likelihood else None, precision,
        )  # fmt: skip
        to_do = (length - start, "samples of each clip", UNIFORM_BLOCK, progress)
        blocks += watched(samples, "generating", *to_do)
        wavs = mulaw.decode(torch.cat(blocks, 1), check=False)
        return (wavs, (log_p / length).float()) if return_log_likelihood else wavs

    @torch.no_grad()
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
        **told,
    ) -> Iterator[Tensor]:
        """Yield n clips as they are made: float (n, chunk), the last chunk maybe shorter.

        length: new samples in all, endless if None. chunk: samples, 20 ms if None. A prefix is
        continued but not repeated. Otherwise as `generate`, and the same audio.
        """
        n = integer("n", n)
        chunk = max(1, self.sample_rate // 50) if chunk is None else integer("chunk", chunk)
        length = None if length is None else integer("length", length)
        q_prefix, how = self._prepare(n, prefix, temperature, top_k, nucleus_p, precision)
        rows, guidance = self._conditions(n, told, guidance, generator)

        def chunks() -> Iterator[Tensor]:
            with torch.no_grad():
                for q in self._classes(
                    q_prefix, length, chunk, how, rows, guidance, generator, None, precision
                ):
                    yield mulaw.decode(q, check=False)

        return chunks()  # a generator of its own, so that bad arguments raise at the call

    def _conditions(self, n, told, guidance, generator) -> tuple[Tensor, float]:
        """Conditions of the clips, (n, C), and guidance, checked."""
        guidance = self.config.guidance if guidance is None else number("guidance", guidance)
        check_guidance(guidance, len(self.told))
        check_generator(generator)
        return self.told.draw(n, told, generator), guidance

    def _prepare(
        self, n, prefix, temperature, top_k, nucleus_p, precision
    ) -> tuple[Tensor, tuple[float, int | None, float]]:
        """Arguments, checked: the prefix as classes (n, T), T = 0 without one; and how to sample:
        temperature, top_k, nucleus_p."""
        c = self.config
        temperature = number("temperature", c.temperature if temperature is None else temperature)
        nucleus_p = number("nucleus_p", c.nucleus_p if nucleus_p is None else nucleus_p)
        check_sampling(temperature, nucleus_p)
        top_k = None if top_k is None else integer("top_k", top_k, 1, mulaw.N_CLASSES)
        if precision not in PRECISIONS:
            raise UserError(f"precision={precision}: must be {' or '.join(PRECISIONS)}")
        how = temperature, top_k, nucleus_p
        if prefix is None:
            return torch.zeros(n, 0, dtype=torch.int64, device=self.device), how
        prefix = floats("prefix", prefix, check_finite=False)
        if prefix.dim() not in (1, 2) or (prefix.dim() == 2 and prefix.shape[0] not in (1, n)):
            raise ValueError(
                f"prefix of shape {tuple(prefix.shape)}: expected (samples,) or ({n}, samples)"
            )
        return mulaw.encode(prefix, name="prefix").to(self.device).expand(n, -1), how

    def _classes(
        self, q_prefix, count, chunk, how, rows, guidance, generator, log_p, precision
    ) -> Iterator[Tensor]:
        """Yield `count` classes (endless if None) after the prefix, int64 (n, <= chunk) each.

        `log_p` (n,), if given, gathers the log-likelihood of the prefix and all that follows.
        """
        was_training = self.training
        if was_training:
            self.eval()
        try:
            n = q_prefix.shape[0]
            served, why = Engine.available(self)
            if served:
                steps = Engine(self, n, precision, rows=rows, guidance=guidance)
            elif precision != "float32":
                raise UserError(f"precision={precision} needs the compiled engine: {why}")
            else:
                runner = Graph if self.device.type == "cuda" else Plain
                steps = runner(self, n, rows, guidance)
            if q_prefix.shape[1]:  # in parallel; all but the last class become state
                per = 1 if guidance == 1 else 2
                inputs = shift(q_prefix).repeat_interleave(per, 0)
                told = rows if per == 1 else in_pairs(rows)
                state = self.default_state(told)
                pieces = self.pieces(inputs, told, state)
                own = (y[::per] for y in pieces)
                if log_p is not None:
                    log_p += self._log_p(own, q_prefix).sum(1, dtype=torch.float64)
                for _ in own:
                    pass
                steps.load_state(state)
                q = q_prefix[:, -1]
            else:
                q = torch.full((n,), mulaw.SILENCE, device=self.device)
            made = 0
            while count is None or made < count:
                size, parts = chunk if count is None else min(chunk, count - made), []
                while size:
                    at = made % UNIFORM_BLOCK
                    if at == 0:
                        uniforms = _draw(n, generator).to(self.device)
                    part = uniforms[at : at + size]
                    parts.append(steps.run(q, part, *how, log_p))
                    q = parts[-1][:, -1]
                    made, size = made + len(part), size - len(part)
                yield torch.cat(parts, 1)
        finally:
            if was_training:
                self.train()


def _draw(n: int, generator: torch.Generator | None) -> Tensor:
    """Uniforms (UNIFORM_BLOCK, n) in [0, 1)."""
    device = generator.device if generator is not None else "cpu"
    return torch.rand(UNIFORM_BLOCK, n, generator=generator, device=device)


def shift(q: Tensor) -> Tensor:
    """The network's input for classes q (B, L): silence, then all but the last."""
    return F.pad(q[:, :-1], (1, 0), value=mulaw.SILENCE)


def _full(logits: Tensor) -> Tensor:
    """In float32 at least: autocast makes less of them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
