"""Diffusion: the published network, the schedule, samplers against the closed form of Gaussian
data, and a model that refuses what it cannot do."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rawaudio import diffusion, samplers
from rawaudio.checkpoint import load_checkpoint, save_checkpoint
from rawaudio.diffusion import noise_error, relative_noise_error, step_features
from rawaudio.files import CheckpointError, read_metadata
from rawaudio.mel import log_mel, mel_filters
from rawaudio.samplers import (
    SAMPLERS,
    ddim,
    ddim_invert,
    ddpm,
    dpm_solver_pp_2m,
    fast,
    level_at,
    noise_schedule,
    step_at,
)
from sashimi.backbone import Sashimi
from sashimi.diffwave import CONFIGS, DiffusionConfig, MelUpsampler, SashimiDiffWave, named_config
from sashimi.s4 import S4

FIXTURES = Path(__file__).parent / "fixtures"
TINY = dict(d_model=4, n_layers=1, pool=[2, 2], d_state=4, l_max=64, clip_length=40)
MEL = dict(unconditional=False, n_mels=5, hop=6, n_fft=12)


def tiny(seed=0, **kwargs):
    """A small model whose last layer is no longer zero, so that it does something."""
    torch.manual_seed(seed)
    model = SashimiDiffWave(DiffusionConfig(**TINY | kwargs)).eval()
    torch.nn.init.normal_(model.output[2].weight, std=0.3)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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


def test_published_weights_give_their_noise(published, published_file):
    """Within 1e-5 of the published code run in double, in float32, to the end of the clip.

    Pitfall: the published CPU path, which forgets the conjugate poles, is off by 0.1 and more.
    """
    model = load_checkpoint(published_file)
    with torch.no_grad():
        y = model(published["x"], published["steps"])
    assert isinstance(model, SashimiDiffWave) and y.dtype == torch.float32
    assert (y - published["y"]).abs().max() < 1e-5
    assert (y[:, :64] - published["as_shipped"]).abs().max() > 0.1


def test_fractional_steps_give_the_published_noise(published, published_file):
    """Steps 3.25 and 147.25; what they gave is float32, off by 1.7e-4 itself."""
    model = load_checkpoint(published_file)
    with torch.no_grad():
        y = model(published["x"], published["fractional_steps"])
    assert (y - published["y_fractional"]).abs().max() < 3e-4


def test_step_features_are_the_published_ones(published):
    """Sines, then cosines; theirs are float32: 4.7e-6."""
    features = step_features(published["steps"])
    assert features.shape == (2, 128)
    assert (features - published["step_features"]).abs().max() < 1e-5


def test_published_settings_are_honoured(published_file):
    c = load_checkpoint(published_file).config
    assert (c.d_model, c.n_layers, c.pool, c.expand, c.ff, c.d_state) == (16, [2], [4, 4], 2, 2, 64)
    assert c.unet and c.bidirectional and c.glu and not c.tied and c.unconditional
    assert c.tier_lengths == [1024] * 3 and c.l_max == 1024
    assert (c.diffusion_steps, c.beta_first, c.beta_last) == (200, 1e-4, 0.02)


@pytest.mark.parametrize(
    "replace", [("- 0.02\n", "- 0.03\n"), ("unconditional: true", "unconditional: false"),
                ("- 0.02\n", "- much\n"), ("l_max: 1024\n", "")],
)  # fmt: skip
def test_published_settings_that_fit_no_model_are_refused(published, tmp_path, replace):
    text = published["cfg_yaml"].replace(*replace)
    assert text != published["cfg_yaml"]
    content = {"model_state_dict": published["state_dict"], "cfg_yaml": text}
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="other.pt"):
        load_checkpoint(tmp_path / "other.pt")


def test_published_files_with_other_tensors_are_refused(published, tmp_path):
    """One that is missing, or one too many: conditioning that we would ignore, say."""
    states = []
    for lacking in ("sashimi.fc_t1.weight", "sashimi.c_layers.0.fc_t.bias",
                    "sashimi.init_conv.0.conv.weight_v"):  # fmt: skip
        states.append({k: v for k, v in published["state_dict"].items() if k != lacking})
    states += [published["state_dict"] | {"rawaudio.mel.bias": torch.zeros(1)}, {}, {"a": 1}]
    for state in states:
        content = {"model_state_dict": state, "cfg_yaml": published["cfg_yaml"]}
        torch.save(content, tmp_path / "cut.pt")
        with pytest.raises(CheckpointError, match="cut.pt"):
            load_checkpoint(tmp_path / "cut.pt")


# ---- the noise schedule -----------------------------------------------------------------------


def test_schedule_is_the_published_one():
    published = torch.load(FIXTURES / "diffusion_schedule.pt", weights_only=True)
    alpha_bar = noise_schedule()
    assert alpha_bar.shape == (200,) and alpha_bar.dtype == np.float64
    np.testing.assert_allclose(alpha_bar, published["Alpha_bar"].double(), atol=1e-6)


def test_fast_sampler_makes_the_published_moves():
    """Fractional steps and x <- c1 (x - c2 noise) + sigma z of DiffWave's fast inference."""
    published = torch.load(FIXTURES / "diffusion_schedule.pt", weights_only=True)
    x = torch.randn(2, 5, generator=seeded(), dtype=torch.float64)
    seen = []

    def denoise(x, t):
        seen.append(t)
        return 0.3 * x + 0.1

    actual = fast(denoise, x, noise_schedule(), generator=seeded(1))
    np.testing.assert_allclose(seen, published["fast_T"].flip(0), atol=1e-4)
    g = seeded(1)
    for i in reversed(range(6)):
        c1, c2, sigma = (published[f"fast_{k}"][i] for k in ("c1", "c2", "sigma"))
        x = c1 * (x - c2 * (0.3 * x + 0.1))
        if i:
            x = x + sigma * torch.randn(2, 5, generator=g)
    torch.testing.assert_close(actual, x, rtol=0, atol=1e-6)


