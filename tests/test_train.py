"""The trainer: from a CSV of audio files to weights that generate."""

import csv
import logging
import math
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import training
from torch._dynamo.utils import counters
from training import NOISY, RATE, arguments, last_of, metrics, refused, tone

import train
from rawaudio import config
from rawaudio.autoregressive import masked_bits
from rawaudio.batches import sample_batches, wave_batches
from rawaudio.checkpoint import load_checkpoint, save_checkpoint
from rawaudio.config import from_dict
from rawaudio.data import ClipDataset
from rawaudio.files import read_metadata
from rawaudio.noise import linear_noise_error, noise_error
from rawaudio.samplers import noise_schedule
from sashimi.autoregressive import AutoregressiveConfig, SashimiAR
from sashimi.diffwave import SashimiDiffWave, named_config
from sashimi.s4 import S4

data = training.data

# ---- one run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "run"
    train.main(arguments(data, folder))
    return folder


def test_training_lowers_the_bits(run):
    """15 steps on tones: training and validation bits fall, from the 8 of not knowing anything."""
    bits = [value for _, value in metrics(run, "train_bits")]
    assert len(bits) == 15 and 7 < bits[0] < 10
    assert sum(bits[-3:]) / 3 < bits[0] - 1
    steps, valid = zip(*metrics(run, "valid_bits"), strict=True)
    assert steps == (5, 10, 15) and valid[-1] < valid[0]


def test_the_best_weights_load_and_generate(run, data):
    """best.safetensors is a checkpoint like any other, and its score is what it says."""
    metadata = read_metadata(run / "best.safetensors")
    best = min(value for _, value in metrics(run, "valid_bits"))
    assert float(metadata["valid_bits"]) == pytest.approx(best, abs=1e-4)
    assert metadata["data"] == "train.csv" and int(metadata["step"]) in (5, 10, 15)
    model = load_checkpoint(run / "best.safetensors")
    wavs = model.unconditional_generate(2)
    assert wavs.shape == (2, 40) and wavs.isfinite().all() and model.sample_rate == RATE
    clips = ClipDataset(data / "valid.csv", RATE)
    with torch.no_grad():
        total = sum(masked_bits(model, b) for b in sample_batches(clips, 1, None, shuffle=False))
    assert total / len(clips.data) == pytest.approx(best, abs=1e-4)


def test_the_last_checkpoint_is_a_checkpoint_too(run):
    last = torch.load(run / "last.pt", weights_only=True)
    assert last["step"] == 15 and last["config"]["d_model"] == 8
    model = load_checkpoint(run / "last.pt").state_dict()
    assert all(torch.equal(model[k], v) for k, v in last["model"].items())


