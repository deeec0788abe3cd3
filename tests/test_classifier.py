"""The classifier: librosa's spectrograms, the published file without its code, training, digits."""

import contextlib
import csv
import io
import json
import math
import os
import pickle
import re
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import status
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from metrics import train_classifier, words
from metrics.classifier import (
    DIGITS,
    WEIGHTS,
    Classifier,
    ClassifierConfig,
    load_classifier,
    read_metadata,
    save_classifier,
)
from metrics.resnext_file import read_resnext
from rawaudio import audio
from rawaudio.checkpoint import CheckpointError
from rawaudio.config import to_dict
from rawaudio.hub import WEIGHTS as MODELS

# librosa 0.11's power_to_db(melspectrogram(y, sr=16000, n_mels=32), ref=np.max), y in double.
RECORDED = torch.load(Path(__file__).parent / "fixtures" / "log_mel_db.pt", weights_only=True)
SMALL = {"sample_rate": 8000, "clip_length": 8000, "n_fft": 512, "hop": 128, "n_mels": 40}


def signals() -> dict[str, torch.Tensor]:
    """The recorded signals: float32 (T,) at 16 kHz, by formula."""
    state, noise = 1, []
    for _ in range(16000):
        state = (1103515245 * state + 12345) % 2**31
        noise.append(state / 2**30 - 1)
    t = np.arange(24000) / 16000
    chirp = 0.5 * np.sin(2 * np.pi * (100 * t + 2500 * t**2))
    made = {
        "silence": np.zeros(16000),
        "clipped noise": np.clip(3 * np.array(noise), -1, 1),
        "chirp": chirp[:16000],
        "short chirp": chirp[:5000],
        "long chirp": chirp,
        "quiet tone": 1e-3 * np.sin(2 * np.pi * 440 * t[:16000]),
        "impulse": np.eye(1, 16000, 8000)[0],
    }
    return {name: torch.from_numpy(x).float() for name, x in made.items()}


NARROW = {"cardinality": 2, "base_width": 4, "widen": 1, "blocks": 1}


def small_resnext(**changes) -> Classifier:
    return Classifier(ClassifierConfig(**NARROW | changes))


def small(labels: list[str]) -> Classifier:
    return randomised(Classifier(ClassifierConfig(variant="small", labels=labels, **SMALL)))


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor random, so that none can be mixed up with another; variances positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return net.eval()


# ---- front end ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RECORDED)
def test_spectrograms_are_librosas(case):
    """Within 1e-3 dB, for silence, clipping, clips too short or too long, both paddings."""
    name, _, pad_mode = case.partition("/")
    clf = small_resnext(pad_mode=pad_mode)
    db = clf.spectrogram(signals()[name][None])
    assert db.shape == (1, 32, 32) and db.dtype == torch.float32
    torch.testing.assert_close(db[0], RECORDED[case], atol=1e-3, rtol=0)


def test_each_clip_is_measured_against_itself():
    """A batch gives what its clips give one by one."""
    clf = small_resnext()
    x = torch.stack([signals()[k] for k in ("silence", "chirp", "quiet tone")])
    one_by_one = torch.cat([clf.spectrogram(row[None]) for row in x])
    torch.testing.assert_close(clf.spectrogram(x), one_by_one, atol=1e-5, rtol=0)


# ---- networks -------------------------------------------------------------------------------


def test_the_published_architecture_is_resnext_29_8x64():
    """34.4M parameters, 1,024 features, grouped convolutions of 8 x 64 channels and up."""
    with torch.device("meta"):
        clf = Classifier(ClassifierConfig())
    shapes = {k: tuple(v.shape) for k, v in clf.net.state_dict().items()}
    assert sum(math.prod(shapes[k]) for k, _ in clf.net.named_parameters()) == 34_425_546
    assert clf.n_features == 1024 and clf.sample_rate == clf.clip_length == 16000
    assert clf.labels == DIGITS
    assert shapes["conv_1_3x3.weight"] == (64, 1, 3, 3)
    assert shapes["stage_3.stage_3_bottleneck_2.conv_conv.weight"] == (2048, 256, 3, 3)
    assert shapes["stage_2.stage_2_bottleneck_0.shortcut.shortcut_conv.weight"] == (512, 256, 1, 1)
    assert shapes["classifier.weight"] == (10, 1024)


