"""Scores for people and programs: a table, scores.json, scores.md, and a page with pictures.

Every score has a picture of what it measures: FID the clouds of features, IS how sure the
classifier is, mIS how far clips of two classes are apart, AM the classes, NDB the bins. Nearest
neighbours have the distances of all clips, and the closest pairs to listen to.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rawaudio import audio, data
from rawaudio.files import printable
from rawaudio.page import (
    ACCENT,
    INK,
    SCRIPT,
    STYLE,
    TEXT,
    WIDTH,
    Clip,
    card,
    data_uri,
    new_figure,
    webp,
)

from .features import ClipSet
from .nearest import Neighbours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SURE = 0.9  # probability from which a clip counts as intelligible
COLOURS = {"real": "#8a929b", "test": "#4f9dd6", "generated": ACCENT}
MAX_POINTS = 2000  # of one set in the feature map
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


@dataclass
class Row:
    """The scores of one set of clips. A score that cannot be had is not in `scores`."""

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
    lines = [["", "clips", *heads]]
    for row in report.rows:
        lines.append([row.name, f"{row.clips:,}", *(cell(row, key) for key in keys)])
    return lines


def cell(row: Row, key: str) -> str:
    """A score as text, with its interval where there is one."""
    if key not in row.scores:
        return "–"
    text = number(row.scores[key], key)
    if key in row.intervals:
        text += " [{}, {}]".format(*(number(x, key) for x in row.intervals[key]))
    return text


def number(x: float, key: str) -> str:
    if abs(x) >= 1000:
        return f"{x:,.0f}" if abs(x) < 1e6 else f"{x:.3g}"
    return SCORES[key][1].format(x)


def plain(report: Report) -> str:
    """The table for a terminal."""
    lines = table(report)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown(report: Report) -> str:
    """The table for a README, with the notes below it."""
    head, *body = table(report, arrows=True)
    body = [[_as_text(name), *values] for name, *values in body]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return text + "\n\n" + "\n".join(f"- {_as_text(note)}" for note in report.notes) + "\n"


def _as_text(text: str) -> str:
    """Names of files and the like as Markdown shows them, letter by letter, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", printable(text, 2000))


