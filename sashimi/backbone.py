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

from .s4 import S4, look_once


class Block(nn.Module):
    """Pre-norm residual block around an S4 or a feed-forward layer: x + layer(norm(x)).

    With d_global or d_local, the layer's input also depends on what conditions the model: a
    vector (B, d_global) for the whole clip, features (B, L, d_local) along it.
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
        self, x: Tensor, global_: Tensor | None = None, local: Tensor | None = None
    ) -> Tensor:
        return x + self.dropout(self.layer(self.layer_input(x, global_, local)))

    def layer_input(self, x: Tensor, global_: Tensor | None, local: Tensor | None) -> Tensor:
        u = self.norm(x)
        if self.from_global is not None:
            u = u + self.from_global(global_)[:, None]
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
    """Recurrent state of a causal backbone; `step` updates it in place."""

    position: int = 0  # samples absorbed so far
    s4: list[Tensor] = field(default_factory=list)  # complex (B, H, M) per S4 layer, in step order
    global_: list[Tensor] = field(default_factory=list)  # (B, H) each, constant: what conditions it
    down: list[Tensor] = field(default_factory=list)  # (B, p, D) fine samples waiting to be pooled
    up: list[Tensor] = field(default_factory=list)  # (B, p, D) coarse output for the next p samples


class Sashimi(nn.Module):
    """SaShiMi backbone, (B, L, d_model) -> (B, L, d_model) for any L >= 1.

    A length that is no multiple of the pooling is padded with zeros at its end, which a causal
    model never sees; a bidirectional one does.

    Args:
        d_model: features of the finest tier D.
        n_layers: (S4, feed-forward) pairs per tier.
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
        n_layers: int = 8,
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
        for name, value, least in [("d_model", d_model, 1), ("n_layers", n_layers, 1),
                                   ("expand", expand, 1), ("ff", ff, 0),
                                   ("d_global", d_global, 0), ("d_local", d_local, 0)]:  # fmt: skip
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if any(p < 1 for p in pool):
            raise ValueError(f"pool={list(pool)}: factors must be at least 1")
        self.d_model, self.unet, self.bidirectional = d_model, unet, bidirectional
        self.pool, self.d_global, self.d_local = list(pool), d_global, d_local
        self.shift, self.n_layers = shift, n_layers
        self.recomputed_tiers = 0  # finest tiers whose blocks keep their input alone for backward
        self.strides = [math.prod(self.pool[:i]) for i in range(len(self.pool) + 1)]
        if isinstance(l_max, int):  # up to whole steps of the coarsest tier, as input is padded
            l_max = -(-l_max // self.strides[-1]) * self.strides[-1]
            l_max = [l_max // stride for stride in self.strides]
        lengths = list(l_max)
        if len(lengths) != len(self.strides):
            raise ValueError(f"l_max={lengths}: {len(self.strides)} tiers need as many lengths")
        widths = [d_model * expand**i for i in range(len(self.strides))]

        def blocks(tier: int) -> nn.ModuleList:
            width, out = widths[tier], nn.ModuleList()
            for _ in range(n_layers):
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

        With `state` (an empty `State()`), it is filled with the state after the L samples, as if
        each had gone through `step` from the default state; only for causal models.
        """
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.d_model:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: expected (batch, length >= 1, {self.d_model})"
            )
        for name, value, shape in [
            ("global_", global_, (x.shape[0], self.d_global)),
            ("local", local, (*x.shape[:2], self.d_local)),
        ]:
            got = None if value is None else tuple(value.shape)
            wanted = shape if shape[-1] else None
            if got != wanted:
                raise ValueError(f"{name} of shape {got}: expected {wanted}")
        if state is not None:
            self._check_recurrent()
        if state is not None and state.s4:
            raise ValueError("state must be empty, State(): a prefix is absorbed once")
        length = x.shape[1]
        if padding := -length % self.strides[-1]:
            x = F.pad(x, (0, 0, 0, padding))  # at the end: causally exact
            local = None if local is None else F.pad(local, (0, 0, 0, padding))
        locals_ = [local if local is None else local.unflatten(1, (-1, s)).mean(2)
                   for s in self.strides]  # fmt: skip
        steps = [length // s for s in self.strides]  # complete steps of each tier
        skips = [x]

        def run(block: Block, x: Tensor, tier: int) -> Tensor:
            if state is not None and isinstance(block.layer, S4):
                u = block.layer_input(x[:, : steps[tier]], global_, None)
                state.s4.append(block.layer.absorb(u))
            if tier < self.recomputed_tiers and torch.is_grad_enabled():
                return checkpoint(block, x, global_, locals_[tier], use_reentrant=False)
            return block(x, global_, locals_[tier])

        for i, p in enumerate(self.pool):
            for block in self.down[i]:
                x = run(block, x, i)
                skips.append(x)
            if state is not None:
                waiting = x[:, steps[i + 1] * p : steps[i]]
                state.down.append(F.pad(waiting, (0, 0, 0, p - waiting.shape[1])))
            x = self.down_pool[i](x.reshape(x.shape[0], -1, p * x.shape[2]))
            skips.append(x)
        for block in self.center:
            x = run(block, x, len(self.pool))
        x = x + skips.pop()
        for i in reversed(range(len(self.pool))):
            x = self.up_pool[i](x)  # (B, L/p, p D)
            if state is not None:
                last = x[:, steps[i + 1] - 1] if steps[i + 1] else torch.zeros_like(x[:, 0])
                state.up.insert(0, last.reshape(x.shape[0], self.pool[i], -1).clone())
            if self.shift:
                x = F.pad(x[:, :-1], (0, 0, 1, 0))  # one coarse step later: causal
            x = x.reshape(x.shape[0], -1, x.shape[2] // self.pool[i])
            x = tier_input = x + skips.pop()
            for block in self.up[i]:
                x = run(block, x, i)
                if self.unet:
                    x = x + skips.pop()
            if not self.unet:
                x = x + tier_input
        if state is not None:
            state.position += length
            state.global_ = self._constants(global_)
        return self.norm(x[:, :length])

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
            slot = len(state.s4) - (i + 1) * self.n_layers  # behind those of coarser tiers
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
