"""Read the published SC09 classifier, a pickled model, without executing any of the pickle.

    tensors = read_resnext("resnext.pth")         # name -> tensor

A pickle is a program for a stack machine that may call anything importable. Here the program is
walked by a machine of our own that imports and calls nothing: names stay names, and of the calls
it only knows those that put a tensor, a dict or a module together; everything else is refused.

Understood are files of `torch.save(model)`, bare or in nn.DataParallel, and of its state dict, in
both containers: the zip archive (torch >= 1.6) and the row of pickles before it.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rawaudio.files import CheckpointError, printable

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older container

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
}

# Names that a pickled ResNeXt has a reason to hold.
KNOWN = re.compile(
    r"collections OrderedDict|(__builtin__|builtins) set"
    r"|torch (\w+Storage|device)"
    r"|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch\.nn\.parallel\.data_parallel DataParallel"
    r"|torch\.nn\.modules\.(conv Conv2d|batchnorm BatchNorm2d|container Sequential|linear Linear)"
    r"|([\w.]+\.)?resnext (CifarResNeXt|ResNeXtBottleneck)"
)


class Refused(Exception):
    """The pickle wants something that a stored ResNeXt does not."""


class Name(NamedTuple):
    """A global that was named; nothing has been imported."""

    module: str
    name: str


class Storage(NamedTuple):
    """Bytes that a tensor is a view of, by their key in the file."""

    dtype: torch.dtype
    key: str
    size: int


class View(NamedTuple):
    """A tensor: where it lies in its storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Module(dict):
    """A module: its attributes, among them _parameters, _buffers and _modules."""


# ---- files ----------------------------------------------------------------------------------


