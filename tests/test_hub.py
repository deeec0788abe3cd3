"""torch.hub: three lines give a model, from a folder or from GitHub, with or without a network."""

import hashlib
import re
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from models import make

from rawaudio import hub
from rawaudio.checkpoint import load_checkpoint, save_checkpoint
from rawaudio.errors import CheckpointError
from rawaudio.families import ENTRIES
from rawaudio.hub import load_asked, load_named
from sashimi.autoregressive import SashimiAR
from sashimi.diffwave import DiffusionConfig, SashimiDiffWave

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED = Path(__file__).parent / "fixtures" / "published_ar.pt"
BACKBONE = PUBLISHED.with_name("state_spaces_ar.pt")  # which cannot generate
SC09 = {  # entry -> its module, parameters, and words of the error without network or weights
    "sashimi_ar_sc09": ("SashimiAR", 4_764_160, "ckpt_01100000.*unreachable.*sashimi_ar_digits"),
    "sashimi_diffwave_sc09": ("SashimiDiffWave", 23_476_225, "train.py model=diffwave .*_digits"),
    "wavenet_sc09": ("WaveNet", 4_244_480, "sashimi-release/resolve/main/checkpoints/wavenet_sc09"),
    "samplernn_sc09": ("SampleRNN", 35_034_624, "checkpoints/samplernn_sc09.pt"),
    "diffwave_sc09": ("DiffWave", 24_071_681, "checkpoint/1000000.pkl"),
    "wavegan_sc09": ("WaveGAN", 19_065_345, "train.py model=wavegan"),
}  # fmt: skip
DIGITS = ["sashimi_ar_digits", "sashimi_diffwave_digits", "asgan_digits"]


