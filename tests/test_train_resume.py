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
from rawaudio.autoregressive import masked_bits
from rawaudio.checkpoint import load_checkpoint

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
import json, os, signal, sys
import torch
import rawaudio.logbook
import train
argv, kills = json.loads(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
owners = {"os": os, "train": train, "lines": rawaudio.logbook._Whole}

def prepare(owner, name, which, when):  # die at that call of that function
    real, calls = getattr(owners[owner], name), []
    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) < which:
            return real(*args, **kwargs)
        if when == "after":
            real(*args, **kwargs)
        if when == "amid":
            real(args[0], args[1][: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owners[owner], name, dying)

for kill in [*kills, None]:
    pid = os.fork()
    if pid == 0:  # a new process of the same command, with everything imported already
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if kill:
            prepare(*kill)
        try:
            train.main(argv)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if (os.WTERMSIG(status) != signal.SIGKILL) if kill else status:
        raise SystemExit(f"{kill}: ended with {status}")
"""
KILLS = [
    ("train", "Logbook", 1, "after"),  # set up, and nothing done
    ("os", "replace", 2, "before"),  # amid a save: the draft is written, its name not given
    ("train", "masked_bits", 10, "before"),  # in a step, some after the last save
    ("lines", "write", 40, "amid"),  # within a line of the curves, or a record of TensorBoard's
    ("os", "replace", 3, "after"),  # saved, and nothing tidied up
]


def test_a_run_killed_again_and_again_is_the_uninterrupted_run(data, tmp_path):
    """SIGKILL while it is set up, steps, writes a line and saves, the same command again each time:
    weights, averages, optimizer, position and curves are those of the run that nothing disturbed;
    no file is half-written, no line of the curves is torn, missing or there twice."""
    more = [*EVERYTHING, "n_listen=0", "max_steps=40", "checkpoint_interval=7",
            "validation_interval=20", "keep_last=3", "threads=1"]  # fmt: skip
    threads = torch.get_num_threads()  # sums depend on how many there are
    train.main(arguments(data, tmp_path / "whole", *more))
    torch.set_num_threads(threads)
    argv = arguments(data, tmp_path / "killed", *more)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(argv), json.dumps(KILLS)],
        capture_output=True, text=True, cwd=Path(train.__file__).parent, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(last_of(tmp_path / "whole"), last_of(tmp_path / "killed"))
    for key in CURVES:
        assert metrics(tmp_path / "whole", key) == metrics(tmp_path / "killed", key)
    steps = [row["step"] for row in rows(tmp_path / "killed") if "lr" in row]
    assert steps == list(range(1, 41))
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert not any(name.endswith(".tmp") for name in names)
    assert {name for name in names if name.endswith(".pt")} == {
        "last-28.pt", "last-35.pt", "last.pt"
    }  # fmt: skip
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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_save_is_one_error_and_leaves_the_states_before(
    data, tmp_path, monkeypatch, capsys, code
):
    """Amid the third save: last.pt stays whole, and the same command goes on. The message names
    file and fault; room is asked for only where there is none."""
    run, fsync, calls = tmp_path / "run", os.fsync, []

    def failing(number):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(code, os.strerror(code))
        return fsync(number)

    more = ["checkpoint_interval=2", "validation_interval=100", "n_listen=0", "max_steps=6"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        words = (str(run / "last.pt"), "step 4", os.strerror(code), errno.errorcode[code])
        said = refused(capsys, arguments(data, run, *more), *words, "goes on from", status=1)
    assert ("make room" in said) == (code != errno.EIO)
    assert last_of(run)["step"] == 2 and not list(run.glob(".*.tmp"))
    train.main(arguments(data, run, *more))
    train.main(arguments(data, tmp_path / "whole", *more))
    assert_same(last_of(tmp_path / "whole"), last_of(run))


@pytest.mark.parametrize("kind", ["last.pt", "metrics.jsonl", "events"])
def test_a_disk_that_is_full_before_the_first_step_is_one_error(data, tmp_path, kind):
    """One line that names the file: no traceback, of the run or of a thread. What the disk refuses
    is every write to that file; a process of its own shows all that is printed."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, kind, *arguments(data, tmp_path / "run", "max_steps=2")],
        capture_output=True, text=True, cwd=Path(train.__file__).parent, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and kind in line
    assert "No space left on device (ENOSPC): make room" in line
    assert ("begins anew" in line) == (kind == "last.pt")


# a process in which nothing can be written to the files of that name
FULL = """
import builtins, errno, io, os, sys
import train

class Full(io.FileIO):
    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def opening(path, mode="r", *args, **kwargs):
    name = os.path.basename(str(path))
    if sys.argv[1] in name and set(mode) & set("wa"):
        return Full(path, mode.replace("b", ""))
    return real(path, mode, *args, **kwargs)

real, builtins.open = builtins.open, opening
train.main(sys.argv[2:])
"""


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_states_are_kept_on_disks_without_hard_links(data, tmp_path, monkeypatch, code):
    """exFAT and some network disks: copies, and the states are those of any other disk."""

    def refusing(*args):
        raise OSError(code, os.strerror(code))

    more = ["checkpoint_interval=2", "n_listen=0", "keep_last=3", "max_steps=6"]
    train.main(arguments(data, tmp_path / "linked", *more))
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refusing)
        train.main(arguments(data, tmp_path / "copied", *more))
    names = [sorted(p.name for p in (tmp_path / x).glob("*.pt")) for x in ("linked", "copied")]
    assert names[0] == names[1] == ["last-2.pt", "last-4.pt", "last.pt"]
    for name in names[0]:
        states = (torch.load(tmp_path / x / name, weights_only=True) for x in ("linked", "copied"))
        assert_same(*states)


@pytest.mark.parametrize("kind", [[], NOISY])
def test_how_a_model_is_sampled_may_differ(data, tmp_path, kind):
    """Temperature, nucleus, guidance, length of clips, dropout: for resume as for init_from, and
    the new file holds what this command says."""
    few = [*kind, "n_listen=0", "seq_len=80", "max_steps=2"]
    told, other = {"clip_length": 50, "dropout": 0.1}, {"temperature": 0.9, "nucleus_p": 0.5}
    settings = told if kind else told | other
    more = [f"model.{k}={v}" for k, v in settings.items()]
    train.main(arguments(data, tmp_path / "run", *few))
    train.main(arguments(data, tmp_path / "run", *few, *more, "max_steps=4"))
    init = f"init_from={tmp_path / 'run' / 'best.safetensors'}"
    train.main(arguments(data, tmp_path / "new", *few, init))
    new, run = (last_of(tmp_path / x) for x in ("new", "run"))
    assert run["step"] == 4 and settings.items() <= run["config"].items()
    assert not settings.items() & new["config"].items()


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
    from rawaudio.logbook import Logbook

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
