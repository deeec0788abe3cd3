"""Diffusion: the published network, the schedule, samplers against the closed form of Gaussian
data, and a model that refuses what it cannot do."""

import math
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
from sashimi.diffwave import CONFIGS, DiffusionConfig, MelUpsampler, SashimiDiffWave, named_config
from sashimi.s4 import S4

FIXTURES = Path(__file__).parent / "fixtures"
SCHEDULE = torch.load(FIXTURES / "diffusion_schedule.pt", weights_only=True)  # as published
VOCODER = {"unconditional": False}


def tiny(**settings):
    return make("diffwave", **settings)


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---- the published network --------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """Fixture: x, steps, double-precision outputs, and the file as the published trainer wrote it.

    Matrices after the step embedding are stored by their action on the steps of the fixture alone,
    left @ right: elsewhere they are zero, which nothing here sees.
    """
    content = torch.load(FIXTURES / "published_diffwave.pt", weights_only=True)
    factors = {k: left.double() @ right.double() for k, (left, right) in content["factors"].items()}
    content["state_dict"] |= {k: v.float() for k, v in factors.items()}
    return content


@pytest.fixture(scope="module")
def published_file(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "diffwave.pt"
    content = {"model_state_dict": published["state_dict"], "cfg_yaml": published["cfg_yaml"]}
    torch.save(content, path)
    return path


@torch.no_grad()
def test_published_weights_give_their_noise(published, published_file, tmp_path):
    """Within 1e-5 of the published code run in double, in float32, to the end of the clip; at the
    fractional steps 3.25 and 147.25 what it gave is float32, off by 1.7e-4 itself. Saved as ours,
    they are the same.

    Pitfall: the published CPU path, which forgets the conjugate poles, is off by 0.1 and more.
    """
    model = load_checkpoint(published_file)
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
    """Other settings; a tensor that is missing, or one too many: conditioning that we would ignore,
    say."""
    text, state = published["cfg_yaml"], published["state_dict"]
    settings = [("- 0.02\n", "- 0.03\n"), ("unconditional: true", "unconditional: false"),
                ("- 0.02\n", "- much\n"), ("l_max: 1024\n", "")]  # fmt: skip
    lacking = ("sashimi.fc_t1.weight", "sashimi.c_layers.0.fc_t.bias",
               "sashimi.init_conv.0.conv.weight_v")  # fmt: skip
    assert all(old in text for old, _ in settings) and set(lacking) < state.keys()
    states = [{k: v for k, v in state.items() if k != name} for name in lacking]
    states += [state | {"rawaudio.mel.bias": torch.zeros(1)}, {}, {"a": 1}]
    contents = [(state, text.replace(*change)) for change in settings] + [(x, text) for x in states]
    for weights, yaml in contents:
        torch.save({"model_state_dict": weights, "cfg_yaml": yaml}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="other.pt"):
            load_checkpoint(tmp_path / "other.pt")


# ---- the noise schedule -----------------------------------------------------------------------


def test_schedule_is_the_published_one():
    """Fractional steps and levels are inverses."""
    alpha_bar, t = noise_schedule(), np.linspace(0, 199, 57)
    assert alpha_bar.shape == (200,) and alpha_bar.dtype == np.float64
    np.testing.assert_allclose(alpha_bar, SCHEDULE["Alpha_bar"].double(), atol=1e-6)
    np.testing.assert_allclose(step_at(alpha_bar, level_at(alpha_bar, t)), t, atol=1e-9)
    np.testing.assert_allclose(level_at(alpha_bar, np.arange(200)), alpha_bar, rtol=1e-12)
    assert step_at(alpha_bar, np.array([1.0, 0.0])).tolist() == [0, 199]


def test_fast_sampler_makes_the_published_moves():
    """Fractional steps and x <- c1 (x - c2 noise) + sigma z of DiffWave's fast inference."""
    x = torch.randn(2, 5, generator=seeded(), dtype=torch.float64)
    seen = []

    def denoise(x, t):
        seen.append(t)
        return 0.3 * x + 0.1

    actual = fast(denoise, x, noise_schedule(), generator=seeded(1))
    np.testing.assert_allclose(seen, SCHEDULE["fast_T"].flip(0), atol=1e-4)
    g = seeded(1)
    for i in reversed(range(6)):
        c1, c2, sigma = (SCHEDULE[f"fast_{k}"][i] for k in ("c1", "c2", "sigma"))
        x = c1 * (x - c2 * (0.3 * x + 0.1))
        if i:
            x = x + sigma * torch.randn(2, 5, generator=g)
    torch.testing.assert_close(actual, x, rtol=0, atol=1e-6)


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


# ---- samplers: Gaussian data, whose ideal denoiser is known in closed form ---------------------

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


def moments(sampler, alpha_bar, steps):
    """Mean and covariance of what a deterministic sampler makes of x at the last level, exactly:
    on Gaussian data it is an affine map."""
    a = alpha_bar[-1]
    points = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()
    out = sampler(ideal(alpha_bar), points, alpha_bar, steps)
    linear = out[1:] - out[0]
    return math.sqrt(a) * MEAN @ linear + out[0], linear.T @ marginal(a) @ linear


@pytest.mark.parametrize(
    ("sampler", "order", "at_80"), [(ddim, 1, 0.03), (dpm_solver_pp_2m, 2, 2e-3)]
)
def test_deterministic_samplers_converge_with_their_order(sampler, order, at_80):
    """Errors of mean and covariance fall by 2^order when the steps double."""
    errors = []
    for steps in (20, 40, 80, 160):
        mean, cov = moments(sampler, FINE, steps)
        errors.append(max((mean - MEAN).abs().max(), (cov - COV).abs().max()).item())
    assert errors[2] < at_80
    for coarse, fine in zip(errors[1:], errors[2:], strict=False):
        assert abs(math.log2(coarse / fine) - order) < 0.2, errors


@pytest.mark.parametrize("sampler", [ddim, dpm_solver_pp_2m])
def test_deterministic_samplers_follow_the_exact_flow(sampler):
    """Not the distribution alone: each point goes where the probability flow takes it."""
    a = FINE[-1]
    z = torch.randn(7, 2, generator=seeded(), dtype=torch.float64)
    exact = MEAN + (z - math.sqrt(a) * MEAN) @ torch.linalg.inv(root(marginal(a))) @ root(COV)
    off = [(sampler(ideal(FINE), z, FINE, n) - exact).abs().max().item() for n in (25, 100)]
    assert off[1] < 0.03 and off[1] < off[0] / 3


def test_stochastic_samples_have_the_moments_of_the_data():
    """200 steps: within 4 % (and 2 sigma of the draw); fewer lose variance, those of the solver a
    third of what ancestral sampling loses."""
    alpha_bar, g, off = noise_schedule(), seeded(), {}
    a = alpha_bar[-1]
    x = torch.randn(40000, 2, generator=g, dtype=torch.float64) @ root(marginal(a))
    x = x + math.sqrt(a) * MEAN
    for sampler, at_200 in ((ddpm, 0.02), (dpm_solver_pp_2m_sde, 0.012)):
        for steps in (20, 200):
            y = sampler(ideal(alpha_bar), x, alpha_bar, steps, generator=g)
            assert (y.mean(0) - MEAN).abs().max() < 0.01
            off[sampler, steps] = (torch.cov(y.T) - COV).abs().max().item()
        assert off[sampler, 200] < min(at_200, off[sampler, 20]), off
    assert off[dpm_solver_pp_2m_sde, 20] < off[ddpm, 20] / 3, off


@pytest.mark.parametrize("clean", [0.0, 0.7])
def test_the_stochastic_solver_keeps_the_level(clean):
    """When the audio is known, every step lands on sqrt(b) audio + sqrt(1 - b) noise."""
    alpha_bar, seen = noise_schedule(), []

    def denoise(x, t):
        a = float(level_at(alpha_bar, t))
        seen.append((a, x.mean().item(), x.var().item()))
        return (x - math.sqrt(a) * clean) / math.sqrt(1 - a)

    a = alpha_bar[-1]
    noise = torch.randn(40000, 1, generator=seeded(), dtype=torch.float64)
    x = math.sqrt(a) * clean + math.sqrt(1 - a) * noise
    y = dpm_solver_pp_2m_sde(denoise, x, alpha_bar, 7, generator=seeded(1))
    assert (y - clean).abs().max() < 1e-9
    for a, mean, var in seen:
        assert abs(mean - math.sqrt(a) * clean) < 0.02 and abs(var / (1 - a) - 1) < 0.03


def test_fast_samples_have_the_mean_of_the_data():
    """Six large steps lose variance: made for vocoders, whose data has little left."""
    alpha_bar, n = noise_schedule(), 20000
    a = np.prod(1 - np.array(samplers.FAST_BETAS))
    g = seeded()
    x = torch.randn(n, 2, generator=g, dtype=torch.float64) @ root(marginal(a))
    y = fast(ideal(alpha_bar), x + math.sqrt(a) * MEAN, alpha_bar, generator=g)
    assert (y.mean(0) - MEAN).abs().max() < 0.02
    assert (torch.cov(y.T) - COV).abs().max() < 0.3


def test_inversion_undoes_ddim():
    """More iterations, smaller gap; with enough of them exact for few steps, too."""
    alpha_bar = noise_schedule()
    z = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)
    wav = ddim(ideal(alpha_bar), z, alpha_bar, 20)
    off = []
    for iterations in (1, 2, 4, 12):
        back = ddim_invert(ideal(alpha_bar), wav, alpha_bar, 20, iterations=iterations)
        off.append((back - z).abs().max().item())
    assert off[0] > off[1] > off[2] > off[3] and off[2] < 2e-3 and off[3] < 1e-8


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_use_as_many_passes_as_steps(name):
    """From the last level downwards, each t once; one step is enough, except for fast. Other
    numbers are refused."""
    alpha_bar = noise_schedule()
    for steps in (6,) if name == "fast" else (1, 2, 6, 200):
        seen = []

        def denoise(x, t, seen=seen):
            seen.append(t)
            return 0.5 * x

        y = SAMPLERS[name](denoise, torch.ones(2, 3), alpha_bar, steps, generator=seeded())
        assert len(seen) == steps and seen == sorted(seen, reverse=True)
        assert y.shape == (2, 3) and y.dtype == torch.float32 and y.isfinite().all()
        assert 0 <= seen[-1] and seen[0] <= 199
        assert name == "fast" or seen[0] == 199
    for steps in (0, -1, 201, 2.5, True, None):
        with pytest.raises(ValueError, match="steps="):
            SAMPLERS[name](lambda x, t: x, torch.ones(1, 3), noise_schedule(), steps)


