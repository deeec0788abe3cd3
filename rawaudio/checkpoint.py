"""Our own checkpoints: weights with their config, and where they come from.

    .safetensors  float tensors; metadata holds the config, the data, the scores ...
    .pt           last.pt of a training run

`load_checkpoint` also reads the files of other implementations, see published.py. Whatever the
format, no pickle code is ever executed.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rawaudio import published
from rawaudio.config import from_dict, to_dict, usable_device
from rawaudio.errors import CheckpointError
from rawaudio.families import FAMILIES, family_of
from rawaudio.files import (
    FORMAT,
    VERSION,
    check_settings,
    fill,
    read_npz,
    read_pt,
    read_safetensors,
    shell,
    write_safetensors,
)
from rawaudio.model import Model


def save_checkpoint(
    path: str | os.PathLike,
    model: Model,
    dtypes: dict[str, torch.dtype] | None = None,
    **metadata: Any,
) -> None:
    """Write the model's weights and config as .safetensors, all or nothing.

    dtypes: of tensors that are stored in another type than they have; loading makes them float32.
    metadata: what a user of the weights needs to know (data, step, licence, scores ...): text,
    numbers, lists and dicts of these. `read_metadata` gives it back.
    """
    ours = {"model": family_of(model).kind, "config": to_dict(model.config)}
    write_safetensors(Path(path), model, FORMAT, VERSION, metadata | ours, dtypes)


def load_checkpoint(
    path: str | os.PathLike, device: str | torch.device = "cpu", **settings: Any
) -> nn.Module:
    """A model in eval mode from a checkpoint of any known format.

    settings: of the model's config, in place of those that are in the file or, for files of other
    programs, are supposed (`residual_step=True`, `quantizer="linear"`, ...).

    Returns a model of one of the families, or a bare Sashimi for a backbone of state-spaces/s4.

    Raises:
        CheckpointError: missing, truncated, corrupted, foreign or mismatched file.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise CheckpointError(f"{path}: {what}; expected a checkpoint (.safetensors, .pt, .npz)")
    kind, config, content = _content(path)
    if kind is None:
        model, tensors = published.read(path, content, settings)
    else:
        config = config | settings if isinstance(config, dict) else config
        model, tensors = _ours(path, kind, config, content)
    fill(path, model, tensors)
    return model.to(usable_device(device)).eval()


def load_model(path: str | os.PathLike, device: str | torch.device = "cpu", key: str = "") -> Model:
    """`load_checkpoint` of a whole model: CheckpointError for a bare backbone. key: the setting
    that named the file, for the message."""
    model = load_checkpoint(path, device)
    if not isinstance(model, Model):
        name = f"{key}={path}" if key else path
        raise CheckpointError(f"{name}: a backbone without input and output, not a model")
    return model


def _content(path: Path) -> tuple[Any, Any, Any]:
    """What a file of ours says of its model, its config and its weights; None, None and the
    content of another program's."""
    if path.suffix == ".npz":
        return None, None, read_npz(path)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path, FORMAT, VERSION, plain=True)
        return (
            (metadata.get("model", ""), metadata.get("config"), tensors)
            if metadata
            else (None, None, tensors)
        )
    content = read_pt(path)
    if content.get("format") != FORMAT:
        return None, None, content
    weights = content.get("averaged")  # as in best.safetensors
    weights = content.get("model") if weights is None else weights
    return content.get("kind", "autoregressive"), content.get("config"), weights


def _ours(path: Path, kind: Any, config: Any, tensors: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{path}: its model is not one of {', '.join(FAMILIES)}")
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: weights are missing")
    check_settings(path, config, tensors)
    family = FAMILIES[kind]
    return shell(path, lambda: family.module(from_dict(family.config, config)), tensors), tensors
