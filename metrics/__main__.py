"""Score a folder of generated clips: the numbers that papers print, as a table and as a page.

A classifier hears the clips; the scores compare its outputs for generated and for real ones (see
metrics/scores.py). Real test clips are scored too: a perfect model would get their scores.

Protocols of the SC09 tables: 2,048 clips of a model without likelihoods are scored as they are;
of 10,240 clips of an autoregressive model, `threshold=true` uses half to choose which likelihoods
to reject, by inception score, and scores the clips of the other half that are not rejected.
`protocol=published` computes each score as the published scripts do.

`nearest=true` looks for copies: the nearest training clip of every generated one (see
metrics/nearest.py).

Floors to compare with, noise and shuffled samples: python -m metrics.floors.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from metrics import nearest, report, scores
from metrics.classifier import Classifier, load_classifier
from metrics.features import (
    SURE,
    ClipSet,
    extract,
    listed,
    load_arrays,
    read_published,
    save_arrays,
)
from metrics.rejection import by_likelihood, likelihood_file, reject
from metrics.report import Report, Row
from rawaudio import command
from rawaudio.command import cache_folder
from rawaudio.config import parse_args, setting, to_dict
from rawaudio.errors import UserError
from rawaudio.files import write_text

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


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: see `command.run`."""
    cfg = parse_args(MetricsConfig, argv, prog="python -m metrics", examples=EXAMPLES)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cached = "; clips that were classified are in the cache" if cfg.cache_dir else ""
    smaller = f"take a batch_size= below {cfg.batch_size}"
    return command.run(lambda: _score(cfg), kept=lambda: cached, smaller=smaller)


def _score(cfg: MetricsConfig) -> None:
    """Scores the sets of the settings; writes and prints the report."""
    samples = Path(cfg.samples or "")
    out = Path(cfg.out_dir or (samples if cfg.samples and samples.is_dir() else "scores"))
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):  # now rather than after an hour of work
        raise PermissionError(f"{out} cannot be written to: write out_dir= for another folder")
    result = run(cfg)
    write_text(out / "scores.json", report.as_json(result))
    write_text(out / "scores.md", report.markdown(result))
    if cfg.page:
        report.write_page(out / "scores.html", result)
    print(report.plain(result))
    for note in result.notes:
        print(f"- {note}")
    names = "scores.json, scores.md" + ", scores.html" * cfg.page
    print(f"{names} in {out}")


def run(cfg: MetricsConfig, classifier: Classifier | None = None) -> Report:
    """Scores all sets of the settings; writes nothing but the cache.

    classifier: takes the place of the one in the settings. Raises ValueError (CheckpointError is
    one) or OSError for what cannot be read or scored.
    """
    sets, classifier = _sets(cfg, classifier)
    notes = [f"protocol: {cfg.protocol}", *_losses(sets)]
    facts = {"settings": to_dict(cfg), "protocol": cfg.protocol}
    labels = [str(i) for i in range(next(iter(sets.values())).probs.shape[1])]
    if classifier is not None:
        labels = classifier.labels
        facts["classifier"] = {"name": cfg.classifier, "fingerprint": classifier.fingerprint}
    if cfg.threshold:
        n_test = len(sets["test"]) if "test" in sets else 0
        sets["generated"], facts["thresholds"] = reject(
            sets["generated"], cfg.protocol, cfg.seed, n_test
        )
        notes.append(_rejection(cfg, facts["thresholds"], len(sets["generated"])))

    names = {kind: kind for kind in sets}
    if cfg.samples:
        names["generated"] = Path(cfg.samples).resolve().name
    real, last = sets.get("real"), list(sets)[-1]
    centres = bins = None
    if real is None:
        notes.append("FID, AM and NDB need real clips: real_csv= or published_cache=")
    else:
        centres = bin_centres(real, cfg)
        bins = scores.ndb_bins(real.features, sets[last].features, centres)
    rows = [
        Row(kind, names[kind], len(clips), *score(clips, real, centres, labels, cfg))
        for kind, clips in sets.items()
    ]
    if real is not None and (few := [row for row in rows if 1 < row.clips < 2048]):
        counts = ", ".join(f"{row.name} {row.clips:,}" for row in few)
        notes.append(
            f"few clips raise FID: compare sets of one size ({counts}; papers score 2,048 or more)"
        )
    for kind, clips in sets.items():
        if any(clip.label for clip in clips.clips) and clips.truth(labels) is None:
            notes.append(
                f"{kind}: no accuracy, its labels are not the classifier's ({labels[0]} ..)"
            )
    result = Report(f"Scores of {names[last]}", rows, notes, labels, sets, bins, facts)
    if cfg.nearest:
        _add_nearest(result, classifier, cfg.seed)
    return result


