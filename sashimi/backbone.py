"""The SaShiMi backbone: S4 and feed-forward blocks at several sampling rates.

    x (B, L, D) -> [down-pool] -> ... -> centre -> ... -> [up-pool + skip, blocks] -> (B, L, D)

A *tier* is one sampling rate. Pooling by p turns (L, D) into (L/p, p D) and projects to e D
features; up-pooling is the reverse, shifted by one coarse step so that it stays causal: the fine
positions of block k see the coarse tiers' view of blocks up to k - 1. In the recurrence the coarse
tiers therefore run only once per block. (SaShiMi, arXiv:2202.09729, section 4.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rawaudio.errors import UserError
from sashimi.s4 import S4, FullPrecision, look_once


class Block(nn.Module):
    """Pre-norm residual block around an S4 or a feed-forward layer: x + layer(norm(x)).

    The layer's input also depends on what conditions the model, if it was made for that: a
    constant (B, D) for the whole clip, `from_global` of a vector (B, d_global); and features
    (B, L, d_local) along it.
    """

    def __init__(
        self, layer: nn.Module, d_model: int, dropout: float, d_global: int = 0, d_local: int = 0
    ):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.layer = layer
        self.dropout = nn.Dropout(dropout)
        self.from_global = nn.Linear(d_global, d_model) if d_global else None
        self.from_local = nn.Linear(d_local, d_model) if d_local else None

    def forward(
        self, x: Tensor, constant: Tensor | None = None, local: Tensor | None = None
    ) -> Tensor:
        return x + self.dropout(self.layer(self.layer_input(x, constant, local)))

    def layer_input(self, x: Tensor, constant: Tensor | None, local: Tensor | None) -> Tensor:
        u = self.norm(x)
        if constant is not None:
            u = u + constant[:, None]
        if self.from_local is not None:
            u = u + self.from_local(local)
        return u


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
    """Recurrent state of a causal backbone; `step` and `forward` update it in place.

    An empty one, State(), is the state before the first sample, for `forward` to begin with.
    """

    position: int = 0  # samples absorbed so far
    s4: list[Tensor] = field(default_factory=list)  # complex (B, H, M) per S4 layer, in step order
    global_: list[Tensor] = field(default_factory=list)  # (B, H) each, constant: what conditions it
    down: list[Tensor] = field(default_factory=list)  # (B, p, D) fine samples waiting to be pooled
    up: list[Tensor] = field(default_factory=list)  # (B, p, D) coarse output for the next p samples

    def tensors(self) -> list[Tensor]:
        return [*self.s4, *self.global_, *self.down, *self.up]

    def copy(self) -> "State":
        return State(self.position, list(self.s4), self.global_, list(self.down), list(self.up))

    def to_pool(self, tier: int, begun: int, x: Tensor) -> Tensor:
        """Whole groups (B, groups p, D) of the `begun` samples that waited, then x (B, L, D); the
        rest waits."""
        p = self.down[tier].shape[1]
        x = torch.cat([self.down[tier][:, :begun], x], 1)
        groups, rest = divmod(x.shape[1], p)
        self.down[tier] = F.pad(x[:, groups * p :], (0, 0, 0, p - rest))
        return x[:, : groups * p]

    def from_pool(self, tier: int, begun: int, x: Tensor, length: int) -> Tensor:
        """Coarse output for `length` fine samples, `begun` samples into what is there for p.

        x (B, groups p, D) is what the coarse tier has made now: it serves one group later.
        """
        p = self.up[tier].shape[1]
        x = torch.cat([self.up[tier], x], 1)
        self.up[tier] = x[:, x.shape[1] - p :].clone()
        return x[:, begun : begun + length]


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

    Raises:
        ValueError: for sizes below 1, naming the argument.
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
    ):
        super().__init__()
        layers = [n_layers] if isinstance(n_layers, int) else list(n_layers)
        layers = layers * (len(pool) + 1) if len(layers) == 1 else layers
        if len(layers) != len(pool) + 1:
            raise ValueError(
                f"n_layers={layers}: {len(pool) + 1} tiers need as many numbers, or one"
            )
        for name, value, least in [("d_model", d_model, 1), ("n_layers", min(layers), 1),
                                   ("expand", expand, 1), ("ff", ff, 0),
                                   ("d_global", d_global, 0), ("d_local", d_local, 0)]:  # fmt: skip
            if value < least:
                raise UserError(f"{name}={value}: must be at least {least}")
        if any(p < 1 for p in pool):
            raise UserError(f"pool={list(pool)}: factors must be at least 1")
        self.d_model, self.unet, self.bidirectional = d_model, unet, bidirectional
        self.pool, self.d_global, self.d_local = list(pool), d_global, d_local
        self.shift, self.n_layers = shift, layers
        self.recomputed_tiers = 0  # finest tiers whose blocks keep their input alone for backward
        self.strides = [math.prod(self.pool[:i]) for i in range(len(self.pool) + 1)]
        if isinstance(l_max, int):  # up to whole steps of the coarsest tier, as input is padded
            l_max = -(-l_max // self.strides[-1]) * self.strides[-1]
            l_max = [l_max // stride for stride in self.strides]
        lengths = list(l_max)
        if len(lengths) != len(self.strides):
            raise UserError(f"l_max={lengths}: {len(self.strides)} tiers need as many lengths")
        self.l_max = lengths[0]
        widths = [d_model * expand**i for i in range(len(self.strides))]

        def blocks(tier: int) -> nn.ModuleList:
            width, out = widths[tier], nn.ModuleList()
            for _ in range(layers[tier]):
                s4 = S4(width, d_state, lengths[tier], bidirectional, dropout, tied, glu)
                out.append(Block(s4, width, dropout, d_global, d_local))
                if ff:
                    out.append(Block(feed_forward(width, ff, dropout), width, dropout))
            return out

        tiers = range(len(self.pool))
        # Index i of each list belongs to tier i and its pooling to or from tier i + 1.
        self.down = nn.ModuleList(blocks(i) if unet else nn.ModuleList() for i in tiers)
        self.down_pool = nn.ModuleList(
            nn.Linear(p * w, w * expand) for p, w in zip(self.pool, widths, strict=False)
        )
        self.center = blocks(len(self.pool))
        self.up_pool = nn.ModuleList(
            nn.Linear(w * expand, p * w) for p, w in zip(self.pool, widths, strict=False)
        )
        self.up = nn.ModuleList(blocks(i) for i in tiers)
        self.norm = nn.LayerNorm(d_model)

    @look_once
    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        global_: Tensor | None = None,
        local: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D), in parallel over time.

        global_ (B, d_global) and local (B, L, d_local) condition the S4 blocks of a model that was
        made for them; coarser tiers see the mean of `local` over each of their steps.

        With `state` the L samples follow those that it has absorbed, none if it is an empty
        `State()`, and it becomes the state after them, as if each had gone through `step`: a long
        input can go through in pieces of any length, in bounded memory. Only for causal models; the
        state holds `global_`, which is given with an empty one alone, and carries no gradients.
        """
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.d_model:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: expected (batch, length >= 1, {self.d_model})"
            )
        goes_on = state is not None and bool(state.s4)
        for name, value, shape in [
            ("global_", global_, (x.shape[0], 0 if goes_on else self.d_global)),
            ("local", local, (*x.shape[:2], self.d_local)),
        ]:
            got = None if value is None else tuple(value.shape)
            wanted = shape if shape[-1] else None
            if got != wanted:
                raise ValueError(f"{name} of shape {got}: expected {wanted}")
        if goes_on:
            self._check_goes_on(x, state)
        elif state is not None:
            self._check_recurrent()
            vars(state).update(vars(self.default_state(len(x), global_)))
        length, begun = x.shape[1], 0 if state is None else state.position
        if state is None and (padding := -length % self.strides[-1]):
            x = F.pad(x, (0, 0, 0, padding))  # at the end: causally exact
            local = None if local is None else F.pad(local, (0, 0, 0, padding))
        locals_ = [local if local is None else local.unflatten(1, (-1, s)).mean(2)
                   for s in self.strides]  # fmt: skip
        place = [begun // s % p for s, p in zip(self.strides, self.pool, strict=False)]
        constants = iter(state.global_ if goes_on else self._constants(global_))
        before, after = iter(state.s4 if state is not None else []), []
        skips = [x]

        def run(block: Block, x: Tensor, tier: int) -> Tensor:
            if not isinstance(block.layer, S4):
                return keep_little(block, tier, x)
            constant = next(constants, None)
            if state is None:
                return keep_little(block, tier, x, constant, locals_[tier])
            u, s4 = block.layer_input(x, constant, None), next(before)
            y, s4 = block.layer.advance(u, s4 if goes_on else None)
            after.append(s4)
            return x + block.dropout(y)

        def keep_little(block: Block, tier: int, *inputs: Tensor | None) -> Tensor:
            if tier < self.recomputed_tiers and torch.is_grad_enabled():
                return checkpoint(block, *inputs, use_reentrant=False)
            return block(*inputs)

        for i, p in enumerate(self.pool):
            for block in self.down[i]:
                x = run(block, x, i)
                skips.append(x)
            if state is not None:
                x = state.to_pool(i, place[i], x)
            x = self.down_pool[i](x.unflatten(1, (-1, p)).flatten(2))
            skips.append(x)
        for block in self.center:
            x = run(block, x, len(self.pool))
        x = x + skips.pop()
        for i, p in reversed(list(enumerate(self.pool))):
            x = self.up_pool[i](x)  # (B, L/p, p D)
            x = x.unflatten(2, (p, -1)).flatten(1, 2)
            if state is not None:
                x = state.from_pool(i, place[i], x, skips[-1].shape[1])
            elif self.shift:
                x = F.pad(x[:, :-p], (0, 0, p, 0))  # one coarse step later: causal
            x = tier_input = x + skips.pop()
            for block in self.up[i]:
                x = run(block, x, i)
                if self.unet:
                    x = x + skips.pop()
            if not self.unet:
                x = x + tier_input
        if state is not None:
            state.position, state.s4 = begun + length, after
        return self.norm(x[:, :length])

    @property
    def period(self) -> int:
        return self.strides[-1]

    def absorb(self, x: Tensor, state: State) -> Tensor:
        return self.forward(x, state)

    # ---------------------------------------------------------------- recurrence

    def _s4_blocks(self) -> list[Block]:
        """Blocks with an S4 layer in the order in which `forward` and `step` meet them."""
        stages = [*self.down, self.center, *reversed(self.up)]
        return [block for stage in stages for block in stage if isinstance(block.layer, S4)]

    def _constants(self, global_: Tensor | None) -> list[Tensor]:
        """What the condition adds to the input of every S4 layer, (B, H) each."""
        if not self.d_global:
            return []
        return [block.from_global(global_) for block in self._s4_blocks()]

    def _check_goes_on(self, x: Tensor, state: State) -> None:
        if len(state.s4[0]) != len(x):
            raise ValueError(f"state of {len(state.s4[0])} clips: the input has {len(x)}")
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise ValueError("a state carries no gradients: go on from it under torch.no_grad()")

    def setup_rnn(self) -> None:
        """Prepare `step`: constants of all S4 layers. Again after parameters change.

        Raises ValueError for models without a recurrence: bidirectional, with d_local, unshifted.
        """
        self._check_recurrent()
        for block in self._s4_blocks():
            block.layer.setup_rnn()

    def _check_recurrent(self) -> None:
        if self.d_local or not self.shift:
            raise ValueError("a backbone with d_local or without shift has no recurrence")

    def default_state(self, batch: int, global_: Tensor | None = None) -> State:
        """State before the first sample, on the model's device.

        global_: (batch, d_global), what conditions all that follows, of a model made for it.
        """
        if (global_ is None) == (self.d_global > 0):
            got = None if global_ is None else tuple(global_.shape)
            wanted = (batch, self.d_global) if self.d_global else None
            raise ValueError(f"global_ of shape {got}: expected {wanted}")
        weight = self.norm.weight
        buffers = [
            [weight.new_zeros(batch, p, pooled.in_features // p)
             for p, pooled in zip(self.pool, self.down_pool, strict=True)]
            for _ in range(2)
        ]  # fmt: skip
        s4 = [block.layer.default_state(batch) for block in self._s4_blocks()]
        return State(0, s4, self._constants(global_), *buffers)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One sample: x (B, D) -> (B, D). Equals `forward` at every position, in eval mode."""
        n = len(self.pool)
        index = [state.position // s % p for s, p in zip(self.strides, self.pool, strict=False)]
        due = next((i for i in range(n) if index[i] + 1 < self.pool[i]), n)  # coarsest tier to run
        skips = [x]
        slot = 0  # of the next S4 state; they stand in forward's order

        def run(block: Block, x: Tensor) -> Tensor:
            nonlocal slot
            if not isinstance(block.layer, S4):
                return block(x)
            u = block.norm(x)
            if state.global_:
                u = u + state.global_[slot]
            y, state.s4[slot] = block.layer.step(u, state.s4[slot])
            slot += 1
            return x + y

        for i in range(min(due + 1, n)):
            for block in self.down[i]:
                x = run(block, x)
                skips.append(x)
            state.down[i][:, index[i]] = x
            if i < due:
                x = self.down_pool[i](state.down[i].flatten(1))
                skips.append(x)
        if due == n:
            for block in self.center:
                x = run(block, x)
            x = x + skips.pop()
        for i in reversed(range(min(due + 1, n))):
            slot = len(state.s4) - sum(self.n_layers[: i + 1])  # behind those of coarser tiers
            coarse = x
            x = tier_input = state.up[i][:, index[i]] + skips.pop()
            if i < due:  # what the coarse tier has just made serves the next block
                state.up[i] = self.up_pool[i](coarse).reshape(x.shape[0], self.pool[i], -1)
            for block in self.up[i]:
                x = run(block, x)
                if self.unet:
                    x = x + skips.pop()
            if not self.unet:
                x = x + tier_input
        state.position += 1
        return self.norm(x), state