def test_tensorboard_gets_curves_audio_and_spectrograms(run):
    """Bits, learning rate, gradient norm, generated audio at its rate, its spectrogram."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    assert {"train_bits", "valid_bits", "lr", "grad_norm"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("valid_bits")] == [5, 10, 15]
    audio = events.Audio("generated/0")[-1]
    assert audio.sample_rate == RATE and audio.step == 15
    assert events.Images("generated/0")[-1].step == 15


def test_progress_shows_bits_speed_and_time_left(data, tmp_path, capsys):
    train.main(arguments(data, tmp_path / "run", "max_steps=5", "n_listen=0"))
    out = capsys.readouterr().out
    for words in ("parameters on cpu", "5 training clips", "step 5", "bits", "clips/s", "min left",
                  "validation", "best.safetensors", "% backward"):  # fmt: skip
        assert words in out, words


def test_the_script_explains_itself():
    """--help: exit 0, examples, every key with its default; no data, no device needed."""
    script = Path(train.__file__)
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = {"train_csv": "required", "data_root": "none", "batch_size": "8", "start_lr": "0.004",
             "ssm_lr": "0.001", "schedule": "cosine", "max_steps": "200000",
             "validation_interval": "2500",
             "model.pool": "[4,4]", "model.unet": "false"}  # fmt: skip
    keys = {f.name for f in fields(train.TrainConfig)} - {"model"}
    collected = {"conditions", "condition_counts"}  # from the data, not written
    keys |= {f"model.{f.name}" for f in fields(AutoregressiveConfig) if f.name not in collected}
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for key in keys:
        assert key in lines, key
        assert shown.get(key, "") in lines[key].split("  ", 1)[1], key
    for source in ("[S]", "[U]", "[4]"):  # of defaults: named, and explained once
        assert sum(source in line for line in done.stdout.splitlines()) > 1
    assert "python train.py train_csv=" in done.stdout and "recipe=digits" in done.stdout


# ---- weights and losses ---------------------------------------------------------------------


def test_averaged_weights_are_those_that_are_validated_and_kept(data, tmp_path):
    run = tmp_path / "run"
    train.main(arguments(data, run, "ema=0.5", "max_steps=10", "validation_interval=10"))
    last = torch.load(run / "last.pt", weights_only=True)
    best = load_checkpoint(run / "best.safetensors").state_dict()
    assert all(torch.equal(best[k], v) for k, v in last["averaged"].items())
    assert not torch.equal(best["head.weight"], last["model"]["head.weight"])
    loaded = load_checkpoint(run / "last.pt").state_dict()  # last.pt is used as best.safetensors is
    assert all(torch.equal(loaded[k], v) for k, v in best.items())


# ---- diffusion --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusion_run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion") / "run"
    train.main(arguments(data, folder, *NOISY))
    return folder


def test_diffusion_training_lowers_the_error_of_the_noise(diffusion_run):
    """From 1, which is the error of predicting no noise; validation is of the averaged weights."""
    errors = [value for _, value in metrics(diffusion_run, "train_mse")]
    assert len(errors) == 15 and errors[0] == pytest.approx(1, abs=0.5)
    assert sum(errors[-3:]) / 3 < 0.95 * errors[0]
    steps, valid = zip(*metrics(diffusion_run, "valid_mse"), strict=True)
    assert steps == (5, 10, 15) and valid[-1] < valid[0] < 1.1


def test_diffusion_weights_load_and_generate(diffusion_run, data):
    model = load_checkpoint(diffusion_run / "best.safetensors")
    assert isinstance(model, SashimiDiffWave) and model.sample_rate == RATE
    assert model.unconditional_generate(2, steps=3).shape == (2, 40)
    last = torch.load(diffusion_run / "last.pt", weights_only=True)
    loaded = load_checkpoint(diffusion_run / "last.pt").state_dict()
    assert last["kind"] == "diffwave"
    assert all(torch.equal(loaded[k], v) for k, v in last["averaged"].items())
    clips = ClipDataset(data / "valid.csv", RATE, pcm=True, peak=0.5)
    (batch,) = wave_batches(clips, 2, 40, shuffle=False)
    with torch.no_grad():
        error = noise_error(model, batch["wav"], torch.Generator().manual_seed(0))
    best = min(value for _, value in metrics(diffusion_run, "valid_mse"))
    assert error == pytest.approx(best, abs=1e-5)
    metadata = read_metadata(diffusion_run / "best.safetensors")
    assert metadata["valid_mse"] == pytest.approx(best, abs=1e-4)


def test_audio_of_known_level_is_learned_by_its_signal_to_noise_ratio(data, tmp_path, capsys):
    """model.data_std: the loss is relative to scaling the input, starts at 1 and falls."""
    more = [*NOISY, "model.data_std=0.35", "max_steps=20", "validation_interval=20"]
    train.main(arguments(data, tmp_path / "run", *more))
    (_, first), *_ = metrics(tmp_path / "run", "train_relative")
    ((step, valid),) = metrics(tmp_path / "run", "valid_relative")
    assert 0.5 < first < 1.5 and step == 20 and valid < 0.95
    model = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert model.config.data_std == 0.35
    assert model.unconditional_generate(2, steps=3).isfinite().all()
    assert "validation, relative" in (tmp_path / "run" / "README.md").read_text()
    assert refused(capsys, arguments(data, tmp_path / "x", *NOISY, "data_std=0"), "data_std=0.0")


def test_a_vocoder_trains_and_vocodes(data, tmp_path):
    """unconditional=false: the loss falls, the weights turn a spectrogram into audio."""
    more = [*NOISY, "unconditional=false", "seq_len=80", "max_steps=10"]
    train.main(arguments(data, tmp_path / "run", *more))
    errors = [value for _, value in metrics(tmp_path / "run", "train_mse")]
    assert sum(errors[-3:]) < 0.98 * sum(errors[:3])
    model = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert not model.config.unconditional
    wav = torch.from_numpy(tone(80, 100)).float()[None]
    assert model.vocode(model.log_mel(wav)).shape == (1, 80)


def test_sizes_have_names(data, tmp_path):
    """model=diffwave_small is the small configuration, what is written after it counts more."""
    cfg = train.parse(["model=diffwave_small", "train_csv=x", "valid_csv=x", "checkpoint_path=x"])
    assert cfg.model == named_config("small") and cfg.start_lr == 2e-4 and cfg.ema == 0.9999
    more = ["model.d_model=8", "train_csv=x", "valid_csv=x", "checkpoint_path=x"]
    cfg = train.parse(["model=diffwave_small_unidirectional", *more])
    assert cfg.model.d_model == 8 and not cfg.model.bidirectional
    assert train.parse(["model=autoregressive", *more]).model == AutoregressiveConfig(d_model=8)


def test_the_linear_predictor_is_what_it_says():
    """Its error is that of the best multiple of x at each step, by simulation."""
    generator = torch.Generator().manual_seed(0)
    alpha_bar = noise_schedule()[::40]
    total = 0.0
    for a in alpha_bar.tolist():
        wav, noise = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
        x = a**0.5 * 0.3 * wav + (1 - a) ** 0.5 * noise
        total += (noise - x * (x @ noise) / (x @ x)).square().mean().item()
    assert linear_noise_error(alpha_bar, 0.09) == pytest.approx(total / len(alpha_bar), rel=0.01)


# ---- what a model is told -----------------------------------------------------------------------

SAID = {
    "label": ["one", "two", "one", "one", "two"],
    "speaker": ["eve", "ada", "ada", "bob", "eve"],
}


def told_csvs(data, folder, order=range(5), **others):
    """Settings of a run whose clips have labels and speakers, or other columns, in that order."""
    columns = SAID | others
    lines = [[f"{data / str(i)}.wav", *(column[i] for column in columns.values())] for i in order]
    for name, rows in (("train", lines), ("valid", lines[:2])):
        with (folder / f"told-{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path", *columns], *rows])
    return [f"{name}_csv={folder / f'told-{name}.csv'}" for name in ("train", "valid")]


def told_run(data, folder, run, *more, **columns):
    both = ["conditions=[label,speaker]", "n_listen=0", "max_steps=2"]
    return arguments(data, folder / run, *told_csvs(data, folder, **columns), *both, *more)


TOLD = {"label": ["one", "two"], "speaker": ["eve", "ada", "bob"]}
EITHER = pytest.mark.parametrize(
    ("kind", "unit"), [([], "bits"), (NOISY, "mse")], ids=["autoregressive", "diffwave"]
)


@EITHER
def test_values_and_shares_of_conditions_are_kept_with_the_weights(data, tmp_path, kind, unit):
    """In the order in which they appear; the weights can be told them, and draw by their shares."""
    train.main(told_run(data, tmp_path, "run", *kind, "n_listen=1"))
    counts = {"label": [3, 2], "speaker": [2, 2, 1]}
    config = last_of(tmp_path / "run")["config"]
    assert (config["conditions"], config["condition_counts"]) == (TOLD, counts)
    model = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert model.conditions == TOLD and model.config.condition_counts == counts
    few = {"steps": 2} if kind else {}
    assert model.generate(2, label="two", speaker=["ada", None], **few).shape == (2, 40)
    assert metrics(tmp_path / "run", "grad_norm/conditions")


def test_a_run_goes_on_with_the_same_clips_in_another_order(data, tmp_path, monkeypatch):
    """Values keep the rows of the embeddings that they were trained with."""
    sets, tell = [], ClipDataset.tell

    def noted(ds, conditions):
        tell(ds, conditions)
        sets.append((ds, conditions))

    monkeypatch.setattr(ClipDataset, "tell", noted)
    train.main(told_run(data, tmp_path, "run"))
    train.main(told_run(data, tmp_path, "run", "max_steps=4", order=[3, 4, 2, 1, 0]))
    last = last_of(tmp_path / "run")
    assert last["step"] == 4 and last["config"]["conditions"] == TOLD
    assert [len(ds) for ds, _ in sets] == [5, 2, 5, 2] and sets[2][0].clips[0].path.stem == "3"
    for ds, conditions in sets:
        assert conditions == TOLD
        for clip, row in zip(ds.clips, ds.told.tolist(), strict=True):
            heard = {k: TOLD[k][i - 1] for k, i in zip(TOLD, row, strict=True)}
            assert heard == clip.columns


@EITHER
def test_conditions_can_be_added_to_weights_without_them(data, tmp_path, kind, unit):
    """The first loss is that of the weights as they were; then the tables learn."""
    few = [*kind, "n_listen=0", "max_steps=2", "dropout=0"]
    train.main(arguments(data, tmp_path / "base", *few))
    init = f"init_from={tmp_path / 'base' / 'best.safetensors'}"
    train.main(told_run(data, tmp_path, "told", *few, init))
    csvs = told_csvs(data, tmp_path)
    train.main(arguments(data, tmp_path / "untold", *csvs, *few, init))
    told, untold = (metrics(tmp_path / x, f"train_{unit}") for x in ("told", "untold"))
    assert told[0][1] == pytest.approx(untold[0][1], rel=1e-6)
    tables = [v for k, v in last_of(tmp_path / "told")["model"].items() if k.startswith("told.")]
    assert len(tables) == 2 and all(table.abs().max() > 1e-4 for table in tables)


@EITHER
def test_conditions_are_taken_over_by_value(data, tmp_path, kind, unit):
    """From weights that know others, in another order: known values keep their embedding, new ones
    begin as what "not told" was, new conditions at zero."""
    few = [*kind, "condition_lr=0.1", "warmup_steps=0"]
    longer = ["conditions=[label]", "max_steps=15", "condition_dropout=0.3"]
    train.main(told_run(data, tmp_path, "base", *few, *longer))
    base = load_checkpoint(tmp_path / "base" / "best.safetensors")
    assert base.told.tables[0].weight.abs().amax(1).min() > 0
    still = ["start_lr=1e-12", "ssm_lr=0", "condition_lr=1e-12", "max_steps=1", "ema=0"]
    init = f"init_from={tmp_path / 'base' / 'best.safetensors'}"
    label = ["three", "two", "one", "three", "two"]
    train.main(told_run(data, tmp_path, "new", *few, init, *still, label=label))
    new = load_checkpoint(tmp_path / "new" / "last.pt")
    assert new.conditions["label"] == ["three", "two", "one"]
    untold, one, two = base.told.tables[0].weight
    expected = torch.stack([untold, untold, two, one])
    torch.testing.assert_close(new.told.tables[0].weight, expected, rtol=0, atol=1e-6)
    assert new.told.tables[1].weight.abs().max() < 1e-6


def test_weights_that_are_told_are_not_trained_untold(data, tmp_path, capsys):
    """Nor gone on with; and a run does not go on with values that it does not know. Each message
    says what to write."""
    train.main(told_run(data, tmp_path, "run"))
    init, csvs = f"init_from={tmp_path / 'run' / 'best.safetensors'}", told_csvs(data, tmp_path)
    written = "write conditions=[label,speaker]"
    refused(capsys, arguments(data, tmp_path / "new", *csvs, init), "best.safetensors", written)
    refused(capsys, arguments(data, tmp_path / "run", *csvs), "last.pt", written)
    refused(capsys, told_run(data, tmp_path, "run", "conditions=[label]"), "last.pt", written)
    speaker = ["eve", "ada", "ada", "bob", "zoe"]
    argv = told_run(data, tmp_path, "run", "max_steps=9", speaker=speaker)
    said = refused(capsys, argv, "last.pt", "values of speaker", "(zoe)", "init_from=")
    assert "model.conditions" not in said and not (tmp_path / "new").exists()


@pytest.mark.parametrize("probability", [0, 0.5])
def test_conditions_are_withheld_in_training_and_not_in_validation(
    data, tmp_path, monkeypatch, probability
):
    """Each with that probability, and all of a clip together with it once more."""
    seen = {"masked_bits": [], "total_bits": []}
    for name, rows in seen.items():
        real = getattr(train, name)

        def noted(model, batch, real=real, rows=rows):
            rows.append(batch["told"])
            return real(model, batch)

        monkeypatch.setattr(train, name, noted)
    more = [f"condition_dropout={probability}", "max_steps=60", "validation_interval=60"]
    train.main(told_run(data, tmp_path, "run", *more))
    trained, validated = (torch.cat(rows) for rows in seen.values())
    assert (validated > 0).all() and len(validated) == 2 and len(trained) == 100
    hidden = trained == 0
    assert hidden.float().mean() == pytest.approx(1 - (1 - probability) ** 2, abs=0.1)
    together = probability + (1 - probability) * probability**2
    assert hidden.all(1).float().mean() == pytest.approx(together, abs=0.12)


@pytest.mark.parametrize(
    ("more", "columns", "words"),
    [(["conditions=[accent]"], {}, ["conditions=[accent]", "no column accent", "label, speaker"]),
     (["conditions=[path]"], {}, ["no column path"]),
     (["conditions=[label]"], {"label": ["a", "b", "", "b", ""]}, ["2 clips have no label"]),
     (["conditions=[label]"], {"label": ["a", "b", "a,b", "b", "b"]}, ["label", "'a,b'", "comma"]),
     (["conditions=[label]"], {"label": ["a", "b", "[a]", "b", "b"]}, ["'[a]'", "bracket"]),
     (["conditions=[length]"], {"length": list("abcde")}, ["'length'", "rename the column"]),
     (["conditions=[my word]"], {"my word": list("abcde")}, ["'my word'", "rename the column"]),
     (["conditions=[speaker]"], {"speaker": list("abcde")}, ["speaker", "5 values", "1 to 4"]),
     (["model.conditions=[label]"], {}, ["model.conditions", "follows from other settings"]),
     (["condition_dropout=1"], {}, ["condition_dropout=1"]),
     (["condition_dropout=-0.1"], {}, ["condition_dropout=-0.1"]),
     (["condition_lr=0"], {}, ["condition_lr=0"]),
     (["d_condition=0"], {}, ["d_condition=0"])],
)  # fmt: skip
def test_what_cannot_be_a_condition_is_one_error(
    data, tmp_path, capsys, monkeypatch, more, columns, words
):
    monkeypatch.setattr(config, "MAX_VALUES", 4)
    refused(capsys, told_run(data, tmp_path, "run", *more, **columns), *words)
    assert not (tmp_path / "run").exists()


def test_a_value_of_validation_clips_alone_is_a_notice(data, tmp_path, caplog):
    """They count as not told, and training goes on."""
    argv = told_run(data, tmp_path, "run")
    text = (tmp_path / "told-valid.csv").read_text().replace("ada", "zoe")
    (tmp_path / "told-valid.csv").write_text(text)
    train.main(argv)
    assert "1 of 2 clips have a speaker that is not in the training set (zoe)" in caplog.text
    assert last_of(tmp_path / "run")["step"] == 2


# ---- compiled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [[], ["conditions=[label,speaker]"]], ids=["untold", "told"])
@EITHER
def test_compiled_steps_have_the_same_losses(data, tmp_path, monkeypatch, kind, unit, told):
    """compile=true: clips are padded to seq_len, so one graph serves batches of all lengths. Traced
    and differentiated as by torch.compile, but run without the minutes of its C++."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
    csvs = told_csvs(data, tmp_path)
    few = [*csvs, *kind, *told, "batch_size=1", "seq_len=200", "n_listen=0"]

    def losses(run, *more):
        torch.compiler.reset()
        counters.clear()
        train.main(arguments(data, tmp_path / run, *few, *more))
        n_graphs = counters["stats"]["unique_graphs"]
        return [value for _, value in metrics(tmp_path / run, f"train_{unit}")], n_graphs

    plain, none = losses("plain", "max_steps=4")
    quick, n_graphs = losses("quick", "max_steps=4", "compile=true")
    assert quick == pytest.approx(plain, rel=1e-5) and len(quick) == 4
    assert n_graphs > none == 0 and losses("one", "max_steps=1", "compile=true")[1] == n_graphs


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_torch_compile_itself_trains(data, tmp_path):
    """The same with its own backend, for the smallest model."""
    few = ["conditions=[label]", "model.pool=[]", "model.ff=0", "max_steps=1", "n_listen=0",
           "validation_interval=9", "ema=0"]  # fmt: skip
    for word in ("false", "true"):
        csvs = told_csvs(data, tmp_path)
        train.main(arguments(data, tmp_path / word, *csvs, *few, f"compile={word}"))
    ((_, plain),), ((_, quick),) = (
        metrics(tmp_path / x, "train_bits") for x in ("false", "true")
    )  # fmt: skip
    assert quick == pytest.approx(plain, rel=1e-5)


