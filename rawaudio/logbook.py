"""What a training run writes down, in its own folder.

    metrics.jsonl   every number with its step, a line of JSON each
    events.*        the same for TensorBoard, with clips, spectrograms and histograms
    README.md       how the run was started and how it went; curves.png is its picture

One process at a time writes in a folder. A run that goes on from step n forgets what was written
after it, and lines that were cut short.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.tensorboard import summary

from rawaudio.config import as_written
from rawaudio.errors import UserError
from rawaudio.files import write_atomically, write_text
from rawaudio.page import ACCENT, INK, new_figure, pixels, spectrogram_figure
from sashimi.s4 import S4

if TYPE_CHECKING:
    from matplotlib.figure import Figure

try:
    import fcntl
except ImportError:  # no such locks there
    fcntl = None


class _Whole:
    """A file that is written to at once and completely, or OSError names it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file  # without a buffer

    def write(self, content: bytes) -> None:
        try:
            while content:  # on a disk that is nearly full, a part of it is written
                content = content[self.file.write(content) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file.name)) from None


class Events:
    """TensorBoard's file in a folder, of a run that goes on at `step`.

    TensorBoard's own writer does the same in a thread of its own, where a full disk is a traceback
    on the terminal, and an error for the run only much later.
    """

    BINS = np.geomspace(1e-6, 1e6, 300)  # of histograms, in both directions

    def __init__(self, folder: Path, step: int) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = open(folder / name, "ab", buffering=0)
        self.records = RecordWriter(_Whole(self.file))
        self._add(0, file_version="brain.Event:2")
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))  # forget what follows

    def _add(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        self.records.write(event.SerializeToString())

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._add(step, summary=summary.scalar(tag, value))

    def audio(self, tag: str, wav: Tensor, rate: int, step: int) -> None:
        self._add(step, summary=summary.audio(tag, wav, rate))

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self._add(step, summary=summary.image(tag, pixels(figure), dataformats="HWC"))

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        bins = [*-self.BINS[::-1], 0.0, *self.BINS]
        self._add(step, summary=summary.histogram(tag, values, bins))


class Clock:
    """Where a run's seconds go: to the phases of its steps.

    gpu: work is only queued there; `exact` makes the next phases wait for its end.
    """

    def __init__(self, gpu: torch.device | None) -> None:
        self.gpu, self.exact = gpu, False
        self.step, self.recent, self.whole = Counter(), Counter(), Counter()
        self.window = 0.0  # seconds without validation, for whoever resets it
        self._began = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Counts the time since the last call for that phase."""
        if self.gpu is not None and self.exact:
            torch.cuda.synchronize(self.gpu)
        now = time.perf_counter()
        self.step[phase] += now - self._began
        self.window += now - self._began if phase != "validation" else 0.0
        self._began = now

    def end_step(self, summary: bool) -> dict[str, float]:
        """Seconds of this step's phases, and shares of all steps since the last summary."""
        self.recent.update(self.step)
        numbers = {f"seconds/{phase}": round(s, 6) for phase, s in self.step.items()}
        if summary:
            busy = sum(self.recent[phase] for phase in ("forward", "backward", "optimizer"))
            total = sum(self.recent.values()) - self.recent["validation"]
            numbers["data_wait"] = round(self.recent["data"] / total, 6)
            numbers["overhead"] = round(1 - busy / total, 6)
            self.whole.update(self.recent)
            self.recent.clear()
        self.step.clear()
        return numbers

    def shares(self) -> str:
        """What part of the run each phase took."""
        whole = self.whole + self.recent + self.step
        total = sum(whole.values()) or 1.0
        return ", ".join(f"{100 * s / total:.2f} % {phase}" for phase, s in whole.most_common())


class Logbook:
    """Opens the folder's files, for a run at `step`. Raises ValueError if another run has them."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lines = open(folder / "metrics.jsonl", "a+b", buffering=0)  # a line is one write
        if fcntl:
            try:
                fcntl.flock(self.lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"checkpoint_path={folder}: another process trains there; stop it, or choose "
                    "another folder"
                ) from None
            except OSError:
                pass  # a file system without locks
        length = 0
        for line in self._lines():
            try:
                if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break
            length += len(line)
        self.lines.truncate(length)
        for draft in folder.glob(".*.tmp"):  # of a process that was killed while it saved
            draft.unlink(missing_ok=True)
        self.events = Events(folder, step)

    def _lines(self) -> list[bytes]:
        self.lines.seek(0)
        return self.lines.read().splitlines(keepends=True)

    def numbers(self, step: int, seconds: float, **values: float) -> None:
        row = {"step": step, "seconds": round(seconds, 1)} | values
        _Whole(self.lines).write((json.dumps(row) + "\n").encode())
        for key, value in values.items():
            self.events.scalar(key, value, step)

    def clips(self, step: int, wavs: Tensor, rate: int, names: list[str]) -> None:
        for name, wav in zip(names, wavs.cpu(), strict=True):
            self.events.audio(f"generated/{name}", wav, rate, step)
            self.events.figure(f"generated/{name}", spectrogram_figure(wav, rate), step)

    def spectra(self, step: int, model: nn.Module) -> dict[str, float]:
        """Histograms of dt and Re Lambda (per unit of time) of every S4 layer; their quantiles."""
        values: dict[str, list[Tensor]] = {"dt": [], "re_lambda": []}
        for name, layer in model.named_modules():
            if isinstance(layer, S4):
                spectrum = layer.log_dt.detach().exp(), -layer.log_A_real.detach().exp()
                for key, value in zip(values, spectrum, strict=True):
                    values[key].append(value.flatten().cpu())
                    self.events.histogram(f"{key}/{name}", values[key][-1], step)
        return {
            f"{key}_{word}": float(torch.cat(x).quantile(q))
            for key, x in values.items()
            for word, q in (("min", 0.0), ("median", 0.5), ("max", 1.0))
            if x
        }

    def page(
        self, unit: str, axis: str, command: str, facts: dict[str, str], config: dict[str, Any]
    ) -> None:
        """README.md and curves.png, from all lines so far. axis: the unit in words."""
        rows = [json.loads(line) for line in self._lines()]
        write_atomically(self.folder / "curves.png", _curves(rows, unit, axis))
        valid = [row for row in rows if f"valid_{unit}" in row]
        best = min((row[f"valid_{unit}"] for row in valid), default=None)
        shown = valid[:: -(-len(valid) // 40) or 1]  # a table, not a log
        table = [
            f"| {row['step']:,} | {row['seconds'] / 60:,.1f} | {row[f'valid_{unit}']:.4f} |"
            + (" best |" if row[f"valid_{unit}"] == best else " |")
            for row in [*shown, *(x for x in valid[-1:] if x not in shown)]
        ]
        parts = [
            f"# {self.folder.resolve().name}",
            "![training and validation over the steps](curves.png)",
            "\n".join(f"- {key}: {value}" for key, value in facts.items()),
            f"    {command}",
            "\n".join([f"| step | minutes | validation, {unit} | |", "| --: | --: | --: | --- |"]
                      + table),
            "Settings:",
            "\n".join(f"    {key}={as_written(value)}" for key, value in _flat(config)),
        ]  # fmt: skip
        write_text(self.folder / "README.md", "\n\n".join(parts) + "\n")

    def close(self) -> None:
        self.events.file.close()
        self.lines.close()


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of a nested dict."""
    out = []
    for key, value in config.items():
        nested = isinstance(value, dict)
        out += _flat(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return out


def _curves(rows: list[dict[str, Any]], unit: str, axis: str) -> bytes:
    """Training and validation over steps, above the learning rate; PNG."""
    figure = new_figure(8, 5, dpi=110)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(row["step"], row[key]) for row in rows if key in row]
        return [step for step, _ in points], [value for _, value in points]

    steps, values = series(f"train_{unit}")
    above.plot(steps, values, color=INK, alpha=0.35, linewidth=0.6)
    if values:  # the mean of about a fiftieth of the run
        width = max(1, len(values) // 50)
        sums = torch.tensor(values, dtype=torch.float64).cumsum(0)
        means = (sums[width:] - sums[:-width]) / width
        above.plot(steps[width:], means, color=INK, label="training")
    above.plot(*series(f"valid_{unit}"), color=ACCENT, marker=".", label="validation")
    above.set_ylabel(axis)
    below.plot(*series("lr"), color=INK)
    below.set(ylabel="learning rate", xlabel="step")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if above.get_legend_handles_labels()[0]:
        above.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def environment(device: torch.device) -> dict[str, str]:
    """Where and with what a run was done: code, versions, device."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        try:
            done = subprocess.run(
                ["git", *args], cwd=here, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD") or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += ", with changes"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": commit,
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        "device": f"{device} ({name}), {torch.get_num_threads()} CPU threads",
    }


def memory(device: torch.device) -> float:
    """Largest use so far in GiB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def terminal_bar() -> Any:
    """A progress bar where someone looks at it, on a terminal or in a notebook; else None."""
    from fastprogress.fastprogress import IN_NOTEBOOK, progress_bar

    if not (sys.stdout.isatty() or IN_NOTEBOOK):
        return None
    bar = progress_bar(range(1000))
    bar.update(0)
    return bar
