"""Models side by side on spoken digits: one run of train.py per row of a table.

    python examples/compare.py what=families data_root=fsdd/recordings     # and its baselines
    python examples/compare.py what=ablations data_root=fsdd/recordings    # with parts taken away
    python examples/compare.py what=ablations rows=[sashimi,unet] steps=200 seed=1 data_root=...
    python examples/compare.py what=families table=true                    # of the runs there are

The command of each row is printed before it runs, and may as well be typed by hand. A row that was
stopped goes on where it was. Rows of one table and seed see the same clips in the same order.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rawaudio import command
from rawaudio.config import check_allowed, check_name, parse_args, setting
from rawaudio.errors import UserError

ROOT = Path(__file__).parents[1]
RUN = "warmup_steps=20 validation_interval=1000000 summary_interval=5 n_listen=0 threads=1"
WHOLE = f"schedule=constant ema=0.97 batch_size=4 {RUN}"  # clips; rates that learn fastest here
BITS = f"{WHOLE} append_silence=800 seq_len=6000 grad_clip=1"
NOISE = f"{WHOLE} peak=0.9 seq_len=6000 grad_clip=1"
SMALL = (
    "model.d_model=32 model.n_layers=2 model.l_max=4000 seq_len=2000 batch_size=4 ema=0.99 "
    f"optimizer=muon start_lr=3e-3 {RUN}"
)
AR = f"recipe=digits append_silence=0 {SMALL}"
DIFFUSION = (
    f"model=diffwave model.sample_rate=8000 model.tied=true model.data_std=0.13 peak=0.9 "
    f"model.beta_first=2e-5 model.beta_last=0.04 grad_clip=1 {SMALL} model.l_max=6000 seq_len=6000"
)  # whole clips: cut words, without the silence around them, are hardly denoised in minutes
TABLES = {  # row -> what every command of its kind has, what this one adds
    "families": {
        "sashimi": (BITS, "model=autoregressive_digits start_lr=2e-3"),
        "sashimi-muon": (BITS, "model=autoregressive_digits optimizer=muon start_lr=3e-3"),
        "wavenet": (BITS, "model=wavenet_digits start_lr=3e-3"),
        "samplernn": (BITS, "model=samplernn_digits start_lr=3e-3"),
        "samplernn-tbptt": (BITS, "model=samplernn_digits start_lr=3e-3 tbptt=1024"),
        "diffwave-sashimi": (NOISE, "model=diffwave_digits start_lr=1.5e-3"),
        "diffwave-wavenet": (NOISE, "model=diffwave_wavenet_digits start_lr=1e-3"),
        "wavegan": (f"{WHOLE} peak=0.9", "model=wavegan_digits start_lr=1e-4 batch_size=16"),
    },
    "ablations": {
        "sashimi": (AR, ""),
        "no-pooling": (AR, "model.pool=[] model.n_layers=6"),
        "no-pooling-wide": (AR, "model.pool=[] model.n_layers=6 model.d_model=88"),
        "one-pooling": (AR, "model.pool=[4] model.n_layers=3"),
        "unet": (AR, "model.unet=true"),
        "untied": (AR, "model.tied=false"),
        "state-4": (AR, "model.d_state=4"),
        "state-16": (AR, "model.d_state=16"),
        "diffusion": (DIFFUSION, ""),
        "diffusion-one-way": (DIFFUSION, "model.bidirectional=false"),
    },
}


@dataclass
class Settings:
    what: str = setting("families", "the table", "|".join(TABLES))
    data_root: str = setting(
        "fsdd/recordings", "folder of the Free Spoken Digit Dataset's recordings"
    )
    minutes: float = setting(10.0, "of training per row", ">0")
    steps: int | None = setting(None, "of training per row, in place of minutes", ">=1")
    seed: int = setting(1775, "of weights and data order")
    rows: list[str] = setting([], "some of the table's; none given: all")
    clips: int = setting(0, "that each trained model makes, on a page in its run folder", ">=0")
    out: str | None = setting(None, "folder of the runs; none: runs/families or runs/ablations")
    table: bool = setting(False, "print the table alone")

    def __post_init__(self) -> None:
        check_allowed(self)
        self.out = self.out or f"runs/{self.what}"
        self.rows = self.rows or list(TABLES[self.what])
        for row in self.rows:
            check_name("row", row, TABLES[self.what])


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(Settings, argv, prog="python examples/compare.py", examples=__doc__)
    return command.run(lambda: make(cfg))


def make(cfg: Settings) -> None:
    """Runs what has not ended yet, and prints the table."""
    for row in [] if cfg.table else cfg.rows:
        folder = Path(cfg.out, f"{row}-{cfg.seed}")
        data = f"data_root={cfg.data_root}"
        words = [f"{part}_csv={ROOT}/splits/fsdd-{part}.csv" for part in ("train", "valid")]
        words += [data, *" ".join(TABLES[cfg.what][row]).split(), f"seed={cfg.seed}"]
        words += [f"max_steps={cfg.steps or 0}", f"max_minutes={'' if cfg.steps else cfg.minutes}"]
        run(row, [str(ROOT / "train.py"), *words, f"checkpoint_path={folder}"])
        weights = f"checkpoint={folder}/best.safetensors"
        test = folder / "test.txt"
        if has_bits(folder) and not (test.exists() and is_newer(test, folder / "best.safetensors")):
            words = ["-m", "rawaudio.likelihood", f"csv={ROOT}/splits/fsdd-test.csv", data, weights]
            test.write_text(run(row, words, stdout=subprocess.PIPE))
        if cfg.clips:
            words = [f"n_samples={cfg.clips}", f"out_dir={folder}/clips"]
            run(row, ["-m", "rawaudio.generate", weights, *words])
    print(
        "| run | parameters | steps | seconds a step | training, steps 51-100 | validation | test |"
    )
    print("| --- " + "| --: " * 6 + "|")
    for row in cfg.rows:
        for log in sorted(Path(cfg.out).glob(f"{row}-[0-9]*/metrics.jsonl")):
            print(line_of(log.parent))


def run(row: str, words: list[str], **options) -> str | None:
    """Prints the command and runs it. UserError if it fails."""
    print(f"python {shlex.join(words)}", flush=True)
    ended = subprocess.run([sys.executable, *words], text=True, **options)
    if ended.returncode:
        raise UserError(f"{row}: this command failed, see above; compare.py goes on from there")
    return ended.stdout


def has_bits(folder: Path) -> bool:
    """Whether that run is of an autoregressive model."""
    return "valid_bits" in (folder / "metrics.jsonl").read_text()


def is_newer(score: Path, weights: Path) -> bool:
    """Whether the score is that of these weights."""
    return score.stat().st_mtime_ns > weights.stat().st_mtime_ns


def line_of(folder: Path) -> str:
    """The row of a run folder: where it ended, its quickest step, which other work on the machine
    disturbed least, and its losses: of training clips in steps 51 to 100, which are the same
    for all runs of a table, of all validation and all test clips at the end."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts = [f"seconds/{part}" for part in ("forward", "backward", "optimizer")]
    quickest = min((sum(map(n.get, parts)) for n in log if parts[0] in n), default=float("nan"))
    scores = [(n["step"], key, n[key]) for n in log for key in n if key.startswith("valid_")]
    if not scores:
        return f"| {folder.name} | | | {quickest:.2f} | | has not ended | |"
    step, key, score = scores[-1]
    unit = key.removeprefix("valid_")
    begun = [n[f"train_{unit}"] for n in log if 50 < n["step"] <= 100 and f"train_{unit}" in n]
    early = f"{fmean(begun):.3f}" if begun else ""
    parameters = re.search(r"^- parameters: (.*)", (folder / "README.md").read_text(), re.M)[1]
    test = folder / "test.txt"
    bits = re.search(r"([\d.]+) bits per sample", test.read_text())[1] if test.exists() else ""
    cells = folder.name, parameters, f"{step:,}", f"{quickest:.2f}", early
    return f"| {' | '.join(cells)} | {score:.4f} {unit} | {bits} |"


if __name__ == "__main__":
    sys.exit(main())
