"""Read the published SC09 classifier, a pickled model, without executing any of the pickle.

    tensors = read_resnext("resnext.pth")         # name -> tensor

A pickle may call anything importable. Here names are not imported: the few that a stored ResNeXt
needs stand for parts of this module, all others are refused.

Files of `torch.save(model)` are read, bare or in nn.DataParallel, and of its state dict, in both
containers: the zip archive (torch >= 1.6) and the row of pickles before it.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rawaudio.files import CheckpointError, check_archive, printable

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older container
DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
}
MODULES = re.compile(
    r"torch\.nn\.parallel\.data_parallel\.DataParallel"
    r"|torch\.nn\.modules\.(conv\.Conv2d|batchnorm\.BatchNorm2d|container\.Sequential"
    r"|linear\.Linear)"
    r"|([\w.]+\.)?resnext\.(CifarResNeXt|ResNeXtBottleneck)"
)


class Storage(NamedTuple):
    """Numbers that tensors are views of, by their key in the file."""

    key: str
    dtype: torch.dtype
    size: int  # elements


class View(NamedTuple):
    """A tensor: where it lies in its storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Module(dict):
    """A module: its attributes, among them _parameters, _buffers and _modules."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


class _Unpickler(pickle.Unpickler):
    """Makes Modules, dicts and Views; raises UnpicklingError for any other name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        # Classes and functions are new ones each time: a pickle can change their attributes.
        full = f"{module}.{name}"
        if MODULES.fullmatch(full):
            return type(name, (Module,), {})
        if full in DTYPES:
            return DTYPES[full]
        match full:
            case "collections.OrderedDict":
                return OrderedDict
            case "builtins.set" | "__builtin__.set":
                return set
            case "torch.device":
                return lambda *place: None
            case "torch._utils._rebuild_parameter":
                return lambda view, *rest: view
            case "torch._utils._rebuild_tensor_v2":
                return lambda storage, offset, shape, stride, *rest: View(
                    storage, offset, shape, stride
                )
        raise pickle.UnpicklingError(f"it names {full}, which no stored ResNeXt needs")

    def persistent_load(self, identity: Any) -> Any:
        match identity:
            case ("module", type() as cls, *_):  # with the source of the class
                return cls
            case ("storage", torch.dtype() as dtype, str(key), _, int(size), *views):
                if any(view is not None for view in views):
                    raise pickle.UnpicklingError("it holds a view of a storage")
                self.storages[key] = Storage(key, dtype, size)
                return self.storages[key]
        raise pickle.UnpicklingError("it refers to something that is no storage")


def read_resnext(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a pickled ResNeXt by name, as in its state dict without a leading "module.".

    Raises CheckpointError for a file that is damaged, or is or holds anything else.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        check_archive(path)
        root, content = _from_zip(data) if data[:2] == b"PK" else _from_legacy(data)
        views = _views(root)
        size = sum(math.prod(view.shape) * view.storage.dtype.itemsize for view in views.values())
        if size > len(data):
            raise pickle.UnpicklingError("its tensors are views of much less data")
        return {name: _tensor(view, content[view.storage.key]) for name, view in views.items()}
    except OSError as error:
        reason = error.strerror or str(error)
    except pickle.UnpicklingError as error:
        reason = f"refused: {printable(str(error))}"
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = f"damaged ({printable(f'{type(error).__name__}: {error}')})"
    raise CheckpointError(
        f"{path}: {reason}; expected the published classifier resnext.pth. Other classifiers: "
        "python -m metrics.train_classifier"
    )


def _from_zip(data: bytes) -> tuple[Any, Mapping[str, bytes]]:
    """The pickled object, and the bytes of its storages by key."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = {name.partition("/")[2]: name for name in archive.namelist()}
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise ValueError("it was written on a big-endian machine")
    unpickler = _Unpickler(io.BytesIO(archive.read(entries["data.pkl"])))
    root = unpickler.load()
    return root, {key: archive.read(entries[f"data/{key}"]) for key in unpickler.storages}


def _from_legacy(data: bytes) -> tuple[Any, Mapping[str, bytes]]:
    """The same of the older container."""
    file = io.BytesIO(data)
    magic, _, system = (_Unpickler(file).load() for _ in range(3))
    if magic != LEGACY_MAGIC or system.get("little_endian") is not True:
        raise ValueError("it does not start as a file of torch.save")
    unpickler = _Unpickler(file)
    root, content = unpickler.load(), {}
    for key in _Unpickler(file).load():  # each: how many elements (int64), then they
        size = int.from_bytes(file.read(8), "little") * unpickler.storages[key].dtype.itemsize
        content[key] = file.read(size)
    return root, content


def _views(root: Any) -> dict[str, View]:
    """name -> tensor of a model or a state dict, without DataParallel's "module."."""
    views: dict[str, View] = {}
    seen = set()

    def visit(module: Any, prefix: str) -> None:
        if not isinstance(module, Module) or id(module) in seen:
            raise pickle.UnpicklingError("its modules are no tree")
        seen.add(id(module))
        for kind in ("_parameters", "_buffers"):
            for name, value in module.get(kind, {}).items():
                if isinstance(value, View):
                    views[f"{prefix}{name}"] = value
        for name, child in module.get("_modules", {}).items():
            visit(child, f"{prefix}{name}.")

    if isinstance(root, Module):
        visit(root, "")
    elif isinstance(root, dict):
        state = root.get("state_dict", root)
        views = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, View)}
    if not views:
        raise pickle.UnpicklingError("it holds no model")
    return {name.removeprefix("module."): view for name, view in views.items()}


def _tensor(view: View, content: bytes) -> Tensor:
    storage = view.storage
    flat = torch.frombuffer(bytearray(content), dtype=storage.dtype, count=storage.size)
    return flat.as_strided(view.shape, view.stride, view.offset).clone()
