"""Streams of random numbers that do not meet: each has a purpose, a seed and a place of its own."""

import hashlib

import numpy as np
import torch
from torch import Tensor


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


def philox(counters: np.ndarray, key: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011, Random123): words of counters, unsigned (n, 4) of 32 bits,
    for a key of 64 bits.

    A counter-based generator: any place of a stream at once, the same bits in every language.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y, z, w = counters.astype(np.uint64).T
    for i in range(10):
        k0 = np.uint64((key + i * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64(((key >> 32) + i * 0xBB67AE85) & 0xFFFFFFFF)
        a, b = x * np.uint64(0xD2511F53), z * np.uint64(0xCD9E8D57)
        x, y, z, w = b >> half ^ y ^ k0, b & low, a >> half ^ w ^ k1, a & low
    return np.stack([x, y, z, w], 1)


def uniforms(seed: int, count: int) -> Tensor:
    """Float32 (count,) in [0, 1), of 24 bits; sashimi/live.cpp draws the same from a seed.

    Number t is word t % 4 of `philox` with the counter (t // 4, 0, 0, 0) and the seed as key.
    """
    counters = np.zeros((-(-count // 4), 4), np.uint64)
    counters[:, 0] = np.arange(len(counters))
    words = philox(counters, seed).flatten()[:count]
    return torch.from_numpy((words >> np.uint64(8)).astype(np.float32) * np.float32(2**-24))
