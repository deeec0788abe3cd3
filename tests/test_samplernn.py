"""SampleRNN is that of state-spaces/s4."""

from pathlib import Path

import pytest
import torch

from baselines.packed import Packed
from baselines.samplernn import SampleRNN, SampleRNNConfig
from rawaudio.errors import UserError
from sashimi.mulaw import SILENCE

# state-spaces/s4 e757cef5 (Apache-2.0), see fixtures/README.md
RECORDED = torch.load(
    Path(__file__).parent / "fixtures" / "state_spaces_samplernn.pt", weights_only=True
)


@pytest.fixture(params=RECORDED)
def recorded(request):
    """A recorded model, its name that of its quantiser."""
    theirs = RECORDED[request.param]
    model = SampleRNN(SampleRNNConfig(**theirs["config"], quantizer=request.param)).eval()
    model.load_state_dict(theirs["state_dict"])
    return model, theirs, theirs["x"].long()


@torch.no_grad()
def test_it_is_the_recorded_network(recorded):
    """There what comes before the first frames is given, too."""
    model, theirs, x = recorded
    before = model.period - 1
    state = model.default_state(model.told.rows(2, {}))
    state.tokens[:, :before] = x[:, :before]  # of samples -before to -1, in slots from 0 on
    y = model.head(model.absorb(x[:, before:], state))
    assert (y[:, ::4] - theirs["y_f64"]).abs().max() < 1e-5


@torch.no_grad()
def test_before_a_clip_there_is_silence(recorded):
    """As in the recorded steps, whose window is full of class 128."""
    model, theirs, x = recorded
    x = torch.cat([torch.full((2, 1), SILENCE), x[:, :40]], 1)
    assert (model(x)[:, ::4] - theirs["from_silence"]).abs().max() < 1e-5
    model.setup_rnn()
    state = model.default_state(model.told.rows(2, {}))
    y = torch.stack([model.step(now, state)[0] for now in x.T], 1)
    assert (y[:, ::4] - theirs["from_silence"]).abs().max() < 1e-5


@torch.no_grad()
def test_two_streams_can_be_interleaved(recorded):
    model, _, x = recorded
    model.setup_rnn()
    states = [model.default_state(model.told.rows(1, {})) for _ in range(2)]
    wanted = model(x[:, :30])
    for t in range(40):  # the second one ten steps later
        for clip, now in ((0, t), (1, t - 10)):
            if 0 <= now < 30:
                y, states[clip] = model.step(x[clip : clip + 1, now], states[clip])
                assert (y[0] - wanted[clip, now]).abs().max() < 1e-5


@torch.no_grad()
def test_it_starts_as_the_published_one():
    """Its size; products that keep the variance; orthogonal candidates."""
    with torch.device("meta"):
        parameters = SampleRNN().parameters()
    assert sum(p.numel() for p in parameters) == 35_034_624
    model = SampleRNN(SampleRNNConfig(d_hidden=64, d_embedding=16))
    tier, mlp = model.frame_level_rnns[1], model.sample_level_mlp
    bounds = {tier.input_expand.weight: 6 / 16, tier.rnn.weight_ih_l0: 3 / 64,
              tier.rnn.weight_hh_l0[:128]: 3 / 64, tier.upsampling.conv_t.weight: 6 / 64,
              mlp.input.weight: 6 / 128, mlp.hidden.weight: 6 / 64,
              mlp.output.weight: 3 / 64}  # fmt: skip
    for weight, square in bounds.items():
        assert weight.abs().max().item() == pytest.approx(square**0.5, rel=0.02)
        assert weight.var().item() == pytest.approx(square / 3, rel=0.1)
    candidates = tier.rnn.weight_hh_l0[128:]
    assert torch.allclose(candidates @ candidates.T, torch.eye(64), atol=1e-5)
    zeros = [tier.rnn.h0, tier.rnn.bias_ih_l0, tier.input_expand.bias, tier.upsampling.bias]
    assert not any(zero.any() for zero in zeros)


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"frame_sizes": []}, "frame_sizes"), ({"frame_sizes": [8, 0]}, "frame_sizes"),
     ({"frame_sizes": [300, 300]}, "frame_sizes"), ({"n_rnn": 0}, "n_rnn=0"),
     ({"d_hidden": 2**17}, "d_hidden=131072"), ({"quantizer": "pcm"}, "mulaw-published")],
)  # fmt: skip
def test_networks_that_cannot_be_are_refused(settings, word):
    with pytest.raises(UserError, match=word):
        SampleRNNConfig(**settings)


@pytest.mark.parametrize("n", [1, 3, 17])
def test_a_packed_product_is_the_product(n):
    weight, bias, x = torch.randn(5, 7), torch.randn(5), torch.randn(n, 7)
    for dtype in (torch.float32, torch.float64):
        packed = Packed(weight.to(dtype), bias.to(dtype), relu=True)
        wanted = (x @ weight.T + bias).clamp(min=0)
        assert torch.allclose(packed(x.to(dtype)).float(), wanted, atol=1e-5)
