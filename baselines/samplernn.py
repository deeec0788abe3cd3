"""SampleRNN (arXiv:1612.07837) as in state-spaces/s4: the other baseline of the SaShiMi paper.

Tiers of recurrent networks see frames of samples, the coarsest tier the longest, and each tells the
next finer one; that and the last eight samples decide the next. Before a clip there is class 128.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.normed import Normed, Pointwise
from baselines.packed import Packed, PackedGRU
from rawaudio.autoregressive import Autoregressive, AutoregressiveSettings, BitsTask
from rawaudio.conditions import Conditions
from rawaudio.config import as_written, setting
from rawaudio.engine import Compiled
from rawaudio.errors import UserError
from rawaudio.family import Family
from sashimi.mulaw import N_CLASSES, SILENCE


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
        if not self.frame_sizes or min(self.frame_sizes) < 1 or self.spans[-1] > 2**16:
            raise UserError(f"frame_sizes={as_written(self.frame_sizes)}: product 1 to 65,536")

    @property
    def spans(self) -> list[int]:
        """Samples per frame of every tier, the finest first."""
        return [math.prod(self.frame_sizes[: i + 1]) for i in range(len(self.frame_sizes))]


@dataclass
class State:
    """What the tiers remember.

    tokens: the last classes, int64 (B, N), N the longest frame; that of sample t in slot t - 1 mod
    N, so that frames lie in one piece. hidden: of each tier's GRU, (layers, B, H). above: what each
    tier tells the one below for its present frame, (B, frame size, H). told: what conditions add to
    the tiers' inputs, (B, tiers, 1, H), or zeros (B, tiers, 1, 1) without.
    """

    position: int
    tokens: Tensor
    hidden: list[Tensor]
    above: list[Tensor]
    told: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.tokens, *self.hidden, *self.above, self.told]

    def copy(self) -> "State":
        return State(self.position, self.tokens, list(self.hidden), list(self.above), self.told)


class Recurrent(nn.GRU):
    """A GRU with a learned start."""

    def __init__(self, features: int, layers: int):
        super().__init__(features, features, layers, batch_first=True)
        self.h0 = nn.Parameter(torch.zeros(layers, 1, features))
        self.MATRICES = [name for name, _ in self.named_parameters() if name.startswith("weight")]
        for name, parameter in self.named_parameters():
            bound = math.sqrt(3 / features) if name in self.MATRICES else 0.0
            nn.init.uniform_(parameter, -bound, bound)
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(parameter.detach()[2 * features :])


def _tier(c: SampleRNNConfig, samples: int, size: int) -> nn.ModuleDict:
    """What sees frames of so many samples, and tells the tier below something for each of its."""
    wide, bound = c.d_hidden, math.sqrt(6 / c.d_hidden)
    conv_t = Normed(wide, wide, size, bias=False, bound=bound)  # (inputs, outputs, places)
    upsampling = nn.ModuleDict({"conv_t": conv_t})
    upsampling.bias = nn.Parameter(torch.zeros(wide, size))
    expand = Pointwise(wide, samples, 1, bound=math.sqrt(6 / samples))
    rnn = Recurrent(wide, c.n_rnn)
    return nn.ModuleDict({"input_expand": expand, "rnn": rnn, "upsampling": upsampling})


def _upsampling(tier: nn.ModuleDict) -> tuple[Tensor, Tensor]:
    """The tier's last matrix and bias, H -> places * H."""
    matrix = tier.upsampling.conv_t.weight.permute(2, 1, 0).flatten(0, 1)
    return matrix, tier.upsampling.bias.T.flatten()


def _sample_level(c: SampleRNNConfig) -> nn.ModuleDict:
    """The network of the finest resolution."""
    wide, features, taps = c.d_hidden, c.d_embedding, c.frame_sizes[0]
    return nn.ModuleDict({
        "embedding": nn.Embedding(N_CLASSES, features),
        "input": Normed(wide, features, taps, bias=False, bound=math.sqrt(6 / features / taps)),
        "hidden": Pointwise(wide, wide, 1, bound=math.sqrt(6 / wide)),
        "output": Pointwise(N_CLASSES, wide, 1, bound=math.sqrt(3 / wide)),
    })  # fmt: skip


