"""What tests share: one CPU thread, a tiny data set, and two finished runs of the trainer on it."""

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch, here and in processes that tests start

import pytest
import torch
from training import COLUMNS, KIND, arguments, tones

import train
from rawaudio import engine, logbook, page

# A forked process replaces its parent's thread pool when it is first asked for. Two of its threads
# that ask at once may meet none, "Invalid thread pool"; so the first one asks before it has others.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))

PLAIN = [  # what would take most of a tiny run's time
    (logbook, "_curves", lambda *_: b""),
    (logbook.Logbook, "clips", lambda *_: None),
    (page, "spectrogram_figure", lambda *_: page.new_figure(1, 1)),
]
DRAWN = [(owner, name, getattr(owner, name)) for owner, name, _ in PLAIN]


@contextlib.contextmanager
def changed(attributes):
    with pytest.MonkeyPatch.context() as patch:
        for attribute in attributes:
            patch.setattr(*attribute)
        yield


@pytest.fixture(scope="session", autouse=True)
def plain_pictures():
    with changed(PLAIN):
        yield


@pytest.fixture(scope="module")
def pictures():
    """Spectrograms and curves as users see them."""
    with changed(DRAWN):
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """Quicker for models of this size; a test that wants more sets them, and the next has one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of five tones of 90 to 330 samples, with train.csv and valid.csv."""
    return tones(tmp_path_factory.mktemp("data"), range(90, 331, 60), [1, 3], **COLUMNS)


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory):
    """Unit of the loss -> folder of a finished run; what it printed is beside it."""
    folders = {unit: tmp_path_factory.mktemp("runs") / "new" / unit for unit in KIND}
    with changed(DRAWN):
        for unit, folder in folders.items():
            folder.parent.mkdir()
            with open(folder.with_suffix(".txt"), "w") as out, contextlib.redirect_stdout(out):
                train.main(arguments(data, folder, *KIND[unit]))
    return folders


@pytest.fixture
def fresh():
    """Forgets compiled steps and what was packed for them, before, when called, and after."""

    def forget():
        engine.library.cache_clear()
        engine._cache.clear()

    forget()
    yield forget
    forget()
