"""Runs of the benchmark: on which machine, as a file, as a picture, one beside the other."""

import json
import os
import platform
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rawaudio.errors import UserError
from rawaudio.files import write_atomically, write_text
from rawaudio.page import ACCENT, INK, new_figure, style_axes, webp

FLAGS = ("avx2", "f16c", "fma", "avx512f", "avx512_bf16", "avx_vnni", "amx_bf16", "asimd", "sve")
EARLIER = "#8a929b"


def machine(device: torch.device, threads: int) -> str:
    """What the figures were measured on, in a line: processor, its vector flags, GPU, versions."""
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:
        said = ""
    found = {key: re.search(rf"^{key}\s*:(.*)$", said, re.M) for key in ("model name", "flags")}
    name, flags = (m[1].strip() if m else "" for m in found.values())
    flags = " ".join(flag for flag in FLAGS if flag in flags.split())
    parts = [f"{name or platform.processor() or platform.machine()}" + f" ({flags})" * bool(flags)]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    parts += [
        f"{threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores",
        f"PyTorch {torch.__version__}",
    ]
    return ", ".join(parts)


def table_line(row: dict[str, float | str], before: dict[str, Any] | None = None) -> str:
    """A row as it stands in the table; before: an earlier run, see `load`."""

    def number(key: str, text: str) -> str:
        return text.format(row[key]) if key in row else ""

    cells = [row["what"], number("first", "{:.3g} s"), number("again", "{:.3g} s")]
    cells += [number("audio", "{:.2g} x"), number("mib", "{:,.0f} MiB")]
    cells.append(number("error", "{:.0e}"))
    if before:
        earlier = before["rows"].get(row["what"])
        cells += ["", ""]
        if earlier:
            cells[-2:] = f"{earlier['again']:.3g} s", f"{earlier['again'] / row['again']:.2f}"
    return "| " + " | ".join(cells) + " |"


def save(path: Path, where: str, rows: list[dict[str, Any]], before: dict[str, Any] | None) -> None:
    """The run as JSON, and beside it the picture, with the run before it if there is one."""
    write_text(path, json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    write_atomically(path.with_suffix(".webp"), picture(where, rows, before))


def load(path: str) -> dict[str, Any]:
    """What `save` wrote: machine, and rows by what they measure; UserError for another file."""
    try:
        run = json.loads(Path(path).read_text())
        rows = {row["what"]: row for row in run["rows"]}
        times = [row[key] for row in rows.values() for key in ("first", "again")]
        if not times or min(times) <= 0:
            raise ValueError
        return {"machine": str(run["machine"]), "rows": rows}
    except OSError as error:
        raise UserError(f"compare={path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"compare={path}: no file that out= of this command has written") from None


def picture(where: str, rows: list[dict[str, Any]], before: dict[str, Any] | None) -> bytes:
    """WebP: seconds of every row, the first time and again, and of the run before it."""
    figure = new_figure(4.2, 1.4 + 0.42 * len(rows))
    ax = figure.subplots()
    style_axes(ax)
    place = np.arange(len(rows))[::-1]
    ax.hlines(
        place, [r["again"] for r in rows], [r["first"] for r in rows], color=ACCENT, alpha=0.4
    )
    ax.plot([r["first"] for r in rows], place, "o", color=ACCENT, fillstyle="none", label="first")
    ax.plot([r["again"] for r in rows], place, "o", color=ACCENT, label="again")
    if before:
        earlier = [before["rows"].get(r["what"], {}).get("again", np.nan) for r in rows]
        ax.plot(earlier, place, "|", color=EARLIER, markersize=14, label="again, earlier")
    for y, row in zip(place, rows, strict=True):  # above its line: half a phone is too narrow
        ax.text(0, y + 0.25, row["what"], transform=ax.get_yaxis_transform(), color=INK, size=8)
    ax.set(xscale="log", yticks=[], ylim=(-0.5, len(rows) - 0.2), xlabel="seconds")
    ax.tick_params(which="both", colors=INK)
    ax.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(textwrap.fill(where, 56), color=INK, fontsize=8)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
    return webp(figure)
