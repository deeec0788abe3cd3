"""Noise schedules, and the samplers that turn noise into clips: pure functions.

A sampler walks from the schedule's last level, where audio is Gaussian noise, to level 1, which is
audio, in a number of steps of its own choice. All have one signature:

    sampler(denoise, x, alpha_bar, steps, *, generator=None, progress=False) -> x

    denoise(x, t)  the noise that the model predicts in x at step t, a float
    x              (..., L) at the schedule's last level
    alpha_bar      (T,) as `noise_schedule` gives it
    steps          calls of denoise, 1..T; ValueError for others
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from rawaudio.arguments import check_generator, integer
from rawaudio.config import check_name
from rawaudio.errors import UserError
from rawaudio.progress import watched

Denoise = Callable[[Tensor, float], Tensor]
FAST_BETAS = (1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.5)  # DiffWave's fast sampling schedule


def noise_schedule(steps: int = 200, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """alpha_bar (steps,), descending, double: betas linear from `first` to `last`."""
    return np.cumprod(1 - np.linspace(first, last, steps))


def level_at(alpha_bar: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Levels at steps t in 0..T-1; sqrt(alpha_bar) is linear between whole steps (DiffWave)."""
    return np.interp(t, np.arange(len(alpha_bar)), np.sqrt(alpha_bar)) ** 2


def step_at(alpha_bar: np.ndarray, level: np.ndarray) -> np.ndarray:
    """The inverse of `level_at`: fractional steps; the first or last step for levels beyond."""
    return np.interp(-np.sqrt(level), -np.sqrt(alpha_bar), np.arange(len(alpha_bar)))


def sphere(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """From normal latents a to b, of any shape, with t from 0 to 1, on the sphere: as likely as the
    ends all the way, where those on a straight line would be too close to 0."""
    angle = torch.as_tensor(t, dtype=torch.float64, device=a.device) * math.pi / 2
    return angle.cos().to(a) * a + angle.sin().to(a) * b


def ddpm(denoise, x, alpha_bar, steps, *, generator=None, progress=False):
    """Ancestral sampling (DDPM, arXiv:2006.11239, algorithm 2), steps evenly spaced in t."""
    t, levels = _even_steps(alpha_bar, steps)
    return _ancestral(denoise, x, t, levels, generator, progress)


def fast(denoise, x, alpha_bar, steps=6, *, generator=None, progress=False):
    """DiffWave's 6 steps (appendix B): ancestral on a schedule of its own, aligned to fractional t.

    Made for vocoders: it starts at level 0.38, where a mel spectrogram must say what comes out.
    """
    _check_fast(steps)
    levels = np.cumprod(1 - np.array(FAST_BETAS))[::-1]
    return _ancestral(denoise, x, step_at(alpha_bar, levels), levels, generator, progress)


def _check_fast(steps: int) -> None:
    if steps != len(FAST_BETAS):
        raise UserError(f"steps={steps}: the fast sampler has exactly {len(FAST_BETAS)} steps")


def _ancestral(denoise, x, t, levels, generator, progress) -> Tensor:
    for t_i, a, b in _moves(t, levels, progress):
        beta = 1 - a / b
        x = (x - beta / math.sqrt(1 - a) * denoise(x, t_i)) / math.sqrt(1 - beta)
        if b < 1:
            x = x + math.sqrt((1 - b) / (1 - a) * beta) * randn(x.shape, generator).to(x)
    return x


def ddim(denoise, x, alpha_bar, steps, *, generator=None, progress=False):
    """Deterministic DDIM (arXiv:2010.02502, eq. 12 with sigma = 0); first order in the step."""
    for t_i, a, b in _moves(*_even_steps(alpha_bar, steps), progress):
        noise = denoise(x, t_i)
        clean = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)
        x = math.sqrt(b) * clean + math.sqrt(1 - b) * noise
    return x


