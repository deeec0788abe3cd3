"""The weights that travel with the package: what they are, and that the mathematics holds."""

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

import hubconf
import train
from metrics.classifier import load_classifier
from rawaudio import publish
from rawaudio.adversarial import AdversarialTask
from rawaudio.checkpoint import load_checkpoint
from rawaudio.config import to_dict
from rawaudio.files import read_metadata
from rawaudio.golden import golden_classes, golden_input
from rawaudio.hub import WEIGHTS, load_named
from rawaudio.noise import NoiseTask, linear_noise_error, noise_error

FIXTURES = Path(__file__).parent / "fixtures"
DIFFUSION = WEIGHTS / "sashimi_diffwave_digits.safetensors"


@pytest.fixture(scope="module")
def model():
    return load_named("sashimi_ar_digits", device="cpu")


@pytest.mark.parametrize(
    "name, unit",
    [("sashimi_ar", "bits"), ("sashimi_diffwave", "relative"), ("asgan", "fid")],
)
def test_a_file_is_small_and_says_where_it_comes_from(name, unit):
    """Under 16 MiB, with data, licence, step and scores; beside it a card, a picture and the
    script that makes it; the hub's help says how good it is."""
    path = WEIGHTS / f"{name}_digits.safetensors"
    assert path.stat().st_size < 16 * 2**20
    metadata = read_metadata(path)
    assert {
        "data",
        "data_sha256",
        "licence",
        "step",
        "command",
        f"valid_{unit}",
        f"test_{unit}",
    } <= metadata.keys()
    card = path.with_suffix(".md").read_text()
    score = f"{metadata[f'test_{unit}']:.3f}"
    assert score in card and metadata["data_sha256"] in card and path.with_suffix(".webp").exists()
    help = getattr(hubconf, path.stem).__doc__
    assert score in help and "CC BY-SA 4.0" in help and f"sashimi/weights/{path.stem}.md" in help
    subprocess.run(["bash", "-n", path.with_suffix(".sh")], check=True)
    size = f"{sum(p.numel() for p in load_named(path.stem, device='cpu').parameters()):,}"
    assert size in card
    millions = f"{int(size.replace(',', '')) / 1e6:.1f}"
    assert re.search(r"(\d\.\d)M parameters", help)[1] == millions


@pytest.mark.parametrize(
    "name, runs", [("sashimi_ar_digits", 9), ("sashimi_diffwave_digits", 4), ("asgan_digits", 1)]
)
def test_the_scripts_train_what_is_shipped(name, runs):
    """Their commands are understood by train.py, and make a network of the shipped shape."""
    text = (WEIGHTS / f"{name}.sh").read_text().replace("\\\n", " ")
    commands = re.findall(r"^ *python train\.py (.*)$", text, flags=re.MULTILINE)
    assert len(commands) == runs
    shipped = load_named(name, device="cpu").config
    needed = ["train_csv=x", "valid_csv=x", "checkpoint_path=x"]
    shared = re.findall(r"^(\w+)=\((.*?)\)$", text, flags=re.MULTILINE | re.DOTALL)
    for command in commands:
        for array, settings in shared:
            command = command.replace(f'"${{{array}[@]}}"', settings)
        given = [a for a in shlex.split(command) if not a.startswith("${")]
        cfg = train.parse([*given, *needed])
        # chosen afterwards, or collected from the data
        own = {"temperature", "nucleus_p", "guidance", "guided", "conditions", "condition_counts"}
        ours, theirs = (
            {k: v for k, v in to_dict(c).items() if k not in own} for c in (cfg.model, shipped)
        )
        assert ours == theirs and cfg.max_steps
    assert cfg.conditions == list(shipped.conditions), "of the last run"


# ---- the scripts themselves, in small ----------------------------------------------------------


@pytest.fixture(scope="module")
def recordings(model, tmp_path_factory):
    """A folder like the Free Spoken Digit Dataset's, and its splits beside it: 60 clips of two
    speakers, which the shipped weights say, so that they know what they hear."""
    folder = tmp_path_factory.mktemp("fsdd")
    (folder / "recordings").mkdir()
    lines = []
    for i, wav in enumerate(model.generate(60, length=800)):
        name = f"{i % 10}_{'ab'[i % 2]}_{i // 10}.wav"
        soundfile.write(folder / "recordings" / name, wav[: 500 + 5 * i].numpy(), 8000)
        words = "zero one two three four five six seven eight nine".split()
        lines.append(f"{name},{words[i % 10]},{'ab'[i % 2]}")
    for name, rows in (("train", lines), ("valid", lines[:10]), ("test", lines[10:20])):
        text = "\n".join(["path,label,speaker", *rows]) + "\n"
        (folder / f"fsdd-{name}.csv").write_text(text)
    return folder


