"""What tests share: one CPU thread, a tiny data set, and two finished runs of the trainer on it."""

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch, here and in processes that tests start

import pytest
import soundfile
import torch
from training import COLUMNS, KIND, RATE, arguments, tone

import train
from rawaudio import logbook

DRAWN = logbook._curves, logbook.Logbook.clips
UNDRAWN = (lambda *_: b""), (lambda *_: None)


def pictures(functions):
    logbook._curves, logbook.Logbook.clips = functions


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """They take most of a tiny run's time: only the runs below have them."""
    pictures(UNDRAWN)


@pytest.fixture(autouse=True)
def one_thread():
    """Quicker for models of this size; a test that wants more sets them, and the next has one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of five tones of 90 to 330 samples, with train.csv and valid.csv."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(5):
        soundfile.write(folder / f"{i}.wav", tone(90 + 60 * i, 100 + 20 * i), RATE)
    cells = zip(*COLUMNS.values(), strict=True)
    rows = [",".join([f"{i}.wav", *row]) for i, row in enumerate(cells)]
    for name, chosen in (("train", rows), ("valid", [rows[1], rows[3]])):
        (folder / f"{name}.csv").write_text("\n".join([",".join(["path", *COLUMNS]), *chosen]))
    return folder


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory):
    """Unit of the loss -> folder of a finished run; what it printed is beside it."""
    folders = {unit: tmp_path_factory.mktemp("runs") / "new" / unit for unit in KIND}
    pictures(DRAWN)
    for unit, folder in folders.items():
        folder.parent.mkdir()
        with open(folder.with_suffix(".txt"), "w") as out, contextlib.redirect_stdout(out):
            train.main(arguments(data, folder, *KIND[unit]))
    pictures(UNDRAWN)
    return folders
