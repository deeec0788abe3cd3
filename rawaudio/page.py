"""Pages in one HTML file: players, waveforms, spectrograms.

    write_page("out/index.html", [Clip("zero", wav, 8000, "2.31 nats")], "Digits")

It needs no network and no other file. `html_page` makes the pages with other contents.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rawaudio import audio
from rawaudio.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE, SCRIPT = (Path(__file__).with_name(f"page.{kind}").read_text() for kind in ("css", "js"))

WINDOW = 0.016  # seconds: two or more pitch periods of most voices, short enough to show them
HOP = 0.004  # seconds
RANGE = 80  # dB shown below the loudest point
MAX_COLUMNS = 4000  # of a spectrogram: long clips get a longer hop

INK = "#7b8189"  # axes and labels: readable on white and on near-black
ACCENT = "#ee7b5e"
# A picture's inches across and its letters in points: on a phone, where a card leaves it 334
# pixels, letters are 11 pixels high.
WIDTH, TEXT = 4.2, 10


@dataclass
class Clip:
    """One clip of a page. wav: float (T,), T >= 1, in [-1, 1]; sample_rate in Hz."""

    name: str
    wav: Tensor
    sample_rate: int
    caption: str = ""

    @property
    def seconds(self) -> float:
        return len(self.wav) / self.sample_rate


# ---- pictures -----------------------------------------------------------------------------


def new_figure(width: float, height: float, dpi: int = 200) -> Figure:
    """An empty figure of matplotlib, in inches, that needs no screen, no pyplot and no closing."""
    if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", "")):
        import matplotlib  # which fails for the backend of a notebook that this Python lacks

        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_axes(*axes: Axes) -> None:
    """Ink that reads on white and on near-black, letters for a phone, no background."""
    for ax in axes:
        ax.patch.set_alpha(0)
        ax.tick_params(colors=INK, labelsize=TEXT, length=3)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set(color=INK, size=TEXT)
        ax.spines[:].set(color=INK, linewidth=0.6)


def spectrogram(wav: Tensor, sample_rate: int) -> Tensor:
    """Power of a clip (T,), T >= 1, in dB below its maximum: (frequencies, times) in [-80, 0].

    Hann windows of 16 ms every 4 ms; frequencies from 0 to half the sample rate. Silence is -80
    everywhere.
    """
    window = max(2, round(WINDOW * sample_rate))
    hop = max(1, round(HOP * sample_rate), len(wav) // MAX_COLUMNS)
    n_fft = 4 * 2 ** math.ceil(math.log2(window))  # zero-padded, for a smooth picture
    x = wav.detach().cpu().double()
    bins = torch.stft(
        x,
        n_fft,
        hop,
        window,
        torch.hann_window(window, dtype=x.dtype),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = bins.abs().square()
    # 1e-9 of full scale is below what 16 bits can hold: silence, not a picture of rounding errors
    decibel = 10 * (power / power.max().clamp(min=1e-9)).clamp(min=10 ** (-RANGE / 10)).log10()
    return decibel.float()


def spectrogram_figure(wav: Tensor, sample_rate: int) -> Figure:
    """A clip's waveform above its spectrogram, over the same seconds.

    wav: float (T,), T >= 1, in [-1, 1]. The frequency axis is in kHz, the colours span 80 dB.
    """
    wav = wav.detach().cpu().float()
    seconds = len(wav) / sample_rate
    figure = new_figure(WIDTH, 0.55 * WIDTH)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[1, 2])

    from matplotlib.ticker import MaxNLocator  # as late as new_figure

    times, values = _outline(wav, seconds)
    top.plot(times, values, color=ACCENT, linewidth=0.7)
    peak = max(float(wav.abs().max()), 0.01) * 1.1
    top.set(ylim=(-peak, peak), ylabel="level")
    top.yaxis.set_major_locator(MaxNLocator(2))

    image = bottom.imshow(
        spectrogram(wav, sample_rate).numpy(),
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=-RANGE,
        vmax=0,
        extent=(0, seconds, 0, sample_rate / 2000),
        interpolation="antialiased",
    )
    bottom.set(xlim=(0, seconds), xlabel="seconds", ylabel="kHz")
    bar = figure.colorbar(image, ax=bottom, pad=0.01, aspect=12, ticks=[-RANGE, 0])
    bar.set_label("dB", labelpad=-12)
    bar.outline.set_visible(False)
    style_axes(top, bottom, bar.ax)
    top.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels([top, bottom])
    return figure


def _outline(wav: Tensor, seconds: float) -> tuple[Tensor, Tensor]:
    """Times and values of a line that looks like the waveform: extremes of ~2,000 short blocks."""
    size = max(1, len(wav) // 2000)
    blocks = wav[: len(wav) // size * size].view(-1, size)
    values = torch.stack([blocks.amin(1), blocks.amax(1)], 1).flatten() if size > 1 else wav
    return (torch.arange(len(values)) + 0.5) / len(values) * seconds, values


def webp(figure: Figure) -> bytes:
    """The figure without background, for light and dark pages; a quarter of the size of a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="webp", transparent=True, pil_kwargs={"quality": 60})
    return data.getvalue()


