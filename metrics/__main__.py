"""Score a folder of generated clips: the numbers that papers print, as a table and as a page.

Clips go through a classifier; the scores compare what it says of generated and of real ones (see
metrics/scores.py). Real test clips are scored too: that is what a perfect model would get.

Protocols of the SC09 tables: 2,048 clips of a model without likelihoods are scored as they are;
of 10,240 clips of an autoregressive model, `threshold=true` uses half to choose which likelihoods
to reject, by inception score, and scores what is kept of the other half. `protocol=published`
computes each score as the published scripts do.

`nearest=true` looks for copies: the nearest training clip of every generated one (see
metrics/nearest.py).

Floors to compare with, noise and shuffled samples: python -m metrics.floors.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import logging
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rawaudio import command
from rawaudio.command import cache_folder
from rawaudio.config import parse_args, setting, to_dict
from rawaudio.errors import UserError
from rawaudio.files import write_text

from . import scores

EXAMPLES = """\
python -m metrics samples=generated real_csv=splits/fsdd-train.csv \\
  test_csv=splits/fsdd-test.csv data_root=fsdd/recordings
python -m metrics samples=sc09_10240 threshold=true protocol=published \\
  published_cache=cache classifier=resnext.pth
python -m metrics samples=splits/fsdd-test.csv real_csv=splits/fsdd-train.csv data_root=DIR"""


@dataclass
class MetricsConfig:
    # what is scored
    samples: str | None = setting(None, "generated clips: a folder, or a CSV with column `path`")
    real_csv: str | None = setting(None, "real clips to compare with, usually the training set")
    test_csv: str | None = setting(None, "other real clips, scored as if they were generated")
    data_root: str | None = setting(None, "folder that the paths of all CSVs start from")
    published_cache: str | None = setting(
        None, "folder with train_probs.npy, train_activations.npy, in place of real_csv; test_* too"
    )
    n_max: int | None = setting(None, "score at most so many samples, drawn at random")

    # how
    classifier: str = setting("digits", "digits (shipped, 8 kHz), or a file: .safetensors, .pth")
    pad_mode: str | None = setting(
        None, "reflect, for a published .pth that was trained with a librosa before 0.9"
    )
    protocol: str = setting("exact", "exact or published, of every score")
    threshold: bool = setting(False, "reject by likelihood: tune on one half, score the other")
    nearest: bool = setting(False, "distance of each clip to its nearest real one: finds copies")
    bins: int = setting(50, "of NDB")
    bootstrap: int = setting(0, "resamplings for 95 % intervals, such as 200; 0: no intervals")
    seed: int = setting(0, "of halves, bins, resamplings and n_max")
    batch_size: int = setting(64, "clips at once")
    device: str | None = setting(None, "cpu, cuda, ...; none: the GPU if there is one")

    # where it goes
    out_dir: str | None = setting(
        None, "folder of scores.json, .md, .html; none: the folder of the samples, else scores"
    )
    page: bool = setting(True, "write scores.html, a page with pictures and players")
    cache_dir: str | None = setting(
        "~/.cache/simple-sashimi/metrics", "what the classifier said, by file content; none: off"
    )

    def __post_init__(self) -> None:
        if not (self.samples or self.real_csv or self.test_csv or self.published_cache):
            raise UserError("samples is required: write samples=FOLDER")
        if self.threshold and not self.samples:
            raise UserError("threshold=true rejects samples: write samples=FOLDER")
        if self.real_csv and self.published_cache:
            raise UserError("real_csv and published_cache are two sets of real clips: leave one")
        if self.nearest and not self.real_csv:
            raise UserError("nearest=true compares with the audio of real clips: write real_csv=")
        if self.protocol not in scores.PROTOCOLS:
            expected = " or ".join(scores.PROTOCOLS)
            raise UserError(f"protocol={self.protocol}: expected {expected}")
        for name, least in (("bins", 1), ("batch_size", 1), ("n_max", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value}: must be at least {least}")
        if self.bootstrap != 0 and self.bootstrap < 2:
            raise UserError(f"bootstrap={self.bootstrap}: must be 0, or at least 2")


def parse(argv: list[str] | None = None) -> MetricsConfig:
    """The settings. Ends the process, with one line, for those that cannot be followed."""
    return parse_args(MetricsConfig, argv, prog="python -m metrics", examples=EXAMPLES)


if __name__ == "__main__":  # answered before the imports below, which take seconds
    parse()

import numpy as np

from rawaudio.data import SAMPLES, Clip

from . import nearest
from . import report as reports
from .features import ClipSet, extract, listed, load_arrays, read_published, save_arrays
from .report import Report, Row


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: see `command.run`."""
    cfg = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    kept = "; what the classifier said so far is kept" if cfg.cache_dir else ""
    smaller = f"take a batch_size= below {cfg.batch_size}"
    return command.run(lambda: _score(cfg), kept=lambda: kept, smaller=smaller)


