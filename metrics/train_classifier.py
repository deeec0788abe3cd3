"""Train a classifier of words on a CSV of audio files, and see what it confuses.

`out` gets the weights of the epoch with the smallest validation loss, beside it a picture of the
confusion matrix (.png). Ctrl-C ends the training early and keeps them.

The scores ask how sure the classifier is. So part of what it is trained, chosen and calibrated on
is no word at all (metrics/words.py), with all labels equally likely.
"""

from __future__ import annotations

import io
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.optimize
import torch
from omegaconf import MISSING
from torch import Tensor
from torch.nn import functional as F

from metrics import pictures
from metrics.classifier import NETWORKS, Classifier, ClassifierConfig, save_classifier
from metrics.features import SURE
from metrics.words import Words, mask, not_a_word, read_labels, read_words, vary
from rawaudio import command
from rawaudio.config import parse_args, setting, usable_device
from rawaudio.errors import UserError
from rawaudio.files import write_atomically
from rawaudio.seeds import seed_of, seeded

EXAMPLES = r"""
python -m metrics.train_classifier train_csv=splits/fsdd-train.csv \
    valid_csv=splits/fsdd-valid.csv test_csv=splits/fsdd-test.csv \
    data_root=fsdd/recordings out=runs/digits.safetensors

python -m metrics.train_classifier variant=resnext29 train_csv=splits/sc09-train.csv \
    valid_csv=splits/sc09-valid.csv data_root=speech_commands out=runs/sc09.safetensors"""

PROG = "python -m metrics.train_classifier"


@dataclass
class TrainClassifierConfig:
    # data
    train_csv: str = setting(MISSING, "CSV of training clips, with columns `path` and `label`")
    valid_csv: str = setting(MISSING, "CSV of clips that choose the best epoch")
    test_csv: str | None = setting(None, "CSV to report on; none: the validation clips")
    data_root: str | None = setting(None, "folder that relative paths in the CSVs start from")
    data: str = setting("", "what the clips are, kept with the weights")
    licence: str = setting("", "of the weights, kept with them")
    # result
    out: str = setting("runs/classifier.safetensors", "weights; the picture goes beside them")
    # classifier
    variant: str = setting("small", "small, or resnext29 (the SC09 protocol)")
    sample_rate: int | None = setting(None, "Hz; none: 8000 for small, 16000 for resnext29")
    seconds: float = setting(1.0, "of each clip that is listened to")
    # training
    epochs: int = setting(50, "passes over the training clips")
    batch_size: int = setting(64, "clips per optimizer step")
    lr: float | None = setting(None, "peak of the one-cycle rate; none: 3e-3 small, 1e-3 resnext29")
    weight_decay: float = setting(0.05, "AdamW's")
    augment: bool = setting(True, "vary speed, position, timbre and noise; mask bands and times")
    no_word: float = setting(0.25, "clips without a word added to each batch, as a share of it")
    seed: int = setting(0, "of everything random; same seed, same weights on a CPU")
    device: str | None = setting(None, "cpu, cuda, ...; none: the GPU if there is one")
    threads: int | None = setting(None, "CPU threads of torch; none: all cores")

    def __post_init__(self) -> None:
        limits = {"epochs": 1, "batch_size": 1, "sample_rate": 1, "threads": 1}
        for name, least in (limits | {"weight_decay": 0, "no_word": 0}).items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name}={value}: must be at least {least}")
        for name in ("lr", "seconds"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"{name}={value}: must be above 0")
        if self.variant not in NETWORKS:
            raise UserError(f"variant={self.variant}: must be {' or '.join(NETWORKS)}")
        if Path(self.out).suffix != ".safetensors":
            raise UserError(f"out={self.out}: give a name that ends in .safetensors")


