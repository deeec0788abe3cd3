"""Scores for people and programs: a table, scores.json, scores.md, and a page with pictures.

Every score has a picture of what it measures, see metrics/pictures.py; below them are clips to
listen to: the surest, the least sure, and those that are closest to real ones.
"""

from __future__ import annotations

import html
import json
import os
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from metrics import pictures
from metrics.features import SURE, ClipSet
from metrics.nearest import Neighbours
from rawaudio import audio, data, page
from rawaudio.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_WORST = 10  # clips to listen to
N_PAIRS = 3  # of nearest neighbours to listen to
N_CLOSEST = 20  # of them in scores.json; all that count as copies in any case

# key -> (heading, format, whether more is better; None: as much as real clips have)
SCORES = {
    "fid": ("FID", "{:,.3f}", False),
    "is": ("IS", "{:.3f}", True),
    "mis": ("mIS", "{:,.2f}", True),
    "am": ("AM", "{:.3f}", False),
    "ndb": ("NDB", "{:.2f}", False),
    "sure": (f"≥ {SURE:.0%} sure", "{:.1%}", True),
    "accuracy": ("accuracy", "{:.1%}", True),  # of clips whose label is known: told, or recorded
    "heard": (f"heard, ≥ {SURE:.0%} sure", "{:.1%}", True),  # of what was told
    "nearest": ("nearest, dB", "{:.2f}", None),
}

# key -> title and caption of its picture
CAPTIONS = {
    "fid": ("Features", "one point per clip, on the axes of most variance; FID is the distance of "
            "the clouds, 0 at best"),
    "is": ("Confidence", "IS grows to the number of classes as the classifier is sure of every "
           "clip, and every class is there"),
    "mis": ("Pairs", "mean KL divergence between the clips of two classes; the diagonal is variety "
            "within a class"),
    "am": ("Classes", "AM falls to 0 as every clip is sure and the classes have the real shares"),
    "ndb": ("Bins", "NDB is the share of the bins that hold too many or too few clips"),
    "accuracy": ("Recall", "how much of each class the classifier recognises where the truth is "
                 "known"),
    "heard": ("Confusion", "rows are what was told (of recordings: said), columns what the "
              "classifier hears"),
    "nearest": ("Nearest neighbours", "dB to the nearest real clip, of real ones to another; "
                "copies are left of the line"),
}  # fmt: skip


@dataclass
class Row:
    """The scores of one set of clips; those that the settings allow."""

    kind: str  # real, test, generated
    name: str
    clips: int  # scored
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %


@dataclass
class Report:
    """All that is written."""

    title: str
    rows: list[Row]
    notes: list[str]
    labels: list[str]
    sets: dict[str, ClipSet]  # kind -> clips
    bins: tuple[np.ndarray, np.ndarray, np.ndarray] | None  # of scores.ndb_bins
    facts: dict[str, Any]  # settings, classifier, thresholds: for scores.json
    nearest: dict[str, Neighbours] = field(default_factory=dict)  # kind -> nearest real clips
    copy_limit: float = 0.0  # dB; a nearer clip is a copy


# ---- tables ---------------------------------------------------------------------------------


def table(report: Report, arrows: bool = False) -> list[list[str]]:
    """Cells, the headings first; columns that no row has are left out."""
    keys = [key for key in SCORES if any(key in row.scores for row in report.rows)]
    arrow = {True: " ↑", False: " ↓", None: ""}
    heads = [SCORES[key][0] + arrow[SCORES[key][2]] * arrows for key in keys]
    rows = [[row.name, f"{row.clips:,}", *(cell(row, key) for key in keys)] for row in report.rows]
    return [["", "clips", *heads], *rows]


def cell(row: Row, key: str) -> str:
    """A score as text, with its interval where there is one."""
    if key not in row.scores:
        return "–"
    text = _number(row.scores[key], key)
    if key in row.intervals:
        text += " [{}, {}]".format(*(_number(x, key) for x in row.intervals[key]))
    return text


def _number(x: float, key: str) -> str:
    if abs(x) >= 1000:
        return f"{x:,.0f}" if abs(x) < 1e6 else f"{x:.3g}"
    return SCORES[key][1].format(x)


