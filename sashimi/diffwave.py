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


class MelUpsampler(nn.Module):
    """Log-mel frames (B, n_mels, F) -> (B, F hop, n_mels), by two transposed convolutions in time.

    DiffWave, appendix C: kernels of three bands and two strides, leaky ReLU 0.4 after each.
    """

    def __init__(self, hop: int):
        super().__init__()
        first = next(s for s in range(math.isqrt(hop), 0, -1) if hop % s == 0)
        self.strides = [hop // first, first]  # 16 and 16 for 256
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(1, 1, (3, 2 * s), (1, s), (1, s // 2)) for s in self.strides
        )

    def forward(self, mel: Tensor) -> Tensor:
        y = mel[:, None]
        for stride, layer in zip(self.strides, self.layers, strict=True):
            # odd strides make one sample too many
            y = F.leaky_relu(layer(y)[..., : y.shape[-1] * stride], 0.4)
        return y[:, 0].transpose(1, 2)


class SashimiDiffWave(Diffusion, FullPrecision):
    """Diffusion SaShiMi, see `Diffusion`. Untrained, its last layer gives zero."""

    ENDS = ("input", "output")

    def __init__(self, config: DiffusionConfig | None = None):
        super().__init__()
        self.config = c = config or DiffusionConfig()
        self.input = nn.Linear(1, c.d_model)
        self.embed_step = step_embedding()
        self.upsample = None if c.unconditional else MelUpsampler(c.hop)
        self.backbone = c.backbone(
            bidirectional=c.bidirectional,
            d_global=STEP_HIDDEN,
            d_local=0 if c.unconditional else c.n_mels,
            shift=not c.bidirectional,
        )
        self.told = Conditions(c.conditions, c.condition_counts, STEP_HIDDEN)
        self.output = nn.Sequential(
            nn.Linear(c.d_model, c.d_model), nn.ReLU(), nn.Linear(c.d_model, 1)
        )
        nn.init.zeros_(self.output[2].weight)
        nn.init.zeros_(self.output[2].bias)

    def denoise(self, x: Tensor, step: Tensor, mel: Tensor | None) -> Tensor:
        """(B, L), (B, 512), (B, n_mels, frames) or None -> (B, L)."""
        local = None if mel is None else self.upsample(mel)[:, : x.shape[1]]  # (B, L, n_mels)
        y = F.relu(self.input(x.unsqueeze(-1)))  # (B, L, D)
        return self.output(self.backbone(y, global_=step, local=local)).squeeze(-1)


# name of a configuration -> settings that differ from the defaults
CONFIGS = {
    "large": {},
    "small": {"d_model": 64},
    "small_unidirectional": {"d_model": 64, "bidirectional": False},
}


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
    },
    training={"start_lr": 2e-4, "ema": 0.9999},  # [D]; the weights that were published: averages
    entries={"sashimi_diffwave_digits": None, "sashimi_diffwave_sc09": None},
)
