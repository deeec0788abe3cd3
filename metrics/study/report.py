"""What listeners say, as a table, scores.json, scores.md, and a page with pictures."""

from __future__ import annotations

import html
import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from metrics import pictures
from metrics.report import STYLE, aligned, as_markdown, html_cell
from metrics.study.questions import GRADES, QUESTIONNAIRES
from rawaudio import page

# field -> (limits, format, caption), of what is no question
AGREEMENT = {
    "accuracy": ((0, 1), "{:.1%}", "share of the clips that are heard as what they say"),
    "kappa": ((-1, 1), "{:.3f}", "Cohen's kappa: how much better than chance that is, 1 at best"),
}


class Estimate(NamedTuple):
    """A score and its 95 % interval, if there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass
class Row:
    """What is said of one method."""

    method: str
    listeners: int
    ratings: int  # of clips
    scores: dict[str, Estimate]


@dataclass
class Report:
    """All that is written."""

    questionnaire: str
    rows: list[Row]
    notes: list[str]
    words: list[str]
    confusions: dict[str, np.ndarray]  # method -> shares (words, words)
    facts: dict[str, Any]  # for scores.json

    @property
    def fields(self) -> dict[str, tuple[str, tuple[float, float], str, str]]:
        """Field -> title, limits, format, caption, of those that some method has."""
        asked = QUESTIONNAIRES[self.questionnaire]
        grades = {
            q.field: (q.title, (1, len(q.words)), "{:.2f}", q.text)
            for q in (*asked.of_clips, *asked.of_pages)
        }
        known = grades | {name: (name, *about) for name, about in AGREEMENT.items()}
        return {k: v for k, v in known.items() if any(k in row.scores for row in self.rows)}


def table(report: Report) -> list[list[str]]:
    """Cells, the headings first."""
    fields = report.fields
    rows = [["", "listeners", "ratings", *(about[0] for about in fields.values())]]
    for row in report.rows:
        cells = [_cell(row, name, about[2]) for name, about in fields.items()]
        rows.append([row.method, f"{row.listeners:,}", f"{row.ratings:,}", *cells])
    return rows


def _cell(row: Row, name: str, form: str) -> str:
    if name not in row.scores:
        return "–"
    value, low, high = row.scores[name]
    text = form.format(value)
    return text if low is None else f"{text} [{form.format(low)}, {form.format(high)}]"


def plain(report: Report) -> str:
    """The table for a terminal."""
    return aligned(table(report))


def markdown(report: Report) -> str:
    """The table for a README, with the notes below it."""
    return as_markdown(table(report), report.notes)


def as_json(report: Report) -> str:
    """Scores by method, then the facts behind them."""
    methods = []
    for row in report.rows:
        scores = {name: estimate._asdict() for name, estimate in row.scores.items()}
        methods.append(asdict(row) | {"scores": scores})
    heard = {method: shares.tolist() for method, shares in report.confusions.items()}
    content = {"methods": methods, **report.facts, "heard": heard, "notes": report.notes}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_html(report: Report) -> str:
    """One HTML file: the table, a picture of each score, and what was heard of each method."""
    head, *body = table(report)
    lines = [
        "<tr><td></td>" + "".join(f'<th scope="col">{name}</th>' for name in head[1:]) + "</tr>"
    ]
    for method, *cells in body:
        name = f'<th scope="row">{html.escape(method)}</th>'
        lines.append(f"<tr>{name}{''.join(map(html_cell, cells))}</tr>")
    rows = f"<thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody>"
    parts = [
        f'{STYLE}<div class="wide" tabindex="0" role="region" aria-label="Scores">'
        f"<table>{rows}</table></div>",
        f'<p class="note">{html.escape(chr(10).join(report.notes))}</p>',
        f"<main>{''.join(_cards(report))}</main>",
    ]
    ratings = sum(row.ratings for row in report.rows)
    facts = f"{report.questionnaire} · {len(report.rows)} methods · {ratings:,} ratings"
    return page.html_page("Listening study", *parts, facts=facts, style=_WIDE)


_WIDE = """
.wide { overflow-x: auto; }
.wide table { width: auto; max-width: none; white-space: nowrap; }
"""


def _cards(report: Report) -> list[str]:
    cards = []
    for name, (title, limits, form, caption) in report.fields.items():
        values = {
            row.method: (value, value if low is None else low, value if high is None else high)
            for row in report.rows
            if name in row.scores
            for value, low, high in [row.scores[name]]
        }
        limits = (min(0, *(low for _, low, _ in values.values())), 1) if name == "kappa" else limits
        label = title if name in AGREEMENT else f"1 {GRADES[0]}, {len(GRADES)} {GRADES[-1]}"
        figure = pictures.intervals(values, limits, label)
        means = ", ".join(f"{method} {form.format(v[0])}" for method, v in values.items())
        alt = f"{title}, 95 % intervals; {means}"
        cards.append(page.figure_card(title.capitalize(), "", caption, figure, alt))
    caption = "rows are what the clips say, columns what listeners hear"
    for method, shares in report.confusions.items():
        label = "share of the answers of a row"
        figure = pictures.maps({method: shares}, report.words, label, "said", "heard")
        alt = f"Confusion of words of {method}"
        cards.append(page.figure_card(f"Words of {method}", "", caption, figure, alt))
    return cards
