"""From audio files to what a classifier says about them: read in parallel, in batches, kept.

    clips = listed("generated")                       # a folder, or a CSV with column `path`
    found = extract("generated", clips, classifier, cache_dir="cache")
    found.probs, found.features, found.broken

What was worked out is kept by file content, part, classifier and the code that reads audio: a
second run only hashes the files, and nothing stale can be found.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rawaudio import audio, data
from rawaudio.command import cache_folder
from rawaudio.data import Clip, clip_digest, read_clip, read_csv, read_samples
from rawaudio.errors import UserError
from rawaudio.files import write_atomically
from rawaudio.progress import watched

ROWS = 32_768  # clips kept per set and classifier: 130 MB at 1,024 features


@dataclass
class ClipSet:
    """What a classifier says about clips, in their order, without those that cannot be read."""

    name: str
    probs: np.ndarray  # float64 (n, C)
    features: np.ndarray  # float32 (n, D)
    clips: list[Clip] = field(default_factory=list)  # of the rows; empty for published caches
    broken: list[tuple[Clip, str]] = field(default_factory=list)  # (clip, reason)
    changed: list[str] = field(default_factory=list)  # what was done to clips, in words

    def __len__(self) -> int:
        return len(self.probs)

    def take(self, rows: np.ndarray | slice) -> ClipSet:
        """The set of these rows alone."""
        chosen = np.arange(len(self))[rows]
        clips = [self.clips[i] for i in chosen] if self.clips else []
        return replace(self, probs=self.probs[chosen], features=self.features[chosen], clips=clips)


# ---- which files ----------------------------------------------------------------------------


def listed(source: str | os.PathLike, data_root: str | os.PathLike | None = None) -> list[Clip]:
    """The clips of a folder (not of its subfolders), 2.wav before 10.wav, or of a CSV, in order.

    Clips that rawaudio.generate made have what they were told, a label maybe, from its samples.csv.
    Raises FileNotFoundError if `source` is not there, ValueError if it names no clips.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} is not there: give a folder of clips, or a CSV of them")
    if not source.is_dir():
        return read_csv(source, data_root)
    files = [p for p in source.iterdir() if p.suffix.lower() in audio.AUDIO_SUFFIXES]
    files = [p for p in files if not p.name.startswith(".")]
    if not files:
        raise UserError(
            f"{source}: no audio in this folder ({' '.join(audio.AUDIO_SUFFIXES)}; subfolders are "
            "not searched: list their clips in a CSV with a column `path`)"
        )
    rows, files = read_samples(source), sorted(files, key=_natural)
    return [Clip(path, rows.get(path.name, {}).get("label", "")) for path in files]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts numbers inside names by value."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


# ---- what the classifier says ---------------------------------------------------------------


