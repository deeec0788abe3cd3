"""A run goes on where it stopped, whatever stopped it, and ends as if nothing had."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from training import (
    EVERYTHING,
    NOISY,
    arguments,
    assert_same,
    last_of,
    metrics,
    refused,
    rows,
)

import train
from sashimi.checkpoint import load_checkpoint
from sashimi.likelihood import masked_bits

data = training.data
CURVES = ("train_bits", "valid_bits", "lr", "grad_norm")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main(arguments(data, folder))
    return folder


@pytest.mark.parametrize("key", [False, True])
def test_a_resumed_run_is_the_uninterrupted_run(data, tmp_path, key):
    """8 steps at once, or 4 (in the middle of an epoch), then 4 more: the same to the last bit,
    with dropout, augmentation, averaging, warm-up, plateau and optimizer state. By the same command
    alone, or with resume_checkpoint."""
    train.main(arguments(data, tmp_path / "whole", "max_steps=8", *EVERYTHING))
    train.main(arguments(data, tmp_path / "parts", "max_steps=4", *EVERYTHING))
    torch.manual_seed(99)  # nothing may hang on what else the process drew
    more = [f"resume_checkpoint={tmp_path / 'parts' / 'last.pt'}"] if key else []
    train.main(arguments(data, tmp_path / "parts", "max_steps=8", *more, *EVERYTHING))
    whole, parts = last_of(tmp_path / "whole"), last_of(tmp_path / "parts")
    assert whole["step"] == 8 and whole["epoch"] == 2 and whole["averaged"] is not None
    assert_same(whole, parts)
    for key in CURVES:
        assert metrics(tmp_path / "whole", key) == metrics(tmp_path / "parts", key)


def test_a_resumed_diffusion_run_is_the_uninterrupted_run(data, tmp_path):
    """Its noise too, to the last bit; batches in two parts."""
    more = [*NOISY, *EVERYTHING[:5], "n_listen=0", "accumulate=2", "keep_last=1"]
    train.main(arguments(data, tmp_path / "whole", "max_steps=6", *more))
    train.main(arguments(data, tmp_path / "parts", "max_steps=4", *more))
    torch.manual_seed(99)
    train.main(arguments(data, tmp_path / "parts", "max_steps=6", *more))
    assert_same(last_of(tmp_path / "whole"), last_of(tmp_path / "parts"))


KILLER = """
import json, os, random, signal, sys, threading, time
import torch
import train
argv, rounds = json.loads(sys.argv[1]), int(sys.argv[2])
draw = random.Random(0)
torch.set_num_threads(1)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def after(delay):
    threading.Thread(target=lambda: (time.sleep(delay), die()), daemon=True).start()

def prepare(kind):
    if kind == 0:  # within a save: before, amid or after it
        name = draw.choice(["fsync", "replace", "link"])
        left, done, real = [draw.randrange(1, 6)], draw.random() < 0.5, getattr(os, name)
        def dying(*args):
            left[0] -= 1
            if not left[0]:
                done and real(*args)
                die()
            return real(*args)
        setattr(os, name, dying)
    elif kind == 1:  # some time after the first step began
        delay, real, begun = draw.uniform(0, 0.4), train.masked_bits, []
        def begin(*args):
            begun or after(delay)
            begun.append(1)
            return real(*args)
        train.masked_bits = begin
    else:  # at any time, most often while the run is set up
        after(draw.uniform(0, 0.4))

kills = []
while True:
    kind = len(kills) % 3 if len(kills) < rounds else None
    draw.random()
    pid = os.fork()
    if pid == 0:  # a new process of the same command, with everything imported already
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if kind is not None:
            prepare(kind)
        try:
            train.main(argv)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        break
    kills.append(kind)
