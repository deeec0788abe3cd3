"""What SashimiAR takes and refuses, and what it prepares for generation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from models import audio, make, seeded

from rawaudio.sampling import shift
from sashimi import mulaw, s4


def test_arrays_and_numbers_of_numpy_are_taken():
    """Of any strides, for likelihoods, clips and logits."""
    model, wavs = make().double(), audio(2, 20).double()
    backwards = wavs.numpy()[:, ::-1].copy()[:, ::-1]
    for given in (backwards, backwards.tolist()):
        lengths = np.array([3, 20])
        assert torch.equal(model.nll(given, lengths), model.nll(wavs, torch.tensor([3, 20])))
        numbers = np.float32(0.75), np.uint8(9), np.float64(0.5)
        clips = model.generate(np.int64(2), np.int32(30), given, *numbers, seeded())
        assert torch.equal(clips, model.generate(2, 30, wavs, 0.75, 9, 0.5, seeded()))
    q = mulaw.encode(wavs)
    assert torch.equal(mulaw.encode(backwards), q)
    assert torch.equal(mulaw.decode(q.numpy()), mulaw.decode(q))
    with torch.no_grad():
        for x in (q.numpy(), q.to(torch.uint8), q.int().numpy()):
            assert torch.equal(model(x), model(q))
        assert model(q[:0]).shape == (0, 20, 256)


WAVS, ZEROS = audio(2, 20), torch.zeros(2, 10)
WRONG_TYPES = [
    ("wavs: .*/ 32768", lambda m: m.nll((WAVS * 32767).short())),
    ("wavs: .*/ 32768", lambda m: m.nll((WAVS * 32767).short().numpy())),
    ("wavs: .*not str", lambda m: m.nll("speech.wav")),
    ("wavs: .*not list", lambda m: m.nll([[0.1, 0.2], [0.3]])),
    ("lengths: .*float", lambda m: m.nll(WAVS, [3.0, 4.0])),
    ("x: .*float32", lambda m: m(WAVS)),
    ("q: .*not NoneType", lambda m: mulaw.decode(None)),
    ("prefix: .*not str", lambda m: m.generate(1, prefix="a.wav")),
    ("prefix: .*float", lambda m: m.generate(1, prefix=torch.full((5,), 128))),
    ("generator=7: .*manual_seed", lambda m: m.generate(1, generator=7)),
]
WRONG_VALUES = [
    ("wavs: .*1.5", lambda m: m.nll(ZEROS + 1.5)),
    ("wavs: .*NaN", lambda m: m.nll(ZEROS + math.nan)),
    (r"wavs of shape \(10,\)", lambda m: m.nll(ZEROS[0])),
    (r"wavs of shape \(2, 0\)", lambda m: m.nll(ZEROS[:, :0])),
    (r"wavs of shape \(1, 2, 10\)", lambda m: m.nll(ZEROS[None])),
    (r"lengths must be \(2,\) integers from 1 to 10", lambda m: m.nll(ZEROS, [0, 10])),
    ("lengths must be", lambda m: m.nll(ZEROS, [5, 11])),
    ("lengths must be", lambda m: m.nll(ZEROS, [5])),
    ("x: classes must be from 0 to 255", lambda m: m(torch.full((1, 3), 256))),
    (r"x of shape \(3,\)", lambda m: m(torch.zeros(3, dtype=torch.int64))),
    ("prefix of 10 samples is longer than length=9", lambda m: m.generate(1, 9, ZEROS[0])),
    ("chunk=0", lambda m: m.stream(1, chunk=0)),
    ("chunk=2.5", lambda m: m.stream(1, chunk=2.5)),
    ("chunk=True", lambda m: m.stream(1, chunk=True)),
    ("precision=float16 needs the compiled engine",
     lambda m: m.double().generate(1, length=2, precision="float16")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "rows"), [(TypeError, WRONG_TYPES), (ValueError, WRONG_VALUES)], ids=["type", "value"]
)
def test_what_is_no_audio_or_class_is_named(error, rows):
    for words, call in rows:
        with pytest.raises(error, match=words) as raised:
            call(make())
        assert "\n" not in str(raised.value)


BAD = {
    "n": [0, -1, 1.5, True, np.bool_(True), np.float64(2), "2"],
    "length": [0, np.int64(-4), True],
    "temperature": [0, -1.0, math.inf, math.nan, "hot", [1, 2]],
    "nucleus_p": [0.0, 1.01, math.nan, True],
    "top_k": [0, 257, 2.5, True],
    "precision": ["int8"],
    "guidance": ["2"],
    "prefix": [torch.zeros(1, 1, 5), torch.zeros(3, 5), torch.tensor(0.5),
               torch.tensor([0.0, math.nan]), torch.tensor([0.0, 2.0])],
}  # fmt: skip
PREFIX_WORDS = ["prefix of shape"] * 3 + ["NaN", "largest magnitude"]


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    """One ValueError that says which and why; of streams at the call, not at the first chunk."""
    model = make()
    for i, value in enumerate(BAD[name]):
        words = PREFIX_WORDS[i] if name == "prefix" else f"{name}={value}"
        for method in (model.generate, model.stream):
            with pytest.raises(ValueError) as raised:
                method(**{"n": 2, "length": 9, name: value})
            assert words in str(raised.value)


def test_unconditional_generation_is_generation_of_whole_clips_the_models_own_way():
    """Ancestral sampling, unless the model or who asks says otherwise."""
    model, own = make().double(), {"temperature": 0.5, "nucleus_p": 0.7}
    learned = model.unconditional_generate(2, generator=seeded())
    assert learned.shape == (2, 40) and model.sample_rate == model.config.sample_rate == 1000
    wavs = model.unconditional_generate(2, 0.7, temperature=0.5, generator=seeded())
    assert torch.equal(wavs, model.generate(2, **own, generator=seeded()))
    assert not torch.equal(wavs, learned)
    model.config = dataclasses.replace(model.config, **own)
    assert torch.equal(model.unconditional_generate(2, generator=seeded()), wavs)
    assert torch.equal(torch.cat(list(model.stream(2, 40, generator=seeded())), 1), wavs)
    ancestral = model.generate(2, temperature=1.0, nucleus_p=1.0, generator=seeded())
    assert torch.equal(ancestral, learned)
    with pytest.raises(ValueError, match="nucleus_p=1.5"):
        dataclasses.replace(model.config, nucleus_p=1.5)


def test_top_1_is_the_most_likely_class_whatever_the_generator():
    model = make().double()
    wavs = model.generate(1, length=40, top_k=1, generator=seeded(1))
    assert torch.equal(wavs, model.generate(1, length=40, top_k=1, generator=seeded(2)))
    q = mulaw.encode(wavs)
    with torch.no_grad():
        assert torch.equal(model(shift(q)).argmax(-1), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generation_follows_changed_parameters(dtype):
    """With the engine (float32) or without it."""
    model, changed = make().to(dtype), make(seed=1).to(dtype)
    before = model.generate(1, length=30, generator=seeded())
    model.load_state_dict(changed.state_dict())
    after = model.generate(1, length=30, generator=seeded())
    assert torch.equal(after, changed.generate(1, length=30, generator=seeded()))
    assert not torch.equal(after, before)


def test_generation_under_inference_mode():
    """Models made there too, with the engine and without it."""
    expected = make().generate(1, length=30, generator=seeded())
    with torch.inference_mode():
        for model in (make().double(), make()):
            wavs = model.generate(1, length=30, prefix=audio(1, 5), generator=seeded())
            assert wavs.shape == (1, 30)
        assert torch.equal(model.generate(1, length=30, generator=seeded()), expected)


def test_generating_again_prepares_nothing_again(monkeypatch):
    model, calls = make().double(), []
    compute = s4.nplr_gradients
    monkeypatch.setattr(s4, "nplr_gradients", lambda *a: calls.append(a[-1]) or compute(*a))
    for _ in range(3):
        model.generate(1, length=3, generator=seeded())
    assert len(calls) == 3  # one per S4 layer


CASTS = [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16),
         lambda m: m.type(torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize("cast", CASTS)
def test_16_bits_are_refused_with_what_there_is_instead(cast):
    """S4's recurrence needs 24 bits and more. The model is left as it was, as is its backbone."""
    model, wavs = make(), audio(1, 20)
    before = model.nll(wavs)
    for module in (model, model.backbone, model.backbone.center[0].layer):
        with pytest.raises(TypeError, match=r"autocast.*precision=\"float16\""):
            cast(module)
    assert torch.equal(model.nll(wavs), before)
    assert torch.equal(model.double().float().nll(wavs), before)