def plain(report: Report) -> str:
    """The table for a terminal."""
    return aligned(table(report))


def aligned(rows: list[list[str]]) -> str:
    """Cells in columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *values in rows:
        cells = [text.rjust(width) for text, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """The table for a README, with the notes below it."""
    return as_markdown(table(report, arrows=True), report.notes)


def as_markdown(rows: list[list[str]], notes: list[str]) -> str:
    """Cells, the headings first, and notes below them."""
    head, *body = rows
    body = [[_escaped(name), *values] for name, *values in body]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return text + "\n\n" + "\n".join(f"- {_escaped(note)}" for note in notes) + "\n"


def _escaped(text: str) -> str:
    """Names of files and the like as Markdown shows them, letter by letter, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", printable(text, 2000))


def as_json(report: Report) -> str:
    """Scores by set, then the facts behind them. JSON has no NaN, and none is written."""
    content = {
        "scores": [asdict(row) for row in report.rows],
        **report.facts,
        "classes": {
            kind: dict(zip(report.labels, clips.probs.mean(0).tolist(), strict=True))
            for kind, clips in report.sets.items()
        },
        "broken": [
            {"set": kind, "file": str(clip), "reason": reason}
            for kind, clips in report.sets.items()
            for clip, reason in clips.broken
        ],
        "notes": report.notes,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def closest(report: Report, kind: str) -> list[dict[str, Any]]:
    """The closest pairs of one set and the real clips: all copies, and 20 at least."""
    near, clips = report.nearest[kind], report.sets[kind].clips
    order = near.closest()
    n = max(N_CLOSEST, int((near.distance[order] < report.copy_limit).sum()))
    return [
        {
            "file": str(clips[near.rows[i]]),
            "nearest": str(report.sets["real"].clips[near.index[i]]),
            "distance": float(near.distance[i]),
            "delay": float(near.delay[i]),  # seconds
        }
        for i in order[:n]
    ]


# ---- the page -------------------------------------------------------------------------------


def write_page(path: str | os.PathLike, report: Report) -> None:
    """One HTML file with the table, the pictures, and clips to listen to."""
    notes = html.escape("\n".join(report.notes))
    cards = "".join(_card(report, key, figure) for key, figure in _pictures(report).items())
    body = [STYLE, _html_table(report), f'<p class="note">{notes}</p>', _broken(report)]
    body.append(f"<main>{cards}</main>")
    page.write_page(path, _clips(report), report.title, body="\n".join(body))


def _html_table(report: Report) -> str:
    """A row for each score and a column for each set, of which there are few: it fits a phone."""
    columns = list(zip(*table(report, arrows=True), strict=True))
    heads = [
        f'<th scope="col"><i style="background:{pictures.COLOURS[row.kind]}"></i>'
        f"{html.escape(row.name)}</th>"
        for row in report.rows
    ]
    lines = [f"<table><thead><tr><td></td>{''.join(heads)}</tr></thead><tbody>"]
    for name, *values in columns[1:]:
        row = "".join(map(html_cell, values))
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{row}</tr>')
    return "\n".join([*lines, "</tbody></table>"])


def html_cell(text: str) -> str:
    """A score, its interval below it."""
    below = re.sub(r" \[(.*), (.*)\]", r"<small>\1 – \2</small>", html.escape(text))
    return f"<td>{below}</td>"


def _pictures(report: Report) -> dict[str, Figure]:
    """Figures by score."""
    sets, labels = report.sets, report.labels
    pairs = {
        kind: pictures.pair_divergences(sets[kind].probs)
        for kind in (list(sets)[0], list(sets)[-1])
    }
    sure = {kind: clips.probs.max(1) for kind, clips in sets.items()}
    shares = {kind: clips.probs.mean(0) for kind, clips in sets.items()}
    likeliest = "probability of the likeliest class"
    made = {
        "fid": pictures.feature_map({kind: clips.features for kind, clips in sets.items()}),
        "is": pictures.histogram(sure, np.linspace(0, 1, 21), SURE, likeliest),
        "mis": pictures.maps(pairs, labels, "nats"),
        "am": pictures.bars(shares, labels, "share of the clips"),
    }
    if report.bins is not None:
        made["ndb"] = pictures.bin_bars(report.bins)
    heard = {
        kind: pictures.confusion(clips.probs, truth)
        for kind, clips in sets.items()
        if (truth := clips.truth(labels)) is not None
    }
    if heard:
        recall = {kind: shares.diagonal() for kind, shares in heard.items()}
        last = dict(list(heard.items())[-2:])
        label = "share of the clips of a row"
        made["accuracy"] = pictures.bars(recall, labels, "recognised")
        made["heard"] = pictures.maps(last, labels, label, "told", "heard")
    if report.nearest:
        distances = {kind: near.distance[near.closest()] for kind, near in report.nearest.items()}
        top = max(report.copy_limit, *(x.max(initial=0) for x in distances.values()))
        edges, label = np.linspace(0, 1.02 * top, 49), "dB to the nearest real clip"
        made["nearest"] = pictures.histogram(distances, edges, report.copy_limit, label)
    return made


def _card(report: Report, key: str, figure: Figure) -> str:
    title, caption = CAPTIONS[key]
    last = report.rows[-1]
    value = f"{SCORES[key][0]} {cell(last, key)}" if key in last.scores else ""
    return page.figure_card(title, value, caption, figure, f"{title}: {caption}")


def _clips(report: Report) -> list[page.Clip]:
    """Clips of the last set: the surest of each class, the least sure, and those that are closest
    to real clips, each before its neighbour.
    """
    kind = report.rows[-1].kind
    clips = report.sets[kind]
    if not clips.clips:
        return []
    sure, likeliest = clips.probs.max(1), clips.probs.argmax(1)
    of_class = [np.flatnonzero(likeliest == c) for c in range(len(report.labels))]
    best = [int(rows[sure[rows].argmax()]) for rows in of_class if len(rows)]
    best.sort(key=lambda i: -sure[i])
    worst = [i for i in np.argsort(sure, kind="stable")[:N_WORST].tolist() if i not in best]
    chosen = [(clips.clips[i], f"surest of its class: {_heard(report, kind, i)}") for i in best]
    chosen += [(clips.clips[i], f"least sure: {_heard(report, kind, i)}") for i in worst]
    if kind in report.nearest:
        near = report.nearest[kind]
        for i in near.closest()[:N_PAIRS]:
            real = report.sets["real"].clips[near.index[i]]
            caption = f"closest to a real clip: {near.distance[i]:.2f} dB from {real.name}"
            chosen += [(clips.clips[near.rows[i]], caption), (real, "its nearest real clip")]
    cards = []
    for clip, caption in chosen:
        try:
            sound = data.read_clip(clip)
        except audio.AudioError:  # deleted since it was scored
            continue
        cards.append(page.Clip(clip.name, sound.wav, sound.rate, caption))
    return cards


def _heard(report: Report, kind: str, i: int) -> str:
    """The likeliest classes of one clip, after the one that it was told."""
    clips = report.sets[kind]
    likely = np.argsort(-clips.probs[i])[:3]
    told = f"told {clips.clips[i].label} · " if clips.clips[i].label else ""
    return told + ", ".join(f"{report.labels[c]} {clips.probs[i, c]:.1%}" for c in likely)


def _broken(report: Report) -> str:
    items = [
        f"<li>{html.escape(f'{clip}: {reason}')}</li>"
        for clips in report.sets.values()
        for clip, reason in clips.broken
    ]
    if not items:
        return ""
    count = f"{len(items)} clip" + "s" * (len(items) != 1)
    return f"<details><summary>{count} left out</summary><ul>{''.join(items)}</ul></details>"


STYLE = """<style>
table { width: 100%; max-width: 48rem; border-collapse: collapse; margin-bottom: 1rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem clamp(.3rem, 1.5vw, .75rem); text-align: right; vertical-align: top;
  border-bottom: 1px solid #8884; overflow-wrap: anywhere; }
td small { display: block; }
tbody th { text-align: left; font-weight: 400; }
th i { display: inline-block; width: .7rem; height: .7rem; margin-right: .6rem;
  border-radius: 50%; }
main, details { margin-bottom: 1.5rem; }
article header { flex-wrap: nowrap; }
article header .facts { text-align: right; }
</style>"""
