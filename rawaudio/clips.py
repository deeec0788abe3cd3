"""A folder of generated clips, which can be stopped and gone on with at any moment.

    out_dir/
      0000.wav, 0001.wav, ...   lowest log-likelihood first; diffusion, which has none: as made
      samples.csv               one row for each of them: what it was told, its log-likelihood ...
      index.html                the listening page
      .generate/                clips in the making, by number; settings.json

Batch k draws from a generator that depends on the seed and k alone, and every file appears whole
or not at all. So a run that was stopped and started again gives the files of one that was not.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawaudio import audio, data, processes
from rawaudio.errors import UserError
from rawaudio.files import write_text
from rawaudio.model import Model
from rawaudio.page import Clip, write_page
from rawaudio.processes import on_first, rank, world
from rawaudio.progress import watched
from rawaudio.quantizers import MULAW
from rawaudio.request import GenerateConfig
from rawaudio.seeds import seeded

PAGE_CLIPS = 64  # a page that opens at once on a phone:
PAGE_SECONDS = 600  # about 30 MB
FORMAT = 2  # of the folder's records and table
SHOWN = 10  # files that are left out, by name
WORK = ".generate"  # the folder in the folder


@dataclass
class Batch:
    """Clips that are made together, by their numbers."""

    clips: range
    source: Tensor | None  # prefixes, or what a vocoder is to say: (n, T)
    told: dict[str, list[str]]  # condition -> a value for each clip


def run(cfg: GenerateConfig, model: Model) -> None:
    """Makes what is missing in `cfg.out_dir`, then sorts, lists and shows it.

    Under torchrun every process makes its share of the batches. Raises UserError for settings
    that do not fit the model, the prefixes or what the folder holds, OSError if it cannot be
    written to. KeyboardInterrupt may come at any time and loses the batch at hand, no more.
    """
    processes.join()
    stretch = getattr(model, "quantizer", MULAW).stretch
    sources = read_sources(cfg, model.sample_rate, stretch)
    batches = plan(cfg, model, [wav for _, wav in sources])
    settings = record_of(cfg, model, batches[-1].clips.stop, [wav for _, wav in sources])
    finished = on_first(lambda: prepare(Path(cfg.out_dir, WORK), settings))
    if not finished:
        make(cfg, model, batches)
        processes.wait()
        on_first(lambda: finish(cfg, model, batches, [name for name, _ in sources]))
    on_first(lambda: report(cfg, model, finished))


def read_sources(
    cfg: GenerateConfig, sample_rate: int, stretch: Callable = MULAW.stretch
) -> list[tuple[str, Tensor]]:
    """(name, float (T,) at `sample_rate`) of the audio to continue or to speak; empty without.

    The first `n_samples` clips of a folder (by name) or a split CSV; those with fewer than
    `l_prefix` samples, or that cannot be read, are left out, with a notice. Raises UserError if
    none is left or a prefix is longer than a clip. stretch: of the quantiser of prefixes.
    """
    if not cfg.source:
        return []
    path = Path(cfg.source)
    if path.is_dir():
        clips = [data.Clip(file) for file in audio.find(path)]
    elif path.suffix.lower() == ".csv":
        clips = data.read_csv(path, cfg.data_root)
    else:
        clips = [data.Clip(path)]
    sources, left_out = [], []
    for clip in clips:
        if len(sources) == cfg.n_samples:
            break
        try:
            wav = data.read_clip(clip, sample_rate).wav
            wav = (stretch(wav) if cfg.prefix else wav)[: cfg.l_prefix]
            if len(wav) < (cfg.l_prefix or 0):
                remedy = f"l_prefix={cfg.l_prefix} needs more"
                raise audio.AudioError(clip.path, "too short", f"{len(wav)} samples", remedy)
        except audio.AudioError as error:
            if len(clips) == 1:
                raise
            left_out.append(f"{clip}: {error.reason}; {error.remedy}")
            continue
        if cfg.prefix and len(wav) > cfg.length:
            raise UserError(
                f"{clip}: a prefix of {len(wav)} samples is longer than length={cfg.length}; "
                "use less of it with l_prefix="
            )
        sources.append((str(clip), wav))
    if not sources:
        first = f"; {len(left_out)} left out, the first: {left_out[0]}" if left_out else ""
        key = "prefix" if cfg.prefix else "mel_from"
        raise UserError(f"{key}={path} has no audio to begin with{first}")
    for reason in left_out[:SHOWN]:
        print(f"left out {reason}", file=sys.stderr)
    if len(left_out) > SHOWN:
        print(f"left out {len(left_out) - SHOWN} more", file=sys.stderr)
    return sources


def plan(cfg: GenerateConfig, model: Model, sources: list[Tensor]) -> list[Batch]:
    """The clips in batches of at most `n_batch`: n_samples, or n_reps for each source.

    The sources of a batch have the same length. UserError for what the model cannot be told.
    """
    clips = [wav for wav in sources for _ in range(cfg.n_reps)] or [None] * cfg.n_samples
    model.told.rows(len(clips), cfg.given)  # refused here, before anything is made
    starts = [0]
    for i in range(1, len(clips)):
        other = bool(sources) and len(clips[i]) != len(clips[i - 1])
        if other or i - starts[-1] == cfg.n_batch:
            starts.append(i)
    batches = []
    for k, (start, stop) in enumerate(itertools.pairwise([*starts, len(clips)])):
        given = {
            name: value if isinstance(value, str) else value[start:stop]
            for name, value in cfg.given.items()
        }
        told = model.draw_conditions(stop - start, seeded(cfg.seed, k), **given)
        source = torch.stack(clips[start:stop]) if sources else None
        batches.append(Batch(range(start, stop), source, told))
    return batches


def record_of(
    cfg: GenerateConfig, model: Model, n_clips: int, sources: list[Tensor]
) -> dict[str, Any]:
    """All that decides which clips are made."""
    told = {"guidance": cfg.guidance, "told": cfg.told} if model.conditions else {}
    told |= {"guided": guided} if (guided := model.config.guided) else {}
    return {
        "model": _digest(model.state_dict().values()),
        "prefix": _digest(sources),
        "n_samples": n_clips,
        "n_batch": min(cfg.n_batch, n_clips),
        "length": cfg.length,
        **{name: getattr(cfg, name) for name in (*model.SAMPLING, "seed")},
        "format": FORMAT,
        **told,
    }


def prepare(work: Path, settings: dict[str, Any]) -> bool:
    """Whether all of these clips are there; else the folder is made ready for them."""
    folder, file = work.parent, work / "settings.json"
    visible = folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir())
    if file.exists():
        there = json.loads(file.read_text())
        finished = there.pop("finished")
        if there == settings:
            return finished
        if visible or any(work.glob("batch-*.json")):
            other = ", ".join(name for name in settings if there.get(name) != settings[name])
            raise UserError(
                f"out_dir={folder} holds clips made with another {other}; "
                "write out_dir= for another folder, or delete this one"
            )
        shutil.rmtree(work)
    elif visible:
        raise UserError(f"out_dir={folder} holds other files; write out_dir= for another folder")
    work.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings | {"finished": False}))
    return False


def make(cfg: GenerateConfig, model: Model, batches: list[Batch]) -> None:
    """Makes this process's share of the batches that are not there."""
    work, total = Path(cfg.out_dir, WORK), batches[-1].clips.stop
    missing = [k for k in range(len(batches)) if not _record(work, k).exists()]
    left = sum(len(batches[k].clips) for k in missing)
    mine = [k for k in missing if k % world() == rank()]
    speaks = rank() == 0
    if mine and speaks:
        size = "" if cfg.mel_from else f" of {cfg.length / model.sample_rate:.3g} s"
        rest = f"the remaining {left}" if left < total else left
        print(f"making {rest} clips{size} in {cfg.out_dir}", flush=True)
    show = speaks and len(mine) > 1
    for k in watched(mine, "making clips", len(mine), "batches", show=show):
        batch, rng = batches[k], seeded(cfg.seed, k)
        n = len(batch.clips)
        wavs, log_likelihood = model.make(
            cfg, n, batch.source, cfg.length, batch.told, rng, progress=speaks
        )
        for clip, wav in zip(batch.clips, wavs.cpu(), strict=True):
            audio.write(work / f"{clip}.wav", wav, model.sample_rate)
        # Written last: a batch with a record is complete.
        write_text(_record(work, k), json.dumps(log_likelihood or [None] * n))


