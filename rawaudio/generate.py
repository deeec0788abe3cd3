"""Generate clips: wav files sorted by likelihood, a CSV, and a page to listen to them.

A model that was trained with conditions is told them by name, one value for all clips or a list of
one for each; what is not told is drawn by the shares of its training set.

    out_dir/
      0000.wav, 0001.wav, ...   lowest log-likelihood first; diffusion, which has none: as made
      samples.csv               one row for each of them: what it was told, its log-likelihood ...
      index.html                the listening page
      .generate/                clips in the making, by number; settings.json

Batch k draws from a generator that depends on the seed and k alone, and every file appears whole
or not at all. So a run that was stopped and started again gives the files of one that was not.
"""

import csv
import difflib
import hashlib
import io
import json
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawaudio import audio, command, data, processes
from rawaudio.autoregressive import check_sampling
from rawaudio.checkpoint import load_model
from rawaudio.conditions import check_guidance
from rawaudio.config import as_written, check_name, parse_args, setting, settings_of
from rawaudio.errors import UserError
from rawaudio.families import ENTRIES, FAMILIES
from rawaudio.files import read_metadata, write_text
from rawaudio.hub import load_named, shipped
from rawaudio.model import Model
from rawaudio.page import Clip, write_page
from rawaudio.processes import on_first, rank, wait, world
from rawaudio.quantizers import MULAW
from rawaudio.samplers import SAMPLERS
from rawaudio.sampling import PRECISIONS
from rawaudio.seeds import seeded
from sashimi import mulaw

PAGE_CLIPS = 64  # a page that opens at once on a phone:
PAGE_SECONDS = 600  # about 30 MB
FORMAT = 2  # of the folder's records and table

EXAMPLES = """\
python -m rawaudio.generate                               # four spoken digits, in generated/
python -m rawaudio.generate model=sashimi_ar_sc09 n_samples=64 nucleus_p=0.95
python -m rawaudio.generate checkpoint=runs/run1/best.safetensors out_dir=run1
python -m rawaudio.generate prefix=half.wav l_prefix=4000 n_reps=4
python -m rawaudio.generate play=wav length=80000 | aplay
python -m rawaudio.generate model=sashimi_diffwave_digits n_samples=8 steps=50
python -m rawaudio.generate checkpoint=vocoder.safetensors mel_from=speech.wav
python -m rawaudio.generate label=seven speaker=theo      # told, by names: model.conditions
python -m rawaudio.generate label=[one,two,three]         # one clip each
torchrun --nproc-per-node 4 -m rawaudio.generate n_samples=10240 n_batch=256"""


ELSEWHERE = ("device", "told", "data_root", "out_dir", "page", "play")  # the clips are the same


@dataclass
class GenerateConfig:
    # what speaks
    model: str = setting("sashimi_ar_digits", "a model of the hub: " + ", ".join(ENTRIES))
    checkpoint: str | None = setting(None, "weights file to use instead, any known format")
    device: str | None = setting(None, "cpu, cuda, ...; none: the GPU if there is one")

    # how much
    n_samples: int | None = setting(
        None, "clips; with prefix=, how many prefixes are continued at most; none: 4, or one for "
        "each value of a list"
    )  # fmt: skip
    n_batch: int = setting(16, "clips made at once; another n_batch gives other clips")
    length: int | None = setting(None, "samples per clip, prefix included; none: the model's own")

    seed: int = setting(0, "same seed, same settings: same clips")

    # models with conditions, which are told as label=seven or label=[one,two]
    guidance: float | None = setting(
        None, "push towards what is told, at least 0; 1: off; none: the model's own"
    )
    told: dict[str, list[str]] = setting({}, "conditions by name")

    # autoregressive models
    temperature: float | None = setting(
        None, "divides the logits, above 0; 1: as learned; none: the model's own"
    )
    top_k: int | None = setting(None, "sample among the k likeliest classes, 1..256")
    nucleus_p: float | None = setting(
        None, "sample among classes of this much probability, (0, 1]; none: the model's own"
    )
    precision: str = setting("float32", "of the weights; bfloat16: faster, a little less exact")
    prefix: str | None = setting(None, "audio to continue: a file, a folder or a split CSV")

    # diffusion models
    steps: int | None = setting(None, "passes of the network, 1..T; none: what suits the sampler")
    sampler: str | None = setting(
        None, f"{', '.join(SAMPLERS)}; none: dpm_solver_pp_2m_sde, fast for vocoders"
    )
    mel_from: str | None = setting(
        None, "vocoders: audio whose mel spectrograms are spoken: a file, a folder or a split CSV"
    )

    # prefix and mel_from
    data_root: str | None = setting(None, "folder that the paths of a split CSV start from")
    l_prefix: int | None = setting(None, "samples of each file, from its start; none: all")
    n_reps: int = setting(1, "clips per file")

    # where it goes
    out_dir: str | None = setting(
        None, "folder of the clips, the CSV and the page; none: generated, with the settings that "
        "differ, as in generated-seed-1"
    )  # fmt: skip
    page: bool = setting(True, "write the listening page")
    play: str | None = setting(
        None, "wav or raw (16-bit PCM): one clip to standard output, as it is made; no files"
    )


