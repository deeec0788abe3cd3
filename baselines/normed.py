"""Weight normalisation (arXiv:1602.07868) as published files of DiffWave and SampleRNN store it."""

import math

import torch
from torch import Tensor, nn


class Normed(nn.Module):
    """A weight as direction and length, and a bias.

        weight = weight_g weight_v / |weight_v|,   a length for each index of the first dimension

    It starts as torch's convolutions do. The names are those of published files, which torch's own
    parametrization does not keep.
    """

    MATRICES = ("weight_g", "weight_v")

    def __init__(self, *shape: int, bias: bool = True):
        super().__init__()
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        self.weight_v = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.weight_g = nn.Parameter(_lengths(self.weight_v.detach()))
        self.bias = nn.Parameter(torch.empty(shape[0]).uniform_(-bound, bound)) if bias else None

    @property
    def weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / _lengths(self.weight_v))

    @torch.no_grad()
    def start(self, bound: float) -> None:
        """Weights uniform in +-bound, biases zero."""
        self.weight_v.uniform_(-bound, bound)
        self.weight_g.copy_(_lengths(self.weight_v))
        if self.bias is not None:
            self.bias.zero_()


def _lengths(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim())), keepdim=True)
