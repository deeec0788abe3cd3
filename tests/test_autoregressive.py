"""SashimiAR: one distribution over clips, evaluated in parallel and sampled step by step."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rawaudio import autoregressive
from rawaudio.autoregressive import shift
from rawaudio.sampling import sample
from sashimi import mulaw
from sashimi.autoregressive import AutoregressiveConfig, SashimiAR
from sashimi.realtime import Engine

TINY = dict(d_model=8, n_layers=1, pool=[2, 3], d_state=8, l_max=48, clip_length=50,
            sample_rate=1000)  # fmt: skip


def make(seed=0, **kwargs):
    """A tiny model whose distributions are far from uniform; in double, so that identities hold to
    1e-9 and that generation takes the plain recurrence (the compiled engine is for float32)."""
    torch.manual_seed(seed)
    model = SashimiAR(AutoregressiveConfig(**TINY | kwargs)).double().eval()
    with torch.no_grad():
        model.head.weight *= 5
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def audio(n, length, seed=0):
    """float32 (n, length) in [-0.7, 0.7]."""
    return (torch.rand(n, length, generator=seeded(seed)) - 0.5) * 1.4


def log_probabilities(model, q):
    """(n, T) log p of each class of q (n, T), one `step` after the other."""
    model.backbone.setup_rnn()
    state, x, out = model.backbone.default_state(len(q)), torch.full_like(q[:, 0], 128), []
    with torch.no_grad():
        for target in q.unbind(1):
            logits, state = model.step(x, state)
            out.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
            x = target
    return torch.stack(out, 1)


# ---- sampling from logits ---------------------------------------------------------------------

EVENLY = 2**13  # uniforms (i + 1/2) / EVENLY: every class appears in proportion, without noise


def shares(logits, **kwargs):
    """How often each class comes for evenly spread uniforms, as fractions (256,)."""
    uniforms = (torch.arange(EVENLY) + 0.5) / EVENLY
    classes = sample(logits.expand(EVENLY, -1), uniforms, **kwargs)
    return torch.bincount(classes, minlength=256).double() / EVENLY


def reference(logits, temperature=1.0, top_k=256, nucleus_p=1.0):
    """The distribution that is meant, class by class from the most likely one, in double."""
    p = torch.softmax(logits.double() / temperature, -1).tolist()
    order = sorted(range(256), key=lambda c: -p[c])[:top_k]
    total, kept, so_far = sum(p[c] for c in order), [], 0.0
    for c in order:
        if nucleus_p < 1 and so_far >= nucleus_p * total:
            break
        kept.append(c)
        so_far += p[c]
    return torch.tensor([p[c] / so_far if c in kept else 0.0 for c in range(256)]).double()


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 7}, {"top_k": 256},
     {"nucleus_p": 0.9}, {"nucleus_p": 0.3}, {"nucleus_p": 1e-9}, {"top_k": 20, "nucleus_p": 0.5},
     {"temperature": 2.0, "top_k": 50, "nucleus_p": 0.8}],
)  # fmt: skip
def test_classes_come_as_often_as_they_are_probable(kwargs):
    """Inverse CDF of evenly spread uniforms: each class has its share, exactly as filtered."""
    logits = 2 * torch.randn(256, generator=seeded())
    expected, got = reference(logits, **kwargs), shares(logits, **kwargs)
    assert (got - expected).abs().max() < 2 / EVENLY
    assert not got[expected == 0].any()


def test_the_nucleus_is_the_smallest_set_that_holds_the_probability():
    logits = torch.full((256,), -math.inf)
    logits[[3, 200, 90]] = torch.tensor([0.5, 0.3, 0.2]).log()
    for nucleus_p, kept in [(0.4, [3]), (0.51, [3, 200]), (0.79, [3, 200]), (0.81, [3, 90, 200])]:
        assert shares(logits, nucleus_p=nucleus_p).nonzero().flatten().tolist() == kept


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


@pytest.mark.parametrize("kwargs", [{}, {"top_k": 3}, {"nucleus_p": 0.5}])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])
def test_no_class_of_probability_zero_at_either_end(uniform, kwargs):
    """A uniform next to 1 (or rounded to it) gives a class of the support, and so does 0."""
    generator = seeded()
    logits = torch.randn(500, 256, generator=generator) * 3
    logits[torch.rand(500, 256, generator=generator) < 0.3] = -math.inf
    logits[:250, 200:] = -200.0  # softmax underflows to 0
    logits[:250, :10] = -200.0
    classes = sample(logits, torch.full((500,), uniform), **kwargs)
    support = torch.stack([reference(row, **kwargs) for row in logits]) > 1e-30
    assert support.gather(1, classes[:, None]).all()


def test_a_row_depends_on_its_own_logits_and_uniform():
    logits, uniforms = torch.randn(50, 256, generator=seeded()), torch.rand(50, generator=seeded())
    together = sample(logits, uniforms, top_k=40, nucleus_p=0.9)
    alone = [sample(x[None], u[None], top_k=40, nucleus_p=0.9) for x, u in zip(logits, uniforms)]  # noqa: B905
    assert torch.equal(together, torch.cat(alone))


def test_a_step_waits_for_no_value():
    """One step and one draw run on tensors without values: no synchronisation with the host."""
    model = make()
    model.backbone.setup_rnn()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        state, q = model.backbone.default_state(3), torch.full((3,), 128)
        for _ in range(7):  # every tier is due once
            logits, state = model.step(q, state)
            q = sample(logits, torch.rand(3), temperature=0.9, top_k=50, nucleus_p=0.9)
    assert q.shape == (3,)


# ---- likelihood -------------------------------------------------------------------------------


def test_parallel_likelihood_is_the_stepped_one():
    """nll = mean of -log p(q[t] | q[<t]), the first sample predicted from class 128."""
    model, wavs = make(), audio(3, 61)
    expected = -log_probabilities(model, mulaw.encode(wavs)).mean(1)
    torch.testing.assert_close(model.nll(wavs), expected, rtol=0, atol=1e-9)


def test_the_first_sample_is_predicted_from_silence():
    """A clip of one sample: nll is -log p(q[0] | 128). Pitfall: class 128 starts, documented."""
    model, wavs = make(), audio(5, 1)
    with torch.no_grad():
        expected = -model(torch.full((5, 1), 128))[:, 0].log_softmax(-1)
    torch.testing.assert_close(model.nll(wavs), expected.gather(1, mulaw.encode(wavs))[:, 0])


def test_probabilities_of_all_continuations_sum_to_one():
    """exp(-T nll) over every second class, after any first one, is the probability of the first."""
    model = make()
    pairs = mulaw.decode(torch.stack([torch.full((256,), 77), torch.arange(256)], 1))
    joint = torch.exp(-2 * model.nll(pairs)).sum()
    torch.testing.assert_close(joint, torch.exp(-model.nll(pairs[:1, :1]))[0])


def test_padding_does_not_count():
    """A clip beside longer ones, padded with anything, has the nll it has alone."""
    model, wavs, lengths = make(), audio(3, 40), [40, 1, 23]
    together = model.nll(wavs, torch.tensor(lengths))
    alone = torch.cat([model.nll(w[None, :n]) for w, n in zip(wavs, lengths, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_no_clips_have_no_likelihoods():
    assert make().nll(torch.zeros(0, 10)).shape == (0,)


def test_long_clips_go_through_in_pieces(monkeypatch):
    """Bits per sample of the whole, clips of several lengths together, in less memory: nothing as
    long as the clip, and no more logits than fit at once."""
    model, wavs, lengths = (
        make(unet=True, n_layers=2),
        audio(3, 5000),
        torch.tensor([5000, 7, 4099]),
    )
    expected = model.nll(wavs, lengths)  # one pass: the kernels are as long as the clips
    rows, seen, logits = model.told.rows(3, {}), [], []
    model.head.register_forward_hook(lambda _, __, y: logits.append(len(y)))
    model.backbone.register_forward_hook(lambda _, x, y: seen.append(y.shape[:2].numel()))
    for per_pass, per_head in [(4096, 1000), (700, 64)]:
        monkeypatch.setattr(autoregressive, "PER_PASS", per_pass)
        monkeypatch.setattr(autoregressive, "PER_HEAD", per_head)
        seen.clear(), logits.clear()
        torch.testing.assert_close(model.nll(wavs, lengths), expected, rtol=0, atol=1e-9)
        assert max(seen) <= per_pass and max(logits) == per_head and sum(seen) == 15000
    whole = model.features(shift(mulaw.encode(wavs)), rows=rows).detach()
    with torch.no_grad():
        pieces = list(model.pieces(shift(mulaw.encode(wavs)), rows))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)


def test_arrays_and_numbers_of_numpy_are_taken():
    """Of any strides: the same likelihoods, clips and logits as of tensors and Python's numbers."""
    model, wavs = make(), audio(2, 20).double()
    backwards = wavs.numpy()[:, ::-1].copy()[:, ::-1]
    for given in (backwards, backwards.tolist()):
        lengths = np.array([3, 20])
        assert torch.equal(model.nll(given, lengths), model.nll(wavs, torch.tensor([3, 20])))
        clips = model.generate(np.int64(2), np.int32(30), given, np.float32(0.75), np.uint8(9),
                               np.float64(0.5), seeded())  # fmt: skip
        assert torch.equal(clips, model.generate(2, 30, wavs, 0.75, 9, 0.5, seeded()))
    q = mulaw.encode(wavs)
    assert torch.equal(mulaw.encode(backwards), q) and torch.equal(mulaw.decode(q.numpy()),
                                                                   mulaw.decode(q))  # fmt: skip
    with torch.no_grad():
        for x in (q.numpy(), q.to(torch.uint8), q.int().numpy()):
            assert torch.equal(model(x), model(q))
        assert model(q[:0]).shape == (0, 20, 256)


