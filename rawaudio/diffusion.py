"""The diffusion task: models that predict the noise in raw audio, and clips from them.

    x_t = sqrt(a_t) x + sqrt(1 - a_t) noise,   a_t = prod (1 - beta) over steps 0..t

The network sees x_t and the step t = 0..T-1, possibly fractional, and predicts the noise; a_t is
called `alpha_bar`, its values levels. (DiffWave, arXiv:2009.09761; samplers.py has the samplers.)
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rawaudio.arguments import check_generator, clips, floats, integer, number, tensor
from rawaudio.batches import Batch, wave_batches
from rawaudio.conditions import check_guidance, guided
from rawaudio.config import setting
from rawaudio.data import ClipDataset
from rawaudio.errors import UserError
from rawaudio.family import Task
from rawaudio.mel import log_mel
from rawaudio.model import Model, ModelConfig, bare, few_clips, rounded
from rawaudio.samplers import (
    DEFAULT_STEPS,
    DETERMINISTIC,
    FAST_BETAS,
    Denoise,
    ddim_invert,
    fast,
    find_sampler,
    noise_schedule,
    randn,
    step_at,
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("diffusion_steps", "n_mels", "hop")
        if self.n_fft < self.hop:
            raise UserError(f"n_fft={self.n_fft}: must be at least hop={self.hop}")
        if self.data_std is not None and self.data_std <= 0:
            raise UserError(f"data_std={self.data_std}: must be above 0")
        if not 0 < self.beta_first <= self.beta_last < 1:
            raise UserError(
                f"beta_first={self.beta_first}, beta_last={self.beta_last}: expected "
                "0 < beta_first <= beta_last < 1"
            )


def step_features(t: Tensor) -> Tensor:
    """Sines and cosines of steps t (B,) at 64 frequencies from 1 down to 1e-4: (B, 128), double."""
    half = STEP_FEATURES // 2
    angle = t.double()[:, None] * torch.logspace(0, -4, half, dtype=torch.float64, device=t.device)
    return torch.cat([angle.sin(), angle.cos()], 1)


def step_embedding() -> nn.Sequential:
    """Features of a step (B, 128) -> its embedding (B, 512)."""
    return nn.Sequential(
        nn.Linear(STEP_FEATURES, STEP_HIDDEN),
        nn.SiLU(),
        nn.Linear(STEP_HIDDEN, STEP_HIDDEN),
        nn.SiLU(),
    )


class Diffusion(Model):
    """A diffusion model. `model(x, diffusion_steps)`: noisy audio (B, L), (B,) -> noise (B, L).

    With `config.unconditional` false a vocoder: `forward` needs a mel spectrogram, see `vocode`.
    With `config.data_std`, s, the noise is

        x sqrt(1 - a) / v + s sqrt(a / v) network(x / sqrt(v)),   v = a s^2 + 1 - a

    the best multiple of x, and what the network adds: both it and its input have variance 1
    (EDM, arXiv:2206.00364, appendix B.6, for audio scaled by sqrt(a)). Else it is network(x).

    A model that was trained with conditions (`model.conditions`) can be told them by name, one
    value for all clips or a list of one for each: model.generate(4, label="seven").

    What a network adds: `embed_step`, a `step_embedding`, and

        denoise(x, step, mel)    scaled audio (B, L), embedding of step and conditions (B, 512), mel
                                 (B, n_mels, ceil(L / hop)) or None -> (B, L)
    """

    config: DiffusionSettings

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_signal", None, persistent=False)  # sqrt(alpha_bar), double

    def _apply(self, *args: Any, **kwargs: Any) -> "Diffusion":  # .to(), .float(), ...
        super()._apply(*args, **kwargs)
        self._signal = None  # double, whatever the weights become, and on their device
        return self

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
            x: float (B, L), audio in [-1, 1] mixed with Gaussian noise; any L >= 1. It is taken
                to the model's device and precision.
            diffusion_steps: (B,) from 0 to T-1, whole or fractional.
            mel: (B, n_mels, ceil(L / hop)) as `log_mel` makes it, for vocoders; else None.
            told: conditions by name; what is not given is not told. rows: the same as indices
                (B, C), see `Conditions`.

        Raises:
            ValueError: for other shapes or steps, a mel that is missing or not wanted.
            TypeError: for tensors of another type.
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
        if self._signal is None:
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
            raise UserError(
                f"mel of {got}: expected {shape}, {c.n_mels} bands and one frame per {c.hop} "
                f"samples at {c.sample_rate} Hz"
            )
        return mel.to(x)

    # ---------------------------------------------------------------- generation

    def unconditional_generate(
        self, N: int, steps: int | None = None, *arguments: Any, **settings: Any
    ) -> Tensor:
        """`generate`, under the name that all models have: N clips, float (N, length) in [-1, 1].

        A model with conditions is told values drawn by their shares of the training set.
        """
        return self.generate(N, steps, *arguments, **settings)

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
            generator: source of the noise; torch's default one on the CPU if None. The same state
                of the same generator gives the same clips.
            progress: show a progress bar.
            length: samples per clip; `config.clip_length` if None.
            guidance: how far the noise is pushed from that of the model told nothing (see
                `conditions.guided`), at least 0; 1 is off, others cost twice. `config.guidance` if
                None.
            told: conditions by name, a value for all clips or a list of one for each. What is not
                given is drawn by the shares of the training set, see `draw_conditions`.

        Raises:
            ValueError: for an argument outside its range, and for a vocoder (use `vocode`).
        """
        n = integer("n", n)
        length = integer("length", self.config.clip_length if length is None else length)
        self._check_unconditional()
        self._sampler(sampler, steps)  # before anything is drawn
        guidance = self._guidance(guidance)
        check_generator(generator)
        rows = self.told.draw(n, told, generator)
        z = randn((n, length), generator)
        return self._sample(z, None, rows, guidance, steps, sampler, generator, progress)

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

        Latents are standard normal. Between two, walk on the sphere: cos(s) z1 + sin(s) z2 with s
        from 0 to pi/2 is as likely as both. The sampler must be one of `DETERMINISTIC`; ValueError
        for others, for other shapes and for values that are not finite. guidance and told as in
        `generate`, but what is not given is not told: nothing is drawn.
        """
        self._check_unconditional()
        self._sampler(sampler, steps)
        if sampler not in DETERMINISTIC:
            known = " or ".join(sorted(DETERMINISTIC))
            raise UserError(f"sampler={sampler} draws noise of its own; use {known}")
        z, guidance = clips("z", z), self._guidance(guidance)
        rows = self.told.rows(len(z), told)
        return self._sample(z, None, rows, guidance, steps, sampler, None, progress)

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
        back, the closer the more `iterations`, passes of the network per step. guidance and told
        as there.
        """
        self._check_unconditional()
        iterations = integer("iterations", iterations)
        _, steps = self._sampler("ddim", steps)
        wav = clips("wav", wav).to(self.device, self.dtype)
        guidance, rows = self._guidance(guidance), self.told.rows(len(wav), told)

        def run(denoise: Denoise) -> Tensor:
            return ddim_invert(
                denoise, wav, self.alpha_bar, steps, iterations=iterations, progress=progress
            )

        return self._in_eval(run, None, rows, guidance)

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

        The spectrograms are `model.log_mel` of audio. guidance and told as in
        `generate_from_latent`.
        ValueError for other shapes, for values that are not finite, for an unconditional model.
        """
        c = self.config
        if c.unconditional:
            raise UserError("this model is unconditional; vocoding needs one trained with mel")
        mel = floats("mel", mel, check_finite=False)
        if mel.dim() != 3 or mel.shape[1] != c.n_mels or 0 in mel.shape:
            raise UserError(
                f"mel of shape {tuple(mel.shape)}: expected (clips, {c.n_mels}, frames >= 1)"
            )
        floats("mel", mel)
        self._sampler(sampler, steps)
        guidance, rows = self._guidance(guidance), self.told.rows(len(mel), told)
        z = randn((mel.shape[0], mel.shape[2] * c.hop), generator)
        return self._sample(z, mel, rows, guidance, steps, sampler, generator, progress)

    def log_mel(self, wav: Tensor) -> Tensor:
        """The spectrograms (B, n_mels, ceil(L / hop)) of audio (B, L) that a vocoder takes."""
        c = self.config
        wav = floats("wav", wav, check_finite=False)
        return log_mel(wav, c.sample_rate, c.n_mels, c.n_fft, c.hop)

    def _guidance(self, guidance: float | None) -> float:
        guidance = self.config.guidance if guidance is None else number("guidance", guidance)
        check_guidance(guidance, len(self.told))
        return guidance

    def _check_unconditional(self) -> None:
        if not self.config.unconditional:
            raise UserError("this model is a vocoder: it needs a mel spectrogram, use vocode")

    def _sampler(self, name: str, steps: int | None) -> tuple[Callable, int]:
        """The sampler and its number of steps, checked."""
        sampler = find_sampler(name)
        most = self.config.diffusion_steps
        steps = min(DEFAULT_STEPS.get(name, most), most) if steps is None else steps
        if sampler is not fast:
            steps = integer("steps", steps, 1, most)
        elif steps != len(FAST_BETAS):
            raise UserError(f"steps={steps}: the fast sampler has exactly {len(FAST_BETAS)} steps")
        return sampler, steps

    @torch.no_grad()
    def _sample(self, z, mel, rows, guidance, steps, sampler, generator, progress) -> Tensor:
        sampler, steps = self._sampler(sampler, steps)
        z = z.to(self.device, self.dtype)

        def run(denoise: Denoise) -> Tensor:
            return sampler(
                denoise, z, self.alpha_bar, steps, generator=generator, progress=progress
            )

        return self._in_eval(run, mel, rows, guidance).clamp(-1, 1)

    def _in_eval(
        self, run: Callable[[Denoise], Tensor], mel: Tensor | None, rows: Tensor, guidance: float
    ) -> Tensor:
        """run(denoise) with the model in eval mode, where S4 kernels are computed only once."""
        was_training = self.training
        if was_training:
            self.eval()

        def denoise(x: Tensor, t: float) -> Tensor:
            steps = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
            size = max(1, PER_PASS // x.shape[1])
            mels = itertools.repeat(None) if mel is None else mel.split(size)
            parts = zip(x.split(size), steps.split(size), mels, rows.split(size), strict=False)
            return torch.cat([self._denoise(guidance, *part) for part in parts])

        try:
            return run(denoise)
        finally:
            if was_training:
                self.train()

    def _denoise(self, guidance: float, x, steps, mel, rows) -> Tensor:
        """The noise in x, (B, L); with guidance, from two passes at once."""
        if guidance == 1:
            return self(x, steps, mel, rows)
        twice = [None if v is None else torch.cat([v, v]) for v in (x, steps, mel)]
        told, untold = self(*twice, torch.cat([rows, torch.zeros_like(rows)])).chunk(2)
        return guided(told, untold, guidance)

    # ---------------------------------------------------------------- for the command `generate`

    KIND = "a diffusion"
    SAMPLING = ("steps", "sampler")  # settings that decide which clips are made
    SETTINGS = (*SAMPLING, "mel_from")  # all that other kinds have not

    def check_settings(self, cfg: Any) -> None:
        """Raises UserError for settings of the command that do not go together."""
        if self.config.unconditional and cfg.mel_from:
            raise UserError(f"mel_from={cfg.mel_from}: this model is unconditional, not a vocoder")
        if not self.config.unconditional and not cfg.mel_from:
            raise UserError("this model is a vocoder: give it audio with mel_from=")
        if not self.config.unconditional and cfg.length:
            raise UserError(f"length={cfg.length}: a vocoder's clips are as long as mel_from's")
        default = "dpm_solver_pp_2m_sde" if self.config.unconditional else "fast"
        self._sampler(cfg.sampler or default, cfg.steps)

    def make(
        self, cfg: Any, n: int, source: Tensor | None, length: int, told: dict[str, list[str]],
        generator: torch.Generator, progress: bool,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """n clips (n, length), without likelihoods; a vocoder's are as long as their source."""
        options = {"steps": cfg.steps, "generator": generator, "progress": progress}
        options |= {"sampler": cfg.sampler} if cfg.sampler else {}
        options |= {"guidance": cfg.guidance} | told
        if source is None:
            return self.generate(n, length=length, **options), None
        mel = self.log_mel(source.to(self.device))
        return self.vocode(mel, **options)[:, : source.shape[1]], None

    def described(self, cfg: Any) -> list[str]:
        """How clips were made, in words, for their page."""
        words = [f"seed {cfg.seed}"] + ([f"sampler {cfg.sampler}"] if cfg.sampler else [])
        return words + ([f"{cfg.steps} steps"] if cfg.steps else [])