def _score(cfg: MetricsConfig) -> None:
    """Scores what the settings name; writes and prints it."""
    out = _folder(cfg)
    result = run(cfg)
    write_text(out / "scores.json", reports.as_json(result))
    write_text(out / "scores.md", reports.markdown(result))
    if cfg.page:
        write_text(out / "scores.html", reports.page(result))
    print(reports.plain(result))
    for note in result.notes:
        print(f"- {note}")
    names = "scores.json, scores.md" + ", scores.html" * cfg.page
    print(f"{names} in {out}")


def run(cfg: MetricsConfig, classifier: Any = None) -> Report:
    """Scores everything that the settings name; writes nothing but the cache.

    classifier: takes the place of the one in the settings; see metrics/classifier.py. Raises
    ValueError (CheckpointError is one) or OSError for what cannot be read or scored.
    """
    sets, classifier = _sets(cfg, classifier)
    notes = [f"protocol: {cfg.protocol}"] + _losses(sets)
    facts = {"settings": to_dict(cfg), "protocol": cfg.protocol}
    labels = [str(i) for i in range(next(iter(sets.values())).probs.shape[1])]
    if classifier is not None:
        labels = classifier.labels
        facts["classifier"] = {"name": cfg.classifier, "fingerprint": classifier.fingerprint}
    if cfg.threshold:
        n_test = len(sets["test"]) if "test" in sets else 0
        sets["generated"], thresholds = reject(sets["generated"], cfg, n_test)
        facts["thresholds"] = thresholds
        notes.append(_rejection(cfg, thresholds, len(sets["generated"])))

    real = sets.get("real")
    centres, bins = None, None
    if real is not None:
        centres = bin_centres(real, cfg)
        last = sets[list(sets)[-1]]
        bins = scores.ndb_bins(real.features, last.features, centres=centres)
    else:
        notes.append("FID, AM and NDB need real clips: real_csv= or published_cache=")
    rows = [
        Row(kind, _name(cfg, kind), len(found), *score(found, real, centres, labels, cfg))
        for kind, found in sets.items()
    ]
    if real is not None and (few := [row for row in rows if 1 < row.clips < 2048]):
        counts = ", ".join(f"{row.name} {row.clips:,}" for row in few)
        notes.append(
            f"few clips raise FID: compare sets of one size ({counts}; papers score 2,048 or more)"
        )
    for kind, found in sets.items():
        if any(clip.label for clip in found.clips) and reports.truth(found, labels) is None:
            notes.append(
                f"{kind}: no accuracy, its labels are not the classifier's ({labels[0]} ..)"
            )
    title = f"Scores of {_name(cfg, list(sets)[-1])}"
    result = Report(title, rows, notes, labels, sets, bins, facts)
    if cfg.nearest:
        _add_nearest(result, classifier, cfg.seed)
    return result