def test_what_is_no_audio_or_class_is_named():
    """Integers for audio, audio for classes, other things altogether."""
    model, wavs = make(), audio(2, 20)
    pcm, ragged = (wavs * 32767).short(), [[0.1, 0.2], [0.3]]
    cases = [
        (TypeError, "wavs: .*/ 32768", lambda: model.nll(pcm)),
        (TypeError, "wavs: .*/ 32768", lambda: model.nll(pcm.numpy())),
        (TypeError, "wavs: .*not str", lambda: model.nll("speech.wav")),
        (TypeError, "wavs: .*not list", lambda: model.nll(ragged)),
        (TypeError, "wavs: .*not NoneType", lambda: model.nll(None)),
        (ValueError, "wavs: .* 9", lambda: model.nll(wavs * 0 + 9)),
        (TypeError, "lengths: .*float", lambda: model.nll(wavs, [3.0, 4.0])),
        (TypeError, "prefix: .*not str", lambda: model.generate(1, prefix="a.wav")),
        (TypeError, "x: .*float32", lambda: model(wavs)),
        (ValueError, "x: classes must be from 0 to 255", lambda: model(torch.full((1, 3), 256))),
        (ValueError, r"x of shape \(3,\)", lambda: model(torch.zeros(3, dtype=torch.int64))),
        (TypeError, "generator=7: .*manual_seed", lambda: model.generate(1, generator=7)),
        (TypeError, "q: .*not NoneType", lambda: mulaw.decode(None)),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wavs", "lengths"),
    [(torch.zeros(10), None), (torch.zeros(2, 0), None), (torch.zeros(1, 2, 10), None),
     (torch.full((1, 10), 1.5), None), (torch.full((1, 10), math.nan), None),
     (torch.zeros(2, 10), torch.tensor([0, 10])), (torch.zeros(2, 10), torch.tensor([5, 11])),
     (torch.zeros(2, 10), torch.tensor([5]))],
)  # fmt: skip
def test_clips_that_have_no_likelihood_are_refused(wavs, lengths):
    with pytest.raises(ValueError):
        make().nll(wavs, lengths)


