"""WaveNet is that of state-spaces/s4."""

from pathlib import Path

import pytest
import torch
from torch import nn

from baselines.wavenet import WaveNet, WaveNetConfig
from rawaudio.errors import UserError
from sashimi.mulaw import SILENCE

# state-spaces/s4 e757cef5 (Apache-2.0), see fixtures/README.md
RECORDED = torch.load(
    Path(__file__).parent / "fixtures" / "state_spaces_wavenet.pt", weights_only=True
)


@pytest.fixture
def recorded():
    """The recorded model, its 16 classes the first of ours, and classes that stand for its input:
    there embedded already, here rows of an embedding."""
    config = {k: v for k, v in RECORDED["config"].items() if k != "classes"}
    model = WaveNet(WaveNetConfig(**config)).eval()
    weights = model.state_dict()
    for name, theirs in RECORDED["state_dict"].items():
        weights[name] = torch.zeros_like(weights[name])
        weights[name][tuple(map(slice, theirs.shape))] = theirs
    model.load_state_dict(weights)
    model.embedding = nn.Embedding.from_pretrained(
        torch.nn.functional.pad(RECORDED["x"].flatten(0, 1), (0, 256 - 16))
    )
    return model, torch.arange(2 * 160).view(2, 160)


@torch.no_grad()
def test_it_is_the_recorded_network(recorded):
    model, x = recorded
    first = RECORDED["receptive_field"]
    assert model.config.receptive_field == first
    y = model.features(x, model.told.rows(2, {}))[:, first:, :16]
    assert (y - RECORDED["y_f64"]).abs().max() < 1e-6


@torch.no_grad()
def test_its_step_is_the_recorded_step(recorded):
    """Which begins with queues of zeros."""
    model, x = recorded
    nn.init.eye_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    model.setup_rnn()
    state = model.default_state(model.told.rows(2, {}))
    for queue in state.queues:
        queue.zero_()
    y = torch.stack([model.step(now, state)[0] for now in x.T], 1)
    assert (y[..., :16] - RECORDED["step"]).abs().max() < 1e-6


@pytest.mark.parametrize("kernel_size", [2, 3])
@torch.no_grad()
def test_before_a_clip_there_is_silence(kernel_size):
    """As if class 128 stood before it for as long as the network looks back, and not one sample
    more: it would be heard."""
    torch.manual_seed(0)
    config = WaveNetConfig(layers=3, blocks=2, skip_channels=16, kernel_size=kernel_size)
    model, x = WaveNet(config).eval(), torch.randint(256, (2, 20))
    silence = torch.full((2, config.receptive_field), SILENCE)
    padded = torch.cat([silence, x], 1)
    wanted = model(padded)
    assert torch.allclose(model(x), wanted[:, silence.shape[1] :], atol=1e-6)
    last = x.shape[1] - 1 + silence.shape[1]
    for back, heard in ((config.receptive_field - 1, True), (config.receptive_field, False)):
        changed = padded.clone()
        changed[:, last - back] = 7
        assert (not torch.allclose(model(changed)[:, last], wanted[:, last], atol=0)) is heard


def test_its_size_is_the_published_one():
    with torch.device("meta"):
        parameters = WaveNet().parameters()
    assert sum(p.numel() for p in parameters) == 4_244_480
    assert WaveNetConfig().receptive_field == 4093


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"kernel_size": 1}, "kernel_size=1"),
        ({"layers": 40}, "layers=40"),
        ({"blocks": 0}, "blocks=0"),
        ({"skip_channels": 2**17}, "skip_channels=131072"),
    ],
)
def test_networks_that_cannot_be_are_refused(settings, word):
    with pytest.raises(UserError, match=word):
        WaveNetConfig(**settings)
