"""Features of HuBERT: padding, layers, files beside the clips, and training with them."""

import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from clips import split_of
from training import metrics, refused, tone

import train
from rawaudio import hubert
from rawaudio.data import Clip
from rawaudio.errors import UserError

LENGTHS = {16000: 50, 15360: 48, 15361: 48, 15999: 49, 320: 1}  # samples -> frames


class Network(torch.nn.Module):
    """Counts as HuBERT does, with 400 samples for a frame; layer i gives i everywhere."""

    def layers(self, wav):
        assert wav.shape[1] % 320 == 0
        self.heard = wav
        frames = (wav.shape[1] - 400) // 320 + 1
        return [torch.full((len(wav), frames, 768), float(i)) for i in range(1, 13)]

    def extract_features(self, wav, num_layers):
        return self.layers(wav)[:num_layers], None

    def forward(self, wav, output_hidden_states):  # of transformers, which begin with the input
        assert output_hidden_states
        layers = self.layers(wav)
        return SimpleNamespace(hidden_states=[layers[0] * 0, *layers])


@pytest.fixture
def installed(monkeypatch):
    """installed("torchaudio"): from now on that is, and no other; returns the network."""

    def install(name):
        net = Network()
        pipelines = SimpleNamespace(HUBERT_BASE=SimpleNamespace(get_model=lambda: net))
        found = SimpleNamespace(HubertModel=SimpleNamespace(from_pretrained=lambda name: net))
        audio = SimpleNamespace(pipelines=pipelines) if name == "torchaudio" else None
        monkeypatch.setitem(sys.modules, "torchaudio", audio)
        monkeypatch.setitem(sys.modules, "torchaudio.pipelines", audio and pipelines)
        monkeypatch.setitem(sys.modules, "transformers", found if name == "transformers" else None)
        hubert._network.cache_clear()
        return net

    yield install
    hubert._network.cache_clear()


@pytest.mark.parametrize("name", ["torchaudio", "transformers"])
def test_features_are_of_the_sixth_layer_and_zeros_follow_the_audio(name, installed):
    net = installed(name)
    hear = hubert.hubert_base("cpu")
    for samples, frames in LENGTHS.items():
        x = hear(torch.ones(2, samples))
        assert x.shape == (2, 768, frames) and bool((x == 6).all())
        assert net.heard[:, :samples].all() and not net.heard[:, samples:].any()


@pytest.mark.parametrize("name", ["torchaudio", "transformers"])
def test_without_a_network_one_line_says_what_to_do(name, installed, monkeypatch):
    net = installed(name)
    monkeypatch.setattr(net, "to", Mock(side_effect=OSError("no\nroute")))
    with pytest.raises(ConnectionError, match=r"no\\nroute.*features beside the clips"):
        hubert.hubert_base("cpu")


def test_files_beside_clips_are_read_from_where_a_crop_begins(tmp_path):
    x = np.arange(20.0, dtype=np.float32).reshape(10, 2)
    path = tmp_path / "a.npy"
    np.save(path, x)
    clip, part = Clip(tmp_path / "a.wav"), Clip(tmp_path / "a.wav", start=0.5)
    for of, begin, frames, wanted in (
        (clip, 0, 3, x[:3]),
        (clip, 25, 3, x[2:5]),
        (part, 10, 2, x[6:8]),
        (clip, 80, 4, [*x[8:], [0, 0], [0, 0]]),
        (clip, 200, 1, [[0, 0]]),
    ):
        found = hubert.read_features(of, 100, 10, begin, 2, frames)
        assert np.array_equal(found.T, wanted), (begin, frames)
    for content in (x[0], x[:, :, None], x + np.nan, np.array(["a"]), x[0, 0], b"", b"no array"):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
        with pytest.raises(UserError, match="a.npy: expected numbers"):
            hubert.read_features(clip, 100, 10, 0, 2, 3)
    with pytest.raises(UserError, match="b.wav: no features beside it"):
        hubert.read_features(Clip(tmp_path / "b.wav"), 100, 10, 0, 2, 3)


SIZE = ["latent_dim=8", "w_dim=6", "fourier_channels=8", "channels=[8,6]", "frames=[4,8]",
        "critical_layers=1", "critic_channels=8", "critic_blocks=[2,2]", "clip_length=3200",
        "augment=0.2"]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """Six tones; train.csv, valid.csv."""
    tones = {f"{i}.wav": tone(3200, 300 + 90 * i, 16000) for i in range(6)}
    split_of(tmp_path, tones, 16000, "valid.csv")
    split_of(tmp_path, dict(list(tones.items())[:4]), 16000, "train.csv")
    return tmp_path


def arguments(data, *more):
    return [f"train_csv={data / 'train.csv'}", f"valid_csv={data / 'valid.csv'}",
            f"checkpoint_path={data / 'run'}", "device=cpu", "model=asgan", "features=hubert",
            "batch_size=4", "max_steps=7", "summary_interval=1", "validation_interval=7",
            *(f"model.{setting}" for setting in SIZE), *more]  # fmt: skip


def test_a_run_on_features_needs_no_vocoder(data, installed):
    """`features=hubert` brings HuBERT's sizes. The frames themselves are compared in validation,
    and the log has the probability of augmentation."""
    installed("torchaudio")
    train.main(arguments(data))
    assert metrics(data / "run", "valid_fid")[0][0] == 7
    ps = [p for _, p in metrics(data / "run", "augment")]
    assert ps[:5] == [0.2] * 5 and ps[5] != 0.2 and len(ps) == 7


def test_a_run_on_files_needs_no_network(data, installed, capsys):
    installed(None)
    refused(capsys, arguments(data), "pip install torchaudio, or transformers")
    for i in range(6):
        np.save(data / f"{i}.npy", np.random.default_rng(i).normal(size=(10, 768)))
    train.main(arguments(data))
    assert len(metrics(data / "run", "train_critic")) == 7
    np.save(data / "2.npy", np.zeros((10, 5)))
    refused(capsys, arguments(data, f"checkpoint_path={data / 'other'}"), "2.npy")