# ---- what is trained, and how -----------------------------------------------------------------


def tiny(**kwargs):
    torch.manual_seed(0)
    sizes = dict(d_model=8, n_layers=1, pool=[2, 2], d_state=8, l_max=64) | kwargs
    return SashimiAR(AutoregressiveConfig(**sizes))


def test_state_spaces_have_their_own_rate_and_no_decay():
    """log_dt, Lambda, P, B of every S4 layer: lr = ssm_lr, weight decay 0; C, D, biases and norms:
    lr = start_lr, no decay; matrices decay. Every parameter is in one group, once."""
    model = tiny()
    settings = {"train_csv": "x", "valid_csv": "x", "checkpoint_path": "x", "start_lr": 0.5,
                "ssm_lr": 0.25, "weight_decay": 0.125}  # fmt: skip
    optimizer = train.make_optimizer(model, from_dict(train.TrainConfig, settings))
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(found)
    assert len(found) == len(list(model.parameters()))
    n_ssm = 0
    for name, p in model.named_parameters():
        owner, _, last = name.rpartition(".")
        group = found[id(p)]
        is_s4 = isinstance(model.get_submodule(owner), S4)
        if is_s4 and last in ("log_dt", "log_A_real", "A_imag", "P", "B"):
            assert (group["lr"], group["weight_decay"]) == (0.25, 0), name
            n_ssm += 1
        else:
            decays = last == "weight" and "norm" not in owner
            assert (group["lr"], group["weight_decay"]) == (0.5, 0.125 * decays), name
    assert n_ssm == 5 * 3