# ---- the model --------------------------------------------------------------------------------


def test_named_configurations_have_their_size():
    """Others are refused."""
    millions = {"large": 23.5, "small": 7.7, "small_unidirectional": 7.5}
    assert set(CONFIGS) == set(millions)
    for name, size in millions.items():
        with torch.device("meta"):
            parameters = SashimiDiffWave(named_config(name)).parameters()
        assert round(sum(p.numel() for p in parameters) / 1e6, 1) == size
    with pytest.raises(ValueError, match="did you mean small"):
        named_config("smal")
    for bad in (dict(beta_first=0.0), dict(beta_last=1.0), dict(diffusion_steps=0), dict(hop=0),
                dict(beta_first=0.03), dict(n_fft=100), dict(data_std=0.0)):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            DiffusionConfig(**bad)


KINDS = [{}, {"bidirectional": False, "tied": True}, {"ff": 0} | VOCODER, {"data_std": 0.2}]


@pytest.mark.parametrize("settings", KINDS, ids=str)
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


@pytest.mark.parametrize("t", [0.0, 3.0, 60.25, 199.0])
def test_with_data_std_the_network_sees_and_says_numbers_of_variance_1(t):
    """Its input, and what it has to add to the best multiple of x, for audio of that rms."""
    model = tiny(data_std=0.2)
    wav, noise = torch.randn(2, 200_000, generator=seeded(), dtype=torch.float64)
    a = float(level_at(model.alpha_bar, np.array(t)))
    x = math.sqrt(a) * 0.2 * wav + math.sqrt(1 - a) * noise
    scale, keep, add = (f.item() for f in model._scales(torch.tensor([t], dtype=torch.float64)))
    assert (scale * x).std() == pytest.approx(1, abs=0.01)
    rest = (noise - keep * x) / add
    assert rest.std() == pytest.approx(1, abs=0.01)
    assert abs((rest * x).mean() / x.std()) < 0.01  # nothing of x is left in it
    # the last layer's share of the prediction, and what is there without it
    short = x[None, :48].float()
    steps = torch.tensor([t])
    with torch.no_grad():
        whole = model(short, steps)
        for parameter in model.output[2].parameters():
            torch.nn.init.zeros_(parameter)
        torch.testing.assert_close(model(short, steps), keep * short, rtol=1e-4, atol=1e-6)
    assert (whole - keep * short).abs().max() > 0


