"""SaShiMi with its parts taken away, on spoken digits: one run of train.py per row of a table.

    python examples/ablations.py data_root=fsdd/recordings minutes=10
    python examples/ablations.py data_root=fsdd/recordings rows=[sashimi,unet] steps=200 seed=1
    python examples/ablations.py table=true                      # of the runs there are

The command of each row is printed before it runs. A row that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rawaudio import command
from rawaudio.config import check_allowed, check_name, parse_args, setting
from rawaudio.errors import UserError

ROOT = Path(__file__).parents[1]
SHARED = (
    "model.d_model=32 model.n_layers=2 model.l_max=4000 seq_len=2000 batch_size=4 ema=0.99 "
    "optimizer=muon start_lr=3e-3 warmup_steps=20 validation_interval=1000000 "
    "n_listen=0 threads=1"
)
AR = f"recipe=digits append_silence=0 {SHARED}"
DIFFUSION = (
    f"model=diffwave model.sample_rate=8000 model.tied=true model.data_std=0.13 peak=0.9 "
    f"model.beta_first=2e-5 model.beta_last=0.04 grad_clip=1 {SHARED}"
)
ROWS = {  # name -> what every command of its kind has, what this one adds
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
}


@dataclass
class Settings:
    data_root: str = setting(
        "fsdd/recordings", "folder of the Free Spoken Digit Dataset's recordings"
    )
    minutes: float = setting(10.0, "of training per row", ">0")
    steps: int | None = setting(None, "of training per row, in place of minutes", ">=1")
    seed: int = setting(1775, "of weights and data order")
    rows: list[str] = setting([], f"some of {', '.join(ROWS)}; none given: all")
    out: str = setting("runs/ablations", "folder of the runs")
    table: bool = setting(False, "print the table alone")

    def __post_init__(self) -> None:
        check_allowed(self)
        self.rows = self.rows or list(ROWS)
        for row in self.rows:
            check_name("row", row, ROWS)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(Settings, argv, prog="python examples/ablations.py", examples=__doc__)
    return command.run(lambda: make(cfg))


def make(cfg: Settings) -> None:
    """Runs what has not ended yet, and prints the table."""
    for row in [] if cfg.table else cfg.rows:
        words = [
            f"train_csv={ROOT}/splits/fsdd-train.csv",
            f"valid_csv={ROOT}/splits/fsdd-valid.csv",
        ]
        words += [f"data_root={cfg.data_root}", *" ".join(ROWS[row]).split(), f"seed={cfg.seed}"]
        words += [f"max_steps={cfg.steps or 0}", f"max_minutes={'' if cfg.steps else cfg.minutes}"]
        words += [f"checkpoint_path={cfg.out}/{row}-{cfg.seed}"]
        print(f"python train.py {shlex.join(words)}", flush=True)
        if subprocess.run([sys.executable, ROOT / "train.py", *words]).returncode:
            raise UserError(f"{row}: the run failed, see above; the same command goes on")
    print("| run | parameters | steps | seconds a step | validation |\n| --- " + "| --: " * 4 + "|")
    for row in cfg.rows:
        for log in sorted(Path(cfg.out).glob(f"{row}-[0-9]*/metrics.jsonl")):
            print(line_of(log.parent))


def line_of(folder: Path) -> str:
    """The row of a run folder: where it ended, and its quickest step, which other work on the
    machine disturbed least."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts = [f"seconds/{part}" for part in ("forward", "backward", "optimizer")]
    quickest = min((sum(map(n.get, parts)) for n in log if parts[0] in n), default=float("nan"))
    scores = [(n["step"], key, n[key]) for n in log for key in n if key.startswith("valid_")]
    if not scores:
        return f"| {folder.name} | | | {quickest:.2f} | has not ended |"
    step, unit, score = scores[-1]
    parameters = re.search(r"^- parameters: (.*)", (folder / "README.md").read_text(), re.M)[1]
    cells = folder.name, parameters, f"{step:,}", f"{quickest:.2f}"
    return f"| {' | '.join(cells)} | {score:.4f} {unit.removeprefix('valid_')} |"


if __name__ == "__main__":
    sys.exit(main())
