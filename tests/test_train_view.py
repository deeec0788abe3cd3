"""What a run tells, and how it looks after itself."""

import json
import math
import shlex
import time

import pytest
import torch
from training import NOISY, RATE, arguments, last_of, metrics, refused, rows, trained

import train
from rawaudio import autoregressive, optimizers
from rawaudio.audio import AudioError
from rawaudio.autoregressive import BitsTask, masked_bits
from rawaudio.config import to_dict
from rawaudio.data import ClipDataset
from rawaudio.logbook import Logbook
from rawaudio.run import Run


def test_the_run_writes_its_own_readme(runs):
    """Command, commit, versions, device, data, every setting, validations, and curves."""
    lines = (runs["bits"] / "README.md").read_text().splitlines()
    assert lines[0] == "# bits" and "(curves.png)" in lines[2]
    for key in "commit versions device processes parameters training validation".split():
        assert any(line.startswith(f"- {key}: ") for line in lines), key
    (command,) = [line for line in lines if line.startswith("    python train.py ")]
    again = train.parse(shlex.split(command)[2:])
    told = {line.strip() for line in lines if line.startswith("    ")}
    assert "model.d_model=8" in told and "seq_len=none" in told and again.max_steps == 15
    settings = [f"{k}={v}" for k, v in to_dict(again).items() if isinstance(v, str | int)]
    assert {s.replace("True", "true").replace("False", "false") for s in settings} <= told
    for step, bits in metrics(runs["bits"], "valid_bits"):
        assert any(line.startswith(f"| {step} |") and f" {bits:.4f} |" in line for line in lines)
    assert sum("best |" in line for line in lines) == 1
    assert (runs["bits"] / "curves.png").read_bytes()[:4] == b"\x89PNG"


WRITTEN = """
train_bits valid_bits lr lr/state_space grad_norm grad_norm/weights grad_norm/state_space
grad_norm/no_decay seconds/data seconds/forward seconds/backward seconds/optimizer data_wait
overhead memory_gib skipped_steps broken_files dt_median re_lambda_max
"""


