"""DiffWave with its own network is that of the published code, in both of its forms."""

from math import prod
from pathlib import Path

import pytest
import torch

from baselines.diffwave import SMALL, DiffWave, DiffWaveConfig

# albertfgu/diffwave-sashimi d35c153b and 9bd78f8c (MIT), see fixtures/README.md
RECORDED = torch.load(Path(__file__).parent / "fixtures" / "diffwave_wavenet.pt", weights_only=True)
NAMES = [
    ("residual_layer.fc_t1", "embed_step.0"), ("residual_layer.fc_t2", "embed_step.2"),
    ("residual_layer.", ""), ("dilated_conv_layer.conv", "dilated_conv"),
    ("mel_conv.conv", "mel_conv"), ("upsample_conv2d", "upsample"),
    ("init_conv.0.conv", "init_conv"), ("final_conv.0.conv", "final_conv.0"),
    ("final_conv.2.conv", "final_conv.2"),
]  # fmt: skip


def recorded(name, **settings):
    """The recorded model. Its embedding of the step is a smaller one: its 8 frequencies are among
    our 64, and all other weights of the embedding are zero."""
    c = RECORDED[name]["config"]
    model = DiffWave(
        DiffWaveConfig(
            residual_channels=c["res_channels"],
            skip_channels=c["skip_channels"],
            layers=c["num_res_layers"],
            cycle=c["dilation_cycle"],
            unconditional=c["unconditional"],
            hop=prod(c.get("mel_upsample", [256])),
            **settings,
        )
    ).eval()
    weights = model.state_dict()
    for key, theirs in RECORDED[name]["state_dict"].items():
        for old, new in NAMES:
            key = key.replace(old, new)
        ours = weights[key]
        if "embed_step" not in key and "fc_t.weight" not in key:
            assert ours.shape == theirs.shape, key
        ours.zero_()
        if key == "embed_step.0.weight":
            eighth = torch.arange(8) * 9  # 63 / 7: every ninth frequency
            ours[: len(theirs), torch.cat([eighth, 64 + eighth])] = theirs
        else:
            ours[tuple(map(slice, theirs.shape))] = theirs
    return model


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize(("residual_step", "key"), [(False, "y_f64"), (True, "y_inplace_f64")])
@torch.no_grad()
def test_it_is_the_recorded_network(name, residual_step, key):
    """Without and with mel spectrograms, also at a rate of upsampling that is odd; as published
    code is, and as the published weights need it."""
    record, model = RECORDED[name], recorded(name, residual_step=residual_step)
    y = model(record["x"][:, 0], record["steps"][:, 0], record.get("mel"))
    assert (y - record[key][:, 0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "numbers", "tensors"),
    [
        ({}, 24_071_681, 408),
        (SMALL, 6_827_393, 342),
        ({"unconditional": False}, 25_590_161, 732),
        (SMALL | {"skip_channels": 128, "unconditional": False}, 6_914_297, 612),
    ],
)
def test_its_sizes_are_the_published_ones(settings, numbers, tensors):
    with torch.device("meta"):
        state = DiffWave(DiffWaveConfig(**settings)).state_dict()
    assert (sum(x.numel() for x in state.values()), len(state)) == (numbers, tensors)


def test_untrained_it_predicts_nothing():
    model = DiffWave(DiffWaveConfig(layers=2, residual_channels=4, skip_channels=4))
    assert not model(torch.randn(2, 30), torch.tensor([1, 2])).any()


def test_normed_weights_begin_as_torch_s_own_and_decay():
    """Their length is that of their direction: a weight drawn as torch's convolutions draw it."""
    torch.manual_seed(0)
    model = DiffWave(DiffWaveConfig(layers=1, residual_channels=64, skip_channels=8))
    ours, theirs = model.residual_blocks[0].dilated_conv, torch.nn.Conv1d(64, 128, 3)
    assert torch.allclose(ours.weight, ours.weight_v)
    assert ours.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.03)
    assert ours.bias.abs().max() <= 192**-0.5
    decaying = {id(p) for p in model.parameter_groups()["weights"]}
    assert {id(ours.weight_g), id(ours.weight_v)} <= decaying and id(ours.bias) not in decaying
