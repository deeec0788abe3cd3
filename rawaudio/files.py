"""Files that are there whole or not at all; among them weights, as .safetensors and .pt.

The header of a .safetensors file of ours names its format and version, and holds whatever a user
of the weights needs to know, as JSON. Files come from anyone: reading one takes time and memory by
its size, not by what it claims; executes nothing; and ends in tensors or a CheckpointError.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError, safe_open

from rawaudio.errors import UserError

if TYPE_CHECKING:  # commands look at a file's header before they wait for it
    import torch
    from torch import Tensor, nn

FORMAT = "simple-sashimi"  # of weights of models, in the metadata
VERSION = 1  # of that; raised when names or meanings change


class CheckpointError(UserError):
    """A checkpoint that cannot be used; one printable line that names the file and the reason."""

    def __init__(self, message: str):
        super().__init__(printable(message, 2000))


def printable(text: str, most: int = 200) -> str:
    """The text on one line, cut to `most` characters, control characters as escapes.

    For what a file says about itself: a terminal obeys escape codes.
    """
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-(most // 2) :]}"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.strip()
    )


def plainly(error: Exception) -> str:
    """What is wrong with a text that could not be parsed, without the interpreter's advice."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "digits" in str(error):  # Python advises to raise its limit
        return "it holds a number of thousands of digits"
    return printable(str(error))


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Replace the file by `content`, all or nothing, also when the machine stops half-way.

    Directories are made. Raises OSError, which names the file, if it cannot be written; the old
    file is then whole.
    """
    path = Path(path)
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


def natural(text: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in names by their value: 2 before 10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def explained(error: OSError) -> str:
    """What failed and where, for a message; with what to do if there is no room."""
    if not error.errno:  # our own, a sentence
        return str(error)
    code = errno.errorcode.get(error.errno, error.errno)
    where = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{where}{error.strerror} ({code})" + (": make room" if full else "")


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_atomically` of UTF-8 text."""
    write_atomically(path, text.encode())


# ---- weights --------------------------------------------------------------------------------


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
    from safetensors.torch import save as save_bytes

    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    tensors |= {k: tensors[k].to(dtype) for k, dtype in (dtypes or {}).items()}
    header = metadata | {"version": version}
    header = {k: json.dumps(v, ensure_ascii=False) for k, v in header.items()}
    write_atomically(path, save_bytes(tensors, metadata=header | {"format": format}))


MAX_HEADER = 1 << 22  # bytes of JSON before the tensors, or of the pickle that names them
MAX_VALUES, MAX_NUMBERS = 5000, 64  # of a file's settings; in one list of numbers
MAX_OBJECTS = 1 << 20
MAX_DEPTH = 8  # tuples in tuples in a pickle; torch.save's own are three deep


