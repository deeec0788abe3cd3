"""From a run's weights to what is shipped."""

import hashlib
import json
import math

import numpy as np
import pytest
import soundfile
import torch

from rawaudio.autoregressive import BitsTask
from rawaudio.checkpoint import load_checkpoint, save_checkpoint
from rawaudio.data import ClipDataset
from rawaudio.families import family_of
from rawaudio.files import read_metadata
from rawaudio.golden import MARGIN, golden_classes, golden_uniforms, margin
from rawaudio.publish import compact, main, pack
from sashimi.autoregressive import AutoregressiveConfig, SashimiAR
from sashimi.diffwave import DiffusionConfig, SashimiDiffWave
from sashimi.mulaw import decode, encode

RATE = 2000
TINY = dict(d_model=8, n_layers=1, pool=[2], d_state=4, l_max=200, sample_rate=RATE, clip_length=80)


def tone(i):
    return 0.3 * np.sin(2 * np.pi * (100 + 30 * i) * np.arange(300) / RATE)


@pytest.fixture
def arguments(tmp_path):
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", tone(i), RATE, subtype="FLOAT")
    (tmp_path / "clips.csv").write_text("path\n0.wav\n1.wav\n2.wav\n")
    csvs = [f"{kind}_csv={tmp_path / 'clips.csv'}" for kind in ("train", "valid", "test")]
    return [*csvs, "data=Tones", "licence=none", f"out_dir={tmp_path / 'repository'}"]


def autoregressive(**more):
    torch.manual_seed(0)
    return SashimiAR(AutoregressiveConfig(**TINY, **more)).eval()


def diffusion(**more):
    torch.manual_seed(0)
    model = SashimiDiffWave(DiffusionConfig(**TINY, data_std=0.2, **more)).eval()
    torch.nn.init.normal_(model.output[2].weight, std=0.3)
    return model


@pytest.mark.parametrize("make", [autoregressive, diffusion])
def test_only_matrices_outside_the_state_spaces_are_rounded(make):
    """Norms, biases and all that makes a state space keep every bit."""
    model, original = make(), make().state_dict()
    pack(model)
    rounded = {k for k, v in model.state_dict().items() if not torch.equal(v, original[k])}
    assert rounded == {k for k, dtype in compact(model).items() if dtype == torch.bfloat16}
    assert {k.rsplit(".", 1)[1] for k in rounded} == {"weight"} and len(rounded) > 5
    for name in ("log_A_real", "A_imag", "B", "C", "P", "D", "log_dt", "norm.weight", "bias"):
        assert any(k.endswith(name) for k in original)
        assert not any(k.endswith(name) for k in rounded)
    for name in rounded:
        torch.testing.assert_close(model.state_dict()[name], original[name], rtol=2**-8, atol=0)


def test_a_small_file_says_where_it_comes_from_and_is_what_was_scored(tmp_path, arguments, capsys):
    save_checkpoint(tmp_path / "best.safetensors", autoregressive(), step=7)
    args = [f"checkpoint={tmp_path / 'best.safetensors'}", "name=sashimi_ar_digits", *arguments]
    save_checkpoint(tmp_path / "first.safetensors", autoregressive(), step=30)
    more = [f"before=[{tmp_path / 'first.safetensors'}]", "temperature=0.9", "most=1"]
    assert main([*args, *more]) == 0
    root = tmp_path / "repository"
    path = root / "sashimi" / "weights" / "sashimi_ar_digits.safetensors"
    assert path.stat().st_size < 0.8 * (tmp_path / "best.safetensors").stat().st_size
    model, metadata = load_checkpoint(path), read_metadata(path)
    assert (model.config.temperature, model.config.nucleus_p) == (0.9, 1.0)
    assert metadata["step"] == 37 and "sashimi_ar_digits.sh" in metadata["command"]
    assert metadata["data"] == "Tones" and metadata["licence"] == "none"
    wavs = torch.stack([torch.from_numpy(tone(i)).float() for i in range(3)])
    q = encode(wavs)
    bits = model.nll(decode(q)).mean().item() / math.log(2)
    assert metadata["test_bits"] == metadata["valid_bits"] == pytest.approx(bits, abs=1e-4)
    assert f"test_bits {metadata['test_bits']:.4f}" in capsys.readouterr().out
    data = hashlib.sha256(bytes(q.flatten().tolist())).hexdigest()
    assert metadata["data_sha256"] == data and "PyTorch" in metadata["made_with"]
    golden = json.loads((root / "tests/fixtures/golden-sashimi_ar_digits.json").read_text())
    classes = [(37 * t + 11 * t**2) % 256 for t in range(300)]
    with torch.no_grad():
        logits = model(torch.tensor([classes]))[0, [99, 199, 299]]
        spoken = [128]  # silence; then the class whose share of [0, 1) a uniform falls into
        for u in torch.rand(400, generator=torch.Generator().manual_seed(golden["seed"])):
            shares = model(torch.tensor([spoken]))[0, -1].double().softmax(0).cumsum(0)
            spoken.append(int((shares <= u).sum()))
    torch.testing.assert_close(torch.tensor(golden["logits"]), logits, rtol=1e-4, atol=1e-5)
    assert golden["sha256"] == hashlib.sha256(bytes(spoken[1:])).hexdigest()
    page = (root / "docs" / "listen.html").read_text()
    assert page.count("<audio") == 20 and "sashimi_ar_digits · 20" in page
    assert (root / "sashimi/weights/sashimi_ar_digits.webp").read_bytes()[8:12] == b"WEBP"


