"""Modules in archives of torch.package, read without executing their code.

    module = read_module("g_02365000_package.pth", "hifigan_pkl.pt")
    module.tensors, module.settings("h")

Such an archive is a zip of a pickle, code, and the bytes of the tensors. Here every class that the
pickle names stands for a `Record`, which holds what the pickle says of an object and does nothing.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawaudio.errors import CheckpointError, plainly
from rawaudio.files import stored_entries

MOST_PICKLED = 2**22  # bytes


class Record(dict):
    """An object of a class that is not known here: its items, and its attributes in `state`."""

    def __init__(self, *arguments: Any):
        super().__init__()
        self.arguments, self.state = arguments, {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


def read_module(path: Path, name: str) -> Record:
    """The pickled module of that name; CheckpointError for what is no such archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = stored_entries(archive, path)
            entry = next(e for e in entries if e.filename.rpartition("/")[2] == name)
            if entry.file_size > MOST_PICKLED:
                raise ValueError("its pickle is too large")
            root = entry.filename.partition("/")[0]
            module = _Reader(archive, root, archive.read(entry)).load()
            if not isinstance(module, Record):
                raise ValueError(f"{name} is no module")
            return module
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except StopIteration:
        raise CheckpointError(f"{path}: an archive without {name}") from None
    except Exception as error:  # pickle and zipfile raise nearly anything
        reason = plainly(error)
        raise CheckpointError(f"{path}: not an archive of torch.package ({reason})") from None


def tensors_of(module: Record, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a module, as its state_dict would name them."""
    tensors = {}
    for group in ("_parameters", "_buffers"):
        for name, value in (module.state.get(group) or {}).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
    for name, child in (module.state.get("_modules") or {}).items():
        if isinstance(child, Record):
            tensors |= tensors_of(child, f"{prefix}{name}.")
    return tensors


class _Reader(pickle.Unpickler):
    """Makes dicts, tensors and records, and calls nothing else."""

    def __init__(self, archive: zipfile.ZipFile, root: str, pickled: bytes):
        super().__init__(io.BytesIO(pickled))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): dict,
        }
        if module == "torch" and name.endswith("Storage"):
            return DTYPES[name]
        return known.get((module, name), Record)

    def persistent_load(self, reference: Any) -> Tensor:
        """The numbers of ("storage", type, key, device, n)."""
        kind, dtype, key, _, n = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"it refers to a {kind}")
        content = self.archive.read(f"{self.root}/.data/{key}.storage")
        return torch.frombuffer(bytearray(content), dtype=dtype, count=n)


DTYPES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64,
          "HalfStorage": torch.float16, "LongStorage": torch.int64,
          "BoolStorage": torch.bool}  # fmt: skip


def _tensor(numbers: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    return numbers.as_strided(size, stride, offset)
