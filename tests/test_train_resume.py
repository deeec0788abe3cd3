"""A run goes on where it stopped, whatever stopped it, and ends as if nothing had."""

import errno
import io
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from training import (
    EVERYTHING,
    NOISY,
    arguments,
    assert_same,
    assert_same_runs,
    copied,
    ended,
    forked,
    last_of,
    metrics,
    refused,
    rows,
    trained,
)

import train
from rawaudio import autoregressive
from rawaudio.checkpoint import load_checkpoint
from rawaudio.logbook import Logbook

FEW = ["n_listen=0", "max_steps=16"]  # a step more than the finished runs


def test_a_resumed_run_is_the_uninterrupted_run(data, tmp_path):
    """8 steps at once, or 4 (in the middle of an epoch), then 4 more with resume_checkpoint: the
    same to the last bit, with all that a run can have, and both optimizers."""
    more = [*EVERYTHING, *NOISY, "n_listen=0", "accumulate=2", "optimizer=muon"]
    whole, parts = trained(data, tmp_path / "whole", *more, "max_steps=8"), tmp_path / "parts"
    trained(data, parts, *more, "max_steps=4")
    torch.manual_seed(99)  # nothing may hang on what else the process drew
    trained(data, parts, *more, "max_steps=8", f"resume_checkpoint={parts / 'last.pt'}")
    last = last_of(whole)
    assert last["step"] == 8 and last["epoch"] == 2 and last["averaged"] is not None
    assert_same_runs(whole, parts, "train_mse", "valid_mse")


def dies(argv, owner, name, which, when):
    """A process that kills itself at that call of that function."""
    real, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        if name != "replace" or str(args[1]).endswith("last.pt"):
            calls.append(1)
        if len(calls) < which:
            return real(*args, **kwargs)
        if when == "after":
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)
    train.main(argv)


KILLS = [
    (os, "replace", 2, "before"),  # amid a save: the draft is written, its name not given
    (autoregressive, "total_bits", 1, "before"),  # in a validation
    (os, "replace", 2, "after"),  # saved, and nothing tidied up
]


def test_a_run_killed_again_and_again_is_the_uninterrupted_run(data, tmp_path):
    """SIGKILL while it validates and saves, the same command again each time: no file is
    half-written, no line of the curves is missing or there twice."""
    more = [*EVERYTHING, "n_listen=0", "max_steps=12", "checkpoint_interval=3",
            "validation_interval=5", "keep_last=3", "threads=1"]  # fmt: skip
    whole, killed = trained(data, tmp_path / "whole", *more), tmp_path / "killed"
    argv = arguments(data, killed, *more)
    for kill in KILLS:
        assert ended(forked(dies, argv, *kill)) == [-signal.SIGKILL]
    assert ended(forked(train.main, argv)) == [0]
    assert_same_runs(whole, killed)
    assert [row["step"] for row in rows(killed) if "lr" in row] == list(range(1, 13))
    states = sorted(path.name for path in killed.glob("*.pt"))
    assert states == ["last-6.pt", "last-9.pt", "last.pt"] and not list(killed.glob(".*.tmp"))
    for name in [*states, "best.safetensors"]:
        load_checkpoint(killed / name)


@pytest.mark.parametrize(
    ("name", "which", "numbers", "status", "step"),
    [("masked_bits", 3, [signal.SIGINT], 130, 3), ("masked_bits", 3, [signal.SIGTERM], 143, 3),
     ("total_bits", 1, [signal.SIGTERM], 143, 5),  # in validation
     ("masked_bits", 7, [signal.SIGINT, signal.SIGINT], 130, 5)],
)  # fmt: skip
def test_signals_save_and_tell_by_the_status(
    runs, data, tmp_path, monkeypatch, capsys, name, which, numbers, status, step
):
    """A signal finishes the step, or ends a validation, which is then done again; a second Ctrl-C
    ends at once. The same command gives the whole run."""
    run, real, calls = tmp_path / "run", getattr(autoregressive, name), []

    def signalled(*args):
        calls.append(1)
        for number in numbers if len(calls) == which else ():
            os.kill(os.getpid(), number)
        return real(*args)

    before = signal.getsignal(numbers[0])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as raised:
        patch.setattr(autoregressive, name, signalled)
        train.main(arguments(data, run))
    last = last_of(run)
    assert raised.value.code == status and last["step"] == step and len(calls) == which
    assert last["validated"] == (5 if which == 7 else 0)
    assert ("the same command goes on" in capsys.readouterr().out) == (len(numbers) == 1)
    assert signal.getsignal(numbers[0]) is before
    assert_same_runs(runs["bits"], trained(data, run))


