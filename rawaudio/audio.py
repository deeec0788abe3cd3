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
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor

from rawaudio.arguments import floats, integer
from rawaudio.errors import UserError
from rawaudio.files import write_atomically

log = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff")
CONVERT = f"copy it again, or convert it to one of {' '.join(AUDIO_SUFFIXES)}"
COPY_AGAIN = "copy or download it again"

# Decoded mp3 and float files pass full scale by a little and are clipped; a peak beyond this is
# no overshoot but another scale (int16 values stored as float).
MAX_PEAK = 2.0
OVERSHOOT = 1e-3  # of audio that is written: rounding, not loudness
RATES = (1_000, 768_000)  # Hz; a header that says another is damaged

BLOCK = 2**20  # samples decoded at once, of all channels: 4 MiB
RUN_UP = 2**14  # frames decoded before a part and dropped: lossy decoders build on some before
UNKNOWN = 2**62  # frames; libsndfile's own mark for an unknown length is 2^63 - 1

# First bytes of a file of chunks -> the name of the chunk with the samples, the order of bytes.
CHUNKED = {b"RIFF": (b"data", "<"), b"RIFX": (b"data", ">"), b"FORM": (b"SSND", ">")}
CHUNK_UNKNOWN = 0x7FFFF000  # bytes; streaming writers promise this much or more


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

    sample_rate: in Hz, to which other audio is resampled; None: the file's own. Channels are mixed
    down to their mean. Overshoot up to MAX_PEAK (float and lossy formats) is clipped. Where the
    format can be sought in, what lies before the part is not decoded. Memory is that of the result.

    Raises ValueError for an impossible rate or part, AudioError for a file or part that cannot be
    used: missing, no audio, damaged, truncated (but an ogg file cut between two pages is a shorter
    one), empty, NaN or infinity, another scale than [-1, 1], a name that is not UTF-8.
    """
    path, stop = Path(path), math.inf if stop is None else stop
    if not 0 <= start < stop:
        raise ValueError(f"a part has 0 <= start < stop in seconds, not {start} and {stop}")
    rate = None if sample_rate is None else integer("sample_rate", sample_rate)
    sound = _open(path, start)
    with sound, _as_audio_error(path, "damaged"):
        own_rate, channels = sound.samplerate, sound.channels
        rate = rate or own_rate
        blocks = _part(path, sound, start, stop)
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
    sound = _open(Path(path))
    with sound, _as_audio_error(Path(path), "damaged"):
        if sound.length < UNKNOWN:
            return sound.length / sound.samplerate
        return sum(map(len, sound.read_until(UNKNOWN))) / sound.samplerate


def content_digest(path: str | os.PathLike) -> bytes:
    """SHA-256 of a file's bytes. Raises AudioError if they cannot be read."""
    path, digest = Path(path), hashlib.sha256()
    with _as_audio_error(path, "unreadable"):
        _check_regular(path)
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.digest()


