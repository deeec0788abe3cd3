"""SampleRNN (arXiv:1612.07837) as in state-spaces/s4: the other baseline of the SaShiMi paper.

Tiers of recurrent networks see frames of samples, the coarsest tier the longest ones, and tell the
next finer tier what they make of them; the last eight samples and the finest tier decide the next.
Before a clip there is class 128.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.normed import Normed
from baselines.packed import Packed
from rawaudio.autoregressive import Autoregressive, AutoregressiveSettings, BitsTask
from rawaudio.conditions import Conditions
from rawaudio.config import as_written, setting
from rawaudio.errors import UserError
from rawaudio.family import Family
from sashimi.mulaw import N_CLASSES, SILENCE

LONGEST = 2**16  # samples of a frame


@dataclass
class SampleRNNConfig(AutoregressiveSettings):
    """SampleRNN. Defaults: the baseline of the SaShiMi paper, 35,034,624 parameters."""

    frame_sizes: list[int] = setting(
        [8, 2, 2], "samples per frame of the finest tier; of the others, frames of the tier below"
    )
    n_rnn: int = setting(1, "GRU layers of a tier")
    d_hidden: int = setting(1024, "features of the tiers")
    d_embedding: int = setting(256, "features of the embedding of the last samples")
    d_condition: int = setting(64, "features of the conditions' embeddings")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("n_rnn", "d_hidden", "d_embedding", "d_condition")
        if not self.frame_sizes or min(self.frame_sizes) < 1 or self.frames[-1] > LONGEST:
            written = as_written(self.frame_sizes)
            raise UserError(
                f"frame_sizes={written}: must be one or more numbers, product 1 to {LONGEST:,}"
            )

    @property
    def frames(self) -> list[int]:
        """Samples per frame of every tier, the finest first."""
        return [math.prod(self.frame_sizes[: i + 1]) for i in range(len(self.frame_sizes))]


@dataclass
class State:
    """What the tiers remember.

    tokens: the last classes, int64 (B, N), N the longest frame; that of sample t in slot t - 1 mod
    N, so that frames lie in one piece. hidden: of each tier's GRU, (layers, B, H). above: what each
    tier tells the one below for its present frame, (B, frame size, H). told: see `Tier`.
    """

    position: int
    tokens: Tensor
    hidden: list[Tensor]
    above: list[Tensor]
    told: Tensor | None

    def tensors(self) -> list[Tensor]:
        told = [] if self.told is None else [self.told]
        return [self.tokens, *self.hidden, *self.above, *told]

    def copy(self) -> "State":
        return State(self.position, self.tokens, list(self.hidden), list(self.above), self.told)


class Recurrent(nn.GRU):
    """A GRU with a learned start."""

    def __init__(self, features: int, layers: int):
        super().__init__(features, features, layers, batch_first=True)
        self.h0 = nn.Parameter(torch.zeros(layers, 1, features))
        self.MATRICES = [name for name, _ in self.named_parameters() if name.startswith("weight")]
        for name, parameter in self.named_parameters():
            if name.startswith("weight"):
                nn.init.uniform_(parameter, -math.sqrt(3 / features), math.sqrt(3 / features))
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(parameter.detach()[2 * features :])
            if name.startswith("bias"):
                nn.init.zeros_(parameter)


class Upsampling(nn.Module):
    """(B, frames, H) -> (B, frames * size, H): a linear map of its own for each place."""

    def __init__(self, features: int, size: int):
        super().__init__()
        self.conv_t = Normed(features, features, size, bias=False)  # (inputs, outputs, places)
        self.conv_t.start(math.sqrt(6 / features))
        self.bias = nn.Parameter(torch.zeros(features, size))

    def matrix(self) -> tuple[Tensor, Tensor]:
        return self.conv_t.weight.permute(2, 1, 0).flatten(0, 1), self.bias.T.flatten()

    def forward(self, y: Tensor) -> Tensor:
        return F.linear(y, *self.matrix()).view(len(y), -1, y.shape[-1])


class Tier(nn.Module):
    """Frames (B, F, n) of samples, what the tier above and the conditions say, (B, F, H) and
    (B, 1, H) or None -> what it tells the tier below, (B, F * frame size, H)."""

    def __init__(self, samples: int, size: int, config: SampleRNNConfig):
        super().__init__()
        self.input_expand = Normed(config.d_hidden, samples, 1)
        self.input_expand.start(math.sqrt(6 / samples))
        self.rnn = Recurrent(config.d_hidden, config.n_rnn)
        self.upsampling = Upsampling(config.d_hidden, size)


class SampleLevel(nn.Module):
    """The network of the finest resolution."""

    def __init__(self, config: SampleRNNConfig):
        super().__init__()
        width, taps = config.d_hidden, config.frame_sizes[0]
        self.embedding = nn.Embedding(N_CLASSES, config.d_embedding)
        self.input = Normed(width, config.d_embedding, taps, bias=False)
        self.hidden, self.output = Pointwise(width, width, 1), Pointwise(N_CLASSES, width, 1)
        self.input.start(math.sqrt(6 / (config.d_embedding * taps)))
        self.hidden.start(math.sqrt(6 / width))
        self.output.start(math.sqrt(3 / width))

    def table(self) -> Tensor:
        """What each class adds at each of the last places, the oldest first: (places * 256, H)."""
        weight = self.input.weight.permute(2, 1, 0)  # (places, E, H)
        return (self.embedding.weight @ weight).flatten(0, 1)


class Pointwise(Normed):
    """A convolution of one tap, of features in the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[..., 0], self.bias)