def run_script(name, recordings, out, *more, **environment):
    """The script from its first line to its last, with few clips; nothing shipped is written."""
    caches = os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions")
    environment = {"OUT": out / "out", "SPLITS": recordings, "CLIPS": 60, "HOME": out,
                   "TORCH_EXTENSIONS_DIR": caches,
                   "OMP_NUM_THREADS": 1} | environment  # fmt: skip
    # `python` is the one that runs the tests, whether its environment is active or not
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", WEIGHTS / f"{name}.sh", recordings / "recordings", out / "run", *more],
        env=os.environ | {k: str(v) for k, v in environment.items()},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shipped = out / "out" / "sashimi" / "weights" / f"{name}.safetensors"
    assert (out / "run" / "clips" / "scores.json").exists()
    assert (out / "out" / "docs" / "listen.html").exists()
    assert (out / "out" / "tests" / "fixtures" / f"golden-{name}.json").exists()
    return load_checkpoint(shipped), read_metadata(shipped)


def digests():
    """Of everything that publishing writes in the repository."""
    root = WEIGHTS.parent.parent
    paths = [*WEIGHTS.iterdir(), root / "docs" / "listen.html", *FIXTURES.glob("golden-*")]
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.is_file()}


SMALL = ["device=cpu", "max_steps=2", "model.clip_length=400", "n_listen=0", "batch_size=2",
         "seq_len=400", "compile=false"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more", "environment", "step"),
    [
        (
            "sashimi_ar_digits",
            ["model.d_model=8", "model.n_layers=1", "model.d_state=8"],
            {"GUIDANCES": "1.0 2.0"},
            18,
        ),
        (
            "sashimi_diffwave_digits",
            [],
            {"FROM": DIFFUSION, "GUIDANCES": "1.0 2.0"},
            read_metadata(DIFFUSION)["step"] + 2,
        ),
    ],
    ids=["anew", "on from the shipped ones"],
)
def test_a_script_runs_to_its_end(recordings, tmp_path, name, more, environment, step):
    """Training, the choice of sampling, publishing and scoring; also where the advertised command
    goes on from the shipped weights. The shipped files stay as they are."""
    before = digests()
    model, metadata = run_script(name, recordings, tmp_path, *SMALL, *more, **environment)
    assert digests() == before
    assert metadata["step"] == step and model.config.clip_length == 400
    assert (tmp_path / f"out/sashimi/weights/{name}-sampling.webp").exists()
    if name == "sashimi_ar_digits":
        assert (model.config.temperature, model.config.nucleus_p) == (0.95, 1.0)
        assert model.config.guided == ["label"] and model.config.guidance == 3.0
    else:  # two steps away from where it began
        there, here = load_checkpoint(DIFFUSION).state_dict(), model.state_dict()
        # of conditions there are as many embeddings as values in these recordings
        there = {k: v for k, v in there.items() if not k.startswith("told.")}
        far = [(here[k] - v).abs().max() for k, v in there.items()]
        assert 0 < max(far) < 0.1


# ---- what is shipped --------------------------------------------------------------------------


def test_shipped_weights_give_what_they_gave(model):
    """The logits, and to the class what the plain loop generates from a fixed generator."""
    golden = json.loads((FIXTURES / "golden-sashimi_ar_digits.json").read_text())
    with torch.no_grad():
        logits = model(golden_input())[0, 99::100]
    torch.testing.assert_close(logits, torch.tensor(golden["logits"]), atol=1e-4, rtol=0)
    q = golden_classes(model, golden["seed"])
    assert publish.sha256(q.to(torch.uint8)) == golden["sha256"]


@pytest.mark.parametrize("tier", range(3))
def test_convolution_is_recurrence_with_trained_weights(model, tier):
    """The first S4 layer of each tier: 16,000 steps in float32 stay within 1e-4 of the scale."""
    block = (model.backbone.center if tier == 2 else model.backbone.up[tier])[0]
    layer = block.layer
    u = torch.randn(1, 16000, layer.d_model, generator=torch.Generator().manual_seed(0))
    a, p, q, b, c = layer.setup_rnn()
    state, steps = layer.default_state(1), []
    with torch.no_grad():
        y = layer.convolve(u.transpose(1, 2))[0].T
        for x in u[0]:  # `step` without its projection
            s = 2 * (q * state).real.sum(-1, keepdim=True)
            state = a * state - p * s + b * x[:, None]
            steps.append(2 * (c * state).real.sum(-1)[0] + layer.D * x)
    error = (torch.stack(steps) - y).abs().max()
    assert error <= 1e-4 * max(1.0, y.abs().max())


