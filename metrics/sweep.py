"""Choose how to sample: scores of clips that were generated with several settings, as curves.

`rawaudio.generate` leaves the settings in its folders. `real_csv` is a validation set: clips that
choose the settings say nothing of the result any more.
"""

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING
from scipy.stats import entropy

from metrics import scores
from metrics.classifier import Classifier, load_classifier
from metrics.features import SURE, ClipSet, extract, listed
from rawaudio import command
from rawaudio.config import as_written, parse_args, setting
from rawaudio.errors import UserError
from rawaudio.files import write_atomically
from rawaudio.page import new_figure

EXAMPLES = r"""
python -m rawaudio.generate out_dir=sweep/0.8 temperature=0.8 n_samples=300
python -m rawaudio.generate out_dir=sweep/0.9 temperature=0.9 n_samples=300
python -m metrics.sweep samples=[sweep/0.8,sweep/0.9] real_csv=splits/fsdd-valid.csv \
    data_root=fsdd/recordings out=sweep.png"""

# that may differ
SETTINGS = ("temperature", "nucleus_p", "top_k", "guidance", "steps", "sampler", "length")


@dataclass
class SweepConfig:
    samples: list[str] = setting(MISSING, "folders of generated clips, at least two")
    real_csv: str = setting(MISSING, "CSV of real clips that FID compares with: validation clips")
    data_root: str | None = setting(None, "folder that relative paths start from")
    over: str = setting("temperature", f"the horizontal axis: {', '.join(SETTINGS)}")
    classifier: str = setting("digits", "digits (shipped, 8 kHz), or a file: .safetensors, .pth")
    out: str = setting("sweep.png", "the picture, .png or .webp")
    cache_dir: str | None = setting(
        "~/.cache/simple-sashimi/metrics", "what the classifier said, by file content; none: off"
    )

    def __post_init__(self) -> None:
        if self.over not in SETTINGS:
            raise UserError(f"over={self.over}: must be one of {', '.join(SETTINGS)}")
        if len(self.samples) < 2:
            raise UserError(f"samples={as_written(self.samples)}: give two folders or more")
        if Path(self.out).suffix not in (".png", ".webp"):
            raise UserError(f"out={self.out}: must end in .png or .webp")


@dataclass
class Point:
    """One folder: its settings and scores."""

    settings: dict[str, Any]
    clips: int
    fid: float
    sure: float
    spread: float  # how evenly the sure clips are spread over the classes: entropy, 1 is even
    heard: float | None  # sure, and of what was told; None where nothing was


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(SweepConfig, argv, prog="python -m metrics.sweep", examples=EXAMPLES)
    return command.run(lambda: sweep(cfg))


def sweep(cfg: SweepConfig) -> None:
    """Prints the table and writes the picture."""
    points = measure(cfg)
    write_atomically(cfg.out, picture(points, cfg.over, Path(cfg.out).suffix[1:]))
    print(table(points))
    print(f"picture: {cfg.out}")


def measure(cfg: SweepConfig, classifier: Classifier | None = None) -> list[Point]:
    """A point for each folder, in the order of `over`; settings that all share are left out.

    Raises ValueError for a folder without settings or without that one, OSError for none.
    """
    settings = [_settings(Path(folder)) for folder in cfg.samples]
    for folder, own in zip(cfg.samples, settings, strict=True):
        if not isinstance(own.get(cfg.over), int | float):
            raise UserError(f"{folder}: its clips have no {cfg.over}; over= names another setting")
    names = [cfg.over]
    for name in SETTINGS:
        if name != cfg.over and len({repr(own.get(name)) for own in settings}) > 1:
            names.append(name)
    classifier = classifier or load_classifier(cfg.classifier)

    def clips(kind: str, source: str) -> ClipSet:
        rows = listed(source, cfg.data_root)
        return extract(kind, rows, classifier, cache_dir=cfg.cache_dir, source=source)

    real = clips("real", cfg.real_csv)
    points = []
    for folder, own in zip(cfg.samples, settings, strict=True):
        made = clips("generated", folder)
        truth = made.truth(classifier.labels)
        sure = made.probs.max(1) >= SURE
        counts = np.bincount(made.probs[sure].argmax(1), minlength=made.probs.shape[1])
        point = Point(
            settings={name: own.get(name) for name in names},
            clips=len(made),
            fid=scores.fid(real.features, made.features),
            sure=float(sure.mean()),
            spread=evenness(counts),
            heard=None if truth is None else float(made.heard(truth).mean()),
        )
        points.append(point)
    return sorted(points, key=lambda point: point.settings[cfg.over])


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / ".generate" / "settings.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        raise UserError(
            f"{folder}: no {path.relative_to(folder)} in it; python -m rawaudio.generate "
            f"out_dir={folder} makes such a folder"
        ) from None


def evenness(counts: np.ndarray) -> float:
    """Entropy of the counts (C,) over that of equal ones; 0 where there are none."""
    return float(entropy(counts, base=len(counts))) if counts.any() else 0.0


def table(points: list[Point]) -> str:
    """Markdown: a row for each folder."""
    names = list(points[0].settings)
    heads = [*names, "clips", "FID ↓", f"≥ {SURE:.0%} sure ↑", "evenness of their classes ↑"]
    lines = [
        [
            *(as_written(value) for value in point.settings.values()),
            *(f"{point.clips:,}", f"{point.fid:.2f}", f"{point.sure:.1%}", f"{point.spread:.2f}"),
        ]
        for point in points
    ]
    if all(point.heard is not None for point in points):
        heads.append("heard, of what was told ↑")
        for line, point in zip(lines, points, strict=True):
            line.append(f"{point.heard:.1%}")
    lines = [heads, ["--:"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(points: list[Point], over: str, form: str) -> bytes:
    """FID and share of sure clips over that setting, a line for each value of the others."""
    lines: dict[str, list[Point]] = {}
    for point in points:
        others = [f"{k} {as_written(v)}" for k, v in point.settings.items() if k != over]
        lines.setdefault(", ".join(others), []).append(point)
    told = all(point.heard is not None for point in points)
    figure = new_figure(8, 3.2, dpi=120)
    left, right = figure.subplots(1, 2)
    for label, row in lines.items():
        x = [point.settings[over] for point in row]
        left.plot(x, [point.fid for point in row], marker=".", label=label)
        (line,) = right.plot(x, [100 * point.sure for point in row], marker=".", label=label)
        if told:
            heard = [100 * point.heard for point in row]
            right.plot(x, heard, marker=".", linestyle="--", color=line.get_color())
    left.set(xlabel=over, ylabel="FID to validation clips")
    dashed = "\n(dashed: of what was told)" * told
    right.set(xlabel=over, ylabel=f"% of clips, ≥ {SURE:.0%} sure{dashed}", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        left.legend(frameon=False, fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format=form)
    return data.getvalue()


if __name__ == "__main__":
    sys.exit(main())
