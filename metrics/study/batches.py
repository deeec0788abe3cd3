"""Cut the clips of a listening study into pages, under ids that tell nothing of their methods.

A batch holds the same names of every method; names, and the clips of a batch, are in random order.
With `gold` some clips of one method are spoilt: who calls them good does not listen.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from torch import Tensor

from metrics.study.layout import Key, check_method, new_folder, parts_of, read_table, write_table
from rawaudio import audio, command
from rawaudio.config import check_allowed, parse_args, setting
from rawaudio.errors import UserError
from rawaudio.files import natural, write_text
from rawaudio.progress import watched
from rawaudio.seeds import seeded

EXAMPLES = """\
python -m metrics.study batches condition=music methods=[sashimi,wavenet,test] gold=5
python -m metrics.study batches condition=digits-sashimi methods=[sashimi] batch_size=10 gold=5 \\
  url=https://example.org/{condition}/{batch}/{uid}.wav"""

# How a gold clip is spoilt -> the most that it may get: published for music, where four in five
# sounded bad, one only made no sense.
SPOILT = {
    "noise": {"quality": 2, "musicality": 2, "intelligibility": 2},
    "shuffled": {"quality": 5, "musicality": 2, "intelligibility": 2},
}
NOISE = 15.0  # dB above the clip: digits are still heard at 10
PIECE = 0.06  # seconds


@dataclass
class BatchesConfig:
    condition: str = setting(MISSING, "name of the new folder in out_dir, and of the study in URLs")
    clips: str = setting("study/clips", "folder with one of clips for each method")
    methods: list[str] | None = setting(None, "its folders that take part; none: all of them")
    out_dir: str = setting("study", "folder that gets the condition")
    batch_size: int = setting(1, "names on a page; of each name, one clip of every method", ">0")
    n_max: int | None = setting(None, "use so many of the names, drawn at random", ">0")
    common: bool = setting(False, "leave out names that not every method has")
    gold: int = setting(
        0, "clips that are spoilt, spread over the pages; they are not scored", ">=0"
    )
    gold_of: str | None = setting(None, "the method whose clips they are; none: the last one")
    url: str = setting("{condition}/{batch}/{uid}.wav", "where the clips will be on the web")
    seed: int = setting(42, "of the order and the gold clips; 42: the published order")

    def __post_init__(self) -> None:
        check_allowed(self)
        check_method(self.condition, "condition")
        try:
            urls = {link(self, 0, uid) for uid in "ab"}
        except (LookupError, AttributeError, ValueError):
            urls = set()
        names = {parts_of(url)[-1] for url in urls}
        if names != {"a.wav", "b.wav"} or any(c in self.url for c in ", \t\"'<>"):
            raise UserError(
                f"url={self.url}: expected {{condition}}, {{batch}} and /{{uid}}.wav in it"
            )


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(BatchesConfig, argv, prog="python -m metrics.study batches", examples=EXAMPLES)
    return command.run(lambda: make(cfg))


def make(cfg: BatchesConfig) -> None:
    """Writes the condition. Raises UserError if it is there, or for methods that do not fit."""
    methods = _methods(cfg)
    batches = _batches(cfg, methods)
    gold = _gold(cfg, methods, batches)
    keys = [(method, name) for method in methods for batch in batches for name in batch]
    uids = {key: uid(cfg.seed, *key) for key in keys}
    place = {name: k for k, batch in enumerate(batches) for name in batch}
    with new_folder(Path(cfg.out_dir, cfg.condition), "write condition= for another") as draft:
        for method, name in watched(keys, "writing", len(keys)):
            wav, rate = audio.read(Path(cfg.clips, method, name))
            if kind := gold.get((method, name)):
                wav = spoil(wav, rate, kind, seeded("gold", cfg.seed, name))
            audio.write(draft / str(place[name]) / f"{uids[method, name]}.wav", wav, rate)
        write_text(draft / "batches.txt", "".join(" ".join(batch) + "\n" for batch in batches))
        lines = [f"{method} {name} {uids[method, name]}\n" for method, name in keys]
        write_text(draft / "uids.txt", "".join(lines))
        _write_urls(cfg, draft, methods, batches, uids)
        if labels := _labels(cfg, methods):
            known = [
                {"method": key[0], "name": key[1], "label": labels[key]}
                for key in keys
                if key in labels
            ]
            write_table(draft / "labels.csv", known, ("method", "name", "label"))
        if gold:
            rows = [{"method": m, "name": n, "kind": k, **SPOILT[k]} for (m, n), k in gold.items()]
            write_table(draft / "gold.csv", rows, rows[0])
    pages = f"{len(batches):,} pages of {len(keys) // len(batches)} clips"
    print(f"{cfg.out_dir}/{cfg.condition}: {pages}" + f", {len(gold)} of them gold" * bool(gold))


def uid(seed: int, method: str, name: str) -> str:
    """The id of a clip: another for every method, unlike published ones, and no clue to it."""
    return hashlib.sha256(f"{seed} {method} {name}".encode()).hexdigest()[:32]


def link(cfg: BatchesConfig, batch: int, uid: str) -> str:
    """Where a clip will be; {} stand for condition, batch and id in turn, as in published URLs."""
    values = {"condition": cfg.condition, "batch": batch, "uid": uid}
    return cfg.url.format(*values.values(), **values)


