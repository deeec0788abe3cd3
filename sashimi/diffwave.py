"""SashimiDiffWave: DiffWave (arXiv:2009.09761) with SaShiMi in place of its convolutions.

(SaShiMi, arXiv:2202.09729, section 5.3; rawaudio/diffusion.py has the task and the samplers' use.)
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from rawaudio.conditions import Conditions
from rawaudio.config import check_name, setting
from rawaudio.diffusion import STEP_HIDDEN, Diffusion, DiffusionSettings, step_embedding
from rawaudio.family import Family
from rawaudio.noise import NoiseTask
from sashimi.s4 import FullPrecision
from sashimi.settings import BackboneSettings


@dataclass
class DiffusionConfig(BackboneSettings, DiffusionSettings):
    """The diffusion model. Defaults: the large SC09 model (DiffWave with a SaShiMi backbone)."""

    d_model: int = setting(128, "features of the finest tier")
    n_layers: list[int] = setting(
        [6], "(S4, feed-forward) pairs per tier and direction of the U: one number, or a list"
    )
    unet: bool = setting(True, "blocks before each down-pool too, a skip around every block")
    tied: bool = setting(False, "one (Lambda, P, B) per S4 layer instead of one per feature")
    bidirectional: bool = setting(True, "S4 layers look ahead too")
    pair_skips: bool = setting(
        False, "the skips of unet go around pairs of blocks, as in diffwave-sashimi"
    )
    mel_blocks: bool = setting(
        False, "a vocoder's S4 blocks each hear the spectrogram for themselves, as published"
    )


class MelUpsampler(nn.Module):
    """Log-mel frames (B, n_mels, F) -> (B, F hop, n_mels), by two transposed convolutions in time.

    DiffWave, appendix C: kernels of three bands and two strides, leaky ReLU 0.4 after each.
    published: the smaller stride is the first, and odd strides make a sample too many each.
    """

    def __init__(self, hop: int, published: bool = False):
        super().__init__()
        first = next(s for s in range(math.isqrt(hop), 0, -1) if hop % s == 0)
        self.strides = sorted([hop // first, first], reverse=not published)  # 16 and 16 for 256
        self.published = published
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(1, 1, (3, 2 * s), (1, s), (1, s // 2)) for s in self.strides
        )

    def forward(self, mel: Tensor) -> Tensor:
        y = mel[:, None]
        for stride, layer in zip(self.strides, self.layers, strict=True):
            length = None if self.published else y.shape[-1] * stride
            y = F.leaky_relu(layer(y)[..., :length], 0.4)
        return y[:, 0].transpose(1, 2)


class Hearing(nn.Module):
    """What an S4 block hears of log-mel frames (B, n_mels, F): (B, length, D).

    In coarser tiers too these are the first columns at the rate of the finest: so the published
    code has it, and so its weights know it.
    """

    def __init__(self, n_mels: int, hop: int, d_model: int):
        super().__init__()
        self.upsample = MelUpsampler(hop, published=True)
        self.project = nn.Linear(n_mels, d_model)

    def forward(self, mel: Tensor, length: int) -> Tensor:
        y = self.project(self.upsample(mel)[:, :length])
        return F.pad(y, (0, 0, 0, length - y.shape[1]))


class SashimiDiffWave(Diffusion, FullPrecision):
    """Diffusion SaShiMi, see `Diffusion`. Untrained, its last layer gives zero."""

    ENDS = ("input", "output")

    def __init__(self, config: DiffusionConfig | None = None):
        super().__init__()
        self.config = c = config or DiffusionConfig()
        self.input = nn.Linear(1, c.d_model)
        self.embed_step = step_embedding()
        local = not c.unconditional and not c.mel_blocks
        self.upsample = MelUpsampler(c.hop) if local else None
        self.backbone = c.backbone(
            bidirectional=c.bidirectional,
            d_global=STEP_HIDDEN,
            d_local=c.n_mels if local else 0,
            shift=not c.bidirectional,
            pair_skips=c.pair_skips,
        )
        self.hear = None
        if c.mel_blocks and not c.unconditional:
            widths = [block.layer.d_model for block in self.backbone.s4_blocks()]
            self.hear = nn.ModuleList(Hearing(c.n_mels, c.hop, width) for width in widths)
        self.told = Conditions(c.conditions, c.condition_counts, STEP_HIDDEN)
        self.output = nn.Sequential(
            nn.Linear(c.d_model, c.d_model), nn.ReLU(), nn.Linear(c.d_model, 1)
        )
        nn.init.zeros_(self.output[2].weight)
        nn.init.zeros_(self.output[2].bias)

    def denoise(self, x: Tensor, step: Tensor, mel: Tensor | None) -> Tensor:
        """(B, L), (B, 512), (B, n_mels, frames) or None -> (B, L)."""
        told = {"global_": step}
        if self.hear is not None:
            told["hear"] = lambda slot, length: self.hear[slot](mel, length)
        elif mel is not None:
            told["local"] = self.upsample(mel)[:, : x.shape[1]]  # (B, L, n_mels)
        y = F.relu(self.input(x.unsqueeze(-1)))  # (B, L, D)
        return self.output(self.backbone(y, **told)).squeeze(-1)


# name of a configuration -> settings that differ from the defaults
CONFIGS = {
    "large": {},
    "small": {"d_model": 64},
    "small_unidirectional": {"d_model": 64, "bidirectional": False},
}

# 1.9M parameters, 8 kHz: the size of sashimi_diffwave_digits
DIGITS = {"sample_rate": 8000, "l_max": 6000, "clip_length": 6000, "d_model": 48, "n_layers": [2],
          "tied": True, "beta_first": 2e-5, "beta_last": 0.04, "data_std": 0.13}  # fmt: skip


def named_config(name: str) -> DiffusionConfig:
    """The configuration of that name, one of `CONFIGS`; ValueError for another."""
    check_name("configuration", name, CONFIGS)
    return DiffusionConfig(**CONFIGS[name])


FAMILY = Family(
    kind="diffwave",
    config=DiffusionConfig,
    module=SashimiDiffWave,
    task=NoiseTask,
    models={
        "diffwave": CONFIGS["large"],
        "diffwave_small": CONFIGS["small"],
        "diffwave_small_unidirectional": CONFIGS["small_unidirectional"],
        "diffwave_digits": DIGITS,
    },
    training={"start_lr": 2e-4, "ema": 0.9999},  # [D]; the weights that were published: averages
    entries={"sashimi_diffwave_digits": None, "sashimi_diffwave_sc09": None},
)