def score(
    clips: ClipSet,
    real: ClipSet | None,
    centres: np.ndarray | None,
    labels: list[str],
    cfg: MetricsConfig,
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """All scores of one set, and their 95 % intervals where cfg.bootstrap asks for them."""
    if len(clips) < 2:
        raise UserError(f"{clips.name}: one clip has no scores, give at least 2")
    protocol = {"protocol": cfg.protocol}
    functions = {
        "is": (partial(scores.inception_score, **protocol), clips.probs),
        "mis": (partial(scores.modified_inception_score, **protocol), clips.probs),
        "sure": (lambda p: float((p.max(1) >= SURE).mean()), clips.probs),
    }
    if real is not None:
        functions["fid"] = (partial(scores.fid, real.features, **protocol), clips.features)
        functions["am"] = (partial(scores.am_score, real.probs, **protocol), clips.probs)
        functions["ndb"] = (partial(scores.ndb, real.features, centres=centres), clips.features)
    if (truth := clips.truth(labels)) is not None:
        right = clips.probs.argmax(1) == truth
        for key, hits in (("accuracy", right), ("heard", clips.heard(truth))):
            functions[key] = (np.mean, hits.astype(float)[:, None])
    values, intervals = {}, {}
    for key, (function, array) in functions.items():
        values[key] = float(function(array))
        if cfg.bootstrap and clips is not real:
            low, high = scores.bootstrap(function, array, n=cfg.bootstrap, seed=cfg.seed)
            share = key in ("ndb", "sure", "accuracy", "heard")
            intervals[key] = max(low, 0.0), min(high, 1.0) if share else high
    return values, intervals


def bin_centres(real: ClipSet, cfg: MetricsConfig) -> np.ndarray:
    """Centres of the bins of NDB (bins, D), from the cache if there: SC09 takes half a minute."""
    if len(real) < cfg.bins:
        raise UserError(f"bins={cfg.bins}: at most as many as there are real clips, {len(real):,}")
    n_init = scores.STARTS[cfg.protocol]
    key = hashlib.sha256(Path(scores.__file__).read_bytes() + real.features.tobytes())
    key.update(f"{real.features.shape} {cfg.bins} {cfg.seed} {n_init}".encode())
    path = cache_folder(cfg.cache_dir or ".") / f"bins-{key.hexdigest()[:24]}.npz"
    cached = load_arrays(path) if cfg.cache_dir else None
    if cached is not None and "centres" in cached:
        return cached["centres"]
    centres = scores.kmeans(real.features, cfg.bins, cfg.seed, n_init)
    if cfg.cache_dir:
        save_arrays(path, centres=centres)
    return centres


# ---- parts of a report ----------------------------------------------------------------------


def _sets(
    cfg: MetricsConfig, classifier: Classifier | None
) -> tuple[dict[str, ClipSet], Classifier | None]:
    """The sets of clips, real ones first, and the classifier if there was need of one."""
    sources = {"real": cfg.real_csv, "test": cfg.test_csv, "generated": cfg.samples}
    files = {kind: listed(source, cfg.data_root) for kind, source in sources.items() if source}
    if cfg.n_max and len(files.get("generated", [])) > cfg.n_max:
        order = np.random.default_rng(cfg.seed).permutation(len(files["generated"]))
        files["generated"] = [files["generated"][i] for i in np.sort(order[: cfg.n_max])]
    if cfg.threshold:
        files["generated"] = by_likelihood(Path(cfg.samples), files["generated"])
    if files and classifier is None:
        classifier = load_classifier(cfg.classifier, device=cfg.device, pad_mode=cfg.pad_mode)
    sets = {}
    if cfg.published_cache:
        sets["real"] = read_published("real", cfg.published_cache, "train", classifier)
        if not cfg.test_csv and Path(cfg.published_cache, "test_probs.npy").is_file():
            sets["test"] = read_published("test", cfg.published_cache, "test", classifier)
    options = {"batch_size": cfg.batch_size, "cache_dir": cfg.cache_dir}
    for kind, clips in files.items():
        sets[kind] = extract(kind, clips, classifier, source=sources[kind], **options)
    return sets, classifier


def _losses(sets: dict[str, ClipSet]) -> list[str]:
    """Notes on clips that could not be read or were changed; the files go to stderr."""
    notes = [f"{kind}: {text}" for kind, clips in sets.items() for text in clips.changed]
    for kind, clips in sets.items():
        if clips.broken:
            total = len(clips) + len(clips.broken)
            notes.append(
                f"{kind}: {len(clips):,} of {total:,} clips used, {len(clips.broken):,} broken "
                "(listed in scores.json)"
            )
            for clip, reason in clips.broken[:10]:
                print(f"left out {clip}: {reason}", file=sys.stderr)
            if len(clips.broken) > 10:
                print(f"left out {len(clips.broken) - 10:,} more", file=sys.stderr)
    return notes


def _rejection(cfg: MetricsConfig, facts: dict[str, Any], n: int) -> str:
    file = likelihood_file(Path(cfg.samples))
    order = file.name if file else "the clips' own order, lowest first"
    return (
        f"rejection: likelihoods from {facts['lower']:.0%} to {facts['upper']:.0%}, tuned on "
        f"{facts['tuned_on']:,} clips, keep {n:,} of the other {facts['kept_of']:,} "
        f"(by {order})"
    )


def _add_nearest(result: Report, classifier: Classifier, seed: int) -> None:
    """Nearest neighbours in the table, the facts and the notes of a report."""
    rate, length = classifier.sample_rate, classifier.clip_length
    result.nearest = nearest.neighbours(result.sets, rate, length, seed)
    limit = result.copy_limit = nearest.copy_limit(result.nearest["real"])
    facts = result.facts["nearest"] = {"unit": "dB", "copy_limit": limit}
    for row in result.rows:
        pairs = report.closest(result, row.kind)
        about = nearest.summary(result.nearest[row.kind], limit)
        facts[row.kind] = about | {"closest": pairs}
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
            first = pairs[0]
            result.notes.append(
                f"{row.kind}: {about['copies']:,} of its clips count as copies of real ones, above "
                f"all {Path(first['file']).name} of {Path(first['nearest']).name} "
                f"({first['distance']:.2f} dB)"
            )


if __name__ == "__main__":
    sys.exit(main())