class CompiledSampleRNN(Compiled):
    """For samplernn.cpp."""

    SOURCE = Path(__file__).with_suffix(".cpp")

    def pack(self, model: "SampleRNN") -> list[int]:
        c, mlp = model.config, model.sample_level_mlp
        values, table = model._tables()
        self.add(values, self.grouped(table, 1))
        for tier in model.frame_level_rnns:
            expand = tier.input_expand
            self.matrix(expand.weight[..., 0], expand.bias)
            for inner, past, inner_bias, past_bias in tier.rnn.all_weights:
                self._square(inner, inner_bias, 3)
                self._square(past, past_bias, 3)
            self._square(*_upsampling(tier), tier.upsampling.bias.shape[1])
        for layer in (mlp.hidden, mlp.output):
            self._square(layer.weight[..., 0], layer.bias)
        return [c.d_hidden, c.n_rnn, self.half, len(c.frame_sizes), *c.frame_sizes]

    def _square(self, weight: Tensor, bias: Tensor, groups: int = 1) -> None:
        """From features to features, in so many groups of rows."""
        self.matrix(self.grouped(self.grouped(weight, 0, groups), 1), self.grouped(bias, 0, groups))

    def records(self, state: State) -> Tensor:
        pieces = []
        for i, (hidden, above) in enumerate(zip(state.hidden, state.above, strict=True)):
            told = state.told[:, i].expand(-1, 1, above.shape[-1])
            for x in (hidden.transpose(0, 1), told, above):
                pieces.append(self.grouped(x, 2).flatten(1))
        return torch.cat([*pieces, self.grouped(state.tokens.float(), 1)], 1)


