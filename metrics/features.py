"""From audio files to a classifier's outputs: read in parallel, in batches, cached.

    clips = listed("generated")                       # a folder, or a CSV with column `path`
    made = extract("generated", clips, classifier, cache_dir="cache")
    made.probs, made.features, made.broken

Cached outputs are found by file content, part, classifier and the code that reads audio: a second
run only hashes the files, and nothing stale is found.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import sys
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from torch.nn import functional as F

from metrics.classifier import Classifier
from rawaudio import audio, data
from rawaudio.command import cache_folder
from rawaudio.data import Clip, clip_digest, read_clip, read_csv, read_samples
from rawaudio.errors import UserError
from rawaudio.files import natural, write_atomically
from rawaudio.progress import watched

SURE = 0.9  # probability from which the classifier counts as sure


@dataclass
class ClipSet:
    """A classifier's outputs for clips, in their order, without those that cannot be read."""

    name: str
    probs: np.ndarray  # float64 (n, C)
    features: np.ndarray  # float32 (n, D)
    clips: list[Clip] = field(default_factory=list)  # of the rows; empty for published caches
    broken: list[tuple[Clip, str]] = field(default_factory=list)  # (clip, reason)
    changed: list[str] = field(default_factory=list)  # what was done to clips, in words

    def __len__(self) -> int:
        return len(self.probs)

    def take(self, rows: np.ndarray) -> ClipSet:
        """The set of these rows alone."""
        clips = [self.clips[i] for i in rows]
        return replace(self, probs=self.probs[rows], features=self.features[rows], clips=clips)

    def truth(self, labels: list[str]) -> np.ndarray | None:
        """Index of the label that each clip was told or is known to say: (n,).

        None where the clips have no labels, or other ones than the classifier's.
        """
        if not self.clips or not {clip.label for clip in self.clips} <= set(labels):
            return None
        return np.array([labels.index(clip.label) for clip in self.clips])

    def heard(self, truth: np.ndarray) -> np.ndarray:
        """Whether the classifier is sure of the true label of each clip: bool (n,)."""
        return self.probs[np.arange(len(truth)), truth] >= SURE


