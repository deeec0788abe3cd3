"""torch.hub: three lines give a model, from a folder or from GitHub, with or without a network."""

import hashlib
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch

from rawaudio import hub, likelihood
from rawaudio.checkpoint import load_checkpoint, save_checkpoint
from rawaudio.errors import CheckpointError
from rawaudio.hub import load_asked, load_named
from sashimi.autoregressive import SashimiAR
from sashimi.diffwave import DiffusionConfig, SashimiDiffWave

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED = Path(__file__).parent / "fixtures" / "published_ar.pt"
AR = ["sashimi_ar_digits", "sashimi_ar_sc09"]
DIFFUSION = ["sashimi_diffwave_digits", "sashimi_diffwave_sc09"]
ADVERSARIAL = ["asgan_digits", "asgan_hubert_sc09_6"]
BASELINES = {  # entry -> its module, parameters, and words of the error without network or weights
    "wavenet_sc09": ("WaveNet", 4_244_480, "sashimi-release/resolve/main/checkpoints/wavenet_sc09"),
    "samplernn_sc09": ("SampleRNN", 35_034_624, "checkpoints/samplernn_sc09.pt"),
    "diffwave_sc09": ("DiffWave", 24_071_681, "checkpoint/1000000.pkl"),
    "wavegan_sc09": ("WaveGAN", 19_065_345, "train.py model=wavegan"),
}
ENTRIES = [*AR, *DIFFUSION, *ADVERSARIAL, *BASELINES]