def test_padding_does_not_change_the_loss(data):
    """Bits of a batch are the sum of the bits of its clips alone, whatever they are padded with.

    Pitfall: shorter clips elsewhere train on their padding.
    """
    model, clips = tiny().double(), ClipDataset(data / "train.csv", RATE)
    (together,) = sample_batches(clips, 5, None, shuffle=False)
    alone = list(sample_batches(clips, 1, None, shuffle=False, pad_multiple=1))
    assert not together["mask"].all() and all(b["mask"].all() for b in alone)
    with torch.no_grad():
        expected = sum(masked_bits(model, b) for b in alone)
        torch.testing.assert_close(masked_bits(model, together), expected)
        noise = torch.randint(256, together["x"].shape)
        mask = together["mask"]
        other = {k: together[k].where(mask, noise) for k in ("x", "target")} | {"mask": mask}
        torch.testing.assert_close(masked_bits(model, other), expected)
        silent = model.nll(torch.zeros(1, 50)) * 50 / math.log(2)
        x = torch.full((1, 50), 128)
        batch = {"x": x, "target": x, "mask": torch.ones(1, 50, dtype=torch.bool)}
        torch.testing.assert_close(masked_bits(model, batch)[None], silent.float())


def test_one_step_on_a_padded_batch_is_the_step_on_its_samples(data, tmp_path):
    """The gradient too: a batch's loss is the mean over its real samples."""
    model, clips = tiny().double(), ClipDataset(data / "train.csv", RATE)
    grads = []
    for pad in (1, 64):
        model.zero_grad()
        (batch,) = sample_batches(clips, 5, None, shuffle=False, pad_multiple=pad)
        (masked_bits(model, batch) / batch["mask"].sum()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "plateau"])
