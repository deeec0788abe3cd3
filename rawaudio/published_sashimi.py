"""Published weights of SaShiMi, as ours: see published.py, and published_baselines.py for readers.

All flatten the backbone into d_layers, c_layers and u_layers, the last coarsest first.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rawaudio.errors import UserError, printable

State = dict[str, Tensor]
Found = tuple[str | None, dict[str, Any], State]  # family, settings of its config; None: a backbone


# ---- what readers share -------------------------------------------------------------------------


def count(state: State, name: str) -> int:
    """How many tensors have such a name."""
    return sum(re.fullmatch(name, key) is not None for key in state)


def renamed(state: State, names: list[tuple[str, str]]) -> State:
    """The state with regular expressions replaced in its names, one after the other."""
    for old, new in names:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


def heard(first: Tensor, second: Tensor) -> dict[str, int]:
    """Samples per mel frame, from the kernels of both upsamplings, which are two strides long."""
    return {"hop": (first.shape[-1] // 2) * (second.shape[-1] // 2)}


# Embedding and head around a model of state-spaces, in both spellings.
ENDS = [(r"^encoder\.(0\.)?", "embedding."), (r"^decoder\.(0\.)?output_transform\.", "head.")]


def quantized(path: Path) -> dict[str, Any]:
    """The quantiser of state-spaces, which follows from the data set that a file is named after."""
    linear = "beethoven" in path.name.lower()
    return {"quantizer": "linear" if linear else "mulaw-published"}


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: by them, a few lines can stand for any amount."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds aliases")
        return super().compose_node(parent, index)


def read_yaml(text: str) -> dict[str, Any]:
    if len(text) > 50_000:
        raise UserError(f"cfg_yaml has {len(text):,} characters")
    return yaml.load(text, _PlainLoader)


# ---- the kinds of files -------------------------------------------------------------------------

# Modules around the backbone, and ours.
AROUND = {
    "mu_embedder": "embedding", "head": "head", "embedding": "embedding", "fc_t1": "embed_step.0",
    "fc_t2": "embed_step.2", "init_conv.0.conv": "input", "final_conv.0.conv": "output.0",
    "final_conv.2.conv": "output.2",
}  # fmt: skip


def simple(path: Path, state: State, cfg_yaml: str) -> Found:
    """SashimiAR of the simple-sashimi trainer, or SashimiDiffWave of its diffusion branch."""
    settings = read_yaml(cfg_yaml)
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
    state = {key.removeprefix("sashimi."): value for key, value in state.items()}
    kind, config, tensors = _whole(state, known["l_max"])
    if is_diffwave != (kind == "diffwave"):
        raise UserError("its diffwave setting does not fit its weights")
    if is_diffwave and config["unconditional"] != bool(settings.get("unconditional", True)):
        raise UserError("its unconditional setting does not fit its weights")
    return kind, config | known, tensors


def state_spaces(path: Path, state: State, known: dict[str, Any]) -> Found:
    """SashimiAR of state-spaces/s4, or its backbone alone."""
    state = renamed(state, ENDS)
    if "embedding.weight" not in state:
        shape, tensors = _convert(_multiplied(state), l_max=None)
        return None, shape, tensors
    kind, config, tensors = _whole(state, None)
    return kind, config | quantized(path), tensors


# Of diffwave-sashimi, whose blocks are pairs: a name in a block -> whether it is the second's, name
# there.
PAIRED = [
    (r"(fc_t|layer|upsample_conv2d)\.(.+)", 0, r"\1.\2"),
    (r"(linear|mel_conv)\.conv\.(.+)", 0, r"\1.\2"),
    (r"norm([12])\.([ms])", None, r"norm.\2"),
    (r"ff\.ff\.0\.conv\.(.+)", 1, r"layer.ff.0.0.\1"),
    (r"ff\.ff\.2\.conv\.(.+)", 1, r"layer.ff.2.\1"),
]


def paired(path: Path, state: State, known: dict[str, Any]) -> Found:
    """SashimiDiffWave of diffwave-sashimi. Its schedule is in no file: that of the data set."""
    if any(".krylov." in key for key in state):
        raise UserError(
            "a SaShiMi of diffwave-sashimi's branch `checkpoints`, whose S4 layers of January 2022 "
            "are not understood"
        )
    ups = sorted(int(key.split(".")[1]) for key in state if re.fullmatch(UP_POOL, key))
    alone = {}
    for key, value in state.items():
        match = re.fullmatch(r"([dcu]_layers)\.(\d{1,4})\.(.+)", key)
        if not match:
            alone[key] = value
            continue
        place, index, part = match[1], int(match[2]), match[3]
        if place == "u_layers":  # theirs stand in one row, each tier's after its up-pooling
            tier = sum(up <= index for up in ups) - 1
            place, index = f"u_layers.{tier}", index - ups[tier]
        for name, second, new in PAIRED:
            if found := re.fullmatch(name, part):
                second = int(found[1]) - 1 if second is None else second
                alone[f"{place}.{2 * index + second}.{found.expand(new)}"] = value
                break
        else:
            raise UserError(UNKNOWN.format(printable(key, 80)))
    kind, config, tensors = _whole(alone, None)
    if not config["unet"]:
        raise UserError("without unet, which is not understood")
    if not config["unconditional"]:
        config |= {"sample_rate": 22050, "diffusion_steps": 50, "beta_last": 0.05}
    return kind, config | {"pair_skips": True}, tensors


UNKNOWN = "it holds {}, of no network that is known"
UP_POOL = r"u_layers\.\d{1,4}\.linear\.conv\.bias"


def _whole(state: State, l_max: int | None) -> Found:
    """A model around a flattened backbone; l_max: see `_convert`."""
    around, backbone = {}, {}
    for key, value in _multiplied(state).items():
        place, _, part = key.rpartition(".")
        if place in AROUND:
            # of convolutions of one tap
            around[f"{AROUND[place]}.{part}"] = value.flatten(1) if value.dim() == 3 else value
        else:
            backbone[key] = value
    config, tensors = _convert(backbone, l_max)
    tensors = {f"backbone.{key}": value for key, value in tensors.items()}
    config["tier_lengths"] = config.pop("l_max")
    config["l_max"] = config["tier_lengths"][0]
    if "embed_step.0.weight" not in around:
        if config.pop("bidirectional"):
            raise UserError("a bidirectional model is not autoregressive")
        return "autoregressive", config, tensors | around
    tensors, ears = _hearing(tensors)
    config["unconditional"] = not ears
    if ears:
        config |= {"mel_blocks": True, "tacotron_mel": True}
        config["n_mels"] = ears["hear.0.project.weight"].shape[1]
        config |= heard(*(ears[f"hear.0.upsample.layers.{i}.weight"] for i in range(2)))
    return "diffwave", config, tensors | ears | around


def _hearing(tensors: State) -> tuple[State, State]:
    """Tensors of the backbone, and those by which its S4 blocks hear, numbered as data meets them:
    down, centre, up."""
    stages = {"down": 0, "center": 1, "up": 2}
    ears: dict[tuple, State] = {}
    for key in list(tensors):
        block, _, part = key.partition(".hear.")
        if part:
            _, stage, *numbers = block.split(".")
            tier, *index = map(int, ([0] if stage == "center" else []) + numbers)
            place = (stages[stage], -tier if stage == "up" else tier, *index)
            ears.setdefault(place, {})[part] = tensors.pop(key)
    rows = enumerate(ears[place] for place in sorted(ears))
    return tensors, {f"hear.{i}.{part}": x for i, parts in rows for part, x in parts.items()}


def _multiplied(state: State) -> State:
    """The state with weight normalisation multiplied out."""
    plain = {}
    for key, v in state.items():
        if key.endswith(".weight_v"):
            g = state[key[:-1] + "g"]
            length = v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))
            plain[key[:-2]] = g * v / length
        elif not (key.endswith(".weight_g") and key[:-1] + "v" in state):
            plain[key] = v
    return plain


def _noise_schedule(betas: list[float]) -> dict[str, Any]:
    """The settings that give these betas; UserError for others than linear ones."""
    even = torch.linspace(betas[0], betas[-1], len(betas)).tolist() if betas else []
    if not betas or any(abs(a - b) > 1e-6 for a, b in zip(even, betas, strict=True)):
        raise UserError("its noise schedule is not linear")
    return {"diffusion_steps": len(betas), "beta_first": betas[0], "beta_last": betas[-1]}


# ---- the backbone -------------------------------------------------------------------------------

# Names of the parts of a block as regular expressions, and ours.
_PARTS = [
    (r"layer\.(?:layer\.)?D", "layer.D"),
    (r"layer\.(?:layer\.)?kernel\.(?:kernel\.)?(C|B|P|log_dt|inv_dt)", r"layer.\1"),
    (
        r"layer\.(?:layer\.)?kernel\.(?:kernel\.)?(?:log_w_real|inv_w_real|A_real)",
        "layer.log_A_real",
    ),
    (r"layer\.(?:layer\.)?kernel\.(?:kernel\.)?(w_imag|A_imag|l_kernel)", r"layer.\1"),
    (r"layer\.(?:layer\.)?kernel\.(?:kernel\.)?L", "layer.l_kernel"),
    (r"layer\.output_linear\.0\.(weight|bias)", r"layer.output.\1"),
    (r"layer\.ff\.0\.0\.(weight|bias)", r"layer.0.\1"),
    (r"layer\.ff\.2\.(weight|bias)", r"layer.3.\1"),
    (r"norm\.(?:norm\.)?(?:ln\.)?(weight|bias|m|s)", r"norm.\1"),
    (r"fc_t\.(weight|bias)", r"from_global.\1"),
    (r"linear\.(weight|bias)", r"\1"),  # of a pooling
    (r"upsample_conv2d\.([01])\.(weight|bias)", r"hear.upsample.layers.\1.\2"),
    (r"mel_conv\.(?:conv\.)?(weight|bias)", r"hear.project.\1"),
]

NORM = ("norm.weight", "norm.bias", "norm.m", "norm.s")


def _convert(state: State, l_max: int | None) -> tuple[dict[str, Any], State]:
    """(arguments of Sashimi, its state dict) from a flattened backbone.

    l_max: the length of every tier's Ct; None where each layer records its own (`l_kernel`).
    """
    parts = _group(state)
    tensors = {k: state[k] for k in NORM if k in state}
    d_model = min(block["layer.D"].numel() for block in parts.values() if "layer.D" in block)
    pooling, pool = _convert_pools(parts, d_model)
    blocks, shape = _convert_blocks(parts, len(pool), l_max)
    if min(shape["l_max"]) < 1:
        raise UserError(
            "its S4 layers were never run (l_kernel is 0), so C is not yet in its stored form; run "
            "one forward pass where it was made and save it again"
        )
    expand = len(pooling["down_pool.0.bias"]) // d_model if pool else 1
    shape |= {"d_model": d_model, "expand": expand, "pool": pool}
    if "norm.m" in tensors:
        shape["scalar_norm"] = "all"
    return shape, tensors | pooling | blocks


def _group(state: State) -> dict[tuple, State]:
    """(d | c | u, index ...) -> the tensors of that block or pooling, under our names for parts."""
    parts: dict[tuple, State] = {}
    for key, value in state.items():
        if key in NORM or re.search(r"kernel\.(omega|z)$", key):
            continue  # omega and z follow from the length
        if not isinstance(value, Tensor):
            raise TypeError(f"{key} is no tensor")
        match = re.fullmatch(r"([dc]_layers\.\d{1,4}|u_layers\.\d{1,4}\.\d{1,4})\.(.+)", key)
        if not match:
            raise UserError(UNKNOWN.format(printable(key, 80)))
        place, part = match.groups()
        kind, *numbers = place.split(".")
        parts.setdefault((kind[0], *map(int, numbers)), {})[_rename(part)] = value
    return parts


def _convert_pools(parts: dict[tuple, State], width: int) -> tuple[State, list[int]]:
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
    parts: dict[tuple, State], n_pools: int, l_max: int | None
) -> tuple[State, dict[str, Any]]:
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
        "n_layers": [len(s4)],
        "ff": mlp[0]["layer.0.weight"].shape[0] // width if mlp else 0,
        "d_state": 2 * states,
        "unet": "down.0" in count,
        "glu": s4[0]["layer.output.weight"].shape[0] == 2 * width,
        "bidirectional": channels == 2,
        "tied": s4[0]["layer.log_A_real"].shape[0] == 1 < width,
        "scalar_norm": "blocks" if "norm.m" in s4[0] else "none",
        "l_max": lengths,
    }


def _rename(part: str) -> str:
    for pattern, ours in _PARTS:
        if match := re.fullmatch(pattern, part):
            return match.expand(ours)
    raise UserError(UNKNOWN.format(printable(part, 80)))


def _squeeze(key: str, value: Tensor) -> Tensor:
    """Weights of 1x1 convolutions (out, in, 1) and biases (out, 1) as those of linear layers."""
    if key.endswith("weight") and value.dim() == 3:
        return value.flatten(1)
    return value.flatten() if key.endswith("bias") else value


def _is_pool(part: State) -> bool:
    return "bias" in part


def _linear(part: State) -> State:
    """weight (out, in), bias (out,)."""
    return {"weight": part["weight"].flatten(1), "bias": part["bias"].flatten()}


def _state_space(block: State) -> int:
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
