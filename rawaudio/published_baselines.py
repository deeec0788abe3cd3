"""Published weights of the systems that SaShiMi is compared with: see published.py.

A reader takes a file's name, its state dict and what is known better of it, and gives the family,
settings of its config, and the tensors under our names.
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch

from rawaudio.errors import UserError
from rawaudio.files import sha256
from rawaudio.published_sashimi import (
    ENDS,
    Found,
    State,
    count,
    heard,
    quantized,
    read_yaml,
    renamed,
)

log = logging.getLogger(__name__)


# ---- state-spaces/s4 ----------------------------------------------------------------------------


def wavenet(path: Path, state: State, known: dict[str, Any]) -> Found:
    """WaveNet. Its dilations are in no file: blocks of 10 layers, as published."""
    first, last = state["filter_convs.0.weight"], state["end_conv_1.weight"]
    n, layers = count(state, r"filter_convs\.\d+\.weight"), int(known.get("layers", 10))
    if n % layers:
        raise UserError(f"its {n} layers are no blocks of {layers}: load_checkpoint(..., layers=)")
    config = {
        "layers": layers,
        "blocks": n // layers,
        "residual_channels": first.shape[1],
        "dilation_channels": first.shape[0],
        "kernel_size": first.shape[2],
        "skip_channels": last.shape[1],
        "end_channels": last.shape[0],
    }
    return "wavenet", config | quantized(path), renamed(state, ENDS)


def samplernn(path: Path, state: State, known: dict[str, Any]) -> Found:
    """SampleRNN."""
    tiers = count(state, r"frame_level_rnns\.\d+\.upsampling\.bias")
    sizes = [state[f"frame_level_rnns.{i}.upsampling.bias"].shape for i in range(tiers)]
    config = {
        "frame_sizes": [size[1] for size in sizes],
        "n_rnn": count(state, r"frame_level_rnns\.0\.rnn\.weight_ih_l\d+"),
        "d_hidden": sizes[0][0],
        "d_embedding": state["sample_level_mlp.embedding.weight"].shape[1],
    }
    return "samplernn", config | quantized(path), state


# ---- DiffWave -----------------------------------------------------------------------------------

# SHA-256 of the files whose layers pass on the embedding of the step: diffwave-sashimi's of 500,000
# steps, DiffWave-unconditional's of 1,000,000, diffwave-sashimi's small one.
PASSING_ON = {
    "07497675168e0322cca7ec4e9c65dedd0bcc74e7fe6040c017682ce93e32775f",
    "f34b9bcca4970572775fff15dbccda09f7ec8d56befe113620e1ad25eee416e1",
    "4d0d84bb1576c67b4c6e61bf28eddeb4ebbcef28f7fe773797e4f2eacb762114",
}
DIFFWAVE = [
    (r"^residual_layer\.fc_t1\.", "embed_step.0."),
    (r"^residual_layer\.fc_t2\.", "embed_step.2."),
    (r"^residual_layer\.", ""),
    (r"\.dilated_conv_layer\.conv\.", ".dilated_conv."),
    (r"\.mel_conv\.conv\.", ".mel_conv."),
    (r"\.upsample_conv2d\.", ".upsample."),
    (r"^init_conv\.0\.conv\.", "init_conv."),
    (r"^final_conv\.(\d)\.conv\.", r"final_conv.\1."),
]
UPSAMPLE = "residual_blocks.0.upsample.{}.weight_v"
# Of vocoders of LJSpeech: diffwave-sashimi's, and DiffWave-Vocoder's with 64 features.
LJSPEECH = {"sample_rate": 22050, "unconditional": False, "tacotron_mel": True,
            "diffusion_steps": 50, "beta_last": 0.05}  # fmt: skip


def diffwave(path: Path, state: State, known: dict[str, Any]) -> Found:
    """DiffWave with its own network, and its vocoders.

    In no file: the dilations begin again after 12 of 36 layers, else after 10; the schedule, that
    of the data set; and whether the layers pass on the embedding of the step, which the code of
    published weights did and today's does not. A published file is known by its SHA-256.
    """
    state = renamed(state, DIFFWAVE)
    skip = state["residual_blocks.0.skip_conv.weight_v"]
    layers = count(state, r"residual_blocks\.\d+\.fc_t\.weight")
    config: dict[str, Any] = {
        "residual_channels": skip.shape[1],
        "skip_channels": skip.shape[0],
        "layers": layers,
        "cycle": 12 if layers == 36 else 10,
    }
    if "residual_blocks.0.mel_conv.weight_v" in state:
        config |= LJSPEECH | heard(*(state[UPSAMPLE.format(i)] for i in (0, 1)))
        config["n_mels"] = state["residual_blocks.0.mel_conv.weight_v"].shape[1]
        if skip.shape[:2] == (128, 128):  # DiffWave-Vocoder's larger one
            config |= {"diffusion_steps": 200, "beta_last": 0.02}
    config["residual_step"] = sha256(path) in PASSING_ON
    if not config["residual_step"] and "residual_step" not in known:
        log.warning(
            "%s: its SHA-256 is no published one's, so that its layers are taken not to pass on "
            "the step's embedding; where it gives noise: load_checkpoint(..., residual_step=True)",
            path,
        )
    return "diffwave_wavenet", config, state


# ---- WaveGAN ------------------------------------------------------------------------------------

TENSORFLOW = [
    (r"^G/", ""), (r"^upconv_", "upconv."), (r"/(conv2d_transpose|conv1d|dense)/", "."),
    (r"\.kernel$", ".weight"),
]  # fmt: skip
PORT = [(r"^fc1\.", "z_project."), (r"^deconv_list\.", "upconv."), (r"\.transpose_ops\.\d\.", ".")]
NORMALISED = "with batch normalisation, which is not understood"


def wavegan(path: Path, state: State, known: dict[str, Any]) -> Found:
    """WaveGAN's generator by TensorFlow's names and layouts; the critic, and what the optimizers
    remember, are left. Of six layers the last has stride 4: 65,536 samples."""
    if any(re.match(r"G/.*batch_norm", key) for key in state):
        raise UserError(NORMALISED)
    own = r"G/\w+/(conv2d_transpose|conv1d|dense)/(kernel|bias)"
    kept = {key: value for key, value in state.items() if re.fullmatch(own, key)}
    zeros = any("conv2d_transpose" in key for key in kept)
    # dense (in, out), width first in convolutions, in pictures of one row
    turned = {key: (x[0] if x.dim() == 4 else x) for key, x in kept.items()}
    turned = {key: x.permute(*reversed(range(x.dim()))) for key, x in turned.items()}
    return _wavegan(renamed(turned, TENSORFLOW), zeros, "tensorflow")


def wavegan_port(path: Path, state: State, known: dict[str, Any]) -> Found:
    """The generator of wavegan-pytorch, without its batch normalisations, which nothing used."""
    if any(re.match(r"deconv_list\..*running_mean", key) for key in state):
        raise UserError(NORMALISED)
    zeros = any(key.endswith("transpose_ops.0.weight") for key in state)
    state = renamed({key: x for key, x in state.items() if not key.startswith("bn1.")}, PORT)
    for key in ("z_project.weight", "z_project.bias"):  # its features first, our samples first
        state[key] = state[key].unflatten(0, (-1, 16)).transpose(0, 1).flatten(0, 1)
    return _wavegan(state, zeros, "torch")


def _wavegan(state: State, zeros: bool, padding: str) -> Found:
    layers = count(state, r"upconv\.\d+\.weight")
    last, taps = state[f"upconv.{layers - 1}.weight"], state.get("pp_filt.weight", torch.empty(0))
    length = 16 * 4**layers
    config = {
        "slice_len": length,
        "clip_length": min(16000, length),
        "channels": last.shape[0 if zeros else 1],
        "latent_dim": state["z_project.weight"].shape[1],
        "upsampling": "zeros" if zeros else "nearest",
        "filter_taps": taps.shape[-1],
        "padding": padding,
    }
    return "wavegan", config, state


# ---- ASGAN --------------------------------------------------------------------------------------


def asgan(state: State | None, cfg_yaml: str) -> Found:
    """The generator of simple-asgan's trainer; its filters follow from its settings."""
    if state is None:
        raise UserError(
            "it lacks g_ema_state_dict, the averaged weights: the trainer writes them from step "
            "5,000 on, and never into its best checkpoint"
        )
    settings = read_yaml(cfg_yaml)
    c = settings["rp_w_cfg"]
    channels, kernels, frames = zip(*c["layer_specs"], strict=True)
    if len(set(kernels)) > 1:
        raise UserError("kernels of several sizes, which is not understood")
    frames = [int(n) for n in frames]
    hop, n_fft = (160, 1024) if "mel" in str(settings["data_type"]) else (320, 400)
    length = frames[-1] * hop
    config = {
        "latent_dim": int(c["z_dim"]), "w_dim": int(c["w_dim"]), "w_layers": int(c["w_layers"]),
        "fourier_channels": int(c["ff_channels"]), "plain_fourier": not c["use_sg3_ff"],
        "channels": [int(n) for n in channels], "frames": frames, "kernel": int(kernels[0]),
        "head_kernel": int(c["head_spec"][1]), "bands": int(c["c_dim"]),
        "first_cutoff": float(c["first_cutoff"]), "last_cutoff": float(c["last_cutoff"]),
        "critical_layers": int(c["num_critical"]), "slope": float(c["lrelu_coeff"]),
        "equalized": bool(c["equalized_lr"]), "compat": True,
        "features": "mel" if hop == 160 else "hubert", "hop": hop, "n_fft": n_fft,
        "margin": max(0, 16000 - length) // 2, "feature_mean": 0.0, "feature_std": 1.0,
    }  # fmt: skip
    config["clip_length"] = length + 2 * config["margin"]
    tensors = {
        name.replace("W.fcs.", "mapping."): value
        for name, value in state.items()
        if "_lpf_filter" not in name
    }
    return "asgan", config, tensors
