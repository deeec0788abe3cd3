"""Files that are there whole or not at all; among them weights, as .safetensors and .pt.

The header of a .safetensors file of ours names its format and version, and holds whatever a user
of the weights needs to know, as JSON. Files come from anyone: reading one takes time and memory by
its size, not by what it claims; executes nothing; and ends in tensors or a CheckpointError.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from rawaudio.errors import CheckpointError, plainly, printable

FORMAT = "simple-sashimi"  # of weights of models, in the metadata
VERSION = 1  # of that; raised when names or meanings change

MAX_HEADER = 1 << 22  # bytes of JSON before the tensors, or of the pickle that names them
MAX_UNFOLDED = 1 << 26  # bytes of a pickle if it held anew what it refers to
MAX_CONFIG, MAX_VALUE = 20_000, 2000  # bytes of JSON: of all settings; of a condition's value

SHORT_TUPLES = ("TUPLE1", "TUPLE2", "TUPLE3")
SAFE = re.compile(  # names that torch makes tensors of, with no more memory than the file takes
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) set|torch\.nn\.parameter Parameter"
    r"|torch (Size|device|bool|b?float\d+|u?int\d+)|torch(\.cuda|\.storage)? (?!Q)\w+Storage"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
)
EXECUTED = "it holds Python objects that would have to be executed, which is never done"


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key of names, by the value of the numbers in them: 2.wav before 10.wav."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


# ---- writing --------------------------------------------------------------------------------


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Replace the file by `content`, all or nothing, also when the machine stops half-way.

    Directories are made. Raises OSError, which names the file, if it cannot be written; the old
    file is then whole.
    """
    path = Path(path)
    if path.is_dir():  # the current one, too, which "" stands for
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same disk: replace is atomic
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        if not error.errno:  # a sentence of its own
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_atomically` of UTF-8 text."""
    write_atomically(path, text.encode())


def write_safetensors(
    path: Path,
    model: nn.Module,
    format: str,
    version: int,
    metadata: dict[str, Any],
    dtypes: dict[str, torch.dtype] | None = None,
) -> None:
    """Write the model's state, all or nothing; metadata: text, numbers, lists, dicts of these.

    dtypes: of the tensors that are not stored in their own.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    tensors |= {k: tensors[k].to(dtype) for k, dtype in (dtypes or {}).items()}
    header = metadata | {"version": version}
    header = {k: json.dumps(v, ensure_ascii=False) for k, v in header.items()}
    write_atomically(path, safetensors_bytes(tensors, metadata=header | {"format": format}))


# ---- reading --------------------------------------------------------------------------------


def read_safetensors(
    path: Path, format: str, version: int, with_tensors: bool = True, plain: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of that format; CheckpointError for any other.

    plain: files of no format are read too, without metadata.
    """
    try:
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER:
                raise CheckpointError(f"{path}: not a .safetensors file, or with too long a header")
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
            plain = plain and raw.get("format") in (None, "pt", "np", "tf")
            if raw.get("format") != format and not plain:
                theirs = printable(raw.get("format", "another program's"))
                raise CheckpointError(f"{path}: no {format} metadata; these are {theirs} weights")
            tensors = {k: file.get_tensor(k) for k in file.keys()} if with_tensors else {}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        reason = f"not a whole .safetensors file ({printable(str(error))})"
        raise CheckpointError(f"{path}: {reason}") from None
    if plain:
        return tensors, {}
    try:
        metadata = {k: v if k == "format" else json.loads(v) for k, v in raw.items()}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({plainly(error)})") from None
    theirs = metadata.get("version")
    if theirs != version:
        theirs = printable(repr(theirs)) if isinstance(theirs, int | float | str) else "unknown"
        raise CheckpointError(
            f"{path}: format version {theirs}, this library reads {version}; "
            "use the version of simple-sashimi that wrote it, or a newer one"
        )
    return tensors, metadata


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What `save_checkpoint` wrote beside the weights; raises CheckpointError."""
    return read_safetensors(Path(path), FORMAT, VERSION, with_tensors=False)[1]


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of numbers in a file of numpy.savez; CheckpointError for any other."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in stored_entries(archive, path):
                content = io.BytesIO(archive.read(entry))
                version = np.lib.format.read_magic(content)
                header = "read_array_header_1_0" if version == (1, 0) else "read_array_header_2_0"
                shape, by_columns, dtype = getattr(np.lib.format, header)(content)
                if dtype.kind in "fiu":  # others may be objects, which would have to be executed
                    numbers = np.frombuffer(content.getbuffer(), dtype, offset=content.tell())
                    array = numbers.reshape(shape, order="F" if by_columns else "C")
                    arrays[entry.filename.removesuffix(".npy")] = torch.from_numpy(array.copy())
        return arrays
    except Exception as error:  # zipfile and numpy raise nearly anything
        reason = printable(str(error) or type(error).__name__)
        raise CheckpointError(f"{path}: not a whole .npz file of numpy.savez ({reason})") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def read_pt(path: Path) -> dict[Any, Any]:
    """The dict in a file of torch.save, without executing anything; CheckpointError for others."""
    try:
        with open(path, "rb") as file:
            if file.read(1) not in (b"P", b"\x80"):  # a zip archive, or a bare pickle
                raise ValueError("neither .safetensors nor written by torch.save")
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        # Other programs store (1, M) expanded to (H, M), three of the tensors of an S4 layer.
        if sum(x.nbytes for x in _tensors(content)) > 4 * path.stat().st_size + 2**20:
            raise ValueError("its tensors are views of much less data")
        return content
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # torch raises a dozen kinds for damaged files
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            reason = EXECUTED  # never torch's own words, which advise to execute it
        raise CheckpointError(f"{path}: not a readable checkpoint ({printable(reason)})") from None


def stored_entries(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """The parts of an archive of torch; ValueError where they unpack to more than the file is."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its parts overlap")
    return entries


def _check_archive(path: Path) -> None:
    """ValueError for a file of torch.save that unpacks to far more than it is."""
    if not zipfile.is_zipfile(path):  # before torch 1.6: five pickles, then the numbers
        with open(path, "rb") as file:
            for _ in range(5):
                _check_pickle(file)
        return
    with zipfile.ZipFile(path) as archive:
        for entry in stored_entries(archive, path):
            if entry.filename.endswith("data.pkl"):
                if entry.file_size > MAX_HEADER:
                    raise ValueError("it names too many tensors")
                _check_pickle(io.BytesIO(archive.read(entry)))


def _check_pickle(file: BinaryIO) -> None:
    """ValueError for names that are not SAFE, and for references without end; no object is made.

    By references, a hundred bytes are a pair of pairs of pairs ...: to hash it, or to show it in a
    message, takes forever. Those to text, numbers, names and short tuples of these are harmless.
    """
    memo: dict[int, bool] = {}  # whether it is harmless
    harmless, values, references = False, 0, 0  # the last object; how many values before it
    for opcode, argument, _ in pickletools.genops(file):
        kind = opcode.name
        if kind.endswith("GLOBAL") and not SAFE.fullmatch(str(argument)):
            raise ValueError(EXECUTED)
        if kind.endswith("PUT"):
            memo[argument] = harmless
        elif kind.endswith("GET"):
            references += not memo[argument]
            harmless, values = False, 0
        else:
            is_value = argument is not None and opcode.stack_after and not opcode.stack_before
            harmless = is_value or (kind in SHORT_TUPLES and values >= int(kind[-1]))
            values = values + 1 if is_value else 0
    if file.tell() << references > MAX_UNFOLDED:  # each may double what there is
        raise ValueError("it holds tuples in tuples in tuples ...")


def _tensors(content: Any) -> Iterator[Tensor]:
    """Those in nested containers, each container once."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


# ---- what was read --------------------------------------------------------------------------


def check_settings(path: Path, settings: Any, tensors: dict[str, Any] | None = None) -> None:
    """CheckpointError for a config, as read from a file, that takes long to understand.

    tensors: the file's; for every value of a condition they hold an embedding.
    """
    tables = [x for name, x in (tensors or {}).items() if str(name).startswith("told.tables.")]
    values = sum(len(x) for x in tables if isinstance(x, Tensor) and x.dim() == 2)
    try:
        if not isinstance(settings, dict):
            raise ValueError("it is missing, or no group")
        text = json.dumps(settings, ensure_ascii=False, allow_nan=False)
        if len(text) > MAX_CONFIG + MAX_VALUE * values:
            raise ValueError("it is too large")
        parts: list[Any] = []
        for value in settings.values():
            parts += value.values() if isinstance(value, dict) else [value]
        lists = [part if isinstance(part, list | tuple) else [part] for part in parts]
        if any(isinstance(item, dict | list | tuple) for items in lists for item in items):
            raise ValueError("it holds groups in groups, or lists in lists")
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its config is not understood: {plainly(error)}") from None


def fill(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the (meta) model its weights, in float32.

    Raises CheckpointError for tensors that are missing, too many, of another shape or kind, or not
    finite.
    """
    wanted, own = model.state_dict(), {}
    for what, keys in [("lacks", wanted.keys() - tensors), ("has extra", tensors.keys() - wanted)]:
        if keys:
            some = ", ".join(printable(key, 80) for key in sorted(map(str, keys))[:3])
            some += " ..." if len(keys) > 3 else ""
            raise CheckpointError(f"{path}: {what} {len(keys)} tensors ({some}) for its config")
    for key, shell in wanted.items():
        value, shape = tensors[key], tuple(shell.shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = tuple(getattr(value, "shape", ()))
            raise CheckpointError(f"{path}: {key} has shape {got}, its config says {shape}")
        if value.is_floating_point() != shell.is_floating_point() or value.is_complex():
            raise CheckpointError(f"{path}: {key} holds {value.dtype}, expected {shell.dtype}")
        value = value.float() if value.is_floating_point() else value
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds values that are not finite")
        # Own memory: views of a file's storage, or expanded ones, cannot be trained.
        own[key] = value.clone(memory_format=torch.contiguous_format)
    model.load_state_dict(own, assign=True)


class _Undrawn(TorchFunctionMode):
    """Leaves random initial weights out: PyTorch imports its compiler for those without memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_")):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func in (torch.rand, torch.randn) else func)(*args, **kwargs)


def shell(path: Path, build: Callable[[], nn.Module], tensors: dict[str, Any]) -> nn.Module:
    """build(), with shapes only: the weights come from the file.

    CheckpointError where its settings make no model, or one of more than twice the parameters that
    the file holds: every layer takes time and memory, also without weights.
    """
    held = [x.numel() for x in tensors.values() if isinstance(x, Tensor)]
    numbers, count = 2 * sum(held), 2 * len(held)

    def count_down(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal numbers, count
        if parameter is not None:
            numbers, count = numbers - parameter.numel(), count - 1
        if numbers < 0 or count < 0:
            held_here = f"{len(held)} tensors of {sum(held):,} numbers"
            raise ValueError(f"its config needs far more than its {held_here}")

    watching = register_module_parameter_registration_hook(count_down)
    try:
        with torch.device("meta"), _Undrawn():
            return build()
    except ValueError as error:
        raise CheckpointError(f"{path}: {printable(str(error))}") from None
    finally:
        watching.remove()
