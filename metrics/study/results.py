"""Answers of listeners, from files of crowd-sourcing services and of our own pages.

A row is a page that one listener answered: `WorkerId`, `Input.recording_0_url`, ..., and
`Answer.FIELD`, as the column of a CSV or the key of a JSON object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import parsedate
from pathlib import Path

from metrics.study.layout import Condition, Key, parts_of, read_table
from metrics.study.questions import QUESTIONNAIRES, Question
from rawaudio.errors import UserError, plainly, printable

Row = dict[str, str]
DIGITS = re.compile(r"\s*(\d{1,4})(\.0*)?\s*")


@dataclass
class Answer:
    """What one listener said of one clip, and of the page on which it was."""

    listener: str
    page: tuple[str, ...]  # its URLs
    key: Key  # of the clip
    of_clip: dict[str, int]  # field -> answer; incomplete ones are left out where they are read
    of_page: dict[str, int]


@dataclass
class Results:
    """The answers, and what happened to the others."""

    questionnaire: str
    answers: list[Answer]
    right_tones: dict[str, int] = field(default_factory=dict)  # listener -> worst headphone check
    notes: list[str] = field(default_factory=list)


def read_results(sources: list[str], conditions: list[Condition], words: int) -> Results:
    """Reads files, and those in folders. words: how many a voice may say.

    Raises UserError or OSError for what cannot be read or is of another study.
    """
    rows = list(_rows(sources))
    if not rows:
        raise UserError(f"results={','.join(sources)}: no answers in them")
    names = {name.removeprefix("Answer.") for _, row in rows for name in row}
    kinds = {"music": "recording_0_musicality", "speech": "recording_0_intelligibility"}
    found = [k for k, own in kinds.items() if any(x.startswith(own) for x in names)]
    if len(found) != 1:
        what = "answers of both questionnaires: score them apart" if found else "no known answers"
        raise UserError(f"{rows[0][0]}: {what} (Answer.{' or Answer.'.join(kinds.values())})")
    results = Results(found[0], [])
    asked, incomplete = QUESTIONNAIRES[found[0]], 0
    for where, row in _latest(rows, results):
        urls = _urls(row)
        listener = row["WorkerId"]
        if (right := _number(where, row, "headphones", range(1000))) is not None:
            before = results.right_tones.get(listener, right)
            results.right_tones[listener] = min(before, right)
        of_page = _answers(where, row, asked.of_pages, "", words)
        for i, url in enumerate(urls):
            of_clip = _answers(where, row, asked.of_clips, f"recording_{i}_", words)
            if len(of_clip) < len(asked.of_clips):
                incomplete += 1
                continue
            key = _clip(where, url, conditions)
            results.answers.append(Answer(listener, urls, key, of_clip, of_page))
    if incomplete:
        results.notes.append(f"{incomplete:,} incomplete answers left out")
    return results


def _rows(sources: list[str]) -> Iterator[tuple[str, Row]]:
    """Rows with the place where they stand."""
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"{source} is not there: give files of answers, or a folder")
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        for file in files:
            if file.suffix.lower() not in (".csv", ".json"):
                if file is source:
                    raise UserError(f"{file}: answers are in files that end in .csv or .json")
                continue
            needed = ("WorkerId", "Input.recording_0_url")
            rows = _read_json(file) if file.suffix.lower() == ".json" else read_table(file, needed)
            for i, row in enumerate(rows, 1):
                where = f"{file}, answer {i}"
                if lacking := next((name for name in needed if not row.get(name)), None):
                    raise UserError(f"{where}: no {lacking}")
                yield where, row


def _read_json(file: Path) -> list[Row]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {plainly(error)}") from None
    rows = content if isinstance(content, list) else [content]
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: expected an object of answers, or a list of them")
    return [{k: str(v) for k, v in row.items() if v is not None} for row in rows]


def _latest(rows: list[tuple[str, Row]], results: Results) -> list[tuple[str, Row]]:
    """One row for each listener and page: the last that was submitted."""
    kept: dict[tuple, tuple[str, Row]] = {}
    for where, row in rows:
        key = row["WorkerId"], *sorted(_urls(row))
        if key not in kept or _submitted(row) >= _submitted(kept[key][1]):
            kept[key] = where, row
    if again := len(rows) - len(kept):
        results.notes.append(
            f"pages answered twice by one listener, whose last answers count: {again:,}"
        )
    return list(kept.values())


def _submitted(row: Row) -> tuple[tuple, str]:
    """What can be compared: our pages write ISO 8601, services Wed Jan 26 20:35:14 PST 2022."""
    text = row.get("SubmitTime", "")
    return parsedate(text) or (), text


def _urls(row: Row) -> tuple[str, ...]:
    urls = []
    while url := row.get(f"Input.recording_{len(urls)}_url"):
        urls.append(url)
    return tuple(urls)


def _clip(where: str, url: str, conditions: list[Condition]) -> Key:
    """Method and name of a clip: by its id, in the condition of its URL if there are several."""
    parts = parts_of(url)
    uid = parts[-1].rpartition(".")[0]
    having = [condition for condition in conditions if uid in condition.clips]
    if len(having) > 1:  # published ids are the same in every condition
        having = [condition for condition in having if condition.folder.resolve().name in parts]
    if len(having) != 1:
        known = ", ".join(str(condition.folder) for condition in conditions)
        raise UserError(f"{where}: {printable(url)} is in none or several of conditions={known}")
    return having[0].clips[uid]


def _answers(
    where: str, row: Row, questions: tuple[Question, ...], prefix: str, words: int
) -> dict[str, int]:
    """Field -> answer, of those that are given."""
    given = {}
    for question in questions:
        allowed = range(question.first, question.first + (len(question.words) or words))
        value = _number(where, row, prefix + question.field, allowed)
        if value is not None:
            given[question.field] = value
    return given


def _number(where: str, row: Row, name: str, allowed: range) -> int | None:
    """An answer; None if there is none. Services name some forms' radio buttons NAME.VALUE."""
    text = row.get(f"Answer.{name}", "").strip()
    if not text:
        start = f"Answer.{name}."
        chosen = [k for k, v in row.items() if k.startswith(start) and v.lower() == "true"]
        text = chosen[0].removeprefix(start) if chosen else ""
    if not text or text.lower() in ("nan", "{}"):
        return None
    match = DIGITS.fullmatch(text)
    if match and int(match[1]) in allowed:
        return int(match[1])
    between = f"{allowed[0]} to {allowed[-1]}"
    raise UserError(f"{where}: Answer.{name} is {printable(text)!r}, expected {between}")
