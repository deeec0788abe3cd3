"""Pictures of what the scores measure, for light and dark pages.

Arrays by the kind of their set (real, test, generated) in, a matplotlib figure out.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from metrics.scores import log
from rawaudio.page import ACCENT, INK, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"real": "#8a929b", "test": "#4f9dd6", "generated": ACCENT}
WIDTH, TEXT = 4.2, 10  # inches, points: on a phone letters are 11 pixels high
MAX_POINTS = 2000  # of one set in the feature map


def feature_map(features: dict[str, np.ndarray]) -> Figure:
    """Each clip as a point, on the two principal axes of the first set: arrays (n, D)."""
    x = next(iter(features.values())).astype(np.float64)
    mean = x.mean(0)
    variance, axes = np.linalg.eigh((x - mean).T @ (x - mean))
    axes, explained = axes[:, :-3:-1], variance[:-3:-1] / max(variance.sum(), 1e-300)
    figure, (ax,) = _figure(1)
    rng = np.random.default_rng(0)
    for kind, x in features.items():
        rows = np.sort(rng.permutation(len(x))[:MAX_POINTS])
        points = (x[rows] - mean) @ axes
        size = 9 if len(rows) > 500 else 16
        ax.scatter(*points.T, s=size, c=COLOURS[kind], alpha=0.55, linewidths=0, label=kind)
    names = [f"principal axis {i + 1}, {share:.0%}" for i, share in enumerate(explained)]
    ax.set(xlabel=names[0], ylabel=names[-1], xticks=[], yticks=[])
    _legend(ax)
    return figure


def histogram(values: dict[str, np.ndarray], edges: np.ndarray, limit: float, label: str) -> Figure:
    """Shares of the clips by value, (n,) of each set, and a line at `limit`."""
    figure, (ax,) = _figure(1)
    for kind, x in values.items():
        share = np.histogram(x, edges)[0] / max(1, len(x))
        ax.stairs(share, edges, color=COLOURS[kind], linewidth=1.8, label=kind)
        ax.stairs(share, edges, color=COLOURS[kind], alpha=0.12, fill=True)
    ax.axvline(limit, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set(xlim=edges[[0, -1]], ylim=(0, None), xlabel=label, ylabel="share of the clips")
    _legend(ax)
    return figure


def bars(values: dict[str, np.ndarray], labels: list[str], label: str) -> Figure:
    """A bar for each class, (C,), of each set."""
    figure, (ax,) = _figure(1)
    place, width = np.arange(len(labels)), 0.8 / max(1, len(values))
    for i, (kind, heights) in enumerate(values.items()):
        x = place + (i + 0.5) * width - 0.4
        ax.bar(x, heights, width * 0.9, color=COLOURS[kind], label=kind)
    ax.set_xticks(place, labels, rotation=45 if sum(map(len, labels)) > 30 else 0)
    ax.set(ylabel=label, ylim=(0, None))
    _legend(ax)
    return figure


def intervals(
    values: dict[str, tuple[float, float, float]], limits: tuple[float, float], label: str
) -> Figure:
    """A point and its interval, (value, low, high), for each name; one below the other."""
    figure = new_figure(WIDTH, 0.75 + 0.3 * len(values))
    ax = figure.subplots()
    style_axes(ax)
    place = np.arange(len(values))[::-1]
    points, lows, highs = np.array(list(values.values())).reshape(-1, 3).T
    ax.hlines(place, lows, highs, color=ACCENT, linewidth=2.5, alpha=0.5)
    ax.plot(points, place, "o", color=ACCENT, markersize=6)
    ax.set_yticks(place, [textwrap.shorten(name, 22, placeholder="…") for name in values])
    margin = 0.03 * (limits[1] - limits[0])
    ax.set(xlim=(limits[0] - margin, limits[1] + margin), ylim=(-0.6, len(values) - 0.4))
    ax.set_xlabel(label)
    ax.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return figure


def maps(
    values: dict[str, np.ndarray], labels: list[str], label: str, rows: str = "", columns: str = ""
) -> Figure:
    """A map of numbers for pairs of classes, (C, C), of each set, with names of its axes."""
    figure, axes = _figure(len(values))
    finite = np.concatenate([x[np.isfinite(x)] for x in values.values()])
    top = max(finite.max(initial=0), 1e-9)
    ticks = range(len(labels))
    for ax, (kind, x) in zip(axes, values.items(), strict=True):
        image = ax.imshow(x, cmap="magma", vmin=0, vmax=top)
        ax.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 2 else 0)
        ax.set_yticks(ticks, labels if ax is axes[0] else [""] * len(labels))
        ax.set_title(kind, color=INK, fontsize=TEXT)
        ax.tick_params(labelsize=0.85 * TEXT)
        ax.set_xlabel(columns)
    axes[0].set_ylabel(rows)
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", pad=0.03, aspect=40)
    bar.set_label(label, color=INK, fontsize=TEXT)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=TEXT, length=2)
    return figure


def pair_divergences(probs: np.ndarray) -> np.ndarray:
    """(C, C): mean KL(p_i || p_j) over clips i whose likeliest class is the row's and clips j whose
    likeliest is the column's; NaN where there is no such clip. mIS is exp of their weighted mean.
    """
    member = np.eye(probs.shape[1])[probs.argmax(1)]  # (n, C)
    count = member.sum(0)
    weight = np.divide(member, count, out=np.full(member.shape, np.nan), where=count > 0).T
    negative_entropy = (probs * log(probs)).sum(1)
    return (weight @ negative_entropy)[:, None] - (weight @ probs) @ (weight @ log(probs)).T


def confusion(probs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(C, C): of the clips whose true class is the row's, the share that is heard as the column's;
    0 in a row without clips. The diagonal is the recall.
    """
    counts = np.zeros((probs.shape[1],) * 2)
    np.add.at(counts, (truth, probs.argmax(1)), 1)
    return share_of_rows(counts)


def share_of_rows(counts: np.ndarray) -> np.ndarray:
    """Counts (C, C) over the sum of their row; 0 in an empty one."""
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def bin_bars(bins: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Figure:
    """Share of the clips in each bin of `scores.ndb_bins`, strong where the two differ."""
    figure, (ax,) = _figure(1)
    order = np.argsort(-bins[0], kind="stable")
    real, generated, differs = (x[order] for x in bins)
    place = np.arange(len(real))
    for rows, label, alpha in (~differs, "alike", 0.35), (differs, "different", 1):
        label = f"generated, {label}"
        heights = np.where(rows, generated, 0)
        ax.bar(place, heights, 0.75, color=ACCENT, alpha=alpha, label=label)
    edges = np.arange(len(real) + 1) - 0.5
    ax.stairs(real, edges, color=COLOURS["real"], linewidth=1.5, label="real")
    ax.set(xlim=(-0.7, len(real) - 0.3), xticks=[], ylabel="share of the clips")
    ax.set_xlabel(f"{len(real)} bins, largest first")
    _legend(ax)
    return figure


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    """A transparent figure that reads on white and on near-black."""
    figure = new_figure(WIDTH, 0.65 * WIDTH)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    style_axes(*axes)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(ax: Axes) -> None:
    """Above the axes, where nothing is hidden."""
    is_long = sum(map(len, ax.get_legend_handles_labels()[1])) > 30
    style = {"frameon": False, "labelcolor": INK, "fontsize": TEXT, "markerscale": 1.6}
    space = {"borderaxespad": 0.2, "handlelength": 1.2, "columnspacing": 1.2}
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2 if is_long else 3}
    ax.legend(**place, **style, **space)
