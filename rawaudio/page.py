"""A page to listen to clips, in one HTML file: players, waveforms, spectrograms.

    write_page("out/index.html", [Clip("zero", wav, 8000, "2.31 nats")], "Digits")

The file needs no network and no other file; it can be mailed, or opened years later.
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
    from matplotlib.figure import Figure

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
    """An empty figure of matplotlib, in inches, that draws without a screen.

    It belongs to the caller and to no pyplot state: nothing has to be closed.
    """
    if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", "")):
        # A notebook sets it for what it starts, too; that Python may not have its backend, and
        # the import would fail.
        import matplotlib

        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


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
        x, n_fft, hop, window, torch.hann_window(window, dtype=x.dtype), center=True,
        pad_mode="constant", return_complex=True,
    )  # fmt: skip
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
        origin="lower", aspect="auto", cmap="magma", vmin=-RANGE, vmax=0,
        extent=(0, seconds, 0, sample_rate / 2000), interpolation="antialiased",
    )  # fmt: skip
    bottom.set(xlim=(0, seconds), xlabel="seconds", ylabel="kHz")
    bar = figure.colorbar(image, ax=bottom, pad=0.01, aspect=12, ticks=[-RANGE, 0])
    bar.set_label("dB", color=INK, fontsize=TEXT, labelpad=-12)
    bar.outline.set_visible(False)
    for axes in (top, bottom, bar.ax):
        axes.patch.set_alpha(0)
        axes.tick_params(colors=INK, labelsize=TEXT, length=3)
        axes.xaxis.label.set(color=INK, size=TEXT)
        axes.yaxis.label.set(color=INK, size=TEXT)
        for spine in axes.spines.values():
            spine.set(color=INK, linewidth=0.6)
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
    figure.savefig(data, format="webp", transparent=True, pil_kwargs={"quality": 80})
    return data.getvalue()


def pixels(figure: Figure) -> np.ndarray:
    """The figure as it is drawn: uint8 (height, width, 3)."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


# ---- the page -----------------------------------------------------------------------------


def write_page(
    path: str | os.PathLike, clips: Sequence[Clip], title: str, note: str = "", body: str = ""
) -> None:
    """Writes one self-contained HTML file with a player and a picture for each clip, whole or not.

    title, note, names and captions are plain text; body is HTML above the clips. Directories are
    made; an existing file is replaced. Raises ValueError for a clip that `audio.write` refuses
    (empty, NaN, too loud), OSError if the disk will not take it.
    """
    cards = "".join(card(clip) for clip in clips)
    count = f"{len(clips)} clip" + "s" * (len(clips) != 1)
    total = f"{sum(clip.seconds for clip in clips):.1f} s"
    page = _PAGE.format(
        title=html.escape(title),
        note=(f'<p class="note">{html.escape(note)}</p>' if note else "") + body,
        summary=f"{count} · {total}",
        cards=cards,
        style=STYLE,
        script=SCRIPT,
    )
    write_text(path, page)


def card(clip: Clip) -> str:
    """The clip's HTML: its name, waveform, spectrogram and player, all in the text itself."""
    with tempfile.TemporaryDirectory() as folder:  # the bytes that a file on disk would have
        audio.write(Path(folder, "clip.wav"), clip.wav, clip.sample_rate)
        wav = Path(folder, "clip.wav").read_bytes()
    figure = spectrogram_figure(clip.wav, clip.sample_rate)
    width, height = map(int, figure.get_size_inches() * figure.dpi)
    name = html.escape(clip.name)
    caption = f'<p class="caption">{html.escape(clip.caption)}</p>' if clip.caption else ""
    return f"""
<article>
  <header><h2>{name}</h2>
  <p class="facts">{clip.seconds:.2f} s · {clip.sample_rate / 1000:g} kHz</p></header>
  {caption}
  <img alt="Waveform and spectrogram of {name}, {clip.seconds:.2f} seconds"
    width="{width}" height="{height}" src="{data_uri("image/webp", webp(figure))}">
  <audio controls preload="metadata" aria-label="{name}" src="{data_uri("audio/wav", wav)}"></audio>
</article>"""


def data_uri(kind: str, data: bytes) -> str:
    """The bytes, of MIME type `kind`, as a URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


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
<header class="top">
  <div><h1>{title}</h1><p class="facts">{summary}</p></div>
  <button id="all" type="button" hidden>Play all</button>
</header>
{note}
<main>{cards}
</main>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { --back: #f6f5f3; --card: #fff; --line: #e4e1dc; --ink: #1d2126; --soft: #666c74;
  --accent: #c8482a; --on: #fff; }
@media (prefers-color-scheme: dark) { :root { --back: #131517; --card: #1b1e21; --line: #2d3136;
  --ink: #e9ebed; --soft: #9aa1a9; --accent: #f28c6f; --on: #1b1e21; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: clamp(1rem, 4vw, 3rem); background: var(--back);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline;
  gap: .25rem 1rem; }
.top { align-items: center; margin-bottom: 1rem; }
h1, h2, p { margin: 0; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -.01em; }
h2 { font-size: 1rem; font-weight: 600; }
.facts, .caption, .note { color: var(--soft); font-size: .875rem;
  font-variant-numeric: tabular-nums; }
.note { max-width: 44rem; margin-bottom: 1.5rem; white-space: pre-line; }
main { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
article { display: flex; flex-direction: column; padding: 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .75rem; }
article.playing { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
img { width: 100%; height: auto; margin: .75rem 0; }
audio { width: 100%; height: 2.5rem; margin-top: auto; }
button { padding: .6rem 1.4rem; border: 0; border-radius: 2rem; background: var(--accent);
  color: var(--on); font: inherit; font-weight: 600; cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
"""

SCRIPT = """
const clips = [...document.querySelectorAll("audio")], all = document.getElementById("all");
let chain = false;  // is "play all" running?
const show = on => { chain = on; all.textContent = on ? "Stop" : "Play all"; };
all.hidden = clips.length < 2;
all.onclick = () => {
  if (chain) { show(false); clips.forEach(a => a.pause()); return; }
  show(true); clips.forEach(a => { a.pause(); a.currentTime = 0; }); clips[0].play();
};
clips.forEach((a, i) => {
  const card = a.closest("article");
  a.onplay = () => {
    clips.forEach(b => b !== a && b.pause());
    card.classList.add("playing");
    if (chain) card.scrollIntoView({block: "nearest"});
  };
  a.onpause = () => card.classList.remove("playing");
  a.onended = () => {
    if (chain && i + 1 < clips.length) { clips[i + 1].currentTime = 0; clips[i + 1].play(); }
    else show(false);
  };
});
"""