def extract(
    name: str,
    clips: list[Clip],
    classifier: Any,
    *,
    batch_size: int = 64,
    cache_dir: str | os.PathLike | None = None,
    source: str | os.PathLike = "",
    progress: bool = True,
) -> ClipSet:
    """Probabilities and features of clips.

    Files are decoded in threads while the classifier works, mixed down to mono, resampled to
    `classifier.sample_rate` (Hz) and cut or zero-padded to `classifier.clip_length` samples. Files
    that cannot be read end up in `.broken`. name, source: for messages, and for the cache's file
    name; a set keeps one file per classifier. An interruption keeps what was done.

    Raises ValueError if no clip is left or the classifier gives NaN.
    """
    store = _Store(cache_dir, classifier, f"{name}\n{Path(source).absolute()}")
    batches = [clips[i : i + batch_size] for i in range(0, len(clips), batch_size)]

    rate, length = classifier.sample_rate, classifier.clip_length
    of_file = functools.cache(audio.content_digest)

    def load(clip: Clip) -> tuple[bytes, Tensor | None, tuple[int, int]] | audio.AudioError:
        try:
            digest = clip_digest(clip, of_file)
            if digest in store.known:
                return digest, None, (0, 0)
            return digest, *read_padded(clip, rate, length)
        except audio.AudioError as error:  # returned: one bad file must not end the others
            return error

    device = next(classifier.parameters(), torch.empty(0)).device
    used, digests, broken = [], [], []
    with ThreadPool(min(8, os.cpu_count() or 1)) as threads, store:
        ahead = threads.map_async(load, batches[0])
        for k, batch in enumerate(
            watched(batches, name, len(clips), each=batch_size, show=progress)
        ):
            loaded = ahead.get()
            if k + 1 < len(batches):
                ahead = threads.map_async(load, batches[k + 1])
            new = {}
            for clip, result in zip(batch, loaded, strict=True):
                if isinstance(result, audio.AudioError):
                    broken.append((clip, result.reason))
                    continue
                digest, wav, facts = result
                if wav is not None:
                    new[digest] = wav, facts
                used.append(clip)
                digests.append(digest)
            if new:
                wavs, facts = zip(*new.values(), strict=True)
                with torch.inference_mode():
                    logits, features = classifier(torch.stack(wavs).to(device))
                store.add(list(new), logits, features, facts)
        store.bound(digests)
    if not used:
        clip, reason = broken[0]
        raise UserError(
            f"{name}: none of {len(clips):,} clips can be used; the first: {clip}: {reason}. "
            "data_root= is the folder that the paths of a CSV start from"
        )
    logits, features, facts = store.rows(digests)
    bad = ~(np.isfinite(logits).all(1) & np.isfinite(features).all(1))
    if bad.any():
        raise UserError(
            f"{name}: the classifier gives NaN for {bad.sum():,} clips, the first is "
            f"{used[int(bad.argmax())]}: its weights are damaged, or do not suit the device"
        )
    changed = [
        f"{(facts[:, 0] == r).sum():,} clips resampled from {r:,} to {rate:,} Hz"
        for r in np.unique(facts[:, 0]).tolist()
        if r != rate
    ]
    if n_long := int((facts[:, 1] > length).sum()):
        changed.append(f"{n_long:,} clips cut to their first {length / rate:g} s")
    return ClipSet(name, _softmax(logits), features, used, broken, changed)


def read_padded(clip: Clip, sample_rate: int, length: int) -> tuple[Tensor, tuple[int, int]]:
    """A clip at `sample_rate` (Hz), cut or zero-padded to (length,), mono; and what it was before:
    its own rate, and its samples at the new one. Raises AudioError.
    """
    wav, _, own_rate, _ = read_clip(clip, sample_rate)
    return F.pad(wav[:length], (0, max(0, length - len(wav)))), (own_rate, len(wav))


def _softmax(logits: np.ndarray) -> np.ndarray:
    """In double: no probability becomes 0 that is above 1e-300."""
    x = logits.astype(np.float64)
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# ---- the cache ------------------------------------------------------------------------------