def test_learning_rates_follow_the_schedule(data, tmp_path, schedule):
    """Warm-up is linear; constant stays, cosine ends near 0, plateau is cut by its factor."""
    more = [f"schedule={schedule}", "warmup_steps=2", "max_steps=8", "n_listen=0",
            "validation_interval=2", "plateau_patience=0", "plateau_factor=0.5",
            f"start_lr={0.8 if schedule == 'plateau' else 0.01}"]  # fmt: skip
    train.main(arguments(data, tmp_path / "run", *more))
    lr = [value for _, value in metrics(tmp_path / "run", "lr")]
    if schedule == "constant":
        assert lr == pytest.approx([0.005] + [0.01] * 7)
    elif schedule == "cosine":
        expected = [(1 + math.cos(math.pi * i / 8)) / 2 * 0.01 for i in range(8)]
        assert lr == pytest.approx([expected[0] / 2, *expected[1:]])
    else:
        best, scale, expected = math.inf, 1.0, {}
        for step, bits in metrics(tmp_path / "run", "valid_bits"):
            scale, best = (scale if bits < best else scale / 2), min(best, bits)
            expected[step + 1] = expected[step + 2] = scale * 0.8
        assert lr[:2] == pytest.approx([0.4, 0.8])
        assert lr[2:] == pytest.approx([expected[step] for step in range(3, 9)])