def finish(cfg: GenerateConfig, model: Model, batches: list[Batch], names: list[str]) -> None:
    """Sorts all clips into place and writes the CSV. May be interrupted, too. names: of sources."""
    folder, work = Path(cfg.out_dir), Path(cfg.out_dir, WORK)
    rows = []
    for k, batch in enumerate(batches):
        samples = batch.source.shape[1] if cfg.mel_from else cfg.length
        likelihoods = json.loads(_record(work, k).read_text())
        for i, (clip, log_likelihood) in enumerate(zip(batch.clips, likelihoods, strict=True)):
            row = {name: values[i] for name, values in batch.told.items()}
            if log_likelihood is not None:
                row["log_likelihood"] = log_likelihood
            prefix = names[clip // cfg.n_reps] if names else ""
            row |= {"seconds": samples / model.sample_rate, "seed": cfg.seed}
            rows.append(row | {"clip": clip, "prefix": prefix})
    rows.sort(key=lambda row: (row.get("log_likelihood", 0.0), row["clip"]))
    digits = max(4, len(str(len(rows) - 1)))
    rows = [{"file": f"{place:0{digits}d}.wav"} | row for place, row in enumerate(rows)]
    for row in rows:
        if (made := work / f"{row['clip']}.wav").exists():  # else moved before an interruption
            os.replace(made, folder / row["file"])
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / data.SAMPLES, table.getvalue())
    settings = json.loads((work / "settings.json").read_text())
    write_text(work / "settings.json", json.dumps(settings | {"finished": True}))
    for leftover in work.iterdir():
        if leftover.name != "settings.json":
            leftover.unlink()


