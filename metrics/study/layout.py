"""The folders and tables of a listening study, in the layouts of the published one.

A condition is a folder: BATCH/ID.wav; batches.txt, the names of each batch; uids.txt, the id of
each method and name; urls.csv, the clips of each page in their order. Two tables are ours:
labels.csv, what each clip should say, and gold.csv, the clips that were spoilt and how good they
may be called.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rawaudio.errors import UserError
from rawaudio.files import write_text

Key = tuple[str, str]  # a method and the name of one of its clips


@contextlib.contextmanager
def new_folder(path: Path, way_out: str) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is full: it is there whole or not at all.

    Raises UserError, with `way_out`, for one that is there already.
    """
    if path.exists():
        raise UserError(f"{path} is there already and is not overwritten: {way_out}")
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_method(name: str, where: str) -> None:
    """UserError for what cannot be the name of a folder and a word of uids.txt."""
    if not re.fullmatch(r"[^\s/\\.][^\s/\\]*", name):
        raise UserError(f"{where}: {name!r} is no name of a method: no spaces, / or leading dot")


def parts_of(url: str) -> list[str]:
    """A clip's address between its slashes: the last part is the name of the file."""
    return url.partition("?")[0].split("/")


# ---- tables ---------------------------------------------------------------------------------


def write_table(path: Path, rows: Iterable[dict[str, Any]], columns: Iterable[str]) -> None:
    """A CSV with these columns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV. Raises UserError if it lacks one of the columns or is none, OSError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            if missing := [name for name in columns if name not in (reader.fieldnames or [])]:
                raise UserError(f"{path} has no column {missing[0]}")
            return [{k: v for k, v in row.items() if k is not None} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 CSV: {error}") from None


@dataclass
class Condition:
    """What a condition's folder says of its clips."""

    folder: Path
    clips: dict[str, Key]  # by id
    labels: dict[Key, str] = field(default_factory=dict)  # the word, of those that have one
    gold: dict[Key, dict[str, int]] = field(default_factory=dict)  # question -> most it may get

    @property
    def methods(self) -> list[str]:
        """In the order of uids.txt."""
        return list(dict.fromkeys(method for method, _ in self.clips.values()))

    def pages(self) -> list[list[str]]:
        """URLs of the clips on each page, in their order; page i is batch i."""
        path = self.folder / "urls.csv"
        pages = [list(row.values()) for row in read_table(path, ["recording_0_url"])]
        if not pages:
            raise UserError(f"{path} names no clips: `batches` makes it")
        return pages


def read_condition(folder: Path) -> Condition:
    """Reads uids.txt and, where they are, labels.csv and gold.csv. Raises UserError, OSError."""
    path = folder / "uids.txt"
    if not path.is_file():
        raise UserError(f"{folder} is no condition, it has no uids.txt: `batches` makes one")
    text = path.read_text("utf-8", "replace")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if bad := next((line for line in lines if len(line) != 3), None):
        raise UserError(f"{path}: expected `method name id` on each line, not {' '.join(bad)!r}")
    condition = Condition(folder, {uid: (method, name) for method, name, uid in lines})
    if (path := folder / "labels.csv").is_file():
        rows = read_table(path, ["method", "name", "label"])
        condition.labels = {(row["method"], row["name"]): row["label"] for row in rows}
    if (path := folder / "gold.csv").is_file():
        condition.gold = read_gold(path)
    return condition


def read_gold(path: Path) -> dict[Key, dict[str, int]]:
    """Most that a listener may say of each spoilt clip, by question. Raises UserError, OSError."""
    gold = {}
    for row in read_table(path, ["method", "name"]):
        key = row.pop("method"), row.pop("name")
        try:
            gold[key] = {k: int(v) for k, v in row.items() if v and k != "kind"}
        except ValueError:
            raise UserError(f"{path}: {'/'.join(key)}: the most it may get is a number") from None
    return gold
