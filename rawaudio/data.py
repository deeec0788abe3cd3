"""Clips for training: a CSV of paths -> samples in memory -> batches.

    ds = ClipDataset("splits/fsdd-train.csv", 8000, data_root="fsdd/recordings")
    for batch in sample_batches(ds, 32, max_len=8000, generator=torch.Generator()):
        batch["x"], batch["target"], batch["mask"]      # (B, L) each

    ds = ClipDataset("splits/fsdd-train.csv", 8000, data_root="fsdd/recordings", pcm=True)
    for batch in wave_batches(ds, 32, length=8000, generator=torch.Generator()):
        batch["wav"]                                    # (B, L)

    ds = ClipDataset("splits/piano-train.csv", 16000, data_root="piano", sample_len=128000)

Every file is decoded once and kept as one mu-law byte per sample (the 18,620 clips of SC09 are
0.3 GB), or as 16-bit PCM for models of waveforms. Long recordings (`sample_len`) are kept in a file
instead, which is mapped into memory, and come in pieces.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import logging
import math
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, BinaryIO

import scipy.fft
import scipy.signal
import torch
from torch import Tensor

from rawaudio import audio
from rawaudio.command import cache_folder
from rawaudio.errors import UserError
from rawaudio.progress import watched
from rawaudio.seeds import seeded
from sashimi import mulaw
from sashimi.mulaw import SILENCE

log = logging.getLogger(__name__)

POOL_BATCHES = 16  # batches sorted by length together: little padding, yet well mixed
NEAR_SILENCE = 1e-3  # a peak that is not made louder: it would be noise
MIN_SAMPLES = 2  # a shorter clip has no sample that follows another

PLACE = ("path", "start", "stop")  # columns that tell where a clip is

Augment = Callable[[Tensor, torch.Generator], Tensor]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Clip:
    """One row of a split: where the audio is, and what it says ("" if the CSV has no label).

    A part of a recording begins `start` seconds from its beginning and ends at `stop`. columns
    holds what else the row says, by the name of the column.
    """

    path: Path
    label: str = ""
    start: float = 0.0
    stop: float | None = None
    columns: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def part(self) -> str:
        """ "" for a whole file, else the part in seconds as in URLs of media: #t=0.5,1.25"""
        if not self.start and self.stop is None:
            return ""
        return f"#t={self.start:.10g}" + ("" if self.stop is None else f",{self.stop:.10g}")

    @property
    def name(self) -> str:
        """The file's name, with the part."""
        return audio.shown(self.path.name) + self.part

    def __str__(self) -> str:
        return audio.shown(self.path) + self.part


def read_clip(clip: Clip, sample_rate: int | None = None) -> audio.Sound:
    """The audio of a clip, which may be a part of its file; raises what `audio.decode` raises."""
    return audio.decode(clip.path, sample_rate, clip.start, clip.stop)


def clip_digest(clip: Clip, of_file: Callable[[Path], bytes] = audio.content_digest) -> bytes:
    """SHA-256 of what a clip is made from, the file's bytes and the part; wherever the file lies.

    of_file: digests of whole files, for callers that keep those of recordings with many parts.
    """
    return hashlib.sha256(of_file(clip.path) + clip.part.encode()).digest()


