"""The classifier: librosa's spectrograms, the published file without its code, training, digits."""

import contextlib
import io
import json
import math
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import split_of
from commands import status
from hostile import ENDLESS, PROGRAMS, SECRET, Trap, assert_refused, with_pickle
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
from rawaudio.checkpoint import CheckpointError
from rawaudio.config import to_dict
from rawaudio.hub import WEIGHTS as MODELS

# librosa 0.11's power_to_db(melspectrogram(y, sr=16000, n_mels=32), ref=np.max), y in double.
RECORDED = torch.load(Path(__file__).parent / "fixtures" / "log_mel_db.pt", weights_only=True)
SMALL = {"sample_rate": 8000, "clip_length": 8000, "n_fft": 512, "hop": 128, "n_mels": 40}
NARROW = {"cardinality": 2, "base_width": 4, "widen": 1, "blocks": 1}


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


SIGNALS = signals()


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


@pytest.mark.parametrize("case", RECORDED)
def test_spectrograms_are_librosas(case):
    """Within 1e-3 dB, for silence, clipping, clips too short or too long, both paddings; whatever
    is louder in the batch."""
    name, _, pad_mode = case.partition("/")
    wavs = torch.stack([SIGNALS[name], 3 * SIGNALS[name]])
    db = small_resnext(pad_mode=pad_mode).spectrogram(wavs)
    assert db.shape == (2, 32, 32) and db.dtype == torch.float32
    torch.testing.assert_close(db[0], RECORDED[case], atol=1e-3, rtol=0)


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


@pytest.mark.parametrize(
    "call, error, message",
    [(lambda: small_resnext(variant="big"), ValueError, "variant"),
     (lambda: small_resnext(pad_mode="wrap"), ValueError, "pad_mode"),
     (lambda: small_resnext(hop=0), ValueError, "hop"),
     (lambda: small_resnext(labels=["one"]), ValueError, "labels"),
     (lambda: small_resnext(clip_length=500), ValueError, "clip_length"),
     (lambda: small_resnext(n_mels=30, variant="small"), ValueError, "n_mels"),
     (lambda: load_classifier("digits", pad_mode="reflect"), ValueError, "pad_mode"),
     (lambda: load_classifier("digits", device="nowhere"), ValueError, "device"),
     (lambda: small_resnext()(torch.full((1, 100), float("nan"))), ValueError, "NaN"),
     (lambda: small_resnext()(torch.zeros(100)), ValueError, r"\(100,\).*clips"),
     (lambda: small_resnext()(torch.zeros(2, 0)), ValueError, "samples >= 1"),
     (lambda: small_resnext()(torch.zeros(1, 9, dtype=torch.int16)), TypeError, "int16")],
)  # fmt: skip
def test_settings_and_audio_that_make_no_sense_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_saved_classifier_comes_back(tmp_path):
    clf = small(["no", "yes"])
    save_classifier(tmp_path / "a.safetensors", clf, data="made up", accuracy=0.5)
    again = load_classifier(tmp_path / "a.safetensors")
    assert torch.equal(again(SIGNALS["chirp"][None])[0], clf(SIGNALS["chirp"][None])[0])
    assert again.labels == ["no", "yes"] and again.fingerprint == clf.fingerprint
    assert read_metadata(tmp_path / "a.safetensors")["data"] == "made up"


def test_the_fingerprint_tells_weights_architecture_and_front_end_apart():
    changes = [{}, {"top_db": 60.0}, {"pad_mode": "reflect"}, {"labels": DIGITS[::-1]}]
    models = [randomised(small_resnext(**change)) for change in changes]
    models.append(randomised(small_resnext(), seed=1))
    assert len({model.fingerprint for model in models}) == 5
    assert randomised(small_resnext()).fingerprint == models[0].fingerprint


@pytest.mark.parametrize(
    ("path", "message"),
    [("{folder}/cut.safetensors", "not a whole"),
     ("{folder}/text.pth", "damaged|refused"),
     ("{folder}/empty.pth", "damaged|refused"),
     ("{folder}/nan.safetensors", "bn_1.weight.*not finite"),
     ("{folder}/gone.pth", "is not there"),
     ("{folder}", "is a folder"),
     (str(MODELS / "sashimi_ar_digits.safetensors"), "these are simple-sashimi weights"),
     ("sc09", "resnext.pth"),
     ("digit", "did you mean digits")],
)  # fmt: skip
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
    wavs = torch.stack([SIGNALS[k] for k in ("chirp", "clipped noise")])
    logits, features = clf(wavs)
    expected = published.float()(clf.spectrogram(wavs)[:, None])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(published.classifier(features), logits, atol=1e-4, rtol=1e-4)
    assert load_classifier(path, pad_mode="reflect").fingerprint != clf.fingerprint