def score(
    found: ClipSet,
    real: ClipSet | None,
    centres: np.ndarray | None,
    labels: list[str],
    cfg: MetricsConfig,
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """All scores of one set, and their 95 % intervals where cfg.bootstrap asks for them."""
    if len(found) < 2:
        raise UserError(f"{found.name}: one clip has no scores, give at least 2")
    protocol = {"protocol": cfg.protocol}
    functions = {
        "is": (partial(scores.inception_score, **protocol), found.probs),
        "mis": (partial(scores.modified_inception_score, **protocol), found.probs),
        "sure": (lambda p: float((p.max(1) >= reports.SURE).mean()), found.probs),
    }
    if real is not None:
        distance = partial(scores.fid, real.features, **protocol)
        different = partial(scores.ndb, real.features, centres=centres)
        functions |= {
            "fid": (distance, found.features),
            "am": (partial(scores.am_score, real.probs, **protocol), found.probs),
            "ndb": (different, found.features),
        }
    if (known := reports.truth(found, labels)) is not None:
        right = found.probs.argmax(1) == known
        for key, hits in (("accuracy", right), ("heard", reports.heard(found, known))):
            functions[key] = (np.mean, hits.astype(float)[:, None])
    values, intervals = {}, {}
    for key, (function, array) in functions.items():
        values[key] = float(function(array))
        if cfg.bootstrap and found is not real:
            low, high = scores.bootstrap(function, array, n=cfg.bootstrap, seed=cfg.seed)
            share = key in ("ndb", "sure", "accuracy", "heard")
            intervals[key] = max(low, 0.0), min(high, 1.0) if share else high
    return values, intervals


def bin_centres(real: ClipSet, cfg: MetricsConfig) -> np.ndarray:
    """Centres of the bins of NDB (bins, D), kept too: for SC09 they take half a minute."""
    if len(real) < cfg.bins:
        raise UserError(f"bins={cfg.bins}: at most as many as there are real clips, {len(real):,}")
    n_init = scores.STARTS[cfg.protocol]
    key = hashlib.sha256(Path(scores.__file__).read_bytes() + real.features.tobytes())
    key.update(f"{real.features.shape} {cfg.bins} {cfg.seed} {n_init}".encode())
    path = cache_folder(cfg.cache_dir or ".") / f"bins-{key.hexdigest()[:24]}.npz"
    found = load_arrays(path) if cfg.cache_dir else None
    if found is not None and "centres" in found:
        return found["centres"]
    centres = scores.kmeans(real.features, cfg.bins, cfg.seed, n_init)
    if cfg.cache_dir:
        save_arrays(path, centres=centres)
    return centres


# ---- likelihood rejection -------------------------------------------------------------------


def by_likelihood(folder: Path, clips: list[Clip]) -> list[Clip]:
    """Clips with the lowest log-likelihood first, where the folder tells it: by samples.csv or, of
    other programs, log_likelihood.csv (columns file, log_likelihood); else as they come.

    Raises ValueError for a clip that the file does not list, or a value that is no number.
    """
    path = _likelihoods(folder)
    if path is None:
        return clips
    try:
        with path.open(encoding="utf-8", newline="") as file:
            values = {
                row["file"]: float(row["log_likelihood"] or "nan") for row in csv.DictReader(file)
            }
        found = [values[clip.path.name] for clip in clips]
    except (KeyError, csv.Error) as error:
        raise UserError(
            f"{path} lacks {error}: columns file,log_likelihood, a row per clip"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if any(math.isnan(value) for value in found):
        raise UserError(
            f"{path} has clips without a value: generate the clips again, or leave threshold= out"
        )
    return [clips[i] for i in np.argsort(found, kind="stable")]


def _likelihoods(folder: Path) -> Path | None:
    """The table that has the clips' log-likelihoods."""
    for name in (SAMPLES, "log_likelihood.csv"):
        with (
            contextlib.suppress(FileNotFoundError, UnicodeDecodeError),
            (folder / name).open(encoding="utf-8") as file,
        ):
            if "log_likelihood" in file.readline():
                return folder / name
    return None


def reject(found: ClipSet, cfg: MetricsConfig, n_test: int) -> tuple[ClipSet, dict[str, Any]]:
    """What is scored of a set in order of likelihood, and how that was decided."""
    n = len(found)
    if n < 20:
        raise UserError(f"threshold=true needs at least 20 clips that can be read, not {n}")
    tune, held = scores.split_halves(n, protocol=cfg.protocol, seed=cfg.seed, n_test=n_test)
    lower, upper = scores.tune_thresholds(found.probs[tune], cfg.protocol)
    chosen = held[scores.kept(len(held), lower, upper)]
    facts = {"lower": lower, "upper": upper, "tuned_on": len(tune), "kept_of": len(held)}
    return found.take(chosen), facts


def _add_nearest(result: Report, classifier: Any, seed: int) -> None:
    """Nearest neighbours in the table, the facts and the notes of a report."""
    found = nearest.neighbours(result.sets, classifier.sample_rate, classifier.clip_length, seed)
    limit = nearest.copy_limit(found["real"])
    result.nearest, result.copy_limit = found, limit
    facts = {kind: nearest.summary(near, limit) for kind, near in found.items()}
    pairs = {kind: reports.closest(result, kind) for kind in found}
    result.facts["nearest"] = {"unit": "dB", "copy_limit": limit} | {
        kind: facts[kind] | {"closest": pairs[kind]} for kind in found
    }
    for row in result.rows:
        about = facts[row.kind]
        if about["silent"]:
            result.notes.append(f"{row.kind}: no nearest clip of {about['silent']:,} silent ones")
        if not about["clips"]:
            continue
        row.scores["nearest"] = about["median"]
        result.notes.append(
            f"{row.kind}: nearest {'other ' * (row.kind == 'real')}real clip at "
            f"{about['median']:.2f} dB (median), {about['percentile_5']:.2f} (5 %), "
            f"{about['percentile_1']:.2f} (1 %), {about['minimum']:.2f} (the least); "
            f"{about['copies']:,} of {about['clips']:,} below {limit:.2f} dB"
        )
        if about["copies"] and row.kind != "real":
            first = pairs[row.kind][0]
            result.notes.append(
                f"{row.kind}: {about['copies']:,} of its clips count as copies of real ones, above "
                f"all {Path(first['file']).name} of {Path(first['nearest']).name} "
                f"({first['distance']:.2f} dB)"
            )


def _rejection(cfg: MetricsConfig, facts: dict[str, Any], n: int) -> str:
    table = _likelihoods(Path(cfg.samples))
    order = table.name if table else "the clips' own order, lowest first"
    return (
        f"rejection: likelihoods from {facts['lower']:.0%} to {facts['upper']:.0%}, tuned on "
        f"{facts['tuned_on']:,} clips, keep {n:,} of the other {facts['kept_of']:,} "
        f"(by {order})"
    )


# ---- around it ------------------------------------------------------------------------------


def _sets(cfg: MetricsConfig, classifier: Any) -> tuple[dict[str, ClipSet], Any]:
    """The sets of clips, real ones first, and the classifier if there was need of one."""
    wanted = {"real": cfg.real_csv, "test": cfg.test_csv, "generated": cfg.samples}
    files = {kind: listed(source, cfg.data_root) for kind, source in wanted.items() if source}
    if cfg.n_max and len(files.get("generated", [])) > cfg.n_max:
        rng = np.random.default_rng(cfg.seed)
        chosen = np.sort(rng.permutation(len(files["generated"]))[: cfg.n_max])
        files["generated"] = [files["generated"][i] for i in chosen]
    if cfg.threshold:
        files["generated"] = by_likelihood(Path(cfg.samples), files["generated"])
    if files and classifier is None:
        from .classifier import load_classifier

        classifier = load_classifier(cfg.classifier, device=cfg.device, pad_mode=cfg.pad_mode)

    sets = _published(cfg, classifier)
    for kind, clips in files.items():
        sets[kind] = extract(
            kind, clips, classifier, batch_size=cfg.batch_size, cache_dir=cfg.cache_dir,
            source=wanted[kind],
        )  # fmt: skip
    return {kind: sets[kind] for kind in wanted if kind in sets}, classifier


def _published(cfg: MetricsConfig, classifier: Any) -> dict[str, ClipSet]:
    """Sets of the published cache: real ones, and test clips where it has them."""
    if not cfg.published_cache:
        return {}
    widths = (len(classifier.labels), classifier.n_features) if classifier else (None, None)
    sets = {"real": read_published("real", cfg.published_cache, "train", *widths)}
    if not cfg.test_csv and Path(cfg.published_cache, "test_probs.npy").is_file():
        sets["test"] = read_published("test", cfg.published_cache, "test", *widths)
    return sets


def _losses(sets: dict[str, ClipSet]) -> list[str]:
    """What could not be read or was changed, in words; the files go to stderr."""
    notes = [f"{kind}: {text}" for kind, found in sets.items() for text in found.changed]
    for kind, found in sets.items():
        if found.broken:
            total = len(found) + len(found.broken)
            notes.append(
                f"{kind}: {len(found):,} of {total:,} clips used, {len(found.broken):,} broken "
                "(listed in scores.json)"
            )
            for clip, reason in found.broken[:10]:
                print(f"left out {clip}: {reason}", file=sys.stderr)
            if len(found.broken) > 10:
                print(f"left out {len(found.broken) - 10:,} more", file=sys.stderr)
    return notes


def _name(cfg: MetricsConfig, kind: str) -> str:
    return Path(cfg.samples).resolve().name if kind == "generated" else kind


def _folder(cfg: MetricsConfig) -> Path:
    """Where the results go; OSError now rather than after an hour of work."""
    samples = Path(cfg.samples or "")
    out = Path(cfg.out_dir or (samples if cfg.samples and samples.is_dir() else "scores"))
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"{out} cannot be written to: write out_dir= for another folder")
    return out


if __name__ == "__main__":
    sys.exit(main())
