"""WaveGAN (arXiv:1802.04208): clips in one pass of transposed convolutions, and their critic.

This is the network of chrisdonahue/wavegan, the baseline of the SaShiMi paper;
rawaudio/adversarial.py has the task. Glossary: C channels, doubled from layer to layer of the
critic; n layers; S slice_len, samples of a clip, 16 times the product of the strides.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawaudio.adversarial import Adversarial, AdversarialSettings, AdversarialTask
from rawaudio.conditions import Conditions
from rawaudio.config import as_written, setting
from rawaudio.critics import WASSERSTEIN, Critic
from rawaudio.errors import UserError
from rawaudio.family import Family

TAPS = 25
FIRST = 16  # samples of the coarsest map
SHUFFLED = 4  # layers of the critic that are followed by phase shuffle, at most


@dataclass
class WaveGANConfig(AdversarialSettings):
    """WaveGAN. Defaults: the SC09 model, 19,065,345 parameters, its critic 17,427,969."""

    slice_len: int = setting(16384, "samples that it makes: 16384, 32768, 65536")
    channels: int = setting(64, "features of the finest map")
    upsampling: str = setting("zeros", "or nearest: samples are repeated, then convolved")
    filter_taps: int = setting(0, "of the filter behind the last layer, such as 512; 0: none")
    padding: str = setting(
        "tensorflow", "of convolutions, where odd: the larger half to the right; or torch: left"
    )
    phase_shuffle: int = setting(2, "training: samples by which the critic's maps are shifted")
    critic_steps: int = setting(5, "training: updates of the critic for one of the generator")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("channels")
        if self.slice_len < 2 * FIRST or self.slice_len & (self.slice_len - 1):
            raise UserError(f"slice_len={self.slice_len}: must be a power of 2, at least 32")
        for name, choices in {"upsampling": ("zeros", "nearest"), "padding": tuple(LARGER)}.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"{name}={as_written(value)}: must be {' or '.join(choices)}")
        if not 0 <= self.phase_shuffle < FIRST or self.filter_taps < 0:
            raise UserError(
                f"phase_shuffle={self.phase_shuffle}, filter_taps={self.filter_taps}: must be from "
                f"0 to {FIRST - 1}, and at least 0"
            )

    @property
    def training_length(self) -> int:
        return self.slice_len

    @property
    def strides(self) -> list[int]:
        """Of the generator's layers; those of the critic's too."""
        octaves = int(math.log2(self.slice_len // FIRST))
        return [4] * (octaves // 2) + [2] * (octaves % 2)

    @property
    def widths(self) -> list[int]:
        """Features of the critic's maps, from the finest: 1, C, 2 C, ..."""
        return [1, *(self.channels * 2**i for i in range(len(self.strides)))]


LARGER = {"tensorflow": "right", "torch": "left"}  # where the larger half of an odd padding is


def halves(total: int, padding: str) -> tuple[int, int]:
    """Samples to the left and to the right, of so many in all."""
    small, large = total // 2, total - total // 2
    return (small, large) if LARGER[padding] == "right" else (large, small)


