"""Published files of every layout give what their own code gave, or one clear line."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from models import make
from safetensors.torch import save_file
from torch.nn import functional as F

from rawaudio import published_baselines
from rawaudio.checkpoint import load_checkpoint, save_checkpoint
from rawaudio.diffusion import step_features
from rawaudio.errors import CheckpointError
from rawaudio.files import sha256
from rawaudio.mel import log_mel, mel_filters

FIXTURES = Path(__file__).parent / "fixtures"
recorded = partial(torch.load, weights_only=True)
WAVEGAN = recorded(FIXTURES / "wavegan.pt")
SAMPLERNN = recorded(FIXTURES / "state_spaces_samplernn.pt")
DIFFWAVE = recorded(FIXTURES / "diffwave_wavenet.pt")
SIMPLE = recorded(FIXTURES / "published_ar.pt")


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=atol)


def renamed(state, *names):
    for old, new in names:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


def saved(path, content):
    torch.save(content, path)
    return path


def refused(path, *words, **settings):
    with pytest.raises(CheckpointError, match=re.escape(path.name)) as raised:
        load_checkpoint(path, **settings)
    said = str(raised.value)
    assert "\n" not in said and len(said) < 400 and all(word in said for word in words), said


LIGHTNING = [("^", "model."), (r"^model\.embedding\.", "encoder."),
             (r"^model\.head\.", "decoder.output_transform.")]  # fmt: skip
TODAY = [(r"^(en|de)coder\.", r"\1coder.0.")]  # the spelling of today's code


def wavenet(layers=10):
    return make("wavenet", layers=layers, blocks=1, sample_rate=16000, clip_length=16000)


@pytest.mark.parametrize("spelling", [[], TODAY])
@torch.no_grad()
def test_wavenet_of_the_release(spelling, tmp_path):
    """Bare, as the release has it, and as Lightning writes it; layers per block can be told."""
    ours = wavenet()
    state = renamed(ours.state_dict(), *LIGHTNING, *spelling)
    path = saved(tmp_path / "wavenet_sc09.pt", {"state_dict": state} if spelling else state)
    x = torch.randint(256, (2, 50))
    model = load_checkpoint(path)
    assert model.config.quantizer == "mulaw-published" and model.config.kernel_size == 2
    close(model(x), ours(x))
    told = load_checkpoint(path, layers=5, quantizer="linear")
    assert (told.config.blocks, told.config.quantizer) == (2, "linear")
    assert not torch.allclose(told(x), ours(x), atol=1e-3)
    state = renamed(wavenet(layers=4).state_dict(), *LIGHTNING)
    refused(saved(tmp_path / "short.pt", state), "4 layers are no blocks of 10", "layers=")


@pytest.mark.parametrize("data", ["sc09", "beethoven"])
@torch.no_grad()
def test_samplernn_of_the_release(data, tmp_path):
    """Recorded outputs; the quantiser, which decides what the tiers see, is the data set's."""
    quantizer = "linear" if data == "beethoven" else "mulaw-published"
    theirs = SAMPLERNN[quantizer]
    state = renamed(theirs["state_dict"], ("^", "model."))
    model = load_checkpoint(saved(tmp_path / f"samplernn_{data}.pt", state))
    assert model.config.quantizer == quantizer
    x = torch.cat([torch.full((2, 1), 128), theirs["x"].long()[:, :40]], 1)
    close(model(x)[:, ::4], theirs["from_silence"])


V3 = [(r"^sashimi\.", "model."), (r"^mu_embedder\.", "encoder."), ("log_w_real", "inv_w_real"),
      (r"^head\.", "decoder.output_transform."),
      (r"(layers.*\.norm)\.", r"\1.norm.ln.")]  # fmt: skip
V4 = [*V3, ("inv_w_real", "A_real"), ("w_imag", "A_imag"), ("log_dt", "inv_dt"),
      (r"kernel\.kernel", "layer.kernel"), (r"layer\.D", "layer.layer.D")]  # fmt: skip


def release(names, length="L"):
    """A trained SaShiMi of simple-sashimi, under the names of state-spaces."""
    state = {}
    for key, value in renamed(SIMPLE["model_state_dict"], *names).items():
        if not key.endswith((".omega", ".z")):
            state[key] = -value if key.endswith("A_imag") else value
        if key.endswith("kernel.C"):
            state[f"{key[:-1]}{length}"] = torch.tensor(1024)
    return {k: v[:, None] if k.endswith("inv_dt") else v for k, v in state.items()}