def as_json(report: Report) -> str:
    """Scores by set, then the facts behind them. JSON has no NaN, and none is written."""
    content = {
        "scores": [asdict(row) for row in report.rows],
        **report.facts,
        "classes": {
            kind: dict(zip(report.labels, shares(found).tolist(), strict=True))
            for kind, found in report.sets.items()
        },
        "broken": [
            {"set": kind, "file": str(clip), "reason": reason}
            for kind, found in report.sets.items()
            for clip, reason in found.broken
        ],
        "notes": report.notes,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def shares(found: ClipSet) -> np.ndarray:
    """Share of each class, by the classifier's probabilities: (C,)."""
    return found.probs.mean(0)


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


def truth(found: ClipSet, labels: list[str]) -> np.ndarray | None:
    """Index of each clip's label, what it was told or is known to say: (n,).

    None where the clips have no labels, or other ones than the classifier's.
    """
    if not found.clips or not {clip.label for clip in found.clips} <= set(labels):
        return None
    return np.array([labels.index(clip.label) for clip in found.clips])


def heard(found: ClipSet, known: np.ndarray) -> np.ndarray:
    """Of which clips the classifier is sure, and of the label that they have: bool (n,)."""
    return found.probs[np.arange(len(known)), known] >= SURE


def recall(found: ClipSet, labels: list[str]) -> np.ndarray | None:
    """Share of the clips of each class that are recognised, NaN for a class without clips: (C,).

    None where `truth` is.
    """
    if (known := truth(found, labels)) is None:
        return None
    right = found.probs.argmax(1) == known
    total = np.bincount(known, minlength=len(labels))
    hits = np.bincount(known[right], minlength=len(labels))
    return np.divide(hits, total, out=np.full(len(labels), np.nan), where=total > 0)


# ---- pictures -------------------------------------------------------------------------------


def feature_map(sets: dict[str, ClipSet]) -> Figure:
    """FID: each clip as a point, on the two principal axes of the first set's features."""
    x = next(iter(sets.values())).features.astype(np.float64)
    mean = x.mean(0)
    variance, axes = np.linalg.eigh((x - mean).T @ (x - mean))
    axes, explained = axes[:, :-3:-1], variance[:-3:-1] / max(variance.sum(), 1e-300)
    figure, (ax,) = _figure(1)
    rng = np.random.default_rng(0)
    for kind, found in sets.items():
        n = min(len(found), MAX_POINTS)
        rows = np.sort(rng.permutation(len(found))[:n])
        points = (found.features[rows] - mean) @ axes
        size = 9 if n > 500 else 16
        ax.scatter(*points.T, s=size, c=COLOURS[kind], alpha=0.55, linewidths=0, label=kind)
    names = [f"principal axis {i + 1}, {share:.0%}" for i, share in enumerate(explained)]
    ax.set(xlabel=names[0], ylabel=names[-1])
    ax.set(xticks=[], yticks=[])
    _legend(ax)
    return figure


def confidence_histogram(sets: dict[str, ClipSet]) -> Figure:
    """IS: how sure the classifier is of each clip."""
    figure, (ax,) = _figure(1)
    edges = np.linspace(0, 1, 21)
    for kind, found in sets.items():
        share = np.histogram(found.probs.max(1), edges)[0] / len(found)
        ax.stairs(share, edges, color=COLOURS[kind], linewidth=1.8, label=kind)
        ax.stairs(share, edges, color=COLOURS[kind], alpha=0.12, fill=True)
    ax.axvline(SURE, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set(xlim=(0, 1), ylim=(0, None), xlabel="probability of the likeliest class")
    ax.set_ylabel("share of the clips")
    _legend(ax)
    return figure


def pair_map(sets: dict[str, ClipSet], labels: list[str]) -> Figure:
    """mIS: mean KL divergence of the clips of one class from those of another, in nats.

    One map for the first set, one for the last.
    """
    maps = {kind: pair_divergences(sets[kind]) for kind in (list(sets)[0], list(sets)[-1])}
    figure, axes = _figure(len(maps))
    top = max((float(np.nanmax(m)) for m in maps.values() if np.isfinite(m).any()), default=1.0)
    ticks = range(len(labels))
    for ax, (kind, values) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(values, cmap="magma", vmin=0, vmax=max(top, 1e-9))
        ax.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 2 else 0)
        ax.set_yticks(ticks, labels if ax is axes[0] else [""] * len(labels))
        ax.set_title(kind, color=INK, fontsize=TEXT)
        ax.tick_params(labelsize=0.85 * TEXT)
    _colour_bar(figure, image, axes, "nats")
    return figure


def pair_divergences(found: ClipSet) -> np.ndarray:
    """(C, C): mean KL(p_i || p_j) over clips i whose likeliest class is the row's and clips j whose
    likeliest is the column's; NaN where there is no such clip. mIS is exp of their weighted mean.
    """
    p = found.probs
    log = np.log(np.maximum(p, 2.0**-126))
    member = np.eye(p.shape[1])[p.argmax(1)]  # (n, C)
    count = member.sum(0)
    weight = np.divide(member, count, out=np.full(member.shape, np.nan), where=count > 0).T
    return (weight @ (p * log).sum(1))[:, None] - (weight @ p) @ (weight @ log).T


def class_bars(sets: dict[str, ClipSet], labels: list[str]) -> Figure:
    """AM: the share of each class."""
    values = {kind: shares(found) for kind, found in sets.items()}
    return _bars(values, labels, "share of the clips")


def recall_bars(recalls: dict[str, np.ndarray], labels: list[str]) -> Figure:
    """How much of each class the classifier recognises, where the truth is known."""
    return _bars(recalls, labels, "recognised")


def bin_bars(bins: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Figure:
    """NDB: share of the clips in each bin, largest first; strong where the two differ."""
    figure, (ax,) = _figure(1)
    order = np.argsort(-bins[0], kind="stable")
    real, generated, differs = (x[order] for x in bins)
    place = np.arange(len(real))
    for strong in (False, True):
        rows = differs == strong
        label = "generated, different" if strong else "generated, alike"
        ax.bar(place[rows], generated[rows], 0.75, color=ACCENT, alpha=1 if strong else 0.35,
               label=label)  # fmt: skip
    edges = np.arange(len(real) + 1) - 0.5
    ax.stairs(real, edges, color=COLOURS["real"], linewidth=1.5, label="real")
    ax.set(xlim=(-0.7, len(real) - 0.3), xticks=[], ylabel="share of the clips")
    ax.set_xlabel(f"{len(real)} bins, largest first")
    _legend(ax)
    return figure


def nearest_histogram(found: dict[str, Neighbours], copy_limit: float) -> Figure:
    """Nearest neighbours: how far each clip is from the closest real one, and what is too close."""
    figure, (ax,) = _figure(1)
    distances = {kind: near.distance[near.closest()] for kind, near in found.items()}
    top = max((float(x.max()) for x in distances.values() if len(x)), default=1.0)
    edges = np.linspace(0, 1.02 * max(top, copy_limit), 49)
    for kind, x in distances.items():
        share = np.histogram(x, edges)[0] / max(1, len(x))
        ax.stairs(share, edges, color=COLOURS[kind], linewidth=1.8, label=kind)
        ax.stairs(share, edges, color=COLOURS[kind], alpha=0.12, fill=True)
    ax.axvline(copy_limit, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set(xlim=(0, edges[-1]), ylim=(0, None), xlabel="dB to the nearest real clip")
    ax.set_ylabel("share of the clips")
    _legend(ax)
    return figure


def confusion_map(sets: dict[str, ClipSet], labels: list[str]) -> Figure:
    """What was told or recorded, by row, and what the classifier hears, by column: shares of the
    row. One map for each set whose labels are known, the last two at most."""
    known = [kind for kind, found in sets.items() if truth(found, labels) is not None][-2:]
    figure, axes = _figure(len(known))
    ticks = range(len(labels))
    for ax, kind in zip(axes, known, strict=True):
        counts = np.zeros((len(labels), len(labels)))
        np.add.at(counts, (truth(sets[kind], labels), sets[kind].probs.argmax(1)), 1)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        image = ax.imshow(shares, cmap="magma", vmin=0, vmax=1)
        ax.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 2 else 0)
        ax.set_yticks(ticks, labels if ax is axes[0] else [""] * len(labels))
        ax.set_title(kind, color=INK, fontsize=TEXT)
        ax.tick_params(labelsize=0.85 * TEXT)
        ax.set_xlabel("heard")
    axes[0].set_ylabel("told")
    _colour_bar(figure, image, axes, "share of the clips of a row")
    return figure


def _colour_bar(figure: Figure, image: Any, axes: list[Axes], label: str) -> None:
    """The colours of maps, explained below them."""
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", pad=0.03, aspect=40)
    bar.set_label(label, color=INK, fontsize=TEXT)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=TEXT, length=2)


def _bars(values: dict[str, np.ndarray], labels: list[str], what: str) -> Figure:
    figure, (ax,) = _figure(1)
    place, width = np.arange(len(labels)), 0.8 / max(1, len(values))
    for i, (kind, heights) in enumerate(values.items()):
        x = place + (i + 0.5) * width - 0.4
        ax.bar(x, np.nan_to_num(heights), width * 0.9, color=COLOURS[kind], label=kind)
    ax.set_xticks(place, labels, rotation=45 if sum(map(len, labels)) > 30 else 0)
    ax.set(ylabel=what, ylim=(0, None))
    _legend(ax)
    return figure


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    """A transparent figure that reads on white and on near-black."""
    figure = new_figure(WIDTH, 0.65 * WIDTH)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for ax in axes:
        ax.patch.set_alpha(0)
        ax.tick_params(colors=INK, labelsize=TEXT, length=3)
        ax.xaxis.label.set(color=INK, size=TEXT)
        ax.yaxis.label.set(color=INK, size=TEXT)
        ax.spines[:].set(color=INK, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _long(ax: Axes) -> bool:
    return sum(map(len, ax.get_legend_handles_labels()[1])) > 30


def _legend(ax: Axes) -> None:
    """Above the axes, where nothing is hidden."""
    ax.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=2 if _long(ax) else 3, frameon=False,
        borderaxespad=0.2, labelcolor=INK, fontsize=TEXT, markerscale=1.6, handlelength=1.2,
        columnspacing=1.2,
    )  # fmt: skip


# ---- the page -------------------------------------------------------------------------------


def page(report: Report) -> str:
    """One HTML file with the table, the pictures, and the best and worst clips to listen to."""
    listen = _listen(report)
    return _PAGE.format(
        title=html.escape(report.title),
        style=STYLE + _MORE_STYLE,
        script=SCRIPT,
        table=_html_table(report),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in report.notes),
        pictures="".join(_pictures(report)),
        listen=listen,
        broken=_broken(report),
    )


