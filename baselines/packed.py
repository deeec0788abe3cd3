"""A linear map of a few rows, as steps of a recurrence need it."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Packed:
    """(B, inputs) -> (B, outputs), W x + b, cut off below 0 if `relu`; without gradients.

    On CPUs by oneDNN, with the call that torch.compile uses: for 2 to 64 rows it takes a quarter of
    the time of `F.linear`, which asks MKL, on processors that are not Intel's.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, relu: bool = False):
        self.weight, self.bias, self.relu = weight.detach().contiguous(), bias, relu
        own = weight.device.type == "cpu" and weight.dtype == torch.float32
        own = own and torch.backends.mkldnn.is_available()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight) if own else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            y = F.linear(x, self.weight, self.bias)
            return y.relu_() if self.relu else y
        then = "relu" if self.relu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, then, [], "")
