"""Choose the clips of a listening study, as published: per class, those a classifier is surest of.

out_dir/METHOD/0.wav, 1.wav, ...: class by class, so that the class of a clip is its number divided
by `samples_per_class`. Where a class has fewer clips, its last numbers are missing; nothing else
takes their place. Clips are mono, 16-bit, and hold nothing but audio: no tag names their method.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from metrics.classifier import Classifier, load_classifier
from metrics.features import extract, listed
from metrics.study.layout import check_method, new_folder, write_table
from rawaudio import audio, command
from rawaudio.config import as_written, check_allowed, parse_args, setting
from rawaudio.data import Clip, read_clip
from rawaudio.errors import UserError
from rawaudio.progress import watched

EXAMPLES = """\
python -m metrics.study select methods=[clips/sashimi,clips/asgan] names=[sashimi,asgan]
python -m metrics.study select methods=[splits/fsdd-test.csv] names=[test] \\
  data_root=fsdd/recordings samples_per_class=20
python -m metrics.study select methods=[piano,recorded] samples_per_class=none"""

COLUMNS = ("path", "label", "probability", "told", "source")  # of selected.csv


@dataclass
class SelectConfig:
    methods: list[str] = setting(MISSING, "folders of clips, or CSVs with a column `path`")
    names: list[str] | None = setting(
        None, "what the methods are called; none: as their folders and CSVs"
    )
    data_root: str | None = setting(None, "folder that the paths of CSVs start from")
    out_dir: str = setting("study/clips", "folder that gets a folder of each method")
    n_samples: int | None = setting(
        None, "look at the first so many clips of each method; none: all. Of more, surer ones", ">0"
    )
    samples_per_class: int | None = setting(
        50,
        "clips of each class, the surest first to be chosen; none: all clips, unclassified",
        ">0",
    )
    classifier: str = setting("digits", "digits (shipped, 8 kHz), or a file: .safetensors, .pth")
    pad_mode: str | None = setting(
        None, "reflect, for a published .pth that was trained with a librosa before 0.9"
    )
    batch_size: int = setting(64, "clips at once", ">0")
    device: str | None = setting(None, "cpu, cuda, ...; none: the GPU if there is one")
    cache_dir: str | None = setting(
        "~/.cache/simple-sashimi/metrics", "what the classifier said, by file content; none: off"
    )

    def __post_init__(self) -> None:
        check_allowed(self)
        if not self.methods:
            raise UserError("methods=[]: give folders of clips, or CSVs")
        if self.names is None:
            paths = map(Path, self.methods)
            self.names = [p.stem if p.suffix == ".csv" else p.resolve().name for p in paths]
        if len(self.names) != len(self.methods):
            raise UserError(
                f"names={as_written(self.names)}: {len(self.methods)} methods need one each"
            )
        for name, count in Counter(self.names).items():
            check_method(name, "names")
            if count > 1:
                raise UserError(
                    f"{count} methods are called {name}: tell them apart with names=[...]"
                )


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(SelectConfig, argv, prog="python -m metrics.study select", examples=EXAMPLES)
    return command.run(lambda: select(cfg))


def select(cfg: SelectConfig, classifier: Classifier | None = None) -> None:
    """Writes a folder for each method. Raises UserError for one that is there, or without clips.

    classifier: takes the place of the one in the settings.
    """
    folders = [Path(cfg.out_dir, name) for name in cfg.names]
    if there := [str(folder) for folder in folders if folder.exists()]:
        raise UserError(f"{there[0]} is there already and is not overwritten: write out_dir=")
    sources = [listed(method, cfg.data_root)[: cfg.n_samples] for method in cfg.methods]
    if cfg.samples_per_class and classifier is None:
        classifier = load_classifier(cfg.classifier, device=cfg.device, pad_mode=cfg.pad_mode)
    for folder, method, clips in zip(folders, cfg.methods, sources, strict=True):
        if cfg.samples_per_class:
            rows, summary = _surest(cfg, classifier, folder.name, method, clips)
        else:
            rows = [{"path": f"{i}.wav", "label": c.label, "clip": c} for i, c in enumerate(clips)]
            summary = f"all {len(rows):,} clips"
        _write(folder, rows)
        print(f"{folder}: {summary}")
    if len(counts := {len(clips) for clips in sources}) > 1 and cfg.samples_per_class:
        most = f"n_samples={min(counts)}"
        print(
            f"methods had {min(counts):,} to {max(counts):,} clips to choose from: {most} is fair"
        )


def _surest(
    cfg: SelectConfig, classifier: Classifier, name: str, method: str, clips: list[Clip]
) -> tuple[list[dict[str, Any]], str]:
    """Rows of the chosen clips, and what to say of them."""
    made = extract(
        name, clips, classifier, batch_size=cfg.batch_size, cache_dir=cfg.cache_dir, source=method
    )
    for clip, reason in made.broken:
        print(f"{name}: left out {clip}: {reason}")
    likeliest, n = made.probs.argmax(1), cfg.samples_per_class
    rows, short = [], []
    for label, word in enumerate(classifier.labels):
        of_class = np.flatnonzero(likeliest == label)
        surest = np.argsort(-made.probs[of_class, label], kind="stable")[:n]
        for i, row in enumerate(np.sort(of_class[surest])):  # published: in the clips' own order
            clip, told = made.clips[row], made.clips[row].label
            about = {"label": word, "probability": made.probs[row, label], "told": told}
            rows.append({"path": f"{label * n + i}.wav", **about, "clip": clip})
        if len(surest) < n:
            short.append(f"{word} {len(surest)}")
    summary = f"{len(rows):,} of {len(made):,} clips, {n} of each class"
    return rows, summary + (f"; fewer of {', '.join(short)}" if short else "")


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The clips and selected.csv, a data set of them."""
    with new_folder(folder, "write out_dir=") as draft:
        for row in watched(rows, f"writing {folder.name}", len(rows)):
            sound = read_clip(clip := row.pop("clip"))
            audio.write(draft / row["path"], sound.wav, sound.rate)
            row["source"] = str(clip)
        write_table(draft / "selected.csv", rows, COLUMNS)
