"""From a run's weights to what is shipped."""

import hashlib
import json
import math

import numpy as np
import pytest
import soundfile
import torch
from commands import status

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
LABELS = {"label": ["a", "b"]}
FREQUENCIES = torch.tensor([[100], [130], [160]])
TONES = 0.3 * torch.sin(torch.arange(300) * FREQUENCIES * (2 * math.pi / RATE))


def autoregressive(**more):
    torch.manual_seed(0)
    return SashimiAR(AutoregressiveConfig(**TINY, **more)).eval()


def diffusion(**more):
    torch.manual_seed(0)
    model = SashimiDiffWave(DiffusionConfig(**TINY, data_std=0.2, **more)).eval()
    torch.nn.init.normal_(model.output[2].weight, std=0.3)
    return model


NAMES = {autoregressive: "sashimi_ar_digits", diffusion: "sashimi_diffwave_digits"}


@pytest.fixture
def publish(tmp_path):
    """publish(model, setting, ...): the exit status, and the shipped file."""
    for i, tone in enumerate(TONES):
        soundfile.write(tmp_path / f"{i}.wav", tone.numpy(), RATE, subtype="FLOAT")
    (tmp_path / "clips.csv").write_text("path,label\n0.wav,a\n1.wav,b\n2.wav,a\n")
    csvs = [f"{kind}_csv={tmp_path / 'clips.csv'}" for kind in ("train", "valid", "test")]
    given = [*csvs, "data=Tones", "licence=none", f"out_dir={tmp_path / 'repository'}"]

    def run(model, *more):
        save_checkpoint(tmp_path / "best.safetensors", model, step=7)
        name = NAMES[autoregressive if isinstance(model, SashimiAR) else diffusion]
        argv = [f"checkpoint={tmp_path / 'best.safetensors'}", f"name={name}", *given, *more]
        shipped = tmp_path / "repository" / "sashimi" / "weights" / f"{name}.safetensors"
        return status(main, argv), shipped

    return run


def golden_of(shipped):
    folder = shipped.parents[2] / "tests" / "fixtures"
    return json.loads((folder / f"golden-{shipped.stem}.json").read_text())


@pytest.mark.parametrize("make", [autoregressive, diffusion])
def test_only_matrices_outside_the_state_spaces_are_rounded(make):
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


def test_a_small_file_says_where_it_comes_from_and_is_what_was_scored(tmp_path, publish, capsys):
    save_checkpoint(tmp_path / "first.safetensors", autoregressive(), step=30)
    torch.save({"step": 200}, tmp_path / "last.pt")
    before = f"before=[{tmp_path / 'first.safetensors'},{tmp_path / 'last.pt'}]"
    ended, path = publish(autoregressive(), before, "temperature=0.9", "most=1")
    assert ended == 0
    assert path.stat().st_size < 0.8 * (tmp_path / "best.safetensors").stat().st_size
    model, metadata = load_checkpoint(path), read_metadata(path)
    assert (model.config.temperature, model.config.nucleus_p) == (0.9, 1.0)
    assert metadata["step"] == 237 and "sashimi_ar_digits.sh" in metadata["command"]
    assert metadata["data"] == "Tones" and metadata["licence"] == "none"
    q = encode(TONES)
    bits = model.nll(decode(q)).mean().item() / math.log(2)
    assert metadata["test_bits"] == metadata["valid_bits"] == pytest.approx(bits, abs=1e-4)
    assert f"test_bits {metadata['test_bits']:.4f}" in capsys.readouterr().out
    data = hashlib.sha256(bytes(q.flatten().tolist())).hexdigest()
    assert metadata["data_sha256"] == data and "PyTorch" in metadata["made_with"]
    golden = golden_of(path)
    classes = [(37 * t + 11 * t**2) % 256 for t in range(300)]
    with torch.no_grad():
        logits = model(torch.tensor([classes]))[0, [99, 199, 299]]
    torch.testing.assert_close(torch.tensor(golden["logits"]), logits, rtol=1e-4, atol=1e-5)
    page = (tmp_path / "repository" / "docs" / "listen.html").read_text()
    assert page.count("<audio") == 20 and "sashimi_ar_digits · 20" in page
    assert path.with_suffix(".webp").read_bytes()[8:12] == b"WEBP"