# ---- bad input --------------------------------------------------------------------------------


def test_unusable_files_are_skipped_and_counted(data, tmp_path, caplog):
    """Empty, one-sample, NaN-filled, truncated, non-audio and missing files: counted, not fatal.
    Stereo is mixed down, another rate is resampled, each with one notice."""
    good = tone(400, 100)
    for name, wave in {"good": good, "one": good[:1], "none": good[:0]}.items():
        soundfile.write(tmp_path / f"{name}.wav", wave, RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(400, np.nan), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.flac", np.stack([good, good], 1), RATE)
    soundfile.write(tmp_path / "fast.wav", tone(800, 100, 4000), 4000)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:300])
    (tmp_path / "text.wav").write_text("not audio at all")
    (tmp_path / "zero.wav").touch()
    names = ["good.wav", "one.wav", "none.wav", "nan.wav", "stereo.flac", "fast.wav", "cut.wav",
             "text.wav", "zero.wav", "gone.wav"]  # fmt: skip
    (tmp_path / "mixed.csv").write_text("path\n" + "\n".join(names))
    more = [f"train_csv={tmp_path / 'mixed.csv'}", "max_steps=2", "n_listen=0"]
    with caplog.at_level(logging.WARNING):
        train.main(arguments(data, tmp_path / "run", *more))
    text = caplog.text
    assert "skipped 7 of 10" in text and "resampled 1 of 3" in text and "mixed 1 of 3" in text
    assert (tmp_path / "run" / "best.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [(["batchsize=4"], ["batchsize", "batch_size"]),
     (["d_modle=4"], ["d_modle", "did you mean model.d_model"]),
     (["model=difwave"], ["model=difwave", "did you mean diffwave"]),
     (["unconditional=false"], ["unknown setting unconditional"]),
     (["model=diffwave", "model.tied=perhaps"], ["model.tied=perhaps", "true or false"]),
     (["peak=2"], ["peak=2"]),
     (["model.n_layer=4"], ["model.n_layers"]),
     (["batch_size=many"], ["batch_size=many", "an integer"]),
     (["model.unet=perhaps"], ["model.unet=perhaps", "true or false"]),
     (["batch_size=0"], ["batch_size=0"]),
     (["validation_interval=0"], ["validation_interval=0"]),
     (["seq_len=0"], ["seq_len=0"]),
     (["max_steps=0", "max_minutes=0"], ["max_steps=0", "max_minutes=0"]),
     (["max_steps=", "max_minutes="], ["max_steps=none", "max_minutes=none"]),
     (["max_steps=-3"], ["max_steps=-3"]),
     (["max_minutes=-1"], ["max_minutes=-1"]),
     (["accumulate=3"], ["batch_size=2", "accumulate=3"]),
     (["keep_last=0"], ["keep_last=0"]),
     (["precision=float16"], ["precision=float16", "bfloat16"]),
     (["resume=yes"], ["resume=yes", "auto"]),
     (["recipe=sc9"], ["recipe=sc9", "did you mean sc09"]),
     (["recipe=sc09", "model=diffwave"], ["recipe=", "model="]),
     (["sample_len=1"], ["sample_len=1"]),
     (["recompute_tiers=-1"], ["recompute_tiers=-1"]),
     (["n_listen=-1"], ["n_listen=-1"]),
     (["threads=-1"], ["threads=-1"]),
     (["start_lr=-1"], ["start_lr=-1"]),
     (["warmup_steps=-1"], ["warmup_steps=-1"]),
     (["ema=1"], ["ema=1"]),
     (["schedule=linear"], ["schedule=linear", "cosine"]),
     (["append_silence=-1"], ["append_silence"]),
     (["gain_db=-1"], ["gain_db"]),
     (["speed=1"], ["speed"]),
     (["model.d_state=7"], ["d_state=7"]),
     (["model.pool=[0]"], ["pool=[0]"]),
     (["model.d_model=0"], ["d_model=0"]),
     (["model.l_max=0"], ["l_max=0"]),
     (["model.clip_length=0"], ["clip_length=0"]),
     (["model.sample_rate=0"], ["sample_rate=0"]),
     (["device=nonsense"], ["device=nonsense"]),
     (["device=cuda:99"], ["device=cuda:99"])],
)  # fmt: skip
def test_bad_settings_are_one_error_and_nothing_is_written(data, tmp_path, capsys, more, words):
    """The setting is named, what was expected is said, exit 2, no folder is made."""
    argv = arguments(data, tmp_path / "run", "max_minutes=0.02", *more)  # would end, if it began
    refused(capsys, argv, *words)
    assert not (tmp_path / "run").exists()