def listed(source: str | os.PathLike, data_root: str | os.PathLike | None = None) -> list[Clip]:
    """The clips of a folder (not of its subfolders), 2.wav before 10.wav, or of a CSV, in order.

    Clips of rawaudio.generate have the label that they were told, from its samples.csv. Raises
    FileNotFoundError if `source` is not there, ValueError if it names no clips.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} is not there: give a folder of clips, or a CSV of them")
    if not source.is_dir():
        return read_csv(source, data_root)
    files = [path for path in source.iterdir() if path.suffix.lower() in audio.AUDIO_SUFFIXES]
    files = [path for path in files if not path.name.startswith(".")]
    if not files:
        raise UserError(
            f"{source}: no audio in this folder ({' '.join(audio.AUDIO_SUFFIXES)}; subfolders are "
            "not searched: list their clips in a CSV with a column `path`)"
        )
    told = read_samples(source)
    files.sort(key=lambda path: natural(path.name))
    return [Clip(path, told.get(path.name, {}).get("label", "")) for path in files]


# ---- the classifier's outputs ---------------------------------------------------------------


def extract(
    name: str,
    clips: list[Clip],
    classifier: Classifier,
    *,
    batch_size: int = 64,
    cache_dir: str | os.PathLike | None = None,
    source: str | os.PathLike = "",
) -> ClipSet:
    """Probabilities and features of clips.

    Threads decode files while the classifier works. Files that cannot be read end up in `.broken`.
    name, source: for messages and the cache's file name; a set has one file per classifier. An
    interruption keeps what is done in the cache. Raises ValueError if no clip is left or the
    classifier gives NaN.
    """
    rate, length = classifier.sample_rate, classifier.clip_length
    cache = _Cache(cache_dir, classifier, f"{name}\n{Path(source).absolute()}")
    file_digest = functools.cache(audio.content_digest)

    def load(clip: Clip) -> tuple[bytes, Tensor | None, list[int]] | audio.AudioError:
        try:
            digest = clip_digest(clip, file_digest)
            if digest in cache.rows:
                return digest, None, []
            return digest, *read_padded(clip, rate, length)
        except audio.AudioError as error:  # returned: one bad file must not end the others
            return error

    used, digests, broken = [], [], []
    batches = [clips[i : i + batch_size] for i in range(0, len(clips), batch_size)]
    with ThreadPool(min(8, os.cpu_count() or 1)) as threads, cache:
        pending = threads.map_async(load, batches[0])
        for k, batch in enumerate(watched(batches, name, len(clips), each=batch_size)):
            loaded = pending.get()
            pending = threads.map_async(load, batches[k + 1] if k + 1 < len(batches) else [])
            new = {}
            for clip, result in zip(batch, loaded, strict=True):
                if isinstance(result, audio.AudioError):
                    broken.append((clip, result.reason))
                    continue
                digest, wav, facts = result
                used.append(clip)
                digests.append(digest)
                if wav is not None:
                    new[digest] = wav, facts
            if new:
                cache.add(classifier, new)
        if not used:
            clip, reason = broken[0]
            raise UserError(
                f"{name}: none of {len(clips):,} clips can be used; the first: {clip}: {reason}. "
                "data_root= is the folder that the paths of a CSV start from"
            )
        rows = cache.take(digests)
    logits, features, rates, lengths = np.split(rows, cache.columns, axis=1)
    if (bad := ~np.isfinite(rows).all(1)).any():
        raise UserError(
            f"{name}: the classifier gives NaN for {bad.sum():,} clips, the first is "
            f"{used[int(bad.argmax())]}: its weights are damaged, or do not suit the device"
        )
    changed = [
        f"{(rates == own).sum():,} clips resampled from {own:,.0f} to {rate:,} Hz"
        for own in np.unique(rates)
        if own != rate
    ]
    if n_long := int((lengths > length).sum()):
        changed.append(f"{n_long:,} clips cut to their first {length / rate:g} s")
    probs = softmax(logits.astype(np.float64), axis=1)
    return ClipSet(name, probs, np.ascontiguousarray(features), used, broken, changed)


def read_padded(clip: Clip, sample_rate: int, length: int) -> tuple[Tensor, list[int]]:
    """A clip at `sample_rate` (Hz), cut or zero-padded to (length,), mono; and what it was before:
    its own rate, and its samples at the new one. Raises AudioError.
    """
    wav, _, own_rate, _ = read_clip(clip, sample_rate)
    return F.pad(wav[:length], (0, max(0, length - len(wav)))), [own_rate, len(wav)]


# ---- the cache ------------------------------------------------------------------------------


class _Cache:
    """A classifier's outputs by the digest of the clip, in memory and in one .npz file.

    rows: digest -> float32 (C + D + 2,): logits, features, the clip's own rate, its length.
    As a context it writes what was added, however the block ends.
    """

    def __init__(self, folder: str | os.PathLike | None, classifier: Classifier, name: str) -> None:
        # Any edit of the code that reads audio makes a new key: better slow once than wrong.
        code = b"".join(Path(f).read_bytes() for f in (audio.__file__, data.__file__, __file__))
        self.made_by = hashlib.sha256(code + classifier.fingerprint.encode()).hexdigest()[:24]
        key = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:24]
        self.path = cache_folder(folder) / f"{key}-{self.made_by}.npz" if folder else None
        self.columns = np.cumsum([len(classifier.labels), classifier.n_features, 1])  # their ends
        self.rows: dict[bytes, np.ndarray] = {}
        self.changed = False
        arrays = load_arrays(self.path) if self.path else None
        if arrays is None:
            return
        digests, rows = arrays.get("digests", np.empty(0)), arrays.get("rows", np.empty(0))
        shape = len(digests), self.columns[-1] + 1
        if str(arrays.get("made_by")) != self.made_by or rows.shape != shape:
            print(f"{self.path} is of another classifier: computed again", file=sys.stderr)
            return
        self.rows = {digest.tobytes(): row for digest, row in zip(digests, rows, strict=True)}

    def add(self, classifier: Classifier, new: dict[bytes, tuple[Tensor, list[int]]]) -> None:
        """Classifies new clips: digest -> audio (T,), what `read_padded` says of it."""
        wavs, facts = zip(*new.values(), strict=True)
        device = next(classifier.parameters(), torch.empty(0)).device
        with torch.inference_mode():
            outputs = [x.float().cpu() for x in classifier(torch.stack(wavs).to(device))]
        rows = torch.cat([*outputs, torch.tensor(facts, dtype=torch.float32)], 1).numpy()
        self.rows |= zip(new, rows, strict=True)
        self.changed = True

    def take(self, digests: list[bytes]) -> np.ndarray:
        """Rows of these clips; the cache forgets others, of files that are gone or were others."""
        self.changed |= self.rows.keys() != set(digests)
        self.rows = {digest: self.rows[digest] for digest in digests}
        return np.stack([self.rows[digest] for digest in digests])

    def __enter__(self) -> _Cache:
        return self

    def __exit__(self, *error: object) -> None:
        if self.changed and self.rows and self.path is not None:
            digests = np.stack([np.frombuffer(digest, np.uint8) for digest in self.rows])
            rows = np.stack(list(self.rows.values()))
            save_arrays(self.path, made_by=np.array(self.made_by), digests=digests, rows=rows)


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz file; None if it is not there or, with a line of notice, damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:  # a zip: every array has a checksum
            return dict(file)
    except Exception as error:  # a damaged one raises nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"{path} is damaged ({reason}): computed again", file=sys.stderr)
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
    name: str, folder: str | os.PathLike, split: str, classifier: Classifier | None
) -> ClipSet:
    """The set of a published cache: {split}_probs.npy (n, C) and {split}_activations.npy (n, D).

    split: "train" or "test", as state-spaces/s4 names them. Raises FileNotFoundError or ValueError
    naming the file that is missing, damaged or of another classifier than this one.
    """
    widths = (len(classifier.labels), classifier.n_features) if classifier else (None, None)
    probs, features = (
        _read_npy(Path(folder, f"{split}_{part}.npy"), width)
        for part, width in zip(("probs", "activations"), widths, strict=True)
    )
    if len(probs) != len(features):
        raise UserError(
            f"{folder}: {split}_probs.npy has {len(probs):,} clips, {split}_activations.npy "
            f"{len(features):,}: they are of different runs"
        )
    if (abs(probs.sum(1) - 1) > 1e-3).any() or (probs < 0).any():
        raise UserError(f"{folder}/{split}_probs.npy holds no probabilities: rows sum to 1")
    return ClipSet(name, probs.astype(np.float64), features.astype(np.float32))


def _read_npy(path: Path, width: int | None) -> np.ndarray:
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
    return x
