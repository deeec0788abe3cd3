"""Clips for training: a CSV of paths -> samples in memory -> batches.

    ds = ClipDataset("splits/fsdd-train.csv", 8000, data_root="fsdd/recordings")
    for batch in sample_batches(ds, 32, max_len=8000, generator=torch.Generator()):
        batch["x"], batch["target"], batch["mask"]      # (B, L) each

    ds = ClipDataset("splits/fsdd-train.csv", 8000, data_root="fsdd/recordings", pcm=True)
    for batch in wave_batches(ds, 32, length=8000, generator=torch.Generator()):
        batch["wav"]                                    # (B, L)

Every file is decoded once and kept as one mu-law byte per sample (the 18,620 clips of SC09 are
0.3 GB), or as 16-bit PCM for models of waveforms.
"""

from __future__ import annotations

import csv
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import scipy.fft
import scipy.signal
import torch
from torch import Tensor

from . import audio, mulaw
from .mulaw import SILENCE

log = logging.getLogger(__name__)

POOL_BATCHES = 16  # batches sorted by length together: little padding, yet well mixed
NEAR_SILENCE = 1e-3  # a peak that is not made louder: it would be noise
MIN_SAMPLES = 2  # a shorter clip has no sample that follows another

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Clip:
    """One row of a split: where the audio is, and what it says ("" if the CSV has no label)."""

    path: Path
    label: str = ""