def read_resnext(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a pickled ResNeXt by name, as in its state dict without a leading "module.".

    Raises CheckpointError for a file that is damaged, or is or holds anything else.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        root, read = _from_zip(data) if data[:2] == b"PK" else _from_legacy(data)
        views = _state(root)
        if sum(math.prod(v.shape) * v.storage.dtype.itemsize for v in views.values()) > len(data):
            raise Refused("its tensors are views of much less data")
        content = {k: read(k) for k in {view.storage.key for view in views.values()}}
        return {k: _tensor(view, content[view.storage.key]) for k, view in views.items()}
    except Refused as error:
        reason = f"refused: {printable(str(error))}"
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # a damaged program can trip over anything
        reason = printable(f"{type(error).__name__}: {error}")
        reason = f"damaged, or no file of torch.save ({reason})"
    raise CheckpointError(
        f"{path}: {reason}; expected the published classifier resnext.pth. Other classifiers: "
        "python -m metrics.train_classifier"
    )


def _from_zip(data: bytes) -> tuple[Any, Callable[[str], bytes]]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise Refused("it is compressed, as torch.save never does")
    if sum(info.file_size for info in archive.infolist()) > len(data):
        raise Refused("its parts overlap")
    inside = {name.partition("/")[2]: name for name in archive.namelist()}
    if "data.pkl" not in inside:
        raise Refused("a zip archive without data.pkl")
    if "byteorder" in inside and archive.read(inside["byteorder"]) != b"little":
        raise Refused("it was written on a big-endian machine")
    root = run(io.BytesIO(archive.read(inside["data.pkl"])))
    return root, lambda key: archive.read(inside[f"data/{key}"])


def _from_legacy(data: bytes) -> tuple[Any, Callable[[str], bytes]]:
    file = io.BytesIO(data)
    if run(file) != LEGACY_MAGIC:
        raise ValueError("it does not start as a file of torch.save")
    run(file)  # version of the container
    if run(file).get("little_endian") is not True:
        raise Refused("it was written on a big-endian machine")
    storages: dict[str, Storage] = {}
    root = run(file, storages)
    content = {}
    for key in run(file):  # each: how many elements (int64), then they
        if not isinstance(key, str):
            raise ValueError("a storage without a name")
        size = int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize
        content[key] = file.read(size)
    return root, lambda key: content[key]


# ---- the machine ----------------------------------------------------------------------------


def run(file: io.BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """The object that one pickle describes, made of dicts, lists, Names, Views and Modules.

    file: left after the pickle's end. storages: gets every storage that is met, by key. Raises
    Refused for a name or a call that is not known, other exceptions for a damaged pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "POP":
                stack.pop()
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT"
                | "BINUNICODE" | "SHORT_BINUNICODE"
            ):  # fmt: skip
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                key, value = stack.pop(-2), stack.pop()
                stack[-1].update(_entries([key, value]))
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(_entries(items))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(argument))
            case "STACK_GLOBAL":
                parts = stack.pop(-2), stack.pop()
                stack.append(_name(" ".join(parts)))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Module) and isinstance(state, dict):
                    stack[-1].update(state)
                elif type(stack[-1]) is not dict:  # a state dict's remarks are not needed
                    raise Refused(f"it sets the state of a {type(stack[-1]).__name__}")
            case "BINPERSID":
                stack.append(_persistent(stack.pop(), storages))
            case _:
                raise Refused(f"it uses {opcode.name}, which torch.save does not")
    raise ValueError("the pickle has no end")


def _entries(items: list[Any]) -> dict[str | int, Any]:
    # Other keys are not needed, and a nested tuple may take forever to hash.
    if not all(type(key) in (str, int) for key in items[::2]):
        raise Refused("it holds a dict with keys that are no names")
    return dict(zip(items[::2], items[1::2], strict=True))


def _name(text: str) -> Name:
    if not KNOWN.fullmatch(text):
        raise Refused(f"it names {text.replace(' ', '.')}, which no stored ResNeXt needs")
    return Name(*text.split(" "))


def _call(what: Any, arguments: Any) -> Any:
    """What a call of this name with these arguments would give, put together by hand."""
    match what, arguments:
        case Name("torch._utils", "_rebuild_tensor_v2"), (Storage() as storage, *place):
            return _view(storage, *place[:3])
        case Name("torch._utils", "_rebuild_parameter"), (View() as view, *_):
            return view
        case Name("collections", "OrderedDict"), ():
            return {}
        case Name(_, "set"), (list() as items,):
            return list(items)
        case Name("torch", "device"), _:
            return None
        case Name(module, _), () if module.startswith("torch.nn.") or module.endswith("resnext"):
            return Module()
    called = ".".join(what) if isinstance(what, Name) else f"a {type(what).__name__}"
    raise Refused(f"it calls {called} in a way that no stored ResNeXt does")


def _view(storage: Storage, offset: int, shape: tuple, stride: tuple) -> View:
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor without a proper place")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if math.prod(shape) > storage.size or (0 not in shape and last >= storage.size):
        raise ValueError(f"a tensor of shape {shape} in a storage of {storage.size} elements")
    return View(storage, offset, tuple(shape), tuple(stride))


def _persistent(what: Any, storages: dict[str, Storage] | None) -> Any:
    """A storage, or (older container) a class beside which its source is kept."""
    match what:
        case ("module", Name() as name, *_):
            return name
        case ("storage", Name("torch", kind), str(key), _, int(size), *rest) if kind in DTYPES:
            if any(part is not None for part in rest):
                raise Refused("it holds a view of a storage")
            storage = Storage(DTYPES[kind], key, size)
            if storages is not None:
                storages[key] = storage
            return storage
    raise Refused("it refers to something that is no storage")


# ---- tensors --------------------------------------------------------------------------------


def _state(root: Any) -> dict[str, View]:
    """name -> tensor of a model or a state dict, without DataParallel's "module."."""
    views: dict[str, View] = {}
    seen = set()

    def visit(module: Any, prefix: str) -> None:
        if not isinstance(module, Module) or id(module) in seen or len(seen) > 1000:
            raise Refused("its modules are no tree")
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
        raise Refused("it holds no model")
    return {k.removeprefix("module."): v for k, v in views.items()}


def _tensor(view: View, content: bytes) -> Tensor:
    storage = view.storage
    if len(content) != storage.size * storage.dtype.itemsize:
        raise ValueError(f"storage {storage.key} has {len(content)} bytes")
    if not content:
        return torch.zeros(view.shape, dtype=storage.dtype)
    flat = torch.frombuffer(bytearray(content), dtype=storage.dtype)
    return flat.as_strided(view.shape, view.stride, view.offset).clone()