def test_diffusion_is_published_with_both_of_its_errors(publish):
    ended, path = publish(diffusion(), "peak=0.9", "most=1")
    assert ended == 0
    kinds = {"valid_relative", "test_relative", "valid_mse", "test_mse"}
    assert kinds <= read_metadata(path).keys()
    model, golden = load_checkpoint(path), golden_of(path)
    t = np.arange(1000)
    x = torch.from_numpy(np.stack([np.sin(t * t / 700), 0.1 * np.sin(t / 5)])).float()
    with torch.no_grad():
        noise = model(x, torch.tensor([0.75 * 199, 3.0]))[:, ::50]
    torch.testing.assert_close(torch.tensor(golden["noise"]), noise, rtol=1e-3, atol=1e-4)
    wav = model.generate(1, length=2000, steps=4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.tensor(golden["audio"]), wav[:, ::50], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [autoregressive, diffusion])
def test_what_can_be_told_is_scored_told(tmp_path, publish, make):
    """Likelihood and noise error are those of clips whose labels the model knows."""
    told = make(conditions=LABELS, condition_counts={"label": [2, 1]})
    torch.nn.init.normal_(told.told.tables[0].weight, std=3.0)
    ended, path = publish(told, "most=9")
    assert ended == 0
    shipped = load_checkpoint(path)
    ds = ClipDataset(tmp_path / "clips.csv", RATE, pcm=make is diffusion, progress=False)
    score_of = family_of(told).task.scores
    unit, untold = next(iter(score_of(shipped, ds).items()))
    ds.tell(LABELS)
    score = score_of(shipped, ds)[unit]
    assert read_metadata(path)[f"valid_{unit}"] == pytest.approx(score, abs=2e-5)
    assert score != pytest.approx(untold, abs=1e-3)
    if make is autoregressive:
        wavs = decode(encode(TONES))
        bits = shipped.nll(wavs, label=["a", "b", "a"]).mean().item() / math.log(2)
        assert score == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize(
    "setting, ended, words",
    [("most=-1", 1, "most=-1"),  # rounding loses more than that
     ("name=sashimi_digits", 2, "no entry named sashimi_digits"),
     ("name=wavenet_sc09", 2, "best.safetensors: a SashimiAR, wavenet_sc09 is a WaveNet"),
     ("checkpoint=nowhere.safetensors", 2, "nowhere.safetensors"),
     ("test_csv=nowhere.csv", 2, "nowhere.csv"), ("nucleus_p=2", 2, "nucleus_p=2")],
)  # fmt: skip
def test_what_is_not_shipped_writes_nothing(setting, ended, words, tmp_path, publish, capsys):
    assert publish(autoregressive(), setting)[0] == ended
    said = capsys.readouterr().err.strip()
    assert words in said and said.startswith("error: ") and "\n" not in said
    assert not (tmp_path / "repository").exists()


def test_the_golden_seed_keeps_its_distance_from_every_edge():
    """Uniforms are no nearer to an edge of their class than processors can disagree about."""
    model = autoregressive()
    golden = BitsTask.golden(model)
    q, uniforms = golden_classes(model, golden["seed"]), golden_uniforms(golden["seed"])
    assert hashlib.sha256(bytes(q[0].tolist())).hexdigest() == golden["sha256"]
    assert margin(model, q, uniforms) >= MARGIN
    logits = model(torch.nn.functional.pad(q[:, :-1], (1, 0), value=128))[0].double()
    cdf = logits.softmax(-1).cumsum(-1)
    torch.testing.assert_close((cdf <= uniforms).sum(-1), q[0])
    uniforms[5] = cdf[5, int(q[0, 5])].detach() - 1e-7
    assert margin(model, q, uniforms) < 1e-6, "it sees an edge that is near"