print(json.dumps(kills))
raise SystemExit(os.WEXITSTATUS(status))
"""


def test_a_run_killed_forty_times_is_the_uninterrupted_run(data, tmp_path):
    """SIGKILL at random moments, a third of them within a save, the same command again each time:
    weights, averages, optimizer, position and curves are those of the run that nothing disturbed;
    no file is half-written, no line of the curves is torn, missing or there twice."""
    more = [*EVERYTHING, "n_listen=0", "max_steps=320", "checkpoint_interval=7",
            "validation_interval=80", "keep_last=3", "threads=1"]  # fmt: skip
    threads = torch.get_num_threads()  # sums depend on how many there are
    train.main(arguments(data, tmp_path / "whole", *more))
    torch.set_num_threads(threads)
    argv = arguments(data, tmp_path / "killed", *more)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(argv), "40"],
        capture_output=True, text=True, cwd=Path(train.__file__).parent, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert len(kills) >= 30 and kills.count(0) >= 10
    assert_same(last_of(tmp_path / "whole"), last_of(tmp_path / "killed"))
    for key in CURVES:
        assert metrics(tmp_path / "whole", key) == metrics(tmp_path / "killed", key)
    steps = [row["step"] for row in rows(tmp_path / "killed") if "lr" in row]
    assert steps == list(range(1, 321))
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert not any(name.endswith(".tmp") for name in names)
    for name in sorted(x for x in names if x.endswith(".pt")) + ["best.safetensors"]:
        load_checkpoint(tmp_path / "killed" / name)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_tells_by_the_status(
    data, tmp_path, monkeypatch, capsys, number, status
):
    """Ctrl-C: 130, SIGTERM: 143; the same command gives the whole run."""
    train.main(arguments(data, tmp_path / "whole", "max_steps=5"))
    calls = []

    def signalled(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return masked_bits(*args)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train, "masked_bits", signalled)
        train.main(arguments(data, tmp_path / "cut", "max_steps=5"))
    assert ended.value.code == status and last_of(tmp_path / "cut")["step"] == 3
    assert "the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    train.main(arguments(data, tmp_path / "cut", "max_steps=5"))
    a, b = last_of(tmp_path / "whole"), last_of(tmp_path / "cut")
    assert_same(a, b)


def test_a_signal_ends_a_validation_which_is_then_done_again(data, tmp_path, monkeypatch):
    train.main(arguments(data, tmp_path / "whole", "max_steps=8"))
    bits = train.total_bits

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return bits(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train, "total_bits", signalled)
        train.main(arguments(data, tmp_path / "cut", "max_steps=8"))
    last = last_of(tmp_path / "cut")
    assert ended.value.code == 143 and last["step"] == 5 and last["validated"] == 0
    train.main(arguments(data, tmp_path / "cut", "max_steps=8"))
    assert_same(last_of(tmp_path / "whole"), last_of(tmp_path / "cut"))
    whole, cut = (metrics(tmp_path / x, "valid_bits") for x in ("whole", "cut"))
    assert whole == cut and [step for step, _ in cut] == [5, 8]


def test_a_second_ctrl_c_ends_at_once(data, tmp_path, monkeypatch):
    def signalled(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(train, "masked_bits", signalled)
    with pytest.raises(SystemExit) as ended:
        train.main(arguments(data, tmp_path / "run"))
    assert ended.value.code == 130 and last_of(tmp_path / "run")["step"] == 0


def test_a_full_disk_is_one_error_and_leaves_the_states_before(data, tmp_path, monkeypatch, capsys):
    """ENOSPC amid the third save: last.pt stays whole, and the same command goes on."""
    run, fsync, calls = tmp_path / "run", os.fsync, []

    def full(number):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(number)

    more = ["checkpoint_interval=2", "validation_interval=100", "n_listen=0", "max_steps=6"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        words = ("last.pt", "No space left", "step 4")
        refused(capsys, arguments(data, run, *more), *words, status=1)
    assert last_of(run)["step"] == 2 and not list(run.glob(".*.tmp"))
    train.main(arguments(data, run, *more))
    train.main(arguments(data, tmp_path / "whole", *more))
    assert_same(last_of(tmp_path / "whole"), last_of(run))


def test_rates_are_those_of_the_command_that_goes_on(data, tmp_path):
    """A lower start_lr and another weight decay count from there on."""
    more = ["n_listen=0", "schedule=constant", "warmup_steps=0"]
    train.main(arguments(data, tmp_path, *more, "max_steps=2"))
    train.main(arguments(data, tmp_path, *more, "max_steps=3", "start_lr=0.002", "ssm_lr=0.004"))
    assert [lr for _, lr in metrics(tmp_path, "lr")] == [0.01, 0.01, 0.002]
    assert [lr for _, lr in metrics(tmp_path, "lr/state_space")] == [0.001, 0.001, 0.004]


def test_as_many_states_are_kept_as_asked(data, tmp_path):
    """keep_last=3: last.pt and the two before it, each whole; a damaged last.pt is passed over."""
    run = tmp_path / "run"
    more = ["checkpoint_interval=2", "n_listen=0", "keep_last=3"]
    train.main(arguments(data, run, "max_steps=9", *more))
    steps = {p.name: torch.load(p, weights_only=True)["step"] for p in run.glob("*.pt")}
    assert steps == {"last.pt": 9, "last-8.pt": 8, "last-6.pt": 6}
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:1000])
    train.main(arguments(data, run, "max_steps=9", *more))
    train.main(arguments(data, tmp_path / "whole", "max_steps=9", *more))
    whole, again = last_of(tmp_path / "whole"), last_of(run)
    assert_same(whole, again)
    assert metrics(run, "train_bits") == metrics(tmp_path / "whole", "train_bits")
    (run / "last-8.pt").unlink(missing_ok=True)
    train.main(arguments(data, run, "max_steps=11", "keep_last=1", *more[:2]))
    assert [p.name for p in run.glob("*.pt")] == ["last.pt"]


def test_a_slow_run_is_saved_by_the_minute(data, tmp_path):
    """checkpoint_minutes, where the steps of checkpoint_interval take longer."""
    more = ["checkpoint_interval=1000", "n_listen=0", "max_steps=4", "validation_interval=100"]
    train.main(arguments(data, tmp_path / "quick", *more))
    train.main(arguments(data, tmp_path / "slow", *more, "checkpoint_minutes=0.00001"))
    assert {p.name for p in (tmp_path / "quick").glob("*.pt")} == {"last.pt", "last-0.pt"}
    assert {p.name for p in (tmp_path / "slow").glob("*.pt")} == {"last.pt", "last-3.pt"}


def test_a_finished_run_stays_as_it_is(run, data, capsys):
    before = (run / "last.pt").read_bytes(), (run / "metrics.jsonl").read_bytes()
    train.main(arguments(data, run))
    assert "finished: best validation" in capsys.readouterr().out
    assert before == ((run / "last.pt").read_bytes(), (run / "metrics.jsonl").read_bytes())


def test_two_processes_do_not_train_in_one_folder(data, tmp_path, capsys):
    from sashimi.logbook import Logbook

    other = Logbook(tmp_path / "run", 0)
    refused(capsys, arguments(data, tmp_path / "run"), "another process", "checkpoint_path")
    other.close()
    train.main(arguments(data, tmp_path / "run", "max_steps=1", "n_listen=0"))


def test_other_data_begin_a_new_epoch(data, tmp_path, caplog):
    """The order of clips hangs on them: a run whose data changed says so and goes on."""
    run = tmp_path / "run"
    train.main(arguments(data, run, "max_steps=2", "n_listen=0"))
    (data / "fewer.csv").write_text("path\n0.wav\n1.wav\n2.wav\n")
    more = [f"train_csv={data / 'fewer.csv'}", "max_steps=3", "n_listen=0"]
    train.main(arguments(data, run, *more))
    assert "data or batch_size changed since step 2" in caplog.text
    assert last_of(run)["epoch"] == 1 and last_of(run)["batches_done"] == 1


@pytest.mark.parametrize("kept", ["last.pt", "best.safetensors"])
def test_a_run_is_not_overwritten(run, data, tmp_path, capsys, kept):
    """A folder with a run's checkpoints stays as it is unless it can be gone on with, and where
    resume=never says not to."""
    (tmp_path / kept).write_bytes((run / kept).read_bytes())
    never = ["resume=never"] if kept == "last.pt" else []
    refused(capsys, arguments(data, tmp_path, *never), str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [kept]
    assert (tmp_path / kept).read_bytes() == (run / kept).read_bytes()


def test_resuming_does_not_overwrite_another_run(run, data, tmp_path, capsys):
    """resume_checkpoint of one run, checkpoint_path of another one: refused."""
    other = tmp_path / "other"
    train.main(arguments(data, other, "max_steps=1", "n_listen=0"))
    before = (other / "last.pt").read_bytes()
    more = [f"resume_checkpoint={run / 'last.pt'}", "max_steps=16"]
    refused(capsys, arguments(data, other, *more), str(other), "checkpoint_path")
    assert (other / "last.pt").read_bytes() == before


def test_resuming_into_a_new_folder_leaves_the_old_one_and_can_go_on_too(run, data, tmp_path):
    """The same command again goes on in the new folder."""
    before, new = (run / "last.pt").read_bytes(), tmp_path / "next"
    more = [f"resume_checkpoint={run / 'last.pt'}", "n_listen=0"]
    train.main(arguments(data, new, *more, "max_steps=16"))
    assert last_of(new)["step"] == 16
    train.main(arguments(data, new, *more, "max_steps=17"))
    assert last_of(new)["step"] == 17
    assert [step for step, _ in metrics(new, "lr")] == [16, 17]
    assert (run / "last.pt").read_bytes() == before


def test_what_cannot_be_resumed_is_one_error(run, data, tmp_path, capsys):
    """Another architecture (the setting that differs is named), a missing, cut or foreign file."""
    last, new = run / "last.pt", tmp_path / "run"

    def resume(path, *more):
        return arguments(data, new, f"resume_checkpoint={path}", "max_steps=20", *more)

    refused(capsys, resume(last, "model.d_model=16"), str(last), "model.d_model=8")
    refused(capsys, resume(last, "model.pool=[4]"), str(last), "model.pool=[2,2]")
    refused(capsys, resume(last, "model=diffwave"), str(last), "model=autoregressive")
    refused(capsys, resume(tmp_path / "gone.pt"), "gone.pt", "no such file")
    refused(capsys, resume(tmp_path), str(tmp_path))
    (tmp_path / "cut.pt").write_bytes(last.read_bytes()[:5000])
    refused(capsys, resume(tmp_path / "cut.pt"), "cut.pt")
    refused(capsys, resume(run / "best.safetensors"), "best.safetensors")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    refused(capsys, resume(tmp_path / "foreign.pt"), "foreign.pt")
    content = torch.load(last, weights_only=True)
    del content["epoch_order"]
    torch.save(content, tmp_path / "old.pt")
    refused(capsys, resume(tmp_path / "old.pt"), "old.pt")
    content = torch.load(last, weights_only=True)
    for change in ({"kind": "\x1b[2J"}, {"kind": [1]}, {"config": 5}, {"step": "many"},
                   {"config": content["config"] | {"d_model": "\x1b[2J"}},
                   {"config": content["config"] | {"pool": [2] * 200_000}},
                   {"config": {}}, {"model": None}, {"optimizer": 1}, {"averaged": 3}):  # fmt: skip
        torch.save(content | change, tmp_path / "odd.pt")
        said = refused(capsys, resume(tmp_path / "odd.pt"), "odd.pt")
        assert said.isprintable() and len(said) < 500
    torch.save(content | {"note": Path("code")}, tmp_path / "pickle.pt")
    said = refused(capsys, resume(tmp_path / "pickle.pt"), "pickle.pt", "which is never done")
    assert "weights_only" not in said  # PyTorch advises to execute what is in it
    refused(capsys, resume(last, "resume=never"), "resume_checkpoint=", "resume=never")
    refused(capsys, arguments(data, run, "model.d_model=16"), str(last), "model.d_model=8")
    assert not new.exists()


def test_a_run_can_start_from_the_weights_of_another(run, data, tmp_path, capsys):
    """init_from: the weights, and nothing else; clip_length may differ, the architecture not."""
    best, new = run / "best.safetensors", tmp_path / "run"
    start = [f"init_from={best}", "model.clip_length=50", "n_listen=0", "max_steps=1"]
    train.main(arguments(data, new, *start, "start_lr=1e-12", "ssm_lr=0"))
    began, weights = last_of(new), load_checkpoint(best).state_dict()
    assert began["step"] == 1 and began["config"]["clip_length"] == 50
    for name, value in began["model"].items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)
    train.main(arguments(data, new, *start, "max_steps=3"))  # gone on with, not begun again
    assert last_of(new)["step"] == 3
    other = tmp_path / "other"
    refused(capsys, arguments(data, other, *start, "model.d_model=16"), "init_from", "d_model=8")
    refused(capsys, arguments(data, other, "init_from=gone.pt"), "gone.pt")
    refused(capsys, arguments(data, other, *NOISY, f"init_from={best}"), "model=autoregressive")
    both = [f"init_from={best}", f"resume_checkpoint={run / 'last.pt'}"]
    refused(capsys, arguments(data, other, *both), "init_from=", "resume_checkpoint=")
    assert not other.exists()