# ---- generation -------------------------------------------------------------------------------


def test_generated_audio_is_the_sampled_walk():
    """generate = step and sample in turn, from class 128, with the generator's uniforms."""
    model = make()
    got = model.generate(3, length=20, temperature=0.9, top_k=60, generator=seeded(5))
    uniforms = torch.rand(autoregressive.UNIFORM_BLOCK, 3, generator=seeded(5))
    state, q, expected = model.backbone.default_state(3), torch.full((3,), 128), []
    with torch.no_grad():
        for u in uniforms[:20]:
            logits, state = model.step(q, state)
            q = sample(logits, u, temperature=0.9, top_k=60)
            expected.append(q)
    assert torch.equal(mulaw.encode(got), torch.stack(expected, 1))
    assert got.dtype == torch.float32 and not got.requires_grad


def test_same_generator_same_audio():
    model = make()
    a, b = (model.generate(2, length=30, generator=seeded(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, model.generate(2, length=30, generator=seeded(4)))
    generator = seeded(3)
    model.generate(2, length=30, generator=generator)
    assert not torch.equal(a, model.generate(2, length=30, generator=generator))


def test_without_a_generator_torchs_own_is_used():
    model = make()
    torch.manual_seed(7)
    a = model.generate(1, length=30)
    b = model.generate(1, length=30)
    torch.manual_seed(7)
    assert torch.equal(a, model.generate(1, length=30)) and not torch.equal(a, b)


def test_unconditional_generation_is_generation_of_whole_clips():
    """(N, clip_length) by ancestral sampling, the same as generate with the same generator."""
    model = make()
    for nucleus_p in (1.0, 0.8):
        wavs = model.unconditional_generate(2, nucleus_p, generator=seeded())
        assert wavs.shape == (2, 50) and wavs.abs().max() <= 1
        assert torch.equal(wavs, model.generate(2, nucleus_p=nucleus_p, generator=seeded()))
    assert model.sample_rate == model.config.sample_rate == 1000


def test_a_model_samples_its_own_way_where_nothing_else_is_asked_for():
    model = make()
    given = {"temperature": 0.5, "nucleus_p": 0.7}
    wavs = model.unconditional_generate(2, **given, generator=seeded())
    learned = model.unconditional_generate(2, generator=seeded())
    assert not torch.equal(wavs, learned)
    model.config = dataclasses.replace(model.config, **given)
    assert torch.equal(model.unconditional_generate(2, generator=seeded()), wavs)
    assert torch.equal(torch.cat(list(model.stream(2, 50, generator=seeded())), 1), wavs)
    ancestral = model.generate(2, temperature=1.0, nucleus_p=1.0, generator=seeded())
    assert torch.equal(ancestral, learned)
    with pytest.raises(ValueError, match="nucleus_p=1.5"):
        dataclasses.replace(model.config, nucleus_p=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [None, 1, 7, 16, 33, 200])
def test_streamed_chunks_are_the_generated_audio(chunk, dtype, monkeypatch):
    """Whatever the chunk, and across the blocks in which uniforms are drawn; in float32, where
    there is a compiled engine, too."""
    monkeypatch.setattr(autoregressive, "UNIFORM_BLOCK", 16)
    model = make().to(dtype)
    chunks = list(model.stream(2, length=75, chunk=chunk, nucleus_p=0.9, generator=seeded()))
    size = chunk or 20  # 20 ms at 1,000 Hz
    assert [c.shape[1] for c in chunks[:-1]] == [size] * (len(chunks) - 1)
    expected = model.generate(2, length=75, nucleus_p=0.9, generator=seeded())
    assert torch.equal(torch.cat(chunks, 1), expected)


def test_a_stream_without_length_does_not_end():
    chunks = itertools.islice(make().stream(1, chunk=40, generator=seeded()), 5)
    assert [c.shape for c in chunks] == [(1, 40)] * 5


def test_a_streamed_prefix_is_continued_not_repeated():
    model, prefix = make(), audio(1, 17)[0]
    chunks = model.stream(2, length=30, chunk=7, prefix=prefix, generator=seeded())
    expected = model.generate(2, length=47, prefix=prefix, generator=seeded())
    assert torch.equal(torch.cat(list(chunks), 1), expected[:, 17:])


@pytest.mark.parametrize("n_prefix", [1, 2, 12, 13, 40, 59])
def test_a_prefix_is_continued_as_if_it_had_been_stepped_through(n_prefix):
    """The clip begins with the prefix as mu-law gives it back; the rest is what stepping through
    the prefix and sampling on would give, for prefixes at any place between poolings."""
    model, prefix = make(), audio(2, n_prefix)
    got = mulaw.encode(model.generate(2, length=60, prefix=prefix, generator=seeded(9)))
    q = mulaw.encode(prefix)
    assert torch.equal(got[:, :n_prefix], q)

    uniforms = torch.rand(autoregressive.UNIFORM_BLOCK, 2, generator=seeded(9))
    state = model.backbone.default_state(2)
    out = list(q.unbind(1))
    with torch.no_grad():
        logits, state = model.step(torch.full((2,), 128), state)
        for x in out[:]:
            logits, state = model.step(x, state)
        for u in uniforms[: 60 - n_prefix]:
            out.append(sample(logits, u))
            logits, state = model.step(out[-1], state)
    assert torch.equal(got, torch.stack(out, 1))


@pytest.mark.parametrize("wanted", [True, False])
def test_logits_of_a_prefix_are_made_for_its_likelihood_alone(wanted, monkeypatch):
    """Pitfall: 256 numbers for each of its samples, made and thrown away. Neither is anything made
    that is as long as the prefix."""
    monkeypatch.setattr(autoregressive, "PER_PASS", 128)
    monkeypatch.setattr(autoregressive, "PER_HEAD", 100)
    monkeypatch.setenv("SASHIMI_ENGINE", "off")
    model, prefix, made, seen = make(), audio(2, 500), [], []
    model.head.register_forward_hook(lambda _, __, y: made.append(y.shape[:-1].numel()))
    model.backbone.register_forward_hook(lambda _, __, y: seen.append(y.shape[:2].numel()))
    model.generate(2, length=501, prefix=prefix, return_log_likelihood=wanted, generator=seeded())
    assert sum(made) == (1000 if wanted else 0) + 2 and max(made) <= 100
    assert max(seen) <= 128 and sum(seen) == 1000


def test_one_prefix_serves_all_clips():
    model, prefix = make(), audio(1, 12)
    a, b, c = (
        model.generate(3, length=30, prefix=p, generator=seeded())
        for p in (prefix[0], prefix, prefix.repeat(3, 1))
    )
    assert torch.equal(a, b) and torch.equal(a, c) and not torch.equal(a[0], a[1])
    whole = model.generate(3, length=12, prefix=prefix[0])  # nothing is left to generate
    assert torch.equal(whole, mulaw.decode(mulaw.encode(prefix)).expand(3, -1))
    empty = model.generate(3, length=30, prefix=torch.zeros(0), generator=seeded())
    assert torch.equal(empty, model.generate(3, length=30, generator=seeded()))


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"temperature": 0.7}, {"nucleus_p": 0.6}, {"top_k": 3}, {"prefix": audio(3, 21)},
     {"prefix": audio(1, 45)[0], "temperature": 1.3}, {"prefix": audio(3, 50)}],
)  # fmt: skip
def test_log_likelihood_of_generated_audio_is_minus_its_nll(kwargs):
    """Under the model itself, however the classes were chosen, prefix included."""
    model = make()
    wavs, log_p = model.generate(3, generator=seeded(), return_log_likelihood=True, **kwargs)
    assert wavs.shape == (3, 50) and log_p.shape == (3,)
    torch.testing.assert_close(log_p, -model.nll(wavs).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, {"prefix": audio(2, 31), "top_k": 9}])