def test_relative_error_is_1_for_who_hears_nothing():
    """Untrained, on white audio of the model's rms; above it on audio that is louder."""
    model = SashimiDiffWave(tiny(data_std=0.1).config)
    wav = 0.1 * torch.randn(64, 400, generator=seeded())
    with torch.no_grad():
        error = noise_error(model, wav, seeded(1), unit="relative")
        assert error == pytest.approx(1, abs=0.03)
        assert noise_error(model, 2 * wav, seeded(1), unit="relative") > 1.5
        for unit in ("mse", "relative"):
            # a clip meets the same step and noise in a part of a batch as in all of it
            whole = noise_error(model, wav[:4], seeded(2), unit=unit).item()
            parts = [
                noise_error(model, wav[i : i + 2], seeded(2), (i, 4), unit=unit).item()
                for i in (0, 2)
            ]
            assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5)
    # without data_std it predicts zero: the noise's own power
    error = noise_error(SashimiDiffWave(tiny().config), torch.zeros(16, 400), seeded())
    assert error.item() == pytest.approx(1, abs=0.05)


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


def test_the_prediction_depends_on_step_and_mel_and_the_whole_clip():
    """Bidirectional: the first sample sees the last one, also through the poolings; else causal."""
    model = tiny(**VOCODER)
    x = torch.randn(1, 48, generator=seeded(), requires_grad=True)
    mel = torch.randn(1, 5, 8, generator=seeded(), requires_grad=True)
    t = torch.tensor([10.5], dtype=torch.float64, requires_grad=True)
    model(x, t, mel)[0, 0].backward()
    assert (x.grad[0] != 0).all() and t.grad != 0
    assert (mel.grad[0, :, 0] != 0).any()
    x = torch.randn(1, 48, generator=seeded(), requires_grad=True)
    tiny(bidirectional=False)(x, torch.tensor([10]))[0, 20].backward()
    future, past = x.grad[0, 21:].abs().max(), x.grad[0, :21].abs().max()
    assert future < 1e-6 * past  # FFT rounding


