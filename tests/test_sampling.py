"""Graph and Plain: the same classes, step by step or a period at a time."""

import math

import pytest
import torch

from rawaudio.sampling import Graph, Plain, sample
from sashimi.autoregressive import AutoregressiveConfig, SashimiAR
from sashimi.mulaw import N_CLASSES

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
        ],
    ),
]
CONFIGS = [{"pool": [2, 3]}, {"pool": [4, 4], "unet": True, "n_layers": [2, 1, 3]}, {"pool": []}]


def make(device="cpu", **kwargs):
    torch.manual_seed(0)
    settings = {"d_model": 12, "n_layers": 1, "l_max": 96, "d_state": 8} | kwargs
    model = SashimiAR(AutoregressiveConfig(**settings)).eval().to(device)
    with torch.no_grad():
        model.head.weight *= 4
    return model


def run(runner, q, uniforms, **how):
    logits = torch.empty(len(q), len(uniforms), N_CLASSES, device=q.device)
    log_p = torch.zeros(len(q), dtype=torch.float64, device=q.device)
    return runner.run(q, uniforms, log_p=log_p, logits_out=logits, **how), logits, log_p


HOW = [{}, {"top_k": 3}, {"nucleus_p": 0.5}, {"nucleus_p": 1e-9}, {"top_k": 5, "nucleus_p": 0.9}]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("uniform", [0.0, 0.37, 1 - 2**-24, 1.0])
def test_no_rounding_of_prefix_sums_draws_what_was_cut_off(monkeypatch, how, uniform):
    """A GPU adds in parallel: each sum may be off by a bit, up or down, in no order. What is drawn
    has a probability that top_k, the nucleus and the softmax left above zero."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, N_CLASSES, generator=g)
    logits[torch.rand(logits.shape, generator=g) < 0.3] = -math.inf
    uniforms = torch.full((400,), uniform)
    exact = torch.Tensor.cumsum

    def rounded(x, dim):
        sums = exact(x, dim)
        up = torch.rand(x.shape, generator=g) < 0.5
        for _ in range(2):
            sums = sums.nextafter(torch.where(up, math.inf, -math.inf))
        return sums

    monkeypatch.setattr(torch.Tensor, "cumsum", rounded)
    classes = sample(logits, uniforms, **how)
    left = logits.masked_fill(
        logits < logits.topk(how.get("top_k", N_CLASSES)).values[:, -1:], -9e9
    )
    assert (left.gather(1, classes[:, None]) > -1e9).all()
    if how.get("nucleus_p") == 1e-9:
        assert torch.equal(classes, logits.argmax(1))
    likeliest = left.sort(1, descending=True)
    p = likeliest.values.softmax(1)
    before = exact(p, 1) - p - 1e-6
    rank = (likeliest.indices == classes[:, None]).int().argmax(1)
    assert (before.gather(1, rank[:, None]) < how.get("nucleus_p", 1.0)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_k": 9, "nucleus_p": 0.9}], ids=str)
def test_a_period_at_a_time_is_step_by_step(device, config, how):
    """Runs of any length, whole periods or parts of one: equal classes, logits, likelihoods."""
    model = make(device, **config)
    uniforms = torch.rand(75, 3, generator=torch.Generator().manual_seed(1)).to(device)
    q = torch.tensor([0, 100, 255], device=device)
    expected = run(Plain(model, 3), q, uniforms, **how)
    graph, parts = Graph(model, 3), []
    for part in uniforms.split([1, 16, 5, 53]):
        parts.append(run(graph, q, part, **how))
        q = parts[-1][0][:, -1]
    classes, logits, log_p = zip(*parts, strict=True)
    assert torch.equal(torch.cat(classes, 1), expected[0])
    torch.testing.assert_close(torch.cat(logits, 1), expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sum(log_p), expected[2], atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_prefix_is_gone_on_from(device):
    """The state of a parallel pass, also in the middle of a period; the given state stays."""
    model = make(device, pool=[4, 2])
    prefix = torch.randint(0, N_CLASSES, (2, 14), device=device)
    uniforms = torch.rand(30, 2, device=device)
    results = []
    for runner in (Plain(model, 2), Graph(model, 2)):
        state = model.backbone.default_state(len(prefix))
        with torch.no_grad():
            model.absorb(prefix[:, :-1], state)
        runner.load_state(state)
        results.append(runner.run(prefix[:, -1], uniforms))
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_generation_on_the_gpu_is_replayed():
    """`generate` records one period and gives the CPU's audio up to rounding of the logits."""
    model = make("cuda", pool=[4, 4])
    clips = model.generate(2, length=100, generator=torch.Generator().manual_seed(0))
    cpu = make("cpu", pool=[4, 4])
    expected = cpu.generate(2, length=100, generator=torch.Generator().manual_seed(0))
    assert (clips.cpu() == expected).float().mean() > 0.9