def test_log_likelihood_in_float32(kwargs):
    """The same identity in the precision, and with the engine, with which models are used."""
    model = make().float()
    wavs, log_p = model.generate(2, 300, generator=seeded(), return_log_likelihood=True, **kwargs)
    torch.testing.assert_close(log_p, -model.nll(wavs), rtol=0, atol=1e-5)


def test_top_1_is_the_most_likely_class_whatever_the_generator():
    model = make()
    wavs = model.generate(1, length=40, top_k=1, generator=seeded(1))
    assert torch.equal(wavs, model.generate(1, length=40, top_k=1, generator=seeded(2)))
    q = mulaw.encode(wavs)
    with torch.no_grad():
        logits = model(torch.cat([torch.full((1, 1), 128), q[:, :-1]], 1))
    assert torch.equal(logits.argmax(-1), q)


def test_the_collected_state_goes_on_as_the_parallel_form():
    """absorb then step gives the logits of the longer parallel pass."""
    model = make()
    state = model.default_state(torch.zeros(2, 0, dtype=torch.int64))
    q = mulaw.encode(audio(2, 30))
    with torch.no_grad():
        whole = model(q)
        torch.testing.assert_close(
            model.head(model.absorb(q[:, :19], state)), whole[:, :19], rtol=0, atol=1e-9
        )
        model.backbone.setup_rnn()
        for t in range(19, 30):
            logits, state = model.step(q[:, t], state)
            torch.testing.assert_close(logits, whole[:, t], rtol=0, atol=1e-9)


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "assign", "data"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generation_follows_changed_parameters(dtype, how):
    """What is prepared for stepping, by the compiled engine (float32) or without it, is never older
    than the parameters. Writes through `.data` are seen once the mode has changed."""
    model, changed = make().to(dtype), make(seed=1).to(dtype)
    before = model.generate(1, length=30, generator=seeded())
    expected = changed.generate(1, length=30, generator=seeded())
    if how in ("in place", "data"):
        with torch.no_grad():
            for p, new in zip(model.parameters(), changed.parameters(), strict=True):
                (p if how == "in place" else p.data).copy_(new)
        model.train().eval()
    else:
        model.load_state_dict(changed.state_dict(), assign=how == "assign")
    after = model.generate(1, length=30, generator=seeded())
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_generation_under_inference_mode():
    """Models made there too, with the engine and without it."""
    expected = make().float().generate(1, length=30, generator=seeded())
    with torch.inference_mode():
        for model in (make(), make().float()):
            wavs = model.generate(1, length=30, prefix=audio(1, 5), generator=seeded())
            assert wavs.shape == (1, 30)
        assert torch.equal(model.generate(1, length=30, generator=seeded()), expected)