@both_containers
@pytest.mark.parametrize("function", [Path.touch, os.system])
def test_a_malicious_file_executes_nothing(tmp_path, published, function, zipped):
    victim = tmp_path / "executed"
    published.stages = Trap(function, victim if function is Path.touch else f"touch {victim}")
    torch.save(published, tmp_path / "resnext.pth", _use_new_zipfile_serialization=zipped)
    assert_refused(tmp_path / "resnext.pth", "refused: it names", load=load_classifier)
    assert not victim.exists()


STRANGE = [
    *PROGRAMS.values(),
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
    b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81]]K\x01" + ENDLESS + b"aaab.",
    b"\x80\x02c__builtin__\nset\n]K\x01" + ENDLESS + b"a\x85R.",
    b"\x80\x02K\x01" + ENDLESS + b")R.",
]


@pytest.mark.parametrize("program", STRANGE)
def test_strange_programs_are_refused(tmp_path, program):
    assert_refused(with_pickle(tmp_path / "resnext.pth", program), load=read_resnext)


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


@pytest.mark.parametrize(
    "shape, stride, offset",
    [((2, 2), (3, 1), 0), ((4,), (1,), 1), ((2, 2), (2, 1), -1), ((10**12,), (0,), 0),
     ((4,), (1, 1), 0)],
)  # fmt: skip
def test_tensors_beyond_their_storage_are_refused(tmp_path, shape, stride, offset):
    good = with_pickle(tmp_path / "good.pth", tensor_program((2, 2), (2, 1)))
    assert read_resnext(good)["w"].shape == (2, 2)
    program = tensor_program(shape, stride, offset)
    assert_refused(with_pickle(tmp_path / "bad.pth", program), load=read_resnext)


def test_tensors_that_unpack_to_more_than_the_file_are_refused(tmp_path):
    """A thousand tensors of one storage; the classifier itself shares nothing."""
    path, w = tmp_path / "resnext.pth", torch.zeros(1000)
    torch.save({f"w{i}": w for i in range(1000)}, path)
    assert_refused(path, "refused: its tensors are views of much less data", load=read_resnext)


HOSTILE = [
    {"blocks": 10**9}, {"blocks": 30}, {"widen": 10**30}, {"cardinality": 1e30}, {"n_mels": 10**9},
    {"n_fft": 2**40}, {"clip_length": 10**12}, {"top_db": float("inf")}, {"hop": 10**4000},
    {"labels": ["a", "b"] * 100_000}, {"labels": [str(i) for i in range(4000)]},
    {"labels": [[["a"]]]}, {"labels": [SECRET, "b"]}, {"\x1b[2J": "\x1b[2J"},
]  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: str(change)[:30])
def test_hostile_settings_are_refused(tmp_path, change):
    path, clf = tmp_path / "hostile.safetensors", small_resnext()
    metadata = {"format": "simple-sashimi-classifier", "version": "1"}
    metadata["config"] = json.dumps(to_dict(clf.config) | change)
    save_file({k: v.contiguous() for k, v in clf.state_dict().items()}, path, metadata)
    assert_refused(path, load=load_classifier)


