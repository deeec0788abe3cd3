"""Clips of noise that differ in how loud they are, and a classifier that hears it."""

import torch

from rawaudio import audio

RATE, LENGTH = 8000, 800


class Level(torch.nn.Module):
    """Hears quiet, middle or loud, surest at three levels: what metrics.classifier promises."""

    sample_rate, clip_length, n_features, labels = RATE, LENGTH, 2, ["quiet", "middle", "loud"]
    fingerprint = "level"

    def forward(self, wavs):
        level = wavs.square().mean(1).sqrt()[:, None]
        return -4000 * (level - torch.tensor([0.1, 0.2, 0.3])).square(), level + 0.1 * wavs[:, :2]


def folder_of(path, levels, seed=0):
    """A folder of clips at these levels."""
    for i, level in enumerate(levels):
        wav = torch.rand(LENGTH, generator=torch.Generator().manual_seed(seed + i)) - 0.5
        audio.write(path / f"{i}.wav", level * wav / wav.square().mean().sqrt(), RATE)
    return path
