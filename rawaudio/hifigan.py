"""HiFi-GAN's generator (arXiv:2010.05646): features -> audio, in one pass.

As bshall/hifigan publishes it for mel spectrograms, and bshall/knn-vc for features of HuBERT.
Published weights are normalised, w = g v / |v|; here they are folded when they are read.
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawaudio.errors import CheckpointError, plainly
from rawaudio.files import fill, read_pt
from rawaudio.packages import read_module, tensors_of

SLOPE = 0.1


@dataclass(frozen=True)
class HiFiGANConfig:
    """Defaults: V1 for mel spectrograms, hop 160. 14,360,193 parameters."""

    features: int = 128
    projected: int | None = None  # width that features are taken to first; None: they are not
    channels: int = 512
    rates: tuple[int, ...] = (10, 4, 2, 2)
    rate_kernels: tuple[int, ...] = (20, 8, 4, 4)
    kernels: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    double: bool = True  # two convolutions for each dilation, else one


# The vocoder of ASGAN's features; 16,392,321 parameters
HUBERT = HiFiGANConfig(768, 512, rates=(10, 8, 2, 2), rate_kernels=(20, 16, 4, 4))


class Residual(nn.Module):
    """(B, C, L) -> (B, C, L)"""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], double: bool):
        super().__init__()

        def convolutions(dilations: tuple[int, ...]) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Conv1d(channels, channels, kernel, padding=d * (kernel // 2), dilation=d)
                for d in dilations
            )

        self.convs1 = convolutions(dilations)
        self.convs2 = convolutions((1,) * len(dilations)) if double else [None] * len(dilations)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            y = first(F.leaky_relu(x, SLOPE))
            x = x + (y if second is None else second(F.leaky_relu(y, SLOPE)))
        return x


class HiFiGAN(nn.Module):
    """Features (B, features, F) -> audio (B, F prod(rates)) in [-1, 1]."""

    def __init__(self, config: HiFiGANConfig):
        super().__init__()
        c, self.config = config, config
        self.lin_pre = nn.Linear(c.features, c.projected) if c.projected else None
        self.conv_pre = nn.Conv1d(c.projected or c.features, c.channels, 7, padding=3)
        widths = [c.channels // 2**i for i in range(len(c.rates) + 1)]
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(*widths[i : i + 2], k, rate, padding=(k - rate) // 2)
            for i, (rate, k) in enumerate(zip(c.rates, c.rate_kernels, strict=True))
        )
        self.resblocks = nn.ModuleList(
            Residual(width, k, dilations, c.double)
            for width in widths[1:]
            for k, dilations in zip(c.kernels, c.dilations, strict=True)
        )
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        if self.lin_pre is not None:
            x = self.lin_pre(x.mT).mT
        x, n = self.conv_pre(x), len(self.config.kernels)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))
            x = sum(block(x) for block in self.resblocks[i * n : (i + 1) * n]) / n
        return self.conv_post(F.leaky_relu(x)).tanh()[:, 0]  # the last slope is torch's own


def folded(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors by the names of `HiFiGAN`, without weight normalisation."""
    tensors = {
        name.removeprefix("module.").replace(".convs.", ".convs1."): value
        for name, value in published.items()
    }
    for name in [name for name in tensors if name.endswith("weight_v")]:
        direction, length = tensors.pop(name), tensors.pop(name[:-1] + "g")
        norm = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
        tensors[name.removesuffix("_v")] = direction * (length / norm)
    return tensors


def read_vocoder(path: str | os.PathLike) -> HiFiGAN:
    """The vocoder of a published file, in eval mode: a state dict, or an archive of torch.package.

    Nothing in it is executed. Sizes are read off the tensors, rates off the archive's settings, V1
    for mel spectrograms where there are none. CheckpointError for other files.
    """
    path, settings = Path(path), {}
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if zipfile.is_zipfile(path) and any(map(_is_module, zipfile.ZipFile(path).namelist())):
        module = read_module(path, ARCHIVED)
        h = module.state.get("h", {})
        published, settings = tensors_of(module), {**h, **getattr(h, "state", {})}
    else:
        published = read_pt(path)
        published = published.get("generator", published)
    try:
        tensors = folded(published)
        config = _config(tensors, settings)
        with torch.device("meta"):
            vocoder = HiFiGAN(config)
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a HiFi-GAN ({plainly(error)})") from None
    fill(path, vocoder, tensors)
    return vocoder.eval()


ARCHIVED = "hifigan_pkl.pt"


def _is_module(name: str) -> bool:
    return name.rpartition("/")[2] == ARCHIVED


def _config(tensors: dict[str, Tensor], settings: dict[str, Any]) -> HiFiGANConfig:
    first, projected = tensors["conv_pre.weight"], tensors.get("lin_pre.weight")
    default = HiFiGANConfig() if projected is None else HUBERT
    return HiFiGANConfig(
        features=first.shape[1] if projected is None else projected.shape[1],
        projected=None if projected is None else projected.shape[0],
        channels=first.shape[0],
        rates=tuple(settings.get("upsample_rates", default.rates)),
        rate_kernels=tuple(settings.get("upsample_kernel_sizes", default.rate_kernels)),
        kernels=tuple(settings.get("resblock_kernel_sizes", default.kernels)),
        dilations=tuple(map(tuple, settings.get("resblock_dilation_sizes", default.dilations))),
        double=str(settings.get("resblock", "1")) != "2",
    )