def ddim_invert(denoise, x, alpha_bar, steps, *, iterations=4, progress=False):
    """The noise from which `ddim` with as many steps makes x: DDIM backwards.

    Each step solves for the point whose noise prediction leads here, by fixed-point iteration; one
    iteration is the usual inversion, which closes the loop only for many steps.
    """
    for t_i, a, b in _moves(*_even_steps(alpha_bar, steps), progress, backwards=True):
        scale = math.sqrt(a / b)
        move = math.sqrt(1 - a) - scale * math.sqrt(1 - b)
        start = guess = scale * x
        for _ in range(iterations):
            guess = start + move * denoise(guess, t_i)
        x = guess
    return x


def dpm_solver_pp_2m(denoise, x, alpha_bar, steps, *, generator=None, progress=False):
    """Deterministic DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2); second order."""
    return _dpm_solver_pp(denoise, x, alpha_bar, steps, progress)


def dpm_solver_pp_2m_sde(denoise, x, alpha_bar, steps, *, generator=None, progress=False):
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095): the same on the reverse SDE, with fresh noise.

    As in ancestral sampling, the noise of each step covers errors that the network made before;
    the deterministic solver carries them to the end.
    """
    return _dpm_solver_pp(denoise, x, alpha_bar, steps, progress, lambda: randn(x.shape, generator))


def _dpm_solver_pp(denoise, x, alpha_bar, steps, progress, noise=None) -> Tensor:
    """Steps evenly spaced in lambda = log(sqrt(a) / sqrt(1 - a)), where the solution is smooth."""
    steps = integer("steps", steps, 1, len(alpha_bar))
    lam = np.linspace(*(math.log(a / (1 - a)) / 2 for a in alpha_bar[[-1, 0]]), steps)
    levels = 1 / (1 + np.exp(-2 * lam))
    h = lam[1] - lam[0] if steps > 1 else math.inf
    previous = None
    for t_i, a, b in _moves(step_at(alpha_bar, levels), levels, progress):
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
            x = x + math.sqrt((1 - b) * -math.expm1(-2 * h)) * noise().to(x)
        previous = clean
    return x


def _even_steps(alpha_bar: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps from T-1 down to 0, evenly spaced and maybe fractional, and their levels."""
    t = np.linspace(len(alpha_bar) - 1, 0, integer("steps", steps, 1, len(alpha_bar)))
    return t, level_at(alpha_bar, t)


def _moves(t: np.ndarray, levels: np.ndarray, progress: bool, backwards: bool = False) -> Iterable:
    """(step, its level, the level to go to) of every move; the last one goes to level 1."""
    moves = list(zip(t.tolist(), levels.tolist(), [*levels[1:].tolist(), 1.0], strict=True))
    moves = moves[::-1] if backwards else moves
    return watched(moves, "diffusion", len(moves), "steps", show=progress)


def randn(shape: Iterable[int], generator: torch.Generator | None) -> Tensor:
    """Normal numbers, drawn on the generator's device; by torch's default one on the CPU."""
    check_generator(generator)
    device = generator.device if generator is not None else "cpu"
    return torch.randn(*shape, generator=generator, device=device)


SAMPLERS = {f.__name__: f for f in (ddpm, ddim, dpm_solver_pp_2m, dpm_solver_pp_2m_sde, fast)}
DETERMINISTIC = {"ddim", "dpm_solver_pp_2m"}
# None for steps; ddpm takes all
DEFAULT_STEPS = {"ddim": 50, "dpm_solver_pp_2m": 20, "dpm_solver_pp_2m_sde": 20, "fast": 6}


def find_sampler(name: str, steps: int | None, most: int) -> tuple[Callable, int]:
    """The sampler of that name, one of `SAMPLERS`, and its steps, 1..most; None: what suits it.

    ValueError for another name, which tells the nearest, and for other steps.
    """
    check_name("sampler", name, SAMPLERS)
    steps = min(DEFAULT_STEPS.get(name, most), most) if steps is None else steps
    if name == "fast":
        _check_fast(steps)
        return fast, steps
    return SAMPLERS[name], integer("steps", steps, 1, most)