class _Store:
    """Rows of a classifier's output by the digest of the clip, in memory and in one .npz file.

    As a context it writes what was added, however the block ends.
    """

    COLUMNS = ("logits", "features", "facts")

    def __init__(self, folder: str | os.PathLike | None, classifier: Any, name: str) -> None:
        # Any edit of the code that reads audio makes a new key: better slow once than wrong.
        code = b"".join(Path(f).read_bytes() for f in (audio.__file__, data.__file__, __file__))
        made_by = hashlib.sha256(code + classifier.fingerprint.encode()).hexdigest()[:24]
        key = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:24]
        self.made_by = made_by
        self.shape = len(classifier.labels), classifier.n_features
        self.path = cache_folder(folder) / f"{key}-{made_by}.npz" if folder else None
        self.known: dict[bytes, tuple[np.ndarray, ...]] = {}  # logits, features, (rate, length)
        self.changed = False
        if self.path is not None:
            self._read()

    def add(
        self,
        digests: list[bytes],
        logits: Tensor,
        features: Tensor,
        facts: Sequence[tuple[int, int]],
    ) -> None:
        logits, features = (x.detach().float().cpu().numpy() for x in (logits, features))
        if (logits.shape[1:] + features.shape[1:]) != self.shape:
            raise UserError(
                f"the classifier gives {logits.shape[1]} classes and {features.shape[1]} "
                f"features where it promised {self.shape[0]} and {self.shape[1]}"
            )
        rows = zip(logits, features, np.array(facts), strict=True)
        self.known |= zip(digests, rows, strict=True)
        self.changed = True

    def bound(self, digests: list[bytes]) -> None:
        """Forget the oldest rows beyond ROWS, of files that are gone or were others."""
        asked = set(digests)
        excess = len(self.known) - max(ROWS, len(asked))
        for digest in [d for d in self.known if d not in asked][: max(0, excess)]:
            del self.known[digest]
            self.changed = True

    def rows(self, digests: list[bytes]) -> tuple[np.ndarray, ...]:
        """logits (n, C) and features (n, D), float32; (rate in Hz, length in samples) (n, 2)."""
        return tuple(map(np.stack, zip(*(self.known[key] for key in digests), strict=True)))

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *error: object) -> None:
        if self.changed:
            self._write()

    def _read(self) -> None:
        found = load_arrays(self.path)
        if found is None:
            return
        columns = [found.get(name) for name in self.COLUMNS]
        n = len(found["digests"]) if "digests" in found else -1
        expected = [(n, width) for width in (*self.shape, 2)]
        shapes = [getattr(x, "shape", None) for x in columns]
        if str(found.get("made_by")) != self.made_by or shapes != expected:
            print(f"{self.path} is of another classifier: worked out anew", file=sys.stderr)
            return
        keys = [row.tobytes() for row in found["digests"]]
        self.known = dict(zip(keys, zip(*columns, strict=True), strict=True))

    def _write(self) -> None:
        if self.path is not None and self.known:
            digests = np.stack([np.frombuffer(key, np.uint8) for key in self.known])
            columns = dict(zip(self.COLUMNS, self.rows(list(self.known)), strict=True))
            save_arrays(self.path, made_by=np.array(self.made_by), digests=digests, **columns)


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz file; None if it is not there or, with a line of notice, damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:  # a zip: every array has a checksum
            return dict(file)
    except Exception as error:  # a damaged one raises nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"{path} is damaged ({reason}): worked out anew", file=sys.stderr)
        return None


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes an .npz file, whole or not at all; a disk that will not take it is no error."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        print(f"{path} is not kept: {error.strerror or error}", file=sys.stderr)


# ---- published caches -----------------------------------------------------------------------


def read_published(
    name: str, folder: str | os.PathLike, split: str, n_classes: int | None, n_features: int | None
) -> ClipSet:
    """The set of a published cache: {split}_probs.npy (n, C) and {split}_activations.npy (n, D).

    split: "train" or "test", as state-spaces/s4 names them. n_classes, n_features: of the
    classifier at hand, None where there is none. Raises FileNotFoundError or ValueError naming the
    file that is missing, damaged or of another classifier.
    """
    arrays = []
    for what, width in (("probs", n_classes), ("activations", n_features)):
        path = Path(folder, f"{split}_{what}.npy")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; a published cache has this file")
        try:
            x = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged: {reason}; download it again") from None
        if not isinstance(x, np.ndarray) or x.ndim != 2 or x.dtype.kind != "f" or not x.size:
            raise UserError(f"{path}: expected an array of numbers (clips, columns)")
        if not np.isfinite(x).all():
            raise UserError(f"{path} holds NaN or infinity; download it again")
        if width is not None and x.shape[1] != width:
            raise UserError(
                f"{path} has {x.shape[1]} columns, classifier= gives {width}: the cache is of "
                "another classifier, give the one that made it (for SC09: resnext.pth)"
            )
        arrays.append(x)
    probs, features = arrays
    if len(probs) != len(features):
        raise UserError(
            f"{folder}: {split}_probs.npy has {len(probs):,} clips, {split}_activations.npy "
            f"{len(features):,}: they are of different runs"
        )
    if (abs(probs.sum(1) - 1) > 1e-3).any() or (probs < 0).any():
        raise UserError(f"{folder}/{split}_probs.npy holds no probabilities: rows sum to 1")
    return ClipSet(name, probs.astype(np.float64), features.astype(np.float32))
