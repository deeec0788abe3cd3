"""Checkpoints of other implementations, read without executing anything.

    simple-sashimi    ckpt_*.pt of its trainer (`model_state_dict` + `cfg_yaml`): SashimiAR, or
                      SashimiDiffWave from its diffusion branch
    state-spaces/s4   backbones (`Sashimi`, V4 S4Block): a bare `Sashimi`

Both flatten the backbone into d_layers, c_layers and u_layers (coarsest first).
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from rawaudio.errors import CheckpointError, UserError, plainly
from rawaudio.files import shell
from sashimi.autoregressive import AutoregressiveConfig, SashimiAR
from sashimi.backbone import Sashimi
from sashimi.diffwave import DiffusionConfig, SashimiDiffWave

Build = Callable[[], nn.Module]


# What a file of another shape than expected ends in.
MISSHAPEN = (yaml.YAMLError, LookupError, AttributeError, RuntimeError, TypeError, ValueError)
MISSHAPEN += (ArithmeticError,)


def read(path: Path, content: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, without memory for its weights, and they. content: the file's, of torch.save."""
    try:
        if "model_state_dict" in content and "cfg_yaml" in content:
            build, tensors = _published(content["model_state_dict"], content["cfg_yaml"])
        else:
            build, tensors = _state_spaces(content.get("state_dict", content))
    except UserError as error:  # a sentence
        raise CheckpointError(f"{path}: {error}") from None
    except MISSHAPEN as error:
        reason = f"{type(error).__name__}: {plainly(error)}"
        raise CheckpointError(f"{path}: it is not understood ({reason})") from None
    return shell(path, build, tensors), tensors


# Names of the parts of a block as regular expressions, and ours.
_PARTS = [
    (r"layer\.(?:layer\.)?D", "layer.D"),
    (r"layer\.(?:layer\.)?kernel\.(?:kernel\.)?(C|B|P|log_dt|inv_dt)", r"layer.\1"),
    (r"layer\.(?:layer\.)?kernel\.(?:kernel\.)?(?:log_w_real|A_real)", "layer.log_A_real"),
    (r"layer\.(?:layer\.)?kernel\.(?:kernel\.)?(w_imag|A_imag|l_kernel)", r"layer.\1"),
    (r"layer\.output_linear\.0\.(weight|bias)", r"layer.output.\1"),
    (r"layer\.ff\.0\.0\.(weight|bias)", r"layer.0.\1"),
    (r"layer\.ff\.2\.(weight|bias)", r"layer.3.\1"),
    (r"(norm\.(?:weight|bias))", r"\1"),
    (r"fc_t\.(weight|bias)", r"from_global.\1"),
    (r"linear\.(weight|weight_g|weight_v|bias)", r"\1"),  # of a pooling
]
# Modules around the backbone of the published trainer's models, and ours.
_AROUND = {
    False: {"mu_embedder": "embedding", "head": "head"},
    True: {"fc_t1": "embed_step.0", "fc_t2": "embed_step.2", "init_conv.0.conv": "input",
           "final_conv.0.conv": "output.0", "final_conv.2.conv": "output.2"},
}  # fmt: skip


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: by them, a few lines can stand for any amount."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds aliases")
        return super().compose_node(parent, index)


def _published(state: dict[str, Tensor], cfg_yaml: str) -> tuple[Build, dict[str, Tensor]]:
    """SashimiAR of the published simple-sashimi trainer, or SashimiDiffWave of its diffusion
    branch."""
    if len(cfg_yaml) > 50_000:
        raise UserError(f"cfg_yaml has {len(cfg_yaml):,} characters")
    settings = yaml.load(cfg_yaml, _PlainLoader)
    is_diffwave = bool(settings.get("diffwave"))
    network = settings if is_diffwave else settings["model_cfg"]
    known = {
        "l_max": int(network["l_max"]),
        "dropout": float(network.get("dropout", 0.0)),
        "sample_rate": int(settings.get("sample_rate", 16000)),
        "clip_length": int(settings.get("audio_len" if is_diffwave else "seq_len", 16000)),
    }
    if is_diffwave:
        known |= _noise_schedule([float(beta) for beta in settings["noise_schedule"]])
        if not settings.get("unconditional", True):
            raise UserError("a published vocoder, which is not understood")
    around, backbone = {}, {}
    for key, value in state.items():
        key = key.removeprefix("sashimi.")
        place, _, part = key.rpartition(".")
        if place in _AROUND[is_diffwave]:
            around.setdefault(_AROUND[is_diffwave][place], {})[part] = value
        else:
            backbone[key] = value
    shape, tensors = _convert(backbone, known["l_max"])
    tensors = {f"backbone.{key}": value for key, value in tensors.items()}
    for place, part in around.items():
        tensors |= {f"{place}.{key}": value for key, value in _linear(part).items()}
    lengths = shape.pop("l_max")
    if not is_diffwave and shape.pop("bidirectional"):
        raise UserError("a bidirectional model is not autoregressive")
    module, config = (
        (SashimiDiffWave, DiffusionConfig) if is_diffwave else (SashimiAR, AutoregressiveConfig)
    )
    settings = shape | known | {"tier_lengths": lengths}
    return lambda: module(config(**settings)), tensors


