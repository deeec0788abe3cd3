"""Batches of a data set's clips: their order, crops, augmentation and padding, by a seed alone.

for batch in sample_batches(ds, 32, max_len=8000, generator=torch.Generator()):
    batch["x"], batch["target"], batch["mask"]      # (B, L) each, of a data set of mu-law
for batch in wave_batches(ds, 32, length=8000, generator=torch.Generator()):
    batch["wav"]                                    # (B, L), of any data set
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rawaudio import audio
from rawaudio.data import MIN_SAMPLES, ClipDataset, from_wave, to_wave
from rawaudio.errors import UserError
from rawaudio.quantizers import MULAW, Quantizer
from rawaudio.seeds import seeded
from sashimi.mulaw import SILENCE

POOL_BATCHES = 16  # batches sorted by length together: little padding, yet well mixed
WHOLE = 2**62  # samples; a limit that no clip reaches

Augment = Callable[[Tensor, torch.Generator], Tensor]
Batch = dict[str, Tensor]


def sample_batches(
    ds: ClipDataset,
    batch_size: int,
    max_len: int | None,
    generator: torch.Generator | None = None,
    *,
    pad_multiple: int = 16,
    **order: Any,
) -> Iterator[Batch]:
    """One epoch: every clip once, as dicts of (B, L) tensors on the data set's device.

    x        int64: the class before each sample; SILENCE before a clip's first
    target   int64: the class of each sample
    mask     bool: True where there is a sample, False where there is padding (SILENCE)
    index    int64 (B,), on the CPU: which clips these are
    samples  int64 (), on the CPU: how many samples are real, mask.sum()
    begin    int64 (B,), on the CPU: samples of each clip before its crop
    planned  int64 (), on the CPU: clips of this batch in all processes together
    told     int64 (B, C), on the CPU: conditions of the clips, of a data set that was told them

    Clips of similar length share a batch; L is the longest of them, rounded up to a multiple of
    `pad_multiple`. Clips longer than `max_len` are cropped; x then starts with the true previous
    sample. `max_len=None` crops nothing. order: see `_epoch`.
    """
    if pad_multiple < 1:
        raise ValueError(f"pad_multiple must be 1 or more, not {pad_multiple}")
    if max_len is not None and max_len < 1:
        raise ValueError(f"max_len must be 1 sample or more, or None, not {max_len}")
    if ds.data.dtype != torch.uint8:
        raise ValueError("sample_batches takes a data set of mu-law bytes, one without pcm")
    limit = WHOLE if max_len is None else max_len
    lengths = ds.lengths.clamp(max=limit)
    epoch = _epoch(ds, lengths, limit, 1, batch_size, generator, **order)
    return (_padded(rows, pad_multiple, ds.data.device) | batch for rows, batch in epoch)


def wave_batches(
    ds: ClipDataset,
    batch_size: int,
    length: int,
    generator: torch.Generator | None = None,
    **order: Any,
) -> Iterator[Batch]:
    """One epoch, as `sample_batches`, of wav, float32 (B, length) in [-1, 1], in place of classes.

    Longer clips are cropped; shorter ones are followed by silence, which counts in `samples`.
    """
    if length < 1:
        raise ValueError(f"length must be 1 sample or more, not {length}")

    def stacked(rows: list[tuple[Tensor, int]]) -> Batch:
        wav = torch.zeros(max(1, len(rows)), length, device=ds.data.device)
        for line, (row, _) in zip(wav, rows, strict=False):
            line[: len(row)] = to_wave(row)
        return {"wav": wav, "samples": torch.tensor(len(rows) * length)}

    lengths = torch.full_like(ds.lengths, length)
    epoch = _epoch(ds, lengths, length, 0, batch_size, generator, **order)
    return (stacked(rows) | batch for rows, batch in epoch)


def _epoch(
    ds: ClipDataset,
    lengths: Tensor,
    limit: int,
    before: int,
    batch_size: int,
    generator: torch.Generator | None,
    *,
    shuffle: bool = True,
    augment: Augment | None = None,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[list[tuple[Tensor, int]], Batch]]:
    """Of each batch the rows, up to `limit` samples behind up to `before` that precede them, with
    the number of these; and index, planned and told.

    shuffle=True    for training: order, crops and augmentation drawn from `generator`
    shuffle=False   for validation: longest first (too little memory shows at once), crops begin
                    where the clips do
    augment         clip, generator -> clip, (T,) -> (T',); applied after the crop
    start, shard    resume at batch `start`; of W processes, number r takes shard=(r, W): the
                    r-th part of every batch's clips

    The last batch may be smaller; a process for which it has no clip gets one row of padding. The
    generator is advanced by one draw an epoch, here and now; which clips make up batch k depends
    on that draw and k alone, and a clip's crop and augmentation on that draw and the clip alone: a
    resumed or sharded epoch has the same clips. A clip that cannot be read any more is left out.
    Raises ValueError for sizes that are not positive, or not divisible by the processes.
    """
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard is (rank, number of processes), rank from 0, not {shard}")
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"batch_size={batch_size}: must be divisible by the {world} processes")
    random = shuffle or augment is not None
    seed = int(torch.randint(2**62, (), generator=generator)) if random else 0
    plan = _plan(lengths, batch_size, seed if shuffle else None)
    part = batch_size // world

    def batches() -> Iterator[tuple[list[tuple[Tensor, int]], Batch]]:
        for clips in plan[start:]:
            rows, index, begins = [], [], []
            for i in clips[rank * part : (rank + 1) * part].tolist():
                try:
                    clip = ds[i]
                except audio.AudioError as error:
                    ds.leave_out(i, error)
                    continue
                rng, begin = seeded("clip", seed, i), 0
                if shuffle and len(clip) > limit:
                    begin = int(torch.randint(len(clip) - limit + 1, (), generator=rng))
                known = min(before, begin)
                row = clip[begin - known : begin + limit]
                if augment is not None:
                    row = augment(row, rng)
                rows.append((row[: known + limit], known))
                index.append(i)
                begins.append(begin)
            index, begins = (torch.tensor(x, dtype=torch.int64) for x in (index, begins))
            batch = {"index": index, "begin": begins, "planned": torch.tensor(len(clips))}
            if ds.told is not None:
                batch["told"] = ds.told[index] if len(index) else torch.zeros_like(ds.told[:1])
            yield rows, batch

    return batches()  # drawn and checked by now, not at the first batch


def _plan(lengths: Tensor, batch_size: int, seed: int | None) -> list[Tensor]:
    """Which clips make up which batch: a list of int64 (B,)."""
    if seed is None:
        return list(lengths.argsort(descending=True, stable=True).split(batch_size))
    generator = torch.Generator().manual_seed(seed)
    pools = torch.randperm(len(lengths), generator=generator).split(batch_size * POOL_BATCHES)
    # Stable: clips of equal length stay in random order.
    pools = [pool[lengths[pool].argsort(stable=True)] for pool in pools]
    batches = [batch for pool in pools for batch in pool.split(batch_size)]
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


def _padded(rows: list[tuple[Tensor, int]], pad_multiple: int, device: torch.device) -> Batch:
    """Rows of T_i classes (1 + T_i where the one before is known) -> x, target and mask (B, L)."""
    lengths = [len(row) - known for row, known in rows] or [0]
    L = max(1, math.ceil(max(lengths) / pad_multiple)) * pad_multiple
    block = torch.full((len(lengths), 1 + L), SILENCE, dtype=torch.uint8, device=device)
    for line, (row, known) in zip(block, rows, strict=False):
        line[1 - known : 1 - known + len(row)] = row
    ends = torch.tensor(lengths).to(device, non_blocking=True)
    mask = torch.arange(L, device=device) < ends[:, None]  # (B, L)
    x = block[:, :-1].long().masked_fill(~mask, SILENCE)  # nothing real past the end
    samples = torch.tensor(sum(lengths))
    return {"x": x, "target": block[:, 1:].long(), "mask": mask, "samples": samples}


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch's rows, `size` at a time."""
    rows = {k: v.split(size) for k, v in batch.items() if v.dim()}
    n = len(next(v for k, v in rows.items() if k != "index"))
    for i in range(n):
        yield {k: v[i] if i < len(v) else v[0][:0] for k, v in rows.items()}


def prefetched(batches: Iterator[Batch], pin: bool, depth: int = 4) -> Iterator[Batch]:
    """The same batches, made ahead in a thread; in pinned memory, from where copies are quick.

    A thread, not DataLoader's processes: what the data set notes about broken files stays.
    """

    def make() -> Batch | None:
        batch = next(batches, None)
        return {k: v.pin_memory() for k, v in batch.items()} if batch and pin else batch

    pool = ThreadPoolExecutor(1, "batches")
    try:
        ahead = collections.deque(pool.submit(make) for _ in range(depth))
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(make))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class GainSpeed:
    """Augmentation: a random gain and a random speed (pitch and tempo together) for each clip.

    gain_db   gain is uniform in +-gain_db decibels, lowered where a peak would pass full scale
    speed     speed is uniform in 1 +- speed; resampled in the frequency domain, so nothing folds
    share     of the clips that are changed, others come back as recorded: the fine grain of a
              recording (its levels, its noise) is learned from those

    Call it with samples (T,), uint8 or int16, and a generator: (T / speed,). A trailing run of
    silence (see `append_silence`) is a sign to the model, not sound, and comes back unchanged.
    """

    gain_db: float = 6.0
    speed: float = 0.1
    share: float = 1.0
    quantizer: Quantizer = field(default=MULAW, repr=False)  # of classes

    def __post_init__(self) -> None:
        if not 0 <= self.gain_db < math.inf or not 0 <= self.speed < 1:
            raise UserError(f"gain_db >= 0 and 0 <= speed < 1 are needed, not {self}")
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share}: must be above 0 and at most 1")

    def __call__(self, clip: Tensor, generator: torch.Generator) -> Tensor:
        u_gain, u_speed, u = (2 * torch.rand(3, generator=generator) - 1).tolist()
        loud = (clip != (SILENCE if clip.dtype == torch.uint8 else 0)).nonzero()
        sound = int(loud.amax()) + 1 if len(loud) else 0
        if sound < MIN_SAMPLES or (u + 1) / 2 >= self.share:
            return clip
        wav = change_speed(to_wave(clip[:sound], self.quantizer), 1 + u_speed * self.speed)
        gain = min(10 ** (u_gain * self.gain_db / 20), 1 / max(float(wav.abs().max()), 1e-6))
        changed = from_wave(gain * wav, clip.dtype, self.quantizer)
        return torch.cat([changed, clip[sound:]])


def change_speed(wav: Tensor, speed: float) -> Tensor:
    """float32 (T,) -> (round(T / speed),), by cutting or padding the spectrum."""
    n_out = max(round(len(wav) / speed), MIN_SAMPLES)
    if n_out == len(wav):
        return wav
    from scipy.fft import next_fast_len
    from scipy.signal import resample  # slow to import, and seldom needed

    # The transform is periodic: silence around it keeps the end from ringing into the start.
    margin = 64
    n_in = next_fast_len(len(wav) + 2 * margin, real=True)
    padded = F.pad(wav, (margin, n_in - len(wav) - margin))
    n_padded = round(n_in / speed)
    y = torch.from_numpy(resample(padded.numpy(), n_padded)).float()
    first = round(margin * n_padded / n_in)
    return y[first : first + n_out].clone()