def test_diffusion_is_published_with_both_of_its_errors(tmp_path, arguments):
    save_checkpoint(tmp_path / "best.safetensors", diffusion(), step=7)
    args = [f"checkpoint={tmp_path / 'best.safetensors'}", "name=sashimi_diffwave_digits"]
    assert main([*args, *arguments, "peak=0.9", "most=1"]) == 0
    weights = tmp_path / "repository" / "sashimi" / "weights"
    metadata = read_metadata(weights / "sashimi_diffwave_digits.safetensors")
    assert {"valid_relative", "test_relative", "valid_mse", "test_mse"} <= metadata.keys()
    fixtures = tmp_path / "repository" / "tests" / "fixtures"
    golden = json.loads((fixtures / "golden-sashimi_diffwave_digits.json").read_text())
    model = load_checkpoint(weights / "sashimi_diffwave_digits.safetensors")
    t = np.arange(1000)
    x = torch.from_numpy(np.stack([np.sin(t * t / 700), 0.1 * np.sin(t / 5)])).float()
    with torch.no_grad():
        noise = model(x, torch.tensor([0.75 * 199, 3.0]))[:, ::50]
    torch.testing.assert_close(torch.tensor(golden["noise"]), noise, rtol=1e-3, atol=1e-4)
    wav = model.generate(1, length=2000, steps=4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.tensor(golden["audio"]), wav[:, ::50], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [autoregressive, diffusion])
def test_what_can_be_told_is_scored_told(tmp_path, arguments, make):
    """Likelihood and noise error are those of clips whose labels the model knows."""
    labels = {"label": ["a", "b"]}
    told = make(conditions=labels, condition_counts={"label": [2, 1]})
    (tmp_path / "clips.csv").write_text("path,label\n0.wav,a\n1.wav,b\n2.wav,a\n")
    ds = ClipDataset(tmp_path / "clips.csv", RATE, pcm=make is diffusion, progress=False)
    score_of = family_of(told).task.scores
    unit, untold = next(iter(score_of(told, ds).items()))
    ds.tell(labels)
    assert score_of(told, ds)[unit] == pytest.approx(untold, rel=1e-6)  # tables begin at zero
    torch.nn.init.normal_(told.told.tables[0].weight, std=3.0)
    save_checkpoint(tmp_path / "best.safetensors", told, step=7)
    name = "sashimi_ar_digits" if make is autoregressive else "sashimi_diffwave_digits"
    args = [f"checkpoint={tmp_path / 'best.safetensors'}", f"name={name}", *arguments]
    assert main([*args, "most=9"]) == 0
    path = tmp_path / "repository" / "sashimi" / "weights" / f"{name}.safetensors"
    shipped = load_checkpoint(path)
    score = score_of(shipped, ds)[unit]
    assert read_metadata(path)[f"valid_{unit}"] == pytest.approx(score, abs=2e-5)
    ds.told.zero_()
    assert score_of(shipped, ds)[unit] != pytest.approx(score, abs=1e-3)
    if make is autoregressive:
        q = encode(torch.stack([torch.from_numpy(tone(i)).float() for i in range(3)]))
        bits = shipped.nll(decode(q), label=["a", "b", "a"]).mean().item() / math.log(2)
        assert score == pytest.approx(bits, abs=1e-4)


def test_weights_that_rounding_would_spoil_are_refused(tmp_path, arguments, capsys):
    """Nothing is written then, and the message says how much would be lost."""
    save_checkpoint(tmp_path / "best.safetensors", autoregressive())
    args = [f"checkpoint={tmp_path / 'best.safetensors'}", "name=sashimi_ar_digits", *arguments]
    assert main([*args, "most=-1"]) == 1
    assert "most=-1" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()
    for more, words in [
        ("name=sashimi_digits", "name=sashimi_digits"),
        ("checkpoint=nowhere.safetensors", "nowhere.safetensors"),
        ("test_csv=nowhere.csv", "nowhere.csv"),
        ("nucleus_p=2", "nucleus_p=2"),
    ]:
        try:
            status = main([*args, more])
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr().err.strip()
        assert status == 2 and words in said and said.startswith("error: ") and "\n" not in said


def test_the_golden_seed_keeps_its_distance_from_every_edge():
    """Uniforms are no nearer to an edge of their class than processors can disagree about."""
    model = autoregressive()
    found = BitsTask.golden(model)
    q = golden_classes(model, found["seed"])
    assert hashlib.sha256(bytes(q[0].tolist())).hexdigest() == found["sha256"]
    uniforms = golden_uniforms(found["seed"])
    assert margin(model, q, uniforms) >= MARGIN
    # the classes are those that the uniforms choose, and the margin sees an edge that is near
    logits = model(torch.nn.functional.pad(q[:, :-1], (1, 0), value=128))[0].double()
    cdf = logits.softmax(-1).cumsum(-1)
    torch.testing.assert_close((cdf <= uniforms).sum(-1), q[0])
    uniforms[5] = cdf[5, int(q[0, 5])].detach() - 1e-7
    assert margin(model, q, uniforms) < 1e-6
