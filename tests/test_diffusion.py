"""Diffusion: the published network, the schedule, samplers against the closed form of Gaussian
data, and a model that refuses what it cannot do."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from models import make, seeded
from torch.nn import functional as F

from rawaudio import noise, samplers
from rawaudio.checkpoint import load_checkpoint, save_checkpoint
from rawaudio.diffusion import step_features
from rawaudio.errors import CheckpointError
from rawaudio.mel import log_mel
from rawaudio.noise import noise_error
from rawaudio.samplers import (
    SAMPLERS,
    ddim,
    ddim_invert,
    ddpm,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    fast,
    level_at,
    noise_schedule,
    step_at,
)
from sashimi.diffwave import DiffusionConfig, MelUpsampler, SashimiDiffWave, named_config

FIXTURES = Path(__file__).parent / "fixtures"
SCHEDULE = torch.load(FIXTURES / "diffusion_schedule.pt", weights_only=True)  # as published
VOCODER = {"unconditional": False}


def tiny(**settings):
    return make("diffwave", **settings)


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def published():
    """x, steps, double-precision outputs, and weights; matrices after the step embedding are stored
    by their action on these steps alone, left @ right: elsewhere they are zero."""
    content = torch.load(FIXTURES / "published_diffwave.pt", weights_only=True)
    factors = {k: left.double() @ right.double() for k, (left, right) in content["factors"].items()}
    content["state_dict"] |= {k: v.float() for k, v in factors.items()}
    return content


@torch.no_grad()
def test_published_weights_give_their_noise(published, tmp_path):
    """Within 1e-5 of the published code run in double, in float32, to the end of the clip; at
    fractional steps what it gave is float32, off by 1.7e-4 itself. Saved as ours, it is the same.

    Pitfall: the published CPU path, which forgets the conjugate poles, is off by 0.1 and more.
    """
    content = {"model_state_dict": published["state_dict"], "cfg_yaml": published["cfg_yaml"]}
    torch.save(content, tmp_path / "diffwave.pt")
    model = load_checkpoint(tmp_path / "diffwave.pt")
    y = model(published["x"], published["steps"])
    assert isinstance(model, SashimiDiffWave) and y.dtype == torch.float32
    close(y.double(), published["y"].double(), 1e-5)
    assert (y[:, :64] - published["as_shipped"]).abs().max() > 0.1
    y = model(published["x"], published["fractional_steps"])
    close(y.double(), published["y_fractional"].double(), 3e-4)
    features = step_features(published["steps"])  # theirs are float32: 4.7e-6
    assert features.shape == (2, 128)
    close(features, published["step_features"].double(), 1e-5)
    c = model.config
    assert (c.d_model, c.n_layers, c.pool, c.expand, c.ff, c.d_state) == (16, [2], [4, 4], 2, 2, 64)
    assert c.unet and c.bidirectional and c.glu and not c.tied and c.unconditional
    assert c.tier_lengths == [1024] * 3 and c.l_max == 1024
    assert (c.diffusion_steps, c.beta_first, c.beta_last) == (200, 1e-4, 0.02)
    save_checkpoint(tmp_path / "ours.safetensors", model)
    ours = load_checkpoint(tmp_path / "ours.safetensors")
    assert ours.config == c
    a, b = ours.state_dict(), model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


def test_published_files_that_fit_no_model_are_refused(published, tmp_path):
    """Other settings; a tensor that is missing, or one too many, such as conditioning."""
    text, state = published["cfg_yaml"], published["state_dict"]
    settings = {"- 0.02\n": "- 0.03\n", "unconditional: true": "unconditional: false",
                "- 0.0001\n": "- much\n", "l_max: 1024\n": ""}  # fmt: skip
    lacking = ("sashimi.fc_t1.weight", "sashimi.c_layers.0.fc_t.bias",
               "sashimi.init_conv.0.conv.weight_v")  # fmt: skip
    assert all(old in text for old in settings) and set(lacking) < state.keys()
    contents = [(state, text.replace(*change)) for change in settings.items()]
    contents += [({k: v for k, v in state.items() if k != name}, text) for name in lacking]
    contents += [(state | {"rawaudio.mel.bias": torch.zeros(1)}, text), ({}, text)]
    for weights, yaml in contents:
        torch.save({"model_state_dict": weights, "cfg_yaml": yaml}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="other.pt"):
            load_checkpoint(tmp_path / "other.pt")


def test_schedule_is_the_published_one_and_steps_and_levels_are_inverses():
    alpha_bar, t = noise_schedule(), np.linspace(0, 199, 57)
    assert alpha_bar.shape == (200,) and alpha_bar.dtype == np.float64
    np.testing.assert_allclose(alpha_bar, SCHEDULE["Alpha_bar"].double(), atol=1e-6)
    np.testing.assert_allclose(step_at(alpha_bar, level_at(alpha_bar, t)), t, atol=1e-9)
    np.testing.assert_allclose(level_at(alpha_bar, np.arange(200)), alpha_bar, rtol=1e-12)
    assert step_at(alpha_bar, np.array([1.0, 0.0])).tolist() == [0, 199]


def test_fast_sampler_makes_the_published_moves():
    """x <- c1 (x - c2 noise) + sigma z, at fractional steps."""
    x = torch.randn(2, 5, generator=seeded(), dtype=torch.float64)
    steps = []

    def denoise(x, t):
        steps.append(t)
        return 0.3 * x + 0.1

    actual, g = fast(denoise, x, noise_schedule(), generator=seeded(1)), seeded(1)
    np.testing.assert_allclose(steps, SCHEDULE["fast_T"].flip(0), atol=1e-4)
    for i in reversed(range(6)):
        c1, c2, sigma = (SCHEDULE[f"fast_{k}"][i] for k in ("c1", "c2", "sigma"))
        x = c1 * (x - c2 * (0.3 * x + 0.1))
        x = x + sigma * torch.randn(2, 5, generator=g) if i else x
    close(actual, x, 1e-6)


def test_ddpm_at_every_step_has_the_published_variances():
    """With T steps and a network that predicts nothing, the noise added is Sigma."""
    alpha_bar = noise_schedule()
    variance = torch.zeros((), dtype=torch.float64)
    for t in reversed(range(200)):
        variance = variance / (1 - np.linspace(1e-4, 0.02, 200)[t])
        variance = variance + (SCHEDULE["Sigma"][t].double() ** 2 if t else 0)
    x = torch.zeros(20000, 1, dtype=torch.float64)
    y = ddpm(lambda x, t: torch.zeros_like(x), x, alpha_bar, 200, generator=seeded())
    assert abs(y.var() / variance - 1) < 0.04


MEAN = torch.tensor([0.3, -0.2], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
FINE = noise_schedule(200, 1e-6)  # ends so close to audio that the last step is exact


def marginal(a):
    """Covariance of x at level a."""
    return a * COV + (1 - a) * torch.eye(2, dtype=torch.float64)


def ideal(alpha_bar):
    """E[noise | x] for data of mean MEAN and covariance COV."""

    def denoise(x, t):
        a = float(level_at(alpha_bar, t))
        return math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) @ torch.linalg.inv(marginal(a))

    return denoise


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.sqrt() @ vectors.T


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver_pp_2m, 2)])
def test_deterministic_samplers_follow_the_exact_flow_with_their_order(sampler, order):
    """Each point goes where the probability flow takes it; errors fall by 2^order when the steps
    double."""
    a, z = FINE[-1], torch.randn(7, 2, generator=seeded(), dtype=torch.float64)
    exact = MEAN + (z - math.sqrt(a) * MEAN) @ torch.linalg.inv(root(marginal(a))) @ root(COV)
    off = [(sampler(ideal(FINE), z, FINE, n) - exact).abs().max().item() for n in (40, 80, 160)]
    assert off[1] < (0.04, 5e-3)[order - 1], off
    for coarse, fine in pairwise(off):
        assert abs(math.log2(coarse / fine) - order) < 0.2, off


def test_stochastic_samples_have_the_moments_of_the_data():
    """200 steps: within 4 % (and 2 sigma of the draw); fewer lose variance, those of the solver a
    third of what ancestral sampling loses."""
    alpha_bar, g, off = noise_schedule(), seeded(), {}
    a = alpha_bar[-1]
    x = torch.randn(40000, 2, generator=g, dtype=torch.float64) @ root(marginal(a))
    for sampler in (ddpm, dpm_solver_pp_2m_sde):
        for steps in (20, 200):
            y = sampler(ideal(alpha_bar), x + math.sqrt(a) * MEAN, alpha_bar, steps, generator=g)
            assert (y.mean(0) - MEAN).abs().max() < 0.01
            off[sampler, steps] = (torch.cov(y.T) - COV).abs().max().item()
        assert off[sampler, 200] < min(0.02, off[sampler, 20]), off
    assert off[dpm_solver_pp_2m_sde, 200] < 0.012, off
    assert off[dpm_solver_pp_2m_sde, 20] < off[ddpm, 20] / 3, off


def test_inversion_undoes_ddim():
    """The better, the more iterations."""
    alpha_bar = noise_schedule()
    z = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)
    wav, off = ddim(ideal(alpha_bar), z, alpha_bar, 20), []
    for iterations in (1, 4, 12):
        back = ddim_invert(ideal(alpha_bar), wav, alpha_bar, 20, iterations=iterations)
        off.append((back - z).abs().max().item())
    assert off[0] > off[1] > off[2] and off[1] < 2e-3 and off[2] < 1e-8


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_use_as_many_passes_as_steps(name):
    """From the last level downwards, each t once; one step is enough, except for fast."""
    alpha_bar = noise_schedule()
    for steps in (6,) if name == "fast" else (1, 2, 6, 200):
        seen = []

        def denoise(x, t, seen=seen):
            seen.append(t)
            return 0.5 * x

        y = SAMPLERS[name](denoise, torch.ones(2, 3), alpha_bar, steps, generator=seeded())
        assert len(seen) == steps and seen == sorted(seen, reverse=True) and seen[-1] >= 0
        assert y.shape == (2, 3) and y.dtype == torch.float32 and y.isfinite().all()
        assert seen[0] <= 199 and (name == "fast" or seen[0] == 199)
    for steps in (0, -1, 201, 2.5, True, None):
        with pytest.raises(ValueError, match="steps="):
            SAMPLERS[name](lambda x, t: x, torch.ones(1, 3), alpha_bar, steps)


@pytest.mark.parametrize(
    ("name", "millions"), [("large", 23.5), ("small", 7.7), ("small_unidirectional", 7.5)]
)
def test_named_configurations_have_their_size(name, millions):
    with torch.device("meta"):
        parameters = SashimiDiffWave(named_config(name)).parameters()
    assert round(sum(p.numel() for p in parameters) / 1e6, 1) == millions


@pytest.mark.parametrize("bad", [dict(beta_first=0.0), dict(beta_last=1.0), dict(diffusion_steps=0),
    dict(hop=0), dict(beta_first=0.03), dict(n_fft=100), dict(data_std=0.0)])  # fmt: skip
def test_settings_that_make_no_model_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DiffusionConfig(**bad)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bidirectional": False, "tied": True}, {"ff": 0} | VOCODER, {"data_std": 0.2}],
    ids=str,
)
def test_noise_has_the_shape_of_the_audio_and_clips_are_alone(settings):
    """Any length, multiple of the pooling or not; the clips of a batch do not see each other, and
    gradients reach every parameter. Untrained, the network's share is zero."""
    model, t = tiny(**settings).train(), torch.tensor([0.0, 77.5, 199.0])
    for length in (1, 3, 12, 64, 77):
        x = torch.randn(3, length, generator=seeded())
        mel = torch.randn(3, 5, -(-length // 6), generator=seeded()) if model.upsample else None
        y = model(x, t, mel)
        assert y.shape == x.shape and y.isfinite().all() and (y != 0).any()
        alone = model(x[1:2], t[1:2], None if mel is None else mel[1:2])
        close(y[1:2], alone, 1e-4)
    F.mse_loss(y, x).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any(), name
    model.eval().output[2].load_state_dict(SashimiDiffWave(model.config).output[2].state_dict())
    with torch.no_grad():
        factor = model(x, t, mel) / x
    assert (factor == 0).all() if model.config.data_std is None else factor.std(1).max() < 1e-3


@pytest.mark.parametrize("t", [0.0, 60.25, 199.0])
def test_with_data_std_the_network_sees_and_says_numbers_of_variance_1(t):
    """Its input, and what it has to add to the best multiple of x, for audio of that rms."""
    model = tiny(data_std=0.2)
    wav, noise = torch.randn(2, 200_000, generator=seeded(), dtype=torch.float64)
    a = float(level_at(model.alpha_bar, np.array(t)))
    x = math.sqrt(a) * 0.2 * wav + math.sqrt(1 - a) * noise
    scale, keep, add = (f.item() for f in model._scales(torch.tensor([t], dtype=torch.float64)))
    rest = (noise - keep * x) / add
    assert (scale * x).std() == pytest.approx(1, abs=0.01) == rest.std()
    assert abs((rest * x).mean() / x.std()) < 0.01  # nothing of x is left in it
    short = x[None, :48].float()
    for parameter in model.output[2].parameters():  # without the network's share
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        y = model(short, torch.tensor([t]))
    torch.testing.assert_close(y, keep * short, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_errors_are_1_for_who_hears_nothing():
    """Untrained, on white audio of the model's rms; above it on audio that is louder. A clip meets
    the same step and noise in a part of a batch as in all of it."""
    model = SashimiDiffWave(tiny(data_std=0.1).config)
    wav = 0.1 * torch.randn(64, 400, generator=seeded())
    error = noise_error(model, wav, seeded(1), unit="relative")
    assert error == pytest.approx(1, abs=0.03)
    assert noise_error(model, 2 * wav, seeded(1), unit="relative") > 1.5
    for unit in ("mse", "relative"):
        whole, first, last = (
            noise_error(model, wav[i:end], seeded(2), (i, 4), unit=unit).item()
            for i, end in ((0, 4), (0, 2), (2, 4))
        )
        assert (first + last) / 2 == pytest.approx(whole, rel=1e-5)
    error = noise_error(SashimiDiffWave(tiny().config), torch.zeros(16, 400), seeded())
    assert error.item() == pytest.approx(1, abs=0.05)  # the noise's own power


def test_steps_are_even_in_the_signal_to_noise_ratio():
    """From the last step's to the first's, in equal parts of its logarithm; exact between steps."""
    alpha_bar = noise_schedule()
    t, levels = noise._even_in_snr(alpha_bar, np.linspace(0, 1, 9))
    np.testing.assert_allclose(levels[[0, -1]], alpha_bar[[0, -1]], rtol=1e-9)
    odds = np.log(levels / (1 - levels))
    np.testing.assert_allclose(np.diff(odds), np.diff(odds)[0], rtol=1e-9)
    np.testing.assert_allclose(level_at(alpha_bar, t), levels, rtol=1e-9)
    uniform, _ = noise._even_in_t(alpha_bar, (np.arange(200) + 0.5) / 200)
    assert uniform.tolist() == list(range(200))


def test_batches_are_split_to_bound_the_memory(monkeypatch):
    model, seen, z = tiny(), [], torch.randn(5, 2**16, generator=seeded())
    monkeypatch.setattr(model, "forward", lambda x, *_: seen.append(len(x)) or 0.1 * x)
    wav = model.generate_from_latent(z, 3)
    assert seen == [2, 2, 1] * 3
    assert torch.equal(wav[4:], model.generate_from_latent(z[4:], 3))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_generator_or_a_latent_decides_the_clips_of_every_sampler(name):
    """With a bar or without it."""
    model, z = tiny(), torch.randn(2, 40, generator=seeded())
    made = [model.generate(3, 6, name, seeded(s), s == 1, length=33) for s in (1, 1, 2)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert made[0].shape == (3, 33) and made[0].abs().max() <= 1
    if name in samplers.DETERMINISTIC:
        a, b = (model.generate_from_latent(z, 10, name) for _ in range(2))
        assert torch.equal(a, b) and a.abs().max() <= 1


def test_vocoding_makes_a_hop_per_frame():
    model = tiny(**VOCODER)
    mel = log_mel(torch.rand(2, 50, generator=seeded()) - 0.5, 16000, 5, 12, 6)
    assert mel.shape == (2, 5, 9)
    a, b = (model.vocode(mel, generator=seeded()) for _ in range(2))
    assert a.shape == (2, 54) and torch.equal(a, b) and a.abs().max() <= 1
    assert model.vocode(mel + 1, 4, "dpm_solver_pp_2m", generator=seeded()).shape == (2, 54)
    for hop in (256, 200, 1, 7, 15, 80):
        y = MelUpsampler(hop)(torch.randn(2, 8, 3))
        assert y.shape == (2, 3 * hop, 8) and y.isfinite().all()


def test_arrays_and_numbers_of_numpy_are_taken():
    """Of float64 and any strides."""
    model, z, t = tiny(), torch.randn(2, 40, generator=seeded()), np.array([3, 150])
    backwards = z.double().numpy()[:, ::-1].copy()[:, ::-1]
    with torch.no_grad():
        assert torch.equal(model(backwards, t), model(z, torch.from_numpy(t)))
    assert torch.equal(model.generate_from_latent(backwards, 5), model.generate_from_latent(z, 5))
    assert torch.equal(model.invert(backwards, 5), model.invert(z, np.int64(5)))
    clips = model.generate(np.int64(2), np.int32(3), length=np.int64(9), generator=seeded())
    assert torch.equal(clips, model.generate(2, 3, length=9, generator=seeded()))
    assert model.generate_from_latent(z[:0]).shape == model.invert(z[:0]).shape == (0, 40)


@pytest.mark.parametrize("data_std", [None, 0.2])
@torch.no_grad()
def test_precision_changes_rounding_alone(data_std):
    """The schedule is double in both; a clip of either goes in; a half is refused."""
    model, x = tiny(data_std=data_std), torch.randn(2, 40, generator=seeded())
    t = torch.tensor([0.0, 77.3], dtype=torch.float64)
    single, double = model(x, t), model.double()(x, t)
    assert double.dtype == torch.float64 and torch.equal(model(x.double(), t), double)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)
    assert model.float().generate(1, 3).dtype == torch.float32
    with pytest.raises(TypeError, match="autocast"):
        model.half()
    assert torch.equal(model(x, t), single) and torch.equal(model(x.double(), t), single)


def test_bad_arguments_are_refused():
    """Each one line that names the argument."""
    model, vocoder = tiny(), tiny(**VOCODER)
    z, mel = torch.randn(2, 40), torch.zeros(2, 5, 4)
    x, t = torch.zeros(2, 24), torch.tensor([1, 2])
    nan, pcm = z.clone(), torch.zeros(2, 40, dtype=torch.int16)
    nan[1, 3] = math.nan
    generate, latent, invert = model.generate, model.generate_from_latent, model.invert
    values = [  # words, what is called, its arguments
        ("did you mean ddim", generate, (1, 5, "dimm")),
        ("did you mean dpm_solver", latent, (z, 5, "dpm++2m_solver")),
        ("did you mean ddpm", vocoder.vocode, (mel, 5, "dppm")),
        ("steps=0", generate, (1, 0)), ("steps=201", generate, (1, 201, "ddpm")),
        ("steps=7", generate, (1, 7, "fast")), ("steps=2.0", latent, (z, 2.0)),
        ("steps=-1", invert, (z, -1)), ("steps=True", invert, (z, True)),
        ("n=0", generate, (0,)), ("n=True", generate, (True,)),
        ("length=0", generate, (1, 5, "ddim", None, False, 0)),
        ("length=2.5", generate, (1, 5, "ddim", None, False, 2.5)),
        ("guidance=big", generate, (1, 5, "ddim", None, False, 9, "big")),
        ("iterations=0", invert, (z, 2, 0)), ("iterations=1.5", invert, (z, 2, 1.5)),
        ("z holds values", latent, (nan,)), ("z holds values", latent, (z / 0,)),
        ("wav holds values", invert, (nan,)), ("wav of shape", invert, (z[None],)),
        ("z of shape", latent, (z[0],)), ("z of shape", latent, (z[:, :0],)),
        ("noise of its own", latent, (z, 5, "ddpm")), ("unconditional", model.vocode, (mel,)),
        ("use vocode", vocoder.generate, (1,)),
        ("use vocode", vocoder.generate_from_latent, (z,)),
        ("mel of shape", vocoder.vocode, (mel[:, :4],)),
        ("mel of shape", vocoder.vocode, (mel[0],)),
        ("mel of shape", vocoder.vocode, (mel[..., :0],)),
        ("mel holds values", vocoder.vocode, (mel / 0,)), ("mel of none", vocoder, (x, t)),
        ("at 1000 Hz", vocoder, (x, t, mel[..., :3])), ("takes no mel", model, (x, t, mel)),
        ("x of shape", model, (x[0], t)), ("x of shape", model, (x[:, :0], t)),
        ("from 0 to 199", model, (x, t[:1])), ("from 0 to 199", model, (x, t - 2)),
        ("from 0 to 199", model, (x, t + 198)), ("from 0 to 199", model, (x, t * math.nan)),
    ]  # fmt: skip
    types = [
        ("wav: .*/ 32768", invert, (pcm,)), ("z: .*float", latent, (pcm.numpy(),)),
        ("x: .*float", model, (pcm, t)), ("z: .*not str", latent, ("z.pt",)),
        ("diffusion_steps: .*not NoneType", model, (x, None)),
        ("mel: .*not NoneType", vocoder.vocode, (None,)),
        ("generator=3", generate, (1, 5, "ddim", 3)),
    ]  # fmt: skip
    for error, rows in ((ValueError, values), (TypeError, types)):
        for words, call, arguments in rows:
            with pytest.raises(error, match=words) as raised:
                call(*arguments)
            assert "\n" not in str(raised.value)