def report(cfg: GenerateConfig, model: Model, finished: bool) -> None:
    """Says what is in the folder, after it wrote the page if that is wanted and not there.

    finished: the folder was, before this call.
    """
    folder = Path(cfg.out_dir)
    page, rows = folder / "index.html", list(data.read_samples(folder).values())
    if gone := sum(not (folder / row["file"]).exists() for row in rows):
        remedy = "delete the folder to make all of them again"
        print(f"nothing to do: {gone} of {len(rows)} clips were removed from {folder}; {remedy}")
        return
    if cfg.page and not page.exists():
        show(cfg, model, rows, page)
    listen = f"; listen: {page}" if cfg.page else ""
    if finished:
        print(f"nothing to do: all {len(rows)} clips are in {folder}{listen}")
    else:
        order = ", lowest log-likelihood first" if "log_likelihood" in rows[0] else ""
        print(f"{len(rows)} clips in {folder}{order}{listen}")


def show(cfg: GenerateConfig, model: Model, rows: list[dict[str, str]], page: Path) -> None:
    """Writes the page: every clip, or so many that it stays small, evenly spaced in the order."""
    shown = min(len(rows), PAGE_CLIPS, max(2, int(PAGE_SECONDS / float(rows[0]["seconds"]))))
    clips = []
    for i in range(shown):
        row = rows[round(i * (len(rows) - 1) / max(1, shown - 1))]
        caption = []
        if "log_likelihood" in row:
            caption += [f"log-likelihood {float(row['log_likelihood']):.3f} nats per sample"]
        if row["prefix"]:
            caption += [f"{'says' if cfg.mel_from else 'continues'} {Path(row['prefix']).name}"]
        name = " · ".join([row["file"], *(row[name] for name in model.conditions)])
        clips.append(Clip(name, *audio.read(page.parent / row["file"]), " · ".join(caption)))
    words = model.described(cfg)
    if model.conditions:
        what = " and ".join(f"{name} {', '.join(values)}" for name, values in cfg.told.items())
        words += [f"told {what or 'what was drawn at random'}"]
        towards = f" towards {' and '.join(guided)}" if (guided := model.config.guided) else ""
        words += [f"guidance {cfg.guidance:g}{towards}"] if cfg.guidance != 1 else []
    note = " · ".join(words)
    if shown < len(rows):
        note += f"\n{shown} of {len(rows)} clips are shown, evenly spaced in their order."
    title = Path(cfg.checkpoint).name if cfg.checkpoint else cfg.model or type(model).__name__
    write_page(page, clips, title, note)


def _record(work: Path, k: int) -> Path:
    """Where batch k's log-likelihoods are, once all of its clips are written."""
    return work / f"batch-{k}.json"


def _digest(tensors: Iterable[Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]