def parse(argv: list[str] | None = None) -> GenerateConfig:
    """The settings. Ends the process, with one line, for those that cannot be followed."""
    told: dict[str, list[str]] = {}

    def complete(cfg: GenerateConfig) -> None:
        cfg.told = told
        check(cfg)

    return parse_args(
        GenerateConfig, argv, prog="python -m rawaudio.generate", examples=EXAMPLES, others=told,
        check=complete,
    )  # fmt: skip


def check(cfg: GenerateConfig) -> None:
    """Raises ValueError for a setting that no model could follow."""
    if cfg.out_dir is None:
        cfg.out_dir = default_folder(cfg)
    lists = {name: values for name, values in cfg.told.items() if len(values) != 1}
    if cfg.n_samples is None:
        cfg.n_samples = len(next(iter(lists.values()))) if lists and not _source(cfg) else 4
    for name in ("n_samples", "n_batch", "n_reps", "length", "l_prefix"):
        if (value := getattr(cfg, name)) is not None and value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    check_sampling(*(1.0 if x is None else x for x in (cfg.temperature, cfg.nucleus_p)))
    if cfg.top_k is not None and not 1 <= cfg.top_k <= mulaw.N_CLASSES:
        raise UserError(f"top_k={cfg.top_k}: must be from 1 to {mulaw.N_CLASSES}")
    if cfg.precision not in PRECISIONS:
        raise UserError(f"precision={cfg.precision}: must be {' or '.join(PRECISIONS)}")
    if cfg.play not in (None, "wav", "raw"):
        raise UserError(f"play={cfg.play}: must be wav or raw")
    if cfg.play and world() > 1:
        raise UserError(f"play={cfg.play} makes one clip, in one process: without torchrun")
    for name, neutral in (("l_prefix", None), ("n_reps", 1), ("data_root", None)):
        if _source(cfg) is None and getattr(cfg, name) != neutral:
            raise UserError(f"{name}={getattr(cfg, name)} needs prefix= or mel_from=")
    for name in ("prefix", "mel_from"):
        if (path := getattr(cfg, name)) is not None and not Path(path).exists():
            raise UserError(f"{name}={path} is not there")
    if cfg.prefix and cfg.mel_from:
        raise UserError("prefix= is for autoregressive models, mel_from= for vocoders: give one")
    if cfg.sampler is not None:
        check_name("sampler", cfg.sampler, SAMPLERS)
    if Path(cfg.out_dir).exists() and not Path(cfg.out_dir).is_dir():
        raise UserError(f"out_dir={cfg.out_dir} is not a folder")
    if cfg.checkpoint is None and cfg.model not in ENTRIES:
        if Path(cfg.model).exists():
            raise UserError(f"model={cfg.model} is a file: write checkpoint={cfg.model}")
        near = difflib.get_close_matches(cfg.model, ENTRIES, n=1, cutoff=0.4)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(ENTRIES)}"
        raise UserError(f"model={cfg.model} is not known, {known}")
    if cfg.told and (conditions := _conditions(cfg)) is not None:
        check_told(cfg, conditions)


