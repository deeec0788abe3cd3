"""The step engine and what its tests share."""

from __future__ import annotations

import pytest
import torch
from models import seeded

from rawaudio.engine import Engine, library
from sashimi.realtime import CompiledSashimi

compiled = pytest.mark.skipif(library(CompiledSashimi.SOURCE)[0] is None, reason="no C++ compiler")


def uniforms(steps, n):
    return torch.rand(steps, n, generator=seeded())


def silence(n):
    return torch.full((n,), 128)


def run(model, n, steps, threads=1, precision="float32"):
    """Classes (n, steps) and logits (n, steps, 256) of the engine."""
    logits = torch.empty(n, steps, 256)
    engine = Engine(model, n, precision, threads)
    return engine.run(silence(n), uniforms(steps, n), logits_out=logits), logits


def assert_close(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
