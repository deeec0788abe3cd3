"""The weights that travel with the package: what they are, and that the mathematics holds."""

import math

import pytest
import torch

from sashimi.checkpoint import WEIGHTS, load_named, read_metadata
from sashimi.diffusion import linear_noise_error, noise_error

PATH = WEIGHTS / "sashimi_ar_digits.safetensors"


@pytest.fixture(scope="module")
def model():
    return load_named("sashimi_ar_digits", device="cpu")


def test_the_file_is_small_and_says_where_it_comes_from():
    """Under 16 MiB, with data set, licence, step and scores in its metadata."""
    assert PATH.stat().st_size < 16 * 2**20
    metadata = read_metadata(PATH)
    assert {"data", "licence", "step", "test_bits"} <= metadata.keys()
    assert PATH.with_suffix(".md").exists()


@pytest.mark.parametrize("tier", range(3))
def test_convolution_is_recurrence_with_trained_weights(model, tier):
    """The first S4 layer of each tier: 16,000 steps in float32 stay within 1e-4 of the scale."""
    block = (model.backbone.center if tier == 2 else model.backbone.up[tier])[0]
    layer = block.layer
    u = torch.randn(1, 16000, layer.d_model, generator=torch.Generator().manual_seed(0))
    a, p, q, b, c = layer.setup_rnn()
    state, steps = layer.default_state(1), []
    with torch.no_grad():
        y = layer.convolve(u.transpose(1, 2))[0].T
        for x in u[0]:  # `step` without its projection
            s = 2 * (q * state).real.sum(-1, keepdim=True)
            state = a * state - p * s + b * x[:, None]
            steps.append(2 * (c * state).real.sum(-1)[0] + layer.D * x)
    error = (torch.stack(steps) - y).abs().max()
    assert error <= 1e-4 * max(1.0, y.abs().max())


def test_it_speaks_and_knows_what_it_said(model):
    """Sound in range, neither silence nor full scale; the log-likelihood is -nll of the audio."""
    generator = torch.Generator().manual_seed(0)
    wavs, ll = model.generate(4, generator=generator, return_log_likelihood=True)
    assert wavs.shape == (4, 8000) and model.sample_rate == 8000
    level = wavs.square().mean().sqrt()
    assert wavs.abs().max() <= 1 and 1e-3 < level < 0.5
    torch.testing.assert_close(ll, -model.nll(wavs), atol=1e-4, rtol=0)


def test_its_sound_is_likelier_than_noise(model):
    """Far below the 8 bits per sample of noise that is uniform over the classes."""
    wavs = model.generate(2, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(2, 8000, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert (model.nll(wavs) / math.log(2) < 5).all() and (model.nll(noise) / math.log(2) > 8).all()


# ---- diffusion --------------------------------------------------------------------------------

DIFFUSION = WEIGHTS / "sashimi_diffwave_digits.safetensors"


@pytest.fixture(scope="module")
def diffusion():
    return load_named("sashimi_diffwave_digits", device="cpu")


def test_the_diffusion_file_is_small_and_says_where_it_comes_from():
    assert DIFFUSION.stat().st_size < 16 * 2**20
    metadata = read_metadata(DIFFUSION)
    assert {"data", "licence", "step", "valid_mse", "test_mse"} <= metadata.keys()
    assert DIFFUSION.with_suffix(".md").exists()


def test_diffusion_hears_sound_in_noise(diffusion):
    """A vowel-like buzz, then silence: far better than scaling the input, at every noise level."""
    seconds = torch.arange(6000) / 8000
    buzz = sum((2 * math.pi * 120 * k * seconds).sin() / k for k in range(1, 8)) * 0.2
    wav = (buzz * (seconds < 0.4)).expand(8, -1)
    error = noise_error(diffusion, wav, torch.Generator().manual_seed(0)).item()
    linear = linear_noise_error(diffusion.alpha_bar, wav.square().mean().item())
    assert error < 0.6 * linear


def test_diffusion_speaks_at_any_number_of_steps(diffusion):
    """Sound in range, louder at the start of the clip than in its last tenth, where words ended."""
    wavs = diffusion.unconditional_generate(4, steps=8, generator=torch.Generator().manual_seed(0))
    assert wavs.shape == (4, 6000) and diffusion.sample_rate == 8000 and wavs.abs().max() <= 1
    start, end = wavs[:, :3000].square().mean().sqrt(), wavs[:, -600:].square().mean().sqrt()
    assert 0.02 < start < 0.5 and end < start / 2


def test_diffusion_finds_the_latent_of_its_own_clip(diffusion):
    """Inversion and generation close the loop; in between the audio is another."""
    z = torch.randn(1, 6000, generator=torch.Generator().manual_seed(0))
    wav = diffusion.generate_from_latent(z, steps=30)
    back = diffusion.invert(wav, steps=30)
    again = diffusion.generate_from_latent(back, steps=30)
    assert (again - wav).square().mean() < 0.01 * wav.square().mean()
