"""The SaShiMi backbone: S4 and feed-forward blocks at several sampling rates.

    x (B, L, D) -> [down-pool] -> ... -> centre -> ... -> [up-pool + skip, blocks] -> (B, L, D)

A *tier* is one sampling rate. Pooling by p turns (L, D) into (L/p, p D) and projects to e D
features; up-pooling is the reverse, shifted by one coarse step so that it stays causal: the fine
positions of block k see the coarse tiers' view of blocks up to k - 1. In the recurrence the coarse
tiers therefore run only once per block. (SaShiMi, arXiv:2202.09729, section 4.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rawaudio.errors import UserError
from sashimi import blocks
from sashimi.s4 import S4, FullPrecision, compare_once

SCALAR = ("none", "blocks", "all")


class ScalarNorm(nn.Module):
    """Layer norm with one shift and one scale for all features: s (x - mean + m) / std.

    The `TransposedLN` of state-spaces/s4, which has no epsilon.
    """

    def __init__(self, _: int):
        super().__init__()
        self.m, self.s = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, -1, correction=0, keepdim=True)
        return self.s / std.clamp(min=1e-6) * (x - mean + self.m)


class Block(nn.Module):
    """Pre-norm residual block around an S4 or a feed-forward layer: x + layer(norm(x)).

    What conditions a model is added to the input of its S4 layers: `from_global` of a vector
    (B, d_global) for the whole clip, `from_local` of features (B, L, d_local) along it.
    heard: features (B, L, d_model) that are added to what the layer gives.
    """

    def __init__(
        self,
        layer: nn.Module,
        d_model: int,
        dropout: float,
        d_global: int = 0,
        d_local: int = 0,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.norm = norm(d_model)
        self.layer = layer
        self.dropout = nn.Dropout(dropout)
        self.from_global = nn.Linear(d_global, d_model) if d_global else None
        self.from_local = nn.Linear(d_local, d_model) if d_local else None
        self.slot: int | None = None  # of an S4 layer's state in `State.s4`

    def forward(
        self,
        x: Tensor,
        global_: Tensor | None = None,
        local: Tensor | None = None,
        heard: Tensor | None = None,
    ) -> Tensor:
        told = None if self.from_global is None else self.from_global(global_)
        if heard is None and self._compiled(x):
            return self._fused(x.float(), None if told is None else told.float())
        u = self.norm(x)
        if told is not None:
            u = u + told[:, None]
        if self.from_local is not None:
            u = u + self.from_local(local)
        y = self.dropout(self.layer(u))
        return x + (y if heard is None else y + heard)

    def _compiled(self, x: Tensor) -> bool:
        """Whether one compiled operation does the whole block."""
        if self.from_local is not None or not isinstance(self.norm, nn.LayerNorm):
            return False
        drops = self.training and self.dropout.p > 0
        return not drops and blocks.serves(x, self.norm.weight)

    def _fused(self, x: Tensor, told: Tensor | None) -> Tensor:
        """`forward` in one compiled operation."""
        norm, half = (self.norm.weight, self.norm.bias), blocks.halved()
        if not isinstance(self.layer, S4):
            first, second = self.layer[0], self.layer[3]
            matrices = first.weight, first.bias, second.weight, second.bias
            return blocks.feed_forward(x, *norm, *matrices, half)
        s4, length = self.layer, x.shape[1]
        rest = s4.D, s4.output.weight, s4.output.bias, half
        if torch.is_grad_enabled():
            return blocks.s4(x, told, *norm, s4.kernel_of(length), *rest)[0]
        return blocks.s4_known(x, told, *norm, s4.known_spectrum(length), *rest)


def feed_forward(d_model: int, ff: int, dropout: float) -> nn.Sequential:
    """Position-wise layer, expansion ff: D -> ff D -> GELU -> D."""
    return nn.Sequential(
        nn.Linear(d_model, ff * d_model),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(ff * d_model, d_model),
    )


@dataclass
class State:
    """Recurrent state of a causal backbone; `step` and `absorb` replace tensors, write to none."""

    position: int  # samples absorbed so far
    s4: list[Tensor]  # complex (B, H, M) per S4 layer, in the order of `Block.slot`
    global_: list[Tensor]  # (B, H) per S4 layer, constant: what conditions it; or none
    down: list[Tensor]  # (B, p, D) fine samples waiting to be pooled
    up: list[Tensor]  # (B, p, D) coarse output for the next p samples

    def tensors(self) -> list[Tensor]:
        return [*self.s4, *self.global_, *self.down, *self.up]

    def copy(self) -> "State":
        """A state of its own, to go on from here twice."""
        lists = self.s4, self.global_, self.down, self.up
        return State(self.position, *map(list, lists))


class Sashimi(FullPrecision):
    """SaShiMi backbone, (B, L, d_model) -> (B, L, d_model) for any L >= 1.

    A length that is no multiple of the pooling is padded with zeros at its end, which a causal
    model never sees; a bidirectional one does.

    Args:
        d_model: features of the finest tier D.
        n_layers: (S4, feed-forward) pairs per tier; a list gives each tier's, finest first. A pair
            costs the less the coarser its tier is, and has the more parameters.
        pool: pooling factor between consecutive tiers, finest first; may be empty.
        expand: features grow by this factor per tier.
        ff: expansion of the feed-forward layers; 0 leaves them out.
        d_state: real states per S4 feature N.
        unet: blocks before each down-pool too, with a skip around every block.
        bidirectional: S4 layers look ahead too (no recurrence).
        dropout, glu, tied: see `S4`.
        l_max: length of the finest tier for which kernels are stored; a coarser tier's is divided
            by its pooling. A list gives each tier's length, finest first.
        d_global, d_local: features that condition every S4 block, see `forward`; 0: none.
        shift: up-pooling is one coarse step late, for causality. Without it, as with d_local or
            look-ahead, there is no recurrence.
        scalar_norm: one of `SCALAR`, which norms are `ScalarNorm`.
        pair_skips: with `unet`, skips go around pairs of blocks.

    Raises ValueError for sizes below 1, naming the argument.
    """

    def __init__(
        self,
        d_model: int = 64,
        n_layers: int | Sequence[int] = 8,
        pool: Sequence[int] = (4, 4),
        expand: int = 2,
        ff: int = 2,
        d_state: int = 64,
        unet: bool = False,
        bidirectional: bool = False,
        dropout: float = 0.0,
        glu: bool = True,
        tied: bool = True,
        l_max: int | Sequence[int] = 16000,
        d_global: int = 0,
        d_local: int = 0,
        shift: bool = True,
        scalar_norm: str = "none",
        pair_skips: bool = False,
    ):
        super().__init__()
        tiers = len(pool) + 1
        layers = [n_layers] if isinstance(n_layers, int) else list(n_layers)
        layers = layers * tiers if len(layers) == 1 else layers
        if len(layers) != tiers:
            raise UserError(f"n_layers={layers}: {tiers} tiers need as many numbers, or one")
        if any(p < 1 for p in pool):
            raise UserError(f"pool={list(pool)}: factors must be at least 1")
        needed = {"d_model": d_model, "n_layers": min(layers), "expand": expand}
        optional = {"ff": ff, "d_global": d_global, "d_local": d_local}  # 0: without
        for name, value in (needed | optional).items():
            least = 1 if name in needed else 0
            if value < least:
                raise UserError(f"{name}={value}: must be at least {least}")
        self.d_model, self.unet, self.bidirectional = d_model, unet, bidirectional
        self.pool, self.d_global, self.d_local = list(pool), d_global, d_local
        self.shift, self.n_layers, self.skipped = shift, layers, 2 if pair_skips and ff else 1
        self.recomputed_tiers = 0  # finest tiers whose blocks keep their input alone for backward
        self.strides = [math.prod(self.pool[:i]) for i in range(tiers)]
        self.period = self.strides[-1]  # samples after which the plan of the recurrence repeats
        if isinstance(l_max, int):  # up to whole steps of the coarsest tier, as input is padded
            steps = -(-l_max // self.period)
            l_max = [steps * self.period // stride for stride in self.strides]
        lengths = list(l_max)
        if len(lengths) != tiers:
            raise UserError(f"l_max={lengths}: {tiers} tiers need as many lengths")
        self.l_max = lengths[0]
        widths = [d_model * expand**i for i in range(tiers)]
        norm = nn.LayerNorm if scalar_norm == "none" else ScalarNorm

        def blocks(tier: int) -> nn.ModuleList:
            width, out = widths[tier], nn.ModuleList()
            for _ in range(layers[tier]):
                s4 = S4(width, d_state, lengths[tier], bidirectional, dropout, tied, glu)
                out.append(Block(s4, width, dropout, d_global, d_local, norm))
                if ff:
                    wide = feed_forward(width, ff, dropout)
                    out.append(Block(wide, width, dropout, norm=norm))
            return out

        # Index i of each list belongs to tier i and its pooling to or from tier i + 1.
        pooled = list(zip(self.pool, widths, strict=False))
        self.down = nn.ModuleList(blocks(i) if unet else nn.ModuleList() for i in range(tiers - 1))
        self.down_pool = nn.ModuleList(nn.Linear(p * w, w * expand) for p, w in pooled)
        self.center = blocks(tiers - 1)
        self.up_pool = nn.ModuleList(nn.Linear(w * expand, p * w) for p, w in pooled)
        self.up = nn.ModuleList(blocks(i) for i in range(tiers - 1))
        self.norm = ScalarNorm(d_model) if scalar_norm == "all" else nn.LayerNorm(d_model)
        self.scalar_norm = scalar_norm
        for slot, block in enumerate(self.s4_blocks()):
            block.slot = slot

    def s4_blocks(self) -> list[Block]:
        """Blocks with an S4 layer, in the order in which data meets them."""
        stages = [*self.down, self.center, *reversed(self.up)]
        return [block for stage in stages for block in stage if isinstance(block.layer, S4)]

    # ---------------------------------------------------------------- one tier, whatever the mode

    def _tier(self, tier: int, x: Tensor, run: Callable, coarser: Callable) -> Tensor:
        """A tier and those below it: x -> x, in `forward` and in the recurrence.

        run(block, x, tier) -> x; coarser(x, tier) is what the tiers below it make of x.
        """
        if tier == len(self.pool):
            y = x
            for block in self.center:
                y = run(block, y, tier)
            return y + x
        skips = [x]
        for i, block in enumerate(self.down[tier], 1):
            x = run(block, x, tier)
            if i % self.skipped == 0:
                skips.append(x)
        x = tier_input = coarser(x, tier) + skips.pop()
        for i, block in enumerate(self.up[tier], 1):
            x = run(block, x, tier)
            if self.unet and i % self.skipped == 0:
                x = x + skips.pop()
        return x if self.unet else x + tier_input

    def _pooled(self, x: Tensor, tier: int) -> Tensor:
        """(B, L, D) of the tier -> (B, L/p, e D) of the next."""
        return self.down_pool[tier](x.unflatten(1, (-1, self.pool[tier])).flatten(2))

    def _unpooled(self, x: Tensor, tier: int) -> Tensor:
        """(B, L/p, e D) of the next tier -> (B, L, D)."""
        return self.up_pool[tier](x).unflatten(2, (self.pool[tier], -1)).flatten(1, 2)

    # ---------------------------------------------------------------- in parallel

    def forward(
        self,
        x: Tensor,
        global_: Tensor | None = None,
        local: Tensor | None = None,
        hear: Callable[[int, int], Tensor] | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D), in parallel over time.

        global_ (B, d_global) and local (B, L, d_local) condition the S4 blocks of a model that was
        made for them; coarser tiers see the mean of `local` over each of their steps. hear(slot,
        length): what is added to the output of an S4 layer, see `Block`.
        """
        self._check_input(x)
        _check_condition("global_", global_, (len(x), self.d_global))
        _check_condition("local", local, (*x.shape[:2], self.d_local))
        length, local = x.shape[1], x[:, :, :0].detach() if local is None else local
        if padding := -length % self.period:
            x = F.pad(x, (0, 0, 0, padding))  # at the end: causally exact
            if self.scalar_norm != "none":  # zeros cannot be scaled
                x[:, length:] = x[:, length - 1 : length]
            local = F.pad(local, (0, 0, 0, padding))
        locals_ = [local.unflatten(1, (-1, stride)).mean(2) for stride in self.strides]

        def run(block: Block, x: Tensor, tier: int) -> Tensor:
            told = [global_, locals_[tier]]
            if hear is not None and block.slot is not None:
                told.append(hear(block.slot, x.shape[1]))
            if tier < self.recomputed_tiers and torch.is_grad_enabled():
                return checkpoint(block, x, *told, use_reentrant=False)
            return block(x, *told)

        def coarser(x: Tensor, tier: int) -> Tensor:
            x = self._tier(tier + 1, self._pooled(x, tier), run, coarser)
            x, p = self._unpooled(x, tier), self.pool[tier]
            return F.pad(x[:, :-p], (0, 0, p, 0)) if self.shift else x  # one coarse step later

        with compare_once([block.layer for block in self.s4_blocks()]):
            return self.norm(self._tier(0, x, run, coarser)[:, :length])

    # ---------------------------------------------------------------- recurrence

    def setup_rnn(self) -> None:
        """Prepare `step`: constants of all S4 layers. Again after parameters change.

        Raises ValueError for models without a recurrence: bidirectional, with d_local, unshifted.
        """
        self._check_recurrent()
        for block in self.s4_blocks():
            block.layer.setup_rnn()

    def default_state(self, batch: int, global_: Tensor | None = None) -> State:
        """State before the first sample, on the model's device.

        global_: (batch, d_global), what conditions all that follows, of a model made for it.
        """
        _check_condition("global_", global_, (batch, self.d_global))
        blocks = self.s4_blocks()
        s4 = [block.layer.default_state(batch) for block in blocks]
        constants = [block.from_global(global_) for block in blocks if self.d_global]
        down = [
            linear.weight.new_zeros(batch, p, linear.in_features // p)
            for p, linear in zip(self.pool, self.down_pool, strict=True)
        ]
        return State(0, s4, constants, down, [torch.zeros_like(x) for x in down])

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One sample: x (B, D) -> (B, D). Equals `forward` at every position, in eval mode."""

        def run(block: Block, x: Tensor, tier: int) -> Tensor:
            if block.slot is None:
                return block(x)
            u = block.norm(x)
            if state.global_:
                u = u + state.global_[block.slot]
            y, state.s4[block.slot] = block.layer.step(u, state.s4[block.slot])
            return x + y

        def coarser(x: Tensor, tier: int) -> Tensor:
            index = state.position // self.strides[tier] % self.pool[tier]
            waiting = state.down[tier] = state.down[tier].clone()
            waiting[:, index] = x
            y = state.up[tier][:, index]
            if index + 1 == self.pool[tier]:  # the next tier's output serves from the next x on
                x = self._tier(tier + 1, self._pooled(waiting, tier)[:, 0], run, coarser)
                state.up[tier] = self._unpooled(x[:, None], tier)
            return y

        y = self.norm(self._tier(0, x, run, coarser))
        state.position += 1
        return y, state

    def absorb(self, x: Tensor, state: State) -> Tensor:
        """`step` for L samples at once: (B, L, D) -> (B, L, D), in parallel over time.

        A long input can go through in pieces of any length, in bounded memory; the first costs
        what `forward` does, and the state.

        Raises ValueError for models without a recurrence, for a state of another batch, and after
        the first piece where gradients are recorded: a state carries none.
        """
        self._check_input(x)
        self._check_recurrent()
        if len(state.s4[0]) != len(x):
            raise ValueError(f"state of {len(state.s4[0])} clips: the input has {len(x)}")
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if state.position and trained:
            raise ValueError("a state carries no gradients: go on from it under torch.no_grad()")

        def run(block: Block, x: Tensor, tier: int) -> Tensor:
            if block.slot is None:
                return block(x)
            u, s4 = block.norm(x), state.s4[block.slot] if state.position else None
            if state.global_:
                u = u + state.global_[block.slot][:, None]
            y, state.s4[block.slot] = block.layer.advance(u, s4)
            return x + block.dropout(y)

        def coarser(x: Tensor, tier: int) -> Tensor:
            p, length = self.pool[tier], x.shape[1]
            begun = state.position // self.strides[tier] % p  # samples that wait to be pooled
            x = torch.cat([state.down[tier][:, :begun], x], 1)
            groups, rest = divmod(x.shape[1], p)
            state.down[tier] = F.pad(x[:, groups * p :], (0, 0, 0, p - rest))
            y = state.up[tier]
            if groups:
                x = self._tier(tier + 1, self._pooled(x[:, : groups * p], tier), run, coarser)
                y = torch.cat([y, self._unpooled(x, tier)], 1)
                state.up[tier] = y[:, -p:].clone()
            return y[:, begun : begun + length]

        with compare_once([block.layer for block in self.s4_blocks()]):
            y = self.norm(self._tier(0, x, run, coarser))
        state.position += x.shape[1]
        return y

    # ---------------------------------------------------------------- checks

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.d_model:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: expected (batch, length >= 1, {self.d_model})"
            )

    def _check_recurrent(self) -> None:
        if self.d_local or not self.shift:
            raise ValueError("a backbone with d_local or without shift has no recurrence")


def _check_condition(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError for another shape, or for one where the model was made for none."""
    got, wanted = None if value is None else tuple(value.shape), shape if shape[-1] else None
    if got != wanted:
        raise ValueError(f"{name} of shape {got}: expected {wanted}")
