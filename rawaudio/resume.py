"""last.pt: everything that a training run needs to go on, and which one it goes on from.

find(run, cfg.resume_checkpoint, cfg.model)     # (content, path), or None for a new run
save(run, content, position, keep=2)
"""

import contextlib
import io
import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawaudio.checkpoint import CheckpointError
from rawaudio.config import as_written, from_dict, to_dict
from rawaudio.errors import UserError, explained, printable
from rawaudio.families import FAMILIES
from rawaudio.files import FORMAT, check_settings, read_pt, write_atomically
from rawaudio.model import ModelConfig

log = logging.getLogger(__name__)


@dataclass
class Position:
    """Where a run is. Together with weights and optimizer: all that its future depends on."""

    epoch_order: Tensor  # state of the generator from which this epoch's order is drawn
    step: int = 0
    epoch: int = 0
    batches_done: int = 0  # in this epoch
    pieces_done: int = 0  # in the next batch: with tbptt
    carried: list = field(default_factory=list)  # states then, of each process, see tbptt.Carried
    plan: str = ""  # fingerprint of what the order depends on
    best: float = math.inf
    scale: float = 1.0  # of the learning rate, on a plateau
    bad_validations: int = 0
    validated: int = 0  # last step that was
    saved: int = -1  # last step that was, in this folder
    skipped: int = 0  # steps without a finite gradient
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    origin: str = ""  # the last.pt of another folder that the run came from

    def move_on(self, whole: bool) -> None:
        """After a step; whole: its batch is done."""
        self.step += 1
        self.batches_done += whole
        self.pieces_done = 0 if whole else self.pieces_done + 1


# how a model is sampled and regularised: weights fit whatever these are
NOT_SHAPE = ("temperature", "nucleus_p", "guidance", "guided", "clip_length", "dropout",
             "condition_counts", "critic_steps", "critic_rate", "penalty", "penalty_interval",
             "augment")  # fmt: skip
NEEDED = {"kind", "config", "model", "averaged", "optimizer", "step", "epoch", "batches_done",
          "epoch_order", "best", "scale", "bad_validations", "seconds"}  # fmt: skip


def find(run: Path, origin: str | None, config: ModelConfig) -> tuple[dict[str, Any], Path] | None:
    """The state to go on from, and its file; None for a new run.

    The folder's own last.pt, or an earlier one if that is damaged; else `origin`, a last.pt of
    another folder. Raises ValueError for a folder that holds another run or a part of one, and
    CheckpointError for files that are not of this trainer and model.
    """
    own = run / "last.pt"
    given = Path(origin).resolve() if origin else None
    if given == own.resolve():
        given = None
    if own.exists() or (origin and not given):
        content, path = _newest(own, config)
        if given and content.get("origin") != str(given):
            raise UserError(
                f"{run} holds another run than resume_checkpoint={origin}: leave that out to go on "
                "with it, or choose another checkpoint_path"
            )
        return content, path
    if given:
        return read(given, config), given
    others = [run / name for name in ("best.safetensors", "metrics.jsonl")]
    if any(path.exists() and path.stat().st_size for path in others):
        raise UserError(
            f"{run} holds a run without its last.pt, which would be overwritten: choose another "
            "checkpoint_path"
        )
    return None


def _newest(own: Path, config: ModelConfig) -> tuple[dict[str, Any], Path]:
    try:
        return read(own, config), own
    except CheckpointError as error:
        for earlier in reversed(_earlier(own.parent)):
            with contextlib.suppress(CheckpointError):
                content = read(earlier, config)
                log.warning("%s; going on from %s", error, earlier)
                return content, earlier
        raise


def _earlier(run: Path) -> list[Path]:
    """last-STEP.pt, the oldest first."""
    return sorted(run.glob("last-*.pt"), key=lambda path: int(path.stem[5:]))