def load(name, **kwargs):
    return torch.hub.load(
        str(REPOSITORY), name, source="local", trust_repo=True, **{"device": "cpu"} | kwargs
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of torch.hub, and no network."""
    refusing = Mock(side_effect=urllib.error.URLError("network is unreachable"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refusing)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def cloned(cache):
    """The name under which torch.hub finds this folder as if it had come from GitHub."""
    cache.parent.mkdir(parents=True)
    (cache.parent / "someone_simple-sashimi_main").symlink_to(REPOSITORY)
    return "someone/simple-sashimi:main"


@pytest.fixture
def diffusion_file(tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", make("diffwave"))
    return tmp_path / "model.safetensors"


def serve(file, monkeypatch):
    """What every URL holds from now on; returns the list of (url asked for, progress shown)."""

    def download(url, path, hash_prefix=None, progress=True):
        asked.append((url, progress))
        shutil.copy(file, path)

    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return asked


def test_the_hub_lists_the_models_and_nothing_else(cloned):
    names = torch.hub.list(cloned, skip_validation=True, trust_repo=True)
    assert set(names) == {*SC09, *DIGITS, "asgan_hubert_sc09_6"} == ENTRIES.keys()


@pytest.mark.parametrize("name", ENTRIES)
def test_help_says_what_one_has_to_know(name, cloned):
    """Shape, range, sample rate, licence, every argument, and an example that names the entry."""
    text = torch.hub.help(cloned, name, skip_validation=True, trust_repo=True)
    for word in ("kHz", "(4, ", "[-1, 1]", f'"{name}"', "trust_repo=True"):
        assert word in text, word
    assert "licence" in text or "CC BY" in text
    for argument in ("pretrained", "progress", "device", "checkpoint"):
        assert f"{argument}: " in text


@pytest.mark.parametrize("name", SC09)
def test_models_of_sc09_come_fresh_or_say_what_to_do(name, cache, monkeypatch, diffusion_file):
    """In one line; a file of another family is told by name, and one that is not the published one
    is refused where that is known."""
    kind, numbers, words = SC09[name]
    model = load(name, pretrained=False)
    assert type(model).__name__ == kind and not model.training
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert (model.sample_rate, model.config.clip_length) == (16000, 16000)
    with pytest.raises((ConnectionError, CheckpointError), match=words) as raised:
        load(name)
    assert "\n" not in str(raised.value) and "checkpoint=" in str(raised.value)
    assert not cache.exists() or not list(cache.iterdir())
    other = diffusion_file if kind == "SashimiAR" else PUBLISHED
    with pytest.raises(CheckpointError, match=f"a Sashimi.*, {name} is a {kind}"):
        load(name, checkpoint=other)
    if name == "diffwave_sc09":
        serve(PUBLISHED, monkeypatch)
        with pytest.raises(CheckpointError, match="SHA-256"):
            load(name)


@pytest.mark.parametrize(
    ("name", "given", "error", "words"),
    [("sashimi_ar_sc09", {"device": "cuda:99"}, ValueError, "device=cuda:99"),
     ("sashimi_ar_sc09", {"device": "x", "checkpoint": PUBLISHED}, ValueError, "device=x"),
     ("sashimi_ar_sc09", {"checkpoint": BACKBONE}, CheckpointError, str(BACKBONE)),
     ("sashimi_ar_digits", {"checkpoint": "none.pt"}, CheckpointError, "none.pt"),
     ("sashimi_diffwave_sc09", {"pretrained": False, "config": "smal"}, ValueError,
      "no configuration named smal, did you mean small")],
)  # fmt: skip
def test_what_cannot_be_loaded_is_one_line(name, given, error, words):
    with pytest.raises(error, match=words) as raised:
        load(name, **given)
    assert "\n" not in str(raised.value)


def test_asgan_speaks_with_its_vocoder(tmp_path):
    """Random weights of both at full size; without a network both files can be given."""
    model = load("asgan_hubert_sc09_6", pretrained=False)
    audio = model.unconditional_generate(1)
    assert audio.shape == (1, 16000) and not audio.requires_grad
    assert not audio[:, :320].any() and audio[:, 320:].any()
    assert (model.z_dim, model.w_dim) == (512, 512)
    recorded = torch.load(PUBLISHED.with_name("asgan.pt"), weights_only=True)
    torch.save(recorded["checkpoint"]["checkpoint"], tmp_path / "slim.pt")
    for given, words in (
        ({}, "00520000_slim.pt.*checkpoint=PATH"),
        ({"checkpoint": tmp_path / "slim.pt"}, "g_02365000_.*vocoder=PATH"),
    ):
        with pytest.raises(ConnectionError, match=words):
            load("asgan_hubert_sc09_6", **given)
    save_checkpoint(tmp_path / "mel.safetensors", make("asgan"))
    own = load("asgan_hubert_sc09_6", checkpoint=tmp_path / "mel.safetensors")
    assert own.vocoder is None and own.generate(1).shape == (1, 40), "by Griffin-Lim"


def test_the_hub_works_from_anywhere(cloned, tmp_path):
    """From its cache, in a fresh interpreter, in another folder, as the README's lines stand
    there."""
    code = (
        f"import torch; model = torch.hub.load({cloned!r}, 'sashimi_ar_sc09', trust_repo=True,"
        f"skip_validation=True, checkpoint={str(PUBLISHED)!r}, device='cpu');"
        "print(tuple(model.generate(2, length=5).shape))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 5)"


def test_the_published_weights_are_downloaded_once(cache, monkeypatch):
    asked = serve(PUBLISHED, monkeypatch)
    a = load("sashimi_ar_sc09", progress=False)
    b = load("sashimi_ar_sc09")
    url = "https://github.com/RF5/simple-sashimi/releases/download/v1.0/ckpt_01100000.pt"
    assert asked == [(url, False)] and (cache / "ckpt_01100000.pt").exists()
    assert torch.equal(a.head.weight, load_checkpoint(PUBLISHED).head.weight)
    assert torch.equal(a.head.weight, b.head.weight) and not a.training
    (cache / "ckpt_01100000.pt").write_bytes(PUBLISHED.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="ckpt_01100000.pt.*delete it to download it again"):
        load("sashimi_ar_sc09")


@pytest.mark.parametrize("name", ["sashimi_ar_digits", "sashimi_ar_sc09"])
def test_a_file_that_is_there_needs_no_network(name):
    for path in (str(PUBLISHED), PUBLISHED):
        model = load(name, checkpoint=path)
        assert isinstance(model, SashimiAR) and not model.training
        assert torch.equal(model.head.weight, load_checkpoint(PUBLISHED).head.weight)


def test_fresh_diffusion_models_come_in_sizes():
    model = load("sashimi_diffwave_sc09", pretrained=False, config="small_unidirectional")
    assert isinstance(model, SashimiDiffWave) and not model.training
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.49e6, rel=1e-3)
    with pytest.raises(ValueError, match="config=DiffusionConfig: sashimi_ar_sc09 takes a Autoreg"):
        load_named("sashimi_ar_sc09", pretrained=False, config=DiffusionConfig())


def test_downloads_are_checked(cache, diffusion_file, monkeypatch, caplog):
    """Once from each place, also where names are the same. By #sha256= or by the table; another
    file is refused and not kept. Where no digest is known, the file's own is told, once."""
    asked = serve(diffusion_file, monkeypatch)
    digest = hashlib.sha256(diffusion_file.read_bytes()).hexdigest()
    url, other = "https://a.example/model.safetensors?x=1", "https://b.example/model.safetensors"
    wanted = load_checkpoint(diffusion_file).input.weight
    for checkpoint in (url, other, url, f"{url}#sha256={digest.upper()}"):
        model = load("sashimi_diffwave_sc09", checkpoint=checkpoint)
        assert torch.equal(model.input.weight, wanted)
    assert [url for url, _ in asked] == [url, other]
    assert [digest in message for message in caplog.messages] == [True, True]
    with pytest.raises(CheckpointError, match=f"{re.escape(url)}.*SHA-256 {digest}, not 0000"):
        load_asked(None, f"{url}#sha256={'0' * 64}", "cpu")
    monkeypatch.setitem(hub.DIGESTS, other, "1" * 64)
    with pytest.raises(CheckpointError, match=f"{other}.*not 1111"):
        load_asked(None, other, "cpu")
    assert not list(cache.iterdir())
    monkeypatch.setitem(hub.DIGESTS, other, digest)
    load_asked(None, other, "cpu")
    assert len(asked) == 3 and len(caplog.messages) == 2


def test_the_digits_need_no_network_and_come_fresh_too():
    """The weights travel with the code; what is fresh has their settings, and none of them."""
    digits, fresh = (load("sashimi_ar_digits", pretrained=given) for given in (True, False))
    assert isinstance(digits, SashimiAR) and not digits.training and digits.sample_rate == 8000
    assert fresh.config == digits.config
    wavs = digits.generate(2, 400, generator=torch.Generator().manual_seed(0))
    assert digits.nll(wavs).mean() < 3.5 and fresh.nll(wavs).mean() > 4.9  # nats: 5 and 7 bits
