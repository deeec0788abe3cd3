"""Read, write and resample audio: the one place that knows file formats.

    wav, rate = read("clip.flac", sample_rate=16000)    # float32 (T,) in [-1, 1], mono
    write("out/clip.wav", wav, rate)                    # 16-bit PCM, never half-written

Decoding is libsndfile's (package soundfile). What it lets pass in silence - a wav cut short, a
file of NaN - is refused here, so that whatever comes back can be trained on.
"""

from __future__ import annotations

import io
import math
import numbers
import os
import struct
import uuid
from pathlib import Path

import numpy as np
import scipy.signal
import soundfile
import torch
from torch import Tensor

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff")

# Decoded mp3 and float files pass full scale by a little and are clipped; a peak beyond this is
# no overshoot but another scale (int16 values stored as float).
MAX_PEAK = 2.0
# The same for generated audio on its way to a file: rounding, not loudness.
OVERSHOOT = 1e-3


class AudioError(ValueError):
    """A file that cannot be used. `kind` is the reason in a word or two, for counting."""

    def __init__(self, path: str | os.PathLike, kind: str, detail: str, remedy: str) -> None:
        super().__init__(path, kind, detail, remedy)
        self.path, self.kind, self.detail, self.remedy = Path(path), kind, detail, remedy

    @property
    def reason(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


def read(path: str | os.PathLike, sample_rate: int | None = None) -> tuple[Tensor, int]:
    """One clip as mono audio.

    Returns float32 (T,) in [-1, 1], T >= 1, and its rate in Hz: `sample_rate` if given
    (resampled when the file's differs), else the file's own. Channels are mixed down to their
    mean. Raises AudioError as `read_channels` does, ValueError for an impossible rate.
    """
    channels, rate = read_channels(path)
    wav = channels.mean(dim=0)
    if sample_rate is not None and sample_rate != rate:
        wav, rate = resample(wav, rate, sample_rate), sample_rate
    return wav, rate


def read_channels(path: str | os.PathLike) -> tuple[Tensor, int]:
    """One file as it is: float32 (channels, T) in [-1, 1], T >= 1, and its rate in Hz.

    Overshoot (float and lossy formats) is clipped up to a peak of MAX_PEAK. Raises AudioError if
    the file is missing, not a regular file, unreadable, not audio, damaged, truncated, empty, holds
    NaN or infinity, or is on another scale than [-1, 1]. (An ogg file is a stream: one cut between
    two pages is a shorter ogg file, and read as such.)
    """
    path = Path(path)
    try:
        if not path.exists():
            raise AudioError(path, "not found", "", "check the path, or where it starts from")
        if not path.is_file():  # a pipe would block, a directory has nothing to decode
            what = "a directory" if path.is_dir() else "no regular file"
            raise AudioError(path, "not a file", what, "give the path of one audio file")
        source, failed = _checked(path), "not audio"
        with soundfile.SoundFile(source) as sound:
            failed = "damaged"
            promised, rate = sound.frames, sound.samplerate
            samples = sound.read(dtype="float32", always_2d=True)  # (T, channels)
    except OSError as error:
        detail = error.strerror or str(error)
        raise AudioError(path, "unreadable", detail, "check its permissions and disk") from error
    except (soundfile.LibsndfileError, TypeError, MemoryError) as error:
        # TypeError: .raw, which has no header; MemoryError: a header that promises terabytes.
        detail = "libsndfile: " + getattr(error, "error_string", str(error)).strip().rstrip(".")
        remedy = f"copy it again, or convert it to one of {' '.join(AUDIO_SUFFIXES)}"
        raise AudioError(path, failed, detail, remedy) from error

    if len(samples) < promised:
        detail = f"{len(samples):,} of {promised:,} samples are there"
        raise AudioError(path, "truncated", detail, "copy or download it again")
    if len(samples) == 0:
        raise AudioError(path, "empty", "no samples", "remove it or record it again")
    peak = float(np.abs(samples).max())  # NaN if any is
    if not math.isfinite(peak):
        bad = int(np.count_nonzero(~np.isfinite(samples)))
        detail = f"{bad:,} of {samples.size:,} samples"
        raise AudioError(path, "NaN or infinity", detail, "export it again as 16-bit PCM")
    if peak > MAX_PEAK:
        detail = f"peak {peak:g} where full scale is 1"
        remedy = f"divide its samples by {32768 if peak <= 32768 else peak:g} and save it again"
        raise AudioError(path, "wrong scale", detail, remedy)
    return torch.from_numpy(samples).clamp_(-1, 1).T.contiguous(), rate


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
        raise ValueError(f"{path}: the audio holds NaN or infinity; nothing was written")
    if peak > 1 + OVERSHOOT:
        raise ValueError(
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


def _checked(path: Path) -> str | io.BytesIO:
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
                file.seek(0)
                raw = bytearray(file.read())
                struct.pack_into(f"{order}I", raw, at + 4, present)
                return io.BytesIO(raw)
            if present < promised < 0x7FFFF000:  # from there on it means "unknown"
                detail = f"{present:,} of {promised:,} data bytes are there"
                raise AudioError(path, "truncated", detail, "copy or download it again")
            break
    return str(path)
