"""What all commands have in common, each in a process of its own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from commands import python
from training import MODEL, RATE

from sashimi import audio
from sashimi.checkpoint import save_checkpoint
from sashimi.config import AutoregressiveConfig

COMMANDS = {  # as one writes it -> what is misspelt
    "train.py": "bach_size=4",
    "split_data.py": "--rot_path=x",
    "-m sashimi.generate": "n_sample=3",
    "-m sashimi.likelihood": "batchsize=3",
    "-m sashimi.benchmark": "row=[plain]",
    "-m sashimi.publish": "nam=x",
    "-m metrics": "sample=generated",
    "-m metrics.sweep": "sample=[a,b]",
    "-m metrics.floors": "samplerate=8000",
    "-m metrics.train_classifier": "epoch=3",
    "-m cauchy_kernel": "--hep",
    "-m cauchy_kernel.benchmark": "--lenth=3",
}
HEAVY = {"torch", "scipy", "matplotlib", "soundfile"}


def imported(stderr: str) -> set[str]:
    """Top-level modules in what -X importtime says."""
    lines = [line.rpartition("|")[2].strip() for line in stderr.splitlines() if "|" in line]
    return {name.partition(".")[0] for name in lines}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_slips_of_the_fingers_are_answered_before_anything_heavy_is_imported(command):
    for argument, status in (("--help", 0), (COMMANDS[command], 2)):
        done = python(f"-X importtime {command}", argument)
        assert done.returncode == status, done.stderr
        assert not imported(done.stderr) & HEAVY
        said = [line for line in done.stderr.splitlines() if "import time:" not in line]
        assert "Traceback" not in done.stderr and bool(said) == bool(status)


@pytest.mark.parametrize(
    "arguments",
    ["temperature=-1", "model=sashimi_digits", "prefix=nowhere.wav", "checkpoint=FILE lable=two",
     "model=sashimi_ar_sc09 n_sample=3"],
)  # fmt: skip
def test_generate_refuses_what_no_model_could_follow_at_once(arguments, told):
    done = python("-X importtime -m sashimi.generate", *arguments.replace("FILE", told).split())
    assert done.returncode == 2 and not imported(done.stderr) & HEAVY
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_what_a_model_can_be_told_is_no_misspelt_setting(told, tmp_path):
    out = [f"out_dir={tmp_path}/out", "page=false"]
    assert python("-m sashimi.generate", f"checkpoint={told}", "label=two", *out).returncode == 0
    done = python("-m sashimi.generate", f"checkpoint={told}", "lable=two", *out)
    assert "lable=two: unknown, did you mean label? (this model can be told label)" in done.stderr


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> str:
    """Weights of a tiny model that can be told a label."""
    from sashimi.autoregressive import SashimiAR

    config = AutoregressiveConfig(
        d_model=4, n_layers=1, pool=[2], d_state=4, l_max=40, clip_length=40, sample_rate=2000,
        conditions={"label": ["one", "two"]}, condition_counts={"label": [1, 1]}, d_condition=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("told") / "told.safetensors"
    save_checkpoint(path, SashimiAR(config))
    return str(path)


NOTEBOOK = "module://matplotlib_inline.backend_inline"  # as Jupyter sets it for what it starts


@pytest.mark.parametrize(
    "command, arguments, picture",
    [
        ("-m sashimi.generate", ["checkpoint={told}", "n_samples=2", "out_dir=out"],
         "out/index.html"),
        ("train.py", ["train_csv={data}/train.csv", "valid_csv={data}/valid.csv", "max_steps=1",
                      "checkpoint_path=run", "device=cpu", *MODEL], "run/curves.png"),
        ("-m metrics", ["samples={data}/train.csv", "real_csv={data}/valid.csv", "cache_dir=none",
                        "out_dir=scores", "bins=2"], "scores/scores.html"),
        ("-m metrics.sweep", ["samples=[{sweep}/1,{sweep}/2]", "real_csv={data}/valid.csv",
                              "cache_dir=none"], "sweep.png"),
        ("-m metrics.train_classifier", ["train_csv={data}/train.csv", "valid_csv={data}/valid.csv",
                                         "epochs=1", "out=words.safetensors"], "words.png"),
        ("-m cauchy_kernel.benchmark", ["-l", "100", "-f", "2", "-n", "4", "-r", "1"],
         "cauchy_kernel.png"),
    ],
)  # fmt: skip
def test_pictures_are_drawn_whatever_backend_a_notebook_asks_for(
    command, arguments, picture, told, data, sweep, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"told": told, "data": data, "sweep": sweep}
    arguments = [argument.format(**places) for argument in arguments]
    done = python(command, *arguments, MPLBACKEND=NOTEBOOK)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / picture).stat().st_size > 1000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of tones that say one or two, with train.csv and valid.csv."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(6):
        wav = 0.5 * torch.sin(torch.arange(300 + 10 * i) * (0.1 + 0.05 * i))
        audio.write(folder / f"{i}.wav", wav, RATE)
    rows = [f"{i}.wav,{('one', 'two')[i % 2]}\n" for i in range(6)]
    (folder / "train.csv").write_text("path,label\n" + "".join(rows))
    (folder / "valid.csv").write_text("path,label\n" + "".join(rows[:4]))
    return folder


@pytest.fixture(scope="module")
def sweep(data, tmp_path_factory):
    """Two folders of clips that differ in the temperature, as `generate` leaves them."""
    folder = tmp_path_factory.mktemp("sweep")
    for name in ("1", "2"):
        shutil.copytree(data, folder / name)
        (folder / name / ".generate").mkdir()
        settings = json.dumps({"temperature": float(name)})
        (folder / name / ".generate" / "settings.json").write_text(settings)
    return folder
