"""The compiled steps of WaveNet and SampleRNN are the plain recurrence; test_realtime.py has what
all networks share, test_families.py conditions, guidance and prefixes."""

import pytest
import torch
from models import SAMPLERNN, WAVENET, make, seeded

from cauchy_kernel import build
from rawaudio import engine
from rawaudio.engine import Engine, library
from rawaudio.sampling import Plain
from sashimi import mulaw

SHAPES = [("wavenet", WAVENET), ("wavenet", WAVENET | {"kernel_size": 3, "layers": 4, "blocks": 1}),
          ("wavenet", {"layers": 2, "blocks": 1, "residual_channels": 20, "dilation_channels": 33,
                       "skip_channels": 40, "end_channels": 17}),
          ("samplernn", SAMPLERNN), ("samplernn", {"frame_sizes": [1], "d_hidden": 33}),
          ("samplernn", {"frame_sizes": [3, 1, 2], "n_rnn": 2, "d_hidden": 20,
                         "quantizer": "linear"})]  # fmt: skip
LARGE = [("wavenet", WAVENET | {"skip_channels": 512, "end_channels": 1024}),
         ("samplernn", SAMPLERNN | {"d_hidden": 136})]  # fmt: skip
compiled = pytest.mark.skipif(not Engine.available(make("wavenet"))[0], reason="no C++ compiler")


def shapes(which):
    return pytest.mark.parametrize("shape", which, ids=str)


@pytest.fixture
def fresh():
    """Forgets the libraries and what was packed for them, before and after."""
    library.cache_clear(), engine._cache.clear()
    yield
    library.cache_clear(), engine._cache.clear()


def run(model, n, steps, threads=1, precision="float32"):
    """Classes (n, steps) and logits (n, steps, 256) of the engine."""
    logits, uniforms = torch.empty(n, steps, 256), torch.rand(steps, n, generator=seeded())
    walk = Engine(model, n, precision, threads)
    return walk.run(torch.full((n,), mulaw.SILENCE), uniforms, logits_out=logits), logits


@torch.no_grad()
def exact(model, classes):
    """Their logits by the parallel form in double precision."""
    x = torch.cat([torch.full((len(classes), 1), mulaw.SILENCE), classes[:, :-1]], 1)
    y = model.double()(x)
    model.float()
    return y


@compiled
@pytest.mark.parametrize("n", [1, 3, 17])
@shapes(SHAPES)
def test_logits_and_classes_are_those_of_the_network(shape, n):
    """In every shape, features that fill no vector too, and for any number of clips."""
    model = make(shape)
    classes, logits = run(model, n, 40)
    wanted = exact(model, classes)
    assert (logits - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())
    uniforms = torch.rand(40, n, generator=seeded())
    assert torch.equal(classes, Plain(model, n).run(torch.full((n,), mulaw.SILENCE), uniforms))


@compiled
@shapes(LARGE)
def test_two_threads_that_share_a_clip_make_the_same_bits(shape):
    model = make(shape)
    for n in (1, 3):
        classes, logits = run(model, n, 100)
        assert torch.equal(run(model, n, 100, threads=2 * n)[1], logits)
        wanted = exact(model, classes)
        assert (logits - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())


@compiled
@shapes(LARGE)
def test_float16_weights_move_the_logits_little(shape):
    model = make(shape)
    classes, logits = run(model, 2, 60, precision="float16")
    wanted = exact(model, classes)
    assert 1e-5 < (logits - wanted).abs().max() < 2e-3 * wanted.std()


@compiled
@shapes([SHAPES[0], SHAPES[-1]])
def test_a_processor_without_wide_vectors_gets_the_same(shape, monkeypatch, tmp_path, fresh):
    model = make(shape)
    classes, logits = run(model, 3, 30)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    narrow = [x.replace("-O3", "-O1") for x in build.FLAGS if "-march" not in x]
    monkeypatch.setattr(build, "FLAGS", narrow)
    library.cache_clear(), engine._cache.clear()
    classes_there, logits_there = run(model, 3, 30)
    assert list(tmp_path.rglob("*.so")) and torch.equal(classes_there, classes)
    torch.testing.assert_close(logits_there, logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["wavenet", "samplernn"])
def test_without_a_compiler_generation_is_plain(kind, monkeypatch, caplog, fresh):
    """One line says why."""

    def none():
        raise build.BuildError("no C++ compiler")

    model = make(kind)
    monkeypatch.setattr(build, "compiler", none)
    got = model.generate(2, 30, generator=seeded())
    model.generate(1, 3)
    uniforms = torch.rand(1024, 2, generator=seeded())[:30]
    expected = Plain(model, 2).run(torch.full((2,), mulaw.SILENCE), uniforms)
    assert torch.equal(got, mulaw.decode(expected))
    said = "sashimi: generating without the engine, slower: no C++ compiler"
    assert caplog.messages == [said]
