"""The parts of a StyleGAN3 of one dimension and of its critic, as in ASGAN (arXiv:2210.05271).

Signals are (B, channels, frames). c: an `asgan.ASGANConfig`. The names of parameters are those of
RF5/simple-asgan. With `c.compat` the parts are those that its weights need; else what is wrong
there is mended: sines that few frames damp, upsampling that makes signals weaker, loudness that
is measured long ago, and a critic that folds frequencies and doubles the variance.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.filters import downsampling, smoothing, taps, upsampling

BANDWIDTH = 2.0  # of the sines that the generator begins with, in cycles per half a clip
NORM_RATE = 0.001  # at which running means of published weights follow
QUIET = 0.3  # loudness of what an untrained generator makes
LOUDEST = 256.0  # activation in published critics
GROUP = 4  # clips that the critic compares


class Weights(nn.Module):
    """A matrix (out, in) or kernel (out, in, k), applied to (B, in) or (B, in, T), and a bias.

    equalized: the weight is kept at variance 1 / rate^2 and scaled when it is used, so that all
    learn at the same pace (arXiv:1710.10196); rate slows a layer down.
    """

    MATRICES = ("weight",)

    def __init__(
        self, *shape: int, bias: float | None = 0.0, equalized: bool = True, rate: float = 1.0
    ):
        super().__init__()
        fan_in = math.prod(shape[1:])
        self.gain, self.rate = (rate / math.sqrt(fan_in), rate) if equalized else (1.0, 1.0)
        std = 1 / self.rate if equalized else 1 / math.sqrt(3 * fan_in)  # torch's own
        self.weight = nn.Parameter(torch.randn(shape) * std)
        self.bias = None if bias is None else nn.Parameter(torch.full(shape[:1], bias))

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        bias = self.bias if self.bias is None or self.rate == 1 else self.bias * self.rate
        weight = self.weight * self.gain
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        return F.conv1d(x, weight, bias, stride, weight.shape[-1] // 2)


def mapping(c: Any) -> nn.Sequential:
    """Latents (B, z_dim) -> (B, w_dim)."""
    layers: list[nn.Module] = []
    for width in [c.latent_dim] + [c.w_dim] * c.w_layers:
        layers += [Weights(c.w_dim, width, equalized=c.equalized, rate=0.01), nn.LeakyReLU(c.slope)]
    return nn.Sequential(*layers[:-1])


class TurnedSines(nn.Module):
    """w (B, w_dim) -> sines (B, C, frames), whose frequencies and phases w turns and moves."""

    def __init__(self, c: Any):
        super().__init__()
        self.frames, size = c.frames[0], c.fourier_channels
        spread = torch.randn(size, 2)
        spread = spread[spread.norm(dim=1).argsort()]
        radius = spread.norm(dim=1, keepdim=True)
        self.register_buffer("freqs", BANDWIDTH * spread / (radius * (radius**2 / 4).exp()))
        self.register_buffer("phases", torch.rand(size) - 0.5)
        self.register_buffer("transform", torch.eye(3))
        self.affine = Weights(4, c.w_dim, equalized=c.equalized)
        self.mlp = Weights(size, size, bias=None, equalized=c.equalized)
        nn.init.zeros_(self.affine.weight)
        self.affine.bias.data[0] = 1
        self.room = c.frames[0] / 4 - BANDWIDTH  # up to where sines are damped
        if not c.compat:
            self.room = max(self.room, 1e-3)

    def amplitude(self, freqs: Tensor) -> Tensor:
        """(..., 2) -> (...): sines that the frames cannot hold are damped."""
        return (1 - (freqs.norm(dim=-1) - BANDWIDTH) / self.room).clamp(0, 1)

    def forward(self, w: Tensor) -> Tensor:
        t = self.affine(w)
        cos, sin, x, y = (t / t[:, :2].norm(dim=1, keepdim=True)).unbind(1)
        turn = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
        move = turn @ -torch.stack([x, y], 1)[..., None]
        turn, move = turn @ self.transform[:2, :2], turn @ self.transform[:2, 2:] + move
        freqs = self.freqs @ turn  # (B, C, 2)
        phases = self.phases + (self.freqs @ move)[..., 0]
        place = (2 * torch.arange(self.frames, device=w.device) + 1) / self.frames - 1
        angle = freqs[..., :1] * place.to(w.dtype) + phases[..., None]
        sines = self.amplitude(freqs)[..., None] * torch.sin(2 * math.pi * angle)
        return self.mlp(sines.mT).mT


class Sines(nn.Module):
    """w (B, w_dim) -> sines (B, C, frames) of fixed frequencies, with one phase from w."""

    def __init__(self, c: Any):
        super().__init__()
        freqs = c.fourier_std * torch.randn(c.fourier_channels)
        self.register_buffer("B", freqs[freqs.abs().argsort()])
        self.frames = c.frames[0]
        self.affine = Weights(1, c.w_dim, equalized=c.equalized)
        self.mlp = Weights(len(freqs), len(freqs), bias=None, equalized=c.equalized)
        nn.init.zeros_(self.affine.weight)

    def forward(self, w: Tensor) -> Tensor:
        place = torch.linspace(0, 1, self.frames, dtype=w.dtype, device=w.device)
        angle = self.B[:, None] * place + self.affine(w)[..., None]
        return self.mlp(torch.sin(2 * math.pi * angle).mT).mT


class Modulated(nn.Module):
    """A convolution whose input channels are scaled by w, and whose output has variance 1.

    Scaling the input and the output is the same as a kernel of its own for each clip (StyleGAN2,
    arXiv:1912.04958), and quicker. The input is divided by its own loudness, clip by clip; with
    `c.compat` by the root of norm_ema, a running mean square. A running mean lags behind: weights
    then learn to be louder or quieter, over and over.
    """

    def __init__(self, c: Any, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.affine = Weights(inputs, c.w_dim, bias=1.0, equalized=c.equalized)
        self.conv = Weights(outputs, inputs, kernel, equalized=c.equalized)
        self.register_buffer("norm_ema", torch.ones(()) if c.compat else None)

    def convolved(self, x: Tensor, scale: Tensor) -> Tensor:
        """(B, inputs, T), (B, inputs) -> (B, outputs, T)."""
        if self.norm_ema is None:
            power = x.square().mean((1, 2)) + 1e-6  # (B,)
        else:
            if self.training:
                self.norm_ema.lerp_(x.detach().square().mean(), NORM_RATE)
            power = self.norm_ema.clone()
        x = x * (scale * power.rsqrt().view(-1, 1))[..., None]
        return F.conv1d(x, self.conv.weight, padding=self.conv.weight.shape[-1] // 2)


class Layer(Modulated):
    """(B, inputs, frames), w -> (B, outputs, frames or twice as many)."""

    def __init__(
        self, c: Any, inputs: int, outputs: int, before: int, frames: int, low: float, high: float
    ):
        """before, frames: of its input and output; low, high: cutoffs before and after."""
        super().__init__(c, inputs, outputs, c.kernel)
        self.slope, factor = c.slope, 2 * frames // before
        # published ones let pass what four times as many frames have above the band
        low = low if c.compat else 2 * low / factor
        up, down = upsampling(before, factor, low), downsampling(factor * before, high)
        # the root of 2 makes good what the nonlinearity takes
        self.register_buffer("up", (up.T * (1 if c.compat else factor)).float(), persistent=False)
        self.register_buffer("down", (down.T * math.sqrt(2)).float(), persistent=False)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scale = self.affine(w)
        power = scale.square() @ self.conv.weight.square().sum(2).T  # (B, outputs)
        y = self.convolved(x, scale) * (power + 1e-8).rsqrt()[..., None]
        y = (y + self.conv.bias[:, None]) @ self.up
        return F.leaky_relu(y, self.slope) @ self.down


class Head(Modulated):
    """(B, inputs, frames), w -> features (B, bands, frames)."""

    def __init__(self, c: Any, inputs: int):
        super().__init__(c, inputs, c.bands, c.head_kernel)
        self.quiet = 1.0 if c.compat else QUIET
        self.gain = math.sqrt(2) if c.compat else 1.0

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        y = self.convolved(x, self.affine(w) * (self.conv.gain * self.quiet))
        return (y + self.conv.bias[:, None]) * self.gain


class Block(nn.Module):
    """(B, inputs, frames) -> (B, outputs, frames or half as many): convolutions beside a skip."""

    def __init__(self, c: Any, inputs: int, outputs: int, before: int, frames: int):
        super().__init__()
        own = {"equalized": c.equalized}
        self.conv0 = Weights(inputs, inputs, c.critic_kernel, **own)
        self.conv1 = Weights(outputs, inputs, c.critic_kernel, **own)
        self.skip = Weights(outputs, inputs, 1, bias=None, **own)
        self.activation, self.stride = Activation(c), 1 if frames == before else 2
        self.gain = math.sqrt(2)
        if not c.compat:  # the variance stays
            self.conv1.gain, self.skip.gain = (
                self.conv1.gain * self.gain,
                self.skip.gain / self.gain,
            )
            self.gain = 1.0
        halve = downsampling(before).T.float() if self.stride == 2 else None
        smooth = smoothing(before, taps(2)).T.float() if self.stride == 2 else None
        self.register_buffer("halve", halve, persistent=False)
        self.register_buffer("smooth", None if c.compat else smooth, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(x if self.halve is None else x @ self.halve)
        y = self.activation(self.conv0(x))
        y = y if self.smooth is None else y @ self.smooth
        y = self.activation(self.conv1(y, self.stride)) + skip
        return y if self.gain == 1 else y * self.gain


class Activation(nn.Module):
    """A leaky ReLU; in published critics of what is clamped first."""

    def __init__(self, c: Any):
        super().__init__()
        self.slope, self.clamped = c.slope, c.compat

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(-LOUDEST, LOUDEST) if self.clamped else x
        return F.leaky_relu(x, self.slope)


def with_deviation(x: Tensor) -> Tensor:
    """Features (B, C, T) with one more channel: how much groups of clips differ (arXiv:1710.10196).

    Group j of M has clips j, j + M, ...; a batch that GROUP does not divide begins anew for the
    last ones.
    """
    size = min(GROUP, len(x))
    groups = -(-len(x) // size)
    members = torch.arange(groups * size, device=x.device) % len(x)
    grouped = x[members].view(size, groups, *x.shape[1:])
    variance = (grouped - grouped.mean(0)).square().mean(0)  # quicker than var
    deviation = (variance + 1e-8).sqrt().mean((1, 2))  # (groups,)
    own = deviation.repeat(size)[: len(x), None, None]
    return torch.cat([x, own.expand(-1, 1, x.shape[2])], 1)


class CriticHead(nn.Module):
    """(B, C, T) -> answers (B,) and the features (B, width) that they are made from."""

    def __init__(self, c: Any, inputs: int, frames: int):
        super().__init__()
        width, own = c.critic_channels, {"equalized": c.equalized}
        self.conv = Weights(width, inputs + 1, c.critic_kernel, **own)
        if c.equalized:  # published weights do not count the added channel
            self.conv.gain *= math.sqrt((inputs + 1) / inputs)
        self.fc = Weights(width, width * frames, **own)
        self.out = Weights(1, width, **own)
        self.activation, self.slope = Activation(c), c.slope
        self.gain = math.sqrt(2) if c.equalized else 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.activation(self.conv(with_deviation(x))) * self.gain
        x = F.leaky_relu(self.fc(x.flatten(1)), self.slope) * self.gain
        return self.out(x)[:, 0], x