def read_csv(csv_path: str | os.PathLike, data_root: str | os.PathLike | None = None) -> list[Clip]:
    """The clips of a split, in the file's order; whether their audio exists is not looked at.

    The CSV is UTF-8 with a header; column `path` is required, `label` is kept, `start` and `stop`
    (seconds; empty: the whole file) take a part of a recording, others are ignored. Relative paths
    start from `data_root` if given; else from the CSV's own folder, and where nothing is there,
    from the current one. A path may lead out of `data_root` (../, absolute): whoever writes the CSV
    chooses which files are read, though as audio and nothing else. Spaces around a path belong to
    it if such a file is there.

    Raises FileNotFoundError if the CSV or data_root is not there, ValueError if the CSV has no
    `path` column, no rows or is not CSV.
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
                raise UserError(f"{csv_path} is empty; a split starts with a header `path,label`")
            columns = reader.fieldnames = [name.strip() for name in reader.fieldnames]
            if "path" not in columns:
                raise UserError(
                    f"{csv_path} has no column `path`; its columns: {', '.join(columns)}"
                )
            clips = []
            for row in reader:
                name = row["path"] or ""
                if not name.strip():
                    raise UserError(f"{csv_path}, line {reader.line_num}: the path is empty")
                path = _resolve(Path(name), csv_path.parent, data_root)
                if name != name.strip() and not os.path.exists(path):
                    path = _resolve(Path(name.strip()), csv_path.parent, data_root)
                label = (row.get("label") or "").strip()
                part = _part(row, f"{csv_path}, line {reader.line_num}")
                others = {k: (row[k] or "").strip() for k in columns if k not in PLACE}
                clips.append(Clip(path, label, *part, others))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{csv_path} is not a UTF-8 CSV: {error}") from error
    if not clips:
        raise UserError(f"{csv_path} is empty: it has a header and no rows")
    return clips


SAMPLES = "samples.csv"  # what rawaudio.generate writes beside its clips


def read_samples(folder: Path) -> dict[str, dict[str, str]]:
    """Name of each clip -> its row in a folder that `rawaudio.generate` made; empty for others."""
    path = folder / SAMPLES
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["file"]: row for row in csv.DictReader(file)}
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a table of clips with a column `file`: {error}") from None


def _part(row: dict[str, str], where: str) -> tuple[float, float | None]:
    """Columns `start` and `stop` of a row, in seconds."""
    given = [(row.get(name) or "").strip() for name in ("start", "stop")]
    try:
        start, stop = float(given[0] or 0), float(given[1] or math.inf)
    except ValueError:
        start = stop = math.nan
    if not 0 <= start < stop:
        raise UserError(
            f"{where}: start,stop = {','.join(given)}: expected seconds, 0 <= start < stop"
        )
    return start, None if math.isinf(stop) else stop


def _resolve(path: Path, csv_folder: Path, data_root: str | os.PathLike | None) -> Path:
    if data_root is not None:
        return Path(data_root) / path  # an absolute path stays what it is
    beside = csv_folder / path
    return beside if os.path.exists(beside) or not os.path.exists(path) else path


def find_conditions(
    clips: list[Clip], names: list[str], csv_path: str | os.PathLike
) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """The values of those columns in the order in which they appear, and how often each does.

    Raises ValueError for a column that is not there, and a clip without a value.
    """
    values, counts = {}, {}
    for name in names:
        if name not in clips[0].columns:
            known = ", ".join(clips[0].columns) or "none"
            raise UserError(
                f"conditions=[{','.join(names)}]: {csv_path} has no column {name}; columns that "
                f"can be conditions: {known}"
            )
        found = Counter(clip.columns[name] for clip in clips)
        if "" in found:
            first = next(clip.path for clip in clips if not clip.columns[name])
            raise UserError(
                f"{csv_path}: {found['']:,} clips have no {name}, the first is {first}; a model is "
                "told a column only if every training clip has a value"
            )
        values[name], counts[name] = list(found), list(found.values())
    return values, counts


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
    skipped    list of (Clip, reason): those left out, in the CSV's order
    broken     dict path -> reason: files left out since, because they could not be read again
    told       int64 (n, C): indices of the clips' conditions, see `tell`; None before

    Files are read in parallel threads, mixed down to mono and resampled to `sample_rate` (Hz)
    where they differ; how many were is said once. Files that are not there or cannot be used
    (see audio.AudioError), and clips under 2 samples, are skipped and counted in one warning.
    `append_silence` adds that many samples of silence to the end of every clip, as part of it,
    so that a model of trimmed clips learns to stop. `peak`, in (0, 1], scales every clip to that
    peak (near-silent ones, below -60 dB, are left). Messages go to the logger "rawaudio.data".

    With `sample_len` the files are recordings, however long: each becomes clips of that many
    samples, the last one shorter. Their samples are written once to a file in the folder `cache`
    (~/.cache/simple-sashimi if None), named after the content of the audio files, and `data` is a
    memory map of it.

    Raises what `read_csv` raises, ValueError if no clip is left, OSError if the cache cannot be
    written.
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
        sample_len: int | None = None,
        cache: str | os.PathLike | None = None,
    ) -> None:
        if append_silence < 0:
            raise UserError(f"append_silence is a number of samples >= 0, not {append_silence}")
        if peak is not None and not 0 < peak <= 1:
            raise UserError(f"peak is above 0 and at most 1, not {peak}")
        if sample_len is not None and sample_len < MIN_SAMPLES:
            raise UserError(f"sample_len is {MIN_SAMPLES} samples or more, not {sample_len}")
        dtype = torch.int16 if pcm else torch.uint8
        listed = read_csv(csv_path, data_root)
        how = (sample_rate, dtype, append_silence, peak)
        self.sample_rate = sample_rate
        self.broken: dict[Path, str] = {}
        self.told: Tensor | None = None
        self.mapped: BinaryIO | None = None
        if sample_len is None:
            sink = io.BytesIO()
            found = _decode(listed, sink, *how, progress)
            self.data = torch.frombuffer(sink.getbuffer(), dtype=dtype) if sink.tell() else None
        else:
            path, found = _cached(listed, how, progress, cache)
            self.mapped, size = path.open("rb"), found["offsets"][-1]
            # a private map: pages come from the file when they are read, and none is written
            self.data = torch.from_file(str(path), False, size, dtype=dtype) if size else None
        self._say(found, len(listed), csv_path, listed)
        self.clips = [listed[i] for i in found["used"]]
        offsets = torch.tensor(found["offsets"], dtype=torch.int64)
        if sample_len is not None:
            pieces = [-(-int(n) // sample_len) for n in offsets.diff()]
            self.clips = [c for c, n in zip(self.clips, pieces, strict=True) for _ in range(n)]
            starts = [torch.arange(int(a), int(b), sample_len)
                      for a, b in zip(offsets, offsets[1:], strict=False)]  # fmt: skip
            offsets = torch.cat([*starts, offsets[-1:]])
        self.offsets, self.lengths = offsets, offsets.diff()

    def _say(
        self, found: dict[str, Any], n_listed: int, csv_path: str | os.PathLike, listed: list[Clip]
    ) -> None:
        """What was done to the files, and which are missing: a line for each kind of thing."""
        n = len(found["used"])
        self.skipped = [(listed[i], reason) for i, _, reason in found["skipped"]]
        if self.skipped:
            kinds = Counter(kind for _, kind, _ in found["skipped"])
            counts = ", ".join(f"{k:,} {kind}" for kind, k in kinds.most_common())
            clip, reason = self.skipped[0]
            said = f"of {n_listed:,} files in {csv_path}: {counts}; the first: {clip}: {reason}"
            if not n:
                raise UserError(
                    f"no clip is left {said}. data_root= is the folder that the paths start from"
                )
            log.warning("skipped %s %s", f"{len(self.skipped):,}", said)
        if n_other := sum(found["rates"].values()):
            others = ", ".join(f"{rate:,} Hz" for rate in sorted(map(int, found["rates"])))
            log.warning(
                "resampled %s of %s clips from %s to %s Hz (%s)",
                *(f"{n_other:,}", f"{n:,}", others, f"{self.sample_rate:,}", csv_path),
            )
        if found["mixed"]:
            log.warning(
                "mixed %s of %s clips down to mono (%s)", f"{found['mixed']:,}", f"{n:,}", csv_path
            )

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> Tensor:
        if not -len(self) <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        i %= len(self)
        begin, end = int(self.offsets[i]), int(self.offsets[i + 1])
        if self.mapped is not None:  # what is no longer in the file must not be touched: SIGBUS
            size = os.fstat(self.mapped.fileno()).st_size
            if size < end * self.data.itemsize:
                remedy = "start again, and it is made anew"
                raise audio.AudioError(self.mapped.name, "cut short", f"{size:,} bytes", remedy)
        return self.data[begin:end]

    def to(self, device: torch.device) -> ClipDataset:
        """The samples on that device, from where batches then come; not those of a mapped file."""
        if self.mapped is None:
            self.data = self.data.to(device)
        return self

    def tell(self, conditions: dict[str, list[str]]) -> None:
        """Look up the clips' conditions; batches then have `told`. What is not among the values
        counts as not told, with a notice."""
        self.told = torch.zeros(len(self), len(conditions), dtype=torch.int64)
        for i, (name, values) in enumerate(conditions.items()):
            index = {value: k for k, value in enumerate(values, 1)}
            found = [clip.columns.get(name, "") for clip in self.clips]
            self.told[:, i] = torch.tensor([index.get(value, 0) for value in found])
            if strange := Counter(value or "none" for value in found if value not in index):
                shown = ", ".join(list(strange)[:5]) + (", ..." if len(strange) > 5 else "")
                log.warning(
                    "%s of %s clips have a %s that is not in the training set (%s): not told",
                    f"{strange.total():,}", f"{len(self):,}", name, shown,
                )  # fmt: skip

    def leave_out(self, i: int, error: audio.AudioError) -> None:
        """Note that clip i broke since the data set was read; one warning per file."""
        path = self.clips[i].path
        if path not in self.broken:
            self.broken[path] = error.reason
            log.warning("left out from now on: %s: %s", path, error)

    def __repr__(self) -> str:
        hours = self.data.numel() / self.sample_rate / 3600
        return f"<ClipDataset: {len(self):,} clips, {hours:.2f} h at {self.sample_rate:,} Hz>"


def _decode(
    listed: list[Clip],
    sink: BinaryIO,
    sample_rate: int,
    dtype: torch.dtype,
    append_silence: int,
    peak: float | None,
    progress: bool,
    threads: int = 8,
) -> dict[str, Any]:
    """Writes the samples of all files to `sink`, end to end; what was found, as JSON can hold it.

    offsets: of each clip and the end, in samples; used: indices into `listed`; skipped: (index,
    kind, reason) of the others; rates: Hz -> clips resampled; mixed: clips mixed down.
    """
    silence = torch.full((append_silence,), _silence(dtype), dtype=dtype).numpy().tobytes()
    offsets, used, skipped, rates, n_mixed = [0], [], [], Counter(), 0

    def load(clip: Clip) -> tuple[bytearray, int, int] | audio.AudioError:
        try:
            return _load(clip, sample_rate, dtype, peak)
        except audio.AudioError as error:  # returned: one bad file must not end the others
            return error

    with ThreadPool(min(threads, os.cpu_count() or 1)) as pool:
        # imap keeps the order, so a split is the same data set on every machine
        loaded = pool.imap(load, listed, chunksize=threads)
        loaded = watched(loaded, "reading", len(listed), show=progress)
        for i, result in enumerate(loaded):
            if isinstance(result, audio.AudioError):
                skipped.append((i, result.kind, result.reason))
                continue
            samples, channels, rate = result
            n = sink.write(samples) + sink.write(silence)
            offsets.append(offsets[-1] + n // dtype.itemsize)
            used.append(i)
            n_mixed += channels > 1
            if rate != sample_rate:
                rates[rate] += 1
    return {"offsets": offsets, "used": used, "skipped": skipped, "rates": rates, "mixed": n_mixed}


def _cached(
    listed: list[Clip], how: tuple, progress: bool, cache: str | os.PathLike | None
) -> tuple[Path, dict[str, Any]]:
    """The file of decoded samples, made if it is not there yet, and what `_decode` found."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = cache_folder(cache or caches / "simple-sashimi")
    key = hashlib.sha256(repr((2, *how)).encode())  # 2: of this format, and of how files are read
    of_file = functools.cache(audio.content_digest)
    for clip in listed:
        try:
            key.update(clip_digest(clip, of_file))
        except audio.AudioError as error:
            key.update(error.kind.encode())
    path = folder / f"{key.hexdigest()[:24]}.samples"
    index = path.with_suffix(".json")
    try:
        found = json.loads(index.read_text())
        if path.stat().st_size == found["offsets"][-1] * how[1].itemsize:
            return path, found
    except (OSError, ValueError, KeyError):
        pass  # not there, or not whole
    folder.mkdir(parents=True, exist_ok=True)
    drafts = [x.with_name(f"{x.name}.{os.getpid()}.tmp") for x in (path, index)]
    try:
        with drafts[0].open("wb") as sink:
            found = _decode(listed, sink, *how, progress, threads=2)  # hours may be in one file
        drafts[1].write_text(json.dumps(found))
        os.replace(drafts[0], path)
        os.replace(drafts[1], index)  # last: with it, the samples are there
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    return path, found


