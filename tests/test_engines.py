"""The compiled steps of WaveNet and SampleRNN are the plain recurrence; test_realtime.py has what
all networks share, test_families.py conditions, guidance and prefixes."""

import pytest
import torch
from engines import assert_close, compiled, run, silence, uniforms
from models import SAMPLERNN, TINY, WAVENET, make, seeded

from cauchy_kernel import build
from rawaudio.sampling import Plain
from sashimi import mulaw

SHAPES = [("wavenet", WAVENET), ("wavenet", WAVENET | {"kernel_size": 3, "layers": 4, "blocks": 1}),
          ("wavenet", {"layers": 2, "blocks": 1, "residual_channels": 20, "dilation_channels": 33,
                       "skip_channels": 40, "end_channels": 17}),
          ("samplernn", SAMPLERNN), ("samplernn", {"frame_sizes": [1], "d_hidden": 33}),
          ("samplernn", {"frame_sizes": [3, 1, 2], "n_rnn": 2, "d_hidden": 20,
                         "quantizer": "linear"})]  # fmt: skip
SASHIMI = "autoregressive", TINY["autoregressive"] | {"d_model": 10, "unet": True}
LARGE = [("wavenet", WAVENET | {"skip_channels": 512, "end_channels": 1024}),
         ("samplernn", SAMPLERNN | {"d_hidden": 136})]  # fmt: skip


def shapes(which):
    return pytest.mark.parametrize("shape", which, ids=str)


@torch.no_grad()
def exact(model, classes):
    """Their logits by the parallel form in double precision."""
    x = torch.cat([silence(len(classes))[:, None], classes[:, :-1]], 1)
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
    assert torch.equal(classes, Plain(model, n).run(silence(n), uniforms(40, n)))


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
@shapes([SHAPES[0], SHAPES[-1], SASHIMI])
def test_a_processor_without_wide_vectors_gets_the_same(shape, monkeypatch, tmp_path, fresh):
    """Compiled for the oldest processor of the family."""
    model = make(shape)
    classes, logits = run(model, 3, 30)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    narrow = [x.replace("-O3", "-O1") for x in build.FLAGS if "-march" not in x]
    monkeypatch.setattr(build, "FLAGS", narrow)
    fresh()
    classes_there, logits_there = run(model, 3, 30)
    assert list(tmp_path.rglob("*.so")) and torch.equal(classes_there, classes)
    assert_close(logits_there, logits)


@pytest.mark.parametrize("kind", ["wavenet", "samplernn"])
def test_without_a_compiler_generation_is_plain(kind, monkeypatch, caplog, fresh):
    """One line says why."""

    def none():
        raise build.BuildError("no C++ compiler")

    model = make(kind)
    monkeypatch.setattr(build, "compiler", none)
    got = model.generate(2, 30, generator=seeded())
    model.generate(1, 3)
    expected = Plain(model, 2).run(silence(2), uniforms(1024, 2)[:30])
    assert torch.equal(got, mulaw.decode(expected))
    said = "sashimi: generating without the engine, slower: no C++ compiler"
    assert caplog.messages == [said]
