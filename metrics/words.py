"""Labelled words to train a classifier on, their variations, and sounds that are no word.

Everything random draws from one generator on the CPU, so that a seed fixes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from metrics.classifier import DIGITS
from rawaudio.data import ClipDataset, read_csv
from rawaudio.errors import UserError


@dataclass
class Words:
    """Labelled clips of a CSV."""

    wavs: Tensor  # int16 (N, T), zero-padded
    lengths: Tensor  # (N,), samples
    targets: Tensor  # int (N,): indices of labels
    labels: list[str]

    def __len__(self) -> int:
        return len(self.wavs)

    def clip(self, i: int) -> Tensor:
        """Clip i without its padding: float32 (T_i,) in [-1, 1]."""
        return self.wavs[i, : self.lengths[i]].float() / 32768


def read_labels(csv_path: str, data_root: str | None) -> list[str]:
    """The labels of a CSV: digits' names from zero to nine, all others sorted."""
    labels = {clip.label for clip in read_csv(csv_path, data_root)}
    if labels <= set(DIGITS):
        return [label for label in DIGITS if label in labels]
    return sorted(labels)


def read_words(
    csv_path: str, data_root: str | None, labels: list[str], sample_rate: int, length: int
) -> Words:
    """The clips of a CSV, resampled and cut to `length` samples.

    Raises what `ClipDataset` raises, and ValueError for a label that is missing or not in `labels`.
    """
    for clip in read_csv(csv_path, data_root):
        if clip.label not in labels:
            what = f"label {clip.label!r} is not in the training CSV" if clip.label else "no label"
            raise UserError(f"{csv_path}: {clip.name}: {what}")
    dataset = ClipDataset(csv_path, sample_rate, data_root, pcm=True)
    wavs = torch.zeros(len(dataset), length, dtype=torch.int16)
    for row, wav in zip(wavs, dataset, strict=True):
        row[: len(wav)] = wav[:length]
    targets = torch.tensor([labels.index(clip.label) for clip in dataset.clips])
    return Words(wavs, dataset.lengths.clamp(max=length), targets, labels)


# ---- variations ------------------------------------------------------------------------------


def uniform(low: float, high: float, rng: torch.Generator) -> float:
    """A number between `low` and `high`."""
    return low + (high - low) * float(torch.rand((), generator=rng))


def vary(wav: Tensor, length: int, rng: torch.Generator) -> Tensor:
    """The same word at another speed (+-10 %), place, timbre and noise: (T,) -> (length,)."""
    n = max(2, round(len(wav) / uniform(0.9, 1.1, rng)))
    wav = F.interpolate(wav[None, None], n, mode="linear", align_corners=True)[0, 0]
    if n > 0.8 * length:  # no room to move, as in clips of a whole second: a tenth may be cut off
        wav = F.pad(wav, (length // 10, length // 10))
    room = max(0, length - len(wav))
    wav = F.pad(wav, (room, room))
    begin = int(torch.randint(len(wav) - length + 1, (), generator=rng))
    wav = tilt(wav[begin : begin + length], rng)
    if uniform(0, 1, rng) < 0.6:  # a noise floor, 5 to 55 dB below the word
        level = wav.square().mean().sqrt() * math.sqrt(max(1.0, length / n))
        wav = wav + noise(length, rng) * level * 10 ** (-uniform(5, 55, rng) / 20)
    return wav


def tilt(wav: Tensor, rng: torch.Generator) -> Tensor:
    """A little brighter or duller, by a filter of two taps."""
    return wav + uniform(-0.5, 0.5, rng) * F.pad(wav[:-1], (1, 0))


def noise(length: int, rng: torch.Generator) -> Tensor:
    """Noise of unit power and random colour: power falls as 1 / frequency^k, k from 0 to 2."""
    spectrum = torch.fft.rfft(torch.randn(length, generator=rng))
    colour = torch.arange(1, len(spectrum) + 1) ** -uniform(0, 1, rng)
    wav = torch.fft.irfft(spectrum * colour, n=length)
    return wav / wav.square().mean().sqrt()


def not_a_word(words: Words, rng: torch.Generator) -> Tensor:
    """Something that is no word: noise, silence, babble, a word backwards or in pieces: (T,)."""
    length = words.wavs.shape[1]

    def draw() -> Tensor:
        i = int(torch.randint(len(words), (), generator=rng))
        return vary(words.clip(i), length, rng)

    match int(torch.randint(10, (), generator=rng)):
        case 0:
            return torch.randn(length, generator=rng)
        case 1:
            return noise(length, rng)
        case 2:  # noise that comes and goes
            steps = torch.rand(1, 1, 12, generator=rng)
            return noise(length, rng) * F.interpolate(steps, length, mode="linear")[0, 0]
        case 3:  # a tone that glides, or silence
            rate = torch.linspace(uniform(0, 0.4, rng), uniform(0, 0.4, rng), length)
            loud = float(uniform(0, 1, rng) < 0.8)
            return loud * (rate.cumsum(0) * 2 * math.pi).sin()
        case 4 | 5:
            n = int(torch.randint(3, 7, (), generator=rng))
            return torch.stack([draw() for _ in range(n)]).sum(0)
        case 6 | 7:
            return draw().flip(0)
        case _:
            n = int(torch.randint(5, 17, (), generator=rng))
            pieces = draw().tensor_split(n)
            return torch.cat([pieces[i] for i in torch.randperm(n, generator=rng).tolist()])


def mask(db: Tensor, rng: torch.Generator) -> Tensor:
    """Silences a band and a while of each spectrogram (B, n_mels, frames), in place.

    (SpecAugment, Park et al. 2019, arXiv:1904.08779.)
    """
    for axis, most in ((1, 6), (2, 10)):
        size = db.shape[axis]
        width = torch.randint(min(most, size // 4) + 1, (len(db), 1), generator=rng)
        begin = (torch.rand(len(db), 1, generator=rng) * (size - width)).long()
        place = torch.arange(size)
        hidden = ((place >= begin) & (place < begin + width)).to(db.device)
        db.masked_fill_(hidden.unsqueeze(3 - axis), float(db.min()))
    return db