def test_generating_again_prepares_nothing_again(monkeypatch):
    """While the parameters stay, the N x N matrix powers of `setup_rnn` are computed once."""
    model, calls = make(), []
    power = torch.linalg.matrix_power
    monkeypatch.setattr(torch.linalg, "matrix_power", lambda *a: calls.append(a[1]) or power(*a))
    for _ in range(3):
        model.generate(1, length=3, generator=seeded())
    assert len(calls) == 3  # one per S4 layer


@pytest.mark.parametrize("training", [True, False])
def test_generating_leaves_the_model_as_it_was(training):
    """The mode is eval inside and as before after it, parameters and gradients are untouched."""
    model = make(dropout=0.5).train(training)
    model(torch.zeros(1, 10, dtype=torch.int64)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grad = model.head.weight.grad.clone()
    a, b = (model.generate(1, length=30, generator=seeded()) for _ in range(2))
    assert torch.equal(a, b)  # no dropout
    assert all(m.training == training for m in model.modules())
    stream = model.stream(1, chunk=5, generator=seeded())
    assert torch.equal(next(stream), a[:, :5])
    stream.close()
    assert all(m.training == training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(grad, model.head.weight.grad)
    assert all(p.requires_grad for p in model.parameters())


def test_a_failure_leaves_the_mode_as_it_was(monkeypatch):
    model = make().train()
    monkeypatch.setattr(model, "step", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(1, length=3)
    assert all(m.training for m in model.modules())


def test_progress_changes_nothing(capsys, monkeypatch):
    model = make()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    shown = model.generate(1, length=30, generator=seeded(), progress=True)
    assert capsys.readouterr().out
    assert torch.equal(shown, model.generate(1, length=30, generator=seeded()))
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [({"n": 0}, "n=0"), ({"n": -1}, "n=-1"), ({"n": 1.5}, "n=1.5"), ({"n": True}, "n=True"),
     ({"n": np.bool_(True)}, "n=True"), ({"n": np.float64(2)}, "n=2.0"), ({"n": "2"}, "n=2"),
     ({"length": np.int64(-4)}, "length=-4"), ({"length": True}, "length=True"),
     ({"temperature": "hot"}, "temperature=hot"), ({"temperature": [1, 2]}, "temperature="),
     ({"nucleus_p": True}, "nucleus_p=True"), ({"guidance": "2"}, "guidance=2"),
     ({"top_k": True}, "top_k=True"), ({"precision": "int8"}, "precision=int8"),
     ({"nucleus_p": 0.0}, "nucleus_p=0"), ({"nucleus_p": 1.01}, "nucleus_p=1.01"),
     ({"nucleus_p": math.nan}, "nucleus_p=nan"),
     ({"temperature": 0}, "temperature=0"), ({"temperature": -1.0}, "temperature=-1"),
     ({"temperature": math.inf}, "temperature=inf"), ({"temperature": math.nan}, "temperature=nan"),
     ({"top_k": 0}, "top_k=0"), ({"top_k": 257}, "top_k=257"), ({"top_k": 2.5}, "top_k=2.5"),
     ({"length": 0}, "length=0"),
     ({"prefix": torch.zeros(1, 1, 5)}, "prefix"), ({"prefix": torch.zeros(3, 5)}, "prefix"),
     ({"prefix": torch.tensor(0.5)}, "prefix"),
     ({"prefix": torch.tensor([0.0, math.nan])}, "NaN"),
     ({"prefix": torch.tensor([0.0, 2.0])}, "largest magnitude")],
)  # fmt: skip
def test_bad_arguments_are_named(kwargs, named):
    """N = 0, nucleus_p outside (0, 1] and the like: one ValueError that says which and why."""
    model = make()
    kwargs = {"n": 2, "length": 9} | kwargs
    with pytest.raises(ValueError, match=named):
        model.generate(**kwargs)
    with pytest.raises(ValueError, match=named):
        model.stream(**kwargs)  # at the call, not at the first chunk


def test_a_prefix_longer_than_the_clip_is_refused():
    with pytest.raises(ValueError, match="prefix of 10 samples is longer than length=9"):
        make().generate(1, length=9, prefix=torch.zeros(10))


def test_a_prefix_of_integers_is_refused():
    """Classes or PCM taken for audio would be loud noise."""
    with pytest.raises(TypeError, match="float"):
        make().generate(1, length=9, prefix=torch.full((5,), 128))


def test_chunks_below_one_sample_are_refused():
    for chunk in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"chunk={chunk}"):
            make().stream(1, chunk=chunk)


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16),
             lambda m: m.type(torch.bfloat16)]
)  # fmt: skip
def test_16_bits_are_refused_with_what_there_is_instead(cast):
    """S4's recurrence needs 24 bits and more. The model is left as it was, as is its backbone."""
    model = make().float()
    wavs = audio(1, 20)
    before = model.nll(wavs)
    for module in (model, model.backbone, model.backbone.center[0].layer):
        with pytest.raises(TypeError, match=r"autocast.*precision=\"bfloat16\""):
            cast(module)
    assert torch.equal(model.nll(wavs), before)
    assert torch.equal(model.double().float().nll(wavs), before)


def test_rounded_weights_are_asked_for_by_name():
    """precision= reaches the engine; without it, or under another name, there is one error."""
    single = make().float()
    if Engine.available(single)[0]:
        clips = single.generate(2, length=20, generator=seeded(), precision="bfloat16")
        assert clips.shape == (2, 20)
        with pytest.raises(ValueError, match="precision"):
            single.generate(1, length=2, precision="int8")
    with pytest.raises(ValueError, match="precision=bfloat16 needs the compiled engine"):
        make().generate(1, length=2, precision="bfloat16")
