"""What a critic and its generator learn by: their losses, and the probability of augmentation.

WASSERSTEIN   WGAN-GP (arXiv:1704.00028): answers without a bound, a slope of 1 between clips
LOGISTIC      non-saturating (arXiv:1406.2661) with R1 (arXiv:1801.04406), flat at real clips
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rawaudio.model import Model
from rawaudio.processes import summed


class Critic(Model):
    """`critic(x, rows, rng)`: what it hears (B, ...), conditions (B, C) -> answers (B,).

    rng: source of what is random in training; None: nothing is.
    """


Answer = Callable[[Tensor], Tensor]  # the critic, x (B, ...) -> (B,)


class Loss(NamedTuple):
    """What both sides minimise, (B,) each."""

    critic: Callable[[Tensor, Tensor], Tensor]  # answers to real and to made clips, (B,) each
    generator: Callable[[Tensor], Tensor]  # answers to made clips
    penalty: Callable[[Answer, Tensor, Tensor, Tensor], Tensor]  # critic, real, made, u in [0, 1)


def slope_penalty(answer: Answer, real: Tensor, made: Tensor, u: Tensor) -> Tensor:
    """(|dD/dx| - 1)^2 between a real and a made clip (WGAN-GP, arXiv:1704.00028), (B,)."""
    x = torch.lerp(real, made, u.view(-1, *[1] * (real.dim() - 1)))
    return (_slope(answer, x).flatten(1).norm(dim=1) - 1).square()


def r1_penalty(answer: Answer, real: Tensor, made: Tensor, u: Tensor) -> Tensor:
    """|dD/dx|^2 / 2 at real clips (R1, arXiv:1801.04406), (B,)."""
    return _slope(answer, real).flatten(1).square().sum(1) / 2


def _slope(answer: Answer, x: Tensor) -> Tensor:
    """dD/dx, of x's shape, which can be differentiated again."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, enabled=False):
        return torch.autograd.grad(answer(x).sum(), x, create_graph=True)[0]


WASSERSTEIN = Loss(lambda real, made: made - real, lambda made: -made, slope_penalty)
LOGISTIC = Loss(  # non-saturating
    lambda real, made: F.softplus(made) + F.softplus(-real),
    lambda made: F.softplus(-made),
    r1_penalty,
)


class Adaptive:
    """The probability p of augmentation: it rises while the critic is sure of real clips.

    After every 6 updates of the critic, by the mean sign of its answers to real clips (ADA,
    arXiv:2006.06676, with the constants of AudioStyleGAN).
    """

    INTERVAL, TARGET, STEP = 6, 0.6, 0.005
    ALARM, LARGE_STEP = 0.98, 0.05

    def __init__(self, p: float):
        self.p, self.signs, self.clips, self.updates = p, 0.0, 0.0, 0

    def hears(self, answers: Tensor) -> None:
        """The critic's answers to real clips of this process."""
        self.signs += float(answers.detach().sign().nan_to_num().sum())
        self.clips += len(answers)

    def updated(self, device: torch.device) -> None:
        """The critic has made its step."""
        self.updates += 1
        if self.updates % self.INTERVAL:
            return
        signs, clips = summed([self.signs, self.clips], device)
        sure = signs / max(1, clips)
        step = self.LARGE_STEP if sure > self.ALARM else self.STEP
        step = step * (sure > self.TARGET) - step * (sure < self.TARGET)
        self.p = min(max(self.p + step, 1e-8), 1 - 1e-8)
        self.signs = self.clips = 0.0
