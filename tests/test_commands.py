"""What all commands have in common."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import status
from models import make
from training import MODEL, tones

from cauchy_kernel.build import DemandError
from rawaudio import command
from rawaudio.audio import AudioError
from rawaudio.checkpoint import save_checkpoint
from rawaudio.errors import CheckpointError, UserError

ROOT = Path(__file__).parents[1]
COMMANDS = {  # module -> what is misspelt
    "train": "bach_size=4",
    "split_data": "--rot_path=x",
    "rawaudio.generate": "n_sample=3",
    "rawaudio.likelihood": "batchsize=3",
    "rawaudio.benchmark": "row=[plain]",
    "rawaudio.publish": "nam=x",
    "rawaudio.live": "modle=x",
    "metrics.__main__": "sample=generated",
    "metrics.sweep": "sample=[a,b]",
    "metrics.floors": "samplerate=8000",
    "metrics.latents": "epsilons=0.1",
    "rawaudio.interpolate": "out-dir=x",
    "metrics.train_classifier": "epoch=3",
    "metrics.study.__main__": "selct",
    "cauchy_kernel.__main__": "--hep",
    "cauchy_kernel.benchmark": "--lenth=3",
}
BARE = ["train", "rawaudio.likelihood", "rawaudio.publish", "metrics.sweep", "metrics.floors",
        "metrics.train_classifier"]  # fmt: skip


def called(module: str) -> str:
    """How one starts it."""
    script = module in ("train", "split_data")
    return f"python {module}.py" if script else f"python -m {module.removesuffix('.__main__')}"


@pytest.mark.parametrize("module", COMMANDS)
def test_help_says_how_a_command_is_called_and_slips_of_the_fingers_are_told(module, capsys):
    main = importlib.import_module(module).main
    assert status(main, ["--help"]) == 0
    assert called(module) in capsys.readouterr().out
    assert status(main, [COMMANDS[module]]) == 2
    printed = capsys.readouterr()
    assert "error: " in printed.err and not printed.out


@pytest.mark.parametrize("module", BARE)
def test_a_bare_command_is_answered_with_one_to_copy(module, capsys):
    assert status(importlib.import_module(module).main, []) == 2
    error = capsys.readouterr().err.strip()
    names, _, example = error.removeprefix("error: ").partition(": required, as in: ")
    assert "\n" not in error and example.startswith(called(module))
    assert all(f" {name}=" in example for name in names.split(", "))


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> str:
    """Weights of a tiny model that can be told things."""
    path = tmp_path_factory.mktemp("told") / "told.safetensors"
    save_checkpoint(path, make(told=True))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of tones that say one or two, with train.csv and valid.csv."""
    folder = tmp_path_factory.mktemp("data")
    return tones(folder, range(300, 360, 10), range(4), label=["one", "two"] * 3)


HOMELESS = """
import io, os, pwd, runpy, sys
from pathlib import Path

def unknown(uid): raise KeyError(uid)

pwd.getpwuid = unknown
import cauchy_kernel.benchmark, cauchy_kernel.native, rawaudio.engine, sashimi.realtime
built = cauchy_kernel.native.backend, rawaudio.engine.library
assert not any(library.cache_info().currsize for library in built), "an import builds"
for folder, line in zip(sys.argv[1::2], sys.argv[2::2]):
    os.makedirs(folder)
    os.chdir(folder)
    sys.argv[:] = line.split()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, (line, end.code)

row = {"seconds": 1.0, "MiB": 2.0, "gradient error": 1e-6}  # its benchmark would be slow
cauchy_kernel.benchmark.plot({"naive": row, "plain": row}, "t", "cauchy_kernel.png")
"""
# As Jupyter sets it for what it starts, whose Python may lack that backend; an old terminal.
ENVIRONMENT = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "USER": "nobody",
               "PYTHONIOENCODING": "ascii", "COLUMNS": "100"}  # fmt: skip
LINES = {  # what is run -> a picture that it draws
    "rawaudio.generate checkpoint={told} n_samples=2 out_dir=für-Ω": "für-Ω/index.html",
    "train train_csv={data}/train.csv valid_csv={data}/valid.csv sample_len=100 "
    "checkpoint_path=run max_steps=1 device=cpu {model}": "run/curves.png",
    "metrics samples={data}/train.csv real_csv={data}/valid.csv bins=2 "
    "out_dir=scores": "scores/scores.html",
    "metrics.train_classifier train_csv={data}/train.csv valid_csv={data}/valid.csv epochs=1 "
    "sample_rate=2000 out=words.safetensors": "words.png",
    "cauchy_kernel": "cauchy_kernel.png",
}


def test_commands_need_no_home_docstrings_letters_but_ascii_or_notebook(told, data, tmp_path):
    """And importing them compiles nothing. All in one new interpreter, each in its folder."""
    variables = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    lines = [line.format(told=told, data=data, model=" ".join(MODEL)) for line in LINES]
    folders = [tmp_path / str(i) for i in range(len(lines))]
    done = subprocess.run(
        [sys.executable, "-OO", "-c", HOMELESS, *sum(zip(folders, lines, strict=True), ())],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env=variables | ENVIRONMENT | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("there is no home folder: caches are in") == 1
    assert not list(tmp_path.rglob("~*")), "a folder called ~"
    assert all((folders[i] / x).stat().st_size > 1000 for i, x in enumerate(LINES.values()))
    assert "2 clips in f?r-?" in done.stdout


def raising(error: BaseException):
    def body():
        raise error

    return body


MEMORY = "this does not fit into memory: take less"


@pytest.mark.parametrize(
    "error, status, message",
    [
        (UserError("x=1: must be 2"), 2, "x=1: must be 2"),
        (UserError(f"x=[{'1,' * 300}1]: \n"), 2, f"x=[{'1,' * 19}1 ... {'1,' * 19}1]:\n"),
        (UserError("x" * 9999), 2, f"{'x' * 1000} ... {'x' * 1000}\n"),
        (AudioError("a.wav", "empty", "0 bytes", "cut it"), 2, "a.wav: empty (0 bytes); cut it"),
        (CheckpointError("w.pt: no such file"), 2, "w.pt: no such file"),
        (DemandError("SASHIMI_KERNEL='x': must be torch"), 2, "SASHIMI_KERNEL='x': must"),
        (FileNotFoundError(2, "No such file", "a.csv"), 2, "a.csv: No such file"),
        (OSError(errno.EIO, "Input/output error", "a.csv"), 1, "a.csv: Input/output error"),
        (OSError(errno.ENOSPC, "No space"), 1, "No space (ENOSPC): make room; kept"),
        (KeyboardInterrupt(), 130, "interrupted; kept"),
        (MemoryError(), 1, MEMORY),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, MEMORY),
        (None, 1, MEMORY),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_a_status(error, status, message, capsys):
    body = raising(error) if error else lambda: torch.empty(2**60)
    assert command.run(body, kept=lambda: "; kept", smaller="take less") == status
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.removeprefix("error: ").startswith(message)


def test_mistakes_of_ours_keep_their_traceback():
    for error in (ValueError("not enough values to unpack"), KeyError("label"), RuntimeError()):
        with pytest.raises(type(error)) as raised:
            command.run(raising(error))
        assert raised.value is error