def default_folder(cfg: GenerateConfig) -> str:
    """A folder of its own for everything that decides which clips are made."""
    words = ["generated"]
    for key, value in (vars(cfg) | cfg.told).items():
        if key in ELSEWHERE or value == getattr(GenerateConfig, key, None):
            continue
        text = as_written(value).strip("[]")
        plain = re.sub(r"[^\w.,-]+", "_", Path(text).name)[:40]
        unlike = plain != text  # by a path's folders, odd letters, or its length
        mark = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:6]
        words += [key, plain, *[mark] * unlike] if key != "model" else [plain]
    name = "-".join(words)
    if len(name.encode()) > 200:  # of the 255 that a name may have
        name = f"{name[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def check_told(cfg: GenerateConfig, conditions: Iterable[str]) -> None:
    """Raises ValueError for what is told by a name that no condition of the model has."""
    for name in cfg.told:
        if name not in conditions:
            near = difflib.get_close_matches(name, [*conditions, *settings_of(GenerateConfig)], n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
            told = f"this model can be told {', '.join(conditions) or 'nothing'}"
            raise UserError(f"{name}={','.join(cfg.told[name])}: unknown, {hint} ({told})")


def _conditions(cfg: GenerateConfig) -> Iterable[str] | None:
    """Names of the model's conditions, by the head of its file; None where that does not tell."""
    path = Path(cfg.checkpoint or shipped(cfg.model))
    if not cfg.checkpoint and not path.exists():  # the published weights
        return []
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    config = read_metadata(path).get("config")
    return config.get("conditions", {}) if isinstance(config, dict) else None


def _source(cfg: GenerateConfig) -> str | None:
    return cfg.prefix or cfg.mel_from


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse(argv)

    def body() -> None:
        model = load(cfg)
        check_fits(cfg, model)
        if not cfg.play:
            return run(cfg, model)
        try:
            play(cfg, model)
        except BrokenPipeError:  # the player was closed: not an error
            command.drop_output()

    def kept() -> str:
        if cfg.play or not any(Path(cfg.out_dir, ".generate").glob("batch-*.json")):
            return ""
        return f"; what was made is kept in {cfg.out_dir}, the same command goes on"

    smaller = f"take an n_batch= below {cfg.n_batch}, or a shorter length="
    try:
        return command.run(body, kept=kept, smaller=smaller)
    finally:
        processes.leave()


def check_fits(cfg: GenerateConfig, model: Model) -> None:
    """Raises ValueError for a setting that this kind of model has not, or lacks."""
    check_told(cfg, model.conditions)
    check_guidance(1.0 if cfg.guidance is None else cfg.guidance, len(model.conditions))
    every = {name for family in FAMILIES.values() for name in family.module.SETTINGS}
    for name in every - set(model.SETTINGS):
        if (value := getattr(cfg, name)) != getattr(GenerateConfig, name):
            raise UserError(f"{name}={value}: {model.KIND} model has no {name}")
    model.check_settings(cfg)


def load(cfg: GenerateConfig) -> Model:
    """The model of the settings. Raises ValueError, or ConnectionError without a network."""
    device = cfg.device
    if device is None:
        device = f"cuda:{processes.local_rank()}" if torch.cuda.is_available() else "cpu"
    if cfg.checkpoint is None:
        return load_named(cfg.model, device=device, progress=sys.stderr.isatty())
    return load_model(cfg.checkpoint, device, key="checkpoint")


# ---- clips into a folder --------------------------------------------------------------------


@dataclass
class Batch:
    """Clips that are made together. source: prefixes, or what a vocoder is to say: float (n, T), T
    the same for all; None without."""

    clips: range
    source: Tensor | None
    told: dict[str, list[str]] = field(default_factory=dict)  # a value for each clip


def run(cfg: GenerateConfig, model: Model) -> None:
    """Makes what is missing in `cfg.out_dir`, then sorts, lists and shows it.

    Under torchrun every process makes its share of the batches. Raises ValueError for settings
    that do not fit the model, the prefixes or what the folder holds, OSError if it cannot be
    written to. KeyboardInterrupt may come at any time and loses the batch at hand, no more.
    """
    processes.join()
    length = cfg.length or model.config.clip_length
    stretch = getattr(model, "quantizer", MULAW).stretch
    prefixes = read_prefixes(cfg, model.sample_rate, length, stretch)
    # what is recorded and shown is what was used
    own = {k: getattr(model.config, k, None) for k in ("guidance", "temperature", "nucleus_p")}
    cfg = replace(cfg, **{k: v for k, v in own.items() if getattr(cfg, k) is None})
    batches = plan(cfg, [wav for _, wav in prefixes])
    n_clips = sum(len(batch.clips) for batch in batches)
    model.told.rows(n_clips, _each(cfg.told))  # refused here, before anything is made
    for k, batch in enumerate(batches):
        given = {name: values if len(values) == 1 else values[batch.clips.start : batch.clips.stop]
                 for name, values in cfg.told.items()}  # fmt: skip
        batch.told = model.draw_conditions(len(batch.clips), seeded(cfg.seed, k), **_each(given))
    work = Path(cfg.out_dir, ".generate")
    settings = {  # all that decides which clips are made
        "model": _digest(model.state_dict().values()),
        "prefix": _digest(wav for _, wav in prefixes),
        "n_samples": n_clips,
        "n_batch": min(cfg.n_batch, n_clips),
        "length": length,
    }
    settings |= {name: getattr(cfg, name) for name in (*model.SAMPLING, "seed")}
    settings |= {"format": FORMAT}
    if model.conditions:
        settings |= {"guidance": cfg.guidance, "told": cfg.told}

    if on_first(lambda: _open(work, settings)):
        return on_first(lambda: _revisit(cfg, model))
    mine = [k for k in range(rank(), len(batches), world()) if not _record(work, k).exists()]
    there = sum(len(batch.clips) for k, batch in enumerate(batches) if _record(work, k).exists())
    if 0 < there < n_clips and rank() == 0:
        print(f"{there} of {n_clips} clips are there already, making the rest")
    if mine and rank() == 0:
        size = "" if cfg.mel_from else f" of {length / model.sample_rate:.3g} s"
        print(f"making {n_clips - there} clips{size} in {cfg.out_dir}", flush=True)
    share, done, start = sum(len(batches[k].clips) for k in mine), 0, time.monotonic()
    for k in mine:
        batch = batches[k]
        n, rng = len(batch.clips), seeded(cfg.seed, k)
        wavs, log_likelihood = model.make(
            cfg, n, batch.source, length, batch.told, rng, rank() == 0
        )
        for clip, wav in zip(batch.clips, wavs.cpu(), strict=True):
            audio.write(work / f"{clip}.wav", wav, model.sample_rate)
        # Written last: a batch with a record is complete.
        write_text(_record(work, k), json.dumps(log_likelihood or [0.0] * n))
        done += n
        if rank() == 0 and len(mine) > 1:
            passed = time.monotonic() - start
            speed = done * length / model.sample_rate / passed
            left = timedelta(seconds=round(passed * (share - done) / done))
            print(f"{done} of {share} clips, {speed:.2g}x real time, {left} left", flush=True)
    wait()
    on_first(lambda: _finish(cfg, model, batches, [name for name, _ in prefixes]))


def plan(cfg: GenerateConfig, prefixes: list[Tensor]) -> list[Batch]:
    """The clips in batches of at most `n_batch`: n_samples, or n_reps for each prefix."""
    if not prefixes:
        starts = range(0, cfg.n_samples, cfg.n_batch)
        return [Batch(range(i, min(i + cfg.n_batch, cfg.n_samples)), None) for i in starts]
    clips = [wav for wav in prefixes for _ in range(cfg.n_reps)]
    batches, start = [], 0
    for i in range(1, len(clips) + 1):
        full = i - start == cfg.n_batch
        if i == len(clips) or full or len(clips[i]) != len(clips[start]):
            batches.append(Batch(range(start, i), torch.stack(clips[start:i])))
            start = i
    return batches


def read_prefixes(
    cfg: GenerateConfig, sample_rate: int, length: int, stretch: Callable = MULAW.stretch
) -> list[tuple[str, Tensor]]:
    """(name, float (T,) at `sample_rate`) of the audio to continue or to speak; empty without.

    The first `n_samples` clips of a folder (by name) or a split CSV; those with fewer than
    `l_prefix` samples, or that cannot be read, are passed over, with a notice. Raises ValueError if
    none is left or one is longer than `length`. stretch: of the model's quantiser, see there.
    """
    if _source(cfg) is None:
        return []
    source = Path(_source(cfg))
    if source.is_dir():
        clips = [data.Clip(path) for path in audio.find(source)]
    elif source.suffix.lower() == ".csv":
        clips = data.read_csv(source, cfg.data_root)
    else:
        clips = [data.Clip(source)]
    prefixes, short, broken = [], 0, []
    for clip in clips:
        if len(prefixes) == cfg.n_samples:
            break
        try:
            wav = data.read_clip(clip, sample_rate).wav
        except audio.AudioError as error:
            if len(clips) == 1:
                raise
            broken.append(f"{clip}: {error.reason}; {error.remedy}")
            continue
        if cfg.l_prefix is not None and len(wav) < cfg.l_prefix:
            short += 1
            continue
        wav = (stretch(wav) if cfg.prefix else wav)[: cfg.l_prefix]
        if cfg.prefix and len(wav) > length:
            raise UserError(
                f"{clip}: a prefix of {len(wav)} samples is longer than length={length}; "
                f"use less of it with l_prefix="
            )
        prefixes.append((str(clip), wav))
    if not prefixes:
        reasons = [f"{short} shorter than l_prefix={cfg.l_prefix} samples"] if short else []
        reasons += [f"{len(broken)} cannot be read, the first: {broken[0]}"] if broken else []
        what = f"prefix={source}" if cfg.prefix else f"mel_from={source}"
        raise UserError(f"{what} has no audio file to continue ({' and '.join(reasons) or 'none'})")
    if short:
        print(f"passed over {short} files shorter than l_prefix={cfg.l_prefix}", file=sys.stderr)
    for reason in broken[:10]:
        print(f"left out {reason}", file=sys.stderr)
    if len(broken) > 10:
        print(f"left out {len(broken) - 10} more that cannot be read", file=sys.stderr)
    return prefixes


def _open(work: Path, settings: dict[str, Any]) -> bool:
    """Whether all of these clips are there; else the folder is made ready for them."""
    folder, file = work.parent, work / "settings.json"
    visible = folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir())
    if file.exists():
        found = json.loads(file.read_text())
        finished = found.pop("finished")
        if found == settings:
            return finished
        if visible or any(work.glob("batch-*.json")):
            other = ", ".join(name for name in settings if found.get(name) != settings[name])
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


