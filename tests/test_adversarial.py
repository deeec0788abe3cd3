"""Generator and critic in turn: losses, penalties, augmentation, processes, validation."""

from pathlib import Path

import pytest
import soundfile
import torch
from models import seeded
from training import (
    RATE,
    arguments,
    assert_same,
    in_processes,
    last_of,
    metrics,
    refused,
    tone,
    tones,
)

import train
from baselines.wavegan import WaveGAN, WaveGANConfig
from metrics.distance import Compared
from rawaudio import critics, resume
from rawaudio.adversarial import AdversarialTask
from rawaudio.checkpoint import load_checkpoint
from rawaudio.critics import LOGISTIC, Adaptive
from rawaudio.data import ClipDataset, to_wave
from rawaudio.errors import UserError
from rawaudio.files import CheckpointError

# RF5/simple-asgan b6afc626, see fixtures/README.md
RECORDED = torch.load(Path(__file__).parent / "fixtures" / "critics.pt", weights_only=True)
SIZE = {"slice_len": 64, "channels": 4, "latent_dim": 6, "sample_rate": RATE, "clip_length": 40}


def test_logistic_losses_are_the_recorded_ones():
    """With their gradients, also of answers so large that softplus is a line."""
    record = RECORDED["logistic"]
    for dtype, key in ((torch.float32, "f32"), (torch.float64, "f64")):
        answers = (record[side].detach() for side in ("real_logits", "fake_logits"))
        real, fake = (x.to(dtype).clone().requires_grad_() for x in answers)
        loss = LOGISTIC.critic(real, fake).mean()
        loss.backward()
        wanted = record[key]
        torch.testing.assert_close(loss.detach(), wanted["d_loss"])
        torch.testing.assert_close(real.grad, wanted["d_grad_real"])
        torch.testing.assert_close(fake.grad, wanted["d_grad_fake"])
        torch.testing.assert_close(LOGISTIC.generator(fake).mean().detach(), wanted["g_loss"])


def test_r1_is_the_recorded_one():
    """Of D = sum(a x^2) / 2: (a x)^2 / 2 of each clip, and it can be learned from."""
    record = RECORDED["r1"]
    a = record["a"].clone().requires_grad_()
    each = critics.r1_penalty(lambda x: (a * x**2).sum((1, 2)) / 2, record["c"], None, None)
    assert each.shape == (4,)
    torch.testing.assert_close((record["gamma"] * each).sum().detach(), record["value"])
    each.sum().backward()
    torch.testing.assert_close(a.grad, record["a"] * record["c"] ** 2)


@pytest.mark.parametrize("record", RECORDED["ada"])
def test_the_probability_of_augmentation_is_the_recorded_one(record):
    """In a run that is saved and gone on with after every step."""
    adaptive = Adaptive(record["p_start"])
    for answers, p in zip(record["real_logits"], record["p"], strict=True):
        for part in answers.flatten().split(3):
            adaptive.hears(part)
        adaptive.updated(torch.device("cpu"))
        assert adaptive.p == pytest.approx(float(p), abs=1e-7)
        again = Adaptive(0.0)
        vars(again).update(vars(adaptive))
        adaptive = again


class Noisy(WaveGAN):
    """A WaveGAN with the other loss, and an augmentation."""

    loss = LOGISTIC

    def augment(self, real, made, p, rng):
        return real + p, made + p


def task_of(module=WaveGAN, seed=0, **settings):
    config = WaveGANConfig(**SIZE, **settings)
    torch.manual_seed(seed)
    task, model = AdversarialTask(config, 64), module(config)
    return task, model, task.networks(model)


def batch_of(n):
    wav = torch.rand(n, 64, generator=seeded()) - 0.5
    return {"wav": wav, "index": torch.arange(n), "planned": torch.tensor(n)}