def _load(
    clip: Clip, sample_rate: int, dtype: torch.dtype, peak: float | None
) -> tuple[bytearray, int, int]:
    """One clip's samples, with its file's number of channels and own rate in Hz."""
    wav, _, rate, channels = read_clip(clip, sample_rate)
    if len(wav) < MIN_SAMPLES:
        remedy = f"a clip has {MIN_SAMPLES} samples or more"
        raise audio.AudioError(clip.path, "too short", f"{len(wav)} sample", remedy)
    if peak is not None and (loudest := float(wav.abs().max())) > NEAR_SILENCE:
        wav *= peak / loudest
    samples = bytearray()
    for block in wav.split(2**20):  # mu-law takes several times its input
        samples += from_wave(block, dtype).numpy().tobytes()
    return samples, channels, rate


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
) -> Iterator[Batch]:
    """One epoch: every clip once, as dicts of (B, L) tensors on the data set's device.

    x        int64: the class before each sample; SILENCE before a clip's first
    target   int64: the class of each sample
    mask     bool: True where there is a sample, False where there is padding (SILENCE)
    index    int64 (B,), on the CPU: which clips these are
    samples  int64 (), on the CPU: how many samples are real, mask.sum()
    planned  int64 (), on the CPU: clips of this batch in all processes together
    told     int64 (B, C), on the CPU: conditions of the clips, of a data set that was told them

    Clips of similar length share a batch; L is the longest of them, rounded up to a multiple of
    `pad_multiple`. Longer clips than `max_len` samples are cropped, at random when `shuffle`, else
    to their start; x then starts with the true previous sample. `max_len=None` crops nothing.

    shuffle=True    for training: order, crops and augmentation drawn from `generator`
    shuffle=False   for validation: longest first (too little memory shows at once)
    augment         clip, generator -> clip, uint8 (T,) -> uint8 (T',); applied after the crop
    start, shard    resume at batch `start`; of W processes, number r takes shard=(r, W): the
                    r-th part of every batch's clips

    The last batch may be smaller; a process for which it has no clip gets one row of padding. The
    generator is advanced by one draw an epoch, here and now; which clips make up batch k depends
    on that draw and k alone, and a clip's crop and augmentation on that draw and the clip alone: a
    resumed or sharded epoch has the same clips. A clip that cannot be read any more is left out.
    Raises ValueError for sizes that are not positive, or not divisible by the processes.
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

    def cut(i: int, own: torch.Generator) -> tuple[Tensor, bool]:
        return _cut(ds[i], max_len, shuffle, augment, own)

    def assemble(rows: list[tuple[Tensor, bool]]) -> Batch:
        return _assemble(rows, pad_multiple, ds.data.device)

    random = (generator, shuffle, augment is not None)
    return _epoch(ds, cut, assemble, lengths, batch_size, random, start, shard)


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
) -> Iterator[Batch]:
    """One epoch: every clip once, as dicts of wav, float32 (B, length) in [-1, 1], and index,
    samples and planned as in `sample_batches`.

    Shorter clips are followed by silence; longer ones are cropped, at random when `shuffle`, else
    to their start. Everything else as in `sample_batches`.
    """
    if length < 1:
        raise ValueError(f"length must be 1 sample or more, not {length}")

    def cut(i: int, own: torch.Generator) -> Tensor:
        begin = _begin(int(ds.lengths[i]), length, shuffle, own)
        row = ds[i][begin : begin + length]
        return to_wave(row if augment is None else augment(row, own)[:length])

    def assemble(rows: list[Tensor]) -> Batch:
        wav = torch.zeros(max(1, len(rows)), length, device=ds.data.device)
        for line, row in zip(wav, rows, strict=False):
            line[: len(row)] = row
        return {"wav": wav, "samples": torch.tensor(len(rows) * length)}

    same = torch.full_like(ds.lengths, length)
    random = (generator, shuffle, augment is not None)
    return _epoch(ds, cut, assemble, same, batch_size, random, start, shard)


def _epoch(
    ds: ClipDataset,
    cut: Callable[[int, torch.Generator], Any],
    assemble: Callable[[list], Batch],
    lengths: Tensor,
    batch_size: int,
    random: tuple[torch.Generator | None, bool, bool],
    start: int,
    shard: tuple[int, int],
) -> Iterator[Batch]:
    """One process's part of every planned batch: cut(clip, generator of its own), assembled."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard is (rank, number of processes), rank from 0, not {shard}")
    if batch_size % world:
        raise ValueError(f"batch_size={batch_size}: must be divisible by the {world} processes")
    generator, shuffle, augmented = random
    seed = int(torch.randint(2**62, (), generator=generator)) if shuffle or augmented else 0
    plan = _plan(lengths, batch_size, seed if shuffle else None)
    part = batch_size // world

    def batches() -> Iterator[Batch]:
        for clips in plan[start:]:
            rows, index = [], []
            for i in clips[rank * part : (rank + 1) * part].tolist():
                try:
                    rows.append(cut(i, seeded("clip", seed, i)))
                except audio.AudioError as error:
                    ds.leave_out(i, error)
                else:
                    index.append(i)
            index = torch.tensor(index, dtype=torch.int64)
            batch = {**assemble(rows), "index": index, "planned": torch.tensor(len(clips))}
            if ds.told is not None:
                batch["told"] = ds.told[index] if len(index) else torch.zeros_like(ds.told[:1])
            yield batch

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
    clip: Tensor,
    max_len: int | None,
    shuffle: bool,
    augment: Augment | None,
    generator: torch.Generator,
) -> tuple[Tensor, bool]:
    """A clip as one row: uint8 (T,), T <= max_len; (1 + T,) and True if the class before is first.

    That class is known where the row is not the clip's beginning.
    """
    limit = len(clip) if max_len is None else max_len
    begin = _begin(len(clip), limit, shuffle, generator)
    known = begin > 0
    row = clip[begin - known : begin + limit]
    if augment is not None:
        row = augment(row, generator)
    return row if max_len is None else row[: known + max_len], known


def _begin(length: int, limit: int, shuffle: bool, generator: torch.Generator) -> int:
    """Where a crop of `limit` samples begins: anywhere that fits, or at the start."""
    if not shuffle or length <= limit:
        return 0
    return int(torch.randint(length - limit + 1, (), generator=generator))


def _assemble(
    rows: list[tuple[Tensor, bool]], pad_multiple: int, device: torch.device
) -> dict[str, Tensor]:
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
    """The same batches, made ahead in a thread; in pinned memory, from where copies are quick."""
    ready: queue.Queue = queue.Queue(depth)
    ended = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not ended.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put({k: v.pin_memory() if pin else v for k, v in batch.items()})
                if ended.is_set():
                    return
        except BaseException as error:  # raised where the batches are used
            put(error)
        else:
            put(None)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()


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
            raise UserError(f"gain_db >= 0 and 0 <= speed < 1 are needed, not {self}")

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