def test_a_failed_save_leaves_the_states_before(runs, data, tmp_path, monkeypatch, capsys):
    """The same command goes on, again and again. Room is asked for only where there is none."""
    run, replace = tmp_path / "run", os.replace
    for code, step, which in ((errno.ENOSPC, 10, 3), (errno.EDQUOT, 10, 1), (errno.EIO, 15, 2)):
        calls = []

        def failing(draft, path, code=code, which=which, calls=calls):
            calls.extend([1] if path.name == "last.pt" else [])
            if len(calls) == which:
                raise OSError(code, os.strerror(code))
            replace(draft, path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            words = (str(run / "last.pt"), f"step {step}", os.strerror(code), errno.errorcode[code])
            said = refused(capsys, arguments(data, run), *words, "goes on from", status=1)
        assert ("make room" in said) == (code != errno.EIO)
        assert last_of(run)["step"] == step - 5 and not list(run.glob(".*.tmp"))
    assert_same_runs(runs["bits"], trained(data, run))


class Full(io.FileIO):
    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", ["last.pt", "metrics.jsonl", "events"])
def test_a_full_disk_is_one_error(data, tmp_path, monkeypatch, capsys, kind):
    """One line that names the file. What the disk refuses is every write to that file."""
    opened = open

    def opening(path, mode="r", *args, **kwargs):
        if kind in Path(str(path)).name and set(mode) & set("wa"):
            return Full(path, mode.replace("b", ""))
        return opened(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", opening)
        words = kind, "No space left on device (ENOSPC): make room"
        said = refused(capsys, arguments(data, tmp_path / "run"), *words, status=1)
    assert ("begins anew" in said) == (kind == "last.pt")


def test_states_are_kept_on_disks_without_hard_links(runs, data, tmp_path, monkeypatch):
    """Such as exFAT: copies, and the states are those of any other disk."""
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no links")))
    run = trained(data, tmp_path / "run")
    for folder in (run, runs["bits"]):
        assert sorted(p.name for p in folder.glob("*.pt")) == ["last-10.pt", "last.pt"]
    assert_same(last_of(runs["bits"], "last-10.pt"), last_of(run, "last-10.pt"))


def test_a_run_goes_on_with_rates_and_sampling_of_the_command(runs, data, tmp_path):
    settings = {"clip_length": 50, "dropout": 0.1, "temperature": 0.9, "nucleus_p": 0.5}
    more = [f"model.{key}={value}" for key, value in settings.items()]
    more += ["schedule=constant", "start_lr=0.002", "ssm_lr=0.004", "weight_decay=0.3", *FEW]
    run = trained(data, copied(runs["bits"], tmp_path), *more)
    last = last_of(run)
    assert last["step"] == 16 and settings.items() <= last["config"].items()
    rates = (metrics(run, key)[-2:] for key in ("lr", "lr/state_space"))
    assert [[lr for _, lr in part] for part in rates] == [[0.01, 0.002], [0.001, 0.004]]
    weights, *others = last["optimizer"]["param_groups"]
    assert weights["weight_decay"] == 0.3 and all(group["weight_decay"] == 0 for group in others)


def test_as_many_states_are_kept_as_asked(runs, data, tmp_path):
    """keep_last=3: last.pt and the two before it, each whole; a damaged last.pt is passed over."""
    run = trained(data, tmp_path / "run", "keep_last=3", "n_listen=0")
    steps = {p.name: last_of(run, p.name)["step"] for p in run.glob("*.pt")}
    assert steps == {"last.pt": 15, "last-10.pt": 10, "last-5.pt": 5}
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:1000])
    assert_same_runs(runs["bits"], trained(data, run, "keep_last=3"))
    trained(data, run, "keep_last=1", *FEW)
    assert [p.name for p in run.glob("*.pt")] == ["last.pt"]


def test_a_slow_run_is_saved_by_the_minute(data, tmp_path):
    """checkpoint_minutes, where the steps of checkpoint_interval take longer."""
    more = ["checkpoint_interval=1000", "n_listen=0", "max_steps=4", "validation_interval=100"]
    for minutes, earlier in (("10", "last-0.pt"), ("0.00001", "last-3.pt")):
        run = trained(data, tmp_path / minutes, *more, f"checkpoint_minutes={minutes}")
        assert {p.name for p in run.glob("*.pt")} == {"last.pt", earlier}


def test_a_finished_run_stays_as_it_is(runs, data, capsys):
    run = runs["bits"]
    before = (run / "last.pt").read_bytes(), (run / "metrics.jsonl").read_bytes()
    trained(data, run)
    assert "finished: best validation" in capsys.readouterr().out
    assert before == ((run / "last.pt").read_bytes(), (run / "metrics.jsonl").read_bytes())


def test_two_processes_do_not_train_in_one_folder(data, tmp_path, capsys):
    other = Logbook(tmp_path / "run", 0)
    refused(capsys, arguments(data, tmp_path / "run"), "another process", "checkpoint_path")
    other.close()


def test_other_data_begin_a_new_epoch(runs, data, tmp_path, caplog):
    """The order of clips hangs on them: a run whose data changed says so and goes on."""
    (data / "fewer.csv").write_text("path\n0.wav\n1.wav\n2.wav\n")
    more = [f"train_csv={data / 'fewer.csv'}", *FEW]
    last = last_of(trained(data, copied(runs["bits"], tmp_path), *more))
    assert "data or batch_size changed since step 15" in caplog.text
    assert last["epoch"] == last_of(runs["bits"])["epoch"] + 1 and last["batches_done"] == 1


