"""Runs of the trainer on a tiny data set, for the tests of train.py."""

import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import train

RATE = 2000
MODEL = ["model.d_model=8", "model.n_layers=1", "model.pool=[2,2]", "model.d_state=8",
         "model.l_max=200", f"model.sample_rate={RATE}", "model.clip_length=40"]  # fmt: skip
NOISY = ["model=diffwave", "model.n_mels=8", "model.hop=8", "model.n_fft=32", "ema=0.9", "peak=0.5"]
EVERYTHING = ["model.dropout=0.1", "ema=0.9", "gain_db=6", "speed=0.1", "augmented=0.8",
              "append_silence=20", "seq_len=120", "weight_decay=0.1", "warmup_steps=4",
              "grad_clip=1", "n_listen=1", "validation_interval=2", "plateau_patience=0",
              "plateau_factor=0.5"]  # fmt: skip
KIND = {"bits": [], "mse": NOISY}  # unit of the loss -> settings
EITHER = pytest.mark.parametrize("unit", KIND)
COLUMNS = {
    "label": ["one", "two", "one", "one", "two"],
    "speaker": ["eve", "ada", "ada", "bob", "eve"],
}


def tone(n, frequency, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(n) / rate)


def tones(folder, lengths, valid, **columns):
    """The folder, with tones of these lengths, train.csv, and valid.csv of these clips."""
    for i, n in enumerate(lengths):
        soundfile.write(folder / f"{i}.wav", tone(n, 100 + 20 * i), RATE)
    cells = zip(*columns.values(), strict=True)
    rows = [",".join([f"{i}.wav", *row]) for i, row in enumerate(cells)]
    for name, chosen in (("train", rows), ("valid", [rows[i] for i in valid])):
        (folder / f"{name}.csv").write_text("\n".join([",".join(["path", *columns]), *chosen]))
    return folder


def arguments(data, run, *more, model=MODEL):
    """A run of 15 quick steps; what comes in `more` overrides."""
    return [
        f"train_csv={data / 'train.csv'}",
        f"valid_csv={data / 'valid.csv'}",
        f"checkpoint_path={run}",
        "device=cpu",
        "batch_size=2",
        "max_steps=15",
        "start_lr=0.01",
        "schedule=plateau",
        "stdout_interval=5",
        "summary_interval=1",
        "validation_interval=5",
        "checkpoint_interval=5",
        "n_listen=1",
        *model,
        *more,
    ]


def tells(data, folder, run, *more, order=range(5), **columns):
    """Two steps of a model that is told labels and speakers, of these clips in that order, with
    other columns; the first two clips are for validation."""
    columns = COLUMNS | columns
    lines = [[f"{data / str(i)}.wav", *(column[i] for column in columns.values())] for i in order]
    for name, rows in (("train", lines), ("valid", lines[:2])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path", *columns], *rows])
    few = ["conditions=[label,speaker]", "n_listen=0", "max_steps=2"]
    return arguments(folder, folder / run, *few, *more)


def trained(data, run, *more):
    """The folder of such a run, when it has ended."""
    train.main(arguments(data, run, *more))
    return run


def forked(function, *arguments):
    """A process that calls this function, with all imported already."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def ended(*processes):
    """Their exit codes; a signal's number is negative."""
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def in_processes(world, argv, main=train.main):
    """What they print when that command runs in `world` processes at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def member(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        with contextlib.redirect_stdout(out):
            code = main(argv)
        out.flush()
        sys.exit(code)

    with tempfile.TemporaryFile("w+") as out:
        assert ended(*[forked(member, rank) for rank in range(world)]) == [0] * world
        out.seek(0)
        return out.read()


def copied(run, folder):
    """A copy of a run, to go on with."""
    return Path(shutil.copytree(run, folder / f"copy-of-{run.name}"))


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metrics(run, key):
    """(step, value) of every line of metrics.jsonl that has the key."""
    return [(row["step"], row[key]) for row in rows(run) if key in row]


def last_of(run, name="last.pt"):
    return torch.load(run / name, weights_only=True)


def refused(capsys, argv, *words, status=2):
    """main ends with that status and one line on stderr that says these words; returns it."""
    with pytest.raises(SystemExit) as raised:
        train.main(argv)
    said = capsys.readouterr().err.strip()
    assert raised.value.code == status and said.startswith("error: ") and "\n" not in said, said
    for word in words:
        assert word in said, said
    return said


def assert_same(a, b, path="last"):
    """Equal to the bit, but for the time that was spent."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds"}:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, path


def assert_same_runs(a, b, *keys):
    """The same last.pt and the same curves."""
    assert_same(last_of(a), last_of(b))
    for key in ("train_bits", "valid_bits", "lr", "grad_norm", *keys):
        assert metrics(a, key) == metrics(b, key), key