@pytest.mark.parametrize("T", [1, 4000, 8000, 9000])
def test_logits_and_features_of_clips_of_any_length(T):
    clf = load_classifier("digits")
    logits, features = clf(torch.randn(3, T, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (3, len(clf.labels)) and features.shape == (3, clf.n_features)
    assert not clf.training and logits.isfinite().all() and features.isfinite().all()
    torch.testing.assert_close(clf.net.classifier(features), logits)


@pytest.mark.parametrize(
    "wavs, error, message",
    [
        (torch.full((1, 100), float("nan")), ValueError, "NaN"),
        (torch.zeros(100), ValueError, r"\(100,\).*clips"),
        (torch.zeros(2, 0), ValueError, "samples >= 1"),
        (torch.zeros(1, 100, dtype=torch.int16), TypeError, "int16"),
    ],
)
def test_audio_that_cannot_be_classified_is_refused(wavs, error, message):
    with pytest.raises(error, match=message):
        small_resnext()(wavs)


@pytest.mark.parametrize(
    "bad",
    [
        {"variant": "big"},
        {"pad_mode": "wrap"},
        {"hop": 0},
        {"labels": ["one"]},
        {"clip_length": 500},
        {"n_mels": 30, "variant": "small"},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        small_resnext(**bad)


# ---- files ----------------------------------------------------------------------------------


def test_a_saved_classifier_comes_back(tmp_path):
    clf = small(["no", "yes"])
    save_classifier(tmp_path / "a.safetensors", clf, data="made up", accuracy=0.5)
    again = load_classifier(tmp_path / "a.safetensors")
    x = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x)[0], clf(x)[0]) and again.labels == ["no", "yes"]
    assert again.fingerprint == clf.fingerprint
    assert read_metadata(tmp_path / "a.safetensors")["data"] == "made up"


def test_the_fingerprint_tells_weights_architecture_and_front_end_apart():
    changes = [{}, {"top_db": 60.0}, {"pad_mode": "reflect"}, {"labels": DIGITS[::-1]}]
    models = [randomised(small_resnext(**change)) for change in changes]
    models.append(randomised(small_resnext(), seed=1))
    assert len({model.fingerprint for model in models}) == 5
    assert randomised(small_resnext()).fingerprint == models[0].fingerprint


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{folder}/cut.safetensors", "not a whole"),
        ("{folder}/text.pth", "damaged|refused"),
        ("{folder}/empty.pth", "damaged|refused"),
        ("{folder}/nan.safetensors", "bn_1.weight.*not finite"),
        ("{folder}/gone.pth", "is not there"),
        ("{folder}", "is a folder"),
        (str(MODELS / "sashimi_ar_digits.safetensors"), "these are simple-sashimi weights"),
        ("sc09", "resnext.pth"),
        ("digit", "did you mean digits"),
    ],
)
def test_files_that_are_no_classifier_are_refused(tmp_path, path, message):
    clf = small_resnext()
    clf.net.bn_1.weight.data[0] = float("nan")
    save_classifier(tmp_path / "nan.safetensors", clf)
    whole = (tmp_path / "nan.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    path = path.format(folder=tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_classifier(path)
    assert path in str(caught.value)


@pytest.mark.parametrize("setting", [{"pad_mode": "reflect"}, {"device": "nowhere"}])
def test_settings_that_a_file_does_not_leave_open_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        load_classifier(WEIGHTS / "digits.safetensors", **setting)


# ---- the published file ---------------------------------------------------------------------


both_containers = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")


class CifarResNeXt(nn.Module):
    """A ResNeXt written independently, with the published parts and their names."""

    def __init__(self, cardinality=2, width=4, n_labels=10):
        super().__init__()
        self.stages = [64, 64, 128, 256]  # pickled along
        self.conv_1_3x3 = nn.Conv2d(1, 64, 3, 1, 1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        for i in (1, 2, 3):
            inner = cardinality * width * 2 ** (i - 1)
            part = ResNeXtBottleneck(self.stages[i - 1], inner, self.stages[i], cardinality, i)
            setattr(self, f"stage_{i}", nn.Sequential())
            getattr(self, f"stage_{i}").add_module(f"stage_{i}_bottleneck_0", part)
        self.classifier = nn.Linear(256, n_labels)

    def forward(self, x):
        x = torch.relu(self.bn_1(self.conv_1_3x3(x)))
        x = self.stage_3(self.stage_2(self.stage_1(x)))
        return self.classifier(F.avg_pool2d(x, 8, 1).flatten(1))


class ResNeXtBottleneck(nn.Module):
    def __init__(self, before, inner, after, cardinality, stage):
        super().__init__()
        stride = min(stage, 2)
        self.conv_reduce = nn.Conv2d(before, inner, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(inner)
        self.conv_conv = nn.Conv2d(inner, inner, 3, stride, 1, groups=cardinality, bias=False)
        self.bn = nn.BatchNorm2d(inner)
        self.conv_expand = nn.Conv2d(inner, after, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut.add_module("shortcut_conv", conv)
            self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(after))

    def forward(self, x):
        y = torch.relu(self.bn_reduce(self.conv_reduce(x)))
        y = self.bn_expand(self.conv_expand(torch.relu(self.bn(self.conv_conv(y)))))
        return torch.relu(self.shortcut(x) + y)


@pytest.fixture
def published(monkeypatch):
    """A model whose classes live where the published repository has them: models/resnext.py."""
    module = types.ModuleType("models.resnext")
    for cls in (CifarResNeXt, ResNeXtBottleneck):
        monkeypatch.setattr(cls, "__module__", "models.resnext")
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.resnext", module)
    return randomised(CifarResNeXt())


def parallel(model: nn.Module) -> nn.DataParallel:
    """As it is on a machine with a GPU, which pickles a torch.device too."""
    wrapped = nn.DataParallel(model)
    wrapped.device_ids, wrapped.output_device = [0], 0
    wrapped.src_device_obj = torch.device("cuda", 0)
    return wrapped


@both_containers
@pytest.mark.parametrize("form", ["DataParallel", "bare", "state dict", "checkpoint", "half"])
def test_the_published_file_gives_its_models_logits(tmp_path, monkeypatch, published, form, zipped):
    content = {
        "DataParallel": lambda: parallel(published),
        "bare": lambda: published,
        "state dict": lambda: parallel(published).state_dict(),
        "checkpoint": lambda: {"epoch": 3, "state_dict": published.state_dict()},
        "half": lambda: parallel(published.half()),
    }
    path = tmp_path / "resnext.pth"
    torch.save(content[form](), path, _use_new_zipfile_serialization=zipped)
    for name in ("models", "models.resnext"):  # on the reader's machine there is no such module
        monkeypatch.delitem(sys.modules, name)
    clf = load_classifier(path)
    assert clf.labels == DIGITS and clf.n_features == 256 and not clf.training
    wavs = torch.stack([signals()[k] for k in ("chirp", "clipped noise")])
    logits, features = clf(wavs)
    expected = published.float()(clf.spectrogram(wavs)[:, None])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(published.classifier(features), logits, atol=1e-4, rtol=1e-4)
    assert load_classifier(path, pad_mode="reflect").fingerprint != clf.fingerprint


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@both_containers
@pytest.mark.parametrize("evil", [(Path.touch, "{}"), (os.system, "touch {}")])
def test_a_malicious_file_executes_nothing(tmp_path, published, evil, zipped):
    victim, (function, argument) = tmp_path / "executed", evil
    argument = victim if argument == "{}" else argument.format(victim)
    published.stages = Evil(function, argument)
    torch.save(published, tmp_path / "resnext.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="refused: it names"):
        load_classifier(tmp_path / "resnext.pth")
    assert not victim.exists()


def with_pickle(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", b"\0" * 16)
    return path


ENDLESS = b"q\x00h\x00\x86" * 100  # a pair of twice the same pair of twice the same pair ...


@pytest.mark.parametrize(
    "program",
    [
        pickle.dumps(eval),
        pickle.dumps(types.SimpleNamespace(a=1)),
        b"cos\nsystem\n(S'true'\ntR.",  # protocol 0
        b"(ios\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"\x80\x02ctorch\ndevice\nctorch\ndevice\nR.",  # a call without a tuple
        b"\x80\x02ccollections\nOrderedDict\n}b.",  # BUILD on a name
        b"\x80\x02ctorch.nn.modules.linear\nLinear\nK\x01\x85R.",
        b"\x80\x02K\x01Q.",  # a persistent id that is none
        b"\x80\x02]r\x00\x00\x00\x00h\x00a.",  # a list that holds itself
        b"\x80\x02" + b"(" * 1000 + b".",
        b"\x80\x02}K\x01" + ENDLESS + b"K\x01s.",  # a key that takes forever to hash
        b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81]]K\x01" + ENDLESS + b"aaab.",  # another
        b"\x80\x02c__builtin__\nset\n]K\x01" + ENDLESS + b"a\x85R.",  # and another
        b"\x80\x02K\x01" + ENDLESS + b"Q.",  # an id that takes forever to print
        b"\x80\x02K\x01" + ENDLESS + b")R.",
        b"\x80\x02.",
        b"",
    ],
)
def test_strange_programs_are_refused(tmp_path, program):
    path = with_pickle(tmp_path / "resnext.pth", program)
    with pytest.raises(CheckpointError, match=r"resnext\.pth: (refused|damaged)"):
        read_resnext(path)


def tensor_program(shape: tuple, stride: tuple, offset: int = 0) -> bytes:
    """A state dict with one tensor over a storage of four floats, written as torch does."""

    class Shim(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if obj is storage else None

    class Fake:
        def __reduce__(self):
            rebuild = torch._utils._rebuild_tensor_v2
            return rebuild, (storage, offset, shape, stride, False, None)

    storage, file = object(), io.BytesIO()
    Shim(file, protocol=2).dump({"w": Fake()})
    return file.getvalue()


def test_tensors_within_their_storage_are_read(tmp_path):
    path = with_pickle(tmp_path / "good.pth", tensor_program((2, 2), (2, 1)))
    assert read_resnext(path)["w"].shape == (2, 2)


@pytest.mark.parametrize(
    "shape, stride, offset",
    [
        ((2, 2), (3, 1), 0),
        ((4,), (1,), 1),
        ((2, 2), (2, 1), -1),
        ((10**12,), (0,), 0),
        ((4,), (1, 1), 0),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, shape, stride, offset):
    path = with_pickle(tmp_path / "bad.pth", tensor_program(shape, stride, offset))
    with pytest.raises(CheckpointError, match="damaged|refused"):
        read_resnext(path)


def test_tensors_that_unpack_to_more_than_the_file_are_refused(tmp_path):
    """A thousand tensors of one storage; the classifier itself shares nothing."""
    w = torch.zeros(1000)
    path = tmp_path / "resnext.pth"
    torch.save({f"w{i}": w for i in range(1000)}, path)
    with pytest.raises(CheckpointError, match="refused: its tensors are views of much less data"):
        read_resnext(path)


@pytest.mark.parametrize(
    "config",
    [
        {"blocks": 10**9},
        {"blocks": 30},
        {"base_width": 10**9},
        {"widen": 10**30},
        {"cardinality": 1e30},
        {"n_mels": 10**9},
        {"n_fft": 2**40},
        {"sample_rate": 5 * 10**9},
        {"clip_length": 10**12},
        {"top_db": float("inf")},
        {"labels": ["a", "b"] * 100_000},
        {"labels": [str(i) for i in range(4000)]},
        {"labels": [[["a"]]]},
        {"hop": 10**4000},
        {"labels": "${oc.env:SECRET}"},
        {"labels": ["${oc.env:SECRET}", "b"]},
        {"variant": "\x1b[2J"},
        {"\x1b[2J": 1},
    ],
    ids=lambda config: str(config)[:40],
)
def test_hostile_settings_are_refused_at_once(tmp_path, config, monkeypatch):
    """In a second, by one printable line; nothing is read from the environment."""
    monkeypatch.setenv("SECRET", "4096123")
    path, clf = tmp_path / "hostile.safetensors", small_resnext()
    metadata = {"format": "simple-sashimi-classifier", "version": "1"}
    metadata["config"] = json.dumps(to_dict(clf.config) | config)
    save_file({k: v.contiguous() for k, v in clf.state_dict().items()}, path, metadata)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"hostile\.safetensors") as raised:
        load_classifier(path)
    message = str(raised.value)
    assert time.process_time() - start < 1 and message.isprintable() and len(message) < 600
    assert "4096123" not in message


@both_containers
def test_truncated_and_mangled_files_are_refused(tmp_path, published, zipped):
    path = tmp_path / "resnext.pth"
    torch.save(parallel(published), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in [1, 10, 100, 1000, *rng.integers(1000, len(whole) - 1, 10), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"resnext\.pth"):
            read_resnext(path)
    for _ in range(100):  # bytes of the program itself: an error of ours, or still a model
        mangled = bytearray(whole)
        for place in rng.integers(0, 3000, 3):
            mangled[place] = rng.integers(256)
        path.write_bytes(mangled)
        with contextlib.suppress(CheckpointError):
            load_classifier(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda model: nn.Linear(2, 2), "not the published ResNeXt"),
        (lambda model: randomised(CifarResNeXt(n_labels=12)), "12 classes"),
        (lambda model: [1, 2], "holds no model"),
        (lambda model: {"loss": 1.0}, "holds no model"),
        (lambda model: nn.Embedding(2, 2), "it names torch.nn.modules.sparse.Embedding"),
        (lambda model: model.stage_1.add_module("extra", nn.Linear(1, 1)) or model, "bottleneck"),
    ],
)
def test_another_model_than_the_published_one_is_refused(tmp_path, published, content, message):
    torch.save(content(published), tmp_path / "resnext.pth")
    with pytest.raises(CheckpointError, match=message):
        load_classifier(tmp_path / "resnext.pth")


# ---- training -------------------------------------------------------------------------------

RATE = 4000


def word(label: str, n: int, generator: torch.Generator) -> torch.Tensor:
    """A rising, a falling or a steady tone, with some noise."""
    low, high = {"up": (0.02, 0.3), "down": (0.3, 0.02), "flat": (0.1, 0.1)}[label]
    phase = torch.linspace(low, high, n).cumsum(0) * 2 * math.pi
    return 0.5 * phase.sin() + 0.02 * torch.randn(n, generator=generator)


@pytest.fixture
def recordings(tmp_path):
    """Three words, as CSVs in tmp_path: train.csv, valid.csv, test.csv."""
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 16), ("valid", 4), ("test", 4)):
        rows = []
        for label in ("up", "down", "flat"):
            for i in range(count):
                n = 1500 + 20 * i
                path = tmp_path / f"{name}-{label}-{i}.wav"
                audio.write(path, word(label, n, generator).clamp(-1, 1), RATE)
                rows.append((path.name, label))
        write_csv(tmp_path / f"{name}.csv", rows)
    return tmp_path


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])


