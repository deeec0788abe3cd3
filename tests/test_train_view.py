"""What a run tells, how it looks after itself, and the settings it can start from."""

import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import training
from training import NOISY, RATE, arguments, last_of, metrics, rows

import train
from rawaudio.autoregressive import bits_per_sample, masked_bits, total_bits
from rawaudio.config import parse_args, to_dict
from rawaudio.logbook import Logbook
from sashimi.autoregressive import SashimiAR

data = training.data


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tones"
    train.main(arguments(data, folder, "validation_interval=8", "max_steps=20"))
    return folder


# ---- view -------------------------------------------------------------------------------------


def test_the_run_writes_its_own_readme(run, data):
    """Command, commit, versions, device, data, every setting, validations, and curves."""
    text = (run / "README.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# tones" and "(curves.png)" in text
    facts = "commit versions device processes parameters training validation"
    for key in facts.split():
        assert any(line.startswith(f"- {key}: ") for line in lines), key
    (command,) = [line for line in lines if line.startswith("    python train.py ")]
    again = parse_args(train.TrainConfig, shlex.split(command)[2:], prog="", examples="")
    told = {line.strip() for line in lines if line.startswith("    ")}
    assert "model.d_model=8" in told and "seq_len=none" in told
    settings = [f"{k}={v}" for k, v in to_dict(again).items() if isinstance(v, str | int)]
    assert {s.replace("True", "true").replace("False", "false") for s in settings} <= told
    assert again.max_steps == 20
    for step, bits in metrics(run, "valid_bits"):
        assert any(line.startswith(f"| {step} |") and f" {bits:.4f} |" in line for line in lines)
    assert sum("best |" in line for line in lines) == 1
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_lines_hold_all_numbers_of_tensorboard(run):
    """metrics.jsonl has every scalar, with its step and value; clips and histograms of the state
    spaces' dt and Re Lambda are in TensorBoard, their quantiles in both."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    keys = {key for row in rows(run) for key in row} - {"step", "seconds"}
    assert keys == set(events.Tags()["scalars"])
    for key in keys:
        there = [(e.step, e.value) for e in events.Scalars(key)]
        for (step, value), (s, v) in zip(metrics(run, key), there, strict=True):
            assert step == s and v == pytest.approx(value, rel=1e-5, abs=1e-7), key
    assert {"train_bits", "valid_bits", "lr", "lr/state_space", "grad_norm", "grad_norm/weights",
            "grad_norm/state_space", "grad_norm/no_decay", "seconds/data", "seconds/forward",
            "seconds/backward", "seconds/optimizer", "data_wait", "overhead", "memory_gib",
            "skipped_steps", "broken_files", "dt_median", "re_lambda_max"} <= keys  # fmt: skip
    assert {"dt/backbone.center.0.layer", "re_lambda/backbone.up.0.0.layer"} <= set(
        events.Tags()["histograms"]
    )
    assert all(value < 0 for _, value in metrics(run, "re_lambda_max"))
    squares = zip(
        *(metrics(run, f"grad_norm/{x}") for x in ("weights", "no_decay", "state_space")),
        metrics(run, "grad_norm"), strict=True,
    )  # fmt: skip
    for *groups, (_, norm) in squares:
        assert math.hypot(*(value for _, value in groups)) == pytest.approx(norm, rel=1e-4)
    for row in rows(run):
        if "overhead" in row:
            assert 0 <= row["data_wait"] <= row["overhead"] < 1 and 0.01 < row["memory_gib"] < 100


def test_a_logbook_forgets_what_comes_after_the_step_it_goes_on_from(tmp_path):
    """Later lines, torn lines and what follows them."""
    lines = [json.dumps({"step": i, "seconds": 0.0}) for i in range(1, 9)]
    for tail in ("\n", '\n{"step": 9, "sec', "\nnonsense\n" + lines[2] + "\n"):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + tail)
        book = Logbook(tmp_path, 6)
        book.numbers(7, 1.0, x=2.0)
        book.close()
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
        assert rows(tmp_path)[-1] == {"step": 7, "seconds": 1.0, "x": 2.0}


def test_overhead_is_what_is_not_the_model(data, tmp_path, monkeypatch):
    """Twenty times the work of a step in the loader: nearly all is overhead, and waiting."""
    import time

    def slow(*args, **kwargs):
        for batch in batches(*args, **kwargs):
            time.sleep(0.5)
            yield batch

    batches = train.sample_batches
    monkeypatch.setattr(train, "sample_batches", slow)
    more = ["max_steps=2", "summary_interval=2", "n_listen=0", "validation_interval=100"]
    train.main(arguments(data, tmp_path / "run", *more))
    ((_, wait),) = metrics(tmp_path / "run", "data_wait")
    assert wait > 0.5


# ---- health -----------------------------------------------------------------------------------


def with_nan(monkeypatch, first, last):
    """Losses number first to last of a run are not finite."""
    calls = []

    def explode(*args):
        calls.append(1)
        return masked_bits(*args) * (math.nan if first <= len(calls) <= last else 1)

    monkeypatch.setattr(train, "masked_bits", explode)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(
    data, tmp_path, monkeypatch, capsys
):
    """Weights, averages and optimizer stay; the next step is as if the clip had not been there."""
    run = tmp_path / "run"
    with_nan(monkeypatch, 3, 5)
    more = ["n_listen=0", "checkpoint_interval=1", "keep_last=9", "max_steps=7", "ema=0.5"]
    train.main(arguments(data, run, *more))
    assert "step 3: loss nan" in capsys.readouterr().out
    assert [value for _, value in metrics(run, "skipped_steps")] == [0, 0, 1, 2, 3, 3, 3]
    assert [step for step, _ in metrics(run, "train_bits")] == [1, 2, 6, 7]
    states = {p.name: torch.load(p, weights_only=True) for p in run.glob("*.pt")}
    two, five, six = (states[f"last-{i}.pt"] for i in (2, 5, 6))
    for part in ("model", "averaged"):
        assert all(torch.equal(v, five[part][k]) for k, v in two[part].items())
        assert not all(torch.equal(v, six[part][k]) for k, v in two[part].items())
    assert (five["skipped"], five["skipped_in_a_row"], six["skipped_in_a_row"]) == (3, 3, 0)


@pytest.mark.parametrize("bad", ["backbone.center.0.layer.log_dt", "head.weight"])
def test_ten_bad_steps_in_a_row_end_the_run(data, tmp_path, monkeypatch, capsys, bad):
    """One error that names the steps, the one parameter whose gradient is bad, though gradients are
    clipped, and the state that is good."""
    run, make = tmp_path / "run", train.make_optimizer

    def poisoned(model, cfg):
        model.get_parameter(bad).register_hook(lambda g: g * (math.nan if begun else 1))
        return make(model, cfg)

    def begin(*args):
        calls.append(1)
        begun.extend(calls[3:])
        return masked_bits(*args)

    calls, begun = [], []
    monkeypatch.setattr(train, "make_optimizer", poisoned)
    monkeypatch.setattr(train, "masked_bits", begin)
    more = ["checkpoint_interval=2", "n_listen=0", "validation_interval=100", "grad_clip=1",
            "ema=0"]  # fmt: skip
    with pytest.raises(SystemExit):
        train.main(arguments(data, run, *more))
    said = capsys.readouterr()
    for words in ("steps 4 to 13", "not finite", "last.pt", f"the gradient of {bad}."):
        assert words in said.err
    bits = [line.split("  ")[2] for line in said.out.splitlines() if "clips/s" in line]
    assert bits[0] != "nan bits" and bits[1] == "nan bits"  # no step of the window was good
    last = last_of(run)
    assert last["step"] == 12 and all(v.isfinite().all() for v in last["model"].values())


def test_files_that_break_in_mid_run_are_counted(data, tmp_path, monkeypatch):
    """Training goes on with the others, and ends."""
    from rawaudio import audio

    real, calls = train.ClipDataset.__getitem__, []

    def breaking(ds, i):
        calls.append(1)
        if i == 2 and len(calls) > 12:
            raise audio.AudioError(ds.clips[i].path, "damaged", "", "copy it again")
        return real(ds, i)

    monkeypatch.setattr(train.ClipDataset, "__getitem__", breaking)
    more = ["n_listen=0", "validation_interval=100", "max_steps=12"]
    train.main(arguments(data, tmp_path / "run", *more))
    broken = [value for _, value in metrics(tmp_path / "run", "broken_files")]
    assert broken[0] == 0 and broken[-1] == 1 and len(broken) == 12


def test_gradients_are_clipped_to_their_norm(data, tmp_path):
    """As torch's clip_grad_norm_, which is also how the norms of the curves are measured."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 5)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p)))
    expected = torch.nn.utils.clip_grad_norm_(params, math.inf)
    torch.testing.assert_close(train.norm_of([p.grad for p in params]), expected)
    # with plain gradient descent in place of AdamW, a step is as long as its clipped gradient
    weights = {}
    for clip in (0, 0.1, 1e9):
        run = tmp_path / str(clip)
        more = ["n_listen=0", "schedule=constant", "warmup_steps=0", "ssm_lr=0.01"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "make_optimizer", descent)
            train.main(arguments(data, run, *more, "max_steps=1", f"grad_clip={clip}"))
        weights[clip] = last_of(run)["model"], torch.load(run / "last-0.pt", weights_only=True)
    moved = {}
    for clip, (after, before) in weights.items():
        moved[clip] = sum((after[k] - v).square().sum() for k, v in before["model"].items()).sqrt()
    ((_, norm),) = metrics(tmp_path / "0", "grad_norm")
    assert norm > 0.2 and moved[0] == pytest.approx(0.01 * norm, rel=1e-3)
    assert moved[1e9] == moved[0] and moved[0.1] == pytest.approx(0.01 * 0.1, rel=1e-3)


def descent(model, cfg):
    group = {"params": list(model.parameters()), "name": "weights", "lr": 0.01, "base_lr": 0.01}
    return torch.optim.SGD([group])


# ---- schedules, recipes, speed and memory -----------------------------------------------------


def test_a_run_by_minutes_anneals_to_its_end(data, tmp_path):
    """Cosine over the time that was asked for: it ends there, at a rate near 0."""
    more = ["max_minutes=0.05", "schedule=cosine", "max_steps=0", "n_listen=0",
            "validation_interval=10000"]  # fmt: skip
    train.main(arguments(data, tmp_path / "run", *more))
    rates = [value for _, value in metrics(tmp_path / "run", "lr")]
    assert max(rates) == pytest.approx(0.01, rel=0.2) and rates[-1] < 0.001
    assert rates[-5:] == sorted(rates[-5:], reverse=True)
    assert last_of(tmp_path / "run")["seconds"] == pytest.approx(3, abs=1.5)


def test_recipes_are_what_was_published():
    """Settings and parameters; what is written on the command line counts more."""
    paths = ["train_csv=x", "valid_csv=x", "checkpoint_path=x"]

    def parsed(name, *more):
        cfg = train.parse([*paths, *more, f"recipe={name}"])
        with torch.device("meta"):
            n = sum(p.numel() for p in SashimiAR(cfg.model).parameters())
        return cfg, n

    cfg, n = parsed("sc09")
    assert 4.7e6 < n < 4.9e6 and cfg.schedule == "plateau" and cfg.max_steps == 1_100_000
    assert (cfg.batch_size, cfg.start_lr, cfg.plateau_patience) == (8, 4e-3, 20)
    cfg, n = parsed("sc09-unet")
    assert 6.6e6 < n < 7.0e6 and cfg.schedule == "cosine" and cfg.max_steps == 200_000
    assert (cfg.batch_size, cfg.start_lr, cfg.weight_decay) == (16, 1e-3, 0.1)
    for name, pieces in (("youtubemix", 131_072), ("beethoven", 128_000)):
        cfg, n = parsed(name)
        assert cfg.sample_len == cfg.model.l_max == pieces and cfg.batch_size == 1
    cfg, n = parsed("digits", "max_minutes=25", "model.d_model=32", "max_steps=0")
    assert cfg.max_minutes == 25 and cfg.model.d_model == 32 and cfg.model.sample_rate == 8000
    assert parsed("digits")[1] == 1_474_432  # as in the model card
    assert train.parse([*paths, "sample_len=4000"]).model.l_max == 4000
    assert train.parse([*paths, "sample_len=4000", "model.l_max=50"]).model.l_max == 50
    default = train.parse(paths)
    assert default.schedule == "cosine" and default.warmup_steps == 1000 and default.max_steps
    assert replace(default, recipe=None) == default


def test_long_recordings_train(tmp_path):
    """Split by time, cut into pieces, mapped: a run on two recordings, with recomputed tiers."""
    root = tmp_path / "piano"
    root.mkdir()
    for i, seconds in enumerate((3, 2)):
        wave = 0.3 * np.sin(np.arange(seconds * RATE) * (0.2 + 0.1 * i))
        soundfile.write(root / f"{i}.wav", wave, RATE)
    script = Path(train.__file__).parent / "split_data.py"
    done = subprocess.run(
        [sys.executable, script, "--root_path", root, "--by", "time", "--out_dir", tmp_path,
         "--valid_fraction", "0.2", "--test_fraction", "0.1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    argv = arguments(
        tmp_path, tmp_path / "run", f"train_csv={tmp_path / 'piano-train.csv'}", "sample_len=800",
        f"valid_csv={tmp_path / 'piano-valid.csv'}", f"data_root={root}", "recompute_tiers=2",
        f"cache={tmp_path / 'cache'}", "max_steps=8", "batch_size=1", "seq_len=800", "n_listen=0",
    )  # fmt: skip
    train.main([a for a in argv if a != "model.l_max=200"])
    bits = [value for _, value in metrics(tmp_path / "run", "train_bits")]
    assert len(bits) == 8 and bits[-1] < bits[0] - 0.5
    assert last_of(tmp_path / "run")["config"]["l_max"] == 800
    text = (tmp_path / "run" / "README.md").read_text()
    assert "training: 10 clips" in text and "validation: 3 clips" in text


@pytest.mark.parametrize("kind", [["n_listen=0"], [*NOISY, "n_listen=0", "unconditional=false"]])
def test_bfloat16_trains_as_float32_does(data, tmp_path, kind):
    """Losses of the first steps differ by what 8 bits of mantissa lose; weights stay float32."""
    unit = "bits" if len(kind) == 1 else "mse"
    for precision in ("float32", "bfloat16"):
        run = tmp_path / precision
        train.main(arguments(data, run, *kind, f"precision={precision}", "max_steps=4"))
    full, half = (metrics(tmp_path / x, f"train_{unit}") for x in ("float32", "bfloat16"))
    assert full != half
    for (_, a), (_, b) in zip(full, half, strict=True):
        assert b == pytest.approx(a, rel=0.05)
    model = last_of(tmp_path / "bfloat16")["model"]
    assert all(v.dtype == torch.float32 for v in model.values())


def test_validation_keeps_no_logits(data, monkeypatch):
    """Bits of a batch are those of the training loss, whatever fits through the head at once; its
    memory is that of one piece."""
    from rawaudio.batches import sample_batches
    from rawaudio.data import ClipDataset
    from sashimi import autoregressive

    torch.manual_seed(0)
    cfg = train.parse(arguments(data, "x"))
    model, ds = SashimiAR(cfg.model).double().eval(), ClipDataset(data / "train.csv", RATE)
    (batch,) = sample_batches(ds, 5, None, shuffle=False)
    expected = masked_bits(model, batch).item()
    largest = []
    model.head.register_forward_hook(lambda _, __, y: largest.append(len(y)))
    for name, value in (("PER_HEAD", 64), ("PER_PASS", 700)):
        monkeypatch.setattr(autoregressive, name, value)
        assert total_bits(model, batch) == pytest.approx(expected, rel=1e-6)
    assert max(largest) == 64
    assert bits_per_sample(model, ds, 2) == pytest.approx(expected / len(ds.data), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("more", [[], ["gain_db=6"], ["precision=bfloat16"], NOISY])
def test_a_gpu_trains_as_the_cpu_does(data, tmp_path, more):
    """Data held on the device, prefetched from pinned memory, in bfloat16, with noise."""
    few = ["max_steps=4", "n_listen=0"]
    train.main(arguments(data, tmp_path / "cpu", *more, *few))
    train.main([*arguments(data, tmp_path / "gpu", *more, *few), "device=cuda"])
    unit = "mse" if more == NOISY else "bits"
    cpu, gpu = (metrics(tmp_path / x, f"valid_{unit}") for x in ("cpu", "gpu"))
    assert gpu[-1][1] == pytest.approx(cpu[-1][1], rel=0.1)
    assert metrics(tmp_path / "gpu", "memory_gib")[0][1] > 0