def grads(network):
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("module", [WaveGAN, Noisy])
def test_each_turn_moves_its_own_network(module):
    """And in parts as in one: the same latents, places between clips, and shifts."""
    task, model, networks = task_of(module, augment=0.1 * (module is Noisy), critic_steps=2)
    turns = [task.turns(step) for step in range(3)]
    assert turns == [("critic",), ("critic", "generator"), ("critic",)]
    batch = batch_of(6)
    for name, own, other in (("critic", task.critic, model), ("generator", model, task.critic)):
        results = []
        for size in (6, 2):
            for network in (own, other):
                network.zero_grad()
            for first in range(0, 6, size):
                part = {k: v[first : first + size] if v.dim() else v for k, v in batch.items()}
                loss = task.loss(networks[name], part, (first, 6), seeded)
                loss.backward()
            assert all(grad is None for grad in grads(other))
            results.append(grads(own))
        for whole, parts in zip(*results, strict=True):
            torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
        empty = {"wav": torch.zeros(1, 64), "index": torch.arange(0), "planned": torch.tensor(6)}
        assert task.loss(networks[name], empty, (6, 6), seeded).item() == 0
    assert all(p.requires_grad for network in networks.values() for p in network.parameters())


def test_a_lazy_penalty_is_as_strong_as_one_at_every_update():
    """It comes at every third update of the critic, three times as strong."""
    batch = batch_of(4)

    def losses(**settings):
        task, _, networks = task_of(Noisy, phase_shuffle=0, **settings)
        found = []
        for _ in range(4):
            found.append(task.loss(networks["critic"], batch, (0, 4), seeded).item())
            task.updated("critic", torch.device("cpu"))
            task.updated("generator", torch.device("cpu"))
        return found

    none, always, lazy = losses(penalty=0), losses(), losses(penalty_interval=3)
    strength = always[0] - none[0]
    assert strength > 0 and lazy[1:3] == pytest.approx(none[1:3])
    assert lazy[0] - none[0] == pytest.approx(3 * strength) == lazy[3] - none[3]


def test_what_the_task_knows_goes_on():
    """Critic, its updates, and augmentation; a state without a critic is refused."""
    task, _, networks = task_of(Noisy, augment=0.2)
    task.loss(networks["critic"], batch_of(4), (0, 4), seeded)
    task.updated("critic", torch.device("cpu"))
    other, _, _ = task_of(Noisy, seed=5, augment=0.2)
    other.load_state_dict(task.state_dict())
    assert_same(other.state_dict(), task.state_dict())
    assert other.updates == 1 and other.adaptive.clips == 4
    with pytest.raises(UserError, match="no critic"):
        other.load_state_dict({})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine tones: of batches of 4 the last has one clip."""
    folder = tmp_path_factory.mktemp("data")
    return tones(folder, range(60, 117, 7), range(4), label="ababababa")


def wavegan(data, folder, *more):
    few = ["model=wavegan", "conditions=[label]", "batch_size=4", "max_steps=6", "n_listen=0",
           "validation_interval=3", "start_lr=1e-3", "schedule=constant", "ema=0.9", "grad_clip=5",
           "model.critic_steps=2", "model.critic_rate=0.5"]  # fmt: skip
    sizes = [f"model.{key}={value}" for key, value in SIZE.items()]
    return arguments(data, folder, *few, *more, model=sizes)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    train.main(wavegan(data, folder))
    return folder


def test_a_run_trains_both_and_keeps_the_generator(run, data):
    """The critic in every step, the generator in every second; each with rates of its own. The
    best weights are the averaged generator's, and are scored as the run says."""
    assert [step for step, _ in metrics(run, "train_critic")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in metrics(run, "train_generator")] == [2, 4, 6]
    assert [step for step, _ in metrics(run, "valid_fid")] == [3, 6]
    last = last_of(run)
    groups = {group["name"]: group for group in last["optimizer"]["param_groups"]}
    assert groups["critic weights"]["lr"] == 0.5e-3 and groups["generator weights"]["lr"] == 1e-3
    assert groups["critic weights"]["betas"] == (0.5, 0.9)
    steps = {int(state["step"]) for state in last["optimizer"]["state"].values()}
    assert steps == {3, 6} and last["task"]["updates"] == 6
    best = load_checkpoint(run / "best.safetensors")
    assert set(last["task"]["critic"]) & {"output.weight"} and not hasattr(best, "output")
    valid = ClipDataset(data / "valid.csv", RATE, pcm=True)
    valid.tell(best.conditions)
    score = AdversarialTask.scores(best, valid)["fid"]
    assert score == pytest.approx(min(value for _, value in metrics(run, "valid_fid")), rel=1e-3)
    moving, averaged = last["model"], last["averaged"]
    assert any(not torch.equal(moving[name], averaged[name]) for name in moving)