def load(name, **kwargs):
    return torch.hub.load(
        str(REPOSITORY), name, source="local", trust_repo=True, **{"device": "cpu"} | kwargs
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of torch.hub, and no network."""

    def refuse(url, *args, **kwargs):
        raise urllib.error.URLError("network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def cloned(cache):
    """The name under which torch.hub finds this folder as if it had come from GitHub."""
    cache.parent.mkdir(parents=True)
    (cache.parent / "someone_simple-sashimi_main").symlink_to(REPOSITORY)
    return "someone/simple-sashimi:main"


@pytest.fixture
def diffusion_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, SashimiDiffWave(DiffusionConfig(d_model=8, n_layers=1, l_max=64)))
    return path


@pytest.fixture
def network(monkeypatch):
    """serve(file): from now on it is what every URL holds; returns the list of what is asked for:
    (url, whether progress is shown)."""

    def serve(file):
        asked = []

        def download(url, path, hash_prefix=None, progress=True):
            asked.append((url, progress))
            shutil.copy(file, path)

        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        return asked

    return serve


# ---- the entry points -------------------------------------------------------------------------


def test_the_hub_lists_the_models_and_nothing_else(cloned):
    names = torch.hub.list(cloned, skip_validation=True, trust_repo=True)
    assert set(names) == set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_help_says_what_one_has_to_know(name, cloned):
    """Shape, range, sample rate, licence, every argument, and an example that names the entry."""
    text = torch.hub.help(cloned, name, skip_validation=True, trust_repo=True)
    for word in ("kHz", "(4, ", "[-1, 1]", f'"{name}"', "trust_repo=True"):
        assert word in text, word
    assert "licence" in text or "CC BY" in text
    for argument in ("pretrained", "progress", "device", "checkpoint"):
        assert f"{argument}: " in text


@pytest.mark.parametrize("name", BASELINES)
def test_the_baselines_are_entries_like_the_others(name, cache, network, tmp_path):
    """Fresh at the published size; without weights one line says what to do; a file of another
    family is told by name, and one that is not the published one is refused where that is known."""
    kind, numbers, words = BASELINES[name]
    model = load(name, pretrained=False)
    assert type(model).__name__ == kind and not model.training
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert (model.sample_rate, model.config.clip_length) == (16000, 16000)
    with pytest.raises((ConnectionError, CheckpointError), match=words) as raised:
        load(name)
    assert "\n" not in str(raised.value) and "checkpoint=" in str(raised.value)
    with pytest.raises(CheckpointError, match=f"a SashimiAR, {name} is a {kind}"):
        load(name, checkpoint=PUBLISHED)
    if name == "diffwave_sc09":
        network(PUBLISHED)
        with pytest.raises(CheckpointError, match="SHA-256"):
            load(name)


def test_asgan_speaks_with_its_vocoder(tmp_path):
    """Random weights of both at full size; without a network both files can be given."""
    model = load("asgan_hubert_sc09_6", pretrained=False)
    audio = model.unconditional_generate(1)
    assert audio.shape == (1, 16000) and not audio.requires_grad
    assert not audio[:, :320].any() and audio[:, 320:].any()
    assert (model.z_dim, model.w_dim) == (512, 512)
    with pytest.raises(ConnectionError, match="00520000_slim.pt.*checkpoint=PATH"):
        load("asgan_hubert_sc09_6")
    recorded = torch.load(PUBLISHED.with_name("asgan.pt"), weights_only=True)
    torch.save(recorded["checkpoint"]["checkpoint"], tmp_path / "slim.pt")
    with pytest.raises(ConnectionError, match="g_02365000_package.pth.*vocoder=PATH"):
        load("asgan_hubert_sc09_6", checkpoint=tmp_path / "slim.pt")


def test_a_clone_in_the_hubs_cache_works(cloned):
    """As `torch.hub.load("OWNER/simple-sashimi", ...)` does after its download."""
    model = torch.hub.load(
        cloned, "sashimi_ar_sc09", trust_repo=True, skip_validation=True, checkpoint=PUBLISHED
    )
    assert isinstance(model, SashimiAR)
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_hub_works_from_anywhere(tmp_path):
    """In a fresh interpreter, in another folder, as the README's three lines stand there."""
    code = (
        "import torch\n"
        f"model = torch.hub.load({str(REPOSITORY)!r}, 'sashimi_ar_sc09', source='local',\n"
        f"    trust_repo=True, checkpoint={str(PUBLISHED)!r}, device='cpu')\n"
        "print(tuple(model.generate(2, length=5).shape))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 5)"


# ---- the published SC09 model -----------------------------------------------------------------


def test_the_sc09_model_is_the_published_one():
    """4,765,312 published parameters are 4,764,160 once weight normalisation is multiplied out:
    one gain for each output of the four pooling projections. 16 kHz, (N, 16000). No download."""
    model = load("sashimi_ar_sc09", pretrained=False)
    assert isinstance(model, SashimiAR) and not model.training
    gains = sum(p.out_features for p in [*model.backbone.down_pool, *model.backbone.up_pool])
    n = sum(p.numel() for p in model.parameters())
    assert n == 4_764_160 and n + gains == 4_765_312
    assert model.sample_rate == 16000 and model.config.clip_length == 16000
    wavs = model.generate(2, length=20)
    assert wavs.shape == (2, 20) and wavs.abs().max() <= 1


def test_without_a_network_the_error_names_the_way_out(cache):
    """One ConnectionError, one line: what failed, checkpoint=, the entry that needs no network.
    Nothing half-written stays in the cache."""
    with pytest.raises(ConnectionError) as raised:
        load("sashimi_ar_sc09")
    message = str(raised.value)
    assert "sashimi_ar_digits" in message and "checkpoint=" in message and "\n" not in message
    assert "unreachable" in message and "ckpt_01100000.pt" in message
    assert not cache.exists() or not list(cache.iterdir())


def test_the_published_weights_are_downloaded_once(cache, network):
    """Into torch.hub's cache, from there the second time; `progress` is passed on."""
    asked = network(PUBLISHED)
    a = load("sashimi_ar_sc09", progress=False)
    b = load("sashimi_ar_sc09")
    url = "https://github.com/RF5/simple-sashimi/releases/download/v1.0/ckpt_01100000.pt"
    assert asked == [(url, False)] and (cache / "ckpt_01100000.pt").exists()
    assert torch.equal(a.head.weight, load_checkpoint(PUBLISHED).head.weight)
    assert torch.equal(a.head.weight, b.head.weight) and not a.training
    (cache / "ckpt_01100000.pt").write_bytes(PUBLISHED.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="ckpt_01100000.pt.*delete it to download it again"):
        load("sashimi_ar_sc09")


@pytest.mark.parametrize("name", AR)
def test_a_file_that_is_there_needs_no_network(name, tmp_path):
    """checkpoint=PATH, text or Path, gives the model of that file from either entry; a backbone,
    which cannot generate, and a file that is not there are named."""
    for path in (str(PUBLISHED), PUBLISHED):
        model = load(name, checkpoint=path)
        assert isinstance(model, SashimiAR) and not model.training
        assert torch.equal(model.head.weight, load_checkpoint(PUBLISHED).head.weight)
    for path in (PUBLISHED.with_name("state_spaces_ar.pt"), tmp_path / "none.pt"):
        with pytest.raises(CheckpointError, match=str(path)):
            load(name, checkpoint=path)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
@pytest.mark.parametrize("more", [{"checkpoint": PUBLISHED}, {}])
def test_a_device_that_is_not_there_is_one_error(device, more):
    """One line that names it, before anything is downloaded."""
    with pytest.raises(ValueError, match=f"device={device}") as raised:
        load("sashimi_ar_sc09", device=device, **more)
    assert "\n" not in str(raised.value)


# ---- diffusion --------------------------------------------------------------------------------


def test_without_weights_the_diffusion_model_says_what_to_do(cache):
    """In one line: train them, give them, take random ones, or take the digits."""
    with pytest.raises(CheckpointError) as raised:
        load("sashimi_diffwave_sc09")
    said = str(raised.value)
    for words in ("train.py model=diffwave", "checkpoint=", "pretrained=False",
                  "sashimi_diffwave_digits"):  # fmt: skip
        assert words in said
    assert "\n" not in said


@pytest.mark.parametrize("size, millions", [("small", 7.74), ("small_unidirectional", 7.49)])
def test_fresh_diffusion_models_come_in_sizes(size, millions):
    model = load("sashimi_diffwave_sc09", pretrained=False, config=size)
    assert isinstance(model, SashimiDiffWave) and not model.training
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.005) and model.sample_rate == 16000


def test_sizes_and_settings_of_other_models_are_refused():
    with pytest.raises(ValueError, match="no configuration named smal, did you mean small"):
        load("sashimi_diffwave_sc09", pretrained=False, config="smal")
    with pytest.raises(ValueError, match="config=DiffusionConfig: sashimi_ar_sc09 takes a Autoreg"):
        load_named("sashimi_ar_sc09", pretrained=False, config=DiffusionConfig())


def test_weights_come_from_urls_too(network, diffusion_file):
    """Downloaded once; two files of the same name at different places are two files. Commands take
    them as well."""
    asked = network(diffusion_file)
    wanted = load("sashimi_diffwave_sc09", checkpoint=diffusion_file).input.weight
    urls = [f"https://{host}.example/model.safetensors?download=true" for host in "aba"]
    for url in urls:
        model = load("sashimi_diffwave_sc09", checkpoint=url)
        assert torch.equal(model.input.weight, wanted)
        assert torch.equal(load_asked("sashimi_ar_digits", url, "cpu").input.weight, wanted)
    assert [url for url, _ in asked] == urls[:2]


def test_downloads_are_checked_where_a_digest_is_known(
    cache, diffusion_file, network, monkeypatch, caplog
):
    """By #sha256= or by the table; another file is refused and not kept. Where none is known, the
    file's own is told, once."""
    digest, asked = hashlib.sha256(diffusion_file.read_bytes()).hexdigest(), network(diffusion_file)
    url, other = "https://a.example/model.safetensors", "https://b.example/model.safetensors"

    def get(url):
        return load("sashimi_diffwave_sc09", checkpoint=url)

    get(url), get(url)
    assert len(caplog.messages) == 1 and digest in caplog.messages[0]
    get(f"{url}#sha256={digest.upper()}")
    assert [url for url, _ in asked] == [url]
    with pytest.raises(CheckpointError, match=f"{url}.*SHA-256 {digest}, not 0000"):
        get(f"{url}#sha256={'0' * 64}")
    assert not list(cache.iterdir())
    monkeypatch.setitem(hub.DIGESTS, other, "1" * 64)
    with pytest.raises(CheckpointError, match=f"{other}.*not 1111"):
        get(other)
    monkeypatch.setitem(hub.DIGESTS, other, digest)
    get(other)
    assert [url for url, _ in asked] == [url, other, other] and len(caplog.messages) == 1


def test_a_model_of_another_kind_is_refused(diffusion_file, capsys):
    """By the other kind's entry, and by commands that ask for a likelihood."""
    with pytest.raises(CheckpointError, match="SashimiDiffWave, sashimi_ar_sc09 is a SashimiAR"):
        load("sashimi_ar_sc09", checkpoint=diffusion_file)
    given = ["model=sashimi_diffwave_sc09", f"checkpoint={diffusion_file}", "csv=x"]
    assert likelihood.main(given) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "autoregressive" in said


def test_the_digits_need_no_network_and_come_fresh_too():
    """The weights travel with the code; what is fresh has their settings, and none of them."""
    digits, fresh = (load("sashimi_ar_digits", pretrained=given) for given in (True, False))
    assert isinstance(digits, SashimiAR) and not digits.training and digits.sample_rate == 8000
    assert fresh.config == digits.config
    wavs = digits.generate(2, 400, generator=torch.Generator().manual_seed(0))
    assert digits.nll(wavs).mean() < 3.5 and fresh.nll(wavs).mean() > 4.9  # nats: 5 and 7 bits