@pytest.mark.parametrize("state", [release(V3), release(V4, "l_kernel")], ids=["V3", "V4"])
@torch.no_grad()
def test_sashimi_of_the_release(state, tmp_path):
    """The same network in the names of both versions, with the quantiser of the release."""
    io = recorded(FIXTURES / "published_ar_io.pt")
    model = load_checkpoint(saved(tmp_path / "sashimi_sc09.pt", state))
    close(model(io["x"].long())[0, :256], io["exact"])
    assert model.config.quantizer == "mulaw-published" and model.config.tier_lengths == [1024] * 3
    backbone = {k: v for k, v in state.items() if k.startswith("model.")}
    assert not hasattr(load_checkpoint(saved(tmp_path / "bare.pt", backbone)), "head")


@torch.no_grad()
def test_norms_of_one_scale(tmp_path):
    """With m = 0 a layer norm of equal weights; in the recurrence too."""
    plain, scalar = {}, {}
    for key, value in release(V3).items():
        if match := re.fullmatch(r"(.+norm\.)ln\.(weight|bias)", key):
            is_scale = match[2] == "weight"
            plain[key] = torch.full_like(value, 1.5 if is_scale else 0)
            scalar[match[1] + ("s" if is_scale else "m")] = plain[key][:1]
        else:
            plain[key] = scalar[key] = value
    a, b = (load_checkpoint(saved(tmp_path / "w.pt", state)) for state in (plain, scalar))
    assert (a.config.scalar_norm, b.config.scalar_norm) == ("none", "blocks")
    x = torch.randint(256, (2, 101))
    close(a(x), b(x), 1e-3)  # the one has an epsilon
    scalar = {k: v + 0.3 if k.endswith("norm.m") else v for k, v in scalar.items()}
    model = load_checkpoint(saved(tmp_path / "w.pt", scalar))
    wanted = model(x)
    assert wanted.isfinite().all() and (wanted - b(x)).abs().max() > 0.1
    model.setup_rnn()
    state = model.default_state(model.told.rows(2, {}))
    close(torch.stack([model.step(now, state)[0] for now in x.T], 1), wanted)
    state = model.default_state(model.told.rows(2, {}))
    close(torch.cat([model.head(model.absorb(part, state)) for part in x.split(37, 1)], 1), wanted)
    save_checkpoint(tmp_path / "ours.safetensors", model)
    close(load_checkpoint(tmp_path / "ours.safetensors")(x), wanted)


