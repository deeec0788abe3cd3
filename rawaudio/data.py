"""Clips for training: a CSV of paths -> samples in memory; rawaudio/batches.py makes batches of it.

    ds = ClipDataset("splits/fsdd-train.csv", 8000, data_root="fsdd/recordings")
    ds = ClipDataset("splits/piano-train.csv", 16000, data_root="piano", sample_len=128000)

Every file is decoded once and kept as one mu-law byte per sample (the 18,620 clips of SC09 are
0.3 GB), or as 16-bit PCM for models of waveforms; long recordings (`sample_len`) in a mapped file.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.nn import functional as F

from rawaudio import audio
from rawaudio.command import cache_folder
from rawaudio.errors import UserError
from rawaudio.files import write_atomically
from rawaudio.progress import watched
from rawaudio.quantizers import MULAW, SILENCE, Quantizer, quantizer

log = logging.getLogger(__name__)

NEAR_SILENCE = 1e-3  # a peak that is not made louder: it would be noise
MIN_SAMPLES = 2  # a shorter clip has no sample that follows another
PLACE = ("path", "start", "stop")  # columns that tell where a clip is
SAMPLES = "samples.csv"  # what rawaudio.generate writes beside its clips


@dataclasses.dataclass(frozen=True)
class Clip:
    """One row of a split: where the audio is, and what it says ("" if the CSV has no label).

    A part of a recording begins `start` seconds from its beginning and ends at `stop`. columns
    holds what else the row says, by the name of the column.
    """

    path: Path
    label: str = ""
    start: float = 0.0
    stop: float | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

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
    (seconds; empty: the whole file) take a part of a recording. Relative paths start from
    `data_root` if given; else from the CSV's own folder, and where nothing is there, from the
    current one. A path may lead out of `data_root` (../, absolute): whoever writes the CSV chooses
    which files are read, though as audio and nothing else. Spaces around a path belong to it if
    such a file is there.

    Raises FileNotFoundError if the CSV or data_root is not there, ValueError if the CSV has no
    `path` column, no rows or is not CSV.
    """
    csv_path = Path(csv_path)
    if not csv_path.is_file():
        what = "is not a file" if csv_path.exists() else "is not there"
        raise FileNotFoundError(f"{csv_path} {what}; split_data.py writes such a CSV")
    if data_root is not None and not Path(data_root).is_dir():
        raise FileNotFoundError(f"data_root={data_root} is not a folder")
    clips = []
    try:
        with csv_path.open(encoding="utf-8-sig", newline="") as file:  # -sig: drops a BOM
            reader = csv.DictReader(file, skipinitialspace=True, restval="")
            columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            if columns and "path" not in columns:
                names = ", ".join(columns)
                raise UserError(f"{csv_path} has no column `path`; its columns: {names}")
            for row in reader:
                where = f"{csv_path}, line {reader.line_num}"
                cells = {name: row[name].strip() for name in columns}
                if not cells["path"]:
                    raise UserError(f"{where}: the path is empty")
                path = _resolve(row["path"], csv_path.parent, data_root)
                if not os.path.exists(path):
                    path = _resolve(cells["path"], csv_path.parent, data_root)
                others = {name: cells[name] for name in columns if name not in PLACE}
                clips.append(Clip(path, cells.get("label", ""), *_part(cells, where), others))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{csv_path} is not a UTF-8 CSV: {error}") from error
    if not clips:
        raise UserError(f"{csv_path} is empty; a split is a header `path,label` and rows")
    return clips


def _part(cells: dict[str, str], where: str) -> tuple[float, float | None]:
    """Columns `start` and `stop` of a row, in seconds."""
    given = [cells.get("start", ""), cells.get("stop", "")]
    try:
        start, stop = float(given[0] or 0), float(given[1] or math.inf)
    except ValueError:
        start = stop = math.nan
    if not 0 <= start < stop:
        expected = "expected seconds, 0 <= start < stop"
        raise UserError(f"{where}: start,stop = {','.join(given)}: {expected}")
    return start, None if stop == math.inf else stop


def _resolve(name: str, csv_folder: Path, data_root: str | os.PathLike | None) -> Path:
    if data_root is not None:
        return Path(data_root) / name  # an absolute path stays what it is
    beside = csv_folder / name
    return beside if os.path.exists(beside) or not os.path.exists(name) else Path(name)


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
        count = Counter(clip.columns[name] for clip in clips)
        if "" in count:
            first = next(clip.path for clip in clips if not clip.columns[name])
            raise UserError(
                f"{csv_path}: {count['']:,} clips have no {name}, the first is {first}; a model is "
                "told a column only if every training clip has a value"
            )
        values[name], counts[name] = list(count), list(count.values())
    return values, counts