class SampleRNN(Autoregressive):
    """SampleRNN, see `Autoregressive`. Parameters have the names of state-spaces/s4."""

    config: SampleRNNConfig
    COMPILED = CompiledSampleRNN

    def __init__(self, config: SampleRNNConfig | None = None):
        super().__init__()
        self.config = c = config or SampleRNNConfig()
        self.frame_level_rnns = nn.ModuleList(map(partial(_tier, c), c.spans, c.frame_sizes))
        self.sample_level_mlp = _sample_level(c)
        self.period = c.spans[-1]
        self.told = Conditions(c.conditions, c.condition_counts, c.d_condition)
        told = nn.Linear(c.d_condition, c.d_hidden * len(c.spans), bias=False)
        self.from_told = told if c.conditions else None

    @property
    def head(self) -> nn.Module:
        return self.sample_level_mlp.output

    def default_state(self, rows: Tensor) -> State:
        """The state after class 128 for ever, told these conditions (B, C); C may be 0."""
        n, c, place = len(rows), self.config, {"device": self.device, "dtype": self.dtype}
        silence = torch.full((n, self.period), SILENCE, device=self.device)
        hidden = [tier.rnn.h0.repeat(1, n, 1) for tier in self.frame_level_rnns]
        above = [torch.zeros(n, size, c.d_hidden, **place) for size in c.frame_sizes]
        told = torch.zeros(n, len(above), 1, 1, **place)
        return self.carry(State(0, silence, hidden, above, told), rows, detached=False)

    def carry(self, state: State, rows: Tensor, detached: bool = True) -> State:
        """The same state without its history, told these conditions: gradients end there."""
        new = state.copy()
        if self.from_told is not None:
            new.told = self.from_told(self.told(rows)).unflatten(1, (len(new.above), 1, -1))
        if detached:
            new.hidden, new.above = ([x.detach() for x in of] for of in (new.hidden, new.above))
        return new

    def absorb(self, x: Tensor, state: State) -> Tensor:
        """`features` of the classes x (B, L) that follow a state, which becomes the one after."""
        start, end, longest = state.position, state.position + x.shape[1], self.period
        # classes of the samples from start - longest to end - 1
        tokens = torch.cat([state.tokens.roll((1 - start) % longest, 1), x], 1)
        state.position, state.tokens = end, tokens[:, -longest:].roll((end - 1) % longest, 1)
        values, y = self._values(tokens), torch.zeros(1, 1, 1, device=x.device)
        for i, n in reversed(list(enumerate(self.config.spans))):
            tier, size = self.frame_level_rnns[i], self.config.frame_sizes[i]
            first, below = -(-start // n) * n, n // size  # its first frame; samples of those below
            said = [state.above[i]]
            if first < end:
                begin, frames = first - n + 1 - (start - longest), -(-(end - first) // n)
                u = tier.input_expand(values[:, begin : begin + frames * n].unflatten(1, (-1, n)))
                h, state.hidden[i] = tier.rnn(u + y[:, :frames] + state.told[:, i], state.hidden[i])
                said.append(F.linear(h, *_upsampling(tier)).view(len(x), -1, h.shape[-1]))
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

    def _tables(self) -> tuple[Tensor, Tensor]:
        """What the tiers see of each class, (256,), and what it adds at each of the last places,
        the oldest first: (places * 256, H)."""
        mlp, classes = self.sample_level_mlp, torch.arange(N_CLASSES, device=self.device)
        table = mlp.embedding.weight @ mlp.input.weight.permute(2, 1, 0)
        return self._values(classes), table.flatten(0, 1)

    @torch.no_grad()
    def setup_rnn(self) -> None:
        """Prepares `step`, again after parameters change."""
        mlp, taps = self.sample_level_mlp, self.config.frame_sizes[0]
        self._tiers = [(t.input_expand.packed(), PackedGRU(t.rnn), Packed(*_upsampling(t)))
                       for t in self.frame_level_rnns]  # fmt: skip
        self._class_values, self._table = self._tables()
        self._hidden, self._output = mlp.hidden.packed(relu=True), mlp.output.packed()
        self._places = N_CLASSES * torch.arange(taps, device=self.device)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One sample: classes int64 (B,) -> logits (B, 256) and the next state."""
        t, longest, y = state.position, self.period, 0.0
        state.tokens[:, (t - 1) % longest] = x
        for i, n in reversed(list(enumerate(self.config.spans))):
            if t % n == 0:
                expand, rnn, upsample = self._tiers[i]
                own = self._class_values[state.tokens[:, (t - n) % longest :][:, :n]]
                u = expand(own) + y + state.told[:, i, 0]
                h, state.hidden[i] = rnn(u, state.hidden[i])
                state.above[i] = upsample(h).view(state.above[i].shape)
            y = state.above[i][:, t % n // (n // self.config.frame_sizes[i])]
        recent = state.tokens.roll(-(t % longest), 1)[:, longest - len(self._places) :]
        z = F.embedding_bag(recent + self._places, self._table, mode="sum") + y
        state.position += 1
        return self._output(self._hidden(z.relu_())), state


# Source: configs/experiment/audio/samplernn-* of state-spaces/s4. The rate times 0.2 after 20 bad
# epochs; 200 epochs of 243 batches (SC09), 12 or 30, with 16, 128 or 125 steps each.
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

# 1.5M parameters, 8 kHz
DIGITS = {"sample_rate": 8000, "clip_length": 8000, "d_hidden": 192, "d_embedding": 128}

FAMILY = Family(
    kind="samplernn",
    config=SampleRNNConfig,
    module=SampleRNN,
    task=BitsTask,
    models={"samplernn": {}, "samplernn_digits": DIGITS},
    recipes={name: PUBLISHED | settings for name, settings in RECIPES.items()},
    training={"start_lr": 1e-3},
    entries={"samplernn_sc09": "https://huggingface.co/krandiash/sashimi-release/resolve/main/"
             "checkpoints/samplernn_sc09.pt"},
)  # fmt: skip
