"""WaveGAN is the published network, and its port, to the last sample."""

from pathlib import Path

import pytest
import torch

from baselines.wavegan import WaveGAN, WaveGANConfig, WaveGANCritic, shift
from rawaudio.critics import WASSERSTEIN
from rawaudio.errors import UserError

# chrisdonahue/wavegan 40e85e8a, mostafaelaraby/wavegan-pytorch b3c6b6e6, see fixtures/README.md
RECORDED = torch.load(Path(__file__).parent / "fixtures" / "wavegan.pt", weights_only=True)


TENSORFLOW = [
    ("G/", ""), ("D/", ""), ("conv_", "conv."), ("/conv2d_transpose", ""), ("/conv1d", ""),
    ("/dense", ""), ("/kernel", ".weight"), ("/bias", ".bias"),
]  # fmt: skip
PORT = [("fc1", "z_project"), ("deconv_list", "upconv"), (".transpose_ops.0", "")]
PORT_CRITIC = [("fc1", "output"), ("conv_layers", "downconv"), (".conv1d", "")]


def renamed(weights, names):
    for old, new in names:
        weights = {key.replace(old, new): value for key, value in weights.items()}
    return weights


def transposed(x):
    """TensorFlow's layouts: dense (in, out), width first in convolutions, as pictures of a row."""
    x = x[0] if x.dim() == 4 else x
    return x.permute(*reversed(range(x.dim())))


def networks(name):
    """The recorded generator and critic; of the first record, the generator alone."""
    record, c = RECORDED[name], RECORDED[name]["config"]
    if name == "port":
        sizes = {"channels": c["model_size"], "latent_dim": c["latent_dim"]}
        config = WaveGANConfig(**sizes, padding="torch")
        weights = renamed(record["generator"], PORT), renamed(record["discriminator"], PORT_CRITIC)
        time_first = torch.arange(512).view(32, 16).T.flatten()  # theirs: features first
        for key in ("z_project.weight", "z_project.bias"):
            weights[0][key] = weights[0][key][time_first]
        weights[1]["output.weight"] = weights[1]["output.weight"][:, time_first]
    else:
        sizes = {"channels": c["dim"], "latent_dim": c["latent_dim"], "filter_taps": c["pp_len"]}
        config = WaveGANConfig(**sizes, upsampling=c["upsample"].replace("nn", "nearest"))
        both = {k: transposed(v) for k, v in record["weights"].items()}
        both = [{k: v for k, v in both.items() if k[0] == network} for network in "GD"]
        weights = [renamed(network, TENSORFLOW) for network in both]
    generator, critic = WaveGAN(config).eval(), WaveGANCritic(config)
    generator.load_state_dict(weights[0])
    if weights[1]:
        critic.load_state_dict(weights[1])
    return generator, critic


def close(ours, theirs):
    return (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_the_generator_is_the_recorded_one(name):
    """By zeros or repeated samples, with the filter, and with the port's padding."""
    generator, _ = networks(name)
    y = generator(RECORDED[name]["z"])
    assert y.shape[1] == 16384 and close(y[:, ::16], RECORDED[name]["y_f64"])


def test_the_critic_and_its_losses_are_the_recorded_ones():
    """Answers to real and made audio, with its maps shifted; slope between them, both losses."""
    record, (generator, critic) = RECORDED["nearest"], networks("nearest")
    x, made = record["x"], generator(record["z"])
    real, fake = critic(x), critic(made)
    assert close(real, record["d_x_f64"]) and close(fake, record["d_y_f64"])
    assert close(critic.answer(x, None, record["shifts"]), record["d_x_shifted_f64"])
    penalty = WASSERSTEIN.penalty(critic, x, made, record["alpha"])
    assert close(penalty, (record["slopes_f64"] - 1).square())
    losses = WASSERSTEIN.critic(real, fake) + 10 * penalty, WASSERSTEIN.generator(fake)
    wanted = [record["d_loss_f64"], record["g_loss_f64"]]
    assert [loss.mean().item() for loss in losses] == pytest.approx(wanted, abs=1e-5)
    _, critic = networks("port")
    assert close(critic(RECORDED["port"]["x"]), RECORDED["port"]["d_x_f64"])


def test_phase_shuffle_moves_and_mirrors():
    x = torch.arange(6.0)[None, None]
    assert shift(x, 2).flatten().tolist() == [2, 1, 0, 1, 2, 3]
    assert shift(x, -2).flatten().tolist() == [2, 3, 4, 5, 4, 3] and torch.equal(shift(x, 0), x)
    critic = WaveGANCritic(WaveGANConfig(channels=2))
    x = torch.randn(1, 16384, generator=torch.Generator().manual_seed(0))

    def answer(seed):
        return critic(x, rng=torch.Generator().manual_seed(seed)).item()

    assert answer(1) == answer(1) and len({answer(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [({}, (19_065_345, 17_427_969)),
     ({"filter_taps": 512, "upsampling": "nearest"}, (19_065_857, 17_427_969)),
     ({"slice_len": 32768}, (73_149_953, 69_875_201)),
     ({"slice_len": 65536}, (73_149_953, 69_875_201))],
)  # fmt: skip
def test_sizes_are_the_published_ones(settings, numbers):
    config = WaveGANConfig(**settings)
    with torch.device("meta"):
        generator, critic = WaveGAN(config), WaveGANCritic(config)
        made = generator(torch.zeros(1, 100))
        assert made.shape == (1, config.slice_len) and critic(made).shape == (1,)
    both = (generator, critic)
    assert tuple(sum(p.numel() for p in network.parameters()) for network in both) == numbers


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"slice_len": 10_000, "clip_length": 100}, "power of 2"),
     ({"slice_len": 8192}, "clip_length=16000: must be at most 8192"),
     ({"padding": "same"}, "tensorflow or torch"), ({"upsampling": "linear"}, "zeros or nearest"),
     ({"phase_shuffle": 16}, "phase_shuffle=16"), ({"critic_steps": 0}, "critic_steps=0"),
     ({"channels": 10**9}, "at most"), ({"augment": 1.0}, "augment=1.0")],
)  # fmt: skip
def test_settings_that_make_no_model_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        WaveGANConfig(**settings)
