"""A tiny data set and runs of the trainer on it, for the tests of train.py."""

import json

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
EVERYTHING = ["model.dropout=0.1", "ema=0.9", "gain_db=6", "speed=0.1", "append_silence=20",
              "seq_len=120", "weight_decay=0.1", "warmup_steps=4", "grad_clip=1", "n_listen=1",
              "validation_interval=2", "plateau_patience=0", "plateau_factor=0.5"]  # fmt: skip


def tone(n, frequency, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(n) / rate)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of five tones of 90 to 330 samples, with train.csv and valid.csv."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(5):
        soundfile.write(folder / f"{i}.wav", tone(90 + 60 * i, 100 + 20 * i), RATE)
    (folder / "train.csv").write_text("path\n" + "".join(f"{i}.wav\n" for i in range(5)))
    (folder / "valid.csv").write_text("path\n1.wav\n3.wav\n")
    return folder


def arguments(data, run, *more):
    """A run of 15 quick steps; what comes in `more` overrides."""
    return [
        f"train_csv={data / 'train.csv'}", f"valid_csv={data / 'valid.csv'}",
        f"checkpoint_path={run}", "device=cpu", "batch_size=2", "max_steps=15", "start_lr=0.01",
        "schedule=plateau", "stdout_interval=5", "summary_interval=1", "validation_interval=5",
        "checkpoint_interval=5", "n_listen=1", *MODEL, *more,
    ]  # fmt: skip


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metrics(run, key):
    """(step, value) of every line of metrics.jsonl that has the key."""
    return [(row["step"], row[key]) for row in rows(run) if key in row]


def last_of(run):
    return torch.load(run / "last.pt", weights_only=True)


def refused(capsys, argv, *words, status=2):
    """main ends with that status and one line on stderr that says these words; returns it."""
    with pytest.raises(SystemExit) as ended:
        train.main(argv)
    said = capsys.readouterr().err.strip()
    assert ended.value.code == status and said.startswith("error: ") and "\n" not in said, said
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