def command(folder: Path, **changes) -> list[str]:
    settings = {
        "train_csv": folder / "train.csv", "valid_csv": folder / "valid.csv",
        "test_csv": folder / "test.csv", "out": folder / "out" / "clf.safetensors",
        "sample_rate": RATE, "seconds": 0.5, "epochs": 12, "batch_size": 8, "device": "cpu",
    } | changes  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


def test_training_learns_words_and_says_how_well(recordings, capsys):
    """Weights with their story, a picture, and figures; the same seed gives the same weights."""
    assert train_classifier.main(command(recordings, data="tones", licence="CC0")) == 0
    printed = capsys.readouterr().out
    assert "epoch 12/12" in printed and "test: accuracy" in printed
    out = recordings / "out" / "clf.safetensors"
    clf, metadata = load_classifier(out), read_metadata(out)
    assert clf.labels == ["down", "flat", "up"]
    assert (clf.sample_rate, clf.clip_length) == (RATE, RATE // 2)
    assert metadata["test"]["accuracy"] >= 0.9 and metadata["test"]["clips"] == 12
    assert metadata["data"] == "tones" and metadata["licence"] == "CC0"
    assert "train_classifier" in metadata["command"] and metadata["epoch"] >= 1
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    generator = torch.Generator().manual_seed(9)
    x = torch.stack([word(label, 1500, generator) for label in clf.labels])
    assert clf(x)[0].argmax(1).tolist() == [0, 1, 2]

    again = recordings / "again.safetensors"
    assert train_classifier.main(command(recordings, out=again)) == 0
    assert load_classifier(again).fingerprint == clf.fingerprint


def test_the_sc09_classifier_trains_too(recordings, monkeypatch):
    """One epoch of a narrow ResNeXt; its file is read back with the front end of the protocol."""
    plain = train_classifier.ClassifierConfig
    monkeypatch.setattr(train_classifier, "ClassifierConfig", lambda **kw: plain(**kw, **NARROW))
    out = recordings / "sc09.safetensors"
    assert (
        train_classifier.main(
            command(
                recordings, out=out, variant="resnext29", sample_rate=None, seconds=1.0, epochs=1
            )
        )
        == 0
    )
    clf = load_classifier(out)
    assert (clf.sample_rate, clf.config.n_fft, clf.config.n_mels) == (16000, 2048, 32)


def test_ctrl_c_keeps_the_best_epoch(recordings, monkeypatch, capsys):
    whole = train_classifier.train

    def interrupted(*args):
        yield next(iter(whole(*args)))
        raise KeyboardInterrupt

    monkeypatch.setattr(train_classifier, "train", interrupted)
    assert train_classifier.main(command(recordings)) == 130
    assert read_metadata(recordings / "out" / "clf.safetensors")["epoch"] == 1
    assert "keeping the best" in capsys.readouterr().err


def test_parts_of_a_recording_are_the_words_that_files_of_them_are(recordings):
    def read(name):
        return words.read_words(recordings / name, None, ["down", "flat", "up"], RATE, RATE // 2)

    files = read("train.csv")
    ends = (files.lengths.cumsum(0) / RATE).tolist()
    wav = torch.cat([files.clip(i) for i in range(len(files))])
    audio.write(recordings / "all.wav", wav, RATE)
    labels = [files.labels[i] for i in files.targets]
    rows = [
        f"all.wav,{label},{a},{b}" for label, a, b in zip(labels, [0, *ends], ends, strict=False)
    ]
    (recordings / "parts.csv").write_text("\n".join(["path,label,start,stop", *rows]))
    parts = read("parts.csv")
    assert torch.equal(parts.wavs, files.wavs) and torch.equal(parts.lengths, files.lengths)


def test_broken_clips_are_left_out_and_counted(recordings, capsys, caplog):
    (recordings / "train-up-3.wav").write_bytes(b"not audio")
    (recordings / "train-up-4.wav").unlink()
    assert train_classifier.main(command(recordings, epochs=1)) == 0
    assert "46 train" in capsys.readouterr().out
    assert "skipped 2 of 48" in caplog.text and "train-up-3.wav" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"variant": "resnet"}, "variant=resnet"),
        ({"out": "clf.pt"}, "ends in .safetensors"),
        ({"seconds": 0.01}, "clip_length"),
        ({"train_csv": "gone.csv"}, "gone.csv is not there"),
        ({"valid_csv": "strange.csv"}, "label 'left' is not in the training CSV"),
        ({"valid_csv": "bare.csv"}, "no label"),
        ({"train_csv": "one.csv"}, "two or more"),
        ({"valid_csv": "lost.csv"}, "no clip is left of 1 files in lost.csv"),
        ({"lr": 1e30, "epochs": 1}, "never finite"),
    ],
)
def test_bad_input_is_one_line_and_status_2(recordings, monkeypatch, capsys, change, message):
    monkeypatch.chdir(recordings)
    write_csv(recordings / "strange.csv", [("valid-up-0.wav", "left")])
    write_csv(recordings / "one.csv", [("valid-up-0.wav", "up")])
    write_csv(recordings / "lost.csv", [("lost.wav", "up")])
    (recordings / "bare.csv").write_text("path\nvalid-up-0.wav\n")
    assert status(train_classifier.main, command(recordings, **change)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert re.search(message, errors[0])


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy():
    """By hand: 10 clips at 0.95, 8 right: 0.15; 10 clips at 0.55, 5 right: 0.05."""
    probs = np.array([[0.95, 0.05]] * 10 + [[0.55, 0.45]] * 10)
    labels = np.array([0] * 8 + [1] * 2 + [0] * 5 + [1] * 5)
    assert train_classifier.calibration_error(probs, labels) == pytest.approx((0.15 + 0.05) / 2)
    assert train_classifier.calibration_error(np.array([[1.0, 0.0]] * 4), np.zeros(4, int)) == 0


def test_the_temperature_undoes_a_scale_of_the_logits():
    """Logits three times too large: three times the temperature, the same probabilities."""
    clf = small(["a", "b", "c"])
    generator = torch.Generator().manual_seed(0)
    wavs = torch.stack([words.noise(8000, generator) for _ in range(40)])
    heard = clf(wavs)[0].argmax(1)
    heard[::4] = (heard[::4] + 1) % 3  # some errors: what makes none is never too sure
    valid = wavs, F.one_hot(heard, 3).float()
    for _ in range(4):  # from far away
        temperature = train_classifier.fit_temperature(clf, valid)
    assert temperature == pytest.approx(1, abs=1e-3)
    before = clf(wavs)[0]
    with torch.no_grad():
        clf.net.classifier.weight *= 3
        clf.net.classifier.bias *= 3
    assert train_classifier.fit_temperature(clf, valid) == pytest.approx(3, rel=1e-3)
    torch.testing.assert_close(clf(wavs)[0], before, rtol=1e-2, atol=1e-2)


def some_words(lengths: list[int]) -> words.Words:
    n = len(lengths)
    wavs = torch.randint(-9999, 9999, (n, 1000), dtype=torch.int16)
    return words.Words(wavs, torch.tensor(lengths), torch.arange(n) % 2, ["a", "b"])


def test_what_chooses_the_epoch_is_mostly_words():
    """The clips as they are, four variations of each, one clip in twenty without a word."""
    some = some_words([1000] * 40)
    cfg = train_classifier.TrainClassifierConfig(train_csv="", valid_csv="")
    wavs, targets = train_classifier.validation_set(some, cfg)
    assert wavs.shape == (210, 1000) and wavs.dtype == torch.int16
    assert (wavs[:40].int() - some.wavs.int()).abs().max() <= 1
    assert torch.equal(targets[:200].argmax(1), some.targets.repeat(5))
    assert (targets[200:] == 0.5).all()


def test_augmented_clips_keep_their_shape():
    rng, some = torch.Generator().manual_seed(0), some_words([1000, 3, 500, 2])
    for i in range(80):
        assert words.vary(some.clip(i % 4), 1000, rng).shape == (1000,)
    for _ in range(60):
        wav = words.not_a_word(some, rng)
        assert wav.shape == (1000,) and wav.isfinite().all()


# ---- the shipped digits ---------------------------------------------------------------------


def test_the_shipped_classifier_says_where_it_comes_from():
    """Small, with data, licence and at least 97 % on the official test set in its metadata."""
    path = WEIGHTS / "digits.safetensors"
    metadata = read_metadata(path)
    assert path.stat().st_size < 4 * 2**20 and metadata["parameters"] < 1e6
    assert metadata["test"]["clips"] == 300 and metadata["test"]["accuracy"] >= 0.97
    assert metadata["licence"].startswith("CC BY-SA 4.0") and metadata["data"]
    assert path.with_suffix(".md").exists() and path.with_suffix(".png").exists()
    clf = load_classifier()
    assert clf.labels == DIGITS and (clf.sample_rate, clf.clip_length) == (8000, 8000)


def test_the_shipped_classifier_is_not_sure_of_noise():
    """At least 90 % sure of at most 2 % of 200 clips of white noise, and not of silence."""
    noise = torch.randn(200, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        noisy, silent = load_classifier()(noise)[0], load_classifier()(torch.zeros(1, 8000))[0]
    assert (noisy.softmax(1).amax(1) >= 0.9).float().mean() <= 0.02
    assert silent.softmax(1).amax() < 0.9


def test_the_shipped_classifier_gives_the_recorded_logits():
    """A gliding buzz of 19 harmonics: logits as on the day of the release."""
    t = torch.arange(8000, dtype=torch.float64) / 8000
    phase = 2 * math.pi * (110 * t + 30 * t**2)
    wav = 0.2 * (math.pi * t).sin() * sum((k * phase).sin() / k for k in range(1, 20))
    logits = load_classifier()(wav.float()[None])[0][0]
    recorded = [-0.42699, -1.11636, -1.54160, 0.63415, -1.24400]
    recorded += [-0.18578, -2.77295, -2.86824, -2.27618, 2.47671]
    torch.testing.assert_close(logits, torch.tensor(recorded), atol=1e-3, rtol=0)


def test_the_shipped_classifier_does_not_mind_the_level():
    noise = words.noise(8000, torch.Generator().manual_seed(0))
    clf = load_classifier()
    torch.testing.assert_close(clf(noise[None])[0], clf(1e-3 * noise[None])[0], atol=1e-3, rtol=0)
