"""Tiny models of every family."""

import pytest
import torch

from rawaudio.adversarial import Adversarial
from rawaudio.autoregressive import Autoregressive
from rawaudio.families import FAMILIES

TOLD = {"label": ["a", "b", "c"], "speaker": ["x", "y"]}
COUNTS = {"label": [1, 2, 5], "speaker": [3, 1]}
S4 = {"d_model": 8, "n_layers": [1], "pool": [2, 3], "d_state": 8, "l_max": 48}
MEL = {"n_mels": 5, "hop": 6, "n_fft": 12}
SAMPLERNN = {"frame_sizes": [4, 2, 2], "d_hidden": 12, "d_embedding": 6}
WAVENET = {"layers": 3, "blocks": 2, "residual_channels": 8, "dilation_channels": 6,
           "skip_channels": 16, "end_channels": 12}  # fmt: skip
DIFFWAVE = {"layers": 4, "cycle": 3, "residual_channels": 8, "skip_channels": 12}
WAVEGAN = {"slice_len": 64, "channels": 4, "latent_dim": 6, "critic_steps": 2}
ASGAN = {"latent_dim": 6, "w_dim": 6, "fourier_channels": 8, "channels": [8, 6], "frames": [4, 8],
         "kernel": 3, "critical_layers": 1, "critic_channels": 8, "critic_kernel": 3,
         "critic_blocks": [2, 2], "bands": 4, "hop": 8, "n_fft": 32, "augment": 0.3}  # fmt: skip
TINY = {
    "autoregressive": S4,
    "diffwave": S4 | MEL,
    "wavenet": WAVENET,
    "samplernn": SAMPLERNN,
    "diffwave_wavenet": DIFFWAVE | MEL,
    "wavegan": WAVEGAN,
    "asgan": ASGAN,
}
ONE_WAY = {"bidirectional": False, "glu": False, "tied": True, "data_std": 0.2}
NEAREST = {"slice_len": 128, "upsampling": "nearest", "filter_taps": 8}
ROWS = [*TINY.items(), ("wavenet", WAVENET | {"kernel_size": 3}), ("diffwave", S4 | ONE_WAY),
        ("wavegan", WAVEGAN | NEAREST),
        ("samplernn", SAMPLERNN | {"frame_sizes": [2, 1, 3], "n_rnn": 2}),
        ("asgan", ASGAN | {"compat": True, "plain_fourier": True})]  # fmt: skip
STEPPED = [row for row in ROWS if issubclass(FAMILIES[row[0]].module, Autoregressive)]
STEPPED += [("autoregressive", S4 | {"unet": True, "n_layers": [1, 2, 3], "tied": False})]
ADVERSARIAL = [kind for kind in TINY if issubclass(FAMILIES[kind].module, Adversarial)]
GUIDED = [row for row in ROWS if row[0] not in ADVERSARIAL]
DIFFUSION = [kind for kind in TINY if hasattr(FAMILIES[kind].config, "unconditional")]


def families(which=ROWS):
    """Of a table of families: the argument `tiny` of a test."""
    return pytest.mark.parametrize("tiny", which, ids=lambda row: f"{row[0]}{len(row[1])}")


def make(tiny="autoregressive", seed=0, told=False, **settings):
    """A tiny model in eval mode: of a kind, or a row of a table. What begins at zero says
    something, and distributions of classes are far from uniform."""
    kind, sizes = (tiny, TINY[tiny]) if isinstance(tiny, str) else tiny
    torch.manual_seed(seed)
    sizes = {"sample_rate": 1000, "clip_length": 40} | sizes | settings
    if told:
        sizes = {"conditions": TOLD, "condition_counts": COUNTS} | sizes
    model = FAMILIES[kind].module(FAMILIES[kind].config(**sizes)).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    if isinstance(model, Autoregressive):
        with torch.no_grad():
            getattr(model.head, "weight_g", model.head.weight).mul_(5)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def audio(n, length, seed=0):
    """float32 (n, length) in [-0.7, 0.7]."""
    return (torch.rand(n, length, generator=seeded(seed)) - 0.5) * 1.4
