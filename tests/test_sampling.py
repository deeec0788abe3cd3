"""Classes are drawn from logits as often as they are probable, and no others."""

import math

import pytest
import torch
from models import make, seeded
from torch._subclasses.fake_tensor import FakeTensorMode

from rawaudio.sampling import sample

EVENLY = 2**13  # uniforms (i + 1/2) / EVENLY: every class appears in proportion, without noise
CUTS = [{}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 7}, {"top_k": 256},
        {"nucleus_p": 0.9}, {"nucleus_p": 0.3}, {"nucleus_p": 1e-9},
        {"top_k": 20, "nucleus_p": 0.5},
        {"temperature": 2.0, "top_k": 50, "nucleus_p": 0.8}]  # fmt: skip


def shares(logits, **cut):
    """How often each class comes for evenly spread uniforms, as fractions (256,)."""
    uniforms = (torch.arange(EVENLY) + 0.5) / EVENLY
    classes = sample(logits.expand(EVENLY, -1), uniforms, **cut)
    return torch.bincount(classes, minlength=256).double() / EVENLY


def reference(logits, temperature=1.0, top_k=256, nucleus_p=1.0):
    """The distribution that is meant, class by class from the most likely one, in double."""
    p = torch.softmax(logits.double() / temperature, -1).tolist()
    order = sorted(range(256), key=lambda c: -p[c])[:top_k]
    total, inside, so_far = sum(p[c] for c in order), [], 0.0
    for c in order:
        if nucleus_p < 1 and so_far >= nucleus_p * total:
            break
        inside.append(c)
        so_far += p[c]
    return torch.tensor([p[c] / so_far if c in inside else 0.0 for c in range(256)]).double()


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_classes_come_as_often_as_they_are_probable(cut):
    """Inverse CDF of evenly spread uniforms: each class has its share, exactly as filtered."""
    logits = 2 * torch.randn(256, generator=seeded())
    expected, drawn = reference(logits, **cut), shares(logits, **cut)
    assert (drawn - expected).abs().max() < 2 / EVENLY
    assert not drawn[expected == 0].any()


def test_the_nucleus_is_the_smallest_set_that_holds_the_probability():
    logits = torch.full((256,), -math.inf)
    logits[[3, 200, 90]] = torch.tensor([0.5, 0.3, 0.2]).log()
    for nucleus_p, inside in [(0.4, [3]), (0.51, [3, 200]), (0.79, [3, 200]), (0.81, [3, 90, 200])]:
        assert shares(logits, nucleus_p=nucleus_p).nonzero().flatten().tolist() == inside


def test_nucleus_1_filters_nothing():
    """Pitfall: at p = 1 a cumulative sum that rounds to 1 too early drops tokens in 11 % of rows.

    In 2,000 rows the last class is the least likely, at 1.2e-7: a uniform next to 1 still gives it.
    """
    logits = torch.randn(2000, 256, generator=seeded()).clamp(-3, 3)
    logits[:, 255] = logits[:, :255].logsumexp(-1) + math.log(1.2e-7)
    ordered = logits.softmax(-1).sort(-1, descending=True).values
    too_early = (ordered.cumsum(-1) - ordered)[:, 255] >= 1  # where a filter would cut it off
    assert too_early.sum() > 100
    classes = sample(logits, torch.full((2000,), 1 - 2**-24), nucleus_p=1.0)
    assert (classes == 255).all()


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("uniform", [0.0, 0.37, 1 - 2**-24, 1.0])
@pytest.mark.parametrize("rounding", [False, True])
def test_no_class_that_was_cut_off_is_drawn(rounding, uniform, cut, monkeypatch):
    """Neither with a uniform next to 1 or rounded to it, nor where a softmax underflows to 0, nor
    by the rounding of prefix sums: a GPU adds in parallel, each may be off by a bit."""
    g, exact = seeded(), torch.Tensor.cumsum
    logits = torch.randn(200, 256, generator=g) * 3
    logits[torch.rand(200, 256, generator=g) < 0.3] = -math.inf
    logits[:100, 200:] = logits[:100, :10] = -600.0

    def rounded(x, dim):
        sums, up = exact(x, dim), torch.rand(x.shape, generator=g) < 0.5
        for _ in range(2):
            sums = sums.nextafter(torch.where(up, math.inf, -math.inf))
        return sums

    if rounding:
        monkeypatch.setattr(torch.Tensor, "cumsum", rounded)
    classes = sample(logits, torch.full((200,), uniform), **cut)
    monkeypatch.undo()
    slightly_more = cut | {"nucleus_p": cut.get("nucleus_p", 1.0) + 1e-6}
    support = torch.stack([reference(row, **slightly_more) for row in logits]) > 1e-30
    assert support.gather(1, classes[:, None]).all()


def test_a_row_depends_on_its_own_logits_and_uniform():
    logits, uniforms = torch.randn(50, 256, generator=seeded()), torch.rand(50, generator=seeded())
    together = sample(logits, uniforms, top_k=40, nucleus_p=0.9)
    alone = [sample(logits[i : i + 1], uniforms[i : i + 1], 1.0, 40, 0.9) for i in range(50)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kind", ["autoregressive", "wavenet"])
def test_a_step_waits_for_no_value(kind):
    """One step and one draw run on tensors without values: no synchronisation with the host."""
    model = make(kind)
    model.setup_rnn()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        state, q = model.default_state(model.told.rows(3, {})), torch.full((3,), 128)
        for _ in range(7):  # every tier is due once
            logits, state = model.step(q, state)
            q = sample(logits, torch.rand(3), temperature=0.9, top_k=50, nucleus_p=0.9)
    assert q.shape == (3,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_generation_on_the_gpu_is_replayed():
    """`generate` records one period and gives the CPU's audio up to rounding of the logits."""
    clips = make().to("cuda").generate(2, length=100, generator=seeded())
    expected = make().generate(2, length=100, generator=seeded())
    assert (clips.cpu() == expected).float().mean() > 0.9
