"""ASGAN (arXiv:2210.05271): a StyleGAN3 of one dimension, and the critic that it is trained with.

    z -> mapping -> w;   sines -> layers, each modulated by w -> features (B, bands, frames)

Features are log-mel spectrograms, which Griffin-Lim or a vocoder makes audible, or HuBERT's.
The network is that of RF5/simple-asgan; `compat` is for its weights. rawaudio/adversarial.py has
the task.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.filters import cutoffs
from baselines.stylegan import (
    Block,
    CriticHead,
    Head,
    Layer,
    Sines,
    TurnedSines,
    Weights,
    mapping,
)
from rawaudio import hubert
from rawaudio.adversarial import Adversarial, AdversarialSettings, AdversarialTask
from rawaudio.arguments import floats
from rawaudio.batches import Batch
from rawaudio.conditions import Conditions
from rawaudio.config import as_written, setting
from rawaudio.critics import LOGISTIC, Critic
from rawaudio.data import ClipDataset
from rawaudio.diffusion import Diffusion
from rawaudio.errors import UserError
from rawaudio.family import Family
from rawaudio.griffin_lim import griffin_lim
from rawaudio.hifigan import HiFiGAN
from rawaudio.mel import log_mel

MOST_LAYERS = 100
Listener = Callable[[Tensor], Tensor]


@dataclass
class ASGANConfig(AdversarialSettings):
    """ASGAN. Defaults: the published one of mel spectrograms, 37,245,060 parameters and a critic
    of 33,782,401."""

    latent_dim: int = setting(512, "numbers that decide a clip")
    clip_length: int = setting(15360, "samples that are generated when no length is given")
    # generator
    w_dim: int = setting(512, "features of a style w")
    w_layers: int = setting(1, "layers between z and w, beside the first")
    fourier_channels: int = setting(512, "sines that a clip begins with")
    plain_fourier: bool = setting(False, "sines of fixed frequencies with a common phase")
    fourier_std: float = setting(0.1, "spread of those frequencies, in cycles per clip")
    channels: list[int] = setting(
        [1024] * 5 + [512] * 4 + [256] * 3 + [128] * 2, "features of each layer"
    )
    frames: list[int] = setting([12] * 5 + [24] * 4 + [48] * 3 + [96] * 2, "frames of each layer")
    kernel: int = setting(5, "taps of the layers' convolutions")
    head_kernel: int = setting(1, "taps of the last convolution")
    first_cutoff: float = setting(0.125, "of the first layer's filter, of twice its band")
    last_cutoff: float = setting(0.45, "of the last layers'")
    critical_layers: int = setting(2, "layers with that cutoff")
    slope: float = setting(0.1, "of the leaky ReLU")
    equalized: bool = setting(True, "weights are scaled so that all learn at the same pace")
    compat: bool = setting(False, "as published weights need it, defects included")
    # critic
    critic_channels: int = setting(512, "features of the critic")
    critic_kernel: int = setting(5, "taps of its convolutions")
    critic_blocks: list[int] = setting([3, 3, 3, 3], "ends of its blocks at each number of frames")
    # features
    features: str = setting("mel", "mel: log-mel spectrograms; hubert: of HuBERT's sixth layer")
    bands: int = setting(128, "features of a frame: mel bands")
    n_fft: int = setting(1024, "samples per window of the spectrogram")
    hop: int = setting(160, "samples per frame of it")
    margin: int = setting(0, "samples of silence before and after what the frames say")
    floor: float = setting(-11.5, "log magnitude below which nothing is told apart")
    feature_mean: float = setting(-5.0, "subtracted from log magnitudes")
    feature_std: float = setting(2.0, "by which they are then divided")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(
            "w_dim",
            "w_layers",
            "fourier_channels",
            "kernel",
            "head_kernel",
            "critic_channels",
            "critic_kernel",
            "bands",
            "hop",
        )
        if self.features not in ("mel", "hubert"):
            raise UserError(f"features={self.features}: must be mel or hubert")
        if self.margin < 0:
            raise UserError(f"margin={self.margin}: must be at least 0")
        for name in ("channels", "frames", "critic_blocks"):
            value = getattr(self, name)
            if not 1 <= len(value) <= MOST_LAYERS or min(value) < 1:
                raise UserError(
                    f"{name}={as_written(value)}: 1 to {MOST_LAYERS} numbers, at least 1"
                )
        steps = zip(self.frames, self.frames[1:], strict=False)
        if len(self.frames) != len(self.channels) or any(b not in (a, 2 * a) for a, b in steps):
            raise UserError(
                f"frames={as_written(self.frames)}: a number for each of {len(self.channels)} "
                "channels, that of the layer before or twice as many"
            )
        if any(size % 2 == 0 for size in (self.kernel, self.head_kernel, self.critic_kernel)):
            raise UserError("kernel, head_kernel and critic_kernel: must be odd")
        if not 0 < self.first_cutoff <= self.last_cutoff <= 1:
            raise UserError(
                f"first_cutoff={self.first_cutoff}, last_cutoff={self.last_cutoff}: expected "
                "0 < first_cutoff <= last_cutoff <= 1"
            )
        if not 0 <= self.critical_layers < len(self.channels):
            raise UserError(
                f"critical_layers={self.critical_layers}: fewer than {len(self.channels)} layers"
            )
        if not self.hop <= self.n_fft <= self.training_length or self.feature_std <= 0:
            raise UserError(
                f"n_fft={self.n_fft}, feature_std={self.feature_std}: must be from hop={self.hop} "
                f"to {self.training_length}, and above 0"
            )

    @property
    def training_length(self) -> int:
        return self.frames[-1] * self.hop + 2 * self.margin


class ASGANCritic(Critic):
    """Features (B, bands, frames), conditions (B, C) -> how real they are (B,)."""

    def __init__(self, config: ASGANConfig):
        super().__init__()
        self.config = c = config
        frames, width = c.frames[-1], c.critic_channels
        lengths = [-(-frames // 2**i) for i, n in enumerate(c.critic_blocks) for _ in range(n)]
        widths = [c.bands] + [width] * (len(lengths) - 1)
        self.layers = nn.ModuleList(
            Block(c, *widths[i : i + 2], *lengths[i : i + 2]) for i in range(len(lengths) - 1)
        )
        self.head = CriticHead(c, widths[-1], lengths[-1])
        self.told = Conditions(c.conditions, c.condition_counts, width)

    def forward(self, x: Tensor, rows: Tensor, rng: torch.Generator | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        answer, features = self.head(x)
        told = self.told(rows)
        # how well they fit the conditions, as a projection (arXiv:1802.05637)
        return answer if told is None else answer + (features * told).sum(1) / told.shape[1] ** 0.5


class ASGAN(Adversarial):
    """ASGAN's generator, see `Adversarial`: latents (B, latent_dim) -> features (B, bands, frames).

    A style w stands between the two: model.generate_from_w(model.z2w(z)).
    """

    SAMPLING = SETTINGS = ("vocoder",)
    config: ASGANConfig
    critic, loss = ASGANCritic, LOGISTIC
    vocoder: HiFiGAN | Diffusion | None = None
    listener: Listener | None = None  # see `hear_with`

    def __init__(self, config: ASGANConfig | None = None):
        super().__init__()
        self.config = c = config or ASGANConfig()
        self.told = Conditions(c.conditions, c.condition_counts, c.latent_dim)
        self.mapping = mapping(c)
        self.ff = (Sines if c.plain_fourier else TurnedSines)(c)
        self.preconv = Weights(c.fourier_channels, c.fourier_channels, 1, equalized=c.equalized)
        widths, frames = [c.fourier_channels, *c.channels], [c.frames[0], *c.frames]
        edges = cutoffs(c.first_cutoff, c.last_cutoff, len(c.channels), c.critical_layers)
        self.layers = nn.ModuleList(
            Layer(c, *widths[i : i + 2], *frames[i : i + 2], *edges[i : i + 2])
            for i in range(len(c.channels))
        )
        self.head = Head(c, widths[-1])

    def make_features(self, z: Tensor, rows: Tensor) -> Tensor:
        return self.synthesis(self.styles(z, rows))

    def styles(self, z: Tensor, rows: Tensor) -> Tensor:
        """z (B, latent_dim), conditions (B, C) -> w (B, w_dim)."""
        told = self.told(rows)
        return self.mapping(z if told is None else z + told)

    def synthesis(self, w: Tensor) -> Tensor:
        """w (B, w_dim), or one for the sines, each layer and the head (B, layers + 2, w_dim) ->
        features (B, bands, frames)."""
        first, *each, last = w.unbind(1) if w.dim() == 3 else [w] * (len(self.layers) + 2)
        x = self.preconv(self.ff(first))
        for layer, own in zip(self.layers, each, strict=True):
            x = layer(x, own)
        return self.head(x, last)

    # ---------------------------------------------------------------- styles

    @property
    def z_dim(self) -> int:
        return self.config.latent_dim

    @property
    def w_dim(self) -> int:
        return self.config.w_dim

    @torch.no_grad()
    def z2w(self, z: Tensor, **told: Any) -> Tensor:
        """Styles w (N, w_dim) of latents z (N, z_dim). told: conditions, as in `generate`."""
        z = self.checked(z, check_finite=True)
        return self.styles(z, self.told.rows(len(z), told))

    def generate_from_w(
        self, w: Tensor, length: int | None = None, progress: bool = False
    ) -> Tensor:
        """Clips (N, length) of styles (N, w_dim), or of one for the sines, each layer and the head
        (N, layers + 2, w_dim). ValueError for other shapes and values that are not finite.

        Styles are mixed by an index: of w (2, w_dim), w[[[0] * 4 + [1] * 5]] has the first one for
        the sines and three layers, the second one for four more and the head.
        """
        w, parts = floats("w", w).to(self.device, self.dtype), len(self.layers) + 2
        if w.shape[1:] not in ((self.w_dim,), (parts, self.w_dim)):
            raise UserError(
                f"w of shape {tuple(w.shape)}: expected (clips, {self.w_dim}) or "
                f"(clips, {parts}, {self.w_dim})"
            )
        return self._audio(self.synthesis, (w,), self._length(length), progress)

    # ---------------------------------------------------------------- features and audio

    def heard(self, wav: Tensor) -> Tensor:
        """Features (B, bands, frames) of audio (B, training_length)."""
        c = self.config
        wav = wav[:, c.margin : c.margin + c.frames[-1] * c.hop]
        if c.features == "hubert":
            if self.listener is None and c.sample_rate != hubert.SAMPLE_RATE:
                raise UserError(f"sample_rate={c.sample_rate}: HuBERT's is {hubert.SAMPLE_RATE}")
            listener = self.listener or hubert.hubert_base(self.device)
            x, shape = listener(wav).to(wav), (c.bands, c.frames[-1])
            if x.shape[1:] != shape:
                raise UserError(
                    f"features={c.features}: of shape {tuple(x.shape[1:])}, this model makes "
                    f"{shape}; bands, hop and frames must be those of the features"
                )
            return (x - c.feature_mean) / c.feature_std
        mel = log_mel(wav, c.sample_rate, c.bands, c.n_fft, c.hop, mirrored=True)
        return (mel.clamp(min=c.floor) - c.feature_mean) / c.feature_std

    def features_of(self, batch: Batch, ds: ClipDataset) -> Tensor:
        """Those in files beside the clips, if there are any, else `heard`."""
        c, clips = self.config, [ds.clips[i] for i in batch["index"].tolist()]
        shape = c.bands, c.frames[-1]
        if c.features == "hubert" and not clips:  # of a process that has none of a small batch
            return batch["wav"].new_zeros(1, *shape)
        kept = ds.mapped is None and any(map(hubert.file_of, clips))  # of whole clips alone
        if c.features != "hubert" or not kept:
            return self.heard(batch["wav"])
        rows = [
            hubert.read_features(clip, c.sample_rate, c.hop, c.margin + begin, *shape)
            for clip, begin in zip(clips, batch["begin"].tolist(), strict=True)
        ]
        return (torch.stack(rows).to(batch["wav"]) - c.feature_mean) / c.feature_std

    def hear_with(self, listener: Listener) -> None:
        """From now on features=hubert are those of this function: audio (B, frames hop) -> (B,
        bands, frames). Without one they are HuBERT's, see `hubert.hubert_base`."""
        object.__setattr__(self, "listener", listener)  # not among the modules

    @property
    def speaks(self) -> bool:
        return self.config.features == "mel" or self.vocoder is not None

    def to_audio(self, x: Tensor) -> Tensor:
        """By the vocoder, if there is one (see `speak_with`), else by Griffin-Lim."""
        c, vocoder = self.config, self.vocoder
        x = x * c.feature_std + c.feature_mean
        if not self.speaks:
            raise UserError(f"features={c.features}: to be heard, they need a vocoder=PATH_OR_URL")
        if vocoder is None:
            wav = griffin_lim(x, c.sample_rate, c.n_fft, c.hop)
        elif isinstance(vocoder, Diffusion):  # clip by clip: the same noise for each
            noises = [torch.Generator().manual_seed(0) for _ in x]
            parts = zip(x.split(1), noises, strict=True)
            wav = torch.cat([vocoder.to(x).vocode(part, generator=noise) for part, noise in parts])
        else:
            wav = vocoder.to(x)(x)
        wav = F.pad(wav, (c.margin, c.margin))
        return wav / wav.abs().amax(1, keepdim=True).clamp(min=1)

    def speak_with(self, vocoder: HiFiGAN | Diffusion | None) -> None:
        """From now on this vocoder makes the audio, Griffin-Lim if it is None; it is no part of the
        model's weights. UserError for one of other features."""
        theirs: dict[str, Any] = {"features": "mel"}
        if isinstance(vocoder, HiFiGAN):
            theirs = {"bands": vocoder.config.features, "hop": math.prod(vocoder.config.rates)}
        elif isinstance(vocoder, Diffusion) and not vocoder.config.unconditional:
            v = vocoder.config
            theirs |= {"sample_rate": v.sample_rate, "bands": v.n_mels, "n_fft": v.n_fft,
                       "hop": v.hop}  # fmt: skip
        elif vocoder is not None:
            raise UserError(f"{type(vocoder).__name__}: not a vocoder of mel spectrograms")
        for name, value in theirs.items():
            if (own := getattr(self.config, name)) != value:
                what = "Griffin-Lim" if vocoder is None else f"a {type(vocoder).__name__} vocoder"
                raise UserError(f"{what} of {name}={value}: this model's have {name}={own}")
        object.__setattr__(self, "vocoder", vocoder)  # not among the modules

    def described(self, cfg: Any) -> list[str]:
        return super().described(cfg) + ([f"vocoder {cfg.vocoder}"] if cfg.vocoder else [])

    def augment(
        self, real: Tensor, made: Tensor, p: float, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Noise, and another loudness, contrast and time, each for a clip with probability p."""
        return changed(real, p, rng), changed(made, p, rng)


def changed(x: Tensor, p: float, rng: torch.Generator) -> Tensor:
    """Features (B, bands, frames) with random changes."""
    B, _, frames = x.shape
    size = {"generator": rng, "device": rng.device}
    fires = (torch.rand(4, B, 1, 1, **size) < p).to(x)
    loudness, contrast = torch.randn(2, B, 1, 1, **size).to(x)
    x = x * (1 + 0.1 * contrast * fires[0]) + 0.3 * loudness * fires[1]
    x = x + 0.2 * torch.randn(x.shape, **size).to(x) * fires[2]
    most = max(1, frames // 8)
    shift = torch.randint(-most, most + 1, (B, 1, 1), **size).to(x.device) * fires[3].long()
    place = (torch.arange(frames, device=x.device) - shift).clamp(0, frames - 1)
    return x.gather(2, place.expand_as(x))


HUBERT = {  # 33,384,196 parameters, and a critic of 37,043,457
    "features": "hubert", "bands": 768, "hop": 320, "n_fft": 400, "margin": 320, "kernel": 3,
    "clip_length": 16000, "feature_mean": 0.0, "feature_std": 1.0,
    "channels": [1024] * 5 + [768] * 4 + [512] * 5,
    "frames": [6] * 5 + [12] * 4 + [24] * 3 + [48] * 2,
}  # fmt: skip

# Clips of 0.64 s at 8 kHz: spoken digits.
DIGITS = {
    "sample_rate": 8000, "clip_length": 5120, "latent_dim": 64, "w_dim": 128,
    "fourier_channels": 96, "channels": [96] * 7,
    "frames": [8] * 2 + [16] * 2 + [32] * 2 + [64],
    "kernel": 3, "first_cutoff": 0.4, "critic_channels": 96, "critic_kernel": 3,
    "critic_blocks": [1, 2, 2, 2], "bands": 40, "n_fft": 320, "hop": 80, "floor": -8.0,
    "feature_mean": -5.5,
}  # fmt: skip

FAMILY = Family(
    kind="asgan",
    config=ASGANConfig,
    module=ASGAN,
    task=AdversarialTask,
    models={"asgan": {}, "asgan_hubert": HUBERT, "asgan_digits": DIGITS},
    follows={"features=hubert": HUBERT},
    recipes={
        "asgan-digits": {"model": "asgan_digits", "batch_size": 16, "peak": 0.9, "ema": 0.998,
                         "max_steps": 20_000, "validation_interval": 1000,
                         "checkpoint_interval": 1000, "condition_lr": 5e-3},
    },
    entries={
        "asgan_digits": None,
        "asgan_hubert_sc09_6": "https://github.com/RF5/simple-asgan/releases/download/v0/"
        "asgan_hubert_ckpt_00520000_slim.pt",
    },
    training={"start_lr": 2e-3, "betas": [0.0, 0.99], "schedule": "constant", "warmup_steps": 0,
              "grad_clip": 10.0, "model.critic_rate": 0.5, "model.penalty": 0.5,
              "model.penalty_interval": 16, "model.augment": 0.2},
)  # fmt: skip