def read_csv(csv_path: str | os.PathLike, data_root: str | os.PathLike | None = None) -> list[Clip]:
    """The clips of a split, in the file's order; whether their audio exists is not looked at.

    The CSV is UTF-8 with a header; column `path` is required, `label` is kept, others are
    ignored. Relative paths start from `data_root` if given; else from the CSV's own folder, and
    where nothing is there, from the current one. Raises FileNotFoundError if the CSV or
    data_root is not there, ValueError if the CSV has no `path` column, no rows or is not CSV.
    """
    csv_path = Path(csv_path)
    if not csv_path.is_file():
        what = "is not a file" if csv_path.exists() else "is not there"
        raise FileNotFoundError(f"{csv_path} {what}; split_data.py writes such a CSV")
    if data_root is not None and not Path(data_root).is_dir():
        raise FileNotFoundError(f"data_root={data_root} is not a folder")
    try:
        with csv_path.open(encoding="utf-8-sig", newline="") as file:  # -sig: drops a BOM
            reader = csv.DictReader(file, skipinitialspace=True)
            if reader.fieldnames is None:
                raise ValueError(f"{csv_path} is empty; a split starts with a header `path,label`")
            columns = reader.fieldnames = [name.strip() for name in reader.fieldnames]
            if "path" not in columns:
                raise ValueError(
                    f"{csv_path} has no column `path`; its columns: {', '.join(columns)}"
                )
            clips = []
            for row in reader:
                name = (row["path"] or "").strip()
                if not name:
                    raise ValueError(f"{csv_path}, line {reader.line_num}: the path is empty")
                path = _resolve(Path(name), csv_path.parent, data_root)
                clips.append(Clip(path, (row.get("label") or "").strip()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{csv_path} is not a UTF-8 CSV: {error}") from error
    if not clips:
        raise ValueError(f"{csv_path} is empty: it has a header and no rows")
    return clips


def _resolve(path: Path, csv_folder: Path, data_root: str | os.PathLike | None) -> Path:
    if data_root is not None:
        return Path(data_root) / path  # an absolute path stays what it is
    beside = csv_folder / path
    return beside if beside.exists() or not path.exists() else path


def to_wave(samples: Tensor) -> Tensor:
    """Samples as a data set keeps them, uint8 mu-law or int16 PCM: float32 in [-1, 1]."""
    return mulaw.decode(samples) if samples.dtype == torch.uint8 else samples.float() / 2**15


def from_wave(wav: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_wave`; values beyond [-1, 1] are clipped."""
    if dtype == torch.uint8:
        return mulaw.encode(wav, check=False).to(torch.uint8)
    return (wav * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)


def _silence(dtype: torch.dtype) -> int:
    return SILENCE if dtype == torch.uint8 else 0


class ClipDataset:
    """All clips of a split: `ds[i]` is clip i, uint8 mu-law (T_i,), with `pcm` int16 (T_i,).

    data       uint8 or int16 (sum of T_i,): every clip, end to end
    offsets    int64 (n + 1,): clip i is data[offsets[i]:offsets[i + 1]]
    lengths    int64 (n,): T_i, in samples, appended silence included
    clips      list of Clip: path and label of each
    skipped    list of (path, reason): files left out, in the CSV's order

    Files are read in parallel threads, mixed down to mono and resampled to `sample_rate` (Hz)
    where they differ; how many were is said once. Files that are not there or cannot be used
    (see audio.AudioError), and clips under 2 samples, are skipped and counted in one warning.
    `append_silence` adds that many samples of silence to the end of every clip, as part of it,
    so that a model of trimmed clips learns to stop. `peak`, in (0, 1], scales every clip to that
    peak (near-silent ones, below -60 dB, are left). Messages go to the logger "sashimi.data".

    Raises what `read_csv` raises, and ValueError if no clip is left.
    """

    def __init__(
        self,
        csv_path: str | os.PathLike,
        sample_rate: int,
        data_root: str | os.PathLike | None = None,
        append_silence: int = 0,
        progress: bool = True,
        *,
        pcm: bool = False,
        peak: float | None = None,
    ) -> None:
        if append_silence < 0:
            raise ValueError(f"append_silence is a number of samples >= 0, not {append_silence}")
        if peak is not None and not 0 < peak <= 1:
            raise ValueError(f"peak is above 0 and at most 1, not {peak}")
        dtype = torch.int16 if pcm else torch.uint8
        listed = read_csv(csv_path, data_root)
        self.sample_rate = sample_rate
        self.clips: list[Clip] = []
        self.skipped: list[tuple[Path, str]] = []
        silence = torch.full((append_silence,), _silence(dtype), dtype=dtype).numpy().tobytes()
        packed, offsets = bytearray(), [0]
        kinds, rates, n_mixed = Counter(), Counter(), 0

        def load(clip: Clip) -> tuple[bytes, int, int] | audio.AudioError:
            try:
                return _load(clip.path, sample_rate, dtype, peak)
            except audio.AudioError as error:  # returned: one bad file must not end the others
                return error

        with ThreadPool(min(8, os.cpu_count() or 1)) as threads:
            # imap keeps the order, so a split is the same data set on every machine
            loaded = _bar(threads.imap(load, listed, chunksize=8), len(listed), progress)
            for clip, result in zip(listed, loaded, strict=True):
                if isinstance(result, audio.AudioError):
                    self.skipped.append((clip.path, result.reason))
                    kinds[result.kind] += 1
                    continue
                samples, channels, rate = result
                packed += samples
                packed += silence
                offsets.append(len(packed) // dtype.itemsize)
                self.clips.append(clip)
                n_mixed += channels > 1
                rates[rate] += rate != sample_rate

        if self.skipped:
            counts = ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common())
            path, reason = self.skipped[0]
            said = f"of {len(listed):,} files in {csv_path}: {counts}; the first: {path}: {reason}"
            if not self.clips:
                raise ValueError(
                    f"no clip is left {said}. data_root= is the folder that the paths start from"
                )
            log.warning("skipped %s %s (all are in .skipped)", f"{len(self.skipped):,}", said)
        if n_other := sum(rates.values()):
            others = ", ".join(f"{rate:,} Hz" for rate in sorted(+rates))
            log.warning(
                "resampled %s of %s clips from %s to %s Hz (%s)",
                *(f"{n_other:,}", f"{len(self):,}", others, f"{sample_rate:,}", csv_path),
            )
        if n_mixed:
            log.warning(
                "mixed %s of %s clips down to mono (%s)", f"{n_mixed:,}", f"{len(self):,}", csv_path
            )
        self.data = torch.frombuffer(packed, dtype=dtype)
        self.offsets = torch.tensor(offsets, dtype=torch.int64)
        self.lengths = self.offsets.diff()

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> Tensor:
        if not -len(self) <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        i %= len(self)
        return self.data[self.offsets[i] : self.offsets[i + 1]]

    def __repr__(self) -> str:
        hours = self.data.numel() / self.sample_rate / 3600
        return f"<ClipDataset: {len(self):,} clips, {hours:.2f} h at {self.sample_rate:,} Hz>"


def _load(
    path: Path, sample_rate: int, dtype: torch.dtype, peak: float | None
) -> tuple[bytes, int, int]:
    """One file's samples, with its number of channels and its own rate in Hz."""
    channels, rate = audio.read_channels(path)
    wav = audio.resample(channels.mean(dim=0), rate, sample_rate)
    if len(wav) < MIN_SAMPLES:
        remedy = f"a clip has {MIN_SAMPLES} samples or more"
        raise audio.AudioError(path, "too short", f"{len(wav)} sample", remedy)
    if peak is not None and (loudest := float(wav.abs().max())) > NEAR_SILENCE:
        wav = wav * (peak / loudest)
    return from_wave(wav, dtype).numpy().tobytes(), len(channels), rate


def _bar(items: Iterable, total: int, show: bool) -> Iterable:
    """The same items behind a progress bar, if someone is there to see it."""
    if not (show and sys.stdout.isatty()):
        return items
    from fastprogress import progress_bar

    return progress_bar(items, total=total, leave=False)


def sample_batches(
    ds: ClipDataset,
    batch_size: int,
    max_len: int | None,
    generator: torch.Generator | None = None,
    *,
    shuffle: bool = True,
    augment: Augment | None = None,
    pad_multiple: int = 16,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, Tensor]]:
    """One epoch: every clip once, as dicts of (B, L) tensors on the CPU.

    x        int64: the class before each sample; SILENCE before a clip's first
    target   int64: the class of each sample
    mask     bool: True where there is a sample, False where there is padding (SILENCE)
    index    int64 (B,): which clips these are

    Clips of similar length share a batch; L is the longest of them, rounded up to a multiple of
    `pad_multiple`. Longer clips than `max_len` samples are cropped, at random when `shuffle`, else
    to their start; x then starts with the true previous sample. `max_len=None` crops nothing.

    shuffle=True    for training: order, crops and augmentation drawn from `generator`
    shuffle=False   for validation: longest first (too little memory shows at once)
    augment         clip, generator -> clip, uint8 (T,) -> uint8 (T',); applied after the crop
    start, shard    resume at batch `start`; of W processes, number r takes shard=(r, W):
                    every W-th batch, as many as the others when `shuffle`

    The last batch may be smaller. The generator is advanced by one draw an epoch, here and now, and
    batch k depends on that draw and k alone: a resumed or sharded epoch has the same batches.
    Raises ValueError for sizes that are not positive.
    """
    if pad_multiple < 1:
        raise ValueError(f"pad_multiple must be 1 or more, not {pad_multiple}")
    if max_len is not None and max_len < 1:
        raise ValueError(
            f"max_len must be 1 sample or more, or None for whole clips, not {max_len}"
        )
    if ds.data.dtype != torch.uint8:
        raise ValueError("sample_batches takes a data set of mu-law bytes, one without pcm")
    lengths = ds.lengths if max_len is None else ds.lengths.clamp(max=max_len)

    def make(clips: list[int], own: torch.Generator) -> dict[str, Tensor]:
        rows = [_cut(ds, i, max_len, shuffle, augment, own) for i in clips]
        return _assemble(rows, pad_multiple)

    return _epoch(make, lengths, batch_size, generator, shuffle, augment is not None, start, shard)


def wave_batches(
    ds: ClipDataset,
    batch_size: int,
    length: int,
    generator: torch.Generator | None = None,
    *,
    shuffle: bool = True,
    augment: Augment | None = None,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, Tensor]]:
    """One epoch: every clip once, as dicts of wav, float32 (B, length) in [-1, 1], and index.

    Shorter clips are followed by silence; longer ones are cropped, at random when `shuffle`, else
    to their start. Everything else as in `sample_batches`.
    """
    if length < 1:
        raise ValueError(f"length must be 1 sample or more, not {length}")

    def make(clips: list[int], own: torch.Generator) -> dict[str, Tensor]:
        wav = torch.zeros(len(clips), length)
        for line, i in zip(wav, clips, strict=True):
            begin = _begin(int(ds.lengths[i]), length, shuffle, own)
            row = ds[i][begin : begin + length]
            row = row if augment is None else augment(row, own)[:length]
            line[: len(row)] = to_wave(row)
        return {"wav": wav}

    same = torch.full_like(ds.lengths, length)
    return _epoch(make, same, batch_size, generator, shuffle, augment is not None, start, shard)


def _epoch(
    make: Callable[[list[int], torch.Generator], dict[str, Tensor]],
    lengths: Tensor,
    batch_size: int,
    generator: torch.Generator | None,
    shuffle: bool,
    augmented: bool,
    start: int,
    shard: tuple[int, int],
) -> Iterator[dict[str, Tensor]]:
    """make(clips, generator of the batch) for every planned batch of one process."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard is (rank, number of processes), rank from 0, not {shard}")
    seed = int(torch.randint(2**62, (), generator=generator)) if shuffle or augmented else 0
    plan = _plan(lengths, batch_size, seed if shuffle else None)
    mine = range(rank, len(plan) - len(plan) % world if shuffle else len(plan), world)

    def batches() -> Iterator[dict[str, Tensor]]:
        for k in mine[start:]:
            own = torch.Generator().manual_seed(seed + k + 1)
            yield {**make(plan[k].tolist(), own), "index": plan[k]}

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


def _cut(
    ds: ClipDataset,
    i: int,
    max_len: int | None,
    shuffle: bool,
    augment: Augment | None,
    generator: torch.Generator,
) -> Tensor:
    """Clip i as one row: uint8 (1 + T,), the class before it first; T <= max_len."""
    clip = ds[i]
    limit = len(clip) if max_len is None else max_len
    begin = _begin(len(clip), limit, shuffle, generator)
    row = clip[max(begin - 1, 0) : begin + limit]
    if augment is not None:
        row = augment(row, generator)
    if begin == 0:
        row = torch.cat([row.new_tensor([SILENCE]), row])
    return row if max_len is None else row[: 1 + max_len]


def _begin(length: int, limit: int, shuffle: bool, generator: torch.Generator) -> int:
    """Where a crop of `limit` samples begins: anywhere that fits, or at the start."""
    if not shuffle or length <= limit:
        return 0
    return int(torch.randint(length - limit + 1, (), generator=generator))


def _assemble(rows: list[Tensor], pad_multiple: int) -> dict[str, Tensor]:
    """Rows of 1 + T_i classes -> x, target and mask of (B, L)."""
    lengths = torch.tensor([len(row) - 1 for row in rows])
    L = math.ceil(int(lengths.max()) / pad_multiple) * pad_multiple
    block = torch.full((len(rows), 1 + L), SILENCE, dtype=torch.uint8)
    for line, row in zip(block, rows, strict=True):
        line[: len(row)] = row
    mask = torch.arange(L) < lengths[:, None]  # (B, L)
    x = block[:, :-1].long().where(mask, torch.tensor(SILENCE))  # nothing real past the end
    return {"x": x, "target": block[:, 1:].long(), "mask": mask}


@dataclass(frozen=True)
class GainSpeed:
    """Augmentation: a random gain and a random speed (pitch and tempo together) for each clip.

    gain_db   gain is uniform in +-gain_db decibels, lowered where a peak would pass full scale
    speed     speed is uniform in 1 +- speed; resampled in the frequency domain, so nothing folds

    Call it with samples (T,), uint8 or int16, and a generator: (T / speed,). A trailing run of
    silence (see `append_silence`) is a sign to the model, not sound, and comes back unchanged.
    """

    gain_db: float = 6.0
    speed: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.gain_db < math.inf or not 0 <= self.speed < 1:
            raise ValueError(f"gain_db >= 0 and 0 <= speed < 1 are needed, not {self}")

    def __call__(self, clip: Tensor, generator: torch.Generator) -> Tensor:
        u_gain, u_speed = (2 * torch.rand(2, generator=generator) - 1).tolist()
        loud = (clip != _silence(clip.dtype)).nonzero()
        sound = int(loud.amax()) + 1 if len(loud) else 0
        if sound < MIN_SAMPLES:
            return clip
        wav = self._change_speed(to_wave(clip[:sound]), 1 + u_speed * self.speed)
        gain = min(10 ** (u_gain * self.gain_db / 20), 1 / max(float(wav.abs().max()), 1e-6))
        return torch.cat([from_wave(gain * wav, clip.dtype), clip[sound:]])

    @staticmethod
    def _change_speed(wav: Tensor, speed: float) -> Tensor:
        """float32 (T,) -> (round(T / speed),), by cutting or padding the spectrum."""
        n_out = max(round(len(wav) / speed), MIN_SAMPLES)
        if n_out == len(wav):
            return wav
        # The transform is periodic: silence around it keeps the end from ringing into the start.
        margin = 64
        n_in = scipy.fft.next_fast_len(len(wav) + 2 * margin, real=True)
        padded = torch.nn.functional.pad(wav, (margin, n_in - len(wav) - margin))
        n_padded = round(n_in / speed)
        y = torch.from_numpy(scipy.signal.resample(padded.numpy(), n_padded)).float()
        first = round(margin * n_padded / n_in)
        return y[first : first + n_out].clone()
