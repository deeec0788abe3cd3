"""Read, write and resample audio: the one place that knows file formats.

    wav, rate = read("clip.flac", sample_rate=16000)    # float32 (T,) in [-1, 1], mono
    decode("hours.mp3", 16000, start=60, stop=68).wav   # eight seconds of it
    write("out/clip.wav", wav, rate)                    # 16-bit PCM, never half-written

Decoding is libsndfile's (package soundfile). What it lets pass in silence - a wav cut short, a
file of NaN - is refused here, so that whatever comes back can be trained on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import numbers
import os
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.signal
import soundfile
import torch
from torch import Tensor

from rawaudio.errors import UserError

log = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff")
CONVERT = f"copy it again, or convert it to one of {' '.join(AUDIO_SUFFIXES)}"  # a remedy

# Decoded mp3 and float files pass full scale by a little and are clipped; a peak beyond this is
# no overshoot but another scale (int16 values stored as float).
MAX_PEAK = 2.0
# The same for generated audio on its way to a file: rounding, not loudness.
OVERSHOOT = 1e-3
RATES = (1_000, 768_000)  # Hz; a header that says another is damaged

BLOCK = 2**20  # samples decoded at once, of all channels: 4 MiB
RUN_UP = 2**14  # frames decoded before a part and dropped: lossy decoders build on some before
UNKNOWN = 2**62  # frames; libsndfile's own mark for an unknown length is 2^63 - 1


class AudioError(UserError):
    """A file that cannot be used. `kind` is the reason in a word or two, for counting."""

    def __init__(self, path: str | os.PathLike, kind: str, detail: str, remedy: str) -> None:
        super().__init__(path, kind, detail, remedy)
        self.path, self.kind, self.detail, self.remedy = Path(path), kind, detail, remedy

    @property
    def reason(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}; {self.remedy}"


class Sound(NamedTuple):
    """Decoded audio, and what its file holds."""

    wav: Tensor  # float32 (T,) in [-1, 1], T >= 1, mono
    rate: int  # of wav, in Hz
    own_rate: int  # of the file, in Hz
    channels: int  # of the file; wav is their mean


def read(path: str | os.PathLike, sample_rate: int | None = None) -> tuple[Tensor, int]:
    """One file as mono audio: `wav` and `rate` of what `decode` gives, and raises."""
    return decode(path, sample_rate)[:2]


def decode(
    path: str | os.PathLike,
    sample_rate: int | None = None,
    start: float = 0.0,
    stop: float | None = None,
) -> Sound:
    """One file, or the part of it from `start` to `stop` (seconds; None: its end).

    The audio comes at `sample_rate` (Hz) if given, resampled when the file's differs, else at the
    file's own. Channels are mixed down to their mean. Overshoot (float and lossy formats) is
    clipped up to a peak of MAX_PEAK. What lies before the part is not decoded where the format can
    be sought in, and memory is that of the result and of one block.

    Raises ValueError for an impossible rate or part, AudioError if the file is missing, not a
    regular file, unreadable, not audio, damaged or truncated, has a name that is not UTF-8 or a
    sample rate that no audio has, or if the part is empty, holds NaN or infinity, or is on another
    scale than [-1, 1]. (An ogg file is a stream: one cut between two pages is a shorter ogg file,
    and read as such.)
    """
    path = Path(path)
    if sample_rate is not None:
        _check_rate(sample_rate)
    if not 0 <= start < (math.inf if stop is None else stop):
        raise ValueError(f"a part has 0 <= start < stop in seconds, not {start} and {stop}")
    sound, promised, position = _open(path, start)
    with sound, _named(path, "damaged"):
        own_rate, channels = sound.samplerate, sound.channels
        blocks = map(_mono, _checked_blocks(path, sound, promised, position, start, stop))
        rate = own_rate if sample_rate is None else sample_rate
        if rate != own_rate:
            blocks = _resampled(blocks, own_rate, rate)
        samples = bytearray()  # grows in place
        for block in blocks:
            samples += memoryview(block.numpy()).cast("B")
    return Sound(torch.frombuffer(samples, dtype=torch.float32), rate, own_rate, channels)


def duration(path: str | os.PathLike) -> float:
    """Seconds of audio in a file; decoded to the end where its header does not tell.

    Raises AudioError for a file that cannot be opened, or then read.
    """
    path = Path(path)
    sound, frames, position = _open(path)
    with sound, _named(path, "damaged"):
        if frames is None:
            frames = sum(map(len, _blocks(sound, position, None)))
        return frames / sound.samplerate


def content_digest(path: str | os.PathLike) -> bytes:
    """SHA-256 of a file's bytes. Raises AudioError if they cannot be read."""
    path, digest = Path(path), hashlib.sha256()
    with _named(path, "unreadable"):
        _check_regular(path)
        with path.open("rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                digest.update(block)
    return digest.digest()


def find(folder: str | os.PathLike) -> list[Path]:
    """All audio below a folder, by the files' names, sorted; hidden files and folders are not.

    Links to folders are followed. A folder that is reached twice is looked into once, under the
    name without a link if it has one. One that cannot be looked into is left out with a warning.
    """

    def left_out(error: OSError) -> None:
        log.warning("left out the folder %s: %s", shown(error.filename), error.strerror)

    found, seen, linked = [], set(), [os.fspath(folder)]
    while linked:  # what is no link, first: walk follows none but the one it begins with
        for here, subfolders, names in os.walk(linked.pop(0), onerror=left_out):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            inside = [os.path.join(here, name) for name in subfolders]
            linked += filter(os.path.islink, inside)
            found += [
                Path(here, name)
                for name in names
                if name.lower().endswith(AUDIO_SUFFIXES) and not name.startswith(".")
            ]
    return sorted(found)


def shown(path: str | os.PathLike) -> str:
    """A path as it can be printed and written: what is not UTF-8 in its name as escapes."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def write(path: str | os.PathLike, wav: Tensor | np.ndarray, sample_rate: int) -> None:
    """Writes one clip as a 16-bit PCM wav, whole or not at all.

    wav: floating point (T,), T >= 1, in [-1, 1]; up to 1 + OVERSHOOT is clipped. Directories are
    made; an existing file is replaced. What `read` gave comes back exactly if it was 16-bit.
    Raises TypeError for integer samples, ValueError for another shape, NaN, infinity, louder
    audio, a bad rate or a name that does not end in .wav, OSError if the disk will not take it.
    """
    path = Path(path)
    if path.suffix.lower() != ".wav":
        raise ValueError(f"{path}: audio is written as .wav; give a name that ends in .wav")
    _check_rate(sample_rate)
    wav = torch.as_tensor(wav).detach().cpu()
    if not wav.is_floating_point():
        raise TypeError(
            f"{path}: write takes floating-point audio in [-1, 1], not {wav.dtype}; mu-law "
            f"classes become audio by mulaw.decode, int16 audio by x.float() / 32768"
        )
    if wav.ndim != 1 or wav.numel() == 0:
        raise ValueError(
            f"{path}: write takes one mono clip of shape (T,), T >= 1, not "
            f"{tuple(wav.shape)}; write a batch clip by clip"
        )
    wav = wav.double()
    peak = wav.abs().max().item()
    if not math.isfinite(peak):
        raise UserError(f"{path}: the audio holds NaN or infinity; nothing was written")
    if peak > 1 + OVERSHOOT:
        raise UserError(
            f"{path}: audio must lie in [-1, 1]; its largest magnitude is {peak:g}. Divide by "
            f"it, or clamp, on purpose; nothing was written"
        )
    # 32768, the scale that reading divides by; libsndfile's own float path multiplies by 32767.
    pcm = (wav * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy()
    encoded = io.BytesIO()
    soundfile.write(encoded, pcm, sample_rate, format="WAV", subtype="PCM_16")

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # same disk: replace is atomic
    try:
        draft.write_bytes(encoded.getvalue())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def resample(x: Tensor, sr_in: int, sr_out: int) -> Tensor:
    """Audio at another rate: float32 (..., ceil(T sr_out / sr_in)) in [-1, 1], on x's device.

    x: floating point (..., T). Polyphase with scipy's linear-phase Kaiser filter; the little
    that its ringing adds beyond full scale is clipped. Raises ValueError for rates that are not
    positive whole numbers, TypeError for integer samples.
    """
    _check_rate(sr_in)
    _check_rate(sr_out)
    if not x.is_floating_point():
        raise TypeError(f"resample takes floating-point audio in [-1, 1], not {x.dtype}")
    if sr_in == sr_out or x.shape[-1] == 0:
        return x.float()
    common = math.gcd(sr_in, sr_out)
    samples = x.detach().cpu().float().numpy()
    y = scipy.signal.resample_poly(samples, sr_out // common, sr_in // common, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(y, dtype=np.float32)).clamp_(-1, 1).to(x.device)


def _check_rate(rate: int) -> None:
    if isinstance(rate, bool) or not isinstance(rate, numbers.Integral) or rate <= 0:
        raise ValueError(f"a sample rate is a positive whole number of Hz, not {rate!r}")


def _resampled(blocks: Iterable[Tensor], sr_in: int, sr_out: int) -> Iterator[Tensor]:
    """`resample` of (T,) that comes in blocks: the same samples, in blocks."""
    common = math.gcd(sr_in, sr_out)
    up, down = sr_out // common, sr_in // common
    # Scipy's filter reaches 10 max(up, down) / up samples to both sides of each. Every `down`
    # samples the input and the output fall together: there it can be cut.
    margin = down * math.ceil((10 * max(up, down) / up + 1) / down)
    held = torch.zeros(0)
    done = 0  # samples at the start of `held` that are there only as a margin
    for block in blocks:
        ready = (len(held) - margin) // down * down
        if ready > done:
            yield resample(held, sr_in, sr_out)[done * up // down : ready * up // down]
            begin = max(0, ready - margin)
            held, done = held[begin:], ready - begin
        held = torch.cat([held, block])
    yield resample(held, sr_in, sr_out)[done * up // down :]


# ---- files ----------------------------------------------------------------------------------


class _Stream(soundfile.SoundFile):
    """A file that is read onwards, without the seeks by which SoundFile keeps its position: some
    formats do not have them, FLAC of unknown length has none to its end.
    """

    def __init__(self, source: bytes | str | io.FileIO) -> None:
        self.source = source
        super().__init__(source)

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        super().close()
        if isinstance(self.source, io.FileIO):
            self.source.close()


class _Longer(io.FileIO):
    """A file that says it is `more` bytes longer; asked for what it holds there, it has zeros."""

    def __init__(self, path: Path, more: int) -> None:
        super().__init__(path)
        self.claimed, self.from_end = os.fstat(self.fileno()).st_size + more, False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.from_end = whence == os.SEEK_END
        if self.from_end:
            offset, whence = offset + self.claimed, os.SEEK_SET
        return super().seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        n = super().readinto(buffer)
        if not self.from_end:  # read onwards, it ends where it ends
            return n
        buffer[n:] = bytes(len(buffer) - n)
        return len(buffer)


class _Patched(io.FileIO):
    """A file in which other bytes are read from `at` on."""

    def __init__(self, path: Path, at: int, patch: bytes) -> None:
        super().__init__(path)
        self.at, self.patch = at, patch

    def readinto(self, buffer: Any) -> int:
        begin = self.tell() - self.at
        n = super().readinto(buffer)
        for i in range(max(0, begin), min(len(self.patch), begin + n)):
            buffer[i - begin : i - begin + 1] = self.patch[i : i + 1]
        return n


@contextlib.contextmanager
def _named(path: Path, kind: str) -> Iterator[None]:
    """Whatever a file makes the decoder and the disk say becomes an AudioError of that file."""
    try:
        yield
    except OSError as error:
        detail = error.strerror or str(error)
        raise AudioError(path, "unreadable", detail, "check its permissions and disk") from error
    except soundfile.LibsndfileError as error:
        detail = f"libsndfile: {error.error_string.strip().rstrip('.')}"
        raise AudioError(path, kind, detail, CONVERT) from error
    except MemoryError as error:
        detail = "it does not fit into memory"
        raise AudioError(path, "too long", detail, "take parts of it: start,stop") from error


def _open(path: Path, start: float = 0.0) -> tuple[_Stream, int | None, int]:
    """A file to be read onwards, its length in frames (None: its header does not tell), and its
    position: RUN_UP frames before `start` (seconds), or the beginning where seeking fails.
    """
    with _named(path, "not audio"):
        sound, frames = _open_at_start(path)
        before = min(_frame(start, sound.samplerate) - RUN_UP, frames or UNKNOWN)
        if before <= 0:
            return sound, frames, 0
        try:
            if sound.seek(before) == before:
                return sound, frames, before
        except soundfile.LibsndfileError:
            pass  # it has no seeks, or only says that it has
        sound.close()
        return *_open_at_start(path), 0


def _open_at_start(path: Path) -> tuple[_Stream, int | None]:
    _check_regular(path)
    try:
        sound = _Stream(_source(path))
    except TypeError:  # .raw, which has no header
        raise AudioError(path, "not audio", "it has no header", CONVERT) from None
    frames = sound.frames if sound.frames < UNKNOWN else None
    if sound.subtype.startswith("MPEG_LAYER"):  # mp3, also inside of wav
        # Without a Xing or Info header the length is a guess by the file's size, and what lies
        # beyond would not be read. A guess grows with the size, a header's length does not.
        with _Stream(_Longer(path, 16)) as longer:  # few bytes: they are compared with the header's
            guessed = longer.frames != frames
        if guessed:
            sound.close()
            sound, frames = _Stream(_Longer(path, 2**40)), None
    if not RATES[0] <= sound.samplerate <= RATES[1]:
        detail, remedy = f"{sound.samplerate:,} Hz in its header", "correct it, or record it again"
        sound.close()
        raise AudioError(path, "absurd sample rate", detail, remedy)
    return sound, frames


def _blocks(sound: _Stream, position: int, last: int | None) -> Iterator[np.ndarray]:
    """float32 (n, channels) from `position` to frame `last`, or the end if that comes first."""
    while last is None or position < last:
        n = max(1, BLOCK // sound.channels)
        n = n if last is None else min(n, last - position)
        block = sound.read(n, dtype="float32", always_2d=True)
        position += len(block)
        yield block
        if len(block) < n:
            break


def _checked_blocks(
    path: Path,
    sound: _Stream,
    promised: int | None,
    position: int,
    start: float,
    stop: float | None,
) -> Iterator[np.ndarray]:
    """Blocks (n, channels) of the part; AudioError at its end if it cannot be used."""
    rate = sound.samplerate
    first, last = _frame(start, rate), promised
    if stop is not None:
        last = min(_frame(stop, rate), last or UNKNOWN)
    peak, bad, size = 0.0, 0, 0
    for block in _blocks(sound, position, last):
        used = block[max(0, first - position) :]
        position += len(block)
        size += used.size
        loudest = float(np.abs(used).max(initial=0))  # NaN if any is
        if math.isfinite(loudest):
            peak = max(peak, loudest)
        else:
            bad += int(np.count_nonzero(~np.isfinite(used)))
        yield used

    if promised is not None and position < min(last, promised):
        detail = f"{position:,} of {promised:,} samples are there"
        raise AudioError(path, "truncated", detail, "copy or download it again")
    if size == 0 and (start or stop):
        detail = f"no samples from {start:g} to {'its end' if stop is None else f'{stop:g} s'}"
        raise AudioError(path, "too short", detail, "correct start and stop of the part")
    if size == 0:
        raise AudioError(path, "empty", "no samples", "remove it or record it again")
    if bad:
        detail = f"{bad:,} of {size:,} samples"
        raise AudioError(path, "NaN or infinity", detail, "export it again as 16-bit PCM")
    if peak > MAX_PEAK:
        detail = f"peak {peak:g} where full scale is 1"
        remedy = f"divide its samples by {32768 if peak <= 32768 else peak:g} and save it again"
        raise AudioError(path, "wrong scale", detail, remedy)


def _frame(seconds: float, rate: int) -> int:
    return round(min(seconds * rate, UNKNOWN))  # a product may be infinite


def _mono(block: np.ndarray) -> Tensor:
    """The mean (n,) of a block (n, channels)."""
    return torch.from_numpy(block).clamp_(-1, 1).T.contiguous().mean(dim=0)


def _check_regular(path: Path) -> None:
    """AudioError for what cannot be opened as a file, or not be named in what is written."""
    if shown(path) != str(path):
        raise AudioError(path, "name is not UTF-8", "", "rename it")
    if not path.exists():
        raise AudioError(path, "not found", "", "check the path, or where it starts from")
    if not path.is_file():  # a pipe would block, a directory has nothing to decode
        what = "a directory" if path.is_dir() else "no regular file"
        raise AudioError(path, "not a file", what, "give the path of one audio file")


def _source(path: Path) -> str | _Patched:
    """What to decode: the path, once the size its header promises is compared with the true one.

    libsndfile reads a wav or aiff that was cut short as if it were a shorter clip. Streaming
    writers, which cannot go back to fill the size in, leave 0 or about 2 or 4 GiB: accepted.
    Format: a 12-byte head, then chunks of (name, uint32 size, bytes, padded to even).
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise AudioError(path, "empty", "0 bytes", "remove it or copy it again")
        head = file.read(12)
        kinds = {b"RIFF": (b"data", "<"), b"RIFX": (b"data", ">"), b"FORM": (b"SSND", ">")}
        wanted, order = kinds.get(head[:4], (b"", ""))
        at = 12
        while wanted and at + 8 <= size:
            file.seek(at)
            name, promised = struct.unpack(f"{order}4sI", file.read(8))
            if name != wanted:
                at += 8 + promised + promised % 2
                continue
            present = size - at - 8
            total = struct.unpack(f"{order}I", head[4:8])[0]
            if promised == 0 and present and total + 8 != size:
                # The size was never filled in, and libsndfile would find no samples.
                return _Patched(path, at + 4, struct.pack(f"{order}I", min(present, 2**32 - 1)))
            if present < promised < 0x7FFFF000:  # from there on it means "unknown"
                detail = f"{present:,} of {promised:,} data bytes are there"
                raise AudioError(path, "truncated", detail, "copy or download it again")
            break
    return str(path)
