"""Log-mel spectrograms: what the vocoder listens to.

Mel scale and area normalisation are Slaney's (Auditory Toolbox, 1998), as in librosa's default.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

FLOOR = 1e-5  # smallest magnitude before the logarithm: -11.5 in the result


@functools.cache
def mel_filters(sample_rate: int, n_mels: int, n_fft: int, top: float | None = None) -> Tensor:
    """Triangular filters (n_mels, n_fft/2 + 1) from 0 Hz to top, half the sample rate if None.

    Slaney's scale: linear up to 1 kHz (15 mels), then 27 mels per factor of 6.4. Each triangle
    has unit area over Hz. float32.
    """
    step = math.log(6.4) / 27
    top = sample_rate / 2 if top is None else top
    top = top * 3 / 200 if top < 1000 else 15 + math.log(top / 1000) / step
    mels = torch.linspace(0, top, n_mels + 2, dtype=torch.float64, device="cpu")
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * ((mels - 15) * step).exp())  # Hz
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device="cpu") * sample_rate / n_fft
    low, centre, high = (edges[i : n_mels + i, None] for i in range(3))
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)).float()


def log_mel(
    wav: Tensor,
    sample_rate: int,
    n_mels: int = 80,
    n_fft: int = 1024,
    hop: int = 256,
    mirrored: bool = False,
    tacotron: bool = False,
) -> Tensor:
    """Natural logarithm of mel magnitudes: (..., L) in [-1, 1] -> (..., n_mels, ceil(L / hop)).

    Frame i is centred on its own samples, [i hop, (i + 1) hop); beyond the ends the audio is
    silence. Values lie between log 1e-5 and about 4. mirrored: beyond the ends it is mirrored, and
    frames that lack samples are left out (bshall/hifigan). tacotron: up to 8 kHz, frame i is
    centred on sample i hop, and beyond the ends the audio is mirrored (Tacotron 2, DiffWave).

    Raises:
        ValueError: for empty audio or sizes below 1, n_fft below hop.
    """
    if wav.dim() == 0 or wav.shape[-1] == 0:
        raise ValueError(f"wav of shape {tuple(wav.shape)}: expected (..., samples >= 1)")
    if min(sample_rate, n_mels, hop) < 1 or n_fft < hop:
        raise ValueError(
            f"sample_rate={sample_rate}, n_mels={n_mels}, n_fft={n_fft}, hop={hop}: all must be "
            "at least 1, n_fft at least hop"
        )
    flat = wav.float().reshape(-1, wav.shape[-1])
    left, frames = (n_fft - hop) // 2, -(-flat.shape[-1] // hop)
    if tacotron:
        flat = F.pad(flat, (0, max(0, n_fft // 2 + 1 - flat.shape[-1])))  # enough to mirror
        flat = F.pad(flat, (n_fft // 2, n_fft // 2), mode="reflect")
        flat = flat[:, : (frames - 1) * hop + n_fft]
    elif mirrored:
        flat = F.pad(flat, (left, left), mode="reflect")
    else:
        flat = F.pad(flat, (left, (frames - 1) * hop + n_fft - left - flat.shape[-1]))
    window = torch.hann_window(n_fft, device=wav.device)
    spectrum = torch.stft(flat, n_fft, hop, window=window, center=False, return_complex=True)
    # On a GPU in float64, which neither TF32 nor autocast makes less of.
    dtype = torch.float64 if wav.is_cuda else torch.float32
    top = min(8000, sample_rate / 2) if tacotron else None
    filters = mel_filters(sample_rate, n_mels, n_fft, top).to(wav.device, dtype)
    mel = (filters @ spectrum.abs().to(dtype)).float()
    return mel.clamp(min=FLOOR).log().reshape(*wav.shape[:-1], n_mels, mel.shape[-1])
