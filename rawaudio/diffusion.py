"""SashimiDiffWave: diffusion over raw audio, and the samplers that turn noise into clips.

    x_t = sqrt(a_t) x + sqrt(1 - a_t) noise,   a_t = prod (1 - beta) over steps 0..t

The network sees x_t and the step t = 0..T-1, possibly fractional, and predicts the noise; a_t is
called `alpha_bar`, its values levels. The network: SaShiMi (arXiv:2202.09729) in place of
DiffWave's convolutions (arXiv:2009.09761). A sampler walks from level a_{T-1} to level 1, which is
audio, in a number of steps of its own choice; each costs one pass of the network.
"""

import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawaudio.arguments import check_generator, clips, floats, integer, number, tensor
from rawaudio.conditions import Conditions, ToldByName, guided
from rawaudio.config import CONFIGS, DiffusionConfig, check_guidance, check_name
from rawaudio.errors import UserError
from rawaudio.mel import log_mel
from rawaudio.progress import watched
from sashimi.backbone import Sashimi
from sashimi.s4 import FullPrecision

STEP_FEATURES, STEP_HIDDEN = 128, 512  # of the embedding of t
FAST_BETAS = (1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.5)  # DiffWave's fast sampling schedule


def named_config(name: str) -> DiffusionConfig:
    """The configuration of that name, one of `CONFIGS`; ValueError for another."""
    check_name("configuration", name, CONFIGS)
    return DiffusionConfig(**CONFIGS[name])


# ---- the noise schedule -----------------------------------------------------------------------