def to_wave(samples: Tensor, quantizer: Quantizer = MULAW) -> Tensor:
    """Samples as a data set keeps them, uint8 classes or int16 PCM: float32 in [-1, 1]."""
    return quantizer.decode(samples) if samples.dtype == torch.uint8 else samples.float() / 2**15


def from_wave(wav: Tensor, dtype: torch.dtype, quantizer: Quantizer = MULAW) -> Tensor:
    """The inverse of `to_wave`; values beyond [-1, 1] are clipped."""
    if dtype == torch.uint8:
        return quantizer.encode(wav, check=False).to(torch.uint8)
    return (wav * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """Makes a clip's samples, in the form in which a data set keeps them."""

    sample_rate: int
    dtype: torch.dtype
    append_silence: int
    peak: float | None
    # not of mu-law's caches, which are named after what stands above
    quantizer: str = dataclasses.field(default="mulaw", repr=False)
    sample_len: int | None = dataclasses.field(default=None, repr=False)

    def decode(self, clip: Clip) -> tuple[bytes, dict[str, Any]]:
        """A clip's samples, and what is known of them, as JSON can hold it: length, and the file's
        rate and channels; of a clip that is left out, kind and reason.
        """
        try:
            wav, _, rate, channels = read_clip(clip, self.sample_rate)
            if len(wav) < MIN_SAMPLES:
                remedy = f"a clip has {MIN_SAMPLES} samples or more"
                raise audio.AudioError(clip.path, "too short", f"{len(wav)} sample", remedy)
        except audio.AudioError as error:  # one bad file must not end the others
            return b"", {"kind": error.kind, "reason": error.reason}
        if self.peak is not None and (loudest := float(wav.abs().max())) > NEAR_SILENCE:
            wav *= self.peak / loudest
        known = {"length": len(wav) + self.append_silence, "rate": rate, "channels": channels}
        chosen = quantizer(self.quantizer)
        if chosen.of_recording and self.dtype == torch.uint8:
            pieces = wav.split(self.sample_len or len(wav))
            classes = torch.cat([chosen.of_recording(piece) for piece in pieces]).to(torch.uint8)
            classes = F.pad(classes, (0, self.append_silence), value=SILENCE)
            return classes.numpy().tobytes(), known
        wav = F.pad(wav, (0, self.append_silence))
        # in blocks: mu-law takes several times its input
        blocks = [from_wave(block, self.dtype).numpy().tobytes() for block in wav.split(2**20)]
        return b"".join(blocks), known

    def write(
        self, clips: list[Clip], sink: BinaryIO, progress: bool, threads: int = 8
    ) -> list[dict[str, Any]]:
        """Writes the samples of all clips, end to end; returns what is known of each."""
        records = []
        with ThreadPool(min(threads, os.cpu_count() or 1)) as pool:
            # imap keeps the order, so a split is the same data set on every machine
            decoded = pool.imap(self.decode, clips, chunksize=threads)
            for samples, record in watched(decoded, "reading", len(clips), show=progress):
                sink.write(samples)
                records.append(record)
        return records

    def cached(
        self, clips: list[Clip], folder: str | os.PathLike | None, progress: bool
    ) -> tuple[Path, list[dict[str, Any]]]:
        """The file that `write` wrote, once for the same audio, and what is known of each clip."""
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        folder = cache_folder(folder or caches / "simple-sashimi")
        key = hashlib.sha256(f"3 {self}".encode())  # 3: of this format, and of how files are read
        if self.quantizer != "mulaw":
            key.update(f"{self.quantizer} {self.sample_len}".encode())
        of_file = functools.cache(audio.content_digest)
        for clip in clips:
            try:
                key.update(clip_digest(clip, of_file))
            except audio.AudioError as error:
                key.update(error.kind.encode())
        path = folder / f"{key.hexdigest()[:24]}.samples"
        index = path.with_suffix(".json")
        try:
            records = json.loads(index.read_text())
            length = sum(record.get("length", 0) for record in records)
            if path.stat().st_size == length * self.dtype.itemsize:
                return path, records
        except (OSError, ValueError):
            pass  # not there, or not whole
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with draft.open("wb") as sink:  # too large for memory; hours may be in one file
                records = self.write(clips, sink, progress, threads=2)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        # last: with it, the samples are there
        write_atomically(index, json.dumps(records).encode())
        return path, records


class ClipDataset:
    """All clips of a split: `ds[i]` is clip i, uint8 classes (T_i,), with `pcm` int16 (T_i,).

    data       uint8 or int16 (sum of T_i,): every clip, end to end
    offsets    int64 (n + 1,): clip i is data[offsets[i]:offsets[i + 1]]
    lengths    int64 (n,): T_i, in samples, appended silence included
    clips      list of Clip: path and label of each
    skipped    list of (Clip, reason): those left out, in the CSV's order
    broken     dict path -> reason: files left out since, because they could not be read again
    told       int64 (n, C): indices of the clips' conditions, see `tell`; None before

    Files are mixed down to mono and resampled to `sample_rate` (Hz) where they differ; those that
    cannot be used (see audio.AudioError) and clips under 2 samples are skipped. The logger
    "rawaudio.data" says how many.
    append_silence: samples of silence at the end of every clip, as part of it: a model of trimmed
    clips learns to stop. peak: in (0, 1], of every clip that is above -60 dB; None: as it is.
    quantizer: how classes are made of audio, see quantizers.py.
    sample_len: of the clips, the last one shorter, into which recordings, however long, are cut.
    `data` is then a map of a file in the folder `cache` (~/.cache/simple-sashimi if None), made
    once and named after what the audio files hold.

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
        quantizer: str = "mulaw",
    ) -> None:
        if append_silence < 0:
            raise UserError(f"append_silence is a number of samples >= 0, not {append_silence}")
        if peak is not None and not 0 < peak <= 1:
            raise UserError(f"peak is above 0 and at most 1, not {peak}")
        if sample_len is not None and sample_len < MIN_SAMPLES:
            raise UserError(f"sample_len is {MIN_SAMPLES} samples or more, not {sample_len}")
        self.sample_rate, self.quantizer = sample_rate, quantizer
        self.broken: dict[Path, str] = {}
        self.told: Tensor | None = None
        self.mapped: BinaryIO | None = None
        listed = read_csv(csv_path, data_root)
        dtype = torch.int16 if pcm else torch.uint8
        decoder = _Decoder(sample_rate, dtype, append_silence, peak, quantizer, sample_len)
        if sample_len is None:
            sink = io.BytesIO()
            records = decoder.write(listed, sink, progress)
        else:
            path, records = decoder.cached(listed, cache, progress)
        self.skipped = []
        self.clips = []
        lengths = []
        for clip, record in zip(listed, records, strict=True):
            if "reason" in record:
                self.skipped.append((clip, record["reason"]))
                continue
            length = record["length"]
            for begin in range(0, length, sample_len or length):
                self.clips.append(clip)
                lengths.append(min(sample_len or length, length - begin))
        self._report(records, csv_path)
        self.lengths = torch.tensor(lengths)
        self.offsets = F.pad(self.lengths.cumsum(0), (1, 0))
        if sample_len is None:
            self.data = torch.frombuffer(sink.getbuffer(), dtype=dtype)
        else:
            # a private map: pages come from the file when they are read, and none is written
            self.data = torch.from_file(str(path), False, int(self.offsets[-1]), dtype=dtype)
            self.mapped = path.open("rb")

    def _report(self, records: list[dict[str, Any]], csv_path: str | os.PathLike) -> None:
        """Says which files are left out and what was done to the others, a line for each kind."""
        used = [record for record in records if "length" in record]
        if self.skipped:
            kinds = Counter(record["kind"] for record in records if "kind" in record)
            counts = ", ".join(f"{k:,} {kind}" for kind, k in kinds.most_common())
            clip, reason = self.skipped[0]
            what = f"of {len(records):,} files in {csv_path}: {counts}; the first: {clip}: {reason}"
            if not used:
                hint = "data_root= is the folder that the paths start from"
                raise UserError(f"no clip is left {what}. {hint}")
            log.warning(f"skipped {len(self.skipped):,} {what}")
        rate, all_used = f"{self.sample_rate:,} Hz", f"of {len(used):,} clips"
        rates = [record["rate"] for record in used if record["rate"] != self.sample_rate]
        if rates:
            others = ", ".join(f"{other:,} Hz" for other in sorted(set(rates)))
            log.warning(f"resampled {len(rates):,} {all_used} from {others} to {rate} ({csv_path})")
        if mixed := sum(record["channels"] > 1 for record in used):
            log.warning(f"mixed {mixed:,} {all_used} down to mono ({csv_path})")

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
            cells = [clip.columns.get(name, "") for clip in self.clips]
            self.told[:, i] = torch.tensor([index.get(cell, 0) for cell in cells])
            if strange := [cell or "none" for cell in cells if cell not in index]:
                kinds = list(dict.fromkeys(strange))
                some = ", ".join(kinds[:5] + ["..."] * (len(kinds) > 5))
                what = f"{len(strange):,} of {len(self):,} clips have a {name}"
                log.warning(f"{what} that is not in the training set ({some}): not told")

    def leave_out(self, i: int, error: audio.AudioError) -> None:
        """Note that clip i broke since the data set was read; one warning per file."""
        path = self.clips[i].path
        if path not in self.broken:
            self.broken[path] = error.reason
            log.warning("left out from now on: %s: %s", path, error)
