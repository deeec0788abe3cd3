"""SashimiAR for the compiled step engine, see rawaudio/engine.py: what realtime.cpp reads.

The recurrence of an S4 layer, per feature, in one sweep over its states (glossary and D, g as in
s4.py). Each state is turned by the phase of its P, so that P is real, and

    k = B (dt/2 u) + P (feed_s s + feed_u u)      feed_s = -g dt/2, feed_u = feed_s sum(Q D B)
    x' = a (x + k) + k                            s' = sum P Re(x' + a x')
    y = 2 Re sum c x' + D u

P and B do not depend on the feature when the layer's (Lambda, P, B) are tied: four numbers per pair
of states are then all that is read besides the states. Nothing is divided by P.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from rawaudio.engine import Compiled, pack
from sashimi.backbone import Block, State
from sashimi.s4 import S4


class CompiledSashimi(Compiled):
    """`rotation`: a (H, M), |P| (S, M) and its phase (S, M) of every S4 layer."""

    SOURCE = Path(__file__).with_suffix(".cpp")
    STARTS_AT_ZERO = True

    @staticmethod
    def unserved(model: nn.Module) -> str:
        norm = model.config.scalar_norm
        return "" if norm == "none" else f"scalar_norm={norm} is not compiled"

    def pack(self, model: nn.Module) -> list[int]:
        backbone, c = model.backbone, model.config
        self.rotation: list[tuple[Tensor, Tensor, Tensor]] = []
        pools = list(enumerate(backbone.pool))
        self.add(self.lanes(model.embedding.weight, 1))
        for i, pool in pools:
            self._blocks(backbone.down[i])
            self._halves(backbone.down_pool[i], in_groups=pool)
        self._blocks(backbone.center)
        for i, pool in reversed(pools):
            self._halves(backbone.up_pool[i], out_groups=pool)
            self._blocks(backbone.up[i])
        self.add(backbone.norm.weight, backbone.norm.bias)
        self._halves(model.head)

        tied = all(len(p) == 1 for _, p, _ in self.rotation)
        return [c.d_model, c.expand, c.ff, c.d_state // 2, c.unet, c.glu, tied, self.half,
                 bool(c.conditions), len(pools), *backbone.pool, *backbone.n_layers]  # fmt: skip

    def records(self, state: State) -> Tensor:
        pieces, lanes = [], self.lanes
        told = state.global_ or [None] * len(state.s4)
        for x, constant, (a, p, phase) in zip(state.s4, told, self.rotation, strict=True):
            x = x * phase.conj()  # (n, H, M)
            halves = lanes(torch.view_as_real(x), 1)  # (n, H/W, W, M, 2)
            pieces += [halves.permute(0, 1, 3, 4, 2), lanes((p * (x + a * x).real).sum(-1), 1)]
            if constant is not None:
                pieces.append(lanes(constant, 1))
        for pair in zip(state.down, state.up, strict=True):
            pieces += [lanes(x, 2) for x in pair]
        return torch.cat([x.flatten(1) for x in pieces], 1)

    def _halves(self, linear: nn.Linear, out_groups: int = 1, in_groups: int = 0) -> None:
        """In two halves of the columns; groups of outputs, and inputs if any, are padded apart."""
        bias = self.grouped(linear.bias, 0, out_groups)
        weight = self.grouped(linear.weight, 0, out_groups)
        if in_groups:
            weight = self.grouped(weight, 1, in_groups)
        middle = -(-weight.shape[1] // self.width) // 2 * self.width
        self.matrix(weight[:, :middle], bias)
        self.matrix(weight[:, middle:], torch.zeros_like(bias))

    def _blocks(self, blocks: list[Block]) -> None:
        for block in blocks:
            self.add(block.norm.weight, block.norm.bias)
            if isinstance(block.layer, S4):
                self._s4(block.layer)
            else:
                first, second = block.layer[0], block.layer[3]
                self.matrix(first.weight, first.bias)
                self._halves(second)

    def _s4(self, layer: S4) -> None:
        layer.forget()  # it may not have seen what made us pack again
        p, b, dt, d, _, g, qdb = layer.woodbury()
        feed_s = -(g * dt)[:, 0] / 2
        phase = torch.where(p == 0, 1, p.sgn())
        p, b, c = p.abs(), b * phase.conj(), layer.setup_rnn()[-1] * phase
        a = 4 / dt * d - 1
        a_c = torch.stack([a.real, a.imag, 2 * c.real, -2 * c.imag], -1)  # (H, M, 4)
        p_b = torch.stack([p, b.real, b.imag], -1)  # (S, M, 3)
        a_c, lanes_p_b = (self.lanes(x, 0).permute(0, 2, 3, 1) for x in (a_c, p_b))
        self.add(a_c, p_b if len(p) == 1 else lanes_p_b)
        self.add(dt[:, 0] / 2, feed_s, feed_s * qdb[:, 0], layer.D)
        self.rotation.append((a.to(torch.complex64), p.float(), phase.to(torch.complex64)))
        self._halves(layer.output, out_groups=layer.output.out_features // layer.d_model)


@torch.no_grad()
def packed_for(model: nn.Module, precision: str, width: int) -> tuple[list[int], Tensor, Tensor]:
    """A SashimiAR in vectors of `width` floats, for live.cpp: plan, weights and told.

    told (values of all conditions, R): what a value adds to the input of every S4 layer, "not told"
    first; a clip's sum is its constants. (0, 0) without conditions.
    """
    packed = pack(model, precision, width)
    sizes = [1 + len(values) for values in model.conditions.values()]
    told = torch.zeros(0, 0)
    if sizes:
        rows = torch.block_diag(*(torch.arange(n)[:, None] for n in sizes))  # one value each
        constants = model.default_state(rows).global_
        told = torch.cat([packed.lanes(x, 1).flatten(1) for x in constants], 1)
        told[sizes[0] :] -= told[0]
    return list(packed.plan), packed.weights, told
