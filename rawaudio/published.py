"""Checkpoints of other implementations, read without executing anything.

    simple-sashimi    ckpt_*.pt of its trainer: SashimiAR; of its diffusion branch: SashimiDiffWave
    simple-asgan      its trainer's and its slim files: ASGAN
    state-spaces/s4   the SaShiMi paper's release, Lightning's files: SashimiAR, WaveNet, SampleRNN;
                      backbones alone: `Sashimi`
    diffwave-sashimi  <iteration>.pkl: DiffWave, SashimiDiffWave; also DiffWave-unconditional's
    wavegan           .npz or .safetensors of its variables; wavegan-pytorch's gan_*.tar: WaveGAN

Which one a file is, its names tell; sizes follow from shapes. What a file does not hold is taken
as it was published, see the readers in published_sashimi.py and published_baselines.py.
WaveGAN's variables come out of a checkpoint of TensorFlow by

    import numpy as np, tensorflow as tf
    variables = tf.train.load_checkpoint("train/model.ckpt-200000")
    np.savez("wavegan.npz", **{name: variables.get_tensor(name)
                               for name in variables.get_variable_to_shape_map()})
"""

import re
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from rawaudio.config import from_dict
from rawaudio.errors import CheckpointError, UserError, plainly, printable
from rawaudio.families import FAMILIES
from rawaudio.files import shell
from rawaudio.published_baselines import (
    asgan,
    diffwave,
    samplernn,
    wavegan,
    wavegan_port,
    wavenet,
)
from rawaudio.published_sashimi import Found, paired, simple, state_spaces
from sashimi.backbone import Sashimi

# What a file of another shape than expected ends in.
MISSHAPEN = (yaml.YAMLError, LookupError, AttributeError, RuntimeError, TypeError, ValueError)
MISSHAPEN += (ArithmeticError,)

# How a state dict is told, by the name of one of its tensors -> its reader.
READERS = [
    (r"frame_level_rnns\..+", samplernn),
    (r"start_conv\.weight", wavenet),
    (r"residual_layer\..+", diffwave),
    (r"G/z_project/dense/kernel", wavegan),
    (r"deconv_list\..+", wavegan_port),
    (r"fc_t1\.weight", paired),
    (r".*kernel\.(inv|log)_dt", state_spaces),
]


def read(
    path: Path, content: dict[str, Any], settings: dict[str, Any]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, without memory for its weights, and they.

    content: the file's. settings: of the model's config, in place of those that were found.
    """
    try:
        kind, config, tensors = _found(path, content, settings)
        if kind is None:  # a backbone alone
            if settings:
                raise UserError(f"a backbone alone has no settings such as {next(iter(settings))}")
            return shell(path, lambda: _backbone(config), tensors), tensors
    except UserError as error:  # a sentence
        raise CheckpointError(f"{path}: {error}") from None
    except KeyError as error:
        raise CheckpointError(f"{path}: it lacks {printable(str(error), 80)}") from None
    except MISSHAPEN as error:
        reason = f"{type(error).__name__}: {plainly(error)}"
        raise CheckpointError(f"{path}: it is not understood ({reason})") from None
    family, config = FAMILIES[kind], config | settings
    return shell(path, lambda: family.module(from_dict(family.config, config)), tensors), tensors


def _backbone(config: dict[str, Any]) -> Sashimi:
    checked = {"l_max": 1, "tier_lengths": config["l_max"]}  # in their ranges
    from_dict(FAMILIES["diffwave"].config, config | checked)
    return Sashimi(**config)


def _found(path: Path, content: dict[str, Any], known: dict[str, Any]) -> Found:
    if "model_state_dict" in content and "cfg_yaml" in content:
        return simple(path, content["model_state_dict"], content["cfg_yaml"])
    if "cfg_yaml" in content and {"g_ema_state_dict", "g_state_dict"} & content.keys():
        return asgan(content.get("g_ema_state_dict"), content["cfg_yaml"])
    for key in ("state_dict", "model_state_dict", "generator"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        content = {}
    state = {re.sub(r"^(module\.)?(model\.)?", "", str(key)): x for key, x in content.items()}
    for name, reader in READERS:
        if any(re.fullmatch(name, key) for key in state):
            return reader(path, state, known)
    raise UserError(
        "not a checkpoint of this library, nor one of simple-sashimi, simple-asgan, state-spaces, "
        "diffwave-sashimi or wavegan"
    )