def _noise_schedule(betas: list[float]) -> dict[str, Any]:
    """The settings that give these betas; UserError for others than linear ones."""
    even = torch.linspace(betas[0], betas[-1], len(betas)).tolist() if betas else []
    if not betas or any(abs(a - b) > 1e-6 for a, b in zip(even, betas, strict=True)):
        raise UserError("its noise schedule is not linear")
    return {"diffusion_steps": len(betas), "beta_first": betas[0], "beta_last": betas[-1]}


def _state_spaces(state: Any) -> tuple[Build, dict[str, Tensor]]:
    """Sashimi from the state dict of state-spaces/s4's backbone."""
    if not isinstance(state, dict) or not any(str(k).endswith("kernel.inv_dt") for k in state):
        raise UserError(
            "not a checkpoint of this library, of the published simple-sashimi trainer, or of a "
            "state-spaces Sashimi backbone"
        )
    shape, tensors = _convert(state, l_max=None)

    def backbone() -> nn.Module:
        DiffusionConfig(**shape | {"l_max": 1}, tier_lengths=shape["l_max"])  # checks ranges
        return Sashimi(**shape)

    return backbone, tensors


def _convert(
    state: dict[str, Tensor], l_max: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(arguments of Sashimi, its state dict) from a flattened backbone.

    l_max: the length of every tier's Ct; None where each layer records its own (`l_kernel`).
    """
    parts = _group(state)
    tensors = {k: state[k] for k in ("norm.weight", "norm.bias")}
    d_model = len(tensors["norm.weight"])
    pooling, pool = _convert_pools(parts, d_model)
    blocks, shape = _convert_blocks(parts, len(pool), l_max)
    if min(shape["l_max"]) < 1:
        raise UserError(
            "its S4 layers were never run (l_kernel is 0), so C is not yet in its stored form; run "
            "one forward pass where it was made and save it again"
        )
    expand = len(pooling["down_pool.0.bias"]) // d_model if pool else 1
    shape |= {"d_model": d_model, "expand": expand, "pool": pool}
    return shape, tensors | pooling | blocks


def _group(state: dict[str, Tensor]) -> dict[tuple, dict[str, Tensor]]:
    """(d | c | u, index ...) -> the tensors of that block or pooling, under our names for parts."""
    parts: dict[tuple, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key in ("norm.weight", "norm.bias") or re.search(r"kernel\.(omega|z)$", key):
            continue  # omega and z follow from the length
        if not isinstance(value, Tensor):
            raise TypeError(f"{key} is no tensor")
        match = re.fullmatch(r"([dc]_layers\.\d{1,4}|u_layers\.\d{1,4}\.\d{1,4})\.(.+)", key)
        if not match:
            raise KeyError(key)
        place, part = match.groups()
        kind, *numbers = place.split(".")
        parts.setdefault((kind[0], *map(int, numbers)), {})[_rename(part)] = value
    return parts


def _convert_pools(
    parts: dict[tuple, dict[str, Tensor]], width: int
) -> tuple[dict[str, Tensor], list[int]]:
    """Our tensors of the poolings and their factors, finest first; width: the finest tier's."""
    pools = sorted(place for place in parts if _is_pool(parts[place]))
    downs = [p for p in pools if p[0] == "d"]
    ups = [p for p in pools if p[0] == "u"][::-1]  # theirs are coarsest first
    tensors, factors = {}, []
    for tier, places in enumerate(zip(downs, ups, strict=True)):
        (down, down_bias), (up, up_bias) = (_linear(parts[p]).values() for p in places)
        # Theirs are feature-major, (h s); ours time-major, (s h): a plain reshape of the input.
        tensors |= {
            f"down_pool.{tier}.weight": down.unflatten(1, (width, -1)).transpose(1, 2).flatten(1),
            f"down_pool.{tier}.bias": down_bias,
            f"up_pool.{tier}.weight": up.unflatten(0, (width, -1)).transpose(0, 1).flatten(0, 1),
            f"up_pool.{tier}.bias": up_bias.unflatten(0, (width, -1)).T.flatten(),
        }
        factors.append(down.shape[1] // width)
        width = len(down)
    return tensors, factors


def _convert_blocks(
    parts: dict[tuple, dict[str, Tensor]], n_pools: int, l_max: int | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our tensors of the residual blocks, and what they tell of Sashimi's arguments."""
    tensors, lengths, count = {}, [0] * (n_pools + 1), Counter()
    tier = 0
    for place in sorted(parts):  # c, then d finest first, then u coarsest first
        block = parts[place]
        if _is_pool(block):
            tier += place[0] == "d"
            continue
        if place[0] == "d":
            ours, own = f"down.{tier}", tier
        elif place[0] == "c":
            ours, own = "center", n_pools
        else:
            own = n_pools - 1 - place[1]
            ours = f"up.{own}"
        if "layer.C" in block:
            length = _state_space(block) or l_max or 0
            if lengths[own] not in (0, length):
                raise UserError(f"l_kernel of tier {own} is both {lengths[own]} and {length}")
            lengths[own] = length
        tensors |= {f"{ours}.{count[ours]}.{k}": _squeeze(k, v) for k, v in block.items()}
        count[ours] += 1
    centre = [parts[place] for place in sorted(parts) if place[0] == "c"]
    s4 = [block for block in centre if "layer.C" in block]
    mlp = [block for block in centre if "layer.0.weight" in block]
    channels, width, states = s4[0]["layer.C"].shape[:3]
    return tensors, {
        "n_layers": len(s4),
        "ff": mlp[0]["layer.0.weight"].shape[0] // width if mlp else 0,
        "d_state": 2 * states,
        "unet": "down.0" in count,
        "glu": s4[0]["layer.output.weight"].shape[0] == 2 * width,
        "bidirectional": channels == 2,
        "tied": s4[0]["layer.log_A_real"].shape[0] == 1 < width,
        "l_max": lengths,
    }


def _rename(part: str) -> str:
    for pattern, ours in _PARTS:
        if match := re.fullmatch(pattern, part):
            return match.expand(ours)
    raise KeyError(part)


def _squeeze(key: str, value: Tensor) -> Tensor:
    """Weights of 1x1 convolutions (out, in, 1) and biases (out, 1) as those of linear layers."""
    if key.endswith(("0.weight", "3.weight", "output.weight")):
        return value.flatten(1)
    return value.flatten() if key.endswith("bias") else value


def _is_pool(part: dict[str, Tensor]) -> bool:
    return "bias" in part


def _linear(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """weight (out, in), and bias, if any; weight normalisation is multiplied out."""
    if "weight_g" in part:
        v = part["weight_v"].flatten(1)
        weight = part["weight_g"].flatten(1) * v / v.norm(dim=1, keepdim=True)
    else:
        weight = part["weight"].flatten(1)
    return {"weight": weight} | ({"bias": part["bias"].flatten()} if "bias" in part else {})


def _state_space(block: dict[str, Tensor]) -> int:
    """Bring a block's S4 parameters into our shapes, in place; the recorded length of its Ct."""
    log_dt = block.pop("layer.inv_dt", None)
    block["layer.log_dt"] = (block["layer.log_dt"] if log_dt is None else log_dt).flatten()
    if log_dt is None:
        block["layer.A_imag"] = block.pop("layer.w_imag")
    else:  # state-spaces stores the conjugate half
        block["layer.A_imag"] = -block["layer.A_imag"]
    for name in ("B", "P"):  # (1, S, M, 2)
        block[f"layer.{name}"] = block[f"layer.{name}"].squeeze(0)
    block["layer.D"] = block["layer.D"].flatten()
    return int(block.pop("layer.l_kernel", torch.tensor(0)))