def _html_table(report: Report) -> str:
    """A row for each score and a column for each set, of which there are few: it fits a phone."""
    columns = list(zip(*table(report, arrows=True), strict=True))
    marks = [f'<i style="background:{COLOURS[row.kind]}"></i>' for row in report.rows]
    names = zip(marks, columns[0][1:], strict=True)
    heads = "".join(f'<th scope="col">{mark}{html.escape(name)}</th>' for mark, name in names)
    lines = [f"<thead><tr><td></td>{heads}</tr></thead><tbody>"]
    for name, *values in columns[1:]:
        cells = ""
        for text in values:
            value, _, interval = text.partition(" [")
            below = f"<small>{html.escape(interval[:-1].replace(', ', ' – '))}</small>"
            cells += f"<td>{html.escape(value)}{below if interval else ''}</td>"
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    return "\n".join(lines) + "</tbody>"


def _pictures(report: Report) -> list[str]:
    sets, labels = report.sets, report.labels
    last = report.rows[-1]
    pictures = [
        ("fid", "Features", "one point per clip, on the axes of most variance; FID is the distance "
         "of the clouds, 0 at best", feature_map(sets)),
        ("is", "Confidence", f"IS grows to {len(labels)} as the classifier is sure of every clip, "
         "and every class is there", confidence_histogram(sets)),
        ("mis", "Pairs", "mean KL divergence between the clips of two classes; the diagonal is "
         "variety within a class", pair_map(sets, labels)),
        ("am", "Classes", "AM falls to 0 as every clip is sure and the classes have the real "
         "shares", class_bars(sets, labels)),
    ]  # fmt: skip
    if report.bins is not None:
        share = "NDB is the share of the bins that hold too many or too few clips"
        pictures.append(("ndb", "Bins", share, bin_bars(report.bins)))
    recalls = {kind: recall(found, labels) for kind, found in sets.items()}
    recalls = {kind: values for kind, values in recalls.items() if values is not None}
    if recalls:
        known = "how much of each class the classifier recognises where the truth is known"
        pictures.append(("accuracy", "Recall", known, recall_bars(recalls, labels)))
        heard = "rows are what was told (of recordings: said), columns what the classifier hears"
        pictures.append(("heard", "Confusion", heard, confusion_map(sets, labels)))
    if report.nearest:
        far = "dB to the nearest real clip, of real ones to another; copies are left of the line"
        figure = nearest_histogram(report.nearest, report.copy_limit)
        pictures.append(("nearest", "Nearest neighbours", far, figure))
    cards = []
    for key, title, caption, figure in pictures:
        width, height = map(int, figure.get_size_inches() * figure.dpi)
        value = f"{SCORES[key][0]} {cell(last, key)}" if key in last.scores else ""
        cards.append(f"""
<article>
  <header><h2>{title}</h2><p class="facts">{html.escape(value)}</p></header>
  <p class="caption">{html.escape(caption)}</p>
  <img alt="{html.escape(f"{title}: {caption}")}" width="{width}" height="{height}"
    src="{data_uri("image/webp", webp(figure))}">
</article>""")
    return cards