def _finish(cfg: GenerateConfig, model: Any, batches: list[Batch], names: list[str]) -> None:
    """Sorts all clips into place, and writes the CSV and the page. May be interrupted, too."""
    folder, work = Path(cfg.out_dir), Path(cfg.out_dir, ".generate")
    found, told = [], []
    for k, batch in enumerate(batches):
        found += zip(json.loads(_record(work, k).read_text()), batch.clips, strict=True)
        told += [dict(zip(batch.told, words, strict=True))
                 for words in zip(*batch.told.values(), strict=True)]  # fmt: skip
    told = told or [{}] * len(found)
    digits = max(4, len(str(len(found) - 1)))
    length = cfg.length or model.config.clip_length
    lengths = {clip: batch.source.shape[1] if cfg.mel_from else length
               for batch in batches for clip in batch.clips}  # fmt: skip
    likely = "temperature" in model.SAMPLING  # clips have a likelihood, and its order
    rows = []
    for place, (log_likelihood, clip) in enumerate(sorted(found)):
        name = f"{place:0{digits}d}.wav"
        if (work / f"{clip}.wav").exists():  # else it was moved before an interruption
            os.replace(work / f"{clip}.wav", folder / name)
        likelihood = {"log_likelihood": log_likelihood} if likely else {}
        prefix = names[clip // cfg.n_reps] if names else ""
        rows.append(
            {"file": name, **told[clip], **likelihood, "seconds": lengths[clip] / model.sample_rate,
             "seed": cfg.seed, "clip": clip, "prefix": prefix}
        )  # fmt: skip
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / data.SAMPLES, table.getvalue())
    if cfg.page:
        _show(cfg, model)
    settings = json.loads((work / "settings.json").read_text())
    write_text(work / "settings.json", json.dumps(settings | {"finished": True}))
    for leftover in work.iterdir():
        if leftover.name != "settings.json":
            leftover.unlink()
    order = ", lowest log-likelihood first" if likely else ""
    print(f"{len(rows)} clips in {folder}{order}" + _listen(cfg))


