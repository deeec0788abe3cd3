"""The README's commands and lines of Python, in their order and in one folder.

What they work on is small here: audio of noise where data sets are named, weights of tiny networks
in place of those to download or to train, and settings after each command that shorten it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from commands import status

from rawaudio import audio
from rawaudio.checkpoint import save_checkpoint
from sashimi.autoregressive import AutoregressiveConfig, SashimiAR
from sashimi.diffwave import DiffusionConfig, SashimiDiffWave

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)

SKIPPED = {  # what a command begins with -> why it is not run here
    "python3 -m venv": "it downloads what is installed already; what it starts is run, see below",
    "torchrun": "it takes eight GPUs",
    "bash sashimi/weights": "it trains for hours",
    "python -m metrics.study score": "it needs listeners",
}
TINY = ["model.d_model=4", "model.n_layers=1", "model.pool=[2]", "model.d_state=4",
        "model.l_max=200", "model.clip_length=100"]  # fmt: skip
TRAIN = ["max_steps=2", "n_listen=0", "batch_size=2", "device=cpu", *TINY]
SHORTER = {  # a command, by how it begins (the longest counts) -> settings after it
    "python train.py": TRAIN,
    "python train.py recipe=youtubemix": ["sample_len=200", "cache=cache", *TRAIN],
    "python -m rawaudio.generate": ["n_samples=2", "length=2100", "n_reps=2"],
    "python -m rawaudio.generate n_samples=16": ["n_samples=2"],
    "python -m rawaudio.generate play": ["length=400"],
    "python -m rawaudio.generate model=sashimi_diffwave": ["n_samples=2", "steps=2", "length=200"],
    "python -m rawaudio.generate model=sashimi_diffwave_digits label": ["steps=2", "length=200"],
    "python -m rawaudio.generate checkpoint=vocoder": ["n_samples=1"],
    "python -m rawaudio.interpolate": ["n=2"],
    "python -m rawaudio.likelihood": ["batch_size=2"],
    "python -m metrics ": ["bins=2", "bootstrap=2", "cache_dir=cache"],
    "python -m metrics.study select": ["cache_dir=cache"],
    "python -m metrics.study batches": ["batch_size=1", "gold=1"],
}
# the model of a line of Python -> weights that stand for it, by checkpoint= as README says
CHECKPOINTS = {"sashimi_ar_sc09": "ar.safetensors", "sashimi_diffwave_digits": "d.safetensors"}
# what `...` after a command stands for: what the first command of its kind says
SAME = {
    "train_csv": "splits/sc09-train.csv", "valid_csv": "splits/sc09-valid.csv",
    "data_root": "speech_commands_v0.01",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The reader's folder: a clone, the data sets, two recordings and a vocoder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    spoken = [f"{word}/{speaker}_nohash_0.wav" for word in ("zero", "one") for speaker in "abc"]
    digits = [f"{digit}_theo_{take}.wav" for digit in range(2) for take in range(3)]
    sets = {
        "speech_commands_v0.01": ("sc09", 16000, spoken),
        "fsdd/recordings": ("fsdd", 8000, digits),
        "piano": ("other", 16000, ["a.wav", "b.wav"]),
        ".": ("other", 8000, ["recording.wav", "speech.wav"]),
    }
    Path("splits").mkdir()
    for place, (prefix, rate, names) in sets.items():
        rows = ["path,label,speaker\n"]
        for i, name in enumerate(names):
            audio.write(Path(place, name), 0.3 * torch.rand(2600 + 40 * i) - 0.15, rate)
            rows.append(f"{name},{('zero', 'one')[i % 2]},{('ann', 'bob')[i % 3 > 0]}\n")
        for split in ("train", "valid", "test"):
            Path(f"splits/{prefix}-{split}.csv").write_text("".join(rows))
    tiny = {"d_model": 4, "n_layers": 1, "pool": [2], "d_state": 4, "l_max": 400}
    known = {"label": ["one", "two", "three", "seven"], "speaker": ["theo"]}
    counts = {name: [1] * len(values) for name, values in known.items()}
    told = {"conditions": known, "condition_counts": counts}
    models = {
        "ar": SashimiAR(AutoregressiveConfig(**tiny, clip_length=400)),
        "d": SashimiDiffWave(DiffusionConfig(**tiny, **told, clip_length=6000, sample_rate=8000)),
        "vocoder": SashimiDiffWave(DiffusionConfig(**tiny, unconditional=False)),
    }
    for name, model in models.items():
        save_checkpoint(f"{name}.safetensors", model)
    return tmp_path


def commands(block: str) -> list[str]:
    """The commands of a block, without comments; continued lines are one."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s#.*", "", line).strip() for line in lines) if line]


def run_command(line: str) -> None:
    """`python ...` in this process: its module's main, with settings that shorten it."""
    line, pipe, _ = line.partition(" | aplay")  # a player is not there; what it gets is written
    if ".venv/bin/python -m rawaudio.generate" in line:
        line = "python -m rawaudio.generate"  # the weights that travel with the code, as they are
    elif any(line.startswith(start) for start in SKIPPED):
        return
    else:
        start = max(filter(line.startswith, SHORTER), key=len, default="")
        line = " ".join([line, *SHORTER.get(start, [])])
    if " ..." in line:
        run = f"runs/{len(list(Path('runs').iterdir()))}"
        given = {word.partition("=")[0] for word in line.split()}
        more = [f"{k}={v}" for k, v in (SAME | {"checkpoint_path": run}).items() if k not in given]
        line = line.replace(" ...", " " + " ".join(more))
    name, *argv = [word for word in shlex.split(line)[1:] if word != "-m"]
    package = name in ("metrics", "metrics.study")
    module = f"{name}.__main__" if package else name.removesuffix(".py")
    main = importlib.import_module(module).main
    out = io.TextIOWrapper(open("played.wav", "wb")) if pipe else sys.stdout
    with contextlib.redirect_stdout(out):
        assert not status(main, argv), line
    if pipe:
        out.close()
        assert Path("played.wav").stat().st_size > 44


def test_everything_in_the_readme_runs_from_top_to_bottom(folder, monkeypatch):
    load = torch.hub.load

    def local(repository, name, *, trust_repo, checkpoint=None):
        assert repository == "OWNER/simple-sashimi" and trust_repo
        checkpoint = checkpoint or CHECKPOINTS.get(name)
        return load(str(ROOT), name, source="local", checkpoint=checkpoint, device="cpu")

    monkeypatch.setattr(torch.hub, "load", local)
    names: dict[str, object] = {}
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), names)
        else:
            for line in commands(block):
                run_command(line)
    made = [path.name for path in folder.glob("generated*")]
    assert len(made) == 5 and "generated" in made, "each request has a folder of its own"
    assert names["audio"].shape[0] == 1 and names["logits"].shape[-1] == 256


@pytest.mark.parametrize("start", [*SKIPPED, *SHORTER])
def test_what_is_skipped_or_shortened_here_is_in_the_readme(start):
    lines = [line for language, block in BLOCKS if language == "bash" for line in commands(block)]
    assert any(line.startswith(start) for line in lines)
