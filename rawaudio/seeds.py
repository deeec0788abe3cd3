"""Streams of random numbers that do not meet: each has a purpose, a seed and a place of its own."""

import hashlib

import torch


def seed_of(*parts: object) -> int:
    """A seed for the stream that these parts name, such as ("dropout", seed, step).

    Hashed, because PyTorch keeps 32 bits of a seed on the CPU: of sums, the high ones are lost,
    and seed + step is the next seed's stream one step earlier.
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def seeded(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of that stream, at its start."""
    return torch.Generator(device).manual_seed(seed_of(*parts))