@pytest.mark.parametrize("kept", ["last.pt", "best.safetensors"])
def test_a_run_is_not_overwritten(runs, data, tmp_path, capsys, kept):
    """Where it can't be gone on with, resume=never says not to, or with another's checkpoint."""
    content = (runs["mse"] / kept).read_bytes()
    (tmp_path / kept).write_bytes(content)
    never = ["resume=never"] if kept == "last.pt" else []
    other = [*NOISY, f"resume_checkpoint={runs['mse'] / 'last.pt'}"]
    refused(capsys, arguments(data, tmp_path, *never), str(tmp_path))
    if kept == "last.pt":
        refused(capsys, arguments(data, tmp_path, *other), str(tmp_path), "checkpoint_path")
    weights = f"resume_checkpoint={runs['bits'] / 'best.safetensors'}"
    refused(capsys, arguments(data, tmp_path / "new", weights), "best.safetensors", "init_from=")
    assert [p.name for p in tmp_path.iterdir()] == [kept]
    assert (tmp_path / kept).read_bytes() == content


def test_resuming_into_a_new_folder_leaves_the_old_one_and_can_go_on_too(runs, data, tmp_path):
    """The same command again goes on in the new folder."""
    before, new = (runs["bits"] / "last.pt").read_bytes(), tmp_path / "next"
    for step in (16, 17):
        more = [f"resume_checkpoint={runs['bits'] / 'last.pt'}", "n_listen=0", f"max_steps={step}"]
        assert last_of(trained(data, new, *more))["step"] == step
    assert [step for step, _ in metrics(new, "lr")] == [16, 17]
    assert (runs["bits"] / "last.pt").read_bytes() == before


def test_what_cannot_be_resumed_is_one_error(runs, data, tmp_path, capsys):
    """Another architecture (the setting that differs is named), a missing, cut or foreign file."""
    run, last, new = runs["bits"], runs["bits"] / "last.pt", tmp_path / "run"

    def refuse(path, *more, words=()):
        argv = arguments(data, new, f"resume_checkpoint={path}", "max_steps=20", *more)
        return refused(capsys, argv, path.name, *words)

    for more, words in [(["model.d_model=16"], "model.d_model=8"),
                        (["model.pool=[4]"], "model.pool=[2,2]"),
                        (NOISY, "model=autoregressive"), (["resume=never"], "resume=never"),
                        (["optimizer=muon"], "optimizer=adamw"),
                        ([f"init_from={last}"], "init_from=")]:  # fmt: skip
        refuse(last, *more, words=[words, str(last)])
    refused(capsys, arguments(data, run, "model.d_model=16"), str(last), "model.d_model=8")
    refuse(tmp_path / "gone.pt", words=["no such file"])
    refuse(tmp_path)
    refuse(run / "best.safetensors")
    (tmp_path / "cut.pt").write_bytes(last.read_bytes()[:5000])
    refuse(tmp_path / "cut.pt")
    content = last_of(run)
    lacking = {key: value for key, value in content.items() if key != "epoch_order"}
    changes = [{"kind": "\x1b[2J"}, {"kind": [1]}, {"config": 5}, {"step": "many"},
               {"config": content["config"] | {"d_model": "\x1b[2J"}},
               {"config": content["config"] | {"pool": [2] * 200_000}},
               {"config": {}}, {"model": None}, {"optimizer": 1}, {"averaged": 3}]  # fmt: skip
    for odd in ({"weights": 1}, lacking, *(content | change for change in changes)):
        torch.save(odd, tmp_path / "odd.pt")
        said = refuse(tmp_path / "odd.pt")
        assert said.isprintable() and len(said) < 500
    torch.save(content | {"note": Path("code")}, tmp_path / "pickle.pt")
    said = refuse(tmp_path / "pickle.pt", words=["which is never done"])
    assert "weights_only" not in said and not new.exists()  # PyTorch advises to execute it


def test_a_run_can_start_from_the_weights_of_another(runs, data, tmp_path, capsys):
    """init_from: the weights, and nothing else; the architecture must not differ."""
    best = runs["bits"] / "best.safetensors"
    start = [f"init_from={best}", "clip_length=50", "n_listen=0"]
    new = trained(data, tmp_path / "run", *start, "start_lr=1e-12", "ssm_lr=0", "max_steps=1")
    began, weights = last_of(new), load_checkpoint(best).state_dict()
    assert began["step"] == 1 and began["config"]["clip_length"] == 50
    for name, value in began["model"].items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)
    trained(data, new, *start, "max_steps=2")  # gone on with, not begun again
    assert last_of(new)["step"] == 2
    for more, words in [(["model.d_model=16"], "d_model=8"), (NOISY, "model=autoregressive"),
                        (["init_from=gone.pt"], "gone.pt")]:  # fmt: skip
        refused(capsys, arguments(data, tmp_path / "other", *start, *more), words)
    assert not (tmp_path / "other").exists()