def test_two_processes_are_one(run, data, tmp_path):
    """In parts: losses, and the weights of both networks."""
    in_processes(2, wavegan(data, tmp_path / "two", "accumulate=2"))
    for key in ("train_critic", "train_generator"):
        alone, both = dict(metrics(run, key)), dict(metrics(tmp_path / "two", key))
        assert both == pytest.approx(alone, abs=1e-4)
    both = last_of(run), last_of(tmp_path / "two")
    weights = [last["model"] | last["task"]["critic"] for last in both]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("setting", "words"),
    [("seq_len=60", "64 samples"), ("compile=true", ""), ("betas=[0.5]", "two numbers"),
     ("model.guidance=2", ""), ("model.guided=[label]", "no guidance"),
     ("model.augment=0.1", "no augmentation")],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(data, tmp_path, capsys, setting, words):
    argv = wavegan(data, tmp_path / "new", setting)
    refused(capsys, argv, setting.removeprefix("model."), words)


def test_a_state_with_an_odd_task_is_refused_and_one_from_before_is_read(run, tmp_path):
    content = last_of(run)
    told = {key: content["config"][key] for key in ("conditions", "condition_counts")}
    config = WaveGANConfig(**SIZE, critic_steps=7, **told)
    torch.save(content | {"task": 3}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="task is a int"):
        resume.read(tmp_path / "last.pt", config)
    del content["task"]  # of a file from before there was one
    torch.save(content, tmp_path / "last.pt")
    assert resume.read(tmp_path / "last.pt", config)["task"] == {}


def test_clips_come_from_latents():
    """Same z, same audio, of any length up to what is made; a model in training stays so."""
    torch.manual_seed(0)
    model = WaveGAN(WaveGANConfig(**SIZE))
    z = model.latents(3, seeded())
    wavs = model.generate_from_latent(z)
    assert z.shape == (3, 6) and z.abs().max() <= 1
    assert wavs.shape == (3, 40) and not wavs.requires_grad and model.training
    assert torch.equal(wavs, model.unconditional_generate(3, generator=seeded()))
    assert torch.equal(model.generate(3, 64, seeded())[:, :40], wavs)
    for bad in (z[:, :5], z[0], z / 0):
        with pytest.raises(UserError, match="z"):
            model.generate_from_latent(bad)
    for settings in ({"length": 65}, {"length": 0}, {"label": "a"}):
        with pytest.raises(UserError, match=next(iter(settings))):
            model.generate(1, **settings)


def test_clips_of_spoken_digits_are_compared_by_the_classifier(tmp_path):
    """At its rate or above; others, and other words, by spectrograms. The same clips are at no
    distance, noise is far."""
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", tone(8000, 200 + 90 * i, 16000), 16000)

    class Player:
        def __init__(self, wavs):
            self.wavs = wavs

        def generate(self, n, length, generator):
            return self.wavs[:n, :length]

    rows = [("seven", 16000, "classifier"), ("seven", 4000, "spectrograms"),
            ("dog", 16000, "spectrograms")]  # fmt: skip
    for label, rate, words in rows:
        csv = tmp_path / f"{label}.csv"
        csv.write_text("path,label\n" + "".join(f"{i}.wav,{label}\n" for i in range(6)))
        ds, length = ClipDataset(csv, rate, pcm=True), rate // 2
        compared = Compared(ds, rate, length)
        assert words in compared.features and compared.floor() >= 0
        same = torch.stack([to_wave(ds[i]) for i in range(6)])
        far = torch.rand(6, length, generator=seeded()) - 0.5
        assert compared.fid(Player(same)) < 1e-3 * compared.fid(Player(far))