def _listen(report: Report) -> str:
    """Cards of clips of the last set: the surest of each class, the least sure, and those that are
    closest to real clips, each beside its neighbour.
    """
    kind = report.rows[-1].kind
    found = report.sets[kind]
    if not found.clips:
        return ""
    sure, guess = found.probs.max(1), found.probs.argmax(1)
    of_class = [np.flatnonzero(guess == c) for c in range(len(report.labels))]
    best = [int(rows[sure[rows].argmax()]) for rows in of_class if len(rows)]
    best.sort(key=lambda i: -sure[i])
    worst = [int(i) for i in np.argsort(sure, kind="stable")[:N_WORST] if int(i) not in best]
    words = {i: _says(found, i, report.labels) for i in best + worst}
    sections = [
        ("The surest clip of each class", [(found.clips[i], words[i]) for i in best]),
        ("The least sure clips", [(found.clips[i], words[i]) for i in worst]),
    ]
    if kind in report.nearest:
        near, pairs = report.nearest[kind], []
        for i in near.closest()[:N_PAIRS]:
            real = report.sets["real"].clips[near.index[i]]
            caption = f"{near.distance[i]:.2f} dB from {real.name}"
            pairs += [(found.clips[near.rows[i]], caption), (real, "its nearest real clip")]
        sections.append(("The clips closest to real ones", pairs))
    return "".join(_section(title, clips) for title, clips in sections)


