"""Files that are there whole or not at all; among them weights, as .safetensors.

The header of a file of weights names its format and version, and holds whatever a user of the
weights needs to know, as JSON.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


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
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        draft.unlink(missing_ok=True)


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
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    tensors |= {k: tensors[k].to(dtype) for k, dtype in (dtypes or {}).items()}
    header = metadata | {"version": version}
    header = {k: json.dumps(v, ensure_ascii=False) for k, v in header.items()}
    write_atomically(path, save_bytes(tensors, metadata=header | {"format": format}))


def read_safetensors(
    path: Path, format: str, version: int, with_tensors: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of that format; CheckpointError for any other."""
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()} if with_tensors else {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole .safetensors file ({error})") from None
    if raw.get("format") != format:
        theirs = raw.get("format", "another program's")
        raise CheckpointError(f"{path}: no {format} metadata; these are {theirs} weights")
    try:
        metadata = {k: v if k == "format" else json.loads(v) for k, v in raw.items()}
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: damaged metadata ({error})") from None
    if metadata.get("version") != version:
        raise CheckpointError(
            f"{path}: format version {metadata.get('version')}, this library reads {version}; "
            "use the version of simple-sashimi that wrote it, or a newer one"
        )
    return tensors, metadata


def fill(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the (meta) model its weights, in float32.

    Raises CheckpointError for tensors that are missing, too many, of another shape or not finite.
    """
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    for what, keys in [("lacks", wanted.keys() - tensors), ("has extra", tensors.keys() - wanted)]:
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (" ..." if len(keys) > 3 else "")
            raise CheckpointError(f"{path}: {what} {len(keys)} tensors ({some}) for its config")
    for key, shape in wanted.items():
        if not isinstance(tensors[key], Tensor) or tuple(tensors[key].shape) != shape:
            got = tuple(getattr(tensors[key], "shape", ()))
            raise CheckpointError(f"{path}: {key} has shape {got}, its config says {shape}")
        if not tensors[key].isfinite().all():
            raise CheckpointError(f"{path}: {key} holds values that are not finite")
    # Own memory: views of a file's storage, or expanded ones, cannot be trained.
    contiguous = torch.contiguous_format
    own = {
        k: (v.float() if v.is_floating_point() else v).clone(memory_format=contiguous)
        for k, v in tensors.items()
    }
    model.load_state_dict(own, assign=True)