def classifier_config(cfg: TrainClassifierConfig, labels: list[str]) -> ClassifierConfig:
    """The classifier that the settings ask for; raises ValueError if its clips are too short."""
    small = cfg.variant == "small"
    rate = cfg.sample_rate or (8000 if small else 16000)
    settings = {"n_fft": 2048, "hop": 512}
    if small:  # windows of about 64 ms, 40 bands up to half the rate, less of the noise floor
        n_fft = 2 ** round(math.log2(0.064 * rate))
        settings = {"n_fft": n_fft, "hop": n_fft // 4, "n_mels": 40, "top_db": 60, "amin": 1e-20}
    settings |= {"sample_rate": rate, "clip_length": round(cfg.seconds * rate)}
    return ClassifierConfig(variant=cfg.variant, labels=labels, **settings)


# ---- training -------------------------------------------------------------------------------


def batch(
    words: Words, rows: list[int], cfg: TrainClassifierConfig, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """These words, varied, and clips without one: wavs (B, T), target probabilities (B, C)."""
    wavs = words.wavs[rows].float() / 32768
    if cfg.augment:
        length = words.wavs.shape[1]
        wavs = torch.stack([vary(words.clip(i), length, rng) for i in rows])
    target = F.one_hot(words.targets[rows], len(words.labels)).float()
    n = round(cfg.no_word * len(rows))
    wavs = torch.cat([wavs, *[not_a_word(words, rng)[None] for _ in range(n)]])
    return wavs, torch.cat([target, torch.full((n, len(words.labels)), 1 / len(words.labels))])


def validation_set(valid: Words, cfg: TrainClassifierConfig) -> tuple[Tensor, Tensor]:
    """What chooses the epoch and the temperature: int16 wavs (N, T), target probabilities (N, C).

    The clips as they are, four variations of each, and among the last, clips without a word: with
    the default settings, 1 in 20. (Without those, a classifier that makes no error on words would
    be calibrated to be sure of anything.) The same for every run.
    """
    rng = torch.Generator().manual_seed(1)
    rows = list(range(len(valid)))
    words_only = replace(cfg, no_word=0.0)
    settings = [replace(words_only, augment=False), *[words_only] * 3, cfg]
    parts = [batch(valid, rows, part, rng) for part in settings]
    wavs = [(w * 32767 / w.abs().amax(1, keepdim=True).clamp(min=1)).short() for w, _ in parts]
    return torch.cat(wavs), torch.cat([target for _, target in parts])


@torch.no_grad()
def predict(clf: Classifier, wavs: Tensor, batch_size: int = 128) -> Tensor:
    """Logits (N, C) on the CPU of int16 or float wavs (N, T); the classifier in eval mode."""
    clf.eval()
    scale = 1 if wavs.is_floating_point() else 32768
    device = next(clf.parameters()).device
    return torch.cat([clf(x.to(device).float() / scale)[0].cpu() for x in wavs.split(batch_size)])


def train(
    cfg: TrainClassifierConfig, clf: Classifier, words: Words, valid: tuple[Tensor, Tensor]
) -> Iterator[tuple[int, float, float]]:
    """Trains in place. Yields after each epoch: its number, loss and validation loss."""
    rng = seeded("variations", cfg.seed)
    device = next(clf.parameters()).device
    lr = cfg.lr or (3e-3 if cfg.variant == "small" else 1e-3)
    groups = [
        {"params": [p for p in clf.parameters() if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in clf.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = cfg.epochs * -(-len(words) // cfg.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2)
    for epoch in range(1, cfg.epochs + 1):
        clf.train()
        total, n = 0.0, 0
        for rows in torch.randperm(len(words), generator=rng).split(cfg.batch_size):
            wavs, target = batch(words, rows.tolist(), cfg, rng)
            db = clf.spectrogram(wavs.to(device))
            logits = clf.net(mask(db, rng) if cfg.augment else db)[0]
            loss = F.cross_entropy(logits, target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total, n = total + float(loss.detach()) * len(wavs), n + len(wavs)
        yield epoch, total / n, float(F.cross_entropy(predict(clf, valid[0]), valid[1]))


def fit_temperature(clf: Classifier, valid: tuple[Tensor, Tensor]) -> float:
    """The T whose logits / T fit the targets best, within 1/4 and 4; put into the last layer.

    (Guo et al. 2017, arXiv:1706.04599; here with clips that are no word among the others.)
    """
    logits = predict(clf, valid[0]).double()

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_t), valid[1].double()))

    bounds = (-math.log(4), math.log(4))
    temperature = math.exp(scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x)
    with torch.no_grad():
        clf.net.classifier.weight /= temperature
        clf.net.classifier.bias /= temperature
    return temperature


# ---- the report -----------------------------------------------------------------------------


def calibration_error(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: how far confidence is from accuracy, over bins of confidence.

    probs: (N, C); labels: (N,). In [0, 1]; 0 when of the clips it is p sure of, a share p is right.
    """
    sure, right = probs.max(1), probs.argmax(1) == labels
    bin_of = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, weights=right - sure, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def evaluate(clf: Classifier, words: Words) -> tuple[dict[str, float], np.ndarray]:
    """Figures of the classifier on these clips, and its probabilities (N, C)."""
    logits = predict(clf, words.wavs)
    probs, targets = logits.softmax(1).numpy(), words.targets.numpy()
    rng = torch.Generator().manual_seed(2)
    no_words = torch.stack([not_a_word(words, rng) for _ in range(200)])
    sure_of_none = predict(clf, no_words).softmax(1).amax(1) >= SURE
    figures = {
        "clips": len(words),
        "accuracy": round(float((probs.argmax(1) == targets).mean()), 4),
        "loss": round(float(F.cross_entropy(logits, words.targets)), 4),
        "calibration_error": round(calibration_error(probs, targets), 4),
        "sure_90": round(float((probs.max(1) >= SURE).mean()), 4),
        "sure_90_no_word": round(float(sure_of_none.float().mean()), 4),
    }
    return figures, probs


# ---- the command ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(TrainClassifierConfig, argv, prog=PROG, examples=EXAMPLES)
    line = shlex.join([*PROG.split(), *(sys.argv[1:] if argv is None else argv)])
    smaller = f"take a batch_size= below {cfg.batch_size}"
    return command.run(lambda: run(cfg, line), smaller=smaller)


def run(cfg: TrainClassifierConfig, line: str) -> int:
    """Trains, reports and writes `cfg.out`, with `line`, the command as it was given.

    Returns 130 if Ctrl-C ended it early, else 0.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = usable_device(cfg.device)
    labels = read_labels(cfg.train_csv, cfg.data_root)
    config = classifier_config(cfg, labels)
    sets = {
        name: read_words(path, cfg.data_root, labels, config.sample_rate, config.clip_length)
        for name in ("train", "valid", "test")
        if (path := getattr(cfg, f"{name}_csv"))
    }
    torch.manual_seed(seed_of("weights", cfg.seed))
    clf = Classifier(config).to(device)
    n_parameters = sum(p.numel() for p in clf.parameters())
    counts = ", ".join(f"{len(words):,} {name}" for name, words in sets.items())
    print(f"{cfg.variant}, {n_parameters:,} parameters; {len(labels)} labels; clips: {counts}")

    best, best_loss, interrupted, start = {}, math.inf, False, time.monotonic()
    metadata = {"data": cfg.data, "licence": cfg.licence, "command": line}
    metadata |= {"parameters": n_parameters, "torch": torch.__version__}
    try:
        valid = validation_set(sets["valid"], cfg)
        for epoch, loss, valid_loss in train(cfg, clf, sets["train"], valid):
            mark = ""
            if valid_loss < best_loss:
                best = {k: v.detach().clone() for k, v in clf.state_dict().items()}
                best_loss, mark, metadata["epoch"] = valid_loss, " *", epoch
                save_classifier(cfg.out, clf, **metadata)
            print(
                f"epoch {epoch}/{cfg.epochs}  loss {loss:.4f}  validation {valid_loss:.4f}  "
                f"{time.monotonic() - start:.0f} s{mark}",
                flush=True,
            )
    except KeyboardInterrupt:
        if not best:
            raise
        interrupted = True
        print("interrupted: keeping the best epoch so far", file=sys.stderr)
    if not best:
        raise UserError("the loss was never finite; try a smaller lr=")

    clf.load_state_dict(best)
    metadata["temperature"] = round(fit_temperature(clf, valid), 4)
    on = "test" if "test" in sets else "valid"
    figures, probs = evaluate(clf, sets[on])
    metadata |= {on: figures, "seconds": round(time.monotonic() - start)}
    save_classifier(cfg.out, clf, **metadata)
    shares = pictures.confusion(probs, sets[on].targets.numpy())
    title = f"{figures['accuracy']:.1%} of {figures['clips']} {on} clips"
    figure = pictures.maps(
        {title: shares}, labels, "share of the clips of a row", "spoken", "heard"
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(Path(cfg.out).with_suffix(".png"), picture.getvalue())
    print(
        f"{on}: accuracy {figures['accuracy']:.2%}, loss {figures['loss']:.4f}, calibration error "
        f"{figures['calibration_error']:.3f}, at least 90 % sure of {figures['sure_90']:.1%} "
        f"(of no words: {figures['sure_90_no_word']:.1%}); "
        f"epoch {metadata['epoch']}, temperature {metadata['temperature']:.2f}"
    )
    print(f"{cfg.out}, {Path(cfg.out).with_suffix('.png').name}")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