def _each(told: dict[str, list[str]]) -> dict[str, str | list[str]]:
    """Lists of one value as the value, which all clips are told."""
    return {name: values[0] if len(values) == 1 else values for name, values in told.items()}


def _revisit(cfg: GenerateConfig, model: Any) -> None:
    """A finished folder: nothing to do, but for a page that was not asked for before."""
    folder = Path(cfg.out_dir)
    rows = list(data.read_samples(folder).values())
    if gone := sum(not (folder / row["file"]).exists() for row in rows):
        remedy = "delete the folder to make all of them again"
        print(f"nothing to do: {gone} of {len(rows)} clips were removed from {folder}; {remedy}")
        return
    if cfg.page and not (folder / "index.html").exists():
        _show(cfg, model)
    print(f"nothing to do: all {len(rows)} clips are in {folder}{_listen(cfg)}")


def _show(cfg: GenerateConfig, model: Any) -> None:
    """Writes the page: every clip, or so many that it stays small, evenly spaced in the order."""
    folder = Path(cfg.out_dir)
    rows = list(data.read_samples(folder).values())
    shown = min(len(rows), PAGE_CLIPS, max(2, int(PAGE_SECONDS / float(rows[0]["seconds"]))))
    clips = []
    for i in range(shown):
        row = rows[round(i * (len(rows) - 1) / max(1, shown - 1))]
        wav, rate = audio.read(folder / row["file"])
        caption = []
        if "log_likelihood" in row:
            caption += [f"log-likelihood {float(row['log_likelihood']):.3f} nats per sample"]
        if row["prefix"]:
            caption += [f"{'says' if cfg.mel_from else 'continues'} {Path(row['prefix']).name}"]
        name = " · ".join([row["file"], *(row[name] for name in model.conditions)])
        clips.append(Clip(name, wav, rate, " · ".join(caption)))
    words = model.described(cfg)
    if model.conditions:
        what = [f"{name} {', '.join(values)}" for name, values in cfg.told.items()]
        words += [f"told {' and '.join(what)}" if what else "told what was drawn at random"]
        words += [f"guidance {cfg.guidance:g}"] if cfg.guidance != 1 else []
    note = " · ".join(words)
    if shown < len(rows):
        note += f"\n{shown} of {len(rows)} clips are shown, evenly spaced in their order."
    title = Path(cfg.checkpoint).name if cfg.checkpoint else cfg.model
    write_page(folder / "index.html", clips, title, note)


