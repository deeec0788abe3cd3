"""Classifiers of one-second words: probabilities and features that the scores are computed on.

    clf = load_classifier()                       # shipped: spoken digits at 8 kHz
    clf = load_classifier("resnext.pth")          # the published SC09 classifier, from your disk
    logits, features = clf(wavs)                  # (B, T) -> (B, C), (B, F)

Audio -> log-mel spectrogram in dB below its loudest point -> network. Two networks:

    resnext29   ResNeXt-29 8x64 (Xie et al. 2017, arXiv:1611.05431, CIFAR form) on 32 x 32
                spectrograms of one second at 16 kHz, 1,024 features: the SC09 protocol
    small       a residual network, under 1M parameters, 128 features: quick work
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.resnext_file import read_resnext
from rawaudio.config import from_dict, setting, to_dict, usable_device
from rawaudio.errors import CheckpointError, UserError, printable
from rawaudio.files import check_settings, fill, read_safetensors, write_safetensors
from rawaudio.mel import mel_filters

FORMAT = "simple-sashimi-classifier"
VERSION = 1  # of the files and of the arithmetic: part of every fingerprint
WEIGHTS = Path(__file__).parent / "weights"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PUBLISHED = "sc09_classifier/resnext.pth of huggingface.co/krandiash/sashimi-release"
N_SMALL = 128  # features of the small network

# The largest values: a file may claim any, and time and memory follow.
LIMITS = {
    "sample_rate": 768_000, "clip_length": 10**7, "n_fft": 2**14, "hop": 2**14, "n_mels": 1024,
    "top_db": 1000, "amin": 1, "blocks": 32, "cardinality": 128, "base_width": 1024, "widen": 64,
}  # fmt: skip


@dataclass
class ClassifierConfig:
    """Front end and network. Defaults: the SC09 protocol."""

    variant: str = setting("resnext29", "resnext29 or small")
    labels: list[str] = setting(DIGITS, "what the outputs mean, in their order")
    # front end
    sample_rate: int = setting(16000, "Hz")
    clip_length: int = setting(16000, "samples; longer clips are cut, shorter ones zero-padded")
    n_fft: int = setting(2048, "samples per Hann window")
    hop: int = setting(512, "samples from window to window")
    n_mels: int = setting(32, "mel bands")
    top_db: float = setting(80.0, "dB kept below the loudest point")
    amin: float = setting(1e-10, "smallest power before the logarithm")
    pad_mode: str = setting("constant", "what is beyond the ends: constant (silence) or reflect")
    # resnext29
    blocks: int = setting(3, "residual blocks per stage")
    cardinality: int = setting(8, "groups of the 3x3 convolutions")
    base_width: int = setting(64, "channels per group in the first stage")
    widen: int = setting(4, "a stage's output channels, over 64, 128, 256")

    def __post_init__(self) -> None:
        if self.variant not in NETWORKS:
            raise UserError(f"variant={self.variant}: must be {' or '.join(NETWORKS)}")
        if self.pad_mode not in ("constant", "reflect"):
            raise UserError(f"pad_mode={self.pad_mode}: must be constant or reflect")
        for name, most in LIMITS.items():
            if not 0 < getattr(self, name) <= most:
                value = getattr(self, name)
                raise UserError(f"{name}={value}: must be above 0 and at most {most:,}")
        if self.clip_length <= self.n_fft // 2:
            raise UserError(f"clip_length={self.clip_length}: must be above n_fft/2")
        if self.variant == "small" and self.n_mels % 8:
            raise UserError(f"n_mels={self.n_mels}: the small network needs a multiple of 8")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise UserError("labels: two or more are needed, each once")


# ---- front end ------------------------------------------------------------------------------


def log_mel_db(
    wavs: Tensor,
    sample_rate: int,
    n_fft: int = 2048,
    hop: int = 512,
    n_mels: int = 128,
    top_db: float = 80.0,
    amin: float = 1e-10,
    pad_mode: str = "constant",
) -> Tensor:
    """Mel spectrograms in dB below each clip's loudest point: (B, T) -> (B, n_mels, 1 + T // hop).

    Values lie in [-top_db, 0]; silence is 0 everywhere. Windows are centred on multiples of `hop`;
    power, Slaney's mel scale and area: librosa's `power_to_db(melspectrogram(y), ref=np.max)` with
    its defaults (since 0.9; until 0.8 its `pad_mode` was "reflect").
    """
    # Double: 80 dB below a steady tone, rounding of single precision is 3e-4 dB. MPS has none.
    dtype = torch.float32 if wavs.device.type == "mps" else torch.float64
    window = torch.hann_window(n_fft, dtype=dtype, device=wavs.device)
    options = {"window": window, "center": True, "pad_mode": pad_mode, "return_complex": True}
    spectrum = torch.stft(wavs.to(dtype), n_fft, hop, **options)
    power = spectrum.real.square() + spectrum.imag.square()  # (B, n_fft / 2 + 1, frames)
    mel = (mel_filters(sample_rate, n_mels, n_fft).to(power) @ power).clamp(min=amin)
    return (10 * (mel / mel.amax((1, 2), keepdim=True)).log10()).clamp(min=-top_db).float()


# ---- networks -------------------------------------------------------------------------------
# Both: spectrograms (B, n_mels, frames) in dB -> logits (B, C), features (B, F).


class ResNeXt(nn.Module):
    """ResNeXt for small images; parameters are named as in the published classifier."""

    def __init__(self, cfg: ClassifierConfig) -> None:
        super().__init__()
        self.conv_1_3x3 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        width = 64
        for stage in (1, 2, 3):
            blocks = nn.Sequential()
            inner = cfg.cardinality * cfg.base_width * 2 ** (stage - 1)
            after = 64 * 2 ** (stage - 1) * cfg.widen
            for i in range(cfg.blocks):
                stride = 2 if i == 0 and stage > 1 else 1
                block = Bottleneck(width, inner, after, stride, cfg.cardinality)
                blocks.add_module(f"stage_{stage}_bottleneck_{i}", block)
                width = after
            self.add_module(f"stage_{stage}", blocks)
        self.n_features = width
        self.classifier = nn.Linear(width, len(cfg.labels))
        _initialise(self)

    def forward(self, db: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn_1(self.conv_1_3x3(db[:, None])))  # (B, 64, 32, 32)
        features = self.stage_3(self.stage_2(self.stage_1(x))).mean((2, 3))  # (B, 1024)
        return self.classifier(features), features


class Bottleneck(nn.Module):
    """1x1 down, grouped 3x3, 1x1 up, around them a shortcut (type C of the paper)."""

    def __init__(self, before: int, inner: int, after: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(before, inner, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(inner)
        self.conv_conv = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(inner)
        self.conv_expand = nn.Conv2d(inner, after, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut.add_module("shortcut_conv", conv)
            self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn_reduce(self.conv_reduce(x)))
        y = F.relu(self.bn(self.conv_conv(y)))
        return F.relu(self.shortcut(x) + self.bn_expand(self.conv_expand(y)))


class SmallNet(nn.Module):
    """Three residual blocks, then one convolution over all mel bands, averaged over time."""

    def __init__(self, cfg: ClassifierConfig) -> None:
        super().__init__()
        self.top_db = cfg.top_db
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32))
        self.blocks = nn.Sequential(Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 128, 2))
        bands = cfg.n_mels // 8
        self.top = nn.Sequential(
            nn.Conv2d(128, N_SMALL, (bands, 1), bias=False), nn.BatchNorm2d(N_SMALL)
        )
        self.n_features = N_SMALL
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(N_SMALL, len(cfg.labels))
        _initialise(self)

    def forward(self, db: Tensor) -> tuple[Tensor, Tensor]:
        x = 1 + db[:, None] / self.top_db  # 0: the floor, and what convolutions pad with
        x = F.relu(self.stem(x.contiguous(memory_format=torch.channels_last)))
        x = F.relu(self.top(self.blocks(x)))  # (B, 128, 1, frames / 8)
        features = x.mean((2, 3))
        return self.classifier(self.dropout(features)), features


class Residual(nn.Module):
    """Two 3x3 convolutions around which the input is added."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn_1 = nn.BatchNorm2d(after)
        self.conv_2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn_2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn_1(self.conv_1(x)))
        return F.relu(self.shortcut(x) + self.bn_2(self.conv_2(y)))


