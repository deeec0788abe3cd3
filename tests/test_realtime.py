"""The step engine is the plain recurrence: same logits, same classes, whatever the threads."""

import os
from unittest.mock import Mock

import pytest
import torch
from engines import assert_close, compiled, run, silence, uniforms
from models import make, seeded

from cauchy_kernel import build
from rawaudio.engine import Engine
from rawaudio.errors import UserError
from rawaudio.sampling import Plain


@torch.no_grad()
def stepped(model, classes):
    """Logits (n, T, 256) of the plain recurrence when the classes (n, T) are what was drawn."""
    model.backbone.setup_rnn()
    state, q, out = model.backbone.default_state(len(classes)), silence(len(classes)), []
    for drawn in classes.unbind(1):
        logits, state = model.step(q, state)
        out.append(logits)
        q = drawn
    return torch.stack(out, 1)


SHAPES = [
    ({}, {}), (dict(unet=True, ff=0), dict(temperature=0.7)),
    (dict(ff=3, d_model=5), dict(top_k=5)), (dict(pool=[]), dict(top_k=1)),
    (dict(pool=[4, 1, 2], n_layers=2), dict(nucleus_p=0.8)),
    (dict(tied=False, d_model=20), dict(nucleus_p=1e-6)),
    (dict(tied=False, unet=True, glu=False), dict(temperature=1.5, top_k=40, nucleus_p=0.95)),
    (dict(d_model=10, expand=1), {}), (dict(d_model=17, expand=3, unet=True, n_layers=2), {}),
    (dict(d_model=48, d_state=64), {}), (dict(d_model=1, d_state=2), {}),
]  # fmt: skip


@compiled
@pytest.mark.parametrize("n", [1, 17])
@pytest.mark.parametrize(("shape", "how"), SHAPES, ids=str)
def test_logits_classes_and_likelihoods_are_those_of_the_plain_recurrence(shape, how, n):
    model, u = make(**shape), uniforms(60, n)
    logits, log_p = torch.empty(n, 60, 256), torch.zeros(2, n, dtype=torch.float64)
    classes = Engine(model, n).run(silence(n), u, **how, log_p=log_p[0], logits_out=logits)
    assert_close(logits, stepped(model, classes))
    assert torch.equal(classes, Plain(model, n).run(silence(n), u, **how, log_p=log_p[1]))
    torch.testing.assert_close(log_p[0], log_p[1], rtol=1e-6, atol=1e-4)


@compiled
@pytest.mark.parametrize("scale", [0.0, 1e-25, 30.0])
def test_any_low_rank_term_and_any_loudness(scale):
    """P = 0, tiny or large, and activations far outside the range of a trained model."""
    model = make(d_model=16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".P"):
                p[:, ::2] *= scale
            if name.endswith(("norm.weight", "embedding.weight")):
                p *= 1 + scale / 3
    classes, logits = run(model, 2, 60)
    expected = stepped(model, classes)
    assert (logits - expected).abs().max() < 1e-5 * (1 + expected.abs().max())


@compiled
def test_thousands_of_steps_stay_with_the_convolution_in_double():
    model = make(d_model=16, d_state=64, l_max=4000, pool=[4])
    classes, logits = run(model, 1, 4000)
    with torch.no_grad():
        expected = model.double()(torch.cat([silence(1)[:, None], classes[:, :-1]], 1))
    assert (logits - expected).abs().max() < 1e-4 and logits.isfinite().all()


@compiled
@pytest.mark.parametrize("large", [False, True])
def test_clips_are_the_same_bits_in_any_company(large):
    """Whatever their number and that of threads; two threads share a tier above `kLarge` bytes."""
    model = make(d_model=128, d_state=64, n_layers=2, pool=[2]) if large else make(d_model=20)
    steps = 24
    classes, logits = run(model, 19, steps)
    for n, threads in [(1, 1), (1, 2), (2, 4), (2, 3), (5, 2), (7, 1), (19, 2), (19, 4)]:
        again, got = Engine(model, n, threads=threads), torch.empty(n, steps, 256)
        u = uniforms(steps, 19)[:, :n]
        assert torch.equal(again.run(silence(n), u, logits_out=got), classes[:n])
        assert torch.equal(got, logits[:n]), (n, threads)