def _listen(cfg: GenerateConfig) -> str:
    return f"; listen: {Path(cfg.out_dir, 'index.html')}" if cfg.page else ""


def _record(work: Path, k: int) -> Path:
    """Where batch k's log-likelihoods are, once all of its clips are written."""
    return work / f"batch-{k}.json"


def _digest(tensors: Any) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


# ---- one clip, as it is made ----------------------------------------------------------------


def play(cfg: GenerateConfig, model: Any) -> None:
    """Writes one clip to standard output in chunks of 20 ms: the clip of n_samples=1.

    wav: a header with the clip's true size, then the samples; raw: the samples alone. They are
    16-bit little-endian, mono, at `model.sample_rate`. Raises BrokenPipeError if nobody listens
    any more, ValueError if standard output is a terminal.
    """
    out = sys.stdout.buffer
    if out.isatty():
        raise UserError(f"play={cfg.play} writes audio: send it to a player, ... | aplay")
    rate = model.sample_rate
    length = cfg.length or model.config.clip_length
    prefixes = read_prefixes(cfg, rate, length, model.quantizer.stretch)
    prefix = prefixes[0][1] if prefixes else None
    generator = seeded(cfg.seed, 0)
    chunks = model.stream(
        1, length=max(1, length - (0 if prefix is None else len(prefix))), prefix=prefix,
        temperature=cfg.temperature, top_k=cfg.top_k, nucleus_p=cfg.nucleus_p, generator=generator,
        precision=cfg.precision, guidance=cfg.guidance, **_each(cfg.told),
    )  # fmt: skip
    if cfg.play == "wav":
        out.write(wav_header(length, rate))
    made = 0
    if prefix is not None:  # `stream` does not repeat it; as `generate`, by its classes
        out.write(_pcm(model.quantizer.decode(model.quantizer.encode(prefix))))
        made = len(prefix)
    out.flush()
    if made < length:
        for chunk in chunks:
            out.write(_pcm(chunk[0]))
            out.flush()


def wav_header(n: int, sample_rate: int) -> bytes:
    """The 44 bytes before n samples of 16-bit mono PCM in a wav file."""
    size = min(2 * n, 0xFFFFFFFF - 36)  # beyond: "until the end", as streaming writers say it
    form = (16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)  # PCM, mono, 2 bytes a sample
    start = struct.pack("<4sI8sIHHIIHH", b"RIFF", 36 + size, b"WAVEfmt ", *form)
    return start + struct.pack("<4sI", b"data", size)


def _pcm(wav: Tensor) -> bytes:
    """Float (T,) in [-1, 1] as 16-bit little-endian samples, rounded as `audio.write` does."""
    samples = (wav.detach().cpu().double() * 32768).round().clamp(-32768, 32767)
    return samples.to(torch.int16).numpy().astype("<i2").tobytes()


if __name__ == "__main__":
    sys.exit(main())