class WaveGAN(Adversarial):
    """WaveGAN, see `Adversarial`. Latents are uniform in [-1, 1].

    z -> dense, (16, C 2^(n-1)) -> n times: upsampled, 25 taps, half the features -> (S, 1), tanh
    """

    config: WaveGANConfig
    loss = WASSERSTEIN

    def __init__(self, config: WaveGANConfig | None = None):
        super().__init__()
        self.config = c = config or WaveGANConfig()
        widths = c.widths[::-1]
        self.z_project = nn.Linear(c.latent_dim, FIRST * widths[0])
        pairs = zip(widths[:-1], widths[1:], strict=True)
        layer = nn.ConvTranspose1d if c.upsampling == "zeros" else nn.Conv1d
        self.upconv = nn.ModuleList(layer(*pair, TAPS) for pair in pairs)
        self.pp_filt = nn.Conv1d(1, 1, c.filter_taps, bias=False) if c.filter_taps else None
        self.told = Conditions(c.conditions, c.condition_counts, c.latent_dim)
        # latents and what is told, side by side, through one dense layer
        self.told_project = None
        if c.conditions:
            self.told_project = nn.Linear(c.latent_dim, FIRST * widths[0], bias=False)
        initialise(self)

    def latents(self, n: int, generator: torch.Generator | None) -> Tensor:
        device = generator.device if generator is not None else "cpu"
        return 2 * torch.rand(n, self.config.latent_dim, generator=generator, device=device) - 1

    def between(self, a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
        """The way of the normal latents that erf makes uniform."""
        a, b = (x.clamp(-1 + 1e-6, 1 - 1e-6).erfinv() for x in (a, b))
        return super().between(a, b, t).erf()

    def make_features(self, z: Tensor, rows: Tensor) -> Tensor:
        """Latents (B, latent_dim), conditions (B, C) -> audio (B, S)."""
        c, y = self.config, self.z_project(z)
        if self.told_project is not None:
            y = y + self.told_project(self.told(rows))
        x = y.unflatten(1, (FIRST, -1)).transpose(1, 2)  # (B, C 2^(n-1), 16)
        for layer, stride in zip(self.upconv, c.strides, strict=True):
            x = self.up(x.relu(), layer, stride)
        x = x.tanh()
        if self.pp_filt is not None:
            x = self.pp_filt(F.pad(x, halves(c.filter_taps - 1, c.padding)))
        return x[:, 0]

    def up(self, x: Tensor, layer: nn.Module, stride: int) -> Tensor:
        """(B, features, L) -> (B, half the features, L stride)."""
        length, padding = x.shape[-1] * stride, self.config.padding
        if self.config.upsampling == "nearest":
            return layer(F.pad(x.repeat_interleave(stride, 2), halves(TAPS - 1, padding)))
        left, _ = halves(TAPS - stride, padding)
        y = F.conv_transpose1d(x, layer.weight, layer.bias, stride)  # (L - 1) stride + 25 samples
        return y[..., left : left + length]


class WaveGANCritic(Critic):
    """Audio (B, S) -> answers (B,).

    n times: 25 taps, strided, leaky ReLU, phase shuffle -> dense. What it is told is compared with
    the mean of the last map over time (projection, arXiv:1802.05637).
    """

    config: WaveGANConfig

    def __init__(self, config: WaveGANConfig):
        super().__init__()
        self.config = c = config
        layers = zip(c.widths[:-1], c.widths[1:], c.strides, strict=True)
        self.downconv = nn.ModuleList(nn.Conv1d(a, b, TAPS, stride) for a, b, stride in layers)
        self.output = nn.Linear(FIRST * c.widths[-1], 1)
        self.told = Conditions(c.conditions, c.condition_counts, c.widths[-1])
        initialise(self)

    def forward(
        self, x: Tensor, rows: Tensor | None = None, rng: torch.Generator | None = None
    ) -> Tensor:
        """rng: source of the shifts of phase shuffle; None: nothing is shifted."""
        r, shifts = self.config.phase_shuffle, [0] * SHUFFLED
        if rng is not None and r:
            drawn = torch.randint(-r, r + 1, (SHUFFLED,), generator=rng, device=rng.device)
            shifts = drawn.tolist()
        return self.answer(x, rows, shifts)

    def answer(self, x: Tensor, rows: Tensor | None, shifts: list[int]) -> Tensor:
        """shifts: of the maps behind the first layers but the last, in samples to the right."""
        x = x[:, None]
        for i, layer in enumerate(self.downconv):
            padded = F.pad(x, halves(TAPS - layer.stride[0], self.config.padding))
            x = F.leaky_relu(layer(padded), 0.2)  # (B, C 2^i, L / stride)
            if i < min(len(self.downconv) - 1, SHUFFLED):
                x = shift(x, shifts[i])
        y = self.output(x.transpose(1, 2).flatten(1))[:, 0]
        if rows is not None and len(self.told):
            y = y + (self.told(rows) * x.mean(2)).sum(1)
        return y


def shift(x: Tensor, k: int) -> Tensor:
    """(..., L) moved k samples to the right, or -k to the left; mirrored at the edge it leaves."""
    length = x.shape[-1]
    return (
        F.pad(x, (k, 0), "reflect")[..., :length]
        if k > 0
        else (F.pad(x, (0, -k), "reflect")[..., -length:])
    )


WaveGAN.critic = WaveGANCritic


def initialise(network: nn.Module) -> None:
    """As TensorFlow does: Glorot's uniform distribution, biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# 1.5M parameters, 8 kHz
DIGITS = {"sample_rate": 8000, "clip_length": 8000, "slice_len": 8192, "channels": 16}

FAMILY = Family(
    kind="wavegan",
    config=WaveGANConfig,
    module=WaveGAN,
    task=AdversarialTask,
    models={"wavegan": {}, "wavegan_digits": DIGITS},
    # chrisdonahue/wavegan: 200,000 steps of the generator, each after five of the critic; clips
    # are scaled to full scale
    recipes={"wavegan-sc09": {"batch_size": 64, "peak": 1.0, "max_steps": 1_000_000,
                              "checkpoint_interval": 10_000, "validation_interval": 10_000}},
    training={"start_lr": 1e-4, "condition_lr": 1e-3, "betas": [0.5, 0.9], "schedule": "constant",
              "warmup_steps": 0},
    entries={"wavegan_sc09": None},
)  # fmt: skip
