"""Features of HuBERT (arXiv:2106.07447), which ASGAN can make in place of spectrograms.

The sixth of twelve layers of HuBERT Base, which was trained on LibriSpeech and not fine-tuned: 768
numbers for every 320 samples at 16 kHz, each from 400. The network is torchaudio's, or else that of
transformers; who has neither trains with features that were made elsewhere, in files beside the
clips: NAME.npy (frames, 768) beside NAME.wav.

    hear = hubert_base()
    for clip in read_csv("splits/sc09-train.csv", "speech_commands"):
        wav = read_clip(clip, SAMPLE_RATE).wav
        np.save(clip.path.with_suffix(".npy"), hear(wav[None])[0].T.cpu())
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rawaudio.config import usable_device
from rawaudio.data import Clip
from rawaudio.errors import UserError, plainly, printable

SAMPLE_RATE, HOP, LAYER = 16000, 320, 6
OWN = "put features beside the clips, NAME.npy (frames, 768) beside NAME.wav"


def hubert_base(device: str | torch.device | None = None) -> Callable[[Tensor], Tensor]:
    """The function audio (B, N) in [-1, 1] at 16 kHz -> features (B, 768, N // 320).

    As ASGAN's reader does, 1 to 320 zeros follow the audio, up to a multiple of 320; nothing is
    normalised. device: None is the GPU if there is one. The first call in a process reads the
    weights, which torchaudio or transformers downloads once. Raises UserError where neither is
    installed.
    """
    device = usable_device(device)
    layers = _network(device)

    @torch.no_grad()
    def hear(wav: Tensor) -> Tensor:
        wav = F.pad(wav.to(device).float(), (0, HOP - wav.shape[-1] % HOP))
        return layers(wav).mT

    return hear


@functools.cache
def _network(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Audio -> the layer's output (B, frames, 768)."""
    found = None
    with contextlib.suppress(ImportError, OSError):  # OSError: one of another torch
        import torchaudio.pipelines as found
    try:
        if found is not None:
            model = found.HUBERT_BASE.get_model().to(device).eval()
            return lambda wav: model.extract_features(wav, num_layers=LAYER)[0][-1]
        with contextlib.suppress(ImportError, OSError):
            import transformers as found
        if found is not None:
            model = found.HubertModel.from_pretrained("facebook/hubert-base-ls960")
            model = model.to(device).eval()
            return lambda wav: model(wav, output_hidden_states=True).hidden_states[LAYER]
    except OSError as error:
        reason = f"HuBERT's weights could not be downloaded ({printable(str(error))})"
        raise ConnectionError(f"{reason}; or {OWN}") from None
    raise UserError(
        f"HuBERT is not part of this library: pip install torchaudio, or transformers; or {OWN}"
    )


def file_of(clip: Clip) -> Path | None:
    """The file of a clip's features, if there is one."""
    path = clip.path.with_suffix(".npy")
    return path if path.is_file() else None


def read_features(
    clip: Clip, sample_rate: int, hop: int, begin: int, bands: int, frames: int
) -> Tensor:
    """Features (bands, frames) from the clip's file, from sample `begin` of the clip on; zeros
    beyond its end. UserError for a file that is not there or holds something else."""
    path = file_of(clip)
    if path is None:
        raise UserError(f"{clip}: no features beside it, as other clips have: NAME.npy")
    try:
        x = np.load(path, mmap_mode="r", allow_pickle=False)
        first = (round(clip.start * sample_rate) + begin) // hop
        part = torch.from_numpy(x[first : first + frames].astype(np.float32))
        if part.shape[1:] != (bands,) or not part.isfinite().all():
            raise ValueError(f"it has shape {x.shape}, or numbers that are not finite")
    except (OSError, LookupError, ValueError, EOFError, TypeError) as error:
        what = f"{path}: expected numbers (frames, {bands}), as of numpy.save"
        raise UserError(f"{what} ({plainly(error)})") from None
    return F.pad(part, (0, 0, 0, frames - len(part))).T
