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
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from rawaudio.errors import CheckpointError, printable

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older container
OPCODES = (
    "PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT TUPLE1 TUPLE2 TUPLE3 TUPLE "
    "APPEND APPENDS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE "
    "NEWOBJ BINPERSID"
)
MODULES = re.compile(
    r"torch\.nn\.parallel\.data_parallel\.DataParallel"
    r"|torch\.nn\.modules\.(conv\.Conv2d|batchnorm\.BatchNorm2d|container\.Sequential"
    r"|linear\.Linear)"
    r"|([\w.]+\.)?resnext\.(CifarResNeXt|ResNeXtBottleneck)"
)


@dataclass
class Storage:
    """Numbers that tensors are views of, by their key in the file."""

    key: str
    dtype: torch.dtype
    size: int  # elements


@dataclass
class View:
    """A tensor: where it lies in its storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Table(dict):
    """An OrderedDict, without its attributes."""

    def __init__(self) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        pass


class Module(Table):
    """A module: its attributes, among them _parameters, _buffers and _modules."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


NAMES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch._utils._rebuild_tensor_v2": lambda *view: View(*view[:4]),
    "torch._utils._rebuild_parameter": lambda view, *rest: view,
    "torch.device": lambda *place: None,
    "collections.OrderedDict": Table,
    "builtins.set": list,
    "__builtin__.set": list,
}


class _Unpickler(pickle._Unpickler):
    """Makes Modules, Tables and Views; raises UnpicklingError for any other name.

    It is the one written in Python, without the opcodes that torch.save does not write.
    """

    dispatch = {
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in (getattr(pickle, name) for name in OPCODES.split())
    }

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def load_setitems(self) -> None:
        self._update(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _update(self, items: list[Any]) -> None:
        # Other keys are not needed, and a tuple of tuples of tuples may take forever to hash.
        if not all(type(key) in (str, int) for key in items[::2]):
            raise UnpicklingError("it holds a dict with keys that are no names")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Table) or type(state) is not dict:
            raise UnpicklingError("it sets the state of what has none")
        self.stack[-1].__setstate__(state)

    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if MODULES.fullmatch(full):
            return Module
        if full not in NAMES:
            raise UnpicklingError(f"it names {full}, which no stored ResNeXt needs")
        return NAMES[full]

    def persistent_load(self, identity: Any) -> Any:
        match identity:
            case ("module", type() as cls, *_):  # with the source of the class
                return cls
            case ("storage", torch.dtype() as dtype, str(key), _, int(size), *views):
                if any(view is not None for view in views):
                    raise UnpicklingError("it holds a view of a storage")
                self.storages[key] = Storage(key, dtype, size)
                return self.storages[key]
        raise UnpicklingError("it refers to something that is no storage")


def read_resnext(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a pickled ResNeXt by name, as in its state dict without a leading "module.".

    Raises CheckpointError for a file that is damaged, or is or holds anything else.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        root, content = _from_zip(data) if data[:2] == b"PK" else _from_legacy(data)
        views = _views(root)
        size = sum(math.prod(view.shape) * view.storage.dtype.itemsize for view in views.values())
        if size > len(data):
            raise UnpicklingError("its tensors are views of much less data")
        return {name: _tensor(view, content[view.storage.key]) for name, view in views.items()}
    except OSError as error:
        reason = error.strerror or str(error)
    except UnpicklingError as error:
        reason = f"refused: {printable(str(error))}"
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = f"damaged ({printable(f'{type(error).__name__}: {error}')})"
    raise CheckpointError(
        f"{path}: {reason}; expected the published classifier resnext.pth. Other classifiers: "
        "python -m metrics.train_classifier"
    )


def _from_zip(data: bytes) -> tuple[Any, dict[str, bytes]]:
    """The pickled object, and the bytes of its storages by key."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    files = archive.infolist()
    if any(file.compress_type != zipfile.ZIP_STORED for file in files):
        raise UnpicklingError("it is compressed, as torch.save never does")
    if sum(file.file_size for file in files) > len(data):
        raise UnpicklingError("its parts overlap")
    entries = {name.partition("/")[2]: name for name in archive.namelist()}
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise ValueError("it was written on a big-endian machine")
    unpickler = _Unpickler(io.BytesIO(archive.read(entries["data.pkl"])))
    root = unpickler.load()
    return root, {key: archive.read(entries[f"data/{key}"]) for key in unpickler.storages}


def _from_legacy(data: bytes) -> tuple[Any, dict[str, bytes]]:
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
            raise UnpicklingError("its modules are no tree")
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
        raise UnpicklingError("it holds no model")
    return {name.removeprefix("module."): view for name, view in views.items()}


def _tensor(view: View, content: bytes) -> Tensor:
    storage = view.storage
    flat = torch.frombuffer(bytearray(content), dtype=storage.dtype, count=storage.size)
    return flat.as_strided(view.shape, view.stride, view.offset).clone()