def test_ddpm_at_every_step_has_the_published_variances():
    """With T steps and a network that predicts nothing, the noise added is Sigma."""
    published = torch.load(FIXTURES / "diffusion_schedule.pt", weights_only=True)
    alpha_bar = noise_schedule()
    variance = torch.zeros((), dtype=torch.float64)
    for t in reversed(range(200)):
        variance = variance / (1 - np.linspace(1e-4, 0.02, 200)[t])
        variance = variance + (published["Sigma"][t].double() ** 2 if t else 0)
    x = torch.zeros(20000, 1, dtype=torch.float64)
    y = ddpm(lambda x, t: torch.zeros_like(x), x, alpha_bar, 200, generator=seeded())
    assert abs(y.var() / variance - 1) < 0.04


def test_levels_and_steps_are_inverses():
    alpha_bar = noise_schedule()
    t = np.linspace(0, 199, 57)
    np.testing.assert_allclose(step_at(alpha_bar, level_at(alpha_bar, t)), t, atol=1e-9)
    np.testing.assert_allclose(level_at(alpha_bar, np.arange(200)), alpha_bar, rtol=1e-12)
    assert step_at(alpha_bar, np.array([1.0, 0.0])).tolist() == [0, 199]


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


@pytest.mark.parametrize(
    ("sampler", "at_200"), [(ddpm, 0.02), (samplers.dpm_solver_pp_2m_sde, 0.012)]
)
def test_stochastic_samples_have_the_moments_of_the_data(sampler, at_200):
    """200 steps: within 4 % (and 2 sigma of the draw); fewer steps lose variance."""
    alpha_bar, n = noise_schedule(), 40000
    a = alpha_bar[-1]
    g = seeded()
    x = torch.randn(n, 2, generator=g, dtype=torch.float64) @ root(marginal(a))
    x = x + math.sqrt(a) * MEAN
    off = []
    for steps in (20, 60, 200):
        y = sampler(ideal(alpha_bar), x, alpha_bar, steps, generator=g)
        assert (y.mean(0) - MEAN).abs().max() < 0.01
        off.append((torch.cov(y.T) - COV).abs().max().item())
    assert off[0] > off[2] and off[2] < at_200, off