@compiled
def test_float16_weights_are_the_plain_recurrence_of_rounded_weights():
    model = make(d_model=20, n_layers=2)
    classes, logits = run(model, 3, 60, precision="float16")
    exact = stepped(model, classes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(module.weight.half())
    assert_close(logits, stepped(model, classes))
    assert 0 < (logits - exact).abs().max() < 0.01 * exact.std()


@compiled
@pytest.mark.parametrize("scale, chosen", [(0.1, "float16"), (10, "float32"), (1e6, "float32")])
def test_auto_takes_float16_where_logits_stay_and_says_so(scale, chosen, caplog):
    """Rounding grows with the head's weights; numbers that float16 does not have are refused."""
    model = make()
    model.head.weight.data.mul_(scale)
    with caplog.at_level("INFO"):
        assert [Engine(model, 2, "auto").precision for _ in range(2)] == [chosen] * 2
    lines = [record.getMessage() for record in caplog.records]
    assert [f"auto: {chosen};" in line for line in lines if "precision=auto" in line] == [True]
    if scale == 1e6:
        with pytest.raises(UserError, match="precision=float16: .* beyond 65,504"):
            Engine(model, 2, "float16")


@compiled
def test_generation_takes_the_engine_and_is_that_of_the_plain_loop(monkeypatch):
    model, clips = make(), []
    for setting, skipped in (("on", Plain), ("off", Engine)):
        with monkeypatch.context() as patch:
            patch.setenv("SASHIMI_ENGINE", setting)
            patch.setattr(skipped, "run", None)
            clips.append(model.generate(2, 50, temperature=0.9, top_k=30, generator=seeded()))
    assert torch.equal(*clips)


def test_an_engine_that_is_asked_for_and_is_not_there_is_named(monkeypatch, fresh):
    """Without a compiler; other types than float32 are left to the plain loop."""
    monkeypatch.setattr(build, "compiler", Mock(side_effect=build.BuildError("no C++ compiler")))
    model = make()
    assert Engine.available(model) == (False, "no C++ compiler")
    with pytest.raises(RuntimeError, match="no engine: no C"):
        Engine(model, 1)
    for value, message in (("perhaps", "must be on or off"), ("on", "SASHIMI_ENGINE=on: no C")):
        monkeypatch.setenv("SASHIMI_ENGINE", value)
        with pytest.raises(ValueError, match=message):
            model.generate(1, 2)
    with pytest.raises(ValueError, match="not float32"):
        Engine.available(model.double())


@compiled
def test_weights_are_packed_once_and_again_after_a_change():
    """Also through .data, which no version counter sees, where values change places alone."""
    model = make()
    packed = Engine(model, 1)._packed
    assert Engine(model, 2)._packed is packed
    weight = model.backbone.center[0].layer.C
    for change in (lambda: weight.mul_(1.5), lambda: weight.data.copy_(weight.data.flip(1))):
        with torch.no_grad():
            change()
        assert Engine(model, 1)._packed is not packed
        classes, logits = run(model, 1, 20)
        model.train().eval()  # S4 forgets what it has computed from the parameters
        assert_close(logits, stepped(model, classes))
        packed = Engine(model, 1)._packed


@compiled
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
def test_memory_does_not_grow():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    stream = make().stream(1, chunk=500)
    for _ in range(4):
        next(stream)
    before = resident()
    for _ in range(60):
        next(stream)
    assert resident() - before < 2**20


@compiled
@pytest.mark.parametrize(
    "message, engine, arguments",
    [("n=0", dict(n=0), {}), ("threads=0", dict(threads=0), {}),
     ("precision", dict(precision="bfloat16"), {}), ("q: expected", {}, dict(q=silence(3))),
     ("uniforms", {}, dict(uniforms=uniforms(4, 3))), ("log_p", {}, dict(log_p=torch.zeros(2))),
     ("logits_out", {}, dict(logits_out=torch.zeros(4, 2, 256))),
     ("logits_out", {}, dict(logits_out=torch.zeros(4, 2, 256).transpose(0, 1))),
     ("classes must be", {}, dict(q=silence(2) + 128)), ("top_k", {}, dict(top_k=0))],
)  # fmt: skip
def test_bad_arguments_are_named(message, engine, arguments):
    """Nothing is read or written beyond an end."""
    arguments = dict(q=silence(2), uniforms=uniforms(4, 2)) | arguments
    with pytest.raises(ValueError, match=message):
        Engine(make(), **dict(n=2) | engine).run(**arguments)