def test_it_speaks_and_knows_what_it_said(model):
    """Sound in range, neither silence nor full scale, far likelier than noise, which is uniform
    over the classes; the log-likelihood is -nll of the audio, told the same."""
    generator = torch.Generator().manual_seed(0)
    told = model.draw_conditions(16, generator)
    wavs, ll = model.generate(16, generator=generator, return_log_likelihood=True, **told)
    assert wavs.shape == (16, 8000) and model.sample_rate == 8000
    level = wavs.square().mean().sqrt()
    assert wavs.abs().max() <= 1 and 1e-3 < level < 0.5
    torch.testing.assert_close(ll, -model.nll(wavs, **told), atol=1e-4, rtol=0)
    noise = torch.rand(2, 8000, generator=generator) * 2 - 1
    assert (-ll / math.log(2) < 5).all() and (model.nll(noise) / math.log(2) > 8).all()


# ---- the adversarial one ------------------------------------------------------------------------


def test_shipped_adversarial_weights_give_what_they_gave():
    """The features and the audio of fixed latents; and four clips are four of what was told."""
    model = load_named("asgan_digits", device="cpu")
    golden = json.loads((FIXTURES / "golden-asgan_digits.json").read_text())
    again = AdversarialTask.golden(model)
    assert again.keys() == golden.keys()
    for name, value in golden.items():
        torch.testing.assert_close(
            torch.tensor(again[name]), torch.tensor(value), atol=0.02, rtol=0
        )
    words = ["zero", "three", "seven", "nine"]
    wavs = model.generate(4, label=words, generator=torch.Generator().manual_seed(0))
    assert wavs.shape == (4, 5120) and model.sample_rate == 8000 and wavs.abs().max() <= 1
    classifier = load_classifier()
    logits, _ = classifier(wavs)
    assert [classifier.labels[i] for i in logits.argmax(1)] == words


# ---- diffusion --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusion():
    return load_named("sashimi_diffwave_digits", device="cpu")


def test_shipped_diffusion_weights_give_what_they_gave(diffusion):
    """The noise in a fixed input, and the audio of a fixed generator."""
    golden = json.loads((FIXTURES / "golden-sashimi_diffwave_digits.json").read_text())
    found = NoiseTask.golden(diffusion)
    for name, atol in (("noise", 1e-4), ("told", 1e-4), ("audio", 1e-3)):
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(golden[name]), atol=atol, rtol=0
        )


def test_diffusion_hears_sound_in_noise(diffusion):
    """A vowel-like buzz, then silence: far better than scaling the input, at every noise level."""
    seconds = torch.arange(6000) / 8000
    buzz = sum((2 * math.pi * 120 * k * seconds).sin() / k for k in range(1, 8)) * 0.2
    wav = (buzz * (seconds < 0.4)).expand(8, -1)
    error = noise_error(diffusion, wav, torch.Generator().manual_seed(0)).item()
    linear = linear_noise_error(diffusion.alpha_bar, wav.square().mean().item())
    assert error < 0.6 * linear


def test_diffusion_speaks_at_any_number_of_steps(diffusion):
    """Sound in range, louder at the start of the clip than in its last tenth, where words ended."""
    wavs = diffusion.unconditional_generate(4, steps=8, generator=torch.Generator().manual_seed(0))
    assert wavs.shape == (4, 6000) and diffusion.sample_rate == 8000 and wavs.abs().max() <= 1
    start, end = wavs[:, :3000].square().mean().sqrt(), wavs[:, -600:].square().mean().sqrt()
    assert 0.02 < start < 0.5 and end < start / 2


def test_diffusion_finds_the_latent_of_its_own_clip(diffusion):
    """Inversion and generation close the loop; in between the audio is another."""
    z = torch.randn(1, 6000, generator=torch.Generator().manual_seed(0))
    wav = diffusion.generate_from_latent(z, steps=30)
    back = diffusion.invert(wav, steps=30)
    again = diffusion.generate_from_latent(back, steps=30)
    assert (again - wav).square().mean() < 0.01 * wav.square().mean()
