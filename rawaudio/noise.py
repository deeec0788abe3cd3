"""The task of diffusion models: how far the noise that they predict in noisy audio is off."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rawaudio import golden
from rawaudio.batches import Batch, wave_batches
from rawaudio.data import ClipDataset
from rawaudio.diffusion import DiffusionSettings
from rawaudio.family import Task
from rawaudio.model import Model, bare
from rawaudio.samplers import noise_schedule, randn, step_at

# unit of a loss -> the same in words
AXES = {"mse": "squared error of the noise", "relative": "error of the noise, of that of scaling"}
NOISES = 2  # steps and noises that a clip of a data set meets when a model is scored


def noise_error(
    model: nn.Module,
    wav: Tensor,
    generator: torch.Generator,
    part: tuple[int, int] | None = None,
    rows: Tensor | None = None,
    unit: str = "mse",
) -> Tensor:
    """Error of the noise that the model predicts in noisy audio; the mean of clips, a scalar.

    Each clip meets one step and one noise, drawn from `generator`; the steps of a batch are spread
    evenly, which keeps the loss of different batches comparable. A vocoder gets its spectrogram.

    Args:
        wav: (B, L) in [-1, 1].
        part: (first, n): these clips are number `first` and following of a batch of n; from the
            same generator they meet the steps and the noise that they would meet in it.
        rows: (B, C), what the model is told of each clip, see `Conditions`; nothing if None.
        unit: "mse", the mean square (DDPM, arXiv:2006.11239, eq. 14), for steps even in t; or
            "relative" to that of the best multiple of x, 1 for a network that hears nothing, as EDM
            weights it (arXiv:2206.00364, table 1); it needs `data_std`. Its steps are even in the
            logarithm of the signal-to-noise ratio: of 200 steps even in t one in ten has noise no
            louder than the audio, and those decide how clear it is.
    """
    own = bare(model)
    first, n = part or (0, len(wav))
    place = slice(first, first + len(wav))
    wav = wav.to(own.device)
    u = torch.rand((), generator=generator, device=generator.device).item()
    spread = _even_in_t if unit == "mse" else _even_in_snr
    t, levels = map(torch.from_numpy, spread(own.alpha_bar, (np.arange(n)[place] + u) / n))
    a = levels[:, None].to(wav)
    noise = randn((n, *wav.shape[1:]), generator)[place].to(wav)
    x = a.sqrt() * wav + (1 - a).sqrt() * noise
    with torch.autocast(wav.device.type, enabled=False):
        mel = None if own.config.unconditional else own.log_mel(wav)
    rows = own.told.rows(len(x), {}) if rows is None else rows.to(wav.device)
    errors = (model(x, t.to(wav.device), mel, rows) - noise).square().mean(1)
    if unit == "relative":
        power = own.config.data_std**2 * a[:, 0]
        errors = errors * ((power + 1 - a[:, 0]) / power)
    return errors.mean()


def _even_in_t(alpha_bar: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and levels at fractions u in [0, 1) of all steps."""
    t = np.floor(u * len(alpha_bar)).astype(np.int64)
    return t, alpha_bar[t]


def _even_in_snr(alpha_bar: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for fractions of the way through log(alpha_bar / (1 - alpha_bar))."""
    first, last = np.log(alpha_bar / (1 - alpha_bar))[[0, -1]]
    levels = 1 / (1 + np.exp(-(first + u * (last - first))))
    return step_at(alpha_bar, levels), levels


def linear_noise_error(alpha_bar: np.ndarray, power: float) -> float:
    """`noise_error` of the best multiple of x at each step, for audio of mean square `power`.

    What can be had without hearing anything: E[noise | x] for white Gaussian audio.
    """
    return float(np.mean(alpha_bar * power / (alpha_bar * power + 1 - alpha_bar)))


def trained_for(config: DiffusionSettings) -> str:
    """Which unit of `noise_error` is the training loss of such a model."""
    return "mse" if config.data_std is None else "relative"


class NoiseTask(Task):
    """The error of the predicted noise is minimised."""

    pcm, scale = True, 1.0
    golden = staticmethod(golden.diffusion)

    def __init__(self, config: DiffusionSettings, length: int):
        super().__init__(config, length)
        self.unit = trained_for(config)
        self.axis = AXES[self.unit]

    def batches(
        self, ds: ClipDataset, batch_size: int, rng: Any, *, pad_multiple: int = 1, **options: Any
    ) -> Iterator[Batch]:
        return wave_batches(ds, batch_size, self.length, rng, **options)

    def loss(self, model: nn.Module, batch: Batch, place: tuple[int, int], rng: Callable) -> Tensor:
        n = len(batch["index"])
        place = place if n else (0, 1)
        error = noise_error(model, batch["wav"], rng(), place, batch.get("told"), self.unit)
        return error * (n * self.length)

    @torch.no_grad()
    def validate(
        self, model: Model, ds: ClipDataset, batch_size: int, shard: tuple[int, int]
    ) -> tuple[float, float]:
        rank, world = shard
        total, count, rng = 0.0, 0, torch.Generator().manual_seed(0)
        for batch in wave_batches(ds, batch_size, self.length, shuffle=False, shard=shard):
            n, planned = len(batch["index"]), int(batch["planned"])
            place = (rank * (batch_size // world), planned) if n else (0, planned)
            error = noise_error(model, batch["wav"], rng, place, batch.get("told"), self.unit)
            total += error.item() * n
            count += n
        return total, count

    def listen(self, model: Model, ds: ClipDataset, n: int) -> tuple[Tensor, list[str]]:
        if self.config.unconditional:
            return super().listen(model, ds, n)
        wav = next(wave_batches(ds, n, self.length, shuffle=False))["wav"]
        rng = torch.Generator().manual_seed(0)
        return model.vocode(model.log_mel(wav), generator=rng), [str(i) for i in range(len(wav))]

    def comparison(self, ds: ClipDataset) -> str:
        if self.unit != "mse":
            return ""
        c = self.config
        wavs = (batch["wav"] for batch in wave_batches(ds, 64, self.length, shuffle=False))
        power = sum(float(wav.square().sum()) for wav in wavs) / (len(ds) * self.length)
        alpha_bar = noise_schedule(c.diffusion_steps, c.beta_first, c.beta_last)
        linear = linear_noise_error(alpha_bar, power)
        return f"for comparison: mse 1.0000 untrained, {linear:.4f} by scaling the input"

    @staticmethod
    @torch.no_grad()
    def scores(model: Model, ds: ClipDataset) -> dict[str, float]:
        scores = {}
        for unit in dict.fromkeys([trained_for(model.config), "mse"]):
            rng, errors = torch.Generator().manual_seed(0), []
            for _ in range(NOISES):
                for batch in wave_batches(ds, 20, model.config.clip_length, shuffle=False):
                    rows = batch.get("told")
                    error = noise_error(model, batch["wav"], rng, rows=rows, unit=unit)
                    errors.append(error.item() * len(batch["index"]))
            scores[unit] = math.fsum(errors) / NOISES / len(ds)
        return scores