def _says(found: ClipSet, i: int, labels: list[str]) -> str:
    """What the classifier thinks likeliest of one clip, and what the clip was told."""
    likely = np.argsort(-found.probs[i])[:3]
    told = f"told {found.clips[i].label} · " if found.clips[i].label else ""
    return told + ", ".join(f"{labels[c]} {found.probs[i, c]:.1%}" for c in likely)


def _section(title: str, clips: list[tuple[data.Clip, str]]) -> str:
    """Cards under a heading, of clips and captions."""
    cards = []
    for clip, caption in clips:
        try:
            sound = data.read_clip(clip)
        except audio.AudioError:  # deleted since it was scored
            continue
        cards.append(card(Clip(clip.name, sound.wav, sound.rate, caption)))
    return f"<h2 class='part'>{title}</h2><main>{''.join(cards)}</main>" if cards else ""


def _broken(report: Report) -> str:
    items = [
        f"<li>{html.escape(f'{clip}: {reason}')}</li>"
        for found in report.sets.values()
        for clip, reason in found.broken
    ]
    if not items:
        return ""
    count = f"{len(items)} clip" + "s" * (len(items) != 1)
    listing = "".join(items)
    return f"<details><summary>{count} left out</summary><ul>{listing}</ul></details>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header class="top"><h1>{title}</h1><button id="all" type="button" hidden>Play all</button></header>
<table>{table}</table>
<ul class="note">{notes}</ul>
{broken}
<main>{pictures}
</main>
{listen}
<script>{script}</script>
</body>
</html>
"""

_MORE_STYLE = """
table { width: 100%; max-width: 48rem; border-collapse: separate; border-spacing: 0;
  margin-bottom: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .75rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem clamp(.3rem, 1.5vw, .75rem); text-align: right; vertical-align: top; }
th { font-weight: 600; overflow-wrap: anywhere; }
td small { display: block; color: var(--soft); }
tbody th, tbody td { border-top: 1px solid var(--line); }
tbody th { text-align: left; color: var(--soft); font-size: .875rem; }
th i { display: inline-block; width: .7rem; height: .7rem; margin-right: .6rem;
  border-radius: 50%; }
ul.note { padding-left: 1.1rem; max-width: 60rem; white-space: normal; }
.part { font-size: 1.25rem; margin: 2.5rem 0 1rem; }
details { margin-bottom: 1.5rem; color: var(--soft); font-size: .875rem; }
article header { flex-wrap: nowrap; }
article header .facts { text-align: right; }
"""
