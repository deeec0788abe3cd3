"""Truncated back-propagation through time: clips in pieces, with an optimizer step for each.

The network's state goes on from piece to piece; gradients end where a piece begins. What is saved
inside a batch, beside weights and optimizer, is that state: it was made by earlier weights, so that
nothing can compute it again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rawaudio.autoregressive import Autoregressive
from rawaudio.batches import Batch
from rawaudio.errors import UserError
from rawaudio.families import FAMILIES
from rawaudio.processes import largest
from sashimi.mulaw import SILENCE


def check(size: int, module: type, compiled: bool) -> None:
    """UserError for a network that carries no state without gradients."""
    if not hasattr(module, "carry"):
        able = ", ".join(kind for kind, f in FAMILIES.items() if hasattr(f.module, "carry"))
        raise UserError(f"tbptt={size}: this model carries no state from piece to piece; {able} do")
    if compiled:
        raise UserError(f"tbptt={size} and compile=true: leave one of them out")


def pieces(batches: Iterator[Batch], size: int, done: int) -> Iterator[Batch]:
    """Batches, each cut in time into pieces of `size` samples; the first batch without `done` ones.

    The last piece of a batch may be shorter, and has `last`. All processes get as many pieces.
    """
    for batch in batches:
        lengths = batch["mask"].sum(1)
        count = -(-int(largest(lengths.amax())) // size)
        for k in range(done, count):
            piece = dict(batch)
            for key, filler in (("x", SILENCE), ("target", SILENCE), ("mask", False)):
                part = batch[key][:, k * size : (k + 1) * size]
                missing = 1 - part.shape[1]  # of a process whose clips have ended
                piece[key] = F.pad(part, (0, missing), value=filler) if missing > 0 else part
            piece["samples"] = piece["mask"].sum().cpu()
            piece["last"] = torch.tensor(k + 1 == count)
            yield piece
        done = 0


class Carried:
    """The state of each part of a batch, where its next piece begins."""

    def __init__(self, saved: list[list[Tensor]]):
        """saved: what `tensors` gave, empty between batches."""
        self.saved, self.states = saved, {}

    def begin(self, model: Autoregressive, i: int, rows: Tensor, position: int) -> Any:
        """The state before a piece of part i, told these conditions, which the network then moves
        on. position: samples of the clips before it."""
        if position == 0:
            self.states = self.states if i else {}
            state = model.default_state(rows)
        elif i in self.states:
            state = model.carry(self.states[i], rows)
        else:
            state = model.carry(self._restored(model, i, rows, position), rows)
        self.states[i] = state
        return state

    @torch.no_grad()
    def _restored(self, model: Autoregressive, i: int, rows: Tensor, position: int) -> Any:
        state = model.default_state(rows)
        state.position = position
        for own, saved in zip(state.tensors(), self.saved[i], strict=True):
            own.copy_(saved)
        return state

    def tensors(self) -> list[list[Tensor]]:
        """The states' tensors, on the CPU."""
        states = [self.states[i] for i in sorted(self.states)]
        return [[x.detach().cpu().clone() for x in state.tensors()] for state in states]
