"""One process, or those that torchrun has started: who this is, and what they do together."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from rawaudio.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Which of the processes of this machine this is, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join(backend: str = "gloo") -> None:
    """Meets the other processes, if there are any.

    One may decode hours of audio while the others wait: for as long as it takes.
    """
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(days=30))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def summed(values: list[float], device: torch.device) -> list[float]:
    """Sums over all processes."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def largest(value: torch.Tensor) -> torch.Tensor:
    """The largest of all processes' values."""
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def gathered(value: T) -> list[T]:
    """Every process's value, which holds tensors of the CPU."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Until all processes are here. Raises InterruptedError if one of them has stopped."""
    if world() > 1:
        try:
            dist.barrier()
        except RuntimeError:
            raise InterruptedError("another process stopped") from None


def on_first(act: Callable[[], T]) -> T:
    """In all processes what `act` returns, or raises as UserError or OSError, in the first."""
    if world() == 1:
        return act()
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = act()
        except (UserError, OSError) as error:
            outcome[1] = error
    try:
        dist.broadcast_object_list(outcome)
    except RuntimeError:
        raise InterruptedError("another process stopped") from None
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