def pixels(figure: Figure) -> np.ndarray:
    """The figure as it is drawn: uint8 (height, width, 3)."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


# ---- the page -----------------------------------------------------------------------------


def html_page(title: str, *parts: str, facts: str = "", style: str = "") -> str:
    """One HTML file that needs no other: for light and dark screens, of 400 pixels and of 1,280.

    title, facts (below it): plain text. parts: HTML, one after the other, such as a
    <main> of cards. Where there are players, a button plays them all. style: more CSS.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
{STYLE}{style}</style>
</head>
<body>
<header class="top">
  <div><h1>{html.escape(title)}</h1><p class="facts">{html.escape(facts)}</p></div>
  <button id="all" type="button" hidden>Play all</button>
</header>
{"".join(parts)}
<script>
{SCRIPT}</script>
</body>
</html>
"""


def figure_card(title: str, facts: str, caption: str, figure: Figure, alt: str, more="") -> str:
    """A picture below its title, facts and caption, which are plain text; more: HTML below it."""
    width, height = map(int, figure.get_size_inches() * figure.dpi)
    caption = f'\n  <p class="caption">{html.escape(caption)}</p>' if caption else ""
    return f"""
<article>
  <header><h2>{html.escape(title)}</h2><p class="facts">{html.escape(facts)}</p></header>{caption}
  <img alt="{html.escape(alt)}" width="{width}" height="{height}"
    src="{data_uri("image/webp", webp(figure))}">{more}
</article>"""


def card(clip: Clip) -> str:
    """The clip's name, waveform, spectrogram and player."""
    with tempfile.TemporaryDirectory() as folder:  # the bytes that a file on disk would have
        audio.write(Path(folder, "clip.wav"), clip.wav, clip.sample_rate)
        source = data_uri("audio/wav", Path(folder, "clip.wav").read_bytes())
    label = html.escape(clip.name)
    player = f'\n  <audio controls preload="metadata" aria-label="{label}" src="{source}"></audio>'
    facts = f"{clip.seconds:.2f} s · {clip.sample_rate / 1000:g} kHz"
    alt = f"Waveform and spectrogram of {clip.name}, {clip.seconds:.2f} seconds"
    figure = spectrogram_figure(clip.wav, clip.sample_rate)
    return figure_card(clip.name, facts, clip.caption, figure, alt, player)


def write_page(
    path: str | os.PathLike, clips: Sequence[Clip], title: str, note: str = "", body: str = ""
) -> None:
    """Writes a page with a player and a picture for each clip, whole or not at all.

    title, note, names and captions are plain text; body is HTML above the clips. Directories are
    made; an existing file is replaced. Raises ValueError for a clip that `audio.write` refuses
    (empty, NaN, too loud), OSError if the disk will not take it.
    """
    facts = f"{len(clips)} clip{'s' * (len(clips) != 1)} · {sum(c.seconds for c in clips):.1f} s"
    above = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
    cards = f"<main>{''.join(map(card, clips))}\n</main>"
    write_text(path, html_page(title, above, body, cards, facts=facts))


def data_uri(kind: str, data: bytes) -> str:
    """The bytes, of MIME type `kind`, as a URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