def test_the_stochastic_solver_needs_fewer_steps_than_ancestral_sampling():
    """20 steps: a third of the error of the covariance."""
    alpha_bar, n, g = noise_schedule(), 40000, seeded()
    x = torch.randn(n, 2, generator=g, dtype=torch.float64) @ root(marginal(alpha_bar[-1]))
    x = x + math.sqrt(alpha_bar[-1]) * MEAN
    off = []
    for sampler in (ddpm, samplers.dpm_solver_pp_2m_sde):
        y = sampler(ideal(alpha_bar), x, alpha_bar, 20, generator=g)
        off.append((torch.cov(y.T) - COV).abs().max().item())
    assert off[1] < off[0] / 3, off


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
    y = samplers.dpm_solver_pp_2m_sde(denoise, x, alpha_bar, 7, generator=seeded(1))
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
    """From the last level downwards, each t once; one step is enough, except for fast."""
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


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_refuse_impossible_steps(name):
    for steps in (0, -1, 201, 2.5, True, None):
        with pytest.raises(ValueError, match="steps="):
            SAMPLERS[name](lambda x, t: x, torch.ones(1, 3), noise_schedule(), steps)


# ---- the model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"), [("large", 23.5), ("small", 7.7), ("small_unidirectional", 7.5)]
)
def test_named_configurations_have_their_size(name, millions):
    with torch.device("meta"):
        model = SashimiDiffWave(named_config(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_unknown_configurations_are_refused():
    with pytest.raises(ValueError, match="did you mean small"):
        named_config("smal")
    for bad in (dict(beta_first=0.0), dict(beta_last=1.0), dict(diffusion_steps=0), dict(hop=0),
                dict(beta_first=0.03), dict(n_fft=100), dict(data_std=0.0)):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            DiffusionConfig(**bad)
    assert set(CONFIGS) == {"large", "small", "small_unidirectional"}


@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": False, "tied": True}, {"ff": 0} | MEL])
def test_noise_has_the_shape_of_the_audio(kwargs):
    """Any length, multiple of the pooling or not; untrained, the prediction is zero."""
    model = tiny(**kwargs)
    for length in (1, 3, 8, 64, 77):
        x = torch.randn(2, length, generator=seeded())
        mel = torch.randn(2, 5, -(-length // 6), generator=seeded()) if model.upsample else None
        y = model(x, torch.tensor([0, 199]), mel)
        assert y.shape == x.shape and y.isfinite().all() and (y != 0).any()
    untrained = SashimiDiffWave(model.config)
    assert (untrained(x, torch.tensor([0, 199]), mel) == 0).all()


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
        torch.nn.init.zeros_(model.output[2].weight)
        torch.testing.assert_close(model(short, steps), keep * short, rtol=1e-4, atol=1e-6)
    assert (whole - keep * short).abs().max() > 0


def test_relative_error_is_1_for_who_hears_nothing():
    """Untrained, on white audio of the model's rms; above it on audio that is louder."""
    model = SashimiDiffWave(DiffusionConfig(**TINY, data_std=0.1))
    wav = 0.1 * torch.randn(64, 400, generator=seeded())
    with torch.no_grad():
        assert relative_noise_error(model, wav, seeded(1)) == pytest.approx(1, abs=0.03)
        assert relative_noise_error(model, 2 * wav, seeded(1)) > 1.5
        # a clip meets the same step and noise in a part of a batch as in all of it
        whole = relative_noise_error(model, wav[:4], seeded(2)).item()
        parts = [relative_noise_error(model, wav[i : i + 2], seeded(2), (i, 4)) for i in (0, 2)]
    assert sum(parts).item() / 2 == pytest.approx(whole, rel=1e-5)


def test_steps_are_even_in_the_signal_to_noise_ratio():
    """From the last step's to the first's, in equal parts of its logarithm; exact between steps."""
    alpha_bar = noise_schedule()
    t, levels = diffusion._even_in_snr(alpha_bar, np.linspace(0, 1, 9))
    np.testing.assert_allclose(levels[[0, -1]], alpha_bar[[0, -1]], rtol=1e-9)
    odds = np.log(levels / (1 - levels))
    np.testing.assert_allclose(np.diff(odds), np.diff(odds)[0], rtol=1e-9)
    np.testing.assert_allclose(level_at(alpha_bar, t), levels, rtol=1e-9)
    uniform, _ = diffusion._even_in_t(alpha_bar, (np.arange(200) + 0.5) / 200)
    assert uniform.tolist() == list(range(200))


def test_noise_error_is_that_of_the_prediction():
    """Untrained models predict zero: the noise's own power."""
    model = SashimiDiffWave(DiffusionConfig(**TINY))
    error = noise_error(model, torch.zeros(16, 400), seeded())
    assert error.item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": False}, MEL, {"data_std": 0.2}])
def test_gradients_reach_every_parameter(kwargs):
    """At the start only those of the zero last layer; after it has moved, all."""
    model = tiny(**kwargs).train()
    x = torch.randn(2, 48, generator=seeded())
    mel = torch.randn(2, 5, 8, generator=seeded()) if model.upsample else None
    loss = F.mse_loss(model(x, torch.tensor([3, 150]), mel), x)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any(), name


def test_the_prediction_depends_on_step_and_mel_and_the_whole_clip():
    """Bidirectional: the first sample sees the last one, also through the poolings."""
    model = tiny(**MEL)
    x = torch.randn(1, 48, generator=seeded(), requires_grad=True)
    mel = torch.randn(1, 5, 8, generator=seeded(), requires_grad=True)
    t = torch.tensor([10.5], dtype=torch.float64, requires_grad=True)
    model(x, t, mel)[0, 0].backward()
    assert (x.grad[0] != 0).all() and t.grad != 0
    assert (mel.grad[0, :, 0] != 0).any()


def test_unidirectional_models_are_causal():
    model = tiny(bidirectional=False)
    x = torch.randn(1, 48, generator=seeded(), requires_grad=True)
    model(x, torch.tensor([10]))[0, 20].backward()
    future, past = x.grad[0, 21:].abs().max(), x.grad[0, :21].abs().max()
    assert future < 1e-6 * past  # FFT rounding


def test_clips_of_a_batch_do_not_see_each_other():
    model, x = tiny(), torch.randn(3, 50, generator=seeded())
    t = torch.tensor([0.0, 77.5, 199.0])
    with torch.no_grad():
        whole = model(x, t)
        parts = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)


def test_kernels_are_computed_once(monkeypatch):
    """They depend on parameters alone: one computation per S4 layer, however many passes."""
    calls, kernel = [], S4.kernel
    monkeypatch.setattr(S4, "kernel", lambda s, n: calls.append(s) or kernel(s, n))
    model = tiny().train()  # generation is in eval mode, whatever the mode was
    a = model.unconditional_generate(2, steps=7, sampler="ddim", generator=seeded())
    assert len(calls) == len([m for m in model.modules() if isinstance(m, S4)])
    assert model.training and torch.equal(
        a, model.eval().unconditional_generate(2, steps=7, sampler="ddim", generator=seeded())
    )


def test_conditioned_backbones_have_no_recurrence():
    for kwargs in (dict(d_local=2), dict(shift=False)):
        net = Sashimi(4, 1, [2], d_state=4, l_max=8, **kwargs)
        with pytest.raises(ValueError, match="recurrence"):
            net.setup_rnn()
    with pytest.raises(ValueError, match="recurrence"):
        net.absorb(torch.zeros(1, 8, 4), net.default_state(1))
    net = Sashimi(4, 1, [2], d_state=4, l_max=8, d_global=2, d_local=3)
    x, vector, features = torch.zeros(2, 7, 4), torch.zeros(2, 2), torch.zeros(2, 7, 3)
    assert net(x, global_=vector, local=features).shape == x.shape
    for bad in (dict(), dict(global_=vector), dict(global_=vector[:1], local=features),
                dict(global_=vector, local=features[:, :6])):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            net(x, **bad)


# ---- generation -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_generator_same_clips(name):
    model, steps = tiny(), 6
    state = torch.get_rng_state()
    make = [model.unconditional_generate(3, steps, name, generator=seeded(s)) for s in (1, 1, 2)]
    assert torch.equal(make[0], make[1]) and not torch.equal(make[0], make[2])
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    assert make[0].shape == (3, 40) and make[0].abs().max() <= 1 and not make[0].requires_grad
    assert model.unconditional_generate(1, steps, name, length=33).shape == (1, 33)


def test_progress_changes_no_audio(capsys):
    for name in SAMPLERS:
        a, b = (
            tiny().unconditional_generate(1, 6, name, generator=seeded(), progress=shown)
            for shown in (True, False)
        )
        assert torch.equal(a, b)


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
    model = tiny(**MEL)
    mel = log_mel(torch.rand(2, 50, generator=seeded()) - 0.5, 16000, 5, 12, 6)
    assert mel.shape == (2, 5, 9)
    a, b = (model.vocode(mel, generator=seeded()) for _ in range(2))
    assert a.shape == (2, 54) and torch.equal(a, b) and a.abs().max() <= 1
    c = model.vocode(mel + 1, 4, "dpm_solver_pp_2m", generator=seeded())
    assert c.shape == (2, 54)


@pytest.mark.parametrize("hop", [256, 200, 1, 7, 15, 80])
def test_upsampling_gives_a_hop_per_frame(hop):
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
    model, vocoder = tiny(), tiny(**MEL)
    z, mel = torch.randn(2, 40), torch.zeros(2, 5, 4)
    x, t = torch.zeros(2, 24), torch.tensor([1, 2])
    nan = z.clone()
    nan[1, 3] = math.nan
    cases = [
        ("did you mean ddim", lambda: model.unconditional_generate(1, 5, "dimm")),
        ("did you mean dpm_solver", lambda: model.generate_from_latent(z, 5, "dpm++2m_solver")),
        ("did you mean ddpm", lambda: vocoder.vocode(mel, 5, "dppm")),
        ("steps=0", lambda: model.unconditional_generate(1, 0)),
        ("steps=201", lambda: model.unconditional_generate(1, 201, "ddpm")),
        ("steps=2.0", lambda: model.generate_from_latent(z, 2.0)),
        ("n=True", lambda: model.generate(True)),
        ("length=2.5", lambda: model.generate(1, length=2.5)),
        ("steps=True", lambda: model.invert(z, True)),
        ("iterations=1.5", lambda: model.invert(z, 2, 1.5)),
        ("guidance=big", lambda: model.generate(1, guidance="big")),
        ("steps=7", lambda: model.unconditional_generate(1, 7, "fast")),
        ("steps=-1", lambda: model.invert(z, -1)),
        ("n=0", lambda: model.unconditional_generate(0)),
        ("length=0", lambda: model.unconditional_generate(1, length=0)),
        ("iterations=0", lambda: model.invert(z, 2, 0)),
        ("z holds values", lambda: model.generate_from_latent(nan)),
        ("z holds values", lambda: model.generate_from_latent(z / 0)),
        ("wav holds values", lambda: model.invert(nan)),
        ("z of shape", lambda: model.generate_from_latent(z[0])),
        ("z of shape", lambda: model.generate_from_latent(z[:, :0])),
        ("wav of shape", lambda: model.invert(z[None])),
        ("noise of its own", lambda: model.generate_from_latent(z, 5, "ddpm")),
        ("unconditional", lambda: model.vocode(mel)),
        ("use vocode", lambda: vocoder.unconditional_generate(1)),
        ("use vocode", lambda: vocoder.generate_from_latent(z)),
        ("mel of shape", lambda: vocoder.vocode(mel[:, :4])),
        ("mel of shape", lambda: vocoder.vocode(mel[0])),
        ("mel of shape", lambda: vocoder.vocode(mel[..., :0])),
        ("mel holds values", lambda: vocoder.vocode(mel / 0)),
        ("mel of none", lambda: vocoder(x, t)),
        ("at 16000 Hz", lambda: vocoder(x, t, mel[..., :3])),
        ("takes no mel", lambda: model(x, t, mel)),
        ("x of shape", lambda: model(x[0], t)),
        ("x of shape", lambda: model(x[:, :0], t)),
        ("from 0 to 199", lambda: model(x, t[:1])),
        ("from 0 to 199", lambda: model(x, t - 2)),
        ("from 0 to 199", lambda: model(x, t + 198)),
        ("from 0 to 199", lambda: model(x, t * math.nan)),
    ]
    pcm = torch.zeros(2, 40, dtype=torch.int16)
    wrong = [
        ("wav: .*/ 32768", lambda: model.invert(pcm)),
        ("z: .*float", lambda: model.generate_from_latent(pcm.numpy())),
        ("x: .*float", lambda: model(pcm, t)),
        ("z: .*not str", lambda: model.generate_from_latent("z.pt")),
        ("diffusion_steps: .*not NoneType", lambda: model(x, None)),
        ("mel: .*not NoneType", lambda: vocoder.vocode(None)),
        ("generator=3", lambda: model.generate(1, generator=3)),
    ]
    for error, pairs in ((ValueError, cases), (TypeError, wrong)):
        for words, call in pairs:
            with pytest.raises(error, match=words) as raised:
                call()
            assert "\n" not in str(raised.value)


# ---- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"bidirectional": False, "glu": False, "tied": True}, MEL, {"data_std": 0.2}],
)
def test_what_was_saved_comes_back_to_the_bit(tmp_path, kwargs):
    model, path = tiny(**kwargs), tmp_path / "model.safetensors"
    save_checkpoint(path, model, step=20, valid_loss=0.5)
    loaded = load_checkpoint(path)
    assert isinstance(loaded, SashimiDiffWave) and not loaded.training
    assert loaded.config == model.config and read_metadata(path)["model"] == "diffwave"
    theirs, ours = loaded.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in ours)
    x, t = torch.randn(2, 48, generator=seeded()), torch.tensor([0.5, 20])
    mel = torch.zeros(2, 5, 8) if model.upsample else None
    with torch.no_grad():
        assert torch.equal(loaded(x, t, mel), model(x, t, mel))


def test_published_weights_stay_what_they_are(published_file, tmp_path):
    """Published -> ours -> loaded: the same parameters and settings."""
    model = load_checkpoint(published_file)
    save_checkpoint(tmp_path / "ours.safetensors", model)
    ours = load_checkpoint(tmp_path / "ours.safetensors")
    assert ours.config == model.config
    a, b = ours.state_dict(), model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


# ---- mel --------------------------------------------------------------------------------------


def test_mel_filters_are_slaney_triangles():
    """Peaks: 66.7 Hz per mel up to 1 kHz, factors of 6.4^(1/27) above; area 1 each over Hz."""
    rate, n_fft = 16000, 2**16
    filters = mel_filters(rate, 40, n_fft)
    assert filters.shape == (40, n_fft // 2 + 1) and filters.min() >= 0
    np.testing.assert_allclose(filters.sum(1) * rate / n_fft, 1, atol=1e-3)
    top = 15 + math.log(8) / (math.log(6.4) / 27)  # mels of 8 kHz
    mels = np.arange(1, 41) * top / 41
    hertz = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    np.testing.assert_allclose(filters.argmax(1) * rate / n_fft, hertz, atol=0.3)


def test_log_mel_of_a_tone_peaks_in_its_band():
    """One frame per hop, rounded up; the loudest band holds the tone; silence is log 1e-5."""
    t = torch.arange(16000) / 16000
    mel = log_mel(torch.stack([torch.sin(2 * math.pi * 1000 * t), 0 * t]), 16000)
    assert mel.shape == (2, 80, 63) and mel.dtype == torch.float32
    assert (mel[1] - math.log(1e-5)).abs().max() < 1e-4
    peak = mel_filters(16000, 80, 1024)[:, 64].argmax()  # 1000 Hz is bin 64
    assert (mel[0, :, 5:-5].argmax(0) == peak).all() and -1 < mel[0].max() < 4


def test_log_mel_frames_sit_on_their_samples():
    """A click in samples [i hop, (i + 1) hop) is loudest in frame i; any number of clips."""
    wav = torch.zeros(3, 2, 1000)
    wav[..., 5 * 64 + 32] = 1
    mel = log_mel(wav, 8000, 20, 256, 64)
    assert mel.shape == (3, 2, 20, 16) and (mel.exp().sum(-2).argmax(-1) == 5).all()
    assert log_mel(wav[..., :1], 8000).shape == (3, 2, 80, 1)


def test_log_mel_refuses_what_makes_no_spectrogram():
    wav = torch.zeros(1, 100)
    for bad in (dict(wav=wav[:, :0]), dict(wav=wav.sum()), dict(hop=0), dict(n_fft=100),
                dict(n_mels=0), dict(sample_rate=0)):  # fmt: skip
        with pytest.raises(ValueError, match="wav of shape|sample_rate="):
            log_mel(**dict(wav=wav, sample_rate=8000) | bad)
