"""Training with several processes is training with one: the same batches, losses and weights."""

import datetime
import os
import re
import time

import pytest
import torch
import torch.distributed.distributed_c10d as c10d
from torch.distributed import run as torch_run
from training import (
    NOISY,
    arguments,
    ended,
    forked,
    in_processes,
    last_of,
    metrics,
    refused,
    rows,
    tones,
    trained,
)

import train
from rawaudio import run

KINDS = {
    "bits": ["gain_db=6", "speed=0.1", "ema=0.9", "weight_decay=0.1", "grad_clip=1",
             "conditions=[label,speaker]", "condition_dropout=0.3", "accumulate=2"],
    "mse": [*NOISY, "gain_db=6", "conditions=[label]", "condition_dropout=0.5", "start_lr=1e-3"],
}  # fmt: skip
PAIRS = [("bits", 2), ("mse", 4)]  # of processes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nineteen tones: batches of 8 clips, and a last one of 3."""
    columns = {"label": ("012" * 7)[:19], "speaker": ("ab" * 10)[:19]}
    return tones(tmp_path_factory.mktemp("data"), range(60, 367, 17), range(5), **columns)


def steps(kind):
    """Eight, the last two of them at the rate of the plateau."""
    few = ["batch_size=8", "max_steps=8", "validation_interval=2", "n_listen=0"]
    return [*few, "start_lr=0.4", "plateau_patience=0", "plateau_factor=0.5", *KINDS[kind]]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """(kind, processes) -> folder of a run; the first process decodes its data for longer than
    a process group waits by default, and is waited for."""
    folder, decode = tmp_path_factory.mktemp("runs"), run.ClipDataset
    paths = {(kind, n): folder / f"{kind}{n}" for kind, n in [(k, 1) for k in KINDS] + PAIRS}
    for kind in KINDS:
        trained(data, paths[kind, 1], *steps(kind))

    def slow(*args, **kwargs):
        time.sleep(0.7 * (os.environ["RANK"] == "0"))
        return decode(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c10d, "default_pg_timeout", datetime.timedelta(seconds=0.5))
        patch.setattr(run, "ClipDataset", slow)
        for kind, world in PAIRS:
            said = in_processes(world, arguments(data, paths[kind, world], *steps(kind)))
            assert said.count("finished: best validation") == 1  # one process talks
    return paths


def assert_close(a, b, unit):
    for key in (f"train_{unit}", f"valid_{unit}", "grad_norm", "lr"):
        alone, together = (dict(metrics(run, key)) for run in (a, b))
        norm = key == "grad_norm"
        assert together == pytest.approx(alone, abs=1e-3 if norm else 1e-5, rel=norm * 1e-3), key
        assert len(alone) == (4 if key == f"valid_{unit}" else 8)


@pytest.mark.parametrize(("kind", "world"), PAIRS)
def test_losses_are_those_of_one_process(runs, kind, world):
    """1 x 8, 2 x 4 and 4 x 2 clips: training and validation losses equal to 1e-5 over eight steps,
    with augmentation, a last batch that leaves processes without a clip, batches in parts, and
    conditions of which the same are withheld."""
    assert_close(runs[kind, 1], runs[kind, world], kind)


def test_the_schedule_steps_everywhere_and_one_process_writes(runs):
    """Rates after the plateau, weights and position are those of one process; no line is twice."""
    alone, together = last_of(runs["bits", 1]), last_of(runs["bits", 2])
    for key in ("step", "epoch", "batches_done", "scale", "bad_validations", "validated"):
        assert alone[key] == together[key], key
    assert alone["scale"] < 1
    for name, value in alone["averaged"].items():
        torch.testing.assert_close(together["averaged"][name], value, rtol=0, atol=4e-3)
    assert [x["step"] for x in rows(runs["bits", 2]) if "lr" in x] == list(range(1, 9))
    names = [{re.sub(r"\d+", "N", p.name) for p in runs["bits", w].iterdir()} for w in (1, 2)]
    assert {n.split(".")[0] for n in names[0]} == {n.split(".")[0] for n in names[1]}


def test_torchrun_is_all_it_takes_and_one_process_can_go_on(runs, data, tmp_path, monkeypatch):
    """What it does for the command of the documentation; then the run with another number of
    processes."""
    argv, real = arguments(data, tmp_path / "run", *steps("bits")), torch_run.config_from_args

    def forking(args):  # in place of two new interpreters
        config, _python, (*_script, last) = real(args)
        config.start_method = "fork"
        return config, train.main, [[*argv, last]]

    monkeypatch.setattr(torch_run, "config_from_args", forking)
    command = ["--standalone", "--nproc_per_node=2", train.__file__, "max_steps=4"]
    assert ended(forked(torch_run.main, command)) == [0]
    assert last_of(tmp_path / "run")["step"] == 4
    train.main(argv)
    assert_close(runs["bits", 1], tmp_path / "run", "bits")


def test_a_batch_that_cannot_be_shared_is_refused(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(capsys, arguments(data, tmp_path / "run"), "batch_size=2", "3 processes")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one(data, tmp_path):
    more = ["device=", "max_steps=5", "n_listen=0", "batch_size=8"]
    trained(data, tmp_path / "one", *more, "device=cuda:0")
    in_processes(2, arguments(data, tmp_path / "two", *more))
    alone, both = (dict(metrics(tmp_path / x, "train_bits")) for x in ("one", "two"))
    assert both == pytest.approx(alone, rel=1e-3)
