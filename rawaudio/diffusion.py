"""Diffusion models, which predict the noise in raw audio, and clips from them.

    x_t = sqrt(a_t) x + sqrt(1 - a_t) noise,   a_t = prod (1 - beta) over steps 0..t

The network sees x_t and the step t = 0..T-1, possibly fractional, and predicts the noise; a_t is
called `alpha_bar`, its values levels. (DiffWave, arXiv:2009.09761; samplers.py has the samplers,
noise.py what such models are trained for.)
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rawaudio.arguments import check_generator, clips, floats, integer, tensor
from rawaudio.conditions import guided
from rawaudio.config import setting
from rawaudio.errors import UserError
from rawaudio.mel import log_mel
from rawaudio.model import Model, ModelConfig, in_eval
from rawaudio.samplers import (
    DETERMINISTIC,
    Denoise,
    ddim_invert,
    find_sampler,
    noise_schedule,
    randn,
    sphere,
)

STEP_FEATURES, STEP_HIDDEN = 128, 512  # of the embedding of t
PER_PASS = 2**17  # samples of all clips that go through the network at once, for the memory


@dataclass
class DiffusionSettings(ModelConfig):
    """Settings of every diffusion model."""

    diffusion_steps: int = setting(200, "steps T of the noise schedule")
    beta_first: float = setting(1e-4, "variance that the first step adds; linear in between")
    beta_last: float = setting(0.02, "variance that the last step adds")
    data_std: float | None = setting(
        None, "rms of the audio: the network's input and output are scaled to rms 1 at every step"
    )
    unconditional: bool = setting(True, "false: a vocoder, which needs a mel spectrogram")
    n_mels: int = setting(80, "mel bands of the vocoder's input")
    n_fft: int = setting(1024, "samples per window of its spectrogram")
    hop: int = setting(256, "samples per frame of it")
    tacotron_mel: bool = setting(
        False, "that spectrogram is Tacotron's: up to 8 kHz, frames centred on their first sample"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("diffusion_steps", "n_mels", "hop")
        if self.n_fft < self.hop:
            raise UserError(f"n_fft={self.n_fft}: must be at least hop={self.hop}")
        if self.data_std is not None and self.data_std <= 0:
            raise UserError(f"data_std={self.data_std}: must be above 0")
        if not 0 < self.beta_first <= self.beta_last < 1:
            betas = f"beta_first={self.beta_first}, beta_last={self.beta_last}"
            raise UserError(f"{betas}: expected 0 < beta_first <= beta_last < 1")


def step_features(t: Tensor) -> Tensor:
    """Sines and cosines of steps t (B,) at 64 frequencies from 1 down to 1e-4: (B, 128), double."""
    half = STEP_FEATURES // 2
    angle = t.double()[:, None] * torch.logspace(0, -4, half, dtype=torch.float64, device=t.device)
    return torch.cat([angle.sin(), angle.cos()], 1)


def step_embedding() -> nn.Sequential:
    """Features of a step (B, 128) -> its embedding (B, 512)."""
    first, second = nn.Linear(STEP_FEATURES, STEP_HIDDEN), nn.Linear(STEP_HIDDEN, STEP_HIDDEN)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU())


class Diffusion(Model):
    """A diffusion model. `model(x, diffusion_steps)`: noisy audio (B, L), (B,) -> noise (B, L).

    With `config.unconditional` false a vocoder: `forward` needs a mel spectrogram, see `vocode`.
    With `config.data_std`, s, the noise is

        x sqrt(1 - a) / v + s sqrt(a / v) network(x / sqrt(v)),   v = a s^2 + 1 - a

    the best multiple of x, and what the network adds: both it and its input have variance 1
    (EDM, arXiv:2206.00364, appendix B.6, for audio scaled by sqrt(a)). Else it is network(x).

    What a network adds: `embed_step`, a `step_embedding`, and

        denoise(x, step, mel)    scaled audio (B, L), embedding of step and conditions (B, 512), mel
                                 (B, n_mels, ceil(L / hop)) or None -> (B, L)
    """

    config: DiffusionSettings
    _signal: Tensor | None = None  # sqrt(alpha_bar), double whatever the weights are

    @property
    def alpha_bar(self) -> np.ndarray:
        """(T,) levels of the model's noise schedule."""
        c = self.config
        return noise_schedule(c.diffusion_steps, c.beta_first, c.beta_last)

    def forward(
        self,
        x: Tensor,
        diffusion_steps: Tensor,
        mel: Tensor | None = None,
        rows: Tensor | None = None,
        **told: Any,
    ) -> Tensor:
        """The noise in x, (B, L).

        Args:
            x: float (B, L >= 1), audio in [-1, 1] mixed with Gaussian noise.
            diffusion_steps: (B,) from 0 to T-1, whole or fractional.
            mel: (B, n_mels, ceil(L / hop)) as `log_mel` makes it, for vocoders; else None.
            rows: conditions as indices (B, C), see `Conditions`; else by name. Others: not told.

        Raises ValueError for other shapes or steps, a mel that is missing or not wanted; TypeError
        for tensors of another type.
        """
        x = clips("x", x, check_finite=False).to(self.device, self.dtype)
        top = self.config.diffusion_steps - 1
        t = tensor("diffusion_steps", diffusion_steps).to(x.device)
        if t.shape != x.shape[:1] or not ((t >= 0) & (t <= top)).all():
            raise ValueError(f"diffusion_steps must be ({x.shape[0]},) numbers from 0 to {top}")
        rows = self.told.rows(len(x), told) if rows is None else rows
        mel = self._checked(mel, x)
        step = self.embed_step(step_features(t).to(self.dtype))  # (B, 512)
        if len(self.told):
            step = step + self.told(rows)
        if self.config.data_std is None:
            return self.denoise(x, step, mel)
        scale, keep, add = self._scales(t.double())
        return keep * x + add * self.denoise(scale * x, step, mel)

    def _scales(self, t: Tensor) -> list[Tensor]:
        """Factors (B, 1) of the input, and in the noise of x and of the network's output."""
        if self._signal is None or self._signal.device != t.device:
            self._signal = torch.from_numpy(np.sqrt(self.alpha_bar)).to(t.device)
        low = t.long().clamp(max=max(0, len(self._signal) - 2))
        high = (low + 1).clamp(max=len(self._signal) - 1)
        a = torch.lerp(self._signal[low], self._signal[high], t - low).square()  # as `level_at`
        signal = a * self.config.data_std**2
        v = signal + 1 - a
        factors = v.rsqrt(), (1 - a).sqrt() / v, (signal / v).sqrt()
        return [f[:, None].to(self.dtype) for f in factors]

    def _checked(self, mel: Any, x: Tensor) -> Tensor | None:
        """The mel spectrogram for audio x (B, L), on its device; ValueError for another shape."""
        c = self.config
        if c.unconditional:
            if mel is not None:
                raise UserError("this model is unconditional: it takes no mel spectrogram")
            return None
        mel = None if mel is None else floats("mel", mel, check_finite=False)
        shape = (x.shape[0], c.n_mels, -(-x.shape[1] // c.hop))
        if mel is None or tuple(mel.shape) != shape:
            got = "none" if mel is None else f"shape {tuple(mel.shape)}"
            wanted = f"{c.n_mels} bands and one frame per {c.hop} samples at {c.sample_rate} Hz"
            raise UserError(f"mel of {got}: expected {shape}, {wanted}")
        return mel.to(x)

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        n: int,
        steps: int | None = None,
        sampler: str = "dpm_solver_pp_2m_sde",
        generator: torch.Generator | None = None,
        progress: bool = False,
        length: int | None = None,
        guidance: float | None = None,
        **told: Any,
    ) -> Tensor:
        """n clips, float (n, length) in [-1, 1] on the model's device.

        Args:
            n: clips.
            steps: passes of the network, 1..T; None: what suits the sampler, `DEFAULT_STEPS`.
            sampler: one of `SAMPLERS`.
            generator, guidance, told: see `Model`.
            progress: show a progress bar.
            length: samples per clip; `config.clip_length` if None.

        Raises ValueError for an argument outside its range, and for a vocoder (use `vocode`).
        """
        n = integer("n", n)
        length = integer("length", self.config.clip_length if length is None else length)
        self._check_unconditional()
        # all is checked before anything is drawn
        sampler = find_sampler(sampler, steps, self.config.diffusion_steps)
        self.checked_guidance(guidance)
        check_generator(generator)
        denoise = self._denoiser(self.told.draw(n, told, generator), guidance)
        return self._sample(randn((n, length), generator), sampler, denoise, generator, progress)

    def generate_from_latent(
        self,
        z: Tensor,
        steps: int | None = None,
        sampler: str = "ddim",
        progress: bool = False,
        guidance: float | None = None,
        **told: Any,
    ) -> Tensor:
        """The clips (N, L) in [-1, 1] that belong to latents z (N, L): same z, same audio.

        Latents are standard normal; `between` walks from one to another. The sampler must be one of
        `DETERMINISTIC`; ValueError for others, for other shapes and for values that are not finite.
        What is not told is not drawn either.
        """
        self._check_unconditional()
        run = find_sampler(sampler, steps, self.config.diffusion_steps)
        if sampler not in DETERMINISTIC:
            known = " or ".join(sorted(DETERMINISTIC))
            raise UserError(f"sampler={sampler} draws noise of its own; use {known}")
        z = clips("z", z)
        denoise = self._denoiser(self.told.rows(len(z), told), guidance)
        return self._sample(z, run, denoise, None, progress)

    def latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n latents (n, clip_length), for `generate_from_latent`."""
        return randn((n, self.config.clip_length), generator)

    def between(self, a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
        """Latents on the way from a to b, as likely as these, with t from 0 to 1."""
        return sphere(a, b, t)

    @torch.no_grad()
    def invert(
        self,
        wav: Tensor,
        steps: int | None = None,
        iterations: int = 4,
        progress: bool = False,
        guidance: float | None = None,
        **told: Any,
    ) -> Tensor:
        """Latents z (N, L) of clips (N, L) in [-1, 1], by DDIM inversion.

        generate_from_latent(z, steps) with the ddim sampler and as many steps gives the clips
        back, the closer the more `iterations`, passes of the network per step.
        """
        self._check_unconditional()
        iterations = integer("iterations", iterations)
        _, steps = find_sampler("ddim", steps, self.config.diffusion_steps)
        wav = clips("wav", wav).to(self.device, self.dtype)
        denoise = self._denoiser(self.told.rows(len(wav), told), guidance)
        options = {"iterations": iterations, "progress": progress}
        with in_eval(self):
            return ddim_invert(denoise, wav, self.alpha_bar, steps, **options)

    def vocode(
        self,
        mel: Tensor,
        steps: int | None = None,
        sampler: str = "fast",
        generator: torch.Generator | None = None,
        progress: bool = False,
        guidance: float | None = None,
        **told: Any,
    ) -> Tensor:
        """Audio (B, F hop) in [-1, 1] for log-mel spectrograms (B, n_mels, F).

        The spectrograms are `model.log_mel` of audio. ValueError for other shapes, for values that
        are not finite, for an unconditional model. What is not told is not drawn either.
        """
        c = self.config
        if c.unconditional:
            raise UserError("this model is unconditional; vocoding needs one trained with mel")
        mel = floats("mel", mel, check_finite=False)
        if mel.dim() != 3 or mel.shape[1] != c.n_mels or 0 in mel.shape:
            got = f"mel of shape {tuple(mel.shape)}"
            raise UserError(f"{got}: expected (clips, {c.n_mels}, frames >= 1)")
        floats("mel", mel)
        sampler = find_sampler(sampler, steps, c.diffusion_steps)
        denoise = self._denoiser(self.told.rows(len(mel), told), guidance, mel)
        z = randn((mel.shape[0], mel.shape[2] * c.hop), generator)
        return self._sample(z, sampler, denoise, generator, progress)

    def log_mel(self, wav: Tensor) -> Tensor:
        """The spectrograms (B, n_mels, ceil(L / hop)) of audio (B, L) that a vocoder takes."""
        c = self.config
        wav = floats("wav", wav, check_finite=False)
        kind = {"tacotron": c.tacotron_mel}
        return log_mel(wav, c.sample_rate, c.n_mels, c.n_fft, c.hop, **kind)

    def _check_unconditional(self) -> None:
        if not self.config.unconditional:
            raise UserError("this model is a vocoder: it needs a mel spectrogram, use vocode")

    @torch.no_grad()
    def _sample(self, z, sampler, denoise, generator, progress) -> Tensor:
        """What the sampler and its steps make of noise z."""
        run, steps = sampler
        z = z.to(self.device, self.dtype)
        with in_eval(self):
            wav = run(denoise, z, self.alpha_bar, steps, generator=generator, progress=progress)
        return wav.clamp(-1, 1)

    def _denoiser(self, rows: Tensor, guidance: float | None, mel: Tensor | None = None) -> Denoise:
        """What samplers call: the noise in x (B, L) at step t; with guidance, from two passes."""
        guidance, untold = self.checked_guidance(guidance), self.untold(rows)

        def noise(x: Tensor, t: float, rows: Tensor, untold: Tensor, mel: Tensor | None) -> Tensor:
            if guidance != 1:
                x, rows = torch.cat([x, x]), torch.cat([rows, untold])
                mel = None if mel is None else torch.cat([mel, mel])
            steps = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
            both = self(x, steps, mel, rows)
            return both if guidance == 1 else guided(*both.chunk(2), guidance)

        def denoise(x: Tensor, t: float) -> Tensor:
            size = max(1, PER_PASS // x.shape[1])  # for the memory
            mels = itertools.repeat(None) if mel is None else mel.split(size)
            told = rows.split(size), untold.split(size)
            parts = zip(x.split(size), *told, mels, strict=False)
            return torch.cat([noise(x, t, *of_clips) for x, *of_clips in parts])

        return denoise

    # ---------------------------------------------------------------- for the command `generate`

    KIND = "a diffusion"
    SAMPLING = ("steps", "sampler")
    SETTINGS = (*SAMPLING, "mel_from")

    def check_settings(self, cfg: Any) -> None:
        if self.config.unconditional and cfg.mel_from:
            raise UserError(f"mel_from={cfg.mel_from}: this model is unconditional, not a vocoder")
        if not self.config.unconditional and not cfg.mel_from:
            raise UserError("this model is a vocoder: give it audio with mel_from=")
        if not self.config.unconditional and cfg.length:
            raise UserError(f"length={cfg.length}: a vocoder's clips are as long as mel_from's")
        default = "dpm_solver_pp_2m_sde" if self.config.unconditional else "fast"
        find_sampler(cfg.sampler or default, cfg.steps, self.config.diffusion_steps)

    def make(self, cfg, n, source, length, told, generator, progress) -> tuple[Tensor, None]:
        """n clips (n, length), without likelihoods; a vocoder's are as long as their source."""
        options = {"steps": cfg.steps, "guidance": cfg.guidance} | told
        options |= {"generator": generator, "progress": progress}
        options |= {"sampler": cfg.sampler} if cfg.sampler else {}
        if source is None:
            return self.generate(n, length=length, **options), None
        mel = self.log_mel(source.to(self.device))
        return self.vocode(mel, **options)[:, : source.shape[1]], None

    def described(self, cfg: Any) -> list[str]:
        """How clips were made, in words, for their page."""
        words = [f"seed {cfg.seed}"] + ([f"sampler {cfg.sampler}"] if cfg.sampler else [])
        return words + ([f"{cfg.steps} steps"] if cfg.steps else [])