def noise_schedule(steps: int = 200, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """alpha_bar (steps,), descending, double: betas linear from `first` to `last`."""
    return np.cumprod(1 - np.linspace(first, last, steps))


def level_at(alpha_bar: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Levels at steps t in 0..T-1; sqrt(alpha_bar) is linear between whole steps (DiffWave)."""
    return np.interp(t, np.arange(len(alpha_bar)), np.sqrt(alpha_bar)) ** 2


def step_at(alpha_bar: np.ndarray, level: np.ndarray) -> np.ndarray:
    """The inverse of `level_at`: fractional steps; the first or last step for levels beyond."""
    return np.interp(-np.sqrt(level), -np.sqrt(alpha_bar), np.arange(len(alpha_bar)))


# ---- samplers ---------------------------------------------------------------------------------
# sampler(denoise, x, alpha_bar, steps, *, generator=None, progress=False) -> x
#
#   denoise(x, t)  predicts the noise in x at step t, a float
#   x              (..., L) at the schedule's last level: for audio, Gaussian noise
#   alpha_bar      (T,) as `noise_schedule` gives it
#   steps          calls of denoise, 1..T; ValueError for others

Denoise = Callable[[Tensor, float], Tensor]


def ddpm(
    denoise: Denoise,
    x: Tensor,
    alpha_bar: np.ndarray,
    steps: int,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Ancestral sampling (DDPM, arXiv:2006.11239, algorithm 2), steps evenly spaced in t."""
    t, levels = _even_steps(alpha_bar, steps)
    return _ancestral(denoise, x, t, levels, generator, progress)


def fast(
    denoise: Denoise,
    x: Tensor,
    alpha_bar: np.ndarray,
    steps: int = len(FAST_BETAS),
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """DiffWave's 6 steps (appendix B): ancestral on a schedule of its own, aligned to fractional t.

    Made for vocoders: it starts at level 0.38, where a mel spectrogram must say what comes out.
    """
    if steps != len(FAST_BETAS):
        raise UserError(f"steps={steps}: the fast sampler has exactly {len(FAST_BETAS)} steps")
    levels = np.cumprod(1 - np.array(FAST_BETAS))[::-1]
    return _ancestral(denoise, x, step_at(alpha_bar, levels), levels, generator, progress)


def ddim(
    denoise: Denoise,
    x: Tensor,
    alpha_bar: np.ndarray,
    steps: int,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Deterministic DDIM (arXiv:2010.02502, eq. 12 with sigma = 0); first order in the step."""
    t, levels = _even_steps(alpha_bar, steps)
    for t_i, a, b in _passes(_moves(t, levels), progress):
        noise = denoise(x, t_i)
        clean = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)
        x = math.sqrt(b) * clean + math.sqrt(1 - b) * noise
    return x


def dpm_solver_pp_2m(
    denoise: Denoise,
    x: Tensor,
    alpha_bar: np.ndarray,
    steps: int,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Deterministic DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2); second order."""
    return _dpm_solver_pp(denoise, x, alpha_bar, steps, None, progress)


def dpm_solver_pp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    alpha_bar: np.ndarray,
    steps: int,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095): the same on the reverse SDE, with fresh noise.

    As in ancestral sampling, the noise of each step covers errors that the network made before;
    the deterministic solver carries them to the end.
    """

    def noise() -> Tensor:
        return _randn(x.shape, generator).to(x)

    return _dpm_solver_pp(denoise, x, alpha_bar, steps, noise, progress)


def _dpm_solver_pp(denoise, x, alpha_bar, steps, noise, progress) -> Tensor:
    """Steps evenly spaced in lambda = log(sqrt(a) / sqrt(1 - a)), where the solution is smooth."""
    steps = integer("steps", steps, 1, len(alpha_bar))
    lam = np.linspace(*(math.log(a / (1 - a)) / 2 for a in alpha_bar[[-1, 0]]), steps)
    levels = 1 / (1 + np.exp(-2 * lam))
    h = lam[1] - lam[0] if steps > 1 else math.inf
    previous = None
    for t_i, a, b in _passes(_moves(step_at(alpha_bar, levels), levels), progress):
        clean = (x - math.sqrt(1 - a) * denoise(x, t_i)) / math.sqrt(a)
        if b == 1:  # lambda is infinite there: the last step takes the audio itself
            return clean
        # Adams-Bashforth on the predicted audio; all steps in lambda are h long
        slope = clean if previous is None else 1.5 * clean - 0.5 * previous
        keep = math.sqrt((1 - b) / (1 - a))
        if noise is None:
            x = keep * x - math.sqrt(b) * math.expm1(-h) * slope
        else:
            x = keep * math.exp(-h) * x - math.sqrt(b) * math.expm1(-2 * h) * slope
            x = x + math.sqrt((1 - b) * -math.expm1(-2 * h)) * noise()
        previous = clean
    return x


SAMPLERS = {
    sampler.__name__: sampler
    for sampler in (ddpm, ddim, dpm_solver_pp_2m, dpm_solver_pp_2m_sde, fast)
}
DETERMINISTIC = {"ddim", "dpm_solver_pp_2m"}
DEFAULT_STEPS = {  # ddpm: all T
    "ddim": 50,
    "dpm_solver_pp_2m": 20,
    "dpm_solver_pp_2m_sde": 20,
    "fast": len(FAST_BETAS),
}


def find_sampler(name: str) -> Callable:
    """The sampler of that name, one of `SAMPLERS`; ValueError names the nearest."""
    check_name("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def ddim_invert(
    denoise: Denoise,
    x: Tensor,
    alpha_bar: np.ndarray,
    steps: int,
    *,
    iterations: int = 4,
    progress: bool = False,
) -> Tensor:
    """The noise from which `ddim` with as many steps makes x: DDIM backwards.

    Each step solves for the point whose noise prediction leads here, by fixed-point iteration; one
    iteration is the usual inversion, which closes the loop only for many steps.
    """
    t, levels = _even_steps(alpha_bar, steps)
    for t_i, a, b in _passes(list(_moves(t, levels))[::-1], progress):
        scale = math.sqrt(a / b)
        move = math.sqrt(1 - a) - scale * math.sqrt(1 - b)
        start = guess = scale * x
        for _ in range(iterations):
            guess = start + move * denoise(guess, t_i)
        x = guess
    return x


def _ancestral(denoise, x, t, levels, generator, progress) -> Tensor:
    for t_i, a, b in _passes(_moves(t, levels), progress):
        beta = 1 - a / b
        x = (x - beta / math.sqrt(1 - a) * denoise(x, t_i)) / math.sqrt(1 - beta)
        if b < 1:
            x = x + math.sqrt((1 - b) / (1 - a) * beta) * _randn(x.shape, generator).to(x)
    return x


def _even_steps(alpha_bar: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps from T-1 down to 0, evenly spaced and maybe fractional, and their levels."""
    steps = integer("steps", steps, 1, len(alpha_bar))
    t = np.linspace(len(alpha_bar) - 1, 0, steps)
    return t, level_at(alpha_bar, t)


def _moves(t: np.ndarray, levels: np.ndarray) -> Iterable[tuple[float, float, float]]:
    """(step, its level, the level to go to) of every move; the last one goes to level 1."""
    return zip(t.tolist(), levels.tolist(), [*levels[1:].tolist(), 1.0], strict=True)


def _randn(shape: Iterable[int], generator: torch.Generator | None) -> Tensor:
    """Normal numbers, drawn on the generator's device; by torch's default one on the CPU."""
    check_generator(generator)
    device = generator.device if generator is not None else "cpu"
    return torch.randn(*shape, generator=generator, device=device)


def _passes(moves: Iterable[tuple], progress: bool) -> Iterable[tuple]:
    """The moves, watched if `progress`."""
    moves = list(moves)
    return watched(moves, "diffusion", len(moves), "steps", show=progress)


# ---- training ---------------------------------------------------------------------------------


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
    own = getattr(model, "module", model)
    errors, levels = _noise_errors(model, wav, generator, part, rows, _even_in_snr)
    power = own.config.data_std**2 * levels
    return (errors * ((power + 1 - levels) / power)).mean()


NOISE_ERRORS = {"mse": noise_error, "relative": relative_noise_error}


def trained_for(config: DiffusionConfig) -> str:
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
    own = getattr(model, "module", model)  # distributed training wraps the model
    first, n = part or (0, len(wav))
    place = slice(first, first + len(wav))
    wav = wav.to(own.device)
    u = torch.rand((), generator=generator, device=generator.device).item()
    t, levels = map(torch.from_numpy, spread(own.alpha_bar, (np.arange(n)[place] + u) / n))
    a = levels[:, None].to(wav)
    noise = _randn((n, *wav.shape[1:]), generator)[place].to(wav)
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


# ---- the network ------------------------------------------------------------------------------


def step_features(t: Tensor) -> Tensor:
    """Sines and cosines of steps t (B,) at 64 frequencies from 1 down to 1e-4: (B, 128), double."""
    half = STEP_FEATURES // 2
    angle = t.double()[:, None] * torch.logspace(0, -4, half, dtype=torch.float64, device=t.device)
    return torch.cat([angle.sin(), angle.cos()], 1)


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


class SashimiDiffWave(ToldByName, FullPrecision):
    """Diffusion SaShiMi. `model(x, diffusion_steps)`: noisy audio (B, L), (B,) -> noise (B, L).

    With `config.unconditional` false a vocoder: `forward` needs a mel spectrogram, see `vocode`.
    Untrained, its last layer gives zero. With `config.data_std`, s, the noise is

        x sqrt(1 - a) / v + s sqrt(a / v) network(x / sqrt(v)),   v = a s^2 + 1 - a

    the best multiple of x, and what the network adds: both it and its input have variance 1
    (EDM, arXiv:2206.00364, appendix B.6, for audio scaled by sqrt(a)). Else it is network(x).

    A model that was trained with conditions (`model.conditions`) can be told them by name, one
    value for all clips or a list of one for each: model.generate(4, label="seven").
    """

    def __init__(self, config: DiffusionConfig | None = None):
        super().__init__()
        self.config = c = config or DiffusionConfig()
        self.input = nn.Linear(1, c.d_model)
        self.embed_step = nn.Sequential(
            nn.Linear(STEP_FEATURES, STEP_HIDDEN),
            nn.SiLU(),
            nn.Linear(STEP_HIDDEN, STEP_HIDDEN),
            nn.SiLU(),
        )
        self.upsample = None if c.unconditional else MelUpsampler(c.hop)
        self.backbone = Sashimi(
            d_model=c.d_model, n_layers=c.n_layers, pool=c.pool, expand=c.expand, ff=c.ff,
            d_state=c.d_state, unet=c.unet, bidirectional=c.bidirectional, dropout=c.dropout,
            glu=c.glu, tied=c.tied, l_max=c.tier_lengths or c.l_max, d_global=STEP_HIDDEN,
            d_local=0 if c.unconditional else c.n_mels, shift=not c.bidirectional,
        )  # fmt: skip
        self.told = Conditions(c.conditions, c.condition_counts, STEP_HIDDEN)
        self.output = nn.Sequential(
            nn.Linear(c.d_model, c.d_model), nn.ReLU(), nn.Linear(c.d_model, 1)
        )
        nn.init.zeros_(self.output[2].weight)
        nn.init.zeros_(self.output[2].bias)
        roots = torch.from_numpy(np.sqrt(self.alpha_bar))
        self.register_buffer("_signal", roots, persistent=False)  # sqrt(alpha_bar), double

    def _apply(self, *args, **kwargs) -> "SashimiDiffWave":  # .to(), .float(), ...
        super()._apply(*args, **kwargs)  # the schedule stays double, whatever the weights become
        self._signal = torch.from_numpy(np.sqrt(self.alpha_bar)).to(self.device)
        return self

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def device(self) -> torch.device:
        return self.input.weight.device

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
        **told,
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
        x = clips("x", x, check_finite=False).to(self.input.weight)
        top = self.config.diffusion_steps - 1
        t = tensor("diffusion_steps", diffusion_steps).to(x.device)
        if t.shape != x.shape[:1] or not ((t >= 0) & (t <= top)).all():
            raise ValueError(f"diffusion_steps must be ({x.shape[0]},) numbers from 0 to {top}")
        step = self.embed_step(step_features(t).to(self.input.weight.dtype))  # (B, 512)
        if len(self.told):
            step = step + self.told(self.told.rows(len(x), told) if rows is None else rows)
        elif told:
            self.told.rows(len(x), told)  # refused
        scale, keep, add = self._scales(t.double()) if self.config.data_std else (1, 0, 1)
        y = F.relu(self.input((scale * x).unsqueeze(-1)))  # (B, L, D)
        y = self.backbone(y, global_=step, local=self._local(x, mel))
        return keep * x + add * self.output(y).squeeze(-1)

    def _scales(self, t: Tensor) -> list[Tensor]:
        """Factors (B, 1) of the input, and in the noise of x and of the network's output."""
        low = t.long().clamp(max=max(0, len(self._signal) - 2))
        high = (low + 1).clamp(max=len(self._signal) - 1)
        a = torch.lerp(self._signal[low], self._signal[high], t - low).square()  # as `level_at`
        signal = a * self.config.data_std**2
        v = signal + 1 - a
        factors = v.rsqrt(), (1 - a).sqrt() / v, (signal / v).sqrt()
        return [f[:, None].to(self.input.weight.dtype) for f in factors]

    def _local(self, x: Tensor, mel: Tensor | None) -> Tensor | None:
        """The mel spectrogram at every sample, (B, L, n_mels)."""
        c = self.config
        if self.upsample is None:
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
        return self.upsample(mel.to(x))[:, : x.shape[1]]

    # ---------------------------------------------------------------- generation

    def unconditional_generate(
        self,
        N: int,
        steps: int | None = None,
        sampler: str = "dpm_solver_pp_2m_sde",
        generator: torch.Generator | None = None,
        progress: bool = False,
        length: int | None = None,
        guidance: float | None = None,
        **told,
    ) -> Tensor:
        """`generate`, under the name that all models have: N clips, float (N, length) in [-1, 1].

        A model with conditions is told values drawn by their shares of the training set.
        """
        return self.generate(N, steps, sampler, generator, progress, length, guidance, **told)

    def generate(
        self,
        n: int,
        steps: int | None = None,
        sampler: str = "dpm_solver_pp_2m_sde",
        generator: torch.Generator | None = None,
        progress: bool = False,
        length: int | None = None,
        guidance: float | None = None,
        **told,
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
        z = _randn((n, length), generator)
        return self._sample(z, None, rows, guidance, steps, sampler, generator, progress)

    def generate_from_latent(
        self,
        z: Tensor,
        steps: int | None = None,
        sampler: str = "ddim",
        progress: bool = False,
        guidance: float | None = None,
        **told,
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
        **told,
    ) -> Tensor:
        """Latents z (N, L) of clips (N, L) in [-1, 1], by DDIM inversion.

        generate_from_latent(z, steps) with the ddim sampler and as many steps gives the clips
        back, the closer the more `iterations`, passes of the network per step. guidance and told
        as there.
        """
        self._check_unconditional()
        iterations = integer("iterations", iterations)
        _, steps = self._sampler("ddim", steps)
        wav = clips("wav", wav).to(self.input.weight)
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
        **told,
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
        z = _randn((mel.shape[0], mel.shape[2] * c.hop), generator)
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

    def check_sampler(self, name: str | None = None, steps: int | None = None) -> None:
        """Raises ValueError for a sampler, or a number of its steps, that there is not."""
        default = "dpm_solver_pp_2m_sde" if self.config.unconditional else "fast"
        self._sampler(name or default, steps)

    @torch.no_grad()
    def _sample(self, z, mel, rows, guidance, steps, sampler, generator, progress) -> Tensor:
        sampler, steps = self._sampler(sampler, steps)
        z = z.to(self.input.weight)

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
            size = max(1, 2**17 // x.shape[1])  # clips at once: bounds the memory
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