def test_a_missing_setting_is_named(capsys):
    refused(
        capsys,
        ["train_csv=a.csv", "checkpoint_path=runs/x"],
        "valid_csv: required, as in: python train.py ",
    )


def test_bad_lists_are_one_error_and_nothing_is_written(data, tmp_path, capsys):
    """A CSV that is not there, is empty, has no rows, no `path`, or no usable file; a folder that
    is not there."""
    for content, words in [(None, ["list.csv", "is not there"]), ("", ["list.csv", "empty"]),
                           ("path,label\n", ["list.csv", "empty"]),
                           ("file\n0.wav\n", ["list.csv", "no column `path`"]),
                           ("path\ngone.wav\n", ["list.csv", "not found"])]:  # fmt: skip
        if content is not None:
            (tmp_path / "list.csv").write_text(content)
        for which in ("train_csv", "valid_csv"):
            more = f"{which}={tmp_path / 'list.csv'}"
            refused(capsys, arguments(data, tmp_path / "run", more), *words)
    refused(capsys, arguments(data, tmp_path / "run", "data_root=/nowhere"), "data_root=/nowhere")
    assert not (tmp_path / "run").exists()


def test_an_impossible_folder_is_one_error(data, tmp_path, capsys):
    (tmp_path / "file").touch()
    refused(capsys, arguments(data, tmp_path / "file"), "file")
    refused(capsys, arguments(data, tmp_path / "file" / "run"), "file")


def test_a_saved_model_of_this_size_is_what_the_trainer_makes(run, tmp_path):
    """best.safetensors holds the tensors that `save_checkpoint` of such a model would write."""
    model = SashimiAR(load_checkpoint(run / "best.safetensors").config)
    save_checkpoint(tmp_path / "same.safetensors", model)
    same = load_checkpoint(tmp_path / "same.safetensors").state_dict()
    best = load_checkpoint(run / "best.safetensors").state_dict()
    assert {k: v.shape for k, v in same.items()} == {k: v.shape for k, v in best.items()}
