"""Rejection of generated clips by their likelihood, which papers on autoregressive models do."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np

from metrics import scores
from metrics.features import ClipSet
from rawaudio.data import SAMPLES, Clip
from rawaudio.errors import UserError


def likelihood_file(folder: Path) -> Path | None:
    """The table that has the clips' log-likelihoods: samples.csv or, of other programs,
    log_likelihood.csv (columns file, log_likelihood); None if there is none.
    """
    for path in (folder / SAMPLES, folder / "log_likelihood.csv"):
        if path.is_file() and b"log_likelihood" in path.read_bytes().partition(b"\n")[0]:
            return path
    return None


def by_likelihood(folder: Path, clips: list[Clip]) -> list[Clip]:
    """Clips with the lowest log-likelihood first; in their own order if the folder has none.

    Raises ValueError for a clip that the table does not list, or a value that is no number.
    """
    path = likelihood_file(folder)
    if path is None:
        return clips
    try:
        with path.open(encoding="utf-8", newline="") as file:
            values = {
                row["file"]: float(row["log_likelihood"] or "nan") for row in csv.DictReader(file)
            }
        likelihoods = [values[clip.path.name] for clip in clips]
    except (KeyError, csv.Error) as error:
        raise UserError(
            f"{path} lacks {error}: columns file,log_likelihood, a row per clip"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if any(math.isnan(value) for value in likelihoods):
        raise UserError(
            f"{path} has clips without a value: generate the clips again, or leave threshold= out"
        )
    return [clips[i] for i in np.argsort(likelihoods, kind="stable")]


def reject(clips: ClipSet, protocol: str, seed: int, n_test: int) -> tuple[ClipSet, dict[str, Any]]:
    """The clips to score of a set in order of likelihood, and how they were chosen.

    n_test: test clips, see `scores.split_halves`. Raises ValueError for fewer than 20 clips.
    """
    n = len(clips)
    if n < 20:
        raise UserError(f"threshold=true needs at least 20 clips that can be read, not {n}")
    tune, held = scores.split_halves(n, protocol=protocol, seed=seed, n_test=n_test)
    lower, upper = scores.tune_thresholds(clips.probs[tune], protocol)
    chosen = held[scores.kept(len(held), lower, upper)]
    facts = {"lower": lower, "upper": upper, "tuned_on": len(tune), "kept_of": len(held)}
    return clips.take(chosen), facts