@both_containers
def test_truncated_and_mangled_files_are_refused(tmp_path, published, zipped):
    path = tmp_path / "resnext.pth"
    torch.save(parallel(published), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in [1, 10, 100, 1000, *rng.integers(1000, len(whole) - 1, 10), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert_refused(path, load=read_resnext)
    for _ in range(100):  # bytes of the program itself: an error of ours, or still a model
        mangled = bytearray(whole)
        for place in rng.integers(0, 3000, 3):
            mangled[place] = rng.integers(256)
        path.write_bytes(mangled)
        with contextlib.suppress(CheckpointError):
            load_classifier(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(lambda model: nn.Linear(2, 2), "not the published ResNeXt"),
     (lambda model: randomised(CifarResNeXt(n_labels=12)), "12 classes"),
     (lambda model: [1, 2], "holds no model"),
     (lambda model: {"loss": 1.0}, "holds no model"),
     (lambda model: nn.Embedding(2, 2), "it names torch.nn.modules.sparse.Embedding"),
     (lambda model: model.stage_1.add_module("extra", nn.Linear(1, 1)) or model, "bottleneck")],
)  # fmt: skip
def test_another_model_than_the_published_one_is_refused(tmp_path, published, content, message):
    torch.save(content(published), tmp_path / "resnext.pth")
    assert_refused(tmp_path / "resnext.pth", message, load=load_classifier)


RATE = 4000


WORDS = {"down": (0.3, 0.02), "flat": (0.1, 0.1), "up": (0.02, 0.3)}


def word(label: str, n: int, generator: torch.Generator) -> torch.Tensor:
    """A rising, a falling or a steady tone, with some noise."""
    phase = torch.linspace(*WORDS[label], n).cumsum(0) * 2 * math.pi
    return (0.5 * phase.sin() + 0.02 * torch.randn(n, generator=generator)).clamp(-1, 1)


@pytest.fixture
def recordings(tmp_path):
    """Three words, d, f and u, as CSVs in tmp_path: train.csv, valid.csv, test.csv."""
    rng = torch.Generator().manual_seed(0)
    for name, count in (("train", 16), ("valid", 4), ("test", 4)):
        waves = {f"{label}-{name}-{i}.wav": word(label, 1500 + 20 * i, rng)
                 for label in WORDS for i in range(count)}  # fmt: skip
        split_of(tmp_path, waves, RATE, f"{name}.csv")
    return tmp_path


def command(folder: Path, **changes) -> list[str]:
    settings = {
        "train_csv": folder / "train.csv", "valid_csv": folder / "valid.csv",
        "test_csv": folder / "test.csv", "out": folder / "out" / "clf.safetensors",
        "sample_rate": RATE, "seconds": 0.5, "epochs": 12, "batch_size": 8, "device": "cpu",
    } | changes  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


def test_training_learns_words_and_says_how_well(recordings, capsys):
    """Weights with their story, a picture, and figures."""
    assert train_classifier.main(command(recordings, data="tones", licence="CC0")) == 0
    printed = capsys.readouterr().out
    assert "epoch 12/12" in printed and "test: accuracy" in printed
    out = recordings / "out" / "clf.safetensors"
    clf, metadata = load_classifier(out), read_metadata(out)
    assert clf.labels == ["d", "f", "u"]
    assert (clf.sample_rate, clf.clip_length) == (RATE, RATE // 2)
    assert metadata["test"]["accuracy"] >= 0.9 and metadata["test"]["clips"] == 12
    assert metadata["data"] == "tones" and metadata["licence"] == "CC0"
    assert "train_classifier" in metadata["command"] and metadata["epoch"] >= 1
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    generator = torch.Generator().manual_seed(9)
    x = torch.stack([word(label, 1500, generator) for label in WORDS])
    assert clf(x)[0].argmax(1).tolist() == [0, 1, 2]


def test_the_sc09_classifier_trains_too(recordings, monkeypatch):
    """One epoch of a narrow ResNeXt; its file is read back with the front end of the protocol. The
    same seed gives the same weights."""
    plain, made = train_classifier.ClassifierConfig, []
    monkeypatch.setattr(train_classifier, "ClassifierConfig", lambda **kw: plain(**kw, **NARROW))
    published = {"variant": "resnext29", "sample_rate": None, "seconds": 1.0, "epochs": 1}
    for name in ("a.safetensors", "b.safetensors"):
        argv = command(recordings, out=recordings / name, **published)
        assert train_classifier.main(argv) == 0
        made.append(load_classifier(recordings / name))
    assert (made[0].sample_rate, made[0].config.n_fft, made[0].config.n_mels) == (16000, 2048, 32)
    assert made[0].fingerprint == made[1].fingerprint


def test_ctrl_c_keeps_the_best_epoch(recordings, monkeypatch, capsys):
    whole = train_classifier.train

    def interrupted(*args):
        yield next(iter(whole(*args)))
        raise KeyboardInterrupt

    monkeypatch.setattr(train_classifier, "train", interrupted)
    assert train_classifier.main(command(recordings)) == 130
    assert read_metadata(recordings / "out" / "clf.safetensors")["epoch"] == 1
    assert "keeping the best" in capsys.readouterr().err


def test_broken_clips_are_left_out_and_counted(recordings, capsys, caplog):
    (recordings / "up-train-3.wav").write_bytes(b"not audio")
    (recordings / "up-train-4.wav").unlink()
    assert train_classifier.main(command(recordings, epochs=1)) == 0
    assert "46 train" in capsys.readouterr().out
    assert "skipped 2 of 48" in caplog.text and "up-train-3.wav" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [({"epochs": 0}, "epochs=0"),
     ({"variant": "resnet"}, "variant=resnet"),
     ({"out": "clf.pt"}, "ends in .safetensors"),
     ({"seconds": 0.01}, "clip_length"),
     ({"train_csv": "gone.csv"}, "gone.csv is not there"),
     ({"valid_csv": "strange.csv"}, "label 'left' is not in the training CSV"),
     ({"valid_csv": "bare.csv"}, "no label"),
     ({"train_csv": "one.csv"}, "two or more"),
     ({"valid_csv": "lost.csv"}, "no clip is left of 1 files in lost.csv"),
     ({"lr": 1e30, "epochs": 1}, "never finite")],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(recordings, monkeypatch, capsys, change, message):
    monkeypatch.chdir(recordings)
    for name, row in {"strange": "up-valid-0.wav,left", "one": "up-valid-0.wav,u",
                      "lost": "lost.wav,u"}.items():  # fmt: skip
        (recordings / f"{name}.csv").write_text(f"path,label\n{row}\n")
    (recordings / "bare.csv").write_text("path\nup-valid-0.wav\n")
    assert status(train_classifier.main, command(recordings, **change)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy():
    """By hand: 10 clips at 0.95, 8 right: 0.15; 10 clips at 0.55, 5 right: 0.05."""
    probs = np.array([[0.95, 0.05]] * 10 + [[0.55, 0.45]] * 10)
    labels = np.array([0] * 8 + [1] * 2 + [0] * 5 + [1] * 5)
    assert train_classifier.calibration_error(probs, labels) == pytest.approx((0.15 + 0.05) / 2)
    assert train_classifier.calibration_error(np.array([[1.0, 0.0]] * 4), np.zeros(4, int)) == 0


def test_the_temperature_undoes_a_scale_of_the_logits():
    """Logits three times too large: three times the temperature, the same probabilities."""
    clf, rng = small(["a", "b", "c"]), torch.Generator().manual_seed(0)
    wavs = torch.stack([words.noise(8000, rng) for _ in range(40)])
    heard = clf(wavs)[0].argmax(1)
    heard[::4] = (heard[::4] + 1) % 3  # some errors: what makes none is never too sure
    valid = wavs, F.one_hot(heard, 3).float()
    for _ in range(4):  # from far away
        temperature = train_classifier.fit_temperature(clf, valid)
    assert temperature == pytest.approx(1, abs=1e-3)
    before = clf(wavs)[0]
    for parameter in clf.net.classifier.parameters():
        parameter.data *= 3
    assert train_classifier.fit_temperature(clf, valid) == pytest.approx(3, rel=1e-3)
    torch.testing.assert_close(clf(wavs)[0], before, rtol=1e-2, atol=1e-2)


def some_words(lengths: list[int]) -> words.Words:
    n = len(lengths)
    wavs = torch.randint(-9999, 9999, (n, 1000), dtype=torch.int16)
    return words.Words(wavs, torch.tensor(lengths), torch.arange(n) % 2, ["a", "b"])


def test_what_chooses_the_epoch_is_mostly_words():
    """The clips as they are, four variations of each, one clip in twenty without a word; clips of
    any length keep their shape."""
    some = some_words([1000] * 40)
    cfg = train_classifier.TrainClassifierConfig(train_csv="", valid_csv="")
    wavs, targets = train_classifier.validation_set(some, cfg)
    assert wavs.shape == (210, 1000) and wavs.dtype == torch.int16
    assert (wavs[:40].int() - some.wavs.int()).abs().max() <= 1
    assert torch.equal(targets[:200].argmax(1), some.targets.repeat(5))
    assert (targets[200:] == 0.5).all()
    rng, some = torch.Generator().manual_seed(0), some_words([1000, 3, 500, 2])
    for i in range(80):
        for wav in (words.vary(some.clip(i % 4), 1000, rng), words.not_a_word(some, rng)):
            assert wav.shape == (1000,) and wav.isfinite().all()


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


@torch.no_grad()
def test_the_shipped_classifier_gives_the_recorded_logits_whatever_the_level():
    """A gliding buzz of 19 harmonics: logits as on the day of the release. It is at least 90 % sure
    of at most 2 % of 200 clips of white noise, and not of silence."""
    t = torch.arange(8000, dtype=torch.float64) / 8000
    phase = 2 * math.pi * (110 * t + 30 * t**2)
    wav = 0.2 * (math.pi * t).sin() * sum((k * phase).sin() / k for k in range(1, 20))
    recorded = [-0.42699, -1.11636, -1.54160, 0.63415, -1.24400,
                -0.18578, -2.77295, -2.86824, -2.27618, 2.47671]  # fmt: skip
    clf = load_classifier()
    logits = clf(torch.stack([wav, 1e-3 * wav]).float())[0]
    torch.testing.assert_close(logits, torch.tensor([recorded] * 2), atol=1e-3, rtol=0)
    noise = torch.randn(200, 8000, generator=torch.Generator().manual_seed(0))
    assert (clf(noise)[0].softmax(1).amax(1) >= 0.9).float().mean() <= 0.02
    assert clf(torch.zeros(1, 8000))[0].softmax(1).amax() < 0.9