# ---- the task -----------------------------------------------------------------------------------


def noise_error(
    model: nn.Module,
    wav: Tensor,
    generator: torch.Generator,
    part: tuple[int, int] | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the noise that the model predicts in noisy audio; a scalar.

    The training loss (DDPM, arXiv:2006.11239, eq. 14). wav: (B, L) in [-1, 1]; a vocoder gets its
    spectrogram. Each clip meets one step and one noise, drawn from `generator`; the steps of a
    batch are spread evenly over 0..T-1, which keeps the loss of different batches comparable.
    part (first, n): these clips are number `first` and following of a batch of n; from the same
    generator they meet the steps and the noise that they would meet in it.
    rows (B, C): what the model is told of each clip, see `Conditions`; nothing if None.
    """
    errors, _ = _noise_errors(model, wav, generator, part, rows, _even_in_t)
    return errors.mean()


def relative_noise_error(
    model: nn.Module,
    wav: Tensor,
    generator: torch.Generator,
    part: tuple[int, int] | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Noise error relative to that of the best multiple of the input; the mean of clips, a scalar.

    1 for a network that hears nothing, at every step. The training loss of models with `data_std`,
    as EDM (arXiv:2206.00364, table 1) weights it. Steps are spread evenly over the logarithm of
    the signal-to-noise ratio, not over t: of T = 200 steps one in ten has noise no louder than the
    audio, and those decide how clear it is. Arguments as in `noise_error`.
    """
    errors, levels = _noise_errors(model, wav, generator, part, rows, _even_in_snr)
    power = bare(model).config.data_std ** 2 * levels
    return (errors * ((power + 1 - levels) / power)).mean()


NOISE_ERRORS = {"mse": noise_error, "relative": relative_noise_error}
AXES = {"mse": "squared error of the noise", "relative": "error of the noise, of that of scaling"}


def trained_for(config: DiffusionSettings) -> str:
    """Which of `NOISE_ERRORS` is the training loss of such a model."""
    return "mse" if config.data_std is None else "relative"


def _even_in_t(alpha_bar: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and levels at fractions u in [0, 1) of all steps."""
    t = np.floor(u * len(alpha_bar)).astype(np.int64)
    return t, alpha_bar[t]


def _even_in_snr(alpha_bar: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for fractions of the way through log(alpha_bar / (1 - alpha_bar))."""
    first, last = np.log(alpha_bar / (1 - alpha_bar))[[0, -1]]
    levels = 1 / (1 + np.exp(-(first + u * (last - first))))
    return step_at(alpha_bar, levels), levels


def _noise_errors(model, wav, generator, part, rows, spread) -> tuple[Tensor, Tensor]:
    """Mean squared error of the predicted noise and level of every clip, (B,) each."""
    own = bare(model)
    first, n = part or (0, len(wav))
    place = slice(first, first + len(wav))
    wav = wav.to(own.device)
    u = torch.rand((), generator=generator, device=generator.device).item()
    t, levels = map(torch.from_numpy, spread(own.alpha_bar, (np.arange(n)[place] + u) / n))
    a = levels[:, None].to(wav)
    noise = randn((n, *wav.shape[1:]), generator)[place].to(wav)
    x = a.sqrt() * wav + (1 - a).sqrt() * noise
    with torch.autocast(wav.device.type, enabled=False):
        mel = None if own.config.unconditional else own.log_mel(wav)
    rows = own.told.rows(len(x), {}) if rows is None else rows.to(wav.device)
    return (model(x, t.to(wav.device), mel, rows) - noise).square().mean(1), a[:, 0]


def linear_noise_error(alpha_bar: np.ndarray, power: float) -> float:
    """`noise_error` of the best multiple of x at each step, for audio of mean square `power`.

    What can be had without hearing anything: E[noise | x] for white Gaussian audio.
    """
    return float(np.mean(alpha_bar * power / (alpha_bar * power + 1 - alpha_bar)))


NOISES = 2  # steps and noises that a clip of a data set meets when a model is scored


class NoiseTask(Task):
    """The error of the predicted noise is minimised; see `family.Task`."""

    pcm, scale = True, 1.0

    def __init__(self, config: DiffusionSettings, length: int):
        self.config, self.length, self.unit = config, length, trained_for(config)
        self.axis = AXES[self.unit]

    def batches(
        self, ds: ClipDataset, batch_size: int, rng: Any, *, pad_multiple: int = 1, **options: Any
    ) -> Iterator[Batch]:
        return wave_batches(ds, batch_size, self.length, rng, **options)

    def loss(self, model: nn.Module, batch: Batch, place: tuple[int, int], rng: Callable) -> Tensor:
        n = len(batch["index"])
        place = place if n else (0, 1)
        error = NOISE_ERRORS[self.unit](model, batch["wav"], rng(), place, batch.get("told"))
        return error * (n * self.length)

    def validate(
        self, model: Diffusion, ds: ClipDataset, batch_size: int, shard: tuple[int, int]
    ) -> tuple[float, float]:
        rank, world = shard
        total, count, rng = 0.0, 0, torch.Generator().manual_seed(0)
        for batch in wave_batches(ds, batch_size, self.length, shuffle=False, shard=shard):
            n, planned = len(batch["index"]), int(batch["planned"])
            place = (rank * (batch_size // world), planned) if n else (0, planned)
            with torch.no_grad():
                error = NOISE_ERRORS[self.unit](model, batch["wav"], rng, place, batch.get("told"))
            total += error.item() * n
            count += n
        return total, count

    def listen(self, model: Diffusion, ds: ClipDataset, n: int) -> tuple[Tensor, list[str]]:
        if self.config.unconditional:
            return few_clips(model, n)
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
    def scores(model: Diffusion, ds: ClipDataset) -> dict[str, float]:
        found = {}
        for unit in dict.fromkeys([trained_for(model.config), "mse"]):
            rng, total = torch.Generator().manual_seed(0), []
            for _ in range(NOISES):
                for batch in wave_batches(ds, 20, model.config.clip_length, shuffle=False):
                    rows = batch.get("told")
                    error = NOISE_ERRORS[unit](model, batch["wav"], rng, rows=rows)
                    total.append(error.item() * len(batch["index"]))
            found[unit] = math.fsum(total) / NOISES / len(ds)
        return found

    @staticmethod
    def golden(model: Diffusion) -> dict[str, Any]:
        """Noise, that of the model told the last value of each condition, and audio."""
        t = torch.arange(1000, dtype=torch.float64)
        x = torch.stack([(t * t / 700).sin(), 0.1 * (t / 5).sin()]).float()
        steps = torch.tensor([0.75 * (len(model.alpha_bar) - 1), 3.0])
        rng = torch.Generator().manual_seed(0)
        wav = model.unconditional_generate(1, steps=4, generator=rng, length=2000)
        told = {name: values[-1] for name, values in model.conditions.items()}
        return {
            "noise": rounded(model(x, steps)[:, ::50]),
            "told": rounded(model(x, steps, **told)[:, ::50]),
            "audio": rounded(wav[:, ::50]),
        }
