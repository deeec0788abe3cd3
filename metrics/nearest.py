"""Nearest neighbours: is a generated clip a copy of a training clip?

    found = neighbours({"real": train, "generated": clips}, 8000, 8000)    # ClipSets, Hz, samples
    found["generated"].distance                                            # dB, one per clip
    found["generated"].distance < copy_limit(found["real"])                # these are copies

The distance of two clips is the root mean square difference of their mel spectrograms in dB, over
the frames in which either sounds, at the best alignment within 100 ms. A spectrogram reaches from a
clip's own loudest point 40 dB down: levels do not matter, and neither does what a mu-law code or
noise 30 dB below the clip adds. Among spoken digits (FSDD), copies later, quieter, coded and noisy
at once are 0.2 to 1.2 dB from their originals, and the most similar of 2,520 recordings, one digit
said twice by one speaker, 1.6 dB from each other. A copy at another speed, or of another second of
a clip than its first, is not found.

What is near depends on the data. So real clips are measured too, each to its nearest other one
(leave-one-out), and test clips to the training clips: generated clips should be as far away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics.classifier import log_mel_db
from metrics.features import ClipSet, read_padded
from rawaudio.data import NEAR_SILENCE
from rawaudio.errors import UserError
from rawaudio.progress import watched

WINDOW = 0.064  # seconds, to the nearest power of two in samples
OVERLAP = 4  # windows over each sample of a real clip: a frame every 16 ms
STEP = 4  # frames of a query per frame of a real clip: they are aligned to 2 ms
REACH = 0.1  # seconds that a query may begin earlier or later
N_MELS = 32
TOP_DB = 40.0  # below a clip's loudest point: quieter is silence
QUANTILE = 1e-3  # of real clips that are as near to another: a copy is nearer
SHARE = 0.5  # of the real clips' median distance: a copy is nearer
SURELY = 1.0  # dB: nearer is a copy whatever the data, which may hold duplicates
MAX_REAL = 4096  # real clips whose nearest other is looked for, drawn at random
BLOCK, PART = 128, 4096  # queries and real clips at once: 2 MB per table of distances


@dataclass
class Neighbours:
    """The nearest real clips of some clips of a set; of silent ones there are none."""

    rows: np.ndarray  # int64 (n,): the clips, as rows of their set
    index: np.ndarray  # int64 (n,): their nearest, as rows of the real set; -1: none
    distance: np.ndarray  # float64 (n,) in dB; NaN: none
    delay: np.ndarray  # float64 (n,) in seconds: how much later the clip begins

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def silent(self) -> int:
        """How many clips have no neighbour."""
        return int(np.isnan(self.distance).sum())

    def closest(self) -> np.ndarray:
        """Places in these arrays (not rows of the set), the smallest distance first."""
        order = np.argsort(self.distance, kind="stable")  # NaN comes last
        return order[: len(self) - self.silent]


def neighbours(
    sets: dict[str, ClipSet], sample_rate: int, length: int, seed: int = 0
) -> dict[str, Neighbours]:
    """The nearest clip of sets["real"] for every clip of every set; a real clip's is another one.

    Clips are read again, at `sample_rate` (Hz), and cut or zero-padded to `length` samples. Of more
    than 4,096 real clips so many are drawn, which are compared with all. Memory: 8 KB per second
    of real audio, and little else. Raises ValueError if fewer than two real clips sound, AudioError
    for a file that can no longer be read.
    """

    def load(clips: ClipSet, rows: np.ndarray) -> Tensor:
        wavs = [read_padded(clips.clips[i], sample_rate, length)[0] for i in rows]
        return spectra(torch.stack(wavs), sample_rate)

    def blocks(rows: np.ndarray) -> list[np.ndarray]:
        return [rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK)]

    every = blocks(np.arange(len(sets["real"])))
    real = torch.cat([load(sets["real"], block)[:, ::STEP] for block in every])
    if (real.amax((1, 2)) > 0).sum() < 2:
        raise UserError("nearest=true needs at least two real clips that are not silent")
    hop = _hops(sample_rate)[1]
    reach = round(REACH * sample_rate / hop)
    result = {}
    for kind, clips in sets.items():
        rows = np.arange(len(clips))
        if kind == "real" and len(rows) > MAX_REAL:
            rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MAX_REAL])
        parts = []
        for block in watched(blocks(rows), f"nearest of {kind}", len(rows), each=BLOCK):
            own = torch.from_numpy(block) if kind == "real" else None
            parts.append(search(load(clips, block), real, reach, own))
        distance, index, lag = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        result[kind] = Neighbours(rows, index, distance, lag * hop / sample_rate)
    return result


def copy_limit(real: Neighbours) -> float:
    """Distance in dB below which a clip counts as a copy of its nearest real clip.

    Nearer than all but one in a thousand real clips are to another, and nearer than half of what is
    usual among them (of few clips the first alone says little); but 1 dB at least, so that
    duplicates among the real clips do not hide the copies.
    """
    distances = real.distance[real.closest()]
    rare = np.quantile(distances, QUANTILE, method="lower")
    return max(SURELY, float(min(rare, SHARE * np.median(distances))))


def summary(near: Neighbours, limit: float) -> dict[str, Any]:
    """Clips with a neighbour and without, quantiles of the distance in dB, and copies."""
    distances = near.distance[near.closest()]
    facts = {"clips": len(distances), "silent": near.silent}
    if len(distances):
        names = ("median", "percentile_5", "percentile_1", "minimum")
        values = np.quantile(distances, (0.5, 0.05, 0.01, 0)).tolist()
        facts |= dict(zip(names, values, strict=True))
    return facts | {"copies": int((distances < limit).sum())}


# ---- the distance ---------------------------------------------------------------------------


def _hops(sample_rate: int) -> tuple[int, int]:
    """Window and hop of `spectra`, in samples."""
    n_fft = max(OVERLAP * STEP, 2 ** round(math.log2(WINDOW * sample_rate)))
    return n_fft, n_fft // (OVERLAP * STEP)


def spectra(wavs: Tensor, sample_rate: int) -> Tensor:
    """float (B, T) -> dB above the floor (B, frames, 32), in [0, 40], a frame every 4 ms.

    The floor is 40 dB below a clip's loudest point; clips whose samples stay below 1e-3 are silent:
    0 everywhere.
    """
    n_fft, hop = _hops(sample_rate)
    parts = wavs.split(16)  # in double, before the filters, a clip takes megabytes
    db = [log_mel_db(x, sample_rate, n_fft, hop, N_MELS, TOP_DB, amin=1e-20) for x in parts]
    sounds = wavs.abs().amax(1) >= NEAR_SILENCE
    return ((torch.cat(db) + TOP_DB) * sounds[:, None, None]).mT.contiguous()


def search(
    queries: Tensor, real: Tensor, reach: int, own: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of `real` for each query: distance in dB (B,), its row (B,), the lag (B,).

    queries (B, F, 32) of `spectra`, real (n, T, 32) of every 4th frame of it. own (B,): rows that
    are the queries themselves, and passed over. lag: frames of `spectra` that the query is late,
    from -reach to reach. NaN, -1 and 0 for a silent query; silent real clips are nobody's
    neighbours.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x y, a matrix product per lag; lags between two frames of `real`
    take another quarter of the query's frames. At least half of what sounds in either clip must be
    compared. Rounding of the differences is no matter: the distance that is returned is computed
    anew, in double precision.
    """
    n_frames, n_mels = queries.shape[1:]
    reach = min(reach, n_frames // 2)
    best = torch.full((len(queries),), math.inf)
    index, lag = (torch.full((len(queries),), value) for value in (-1, 0))
    for first in range(0, len(real), PART):
        y, y_energy, y_sounds = _terms(real[first : first + PART])
        for phase in range(STEP):
            x, x_energy, x_sounds = _terms(queries[:, phase::STEP])
            least = torch.maximum(_half(x_sounds)[:, None], _half(y_sounds))
            for k in range(-((reach + phase) // STEP), (reach - phase) // STEP + 1):
                x0, y0 = max(0, k), max(0, -k)  # frame x0 of the queries meets frame y0
                m = min(x_sounds.shape[1] - x0, y_sounds.shape[1] - y0)
                a, b = slice(x0, x0 + m), slice(y0, y0 + m)
                i, j = slice(x0 * n_mels, (x0 + m) * n_mels), slice(y0 * n_mels, (y0 + m) * n_mels)
                square = x_energy[:, a].sum(1)[:, None] + y_energy[:, b].sum(1)
                square -= x[:, i] @ y[:, j].T * (2 / n_mels)
                count = x_sounds[:, a].sum(1)[:, None] + y_sounds[:, b].sum(1)
                count -= x_sounds[:, a] @ y_sounds[:, b].T  # frames in which either sounds
                square = (square / count).masked_fill_(count < least, math.inf)
                if own is not None:
                    inside = (own >= first) & (own < first + len(y))
                    square[inside, own[inside] - first] = math.inf
                nearest, row = square.min(1)
                better = nearest < best
                best = torch.where(better, nearest, best)
                index = torch.where(better, row + first, index)
                lag = torch.where(better, k * STEP + phase, lag)
    exact = [
        distance(x, real[i], s) if i >= 0 else math.nan
        for x, i, s in zip(queries, index.tolist(), lag.tolist(), strict=True)
    ]
    return torch.tensor(exact, dtype=torch.float64), index, lag


def distance(query: Tensor, real: Tensor, lag: int) -> float:
    """Of one query (F, 32) and one real clip (T, 32) at one lag, as `search` takes them; in dB."""
    x, y = query[lag % STEP :: STEP].double(), real.double()
    x, y = x[max(0, lag // STEP) :], y[max(0, -(lag // STEP)) :]
    m = min(len(x), len(y))
    sounds = (x[:m].amax(1) > 0) | (y[:m].amax(1) > 0)
    return float((x[:m] - y[:m])[sounds].square().mean().sqrt())


def _terms(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spectra as rows (B, frames * 32), mean squares of their frames, whether they sound (0, 1)."""
    return x.flatten(1), x.square().mean(2), (x.amax(2) > 0).float()


def _half(sounds: Tensor) -> Tensor:
    """Half the frames that sound; infinity for silent clips, with which nothing is compared."""
    total = sounds.sum(1)
    return torch.where(total > 0, total / 2, math.inf)
