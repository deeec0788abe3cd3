"""DiffWave (arXiv:2009.09761): a denoiser of gated dilated convolutions, which look both ways.

This is the network of philsyn/DiffWave-unconditional and albertfgu/diffwave-sashimi, the baseline
of the SaShiMi paper; rawaudio/diffusion.py has the task and the samplers' use.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from baselines.normed import Normed
from rawaudio.conditions import Conditions
from rawaudio.config import setting
from rawaudio.diffusion import STEP_HIDDEN, Diffusion, DiffusionSettings, step_embedding
from rawaudio.family import Family
from rawaudio.noise import NoiseTask


@dataclass
class DiffWaveConfig(DiffusionSettings):
    """DiffWave. Defaults: the large SC09 model, 24,071,681 parameters."""

    residual_channels: int = setting(256, "features between the layers")
    skip_channels: int = setting(256, "features of the sum over all layers")
    layers: int = setting(36, "layers")
    cycle: int = setting(12, "layers after which the dilations 1, 2, 4, ... begin again")
    residual_step: bool = setting(
        False, "a layer passes on the embedding of the step, as published weights do"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("residual_channels", "skip_channels", "layers", "cycle")


class Conv(Normed):
    """(B, inputs, L) -> (B, outputs, L); an odd number of taps, zeros beyond the ends."""

    def __init__(self, inputs: int, outputs: int, taps: int = 1, dilation: int = 1):
        super().__init__(outputs, inputs, taps)
        self.dilation, self.padding = dilation, dilation * (taps // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias, padding=self.padding, dilation=self.dilation)


class Upsampler(nn.ModuleList):
    """Log-mel frames (B, n_mels, F) -> (B, n_mels, F hop or a little more).

    Two transposed convolutions in time, leaky ReLU 0.4 after each; strides of 16 and 16 for 256.
    """

    def __init__(self, hop: int):
        first = next(s for s in range(math.isqrt(hop), 0, -1) if hop % s == 0)
        self.strides = [first, hop // first]
        super().__init__(Normed(1, 1, 3, 2 * stride) for stride in self.strides)

    def forward(self, mel: Tensor) -> Tensor:
        y = mel[:, None]
        for stride, layer in zip(self.strides, self, strict=True):
            y = F.conv_transpose2d(
                y, layer.weight, layer.bias, stride=(1, stride), padding=(1, stride // 2)
            )
            y = F.leaky_relu(y, 0.4)
        return y[:, 0]


class Layer(nn.Module):
    """(B, C, L), embedding of the step (B, 512), mel -> the next layer's input, features of the
    sum (B, S, L)."""

    def __init__(self, config: DiffWaveConfig, dilation: int):
        super().__init__()
        c, channels = config, config.residual_channels
        self.residual_step = c.residual_step
        self.fc_t = nn.Linear(STEP_HIDDEN, channels)
        self.dilated_conv = Conv(channels, 2 * channels, 3, dilation)
        self.upsample = None if c.unconditional else Upsampler(c.hop)
        self.mel_conv = None if c.unconditional else Conv(c.n_mels, 2 * channels)
        self.res_conv = Conv(channels, channels)
        self.skip_conv = Conv(channels, c.skip_channels)

    def forward(self, x: Tensor, step: Tensor, mel: Tensor | None) -> tuple[Tensor, Tensor]:
        stepped = x + self.fc_t(step)[..., None]
        u = self.dilated_conv(stepped)
        if mel is not None:
            u = u + self.mel_conv(self.upsample(mel)[..., : x.shape[-1]])
        filtered, gate = u.chunk(2, 1)
        z = filtered.tanh() * gate.sigmoid()
        residual = stepped if self.residual_step else x
        return (residual + self.res_conv(z)) * math.sqrt(0.5), self.skip_conv(z)


class DiffWave(Diffusion):
    """DiffWave, see `Diffusion`. Untrained, its last layer gives zero."""

    config: DiffWaveConfig

    def __init__(self, config: DiffWaveConfig | None = None):
        super().__init__()
        self.config = c = config or DiffWaveConfig()
        self.init_conv = Conv(1, c.residual_channels)
        self.embed_step = step_embedding()
        self.residual_blocks = nn.ModuleList(Layer(c, 2 ** (i % c.cycle)) for i in range(c.layers))
        # published files have it; nothing reads what it gives
        self.residual_blocks[-1].res_conv.requires_grad_(False)
        self.final_conv = nn.Sequential(
            Conv(c.skip_channels, c.skip_channels), nn.ReLU(), nn.Conv1d(c.skip_channels, 1, 1)
        )
        self.told = Conditions(c.conditions, c.condition_counts, STEP_HIDDEN)
        nn.init.zeros_(self.final_conv[2].weight)
        nn.init.zeros_(self.final_conv[2].bias)

    def denoise(self, x: Tensor, step: Tensor, mel: Tensor | None) -> Tensor:
        """(B, L), (B, 512), (B, n_mels, frames) or None -> (B, L)."""
        h, skip = F.relu(self.init_conv(x[:, None])), 0.0
        for layer in self.residual_blocks:
            h, y = layer(h, step, mel)
            skip = skip + y
        return self.final_conv(skip * math.sqrt(1 / self.config.layers))[:, 0]


SMALL = {"residual_channels": 128, "layers": 30, "cycle": 10}  # 6,827,393 parameters
# 1.7M parameters, 8 kHz; noise and scales as sashimi_diffwave_digits has them
DIGITS = {"sample_rate": 8000, "clip_length": 6000, "residual_channels": 64, "skip_channels": 64,
          "layers": 20, "cycle": 10, "beta_first": 2e-5, "beta_last": 0.04,
          "data_std": 0.13}  # fmt: skip

# Source: philsyn/DiffWave-unconditional: Adam 2e-4, clips of 16,000 samples. 32 of them at once,
# as in the paper; AdamW without decay is Adam.
PUBLISHED = {"start_lr": 2e-4, "schedule": "constant", "warmup_steps": 0, "batch_size": 32,
             "checkpoint_interval": 10_000, "validation_interval": 10_000}  # fmt: skip

FAMILY = Family(
    kind="diffwave_wavenet",
    config=DiffWaveConfig,
    module=DiffWave,
    task=NoiseTask,
    models={"diffwave_wavenet": {}, "diffwave_wavenet_small": SMALL,
            "diffwave_wavenet_digits": DIGITS},
    recipes={
        "diffwave-sc09": PUBLISHED | {"max_steps": 1_000_000},
        "diffwave-sc09-small": PUBLISHED | {"model": "diffwave_wavenet_small",
                                            "max_steps": 500_000},
    },
    training={"start_lr": 2e-4},
    entries={"diffwave_sc09": "https://github.com/albertfgu/diffwave-sashimi/raw/checkpoints/exp/"
             "wnet_h256_d36_T200_betaT0.02_uncond/checkpoint/1000000.pkl"},
)  # fmt: skip
