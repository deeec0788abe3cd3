"""mu-law: the same classes and values as torchaudio's functions and as recorded elsewhere."""

import math
from pathlib import Path

import pytest
import torch

from sashimi import mulaw
from sashimi.mulaw import N_CLASSES, SILENCE

RECORDED = torch.load(Path(__file__).parent / "fixtures" / "mulaw.pt", weights_only=True)
ALL = torch.arange(N_CLASSES)
LAST_BIT = {"atol": 1e-7, "rtol": 0}  # exp rounds differently on other processors


def test_classes_and_values_are_the_recorded_ones():
    assert torch.equal(mulaw.encode(RECORDED["wav"]), RECORDED["classes"].long())
    torch.testing.assert_close(mulaw.decode(ALL), RECORDED["decoded"], **LAST_BIT)
    assert torch.equal(mulaw.encode(mulaw.decode(ALL)), ALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sample_gets_torchaudios_class(dtype):
    pcm = torch.arange(-32768, 32768, dtype=torch.int32)
    # recorded: the lowest int16 value of each class (or above), which fixes all 65,536
    expected = torch.searchsorted(RECORDED["pcm16_first_of_class"], pcm, right=True) - 1
    assert torch.equal(mulaw.encode(pcm.to(dtype) / 32768), expected)
    # between them, torchaudio's formula as it stands there
    x = 2 * torch.rand(200_001, dtype=dtype, generator=torch.Generator().manual_seed(0)) - 1
    x = torch.cat([x, x * 1e-3])
    mu = torch.tensor(255.0, dtype=dtype)
    y = torch.sign(x) * torch.log1p(mu * torch.abs(x)) / torch.log1p(mu)
    assert torch.equal(mulaw.encode(x), ((y + 1) / 2 * mu + 0.5).to(torch.int64))


def test_full_scale_and_silence_have_their_classes():
    x = torch.tensor([-1.0, 0.0, -0.0, 1.0])
    assert mulaw.encode(x).tolist() == [0, SILENCE, SILENCE, N_CLASSES - 1]
    assert mulaw.decode(ALL)[[0, -1]].tolist() == [-1.0, 1.0]
    # 256 classes have no middle: ((1 + mu)^(1 / 255) - 1) / mu
    middle = (256 ** (1 / 255) - 1) / 255
    assert mulaw.decode(torch.tensor(SILENCE)).item() == pytest.approx(middle, rel=1e-4)


def test_decode_rises_with_the_class_and_errs_less_than_a_step():
    steps = mulaw.decode(ALL).double().diff()
    assert (steps > 0).all()
    x = torch.linspace(-1, 1, 10_001, dtype=torch.float64)
    q = mulaw.encode(x)
    step = torch.stack([steps[(q - 1).clamp(min=0)], steps[q.clamp(max=254)]]).amax(0)
    assert ((mulaw.decode(q) - x).abs() <= step).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.linspace(-1, 1, 999).to(dtype)
    assert torch.equal(mulaw.encode(x), mulaw.encode(x.float()))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 5)])
@pytest.mark.parametrize("check", [True, False])
def test_shapes_are_kept_and_dtypes_are_as_promised(shape, check):
    q = mulaw.encode(torch.zeros(shape), check=check)
    assert q.shape == shape and q.dtype == torch.int64
    wav = mulaw.decode(q, check=check)
    assert wav.shape == shape and wav.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_decode_takes_every_integer_dtype(dtype):
    q = torch.arange(128, dtype=dtype)
    torch.testing.assert_close(mulaw.decode(q), RECORDED["decoded"][:128], **LAST_BIT)


def test_overshoot_is_clamped_and_the_input_left_as_it_was():
    x = torch.tensor([0.5, 1.0009, -1.0009], requires_grad=True)
    assert mulaw.encode(x).tolist() == [239, 255, 0]
    assert x.tolist() == pytest.approx([0.5, 1.0009, -1.0009])
    x = torch.tensor([7.0, -7.0, math.inf])
    assert mulaw.encode(x, check=False).tolist() == [255, 0, 255]


@pytest.mark.parametrize(
    "values, words",
    [
        ([0.0, -1.5], r"loud: .*\[-1, 1\].*magnitude here is 1\.5"),
        ([1000.0], "32768"),
        ([math.inf], "inf"),
        ([0.0, math.nan], "NaN"),
    ],
)
def test_what_is_no_audio_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        mulaw.encode(torch.tensor(values), name="loud")


@pytest.mark.parametrize("bad", [-1, 256])
def test_decode_refuses_classes_out_of_range(bad):
    with pytest.raises(ValueError, match=rf"0\.\.255.*{bad}"):
        mulaw.decode(torch.tensor([0, bad, 255]))


@pytest.mark.parametrize(
    "function, dtypes, words",
    [
        (mulaw.encode, [torch.int16, torch.int64, torch.uint8, torch.bool], "/ 32768"),
        (
            mulaw.decode,
            [torch.float32, torch.float16, torch.bool, torch.complex64],
            "integer classes",
        ),
    ],
)
def test_other_dtypes_are_refused(function, dtypes, words):
    for dtype in dtypes:
        with pytest.raises(TypeError, match=words):
            function(torch.zeros(3, dtype=dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu_classes_are_those_of_the_cpu():
    assert torch.equal(mulaw.decode(ALL.cuda()).cpu(), mulaw.decode(ALL))
    assert torch.equal(mulaw.encode(mulaw.decode(ALL.cuda())).cpu(), ALL)
