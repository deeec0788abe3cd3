"""Weight normalisation (arXiv:1602.07868) as published files of DiffWave and SampleRNN store it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.packed import Packed


class Normed(nn.Module):
    """A weight as direction and length, and a bias.

        weight = weight_g weight_v / |weight_v|,   a length for each index of the first dimension

    It starts as torch's convolutions do, or uniform in +-bound with a bias of zero. The names are
    those of published files, which torch's own parametrization does not keep.
    """

    MATRICES = ("weight_g", "weight_v")

    def __init__(self, *shape: int, bias: bool = True, bound: float | None = None):
        super().__init__()
        bias_bound = 1 / math.sqrt(math.prod(shape[1:])) if bound is None else 0.0
        bound = bias_bound if bound is None else bound
        self.weight_v = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.weight_g = nn.Parameter(_lengths(self.weight_v.detach()))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0]).uniform_(-bias_bound, bias_bound))

    @property
    def weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / _lengths(self.weight_v))


class Pointwise(Normed):
    """A convolution of one tap, of features in the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[..., 0], self.bias)

    def packed(self, relu: bool = False) -> Packed:
        return Packed(self.weight[..., 0], self.bias, relu)


def _lengths(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim())), keepdim=True)