def read_safetensors(
    path: Path, format: str, version: int, with_tensors: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of that format; CheckpointError for any other."""
    try:
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER:
                raise CheckpointError(f"{path}: not a .safetensors file, or with too long a header")
        # NumPy for the header alone: it is there at once
        with safe_open(path, framework="pt" if with_tensors else "np") as file:
            raw = file.metadata() or {}
            if raw.get("format") != format:
                theirs = printable(raw.get("format", "another program's"))
                raise CheckpointError(f"{path}: no {format} metadata; these are {theirs} weights")
            tensors = {k: file.get_tensor(k) for k in file.keys()} if with_tensors else {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole .safetensors file ({printable(str(error))})"
        ) from None
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


def read_pt(path: Path) -> dict[Any, Any]:
    """The dict in a file of torch.save, without executing anything; CheckpointError for others."""
    import torch

    try:
        with open(path, "rb") as file:
            if file.read(2)[:1] not in (b"P", b"\x80"):  # a zip archive, or a bare pickle
                raise ValueError("neither .safetensors nor written by torch.save")
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_content(content, path.stat().st_size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # torch raises a dozen kinds for damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            # never torch's own words, which advise to execute it
            reason = "it holds Python objects that would have to be executed, which is never done"
        raise CheckpointError(f"{path}: not a readable checkpoint ({printable(reason)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def _check_archive(path: Path) -> None:
    """ValueError for a file that unpacks to more than it is, or to tuples that never end."""
    if not zipfile.is_zipfile(path):  # the older container: five pickles, then the numbers
        with open(path, "rb") as file:
            for _ in range(5):
                _check_tuples(file)
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, as torch.save never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its parts overlap")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                if entry.file_size > MAX_HEADER:
                    raise ValueError("it names too many tensors")
                _check_tuples(io.BytesIO(archive.read(entry)))


def _check_tuples(file: BinaryIO) -> None:
    """ValueError for a pickle of deeply nested tuples, without making them.

    A hundred bytes make a tuple of two tuples of two ... which takes forever as a key of a dict.
    """
    stack: list[int | None] = []  # how deep the tuples of each object go; None: a mark
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name, taken = opcode.name, opcode.stack_before
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1] or 0
            continue
        if pickletools.markobject in taken:
            at = len(stack) - 1 - stack[::-1].index(None)
            items = stack[at + 1 :]
            del stack[at:]
            taken = taken[: taken.index(pickletools.markobject)]
        else:
            items = stack[len(stack) - len(taken) :]
        del stack[len(stack) - len(taken) :]
        if name == "MARK":
            stack.append(None)
            continue
        depth = memo[argument] if name in ("GET", "BINGET", "LONG_BINGET") else 0
        if name.startswith("TUPLE"):
            depth = 1 + max((item or 0 for item in items), default=0)
        if depth > MAX_DEPTH:
            raise ValueError("it holds tuples in tuples in tuples ...")
        stack += [depth] * len(opcode.stack_after)


def _check_content(content: Any, size: int) -> None:
    """ValueError for tensors that are none, or that need far more memory than the file's size."""
    import torch

    waiting, seen, total = [content], set(), 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
            if len(waiting) + len(seen) > MAX_OBJECTS:
                raise ValueError("it holds too many objects")
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError("it holds tensors that are not plain ones")
            total += value.numel() * value.itemsize
    # Other programs store (1, M) expanded to (H, M), three of the tensors of an S4 layer.
    if total > 4 * size + 2**20:
        raise ValueError("its tensors are views of much less data")


def check_settings(path: Path, settings: Any, tensors: dict[str, Any] | None = None) -> None:
    """CheckpointError for a config, as read from a file, that no config of ours can be.

    tensors: the file's; for every value of a condition they hold an embedding.
    Done before it is understood, for that takes long and resolves ${...}, the environment's too.
    """
    from torch import Tensor

    waiting = [(settings, 0)]
    tables = [x for name, x in (tensors or {}).items() if str(name).startswith("told.tables.")]
    conditions = sum(len(x) for x in tables if isinstance(x, Tensor) and x.dim() == 2)
    try:
        if not isinstance(settings, dict):
            raise ValueError("it is missing, or no group")
        for value, depth in waiting:  # which grows meanwhile
            waiting += [(part, depth + 1) for part in _parts(value, conditions)]
            if len(waiting) > MAX_VALUES + 2 * conditions or depth > 4:
                raise ValueError("it is too large or too deep")
    except ValueError as error:
        raise CheckpointError(f"{path}: its config is not understood: {error}") from None


def _parts(value: Any, conditions: int) -> list[Any]:
    """What a setting is made of; ValueError for one that no config has."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("it holds keys that are no text")
        return [*value, *value.values()]
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple | dict) for item in value):
            raise ValueError("it holds a list of lists")
        if len(value) > max(MAX_NUMBERS, conditions) and not isinstance(value[0], str):
            raise ValueError("it holds a list that is too long")
        return list(value)
    if isinstance(value, str) and (len(value) > 1000 or "${" in value):
        raise ValueError("it holds a text that is too long, or has ${...} in it")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it holds a number that is not finite")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("it holds a number that is too large")
    if not isinstance(value, str | float | int | None):  # bool is an int
        raise ValueError(f"it holds a {type(value).__name__}")
    return []


def fill(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the (meta) model its weights, in float32.

    Raises CheckpointError for tensors that are missing, too many, of another shape or kind, or not
    finite.
    """
    import torch

    wanted = model.state_dict()
    for what, keys in [("lacks", wanted.keys() - tensors), ("has extra", tensors.keys() - wanted)]:
        if keys:
            some = ", ".join(printable(key, 80) for key in sorted(map(str, keys))[:3])
            some += " ..." if len(keys) > 3 else ""
            raise CheckpointError(f"{path}: {what} {len(keys)} tensors ({some}) for its config")
    for key, shell in wanted.items():
        value, shape = tensors[key], tuple(shell.shape)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            got = tuple(getattr(value, "shape", ()))
            raise CheckpointError(f"{path}: {key} has shape {got}, its config says {shape}")
        if value.is_floating_point() != shell.is_floating_point() or value.is_complex():
            raise CheckpointError(f"{path}: {key} holds {value.dtype}, expected {shell.dtype}")
    own = {}
    for key, value in tensors.items():
        value = value.float() if value.is_floating_point() else value
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds values that are not finite")
        # Own memory: views of a file's storage, or expanded ones, cannot be trained.
        own[key] = value.clone(memory_format=torch.contiguous_format)
    model.load_state_dict(own, assign=True)


def shell(path: Path, build: Callable[[], nn.Module], tensors: dict[str, Any]) -> nn.Module:
    """build(), with shapes only: the weights come from the file.

    CheckpointError where its settings make no model, or one of more parameters than the file holds:
    it is given up half-way, for every layer takes time and memory, also without weights.
    """
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    held = [x.numel() for x in tensors.values() if isinstance(x, torch.Tensor)]
    numbers, count = 2 * sum(held), 2 * len(held)  # `fill` names one that is missing

    def counted(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal numbers, count
        if parameter is not None:
            numbers, count = numbers - parameter.numel(), count - 1
        if numbers < 0 or count < 0:
            raise UserError(
                f"its config needs far more than its {len(held)} tensors of {sum(held):,} numbers"
            )

    watching = register_module_parameter_registration_hook(counted)
    try:
        with torch.device("meta"):
            return build()
    except ValueError as error:
        raise CheckpointError(f"{path}: {printable(str(error))}") from None
    finally:
        watching.remove()