def test_kernels_are_computed_once(monkeypatch):
    """They depend on parameters alone: one computation per S4 layer, however many passes."""
    calls, kernel = [], S4.kernel
    monkeypatch.setattr(S4, "kernel", lambda s, n: calls.append(s) or kernel(s, n))
    model = tiny().train()  # generation is in eval mode, whatever the mode was
    model.generate(2, 7, "ddim")
    assert len(calls) == len([m for m in model.modules() if isinstance(m, S4)])


# ---- generation -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_generator_same_clips(name):
    model = tiny()
    clips = [
        model.unconditional_generate(3, 6, name, seeded(s), p)
        for s, p in ((1, False), (1, True), (2, False))
    ]
    assert torch.equal(clips[0], clips[1]) and not torch.equal(clips[0], clips[2])
    assert clips[0].shape == (3, 40) and clips[0].abs().max() <= 1
    assert model.unconditional_generate(1, 6, name, length=33).shape == (1, 33)


def test_batches_are_split_to_bound_the_memory(monkeypatch):
    """Clips are made in groups; the audio is the same."""
    model, seen = tiny(), []
    z = torch.randn(5, 2**16, generator=seeded())

    def forward(x, t, mel=None, rows=None):
        seen.append(len(x))
        return 0.1 * x

    monkeypatch.setattr(model, "forward", forward)
    wav = model.generate_from_latent(z, 3)
    assert seen == [2, 2, 1] * 3
    assert torch.equal(wav[4:], model.generate_from_latent(z[4:], 3))


