"""Training with several processes is training with one: the same batches, losses and weights."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from training import NOISY, RATE, arguments, last_of, metrics, refused, rows, tone

import train

ROOT = Path(train.__file__).parent
KINDS = {
    "bits": ["gain_db=6", "speed=0.1", "ema=0.9", "weight_decay=0.1", "grad_clip=1"],
    "mse": [*NOISY, "gain_db=6", "start_lr=1e-3"],
    "long": ["model.pool=[2]", "accumulate=2"],
    "told": ["conditions=[label,speaker]", "condition_dropout=0.3"],
    "told mse": [
        *NOISY,
        "start_lr=1e-3",
        "conditions=[label]",
        "condition_dropout=0.5",
        "condition_lr=0.01",
    ],
}


def unit_of(kind):
    return "mse" if "mse" in kind else "bits"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nineteen tones: batches of 8 clips, and a last one of 3."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(19):
        soundfile.write(folder / f"{i}.wav", tone(60 + 17 * i, 100 + 20 * i), RATE)
    lines = ["path,label,speaker", *(f"{i}.wav,{i % 3},{'ab'[i % 2]}" for i in range(19))]
    for name, n in (("train", 19), ("valid", 5)):
        (folder / f"{name}.csv").write_text("\n".join(lines[: 1 + n]))
    return folder


def twenty_steps(data, run, kind):
    more = ["batch_size=8", "max_steps=20", "validation_interval=10", "n_listen=0",
            "plateau_patience=0", "plateau_factor=0.5", "checkpoint_interval=10"]  # fmt: skip
    return arguments(data, run, *more, *KINDS[kind])


FORKS = """
import json, os, sys
import torch
import train
torch.set_num_threads(1)
world, runs = int(sys.argv[1]), json.loads(sys.argv[2])

def wait_for_the_first(rank, seconds):  # twice as long as a process group waits by default
    import datetime, time
    import torch.distributed.distributed_c10d as c10d
    c10d.default_pg_timeout = datetime.timedelta(seconds=seconds / 2)
    real = train.ClipDataset
    def slow(*args, **kwargs):
        time.sleep(seconds * (rank == 0))
        return real(*args, **kwargs)
    train.ClipDataset = slow

pids = []
for rank in range(world):
    pid = os.fork()
    if pid == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1")
        try:
            if len(sys.argv) > 3:
                wait_for_the_first(rank, float(sys.argv[3]))
            for port, argv in runs:  # each run meets at a port of its own
                os.environ["MASTER_PORT"] = port
                train.main(argv)
        except BaseException as error:
            print(rank, repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    pids.append(pid)
raise SystemExit(max(os.waitpid(pid, 0)[1] for pid in pids) > 0)
"""


def in_processes(world, *runs, wait=()):
    """Those command lines one after the other, each in `world` processes; stdout and stderr.

    wait: seconds that the first one takes for its data, twice what a group waits by default.
    """
    ports = []
    with contextlib.ExitStack() as stack:
        for _ in runs:
            free = stack.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    runs = list(zip(ports, runs, strict=True))
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(world), json.dumps(runs), *map(str, wait)],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The folders of runs of 20 steps: (kind, processes) -> path."""
    folder = tmp_path_factory.mktemp("runs")
    paths = {(kind, world): folder / f"{kind}{world}" for kind in KINDS for world in (1, 2, 4)}
    for kind in KINDS:
        train.main(twenty_steps(data, paths[kind, 1], kind))
    for world in (2, 4):
        argvs = [twenty_steps(data, paths[kind, world], kind) for kind in KINDS]
        said, _ = in_processes(world, *argvs)
        assert said.count("finished: best validation") == len(KINDS)  # one process talks
    return paths


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_one_process(runs, kind, world):
    """1 x 8, 2 x 4 and 4 x 2 clips: training and validation losses equal to 1e-5 over 20 steps,
    with augmentation, a last batch that leaves processes without a clip, batches in parts, and
    conditions of which the same are withheld."""
    unit = unit_of(kind)
    for key in (f"train_{unit}", f"valid_{unit}", "grad_norm", "lr"):
        alone, together = metrics(runs[kind, 1], key), metrics(runs[kind, world], key)
        assert [step for step, _ in alone] == [step for step, _ in together]
        tolerance = 1e-5 if key != "grad_norm" else 1e-3
        for (step, a), (_, b) in zip(alone, together, strict=True):
            assert b == pytest.approx(a, abs=tolerance, rel=1e-6 if key != "grad_norm" else 1e-3), (
                key, step
            )  # fmt: skip
    assert len(metrics(runs[kind, 1], f"train_{unit}")) == 20


@pytest.mark.parametrize("world", [2, 4])
def test_the_schedule_steps_everywhere_and_one_process_writes(runs, world):
    """Rates after the plateau, weights and position are those of one process; no line is twice."""
    alone, together = last_of(runs["bits", 1]), last_of(runs["bits", world])
    for key in ("step", "epoch", "batches_done", "scale", "bad_validations", "validated"):
        assert alone[key] == together[key], key
    for name, value in alone["averaged"].items():
        torch.testing.assert_close(together["averaged"][name], value, rtol=1e-3, atol=1e-4)
    steps = [row["step"] for row in rows(runs["bits", world]) if "lr" in row]
    assert steps == list(range(1, 21))
    names = [{re.sub(r"\d+", "N", p.name) for p in runs["bits", w].iterdir()} for w in (1, world)]
    assert {n.split(".")[0] for n in names[0]} == {n.split(".")[0] for n in names[1]}


def test_a_run_goes_on_with_another_number_of_processes(runs, data, tmp_path):
    """Ten steps with two processes, ten with one: the losses are those of one."""
    argv = twenty_steps(data, tmp_path / "run", "bits")
    in_processes(2, [*argv, "max_steps=10"])
    train.main(argv)
    alone, both = metrics(runs["bits", 1], "train_bits"), metrics(tmp_path / "run", "train_bits")
    assert [step for step, _ in both] == list(range(1, 21))
    for (_, a), (_, b) in zip(alone, both, strict=True):
        assert b == pytest.approx(a, abs=2e-5)


def test_processes_wait_for_each_other_as_long_as_it_takes(data, tmp_path):
    """One that decodes its data for longer than a process group waits by default."""
    argv = [*twenty_steps(data, tmp_path / "run", "bits"), "max_steps=1"]
    in_processes(2, argv, wait=[3])
    assert last_of(tmp_path / "run")["step"] == 1


def test_torchrun_is_all_it_takes(runs, data, tmp_path):
    """The command of the documentation; an interrupted one saves and goes on."""
    argv = twenty_steps(data, tmp_path / "run", "bits")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "train.py", *argv, "max_steps=3"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone, both = metrics(runs["bits", 1], "train_bits"), metrics(tmp_path / "run", "train_bits")
    assert [b for _, b in both] == pytest.approx([a for _, a in alone[:3]], abs=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(capsys, arguments(data, tmp_path / "run"), "batch_size=2", "3 processes")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one(data, tmp_path):
    more = ["device=", "max_steps=5", "n_listen=0", "batch_size=8"]
    train.main([*arguments(data, tmp_path / "one", *more), "device=cuda:0"])
    in_processes(2, arguments(data, tmp_path / "two", *more))
    alone, both = (metrics(tmp_path / x, "train_bits") for x in ("one", "two"))
    for (_, a), (_, b) in zip(alone, both, strict=True):
        assert b == pytest.approx(a, rel=1e-3)