def find(folder: str | os.PathLike) -> list[Path]:
    """All audio below a folder, by the files' names, sorted; hidden files and folders are not.

    Links to folders are followed. A folder that is reached twice is looked into once, under the
    name without a link if it has one. One that cannot be looked into is left out with a warning.
    """

    def left_out(error: OSError) -> None:
        log.warning("left out the folder %s: %s", shown(error.filename), error.strerror)

    paths, seen, linked = [], set(), [os.fspath(folder)]
    while linked:  # what is no link, first: walk follows none but the one it begins with
        for here, subfolders, names in os.walk(linked.pop(0), onerror=left_out):
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            linked += filter(os.path.islink, (os.path.join(here, name) for name in subfolders))
            names = [name for name in names if not name.startswith(".")]
            paths += [Path(here, x) for x in names if x.lower().endswith(AUDIO_SUFFIXES)]
    return sorted(paths)


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
    integer("sample_rate", sample_rate)
    wav = floats(f"{path}: audio", wav, check_finite=False).detach().cpu().double()
    if wav.ndim != 1 or wav.numel() == 0:
        shape = tuple(wav.shape)
        raise ValueError(f"{path}: write takes one clip of shape (T,), T >= 1, not {shape}")
    peak = wav.abs().max().item()
    if not math.isfinite(peak):
        raise UserError(f"{path}: the audio holds NaN or infinity; nothing was written")
    if peak > 1 + OVERSHOOT:
        raise UserError(
            f"{path}: audio must lie in [-1, 1]; its largest magnitude is {peak:g}: divide by it"
        )
    # 32768, the scale that reading divides by; libsndfile's own float path multiplies by 32767.
    pcm = (wav * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy()
    encoded = io.BytesIO()
    soundfile.write(encoded, pcm, sample_rate, format="WAV", subtype="PCM_16")
    write_atomically(path, encoded.getvalue())


def resample(x: Tensor, sr_in: int, sr_out: int) -> Tensor:
    """Audio at another rate: float32 (..., ceil(T sr_out / sr_in)) in [-1, 1], on x's device.

    x: floating point (..., T). Polyphase with scipy's linear-phase Kaiser filter; the little
    that its ringing adds beyond full scale is clipped. Raises ValueError for rates that are not
    positive whole numbers, TypeError for integer samples.
    """
    x = floats("x", x, check_finite=False)
    common = math.gcd(integer("sr_in", sr_in), integer("sr_out", sr_out))
    if sr_in == sr_out or x.shape[-1] == 0:
        return x.float()
    from scipy.signal import resample_poly  # slow to import, and seldom needed

    samples = x.detach().cpu().float().numpy()
    y = resample_poly(samples, sr_out // common, sr_in // common, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(y, dtype=np.float32)).clamp_(-1, 1).to(x.device)


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


class _Stream(soundfile.SoundFile):
    """A file that is read onwards, without the seeks by which SoundFile keeps its position: some
    formats do not have them, FLAC of unknown length has none to its end.
    """

    def __init__(self, source: str | io.FileIO | mmap.mmap) -> None:
        self.source = source
        super().__init__(source)
        self.length = min(self.frames, UNKNOWN)  # in frames, as the header tells
        self.position = 0  # of the next frame

    def seekable(self) -> bool:
        return False

    def skip_to(self, frame: int) -> bool:
        """Whether it could be sought in; some formats only say that they can."""
        with contextlib.suppress(soundfile.LibsndfileError):
            self.position = self.seek(frame)
        return self.position == frame

    def read_until(self, last: int) -> Iterator[np.ndarray]:
        """float32 (n, channels) up to frame `last`, or to the end if that comes first."""
        size = max(1, BLOCK // self.channels)
        while (n := min(size, last - self.position)) > 0:
            block = self.read(n, dtype="float32", always_2d=True)
            self.position += len(block)
            yield block
            if len(block) < n:
                break

    def close(self) -> None:
        super().close()
        if not isinstance(self.source, str):
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


@contextlib.contextmanager
def _as_audio_error(path: Path, kind: str) -> Iterator[None]:
    """Whatever a file makes the decoder and the disk say becomes an AudioError of that file."""
    try:
        yield
    except OSError as error:
        detail = error.strerror or str(error)
        raise AudioError(path, "unreadable", detail, "check its permissions and disk") from error
    except soundfile.LibsndfileError as error:
        detail = f"libsndfile: {error.error_string.strip().rstrip('.')}"
        raise AudioError(path, kind, detail, CONVERT) from error


def _open(path: Path, start: float = 0.0) -> _Stream:
    """A file to be read onwards, from RUN_UP frames before `start` (seconds) or the beginning."""
    with _as_audio_error(path, "not audio"):
        sound = _open_at_start(path)
        before = min(_frame(start, sound.samplerate) - RUN_UP, sound.length)
        if before > 0 and not sound.skip_to(before):
            sound.close()
            sound = _open_at_start(path)
        return sound


def _open_at_start(path: Path) -> _Stream:
    _check_regular(path)
    try:
        sound = _Stream(_source(path))
    except TypeError:  # .raw
        raise AudioError(path, "not audio", "it has no header", CONVERT) from None
    if sound.subtype.startswith("MPEG_LAYER"):  # mp3, also inside of wav
        # Without a Xing or Info header the length is a guess by the file's size, and what lies
        # beyond would not be read. A guess grows with the size, a header's length does not.
        with _Stream(_Longer(path, 16)) as longer:  # few bytes: they are compared with the header's
            guessed = longer.frames != sound.frames
        if guessed:
            sound.close()
            sound = _Stream(_Longer(path, 2**40))
            sound.length = UNKNOWN
    if not RATES[0] <= sound.samplerate <= RATES[1]:
        sound.close()
        detail = f"{sound.samplerate:,} Hz in its header"
        raise AudioError(path, "absurd sample rate", detail, "correct it, or record it again")
    return sound


def _source(path: Path) -> str | mmap.mmap:
    """What to decode: the path, once the size its header promises is compared with the true one.

    libsndfile reads a wav or aiff that was cut short as if it were a shorter clip. Streaming
    writers, which cannot go back to fill the size in, leave 0 or CHUNK_UNKNOWN: accepted.
    Format: a 12-byte head, then chunks of (name, uint32 size, bytes, padded to even).
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise AudioError(path, "empty", "0 bytes", "remove it or copy it again")
        head = file.read(12)
        wanted, order = CHUNKED.get(head[:4], (b"", ""))
        begin = 12
        while wanted and begin + 8 <= size:
            file.seek(begin)
            name, promised = struct.unpack(f"{order}4sI", file.read(8))
            begin += 8
            if name != wanted:
                begin += promised + promised % 2
                continue
            present = size - begin
            if promised == 0 < present and struct.unpack(f"{order}I", head[4:8])[0] + 8 != size:
                # The size was never filled in, and libsndfile would find no samples.
                mended = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                mended[begin - 4 : begin] = struct.pack(f"{order}I", min(present, 2**32 - 1))
                return mended
            if present < promised < CHUNK_UNKNOWN:
                detail = f"{present:,} of {promised:,} data bytes are there"
                raise AudioError(path, "truncated", detail, COPY_AGAIN)
            break
    return str(path)


def _check_regular(path: Path) -> None:
    """AudioError for what cannot be opened as a file, or not be named in what is written."""
    if shown(path) != str(path):
        raise AudioError(path, "name is not UTF-8", "", "rename it")
    if not path.exists():
        raise AudioError(path, "not found", "", "check the path, or where it starts from")
    if not path.is_file():  # a pipe would block, a directory has nothing to decode
        what = "a directory" if path.is_dir() else "no regular file"
        raise AudioError(path, "not a file", what, "give the path of one audio file")


def _part(path: Path, sound: _Stream, start: float, stop: float) -> Iterator[Tensor]:
    """Mono blocks (n,) of the part in seconds; AudioError at its end if it cannot be used."""
    first = _frame(start, sound.samplerate)
    last = min(_frame(stop, sound.samplerate), sound.length)
    peak, bad, size, position = 0.0, 0, 0, sound.position
    for block in sound.read_until(last):
        block = block[max(0, first - position) :]
        position = sound.position
        size += block.size
        bad += np.count_nonzero(~np.isfinite(block))
        peak = max(peak, float(np.abs(block).max(initial=0)))
        yield torch.from_numpy(block).clamp_(-1, 1).T.contiguous().mean(dim=0)

    if position < last and sound.length != UNKNOWN:
        detail = f"{position:,} of {sound.length:,} samples are there"
        raise AudioError(path, "truncated", detail, COPY_AGAIN)
    if size == 0 and (start > 0 or stop < math.inf):
        detail = f"no samples from {start:g} to {'its end' if stop == math.inf else f'{stop:g} s'}"
        raise AudioError(path, "too short", detail, "correct start and stop of the part")
    if size == 0:
        raise AudioError(path, "empty", "no samples", "remove it or record it again")
    if bad:
        detail = f"{bad:,} of {size:,} samples"
        raise AudioError(path, "NaN or infinity", detail, "export it again as 16-bit PCM")
    if peak > MAX_PEAK:
        remedy = f"divide its samples by {32768 if peak <= 32768 else peak:g} and save it again"
        raise AudioError(path, "wrong scale", f"peak {peak:g} where full scale is 1", remedy)


def _frame(seconds: float, rate: int) -> int:
    return round(min(seconds * rate, UNKNOWN))  # a product may be infinite