def read(path: Path, config: ModelConfig) -> dict[str, Any]:
    """The content of a last.pt, of a model of this architecture; raises CheckpointError."""
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: not a last.pt; init_from= starts from weights alone")
    content = read_pt(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a last.pt of this trainer")
    if missing := NEEDED - content.keys():
        raise CheckpointError(
            f"{path} lacks {', '.join(sorted(missing))}: written by another version of this "
            "trainer, which can go on with it"
        )
    content.setdefault("task", {})  # of a file from before there was one
    kinds = {"model": dict, "averaged": dict | None, "optimizer": dict, "epoch_order": Tensor}
    kinds |= {"task": dict}
    kinds |= {k: int for k in ("step", "epoch", "batches_done", "bad_validations")}
    kinds |= {k: int | float for k in ("best", "scale", "seconds")}
    for key, kind in kinds.items():
        if not isinstance(content[key], kind):
            raise CheckpointError(f"{path}: damaged, {key} is a {type(content[key]).__name__}")
    if not isinstance(content["kind"], str) or content["kind"] not in FAMILIES:
        raise CheckpointError(f"{path}: its kind is not one of {', '.join(FAMILIES)}")
    check_settings(path, content["config"], content["model"])
    check_architecture(path, content["kind"], content["config"], config)
    return content


def check_architecture(
    path: str | Path,
    kind: str,
    theirs: dict[str, Any],
    config: ModelConfig,
    free: tuple[str, ...] = (),
) -> None:
    """CheckpointError unless weights of that kind and config are of a model with `config`.

    free: settings that may differ.
    """
    if not isinstance(config, FAMILIES[kind].config):
        raise CheckpointError(
            f"{path} holds a model of kind {kind}, this run has another: write model={kind}"
        )
    ours = to_dict(config)
    # what an older file lacks has its default; conditions may stand in another order
    try:
        theirs = to_dict(from_dict(type(config), theirs, ignore_unknown=True))
    except ValueError as error:
        raise CheckpointError(f"{path}: {printable(str(error))}") from None
    same = {k: _in_order(theirs[k]) == _in_order(ours[k]) for k in ours}
    if differing := [k for k in ours if k not in (*free, *NOT_SHAPE) and not same[k]]:
        if "conditions" in differing:
            raise CheckpointError(f"{path} {_how_told(theirs['conditions'], config.conditions)}")
        key = differing[0]
        value = as_written(theirs[key])
        raise CheckpointError(
            f"{path} was trained with model.{key}={value}, this run has model.{key}="
            f"{as_written(ours[key])}: write model.{key}={value}, or start anew in another "
            "checkpoint_path"
        )


def _how_told(theirs: dict[str, list[str]], ours: dict[str, list[str]]) -> str:
    """In which conditions two models differ, and what to do about it."""
    if theirs.keys() != ours.keys():
        written = as_written(list(theirs))
        return (
            f"was trained with conditions={written}, this run has conditions="
            f"{as_written(list(ours))}: write conditions={written}, or start anew in another "
            "checkpoint_path, with init_from="
        )
    name = next(name for name in theirs if set(theirs[name]) != set(ours[name]))
    values = sorted(set(theirs[name]) ^ set(ours[name]))
    return (
        f"was told other values of {name} than train_csv has ({', '.join(values[:5])}"
        f"{', ...' if len(values) > 5 else ''}): give that CSV, or start anew in another "
        "checkpoint_path, with init_from="
    )


def _in_order(value: Any) -> Any:
    return {k: sorted(v) for k, v in value.items()} if isinstance(value, dict) else value


def save(run: Path, content: dict[str, Any], position: Position, keep: int) -> None:
    """Write last.pt, all or nothing; the one before becomes last-STEP.pt, of which some are kept.

    content: weights and optimizer; the position is added. keep: states that are kept in all.
    Raises OSError, with last.pt as it was.
    """
    path, before = run / "last.pt", position.saved
    position.saved = position.step
    buffer = io.BytesIO()
    torch.save(content | vars(position), buffer)
    try:
        if keep > 1 and before not in (-1, position.step) and path.exists():
            earlier = run / f"last-{before}.pt"
            earlier.unlink(missing_ok=True)
            try:
                os.link(path, earlier)
            except OSError:  # exFAT, some network disks: no hard links
                write_atomically(earlier, path.read_bytes())
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        position.saved = before
        then = "goes on from the state before, which is whole" if path.exists() else "begins anew"
        raise OSError(
            f"step {position.step:,} could not be saved: {explained(error)}; the same command "
            f"{then}"
        ) from None
    states = _earlier(run)
    for old in states[: max(0, len(states) - keep + 1)]:
        old.unlink(missing_ok=True)