def test_the_lines_hold_all_numbers_of_tensorboard(runs):
    """Every scalar, with its step and value; clips, spectrograms and histograms of the state
    spaces' dt and Re Lambda are in TensorBoard, quantiles in both."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = runs["bits"]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    keys = {key for row in rows(run) for key in row} - {"step", "seconds"}
    assert keys == set(events.Tags()["scalars"])
    for key in keys:
        there = [(e.step, e.value) for e in events.Scalars(key)]
        for (step, value), (s, v) in zip(metrics(run, key), there, strict=True):
            assert step == s and v == pytest.approx(value, rel=1e-5, abs=1e-7), key
    audio = events.Audio("generated/0")[-1]
    assert audio.sample_rate == RATE and audio.step == events.Images("generated/0")[-1].step == 15
    assert set(WRITTEN.split()) <= keys
    layers = {"dt/backbone.center.0.layer", "re_lambda/backbone.up.0.0.layer"}
    assert layers <= set(events.Tags()["histograms"])
    assert all(value < 0 for _, value in metrics(run, "re_lambda_max"))
    for row in rows(run):
        if "overhead" in row:
            norms = [row[f"grad_norm/{x}"] for x in ("weights", "no_decay", "state_space")]
            assert math.hypot(*norms) == pytest.approx(row["grad_norm"], rel=1e-4)
            assert 0 <= row["data_wait"] <= row["overhead"] < 1 and 0.01 < row["memory_gib"] < 100


@pytest.mark.parametrize("tail", ["\n", '\n{"step": 9, "sec', '\nnonsense\n{"step": 3}\n'])
def test_a_logbook_forgets_what_comes_after_the_step_it_goes_on_from(tmp_path, tail):
    """Later lines, torn lines and what follows them."""
    lines = [json.dumps({"step": i, "seconds": 0.0}) for i in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + tail)
    book = Logbook(tmp_path, 6)
    book.numbers(7, 1.0, x=2.0)
    book.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert rows(tmp_path)[-1] == {"step": 7, "seconds": 1.0, "x": 2.0}


def test_waiting_for_data_is_overhead(data, tmp_path, monkeypatch):
    batches = BitsTask.batches

    def slow(*args, **kwargs):
        for batch in batches(*args, **kwargs):
            time.sleep(0.4)
            yield batch

    monkeypatch.setattr(BitsTask, "batches", slow)
    more = ["max_steps=2", "summary_interval=2", "n_listen=0", "validation_interval=100"]
    ((_, wait),) = metrics(trained(data, tmp_path / "run", *more), "data_wait")
    assert wait > 0.5


def test_steps_without_finite_gradients_are_skipped(data, tmp_path, monkeypatch, capsys):
    """Weights, averages and optimizer stay; the next step is as if the clip had not been there."""
    calls = []

    def explode(*args):
        calls.append(1)
        return masked_bits(*args) * (math.nan if 3 <= len(calls) <= 5 else 1)

    monkeypatch.setattr(autoregressive, "masked_bits", explode)
    more = ["n_listen=0", "checkpoint_interval=1", "keep_last=9", "max_steps=7", "ema=0.5"]
    run = trained(data, tmp_path / "run", *more)
    assert "step 3: loss nan" in capsys.readouterr().out
    assert [value for _, value in metrics(run, "skipped_steps")] == [0, 0, 1, 2, 3, 3, 3]
    assert [step for step, _ in metrics(run, "train_bits")] == [1, 2, 6, 7]
    two, five, six = (last_of(run, f"last-{step}.pt") for step in (2, 5, 6))
    for part in ("model", "averaged"):
        assert all(torch.equal(v, five[part][k]) for k, v in two[part].items())
        assert not all(torch.equal(v, six[part][k]) for k, v in two[part].items())
    assert (five["skipped"], five["skipped_in_a_row"], six["skipped_in_a_row"]) == (3, 3, 0)


def test_rates_that_are_far_too_high_are_one_line(data, tmp_path, capsys):
    """S4 makes no kernel of what they leave."""
    more = ["start_lr=1e30", "ssm_lr=1e30", "schedule=constant", "max_steps=3"]
    refused(capsys, arguments(data, tmp_path / "run", *more), "Lower start_lr")


@pytest.mark.parametrize("bad", ["backbone.center.0.layer.log_dt", "head.weight"])
def test_ten_bad_steps_in_a_row_end_the_run(data, tmp_path, monkeypatch, capsys, bad):
    """One error that names the steps, the one parameter whose gradient is bad, though gradients are
    clipped, and the state that is good."""

    def poisoned(run, *args):
        make(run, *args)
        poison = lambda grad: grad * (math.nan if run.position.step >= 3 else 1)  # noqa: E731
        run.model.get_parameter(bad).register_hook(poison)

    make = Run._make_model
    monkeypatch.setattr(Run, "_make_model", poisoned)
    more = ["checkpoint_interval=2", "n_listen=0", "validation_interval=100", "grad_clip=1"]
    with pytest.raises(SystemExit):
        trained(data, tmp_path / "run", *more)
    said = capsys.readouterr()
    for words in ("steps 4 to 13", "not finite", "last.pt", f"the gradient of {bad}."):
        assert words in said.err
    bits = [line.split("  ")[2] for line in said.out.splitlines() if "clips/s" in line]
    assert bits[0] != "nan bits" and bits[1] == "nan bits"  # no step of the window was good
    last = last_of(tmp_path / "run")
    assert last["step"] == 12 and all(v.isfinite().all() for v in last["model"].values())


def test_files_that_break_in_mid_run_are_counted(data, tmp_path, monkeypatch):
    """Training goes on with the others, and ends."""
    real, calls = ClipDataset.__getitem__, []

    def breaking(ds, i):
        calls.append(1)
        if i == 2 and len(calls) > 12:
            raise AudioError(ds.clips[i].path, "damaged", "", "copy it again")
        return real(ds, i)

    monkeypatch.setattr(ClipDataset, "__getitem__", breaking)
    more = ["n_listen=0", "validation_interval=100", "max_steps=12"]
    broken = [x for _, x in metrics(trained(data, tmp_path / "run", *more), "broken_files")]
    assert broken[0] == 0 and broken[-1] == 1 and len(broken) == 12


def test_gradients_are_clipped_to_their_norm(data, tmp_path, monkeypatch):
    """With plain gradient descent, a step is as long as its clipped gradient."""
    monkeypatch.setattr(optimizers, "AdamW", lambda groups, **_: torch.optim.SGD(groups))
    more = ["n_listen=0", "schedule=constant", "warmup_steps=0", "ssm_lr=0.01", "max_steps=1"]
    moved = {}
    for clip in (0, 0.1, 1e9):
        run = trained(data, tmp_path / str(clip), *more, f"grad_clip={clip}")
        after, before = last_of(run)["model"], last_of(run, "last-0.pt")["model"]
        moved[clip] = sum((after[k] - v).square().sum() for k, v in before.items()).sqrt()
    ((_, norm),) = metrics(tmp_path / "0", "grad_norm")
    assert norm > 0.2 and moved[0] == pytest.approx(0.01 * norm, rel=1e-3)
    assert moved[1e9] == moved[0] and moved[0.1] == pytest.approx(0.01 * 0.1, rel=1e-3)


def test_a_run_by_minutes_anneals_to_its_end(data, tmp_path):
    """Cosine over the time that was asked for: it ends there, at a rate near 0."""
    more = ["max_minutes=0.03", "schedule=cosine", "max_steps=0", "n_listen=0",
            "validation_interval=10000"]  # fmt: skip
    run = trained(data, tmp_path / "run", *more)
    rates = [value for _, value in metrics(run, "lr")]
    assert max(rates) == pytest.approx(0.01, rel=0.2) and rates[-1] < 0.001
    assert rates[-5:] == sorted(rates[-5:], reverse=True)
    assert last_of(run)["seconds"] == pytest.approx(1.8, abs=1.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("more", [[], ["gain_db=6"], ["precision=bfloat16"], NOISY])
def test_a_gpu_trains_as_the_cpu_does(data, tmp_path, more):
    """Data held on the device, prefetched from pinned memory, in bfloat16, with noise."""
    more = [*more, "max_steps=4", "n_listen=0"]
    unit = "mse" if NOISY[0] in more else "bits"
    runs = [trained(data, tmp_path / x, *more, f"device={x}") for x in ("cpu", "cuda")]
    cpu, gpu = (metrics(run, f"valid_{unit}")[-1][1] for run in runs)
    assert gpu == pytest.approx(cpu, rel=0.1) and metrics(runs[1], "memory_gib")[0][1] > 0