def test_latents_make_the_same_audio_and_come_back():
    """Same z, same audio; invert closes the loop, both ways."""
    model = tiny()
    with torch.no_grad():
        model.output[2].weight *= 0.3
    z = torch.randn(2, 40, generator=seeded())
    for sampler in sorted(samplers.DETERMINISTIC):
        a, b = (model.generate_from_latent(z, 10, sampler) for _ in range(2))
        assert torch.equal(a, b) and a.abs().max() <= 1
    wav = 0.5 * torch.sin(torch.arange(40) / 3).expand(2, -1)
    latent = model.invert(wav, 20, iterations=8)
    assert latent.shape == wav.shape
    back = model.generate_from_latent(latent, 20)
    assert (back - wav).abs().max() < 1e-3
    assert (model.invert(back, 20, iterations=8) - latent).abs().max() < 1e-2


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
    """Of float64 and any strides: the same noise and audio as of tensors."""
    model, z = tiny(), torch.randn(2, 40, generator=seeded())
    backwards = z.double().numpy()[:, ::-1].copy()[:, ::-1]
    t = np.array([3, 150])
    with torch.no_grad():
        assert torch.equal(model(backwards, t), model(z, torch.from_numpy(t)))
    assert torch.equal(model.generate_from_latent(backwards, 5), model.generate_from_latent(z, 5))
    assert torch.equal(model.invert(backwards, 5), model.invert(z, np.int64(5)))
    clips = model.generate(np.int64(2), np.int32(3), length=np.int64(9), generator=seeded())
    assert torch.equal(clips, model.generate(2, 3, length=9, generator=seeded()))
    assert model.generate_from_latent(z[:0]).shape == model.invert(z[:0]).shape == (0, 40)


@pytest.mark.parametrize("data_std", [None, 0.2])
def test_precision_changes_rounding_alone(data_std):
    """.double() and .float(): the schedule is double in both; a clip of either goes in."""
    model, x, t = tiny(data_std=data_std), torch.randn(2, 40, generator=seeded()), [0.0, 77.3]
    t = torch.tensor(t, dtype=torch.float64)
    with torch.no_grad():
        single = model(x, t)
        double = model.double()(x, t)
        assert double.dtype == torch.float64 and torch.equal(model.double()(x.double(), t), double)
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.float()(x, t), single)
        assert torch.equal(model.float()(x.double(), t), single)
    assert model.generate(1, 3).dtype == torch.float32
    with pytest.raises(TypeError, match="autocast"):
        model.half()
    with torch.no_grad():
        assert torch.equal(model(x, t), single)


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