NETWORKS = {"small": SmallNet, "resnext29": ResNeXt}


def _initialise(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    nn.init.zeros_(net.classifier.bias)


class Classifier(nn.Module):
    """A front end and a network: wavs -> logits and features. `load_classifier` makes one.

    sample_rate   Hz
    clip_length   samples that are heard
    labels        list of C words
    n_features    F
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.net = NETWORKS[config.variant](config)
        self.sample_rate, self.clip_length = config.sample_rate, config.clip_length
        self.labels, self.n_features = config.labels, self.net.n_features

    @property
    def fingerprint(self) -> str:
        """64 hex digits over weights, architecture and front end: what makes its outputs."""
        settings = {"version": VERSION} | to_dict(self.config)
        total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in self.state_dict().items():
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            total.update(flat.view(torch.uint8).numpy())
        return total.hexdigest()

    def spectrogram(self, wavs: Tensor) -> Tensor:
        """float (B, T) -> dB (B, n_mels, frames); see `log_mel_db`. Raises what `forward` does."""
        if wavs.dim() != 2 or wavs.shape[1] == 0:
            raise UserError(f"wavs of shape {tuple(wavs.shape)}: expected (clips, samples >= 1)")
        if not wavs.is_floating_point():
            raise TypeError(f"a classifier takes floating-point audio in [-1, 1], not {wavs.dtype}")
        if not wavs.isfinite().all():
            raise UserError("the audio holds NaN or infinity")
        cfg = self.config
        wavs = F.pad(wavs, (0, cfg.clip_length - wavs.shape[1]))  # cuts longer ones
        front_end = (cfg.n_fft, cfg.hop, cfg.n_mels, cfg.top_db, cfg.amin, cfg.pad_mode)
        return log_mel_db(wavs, cfg.sample_rate, *front_end)

    def forward(self, wavs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and features (B, F) of float wavs (B, T), T >= 1, at `sample_rate`.

        Clips are cut or zero-padded to `clip_length`. Levels do not matter: each clip is measured
        against its own loudest point. Raises ValueError for another shape, NaN or infinity,
        TypeError for integers.
        """
        return self.net(self.spectrogram(wavs))


# ---- files ----------------------------------------------------------------------------------


def load_classifier(
    name_or_path: str | os.PathLike = "digits",
    device: str | torch.device | None = "cpu",
    *,
    pad_mode: str | None = None,
) -> Classifier:
    """A classifier in eval mode.

    name_or_path: "digits", the small one inside the package (8 kHz, trained on FSDD); the path of
    a file of `metrics.train_classifier`; or of the published resnext.pth. device: None is the GPU
    if there is one. pad_mode: "reflect" for a published file whose numbers were made with a
    librosa before 0.9, which mirrored the audio at its ends; None is "constant".

    Raises CheckpointError for an unknown name and a missing, damaged or foreign file, ValueError
    for a device that cannot be used or a pad_mode that the file does not leave open.
    """
    device = usable_device(device)
    path = Path(name_or_path)
    if str(name_or_path) == "digits":
        path = WEIGHTS / "digits.safetensors"
    elif not path.is_file():
        raise CheckpointError(_absent(str(name_or_path), path))
    if path.suffix == ".safetensors":
        if pad_mode is not None:
            raise UserError(f"pad_mode={pad_mode}: {path} has its own; leave it out")
        tensors, metadata = read_safetensors(path, FORMAT, VERSION)
        config = metadata.get("config")
        check_settings(path, config)
    else:
        tensors = {f"net.{k}": v for k, v in read_resnext(path).items()}
        config = _published_config(path, tensors) | {"pad_mode": pad_mode or "constant"}
    try:
        with torch.device("meta"):  # shapes only: the weights come from the file
            clf = Classifier(from_dict(ClassifierConfig, config))
    except (ValueError, TypeError, AttributeError) as error:
        reason = printable(str(error))
        raise CheckpointError(f"{path}: its config is not understood ({reason})") from None
    counters = {k: v for k, v in clf.state_dict().items() if k.endswith("num_batches_tracked")}
    # of batches seen in training: published files may lack them, nothing needs them
    fill(path, clf, tensors | {k: torch.zeros_like(v, device="cpu") for k, v in counters.items()})
    return clf.to(device).eval()


def save_classifier(path: str | os.PathLike, clf: Classifier, **metadata: Any) -> None:
    """Write weights, config and metadata (text, numbers, lists, dicts) to a .safetensors file."""
    metadata |= {"config": to_dict(clf.config)}
    write_safetensors(Path(path), clf, FORMAT, VERSION, metadata)


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What `save_classifier` wrote beside the weights; raises CheckpointError."""
    return read_safetensors(Path(path), FORMAT, VERSION, with_tensors=False)[1]


def _absent(name: str, path: Path) -> str:
    if name == "sc09":
        return (
            f"classifier=sc09: its weights do not travel with the package. Give the path of "
            f"resnext.pth ({PUBLISHED}), or train one: python -m metrics.train_classifier"
        )
    if path.is_dir():
        return f"classifier={name} is a folder; expected a .safetensors file or resnext.pth"
    near = difflib.get_close_matches(name, ["digits", "sc09"], n=1)
    hint = f"did you mean {near[0]}?" if near else "give digits, or the path of a weights file"
    return f"classifier={name} is not there; {hint}"


def _published_config(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The settings of a ResNeXt by the shapes of its tensors."""
    try:
        first = tensors["net.stage_1.stage_1_bottleneck_0.conv_conv.weight"]
        inner, base_width = first.shape[:2]
        n_labels, n_features = tensors["net.classifier.weight"].shape
        shape = {
            "blocks": len({k.split(".")[2] for k in tensors if k.startswith("net.stage_1.")}),
            "cardinality": inner // base_width,
            "base_width": base_width,
            "widen": n_features // 256,
        }
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        reason = printable(repr(error))
        raise CheckpointError(f"{path}: not the published ResNeXt ({reason})") from None
    if n_labels != len(DIGITS):
        raise CheckpointError(
            f"{path}: has {n_labels} classes; only the ten of SC09 have known meanings"
        )
    return {"variant": "resnext29", "labels": DIGITS} | shape