def diffwave_file(name, path):
    """A recorded network as a published file. Its embedding of the step is a smaller one: its 8
    frequencies are among our 64, and all other weights of the embedding are zero."""
    state = dict(DIFFWAVE[name]["state_dict"])
    for key, value in state.items():
        if key == "residual_layer.fc_t1.weight":
            eighth = torch.arange(8) * 9  # 63 / 7: every ninth frequency
            state[key] = torch.zeros(512, 128)
            state[key][: len(value), torch.cat([eighth, 64 + eighth])] = value
        elif "fc_t" in key:
            grown = 512 if re.search(r"fc_t\d", key) else len(value)
            state[key] = torch.zeros(grown, *[512] * (value.dim() - 1))
            state[key][tuple(map(slice, value.shape))] = value
    optimizer = {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": []}
    return saved(path, {"model_state_dict": state, "optimizer_state_dict": optimizer})


@pytest.mark.parametrize("name", DIFFWAVE)
@pytest.mark.parametrize("how", ["published", "told", "today"])
@torch.no_grad()
def test_diffwave_of_diffwave_sashimi(name, how, tmp_path, monkeypatch, caplog):
    """Recorded outputs of both forms, which are stored with the weights: published files are known
    by their SHA-256, others are today's unless one tells."""
    record, path = DIFFWAVE[name], diffwave_file(name, tmp_path / "1000.pkl")
    if how == "published":
        monkeypatch.setattr(published_baselines, "PASSING_ON", {sha256(path)})
    told = {"cycle": record["config"]["dilation_cycle"]}
    model = load_checkpoint(path, **told | ({"residual_step": True} if how == "told" else {}))
    assert bool(caplog.messages) is (how == "today")
    assert model.config.unconditional is (name == "uncond")
    save_checkpoint(tmp_path / "ours.safetensors", model)
    wanted = record["y_f64" if how == "today" else "y_inplace_f64"][:, 0]
    for read in (model, load_checkpoint(tmp_path / "ours.safetensors")):
        close(read(record["x"][:, 0], record["steps"][:, 0], record.get("mel")), wanted)


def test_what_diffwave_files_do_not_hold(tmp_path):
    """Vocoders are those of LJSpeech: their rate, schedule and spectrogram."""
    path = diffwave_file("mel", tmp_path / "w.pkl")
    c = load_checkpoint(path).config
    assert (c.sample_rate, c.diffusion_steps, c.beta_last, c.cycle) == (22050, 50, 0.05, 10)
    assert (c.hop, c.n_mels, c.tacotron_mel) == (24, 80, True)
    assert load_checkpoint(path).vocode(torch.zeros(1, 80, 3)).shape == (1, 72)
    assert load_checkpoint(diffwave_file("uncond", path)).config.diffusion_steps == 200


def test_log_mel_of_tacotron():
    """Its frames by hand: mirrored ends, a Hann window centred on every 256th sample, 8 kHz."""
    wav = torch.rand(2000, generator=torch.Generator().manual_seed(0)) - 0.5
    mel = log_mel(wav, 22050, tacotron=True)
    assert mel.shape == (80, 8)
    window, padded = torch.hann_window(1024), torch.cat([wav[1:513].flip(0), wav])
    filters = mel_filters(22050, 80, 1024, 8000)
    for frame in range(5):
        magnitudes = torch.fft.rfft(padded[frame * 256 :][:1024] * window).abs()
        close(mel[:, frame], (filters @ magnitudes).clamp(min=1e-5).log(), 1e-4)
    assert not filters[:, 1024 * 8001 // 22050 + 1 :].any()
    assert log_mel(wav[:3], 22050, tacotron=True).shape == (80, 1)


STRIDES = [3, 4]


def noisy(shapes):
    rng = torch.Generator().manual_seed(1)
    return {
        key: torch.randn(shape, generator=rng) / max(1, shape[-1]) ** 0.5 if shape else 0
        for key, shape in shapes.items()
    }


def conv_shapes(name, outputs, inputs):
    return {f"{name}.conv.bias": (outputs,), f"{name}.conv.weight_g": (outputs, 1, 1),
            f"{name}.conv.weight_v": (outputs, inputs, 1)}  # fmt: skip


def hearing(place, width):
    """Weights by which a block hears, with their norms."""
    shapes = conv_shapes(f"{place}.mel_conv", width, 80)
    for i, stride in enumerate(STRIDES):
        name = f"{place}.upsample_conv2d.{i}"
        shapes |= {f"{name}.bias": (1,), f"{name}.weight_v": (1, 1, 3, 2 * stride),
                   f"{name}.weight_g": (1, 1, 1, 1)}  # fmt: skip
    return noisy(shapes)


def heard(state, place, mel, length):
    """What the published blocks add to their S4 layer's output, (B, D, length)."""
    y = mel[:, None]
    for i, s in enumerate(STRIDES):
        name = f"{place}.upsample_conv2d.{i}"
        y = F.conv_transpose2d(y, weight(state, name), state[f"{name}.bias"], (1, s), (1, s // 2))
        y = F.leaky_relu(y, 0.4)
    name = f"{place}.mel_conv.conv"
    return F.conv1d(y[:, 0, :, :length], weight(state, name), state[f"{name}.bias"])


def weight(state, name):
    """Weight normalisation over all but the first dimension."""
    return torch._weight_norm(state[f"{name}.weight_v"], state[f"{name}.weight_g"], 0)


@torch.no_grad()
def test_the_vocoder_of_simple_sashimi(tmp_path):
    """Every S4 block adds what it hears to its layer's output, in coarser tiers the first columns
    of the full rate; with deaf weights it is the recorded network."""
    content = recorded(FIXTURES / "published_diffwave.pt")
    state = content["state_dict"] | {
        key: (a.double() @ b.double()).float() for key, (a, b) in content["factors"].items()
    }
    blocks = {key.removesuffix(".fc_t.bias"): len(x) for key, x in state.items()
              if key.endswith(".fc_t.bias")}  # fmt: skip
    ears = {k: v for place, width in blocks.items() for k, v in hearing(place, width).items()}
    yaml = content["cfg_yaml"].replace("unconditional: true", "unconditional: false")
    assert yaml != content["cfg_yaml"]
    deaf = {k: 0 * v if k.endswith(("conv.weight_g", "conv.bias")) else v for k, v in ears.items()}
    x, steps = content["x"], content["steps"]
    mel = torch.randn(2, 80, -(-x.shape[1] // 12))

    def loaded(weights):
        content = {"model_state_dict": state | weights, "cfg_yaml": yaml}
        return load_checkpoint(saved(tmp_path / "vocoder.pt", content))

    close(loaded(deaf)(x, steps, mel), content["y"])
    model = loaded(ears)
    order = sorted(blocks, key=lambda place: ("dcu".index(place.removeprefix("sashimi.")[0]),
                                              *map(int, re.findall(r"\d+", place))))  # fmt: skip
    for slot, place in enumerate(order):
        length = x.shape[1] // [1, 4, 16][(blocks[place] // 16).bit_length() - 1]
        ours = model.hear[slot](mel, length).transpose(1, 2)
        close(ours, heard(state | ears, place, mel, length))
    assert (model(x, steps, mel) - content["y"]).abs().max() > 0.1
    audio = model.vocode(model.log_mel(torch.rand(1, 96) - 0.5))
    assert audio.shape == (1, 96) and audio.isfinite().all()
    with torch.enable_grad():
        model(x, steps, mel).square().mean().backward()
    assert all(p.grad.any() for p in model.hear.parameters())
    refused(saved(tmp_path / "none.pt", {"model_state_dict": state, "cfg_yaml": yaml}),
            "unconditional")  # fmt: skip


WIDTHS, LENGTH = [8, 16, 32], 64  # of the tiers, pooled by 4; samples


def paired_shapes(vocoder, states=4):
    """Names and shapes of a small SaShiMi of diffwave-sashimi: one pair in each place."""
    d = WIDTHS[0]
    shapes = {"fc_t1.weight": (512, 128), "fc_t1.bias": (512,), "fc_t2.weight": (512, 512),
              "fc_t2.bias": (512,), "final_conv.2.conv.weight": (1, d, 1),
              "final_conv.2.conv.bias": (1,), "norm.m": (1,), "norm.s": (1,),
              **conv_shapes("init_conv.0", d, 1), **conv_shapes("final_conv.0", d, d)}  # fmt: skip
    places = {}
    for tier, (fine, coarse) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False)):
        places |= {f"d_layers.{2 * tier}": fine, f"u_layers.{3 - 2 * tier}": fine}
        shapes |= conv_shapes(f"d_layers.{2 * tier + 1}.linear", coarse, 4 * fine)
        shapes |= conv_shapes(f"u_layers.{2 - 2 * tier}.linear", 4 * fine, coarse)
    for place, h in (places | {"c_layers.0": WIDTHS[2]}).items():
        kernel = f"{place}.layer.kernel.kernel"
        shapes |= {f"{place}.fc_t.weight": (h, 512), f"{place}.fc_t.bias": (h,),
                   f"{place}.layer.D": (1, h), f"{kernel}.C": (2, h, states, 2),
                   f"{kernel}.log_dt": (h,), f"{kernel}.B": (1, h, states, 2),
                   f"{kernel}.P": (1, h, states, 2), f"{kernel}.inv_w_real": (h, states),
                   f"{kernel}.w_imag": (h, states), f"{kernel}.L": (),
                   f"{place}.layer.output_linear.0.weight": (2 * h, h),
                   f"{place}.layer.output_linear.0.bias": (2 * h, 1),
                   **{f"{place}.norm{i}.{x}": (1,) for i in (1, 2) for x in "ms"},
                   **conv_shapes(f"{place}.ff.ff.0", 2 * h, h),
                   **conv_shapes(f"{place}.ff.ff.2", h, 2 * h)}  # fmt: skip
        if vocoder:
            shapes |= {k: tuple(v.shape) for k, v in hearing(place, h).items()}
    return shapes


def paired_network(state, model, x, steps, mel):
    """diffwave-sashimi's network from its weights, but for the S4 layers, which are the model's."""
    layers = iter(block.layer for block in model.backbone.s4_blocks())

    def norm(name, x):  # (B, D, L)
        std, mean = torch.std_mean(x, 1, correction=0, keepdim=True)
        return state[f"{name}.s"] / std * (x - mean + state[f"{name}.m"])

    def conv(name, x):
        return F.conv1d(x, weight(state, f"{name}.conv"), state[f"{name}.conv.bias"])

    def pair(place, x):
        told = F.linear(step, state[f"{place}.fc_t.weight"], state[f"{place}.fc_t.bias"])
        u = norm(f"{place}.norm1", x) + told[..., None]
        y = next(layers)(u.transpose(1, 2)).transpose(1, 2)
        x = x + y + (0 if mel is None else heard(state, place, mel, x.shape[2]))
        wide = F.gelu(conv(f"{place}.ff.ff.0", norm(f"{place}.norm2", x)))
        return x + conv(f"{place}.ff.ff.2", wide)

    def down(place, x):  # four samples side by side, each feature's together
        return conv(f"{place}.linear", x.unflatten(2, (-1, 4)).transpose(2, 3).flatten(1, 2))

    def up(place, x):
        y = conv(f"{place}.linear", x)
        return y.unflatten(1, (-1, 4)).transpose(2, 3).flatten(2)

    step = step_features(steps).float()
    for name in ("fc_t1", "fc_t2"):
        step = F.silu(F.linear(step, state[f"{name}.weight"], state[f"{name}.bias"]))
    x, skips = conv("init_conv.0", x[:, None]).relu(), []
    for i in range(4):
        skips.append(x)
        x = (down if i % 2 else pair)(f"d_layers.{i}", x)
    x = x + pair("c_layers.0", x)
    for i in range(4):
        x = (pair if i % 2 else up)(f"u_layers.{i}", x) + skips.pop()
    y = conv("final_conv.0", norm("norm", x)).relu()
    return F.conv1d(y, state["final_conv.2.conv.weight"], state["final_conv.2.conv.bias"])[:, 0]


@pytest.fixture(params=[False, True], ids=["unconditional", "vocoder"])
def paired(request):
    state = noisy(paired_shapes(request.param))
    for key in state:
        if key.endswith((".s", "weight_g")):
            state[key] = 1 + 0.2 * state[key]
        if key.endswith(".L"):
            tier = WIDTHS.index(state[key.replace("kernel.kernel.L", "D")].shape[1])
            state[key] = torch.tensor(LENGTH >> 2 * tier)
        if key.endswith("log_dt"):
            state[key] = state[key] - 4
    return state, request.param


@torch.no_grad()
def test_sashimi_of_diffwave_sashimi(paired, tmp_path):
    """Skips around pairs, norms of one scale, weight norm, each tier's length; what is heard."""
    state, vocoder = paired
    path = saved(tmp_path / "200.pkl", {"model_state_dict": state, "optimizer_state_dict": {}})
    model = load_checkpoint(path)
    c = model.config
    assert c.pair_skips and c.unet and c.scalar_norm == "all" and c.tier_lengths == [64, 16, 4]
    assert c.unconditional is not vocoder and c.sample_rate == (22050 if vocoder else 16000)
    x, steps = torch.randn(2, LENGTH), torch.tensor([3, 40])
    mel = torch.randn(2, 80, 6) if vocoder else None
    close(model(x, steps, mel), paired_network(state, model, x, steps, mel))
    if vocoder:
        assert model.vocode(mel).isfinite().all()
    else:
        assert model.generate(1, steps=2, length=50).isfinite().all()  # 50: no multiple of 16
    save_checkpoint(tmp_path / "ours.safetensors", model)
    close(load_checkpoint(tmp_path / "ours.safetensors")(x, steps, mel), model(x, steps, mel))


def test_the_names_and_shapes_of_diffwave_sashimi_are_the_true_ones(monkeypatch):
    """At 64 features and six pairs in each place, 7,734,267 parameters."""
    monkeypatch.setattr(f"{__name__}.WIDTHS", [64, 128, 256])
    in_pair = re.compile(r"[dcu]_layers\.\d\.(?!linear)")
    shapes = {key: shape for key, shape in paired_shapes(False, 32).items() if shape}
    sizes = {key: int(np.prod(shape)) for key, shape in shapes.items()}
    assert sum(n * (6 if in_pair.match(key) else 1) for key, n in sizes.items()) == 7_734_267


def wavegan_file(name, how, folder):
    record = WAVEGAN[name]
    if name == "port":
        both = {key: record[key] for key in ("generator", "discriminator")}
        content = {"whole": both | {"n_iterations": 5}, "alone": both["generator"]}[how]
        return saved(folder / "gan.tar", content)
    adam = {f"{key}/Adam": 0 * value for key, value in record["weights"].items()}
    variables = record["weights"] | adam | {"beta1_power": torch.tensor(0.5)}
    path = folder / f"wavegan.{how}"
    if how == "npz":
        np.savez(path, global_step=7, **{k: v.numpy() for k, v in variables.items()})
    else:
        save_file({k: v.contiguous() for k, v in variables.items()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "how"),
    [("zeros", "npz"), ("nearest", "npz"), ("zeros", "safetensors"), ("port", "whole"),
     ("port", "alone")],
)  # fmt: skip
@torch.no_grad()
def test_wavegan_in_both_layouts(name, how, tmp_path):
    """Recorded audio, with each one's padding; optimizers and critic are left."""
    model = load_checkpoint(wavegan_file(name, how, tmp_path))
    assert model.config.padding == ("torch" if name == "port" else "tensorflow")
    assert (model.sample_rate, model.config.slice_len) == (16000, 16384)
    close(model(WAVEGAN[name]["z"])[:, ::16], WAVEGAN[name]["y_f64"])


def test_files_that_are_torn_or_lack_something_are_one_line(tmp_path):
    whole = wavegan_file("zeros", "npz", tmp_path)
    torn = tmp_path / "torn.npz"
    torn.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    refused(torn, "not a whole .npz file")
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "objects.npz", **{"G/z_project/dense/kernel": objects})
    refused(tmp_path / "objects.npz")
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    refused(tmp_path / "other.npz", "not a checkpoint of this library, nor")
    np.savez_compressed(tmp_path / "packed.npz", weight=np.zeros(10**6))
    refused(tmp_path / "packed.npz", "compressed")
    refused(tmp_path / "none.npz", "not there")
    diffwave = recorded(diffwave_file("uncond", tmp_path / "whole.pkl"))
    states = {  # the state, a key that it needs -> what is said without it
        "wavenet": (renamed(wavenet().state_dict(), *LIGHTNING), "model.end_conv_1.weight"),
        "samplernn": (SAMPLERNN["linear"]["state_dict"], "sample_level_mlp.embedding.weight"),
        "wavegan": (WAVEGAN["zeros"]["weights"], "G/upconv_3/conv2d_transpose/bias"),
        "port": (WAVEGAN["port"]["generator"], "fc1.bias"),
        "diffwave": (diffwave["model_state_dict"], "residual_layer.fc_t1.bias"),
        "sashimi": (release(V3), "model.norm.weight"),
    }
    for name, (state, key) in states.items():
        assert key in state
        path = saved(tmp_path / f"{name}.pt", {k: v for k, v in state.items() if k != key})
        refused(path, "lacks")
        wrong = state | {key: torch.cat([state[key], state[key]])}
        refused(saved(path, wrong))


@pytest.mark.parametrize(
    ("keys", "words"),
    [(["G/z_project/dense/kernel", "G/upconv_0/batch_normalization/gamma"], "batch norm"),
     (["deconv_list.0.transpose_ops.1.running_mean"], "batch norm"),
     (["fc_t1.weight", "c_layers.0.layer.kernel.krylov.C"], "checkpoints"),
     (["fc_t1.weight", "c_layers.0.layer.colour"], "layer.colour")],
)  # fmt: skip
def test_networks_and_settings_that_are_not_understood_are_named(keys, words, tmp_path):
    refused(saved(tmp_path / "w.pt", dict.fromkeys(keys, torch.zeros(1))), words)
    path = wavegan_file("zeros", "npz", tmp_path)
    refused(path, "paddding", paddding="torch")
    refused(path, "padding", padding="same")
