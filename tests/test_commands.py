"""What all commands have in common, each in a process of its own."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from commands import python
from training import MODEL, RATE

from cauchy_kernel.build import DemandError
from rawaudio import audio, command
from rawaudio.audio import AudioError
from rawaudio.checkpoint import save_checkpoint
from rawaudio.errors import UserError
from rawaudio.files import CheckpointError
from sashimi.autoregressive import AutoregressiveConfig

COMMANDS = {  # as one writes it -> what is misspelt
    "train.py": "bach_size=4",
    "split_data.py": "--rot_path=x",
    "-m rawaudio.generate": "n_sample=3",
    "-m rawaudio.likelihood": "batchsize=3",
    "-m rawaudio.benchmark": "row=[plain]",
    "-m rawaudio.publish": "nam=x",
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
    "command",
    ["train.py", "-m rawaudio.likelihood", "-m rawaudio.publish", "-m metrics.sweep",
     "-m metrics.floors", "-m metrics.train_classifier"],
)  # fmt: skip
def test_a_bare_command_is_answered_with_one_to_copy(command):
    done = python(command)
    said = done.stderr.strip()
    assert done.returncode == 2 and said.count("\n") == 0
    missing = said.removeprefix("error: ").partition(":")[0].split(", ")
    example = said.partition("as in: ")[2]
    assert example.startswith(f"python {command}")
    assert all(f" {name}=" in example for name in missing)


@pytest.mark.parametrize(
    "arguments",
    ["temperature=-1", "model=sashimi_digits", "prefix=nowhere.wav", "checkpoint=FILE lable=two",
     "model=sashimi_ar_sc09 n_sample=3"],
)  # fmt: skip
def test_generate_refuses_what_no_model_could_follow_at_once(arguments, told):
    done = python("-X importtime -m rawaudio.generate", *arguments.replace("FILE", told).split())
    assert done.returncode == 2 and not imported(done.stderr) & HEAVY
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_what_a_model_can_be_told_is_no_misspelt_setting(told, tmp_path):
    out = [f"out_dir={tmp_path}/out", "page=false"]
    assert python("-m rawaudio.generate", f"checkpoint={told}", "label=two", *out).returncode == 0
    done = python("-m rawaudio.generate", f"checkpoint={told}", "lable=two", *out)
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

PLOT = """
from cauchy_kernel.benchmark import plot
row = {"seconds": 1.0, "MiB": 2.0, "gradient error": 1e-6}
plot({"naive": row, "plain": row}, "title", "cauchy_kernel.png")
"""


@pytest.mark.parametrize(
    "command, arguments, picture",
    [
        ("-m rawaudio.generate", ["checkpoint={told}", "n_samples=2", "out_dir=out"],
         "out/index.html"),
        ("train.py", ["train_csv={data}/train.csv", "valid_csv={data}/valid.csv", "max_steps=1",
                      "checkpoint_path=run", "device=cpu", *MODEL], "run/curves.png"),
        ("-m metrics", ["samples={data}/train.csv", "real_csv={data}/valid.csv", "cache_dir=none",
                        "out_dir=scores", "bins=2"], "scores/scores.html"),
        ("-m metrics.sweep", ["samples=[{sweep}/1,{sweep}/2]", "real_csv={data}/valid.csv",
                              "cache_dir=none"], "sweep.png"),
        ("-m metrics.train_classifier", ["train_csv={data}/train.csv", "valid_csv={data}/valid.csv",
                                         "epochs=1", "out=words.safetensors"], "words.png"),
        ("-c " + PLOT, [], "cauchy_kernel.png"),
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there_without_docstrings_and_in_plain_ascii(command):
    done = python(f"-OO {command}", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert f"python {command}" in done.stdout, "examples, or how it is called"


def test_names_that_the_console_has_no_letters_for_end_no_command(told, tmp_path):
    """Nor does a missing docstring: python -OO."""
    out = [f"out_dir={tmp_path / 'gesprochen-für-Ω'}", "n_samples=1", "page=false"]
    done = python(
        "-OO -m rawaudio.generate", f"checkpoint={told}", *out, PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 clips in" in done.stdout and "-?" in done.stdout


NOBODY = """
import os, pwd, runpy, sys
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown
sys.argv[0] = sys.argv.pop(1)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "module, arguments, cached",
    [
        ("metrics", "samples={data}/train.csv real_csv={data}/valid.csv bins=2 page=false", True),
        ("metrics.sweep", "samples=[{sweep}/1,{sweep}/2] real_csv={data}/valid.csv", True),
        ("train", "train_csv={data}/train.csv valid_csv={data}/valid.csv sample_len=100 "
         "checkpoint_path=run max_steps=1 n_listen=0 device=cpu {model}", True),
        ("rawaudio.generate", "checkpoint={told} n_samples=1 page=false", False),
        ("cauchy_kernel", "", False),
    ],
)  # fmt: skip
def test_users_without_a_home_folder_can_do_everything(
    module, arguments, cached, told, data, sweep, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"told": told, "data": data, "sweep": sweep, "model": " ".join(MODEL)}
    gone = {"HOME": None, "XDG_CACHE_HOME": None, "TORCH_EXTENSIONS_DIR": None, "USER": "nobody"}
    done = python(f"-c {NOBODY}", module, *arguments.format(**places).split(), **gone)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("there is no home folder: caches are in") == cached
    assert not list(tmp_path.glob("~*")), "a folder called ~"


# ---- how they end ---------------------------------------------------------------------------


def raising(error: BaseException):
    def body():
        raise error

    return body


@pytest.mark.parametrize(
    "error, status, said",
    [
        (UserError("x=1: must be 2"), 2, "error: x=1: must be 2"),
        (AudioError("a.wav", "empty", "0 bytes", "remove it"), 2,
         "error: a.wav: empty (0 bytes); remove it"),
        (CheckpointError("w.pt: no such file"), 2, "error: w.pt: no such file"),
        (DemandError("SASHIMI_KERNEL='x': must be torch"), 2, "error: SASHIMI_KERNEL='x': must"),
        (FileNotFoundError(2, "No such file or directory", "a.csv"), 2,
         "error: a.csv: No such file or directory"),
        (OSError(errno.EIO, "Input/output error", "a.csv"), 1, "error: a.csv: Input/output error"),
        (OSError(errno.ENOSPC, "No space left on device"), 1,
         "error: No space left on device (ENOSPC): make room; kept"),
        (KeyboardInterrupt(), 130, "interrupted; kept"),
        (MemoryError(), 1, "error: this does not fit into memory: take less"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1,
         "error: this does not fit into memory: take less"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line_and_a_status(error, status, said, capsys):
    ended = command.run(raising(error), kept=lambda: "; kept", smaller="take less")
    printed = capsys.readouterr()
    assert ended == status and printed.out == ""
    assert printed.err.startswith(said) and printed.err.count("\n") == 1


def test_memory_that_the_cpu_has_not_is_recognised(capsys):
    assert command.run(lambda: torch.empty(2**60), smaller="take less") == 1
    assert capsys.readouterr().err == "error: this does not fit into memory: take less\n"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("not enough values to unpack (expected 2, got 1)"),
        KeyError("label"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    ],
)
def test_mistakes_of_ours_keep_their_traceback(error):
    with pytest.raises(type(error)) as raised:
        command.run(raising(error))
    assert raised.value is error
