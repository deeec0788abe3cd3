"""WaveNet (arXiv:1609.03499) as in state-spaces/s4: the baseline of the SaShiMi paper.

Before a clip there is class 128 for as long as the network looks back. Every layer's input is then
a constant, which `default_state` computes once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.packed import Packed
from rawaudio.autoregressive import Autoregressive, AutoregressiveSettings, BitsTask
from rawaudio.conditions import Conditions
from rawaudio.config import setting
from rawaudio.engine import Compiled
from rawaudio.errors import UserError
from rawaudio.family import Family
from sashimi.mulaw import N_CLASSES, SILENCE

SIZES = ("layers", "blocks", "residual_channels", "dilation_channels", "skip_channels",
         "end_channels", "d_condition")  # fmt: skip
FARTHEST = 2**20  # samples that a model may look back: a state holds about as many inputs


@dataclass
class WaveNetConfig(AutoregressiveSettings):
    """WaveNet. Defaults: the baseline of the SaShiMi paper, 4,244,480 parameters."""

    layers: int = setting(10, "layers per block, with dilations 1, 2, 4, ...")
    blocks: int = setting(4, "blocks")
    residual_channels: int = setting(64, "features between the layers")
    dilation_channels: int = setting(64, "features of the gated convolutions")
    skip_channels: int = setting(1024, "features of the sum over all layers")
    end_channels: int = setting(512, "hidden features after that sum")
    kernel_size: int = setting(2, "taps of the dilated convolutions")
    d_condition: int = setting(64, "features of the conditions' embeddings")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(*SIZES)
        if not 2 <= self.receptive_field <= FARTHEST:
            sizes = f"layers={self.layers}, kernel_size={self.kernel_size}"
            raise UserError(f"{sizes}: must look back at 2 to {FARTHEST:,} samples")

    @property
    def dilations(self) -> list[int]:
        return [2**layer for layer in range(self.layers)] * self.blocks

    @property
    def queues(self) -> list[int]:
        """Inputs that each layer remembers."""
        return [(self.kernel_size - 1) * dilation for dilation in self.dilations]

    @property
    def receptive_field(self) -> int:  # in samples
        return 1 + (self.kernel_size - 1) * self.blocks * (2**self.layers - 1)


@dataclass
class State:
    """What the layers remember; `step` updates the tensors in place.

    queues (B, sum of n, C): of each layer, one after the other, the last n = (kernel_size - 1)
    dilation inputs, that of sample t in slot t mod n. clock: the position, int64 (1,), for recorded
    CUDA graphs. told: see `WaveNet._told`.
    """

    position: int
    clock: Tensor
    queues: Tensor
    told: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [self.clock, self.queues, *([] if self.told is None else [self.told])]

    def copy(self) -> "State":
        return State(self.position, self.clock, self.queues, self.told)


class CompiledWaveNet(Compiled):
    """For wavenet.cpp."""

    SOURCE = Path(__file__).with_suffix(".cpp")

    def pack(self, model: "WaveNet") -> list[int]:
        c, (table, inner, outer) = model.config, model._weights()
        n, taps, end = c.residual_channels, c.kernel_size, model.end_conv_1
        self.queues = c.queues
        self.add(self.grouped(table, 1))
        for gates, after in zip(inner, outer, strict=True):
            self.matrix(self.grouped(self.grouped(gates, 0, 2), 1, taps))
            self.matrix(self.grouped(after[:n], 1))
        skip = torch.stack([after[n:] for after in outer], 1)  # (S, layers, D)
        self.matrix(self.grouped(skip, 2).flatten(1))
        self.matrix(self.grouped(end.weight[..., 0], 1), end.bias)
        weight, bias = model._last()
        self.matrix(self.grouped(weight, 1), bias)
        return [taps, n, c.dilation_channels, c.skip_channels, c.end_channels, self.half,
                bool(c.conditions), len(c.dilations), *c.dilations]  # fmt: skip

    def records(self, state: State) -> Tensor:
        pieces = []
        for i, queue in enumerate(state.queues.split(self.queues, 1)):
            pieces.append(self.grouped(queue, 2).flatten(1))
            if state.told is not None:
                pieces.append(self.grouped(state.told[:, i, 0], 1, 2))
        return torch.cat(pieces, 1)


class WaveNet(Autoregressive):
    """WaveNet, see `Autoregressive`. Parameters have the names of state-spaces/s4."""

    config: WaveNetConfig
    COMPILED = CompiledWaveNet

    def __init__(self, config: WaveNetConfig | None = None):
        super().__init__()
        self.config = c = config or WaveNetConfig()
        residual, dilated = c.residual_channels, c.dilation_channels

        def convolutions(*shape: int) -> nn.ModuleList:  # used as matrices, see `_weights`
            return nn.ModuleList(nn.Conv1d(*shape, bias=False) for _ in c.dilations)

        self.embedding = nn.Embedding(N_CLASSES, N_CLASSES)
        self.start_conv = nn.Conv1d(N_CLASSES, residual, 1, bias=False)
        self.filter_convs = convolutions(residual, dilated, c.kernel_size)
        self.gate_convs = convolutions(residual, dilated, c.kernel_size)
        self.residual_convs = convolutions(dilated, residual, 1)
        self.skip_convs = convolutions(dilated, c.skip_channels, 1)
        self.residual_convs[-1].requires_grad_(False)  # published files have it; nothing reads it
        self.end_conv_1 = nn.Conv1d(c.skip_channels, c.end_channels, 1)
        self.end_conv_2 = nn.Conv1d(c.end_channels, N_CLASSES, 1)
        self.head = nn.Linear(N_CLASSES, N_CLASSES)
        self.told = Conditions(c.conditions, c.condition_counts, c.d_condition)
        wide = 2 * dilated * len(c.dilations)
        self.from_told = nn.Linear(c.d_condition, wide, bias=False) if c.conditions else None

    def default_state(self, rows: Tensor) -> State:
        """The state after class 128 for ever, told these conditions (B, C); C may be 0."""
        queues, told = [], self._told(rows)

        def past(i: int, h: Tensor) -> Tensor:
            queues.append(h.repeat(1, self.config.queues[i], 1))
            return h.repeat(1, 1, self.config.kernel_size)

        silence = torch.full((len(rows), 1), SILENCE, device=self.device)
        self._layers(self._weights(), silence, told, past)
        clock = torch.zeros(1, dtype=torch.int64, device=self.device)
        return State(0, clock, torch.cat(queues, 1), told)

    def carry(self, state: State, rows: Tensor) -> State:
        """The same state without its history, told these conditions: gradients end there."""
        return State(state.position, state.clock, state.queues.detach(), self._told(rows))

    def _told(self, rows: Tensor) -> Tensor | None:
        """What conditions (B, C) add to the layers' gates, (B, layers, 1, 2 D)."""
        if self.from_told is None:
            return None
        return self.from_told(self.told(rows)).unflatten(1, (len(self.filter_convs), 1, -1))

    def absorb(self, x: Tensor, state: State) -> Tensor:
        """`features` of the classes x (B, L) that follow a state, which becomes the one after."""
        before, length = state.position, x.shape[1]
        state.position, state.clock = before + length, state.clock + length
        old, new = state.queues.split(self.config.queues, 1), []

        def past(i: int, h: Tensor) -> Tensor:
            n = self.config.queues[i]
            inputs = torch.cat([old[i].roll(-(before % n), 1), h], 1)  # in their order
            new.append(inputs[:, -n:].roll(state.position % n, 1))
            starts = range(0, n + 1, self.config.dilations[i])
            return torch.cat([inputs[:, start : start + length] for start in starts], -1)

        y = self._layers(self._weights(), x, state.told, past)
        state.queues = torch.cat(new, 1)
        return y

    @torch.no_grad()
    def setup_rnn(self) -> None:
        """Prepares `step`, again after parameters change."""
        self._steps = Steps(self)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One sample: classes int64 (B,) -> logits (B, 256) and the next state."""
        logits = self._steps(x, state)
        state.position += 1
        state.clock += 1
        return logits, state

    def _weights(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Class -> C; of every layer, inputs (k C) -> filter and gate (2 D), D -> (C + S)."""
        inner = zip(self.filter_convs, self.gate_convs, strict=True)
        outer = zip(self.residual_convs, self.skip_convs, strict=True)
        return (
            _pointwise(self.embedding.weight, self.start_conv),
            [torch.cat([f.weight, g.weight]).transpose(1, 2).flatten(1) for f, g in inner],
            [torch.cat([r.weight, s.weight])[..., 0] for r, s in outer],
        )

    def _last(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the last convolution and the head in one, E -> 256."""
        last, head = self.end_conv_2, self.head
        bias = torch.addmv(head.bias, head.weight, last.bias)
        return head.weight @ last.weight[..., 0], bias

    def _layers(self, weights: tuple, x: Tensor, told: Tensor | None, past: Callable) -> Tensor:
        """Classes (B, L) -> what the head sees, (B, L, 256).

        past(i, h): what layer i convolves, (B, L, k C): past inputs, the oldest first, and the
        present ones h (B, L, C). told: see `_told`.
        """
        first, *others = weights
        h, skip = F.embedding(x, first), 0.0
        for i, (inner, outer) in enumerate(zip(*others, strict=True)):
            both = F.linear(past(i, h), inner)
            filtered, gate = (both if told is None else both + told[:, i]).chunk(2, -1)
            z = F.linear(filtered.tanh() * gate.sigmoid(), outer)
            h, skip = h + z[..., : h.shape[-1]], skip + z[..., h.shape[-1] :]
        y = _pointwise(skip.relu(), self.end_conv_1)
        return _pointwise(y.relu(), self.end_conv_2)


def _pointwise(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """A convolution of one tap, of features in the last dimension."""
    return F.linear(x, conv.weight[..., 0], conv.bias)


class Steps:
    """The recurrence in few calls: of small matrices, calls are what takes time.

    Past inputs are multiplied for all layers together. Then one product takes a layer's input h and
    result z to the next layer's input and its share in the gates, of which z is made in place:

        [h', a', b'] = past' + [[1, R], [W', W' R]] [h, z],   z = tanh(a) (1 + tanh(b))
    """

    def __init__(self, model: WaveNet):
        c, (table, inner, outer) = model.config, model._weights()
        device, n = table.device, c.residual_channels
        sizes = torch.tensor(c.queues, device=device)[:, None]
        taps = torch.arange(c.kernel_size - 1, device=device)
        self.offsets = torch.tensor(c.dilations, device=device)[:, None] * taps
        self.sizes, self.starts = sizes, sizes.cumsum(0) - sizes
        half = table.new_ones(2 * c.dilation_channels, 1)
        half[c.dilation_channels :] = 0.5  # sigmoid(b) = (1 + tanh(b / 2)) / 2
        gates = torch.stack(inner) * half  # (layers, 2 D, k C)
        self.half = half[:, 0]
        self.past = F.pad(gates[..., :-n], (0, 0, n, 0)).transpose(1, 2).contiguous()
        now = F.pad(gates[..., -n:], (0, 0, n, 0))  # (layers, C + 2 D, C)
        now[:, :n] = torch.eye(n, device=device)
        self.first = F.linear(table, now[0])
        residual, skip = torch.stack(outer).split([n, c.skip_channels], 1)
        both = torch.cat([now[1:], now[1:] @ residual[:-1] / 2], -1)
        self.between = list(both.transpose(1, 2).contiguous())
        self.skip = Packed(skip.transpose(0, 1).flatten(1) / 2, relu=True)
        self.last = Packed(*model._last())
        self.end = Packed(model.end_conv_1.weight[..., 0], model.end_conv_1.bias, relu=True)
        self.channels = n, c.dilation_channels
        self.work: dict[int, tuple] = {}  # clips -> where the layers' values are

    def __call__(self, x: Tensor, state: State) -> Tensor:
        """Classes (B,) -> logits (B, 256); the queues take the layers' inputs in."""
        n = len(x)
        if n not in self.work:
            self.work[n] = self._places(n)
        values, told, h, z, layers = self.work[n]
        slots = (state.clock + self.offsets) % self.sizes + self.starts  # the oldest input first
        past = state.queues.index_select(1, slots.flatten()).view(n, len(slots), -1)
        torch.bmm(past.transpose(0, 1), self.past, out=values)
        if state.told is not None:
            told += (state.told[:, :, 0] * self.half).transpose(0, 1)
        values[0] += self.first[x]
        for (gates, filtered, gate, both, following), weight in zip(
            layers, self.between, strict=False
        ):
            gates.tanh_()
            filtered.addcmul_(filtered, gate)
            following.addmm_(both, weight)
        gates, filtered, gate, *_ = layers[-1]
        gates.tanh_()
        filtered.addcmul_(filtered, gate)
        state.queues.index_copy_(1, slots[:, 0], h)
        return self.last(self.end(self.skip(z.reshape(n, -1))))

    def _places(self, n: int) -> tuple:
        """Values (layers, n, C + 2 D) with views of them: what conditions move, inputs and results
        (n, layers, ...), and of each layer what the loop needs."""
        c, d = self.channels
        values = self.past.new_empty(len(self.past), n, c + 2 * d)
        following = [*values[1:], None]
        layers = [(v[:, c:], v[:, c : c + d], v[:, c + d :], v[:, : c + d], w)
                  for v, w in zip(values, following, strict=True)]  # fmt: skip
        by_clip = values.transpose(0, 1)
        return values, values[..., c:], by_clip[..., :c], by_clip[..., c : c + d], layers


# Source: configs/experiment/audio/wavenet-* of state-spaces/s4: AdamW 1e-3, the rate times 0.2
# after 5 epochs without a better validation, 200 epochs. An epoch is 3,894 batches of SC09, about
# 1,550 pieces of YouTubeMix, 3,960 of Beethoven.
PUBLISHED = {"start_lr": 1e-3, "schedule": "plateau", "plateau_patience": 5, "warmup_steps": 0}
RECIPES = {
    "wavenet-sc09": {"batch_size": 8, "validation_interval": 3894, "max_steps": 778_800},
    "wavenet-youtubemix": {"batch_size": 1, "validation_interval": 1550, "max_steps": 310_000,
                           "sample_len": 131_072, "model.clip_length": 131_072},
    "wavenet-beethoven": {"batch_size": 1, "validation_interval": 3960, "max_steps": 792_000,
                          "sample_len": 128_000, "model.clip_length": 128_000,
                          "model.quantizer": "linear"},
}  # fmt: skip

# 1.5M parameters, 8 kHz, looks back at 0.2 s
DIGITS = {"sample_rate": 8000, "clip_length": 8000, "layers": 9, "blocks": 3,
          "residual_channels": 48, "dilation_channels": 48, "skip_channels": 512,
          "end_channels": 256}  # fmt: skip

FAMILY = Family(
    kind="wavenet",
    config=WaveNetConfig,
    module=WaveNet,
    task=BitsTask,
    models={"wavenet": {}, "wavenet_digits": DIGITS},
    recipes={name: PUBLISHED | settings for name, settings in RECIPES.items()},
    training={"start_lr": 1e-3},
    entries={"wavenet_sc09": "https://huggingface.co/krandiash/sashimi-release/resolve/main/"
             "checkpoints/wavenet_sc09.pt"},
)  # fmt: skip