class SampleRNN(Autoregressive):
    """SampleRNN, see `Autoregressive`. Parameters have the names of state-spaces/s4."""

    config: SampleRNNConfig

    def __init__(self, config: SampleRNNConfig | None = None):
        super().__init__()
        self.config = c = config or SampleRNNConfig()
        sizes = zip(c.frames, c.frame_sizes, strict=True)
        self.frame_level_rnns = nn.ModuleList(Tier(n, size, c) for n, size in sizes)
        self.sample_level_mlp = SampleLevel(c)
        self.told = Conditions(c.conditions, c.condition_counts, c.d_condition)
        wide = c.d_hidden * len(c.frames)
        self.from_told = nn.Linear(c.d_condition, wide, bias=False) if c.conditions else None

    @property
    def head(self) -> nn.Module:
        return self.sample_level_mlp.output

    @property
    def period(self) -> int:
        """The longest frame, in samples."""
        return self.config.frames[-1]

    def features(self, x: Tensor, rows: Tensor) -> Tensor:
        """Classes (B, L), conditions (B, C) -> (B, L, H)."""
        return self.absorb(x, self.default_state(rows))

    def default_state(self, rows: Tensor) -> State:
        """The state after class 128 for ever, told these conditions (B, C); C may be 0."""
        n, c = len(rows), self.config
        silence = torch.full((n, self.period), SILENCE, device=self.device)
        hidden = [tier.rnn.h0.repeat(1, n, 1) for tier in self.frame_level_rnns]
        shapes = [(n, size, c.d_hidden) for size in c.frame_sizes]
        above = [torch.zeros(shape, device=self.device, dtype=self.dtype) for shape in shapes]
        return State(0, silence, hidden, above, self._told(rows))

    def carry(self, state: State, rows: Tensor) -> State:
        """The same state without its history, told these conditions: gradients end there."""
        hidden, above = ([x.detach() for x in of] for of in (state.hidden, state.above))
        return State(state.position, state.tokens, hidden, above, self._told(rows))

    def _told(self, rows: Tensor) -> Tensor | None:
        """What conditions (B, C) add to the tiers' inputs, (B, tiers, 1, H)."""
        if self.from_told is None:
            return None
        return self.from_told(self.told(rows)).unflatten(1, (len(self.config.frames), 1, -1))

    def absorb(self, x: Tensor, state: State) -> Tensor:
        """`features` of the classes x (B, L) that follow a state, which becomes the one after."""
        start, end, longest = state.position, state.position + x.shape[1], self.period
        # classes of the samples from start - longest to end - 1
        tokens = torch.cat([state.tokens.roll((1 - start) % longest, 1), x], 1)
        state.position, state.tokens = end, tokens[:, -longest:].roll((end - 1) % longest, 1)
        values, y = self._values(tokens), None
        for i in reversed(range(len(self.frame_level_rnns))):
            tier, n, size = (
                self.frame_level_rnns[i],
                self.config.frames[i],
                self.config.frame_sizes[i],
            )
            first, below = -(-start // n) * n, n // size  # its first frame; samples of those below
            said = [state.above[i]]
            if first < end:
                begin, frames = first - n + 1 - (start - longest), -(-(end - first) // n)
                own = values[:, begin : begin + frames * n].unflatten(1, (frames, n))
                u = F.linear(own, tier.input_expand.weight[..., 0], tier.input_expand.bias)
                u = u if y is None else u + y[:, :frames]
                u = u if state.told is None else u + state.told[:, i]
                h, state.hidden[i] = tier.rnn(u, state.hidden[i])
                said.append(tier.upsampling(h))
            said = torch.cat(said, 1)
            state.above[i] = said[:, -size:].contiguous()
            y = said[:, (-(-start // below) * below - (first - n)) // below :]
        mlp, taps = self.sample_level_mlp, self.config.frame_sizes[0]
        recent = mlp.embedding(tokens[:, longest - taps + 1 :]).transpose(1, 2)
        z = F.conv1d(recent, mlp.input.weight).transpose(1, 2) + y[:, : x.shape[1]]
        return mlp.hidden(z.relu()).relu()

    def _values(self, tokens: Tensor) -> Tensor:
        """What the tiers see of classes."""
        return 2 * self.quantizer.decode(tokens, check=False).to(self.dtype)

    @torch.no_grad()
    def setup_rnn(self) -> None:
        """Prepares `step`, again after parameters change."""
        mlp, taps, longest = self.sample_level_mlp, self.config.frame_sizes[0], self.period
        self._tiers = []
        for tier in self.frame_level_rnns:
            own = Packed(tier.input_expand.weight[..., 0], tier.input_expand.bias)
            gates = [(Packed(w, b), Packed(v, c)) for w, v, b, c in tier.rnn.all_weights]
            self._tiers.append((own, gates, Packed(*tier.upsampling.matrix())))
        self._value_table = self._values(torch.arange(N_CLASSES, device=self.device))
        self._table = mlp.table()
        self._hidden = Packed(mlp.hidden.weight[..., 0], mlp.hidden.bias, relu=True)
        self._output = Packed(mlp.output.weight[..., 0], mlp.output.bias)
        places = torch.arange(taps, device=self.device)
        self._places = places * N_CLASSES
        self._slots = [(places + t - taps) % longest for t in range(longest)]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One sample: classes int64 (B,) -> logits (B, 256) and the next state."""
        t, longest, above = state.position, self.period, None
        state.tokens[:, (t - 1) % longest] = x
        for i in reversed(range(len(self._tiers))):
            n, size = self.config.frames[i], self.config.frame_sizes[i]
            if t % n == 0:
                state.above[i], state.hidden[i] = self._frame(i, (t - n) % longest, state, above)
            above = state.above[i][:, t % n // (n // size)]
        recent = state.tokens.index_select(1, self._slots[t % longest]) + self._places
        z = F.embedding_bag(recent, self._table, mode="sum") + above
        state.position += 1
        return self._output(self._hidden(z.relu_())), state

    def _frame(
        self, i: int, slot: int, state: State, above: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What tier i tells the tier below after its frame that begins in that slot, and its hidden
        state."""
        own, gates, upsampling = self._tiers[i]
        h = own(self._value_table[state.tokens[:, slot : slot + self.config.frames[i]]])
        h = h if above is None else h + above
        h = h if state.told is None else h + state.told[:, i, 0]
        hidden = []
        for past, (from_input, from_past) in zip(state.hidden[i], gates, strict=True):
            a, b = from_input(h), from_past(past)
            width = h.shape[1]
            reset, update = (a[:, : 2 * width] + b[:, : 2 * width]).sigmoid_().chunk(2, 1)
            new = torch.addcmul(a[:, 2 * width :], reset, b[:, 2 * width :]).tanh_()
            h = torch.lerp(new, past, update)
            hidden.append(h)
        return upsampling(h).view(len(h), -1, h.shape[1]), torch.stack(hidden)


# Source: configs/experiment/audio/samplernn-* of state-spaces/s4: AdamW 1e-3, gradients cut off at
# 1 one by one, the rate times 0.2 after 20 epochs without a better validation, 200 epochs. An epoch
# is 243 batches of SC09, 12 of YouTubeMix, 30 of Beethoven, with 16, 128 and 125 steps each.
PUBLISHED = {"start_lr": 1e-3, "schedule": "plateau", "plateau_patience": 20, "warmup_steps": 0,
             "batch_size": 128, "tbptt": 1024, "grad_clip_value": 1.0}  # fmt: skip
RECIPES = {
    "samplernn-sc09": {"validation_interval": 3888, "max_steps": 777_600},
    "samplernn-youtubemix": {"validation_interval": 1536, "max_steps": 307_200,
                             "sample_len": 131_072, "model.clip_length": 131_072},
    "samplernn-beethoven": {"validation_interval": 3750, "max_steps": 750_000,
                            "sample_len": 128_000, "model.clip_length": 128_000,
                            "model.quantizer": "linear"},
}  # fmt: skip

FAMILY = Family(
    kind="samplernn",
    config=SampleRNNConfig,
    module=SampleRNN,
    task=BitsTask,
    models={"samplernn": {}},
    recipes={name: PUBLISHED | settings for name, settings in RECIPES.items()},
    training={"start_lr": 1e-3},
)