# ---- what goes where ------------------------------------------------------------------------


def _methods(cfg: BatchesConfig) -> list[str]:
    folder = Path(cfg.clips)
    if not folder.is_dir():
        raise UserError(f"clips={folder} is no folder: `python -m metrics.study select` makes one")
    there = sorted(p.name for p in folder.iterdir() if p.is_dir() and any(p.glob("*.wav")))
    methods = cfg.methods if cfg.methods is not None else there
    for method in methods:
        check_method(method, "methods")
        if method not in there:
            raise UserError(
                f"methods: {folder} has no clips of {method}; it has {', '.join(there)}"
            )
    if not methods or len(set(methods)) < len(methods):
        raise UserError("methods: give one or more, each once")
    if cfg.gold and (cfg.gold_of or methods[-1]) not in methods:
        raise UserError(f"gold_of={cfg.gold_of}: must be one of {', '.join(methods)}")
    return methods


def _batches(cfg: BatchesConfig, methods: list[str]) -> list[list[str]]:
    """Names, shuffled, in batches; the same for every method."""
    names = {m: {path.name for path in Path(cfg.clips, m).glob("*.wav")} for m in methods}
    common, every = set.intersection(*names.values()), set.union(*names.values())
    if (alone := sorted(every - common, key=natural)) and not cfg.common:
        lacking = next(method for method in methods if alone[0] not in names[method])
        raise UserError(
            f"{lacking} has no {alone[0]}, which other methods have ({len(alone)} such names): "
            f"write common=true for the {len(common)} names that all have, or study each alone"
        )
    order = sorted(common, key=natural)
    if bad := next((name for name in order if name.split() != [name]), None):
        raise UserError(f"{cfg.clips}: {bad!r}: names of clips have no spaces")
    random.Random(cfg.seed).shuffle(order)
    order = order[: cfg.n_max]
    if len(order) < cfg.batch_size or len(order) % cfg.batch_size:
        whole = len(order) // cfg.batch_size * cfg.batch_size
        ways = f"n_max={whole} to leave {len(order) - whole} out, or " if whole else ""
        raise UserError(
            f"{len(order)} names are no whole number of batches of {cfg.batch_size}: write {ways}"
            "another batch_size="
        )
    return [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]


def _gold(cfg: BatchesConfig, methods: list[str], batches: list[list[str]]) -> dict[Key, str]:
    """Key of each clip to spoil -> how, evenly spread over the batches."""
    total = sum(map(len, batches))
    if cfg.gold >= total:
        raise UserError(f"gold={cfg.gold}: must be below the number of names, {total}")
    rng = random.Random(cfg.seed)
    free = [rng.sample(batch, len(batch)) for batch in batches]
    kinds = [kind for kind, count in zip(SPOILT, (4, 1), strict=True) for _ in range(count)]
    places = [i * len(batches) // cfg.gold for i in range(cfg.gold)]
    method = cfg.gold_of or methods[-1]
    return {(method, free[k].pop()): kinds[i % len(kinds)] for i, k in enumerate(places)}


def _labels(cfg: BatchesConfig, methods: list[str]) -> dict[Key, str]:
    """What the clips say, of methods that `select` chose."""
    tables = {m: Path(cfg.clips, m, "selected.csv") for m in methods}
    return {
        (method, row["path"]): row["label"]
        for method, path in tables.items()
        if path.is_file()
        for row in read_table(path, ["path", "label"])
        if row["label"]
    }


def _write_urls(
    cfg: BatchesConfig,
    folder: Path,
    methods: list[str],
    batches: list[list[str]],
    uids: dict[Key, str],
) -> None:
    """urls.csv with a line for each page, and urls_BATCH.csv with that line alone."""
    rng, lines = random.Random(cfg.seed), []
    for k, batch in enumerate(batches):
        line = [link(cfg, k, uids[method, name]) for method in methods for name in batch]
        rng.shuffle(line)
        lines.append(line)
    columns = [f"recording_{i}_url" for i in range(len(lines[0]))]
    rows = [dict(zip(columns, line, strict=True)) for line in lines]
    write_table(folder / "urls.csv", rows, columns)
    for k, row in enumerate(rows):
        write_table(folder / f"urls_{k}.csv", [row], columns)


# ---- gold clips -----------------------------------------------------------------------------


def spoil(wav: Tensor, sample_rate: int, kind: str, rng: torch.Generator) -> Tensor:
    """A clip that no listener calls good, as loud as it was: (T,) -> (T,).

    noise: white noise, 15 dB louder than the clip; shuffled: backward pieces of 60 ms, in random
    order.
    """
    level = wav.square().mean().sqrt().clamp(min=1e-3)
    if kind == "noise":
        noise = torch.randn(len(wav), generator=rng)
        wav = wav + noise * level * 10 ** (NOISE / 20)
    else:
        pieces = wav.split(max(1, round(PIECE * sample_rate)))
        order = torch.randperm(len(pieces), generator=rng).tolist()
        wav = torch.cat([pieces[i].flip(0) for i in order])
    return (wav * level / wav.square().mean().sqrt().clamp(min=1e-6)).clamp(-1, 1)
