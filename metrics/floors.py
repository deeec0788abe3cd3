"""Floors to compare scores with: clips that share something with speech, and are none.

out_dir/noise/     white noise as long and as loud as the clips of the CSV
out_dir/shuffled/  those clips with their samples in random order: every class of the mu-law
                   code as often as in speech, and nothing else
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING

from rawaudio import audio, command
from rawaudio.config import check_allowed, parse_args, setting
from rawaudio.data import ClipDataset, to_wave
from rawaudio.errors import UserError
from rawaudio.progress import watched

EXAMPLES = (
    "python -m metrics.floors csv=splits/fsdd-train.csv data_root=fsdd/recordings sample_rate=8000"
)


@dataclass
class FloorsConfig:
    csv: str = setting(MISSING, "CSV of real clips, with a column `path`")
    data_root: str | None = setting(None, "folder that relative paths start from")
    sample_rate: int = setting(16000, "Hz", ">=1")
    n: int = setting(1000, "clips of each kind; those of the CSV in turn, shuffled", ">=1")
    seed: int = setting(0, "same seed, same clips", ">=0 <4e9")
    out_dir: str = setting("floors", "folder for the two folders; must not hold them yet")

    def __post_init__(self) -> None:
        check_allowed(self)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(FloorsConfig, argv, prog="python -m metrics.floors", examples=EXAMPLES)
    return command.run(lambda: make(cfg))


def make(cfg: FloorsConfig) -> None:
    """Writes the clips. Raises UserError for a folder that is there already."""
    folders = [Path(cfg.out_dir, name) for name in ("noise", "shuffled")]
    for folder in folders:
        if folder.exists():
            raise UserError(f"{folder} is there already: write out_dir= for another folder")
    clips = ClipDataset(cfg.csv, cfg.sample_rate, cfg.data_root)
    rng = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(clips), generator=rng).tolist()
    for i in watched(range(cfg.n), "writing", cfg.n):
        wav = to_wave(clips[order[i % len(clips)]])
        noise = torch.randn(len(wav), generator=rng) * wav.square().mean().sqrt()
        shuffled = wav[torch.randperm(len(wav), generator=rng)]
        for folder, floor in zip(folders, (noise.clamp(-1, 1), shuffled), strict=True):
            audio.write(folder / f"{i:04d}.wav", floor, cfg.sample_rate)
    print(f"{cfg.n:,} clips each in {' and '.join(map(str, folders))}")


if __name__ == "__main__":
    sys.exit(main())
