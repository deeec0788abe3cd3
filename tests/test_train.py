"""The trainer: from a CSV of audio files to weights that generate."""

import math
import shutil
from dataclasses import fields
from operator import attrgetter

import pytest
import soundfile
import torch
from commands import status
from torch._dynamo.utils import counters
from training import EITHER, KIND, NOISY, RATE, arguments, last_of, metrics, refused, tells, trained

import train
from rawaudio import autoregressive, conditions
from rawaudio.autoregressive import masked_bits
from rawaudio.batches import sample_batches, wave_batches
from rawaudio.checkpoint import load_checkpoint
from rawaudio.data import ClipDataset
from rawaudio.families import MODELS, RECIPES
from rawaudio.files import read_metadata
from rawaudio.noise import noise_error
from rawaudio.run import Run
from sashimi.autoregressive import AutoregressiveConfig, SashimiAR
from sashimi.diffwave import named_config
from sashimi.s4 import S4

PATHS = ["train_csv=x", "valid_csv=x", "checkpoint_path=x"]


@pytest.mark.parametrize(
    ("unit", "first", "near", "falls"), [("bits", 8.5, 1.5, 0.88), ("mse", 1, 0.5, 0.95)]
)
def test_training_lowers_the_loss(runs, unit, first, near, falls):
    """15 steps on tones: from the 8 bits of not knowing anything, or the error of predicting no
    noise, both fall."""
    losses = [value for _, value in metrics(runs[unit], f"train_{unit}")]
    assert len(losses) == 15 and losses[0] == pytest.approx(first, abs=near)
    assert sum(losses[-3:]) / 3 < falls * losses[0]
    steps, valid = zip(*metrics(runs[unit], f"valid_{unit}"), strict=True)
    assert steps == (5, 10, 15) and valid[-1] < valid[0] < first + near


@EITHER
def test_the_best_weights_generate_and_have_the_score_that_they_say(runs, data, unit):
    metadata = read_metadata(runs[unit] / "best.safetensors")
    best = min(value for _, value in metrics(runs[unit], f"valid_{unit}"))
    assert float(metadata[f"valid_{unit}"]) == pytest.approx(best, abs=1e-4)
    assert metadata["data"] == "train.csv" and int(metadata["step"]) in (5, 10, 15)
    model = load_checkpoint(runs[unit] / "best.safetensors")
    wavs = model.unconditional_generate(2)
    assert wavs.shape == (2, 40) and wavs.isfinite().all() and model.sample_rate == RATE
    if unit == "bits":
        clips = [torch.from_numpy(soundfile.read(data / f"{i}.wav")[0]).float() for i in (1, 3)]
        bits = [model.nll(wav[None]).item() * len(wav) / math.log(2) for wav in clips]
        score = sum(bits) / sum(map(len, clips))
    else:
        clips = ClipDataset(data / "valid.csv", RATE, pcm=True, peak=0.5)
        (batch,) = wave_batches(clips, 2, 40, shuffle=False)
        with torch.no_grad():
            score = noise_error(model, batch["wav"], torch.Generator().manual_seed(0)).item()
    assert score == pytest.approx(best, abs=1e-4)


@EITHER
def test_the_last_checkpoint_is_used_as_the_best_is(runs, unit):
    """Of a run with `ema`, averaged weights are those that are validated and kept."""
    last = last_of(runs[unit])
    model, best = (load_checkpoint(runs[unit] / x) for x in ("last.pt", "best.safetensors"))
    assert last["step"] == 15 and last["config"]["d_model"] == 8
    assert last["kind"] == ("diffwave" if unit == "mse" else "autoregressive")
    assert (last["averaged"] is not None) == (unit == "mse")
    same = [torch.equal(v, last["model"][k]) for k, v in model.state_dict().items()]
    assert all(same) == (unit == "bits")
    weights = last["averaged"] or last["model"]
    for name, value in best.state_dict().items():  # the last validation is the best
        assert torch.equal(value, weights[name]) and torch.equal(value, model.state_dict()[name])


def test_progress_shows_bits_speed_and_time_left(runs):
    printed = runs["bits"].with_suffix(".txt").read_text()
    for words in ("parameters on cpu", "5 training clips", "step 5", "bits", "clips/s", "min left",
                  "validation", "best.safetensors", "% backward"):  # fmt: skip
        assert words in printed, words
    assert "mse 1.0000 untrained" in runs["mse"].with_suffix(".txt").read_text()


@pytest.mark.parametrize(
    ("argv", "shown"),
    [("", {"train_csv": "required", "start_lr": "0.004", "model.pool": "[4,4]"}),
     ("model=diffwave_small", {"start_lr": "0.0002", "ema": "0.9999", "model.d_model": "64"}),
     ("recipe=digits", {"max_steps": "3115", "model.sample_rate": "8000"})],
)  # fmt: skip
def test_help_shows_the_defaults_of_model_and_recipe(capsys, argv, shown):
    """And examples, and where defaults come from: named, and explained once."""
    assert status(train.main, [*argv.split(), "--help"]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[:5] for line in text.splitlines() if line.strip()}
    assert all(value in lines[key] for key, value in shown.items())
    assert {f.name for f in fields(train.TrainConfig)} <= lines.keys() and "recipe=digits" in text
    assert all(text.count(source) > 1 for source in ("[S]", "[U]", "[4]"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("model=none recipe=", {"model": AutoregressiveConfig(), "schedule": "cosine",
         "warmup_steps": 1000, "max_steps": 200_000, "recipe": None}),
        ("model=autoregressive d_model=8", {"model": AutoregressiveConfig(d_model=8)}),
        ("model=diffwave_small", {"model": named_config("small"), "start_lr": 2e-4, "ema": 0.9999}),
        ("model=diffwave_small_unidirectional d_model=8",
         {"model.d_model": 8, "model.bidirectional": False}),
        ("sample_len=4000", {"model.l_max": 4000}),
        ("sample_len=4000 model.l_max=50", {"model.l_max": 50}),
        ("recipe=sc09", {"schedule": "plateau", "max_steps": 1_100_000, "batch_size": 8,
         "start_lr": 4e-3, "plateau_patience": 20}),
        ("recipe=sc09-unet", {"schedule": "cosine", "max_steps": 200_000, "batch_size": 16,
         "start_lr": 1e-3, "weight_decay": 0.1}),
        ("recipe=youtubemix", {"sample_len": 131_072, "model.l_max": 131_072, "batch_size": 1}),
        ("recipe=beethoven sample_len=4000", {"sample_len": 4000, "model.l_max": 4000}),
        ("recipe=digits sample_len=4000 max_minutes=25 max_steps=0",
         {"max_minutes": 25, "max_steps": 0, "model.sample_rate": 8000, "model.l_max": 8000}),
    ],
)  # fmt: skip
def test_models_and_recipes_are_where_settings_start_from(argv, expected):
    """What is written on the command line counts more."""
    cfg = train.parse([*PATHS, *argv.split()])
    assert {key: attrgetter(key)(cfg) for key in expected} == expected


@pytest.mark.parametrize(("recipe", "millions"), [("sc09", 4.8), ("sc09-unet", 6.8)])
def test_recipes_have_the_published_size(recipe, millions):
    with torch.device("meta"):
        model = SashimiAR(train.parse([*PATHS, f"recipe={recipe}"]).model)
    n = sum(p.numel() for p in model.parameters())
    assert n == pytest.approx(millions * 1e6, rel=0.02)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_for_the_models_of_its_family(capsys, recipe):
    family, _ = RECIPES[recipe]
    for name, (other, _) in MODELS.items():
        argv = [*PATHS, f"recipe={recipe}", f"model={name}"]
        if other is family:
            assert type(train.parse(argv).model) is family.config
        else:
            refused(capsys, argv, f"recipe={recipe} is for model={family.kind}", "leave one")


# settings, words of the message; without any: the setting as it is written
REFUSED = [
    ("batchsize=4", "batchsize", "batch_size"),
    ("model=difwave", "model=difwave", "did you mean diffwave"),
    ("recipe=sc9", "recipe=sc9", "did you mean sc09"),
    ("unconditional=false", "unknown setting unconditional"),
    ("model=diffwave model.tied=perhaps", "model.tied=perhaps", "true or false"),
    ("model=diffwave data_std=0", "data_std=0.0"),
    ("max_steps=0 max_minutes=0", "max_steps=0", "max_minutes=0"),
    ("max_steps= max_minutes=", "max_steps=none", "max_minutes=none"),
    ("accumulate=3", "batch_size=2", "accumulate=3"),
    ("precision=float16", "precision=float16", "bfloat16"),
    ("resume=yes", "resume=yes", "auto"),
    ("schedule=linear", "schedule=linear", "cosine"),
    ("train_csv=list.csv", "list.csv", "is not there"),
    ("valid_csv=list.csv", "list.csv", "is not there"),
    ("model.conditions=[label]", "model.conditions", "follows from other settings"),
    ("conditions=[accent]", "conditions=[accent]", "no column accent", "label, speaker"),
    ("conditions=[path]", "no column path"),
    *((line,) for line in """
    peak=2 batch_size=0 validation_interval=0 seq_len=0 max_steps=-3 max_minutes=-1 keep_last=0
    sample_len=1 recompute_tiers=-1 n_listen=-1 threads=-1 start_lr=-1 warmup_steps=-1 ema=1
    append_silence=-1 gain_db=-1 speed=1 augmented=0 augmented=1.1 d_state=7 pool=[0] d_model=0
    l_max=0 clip_length=0 sample_rate=0 device=nonsense device=cuda:99
    condition_dropout=1 condition_dropout=-0.1 condition_lr=0 d_condition=0 data_root=/nowhere
    """.split()),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "words"), [(argv, words or [argv]) for argv, *words in REFUSED])
def test_bad_settings_are_one_error_and_nothing_is_written(data, tmp_path, capsys, argv, words):
    """The setting is named, what was expected is said, exit 2, no folder is made."""
    run = arguments(data, tmp_path / "run", "max_minutes=0.02", *argv.split())
    refused(capsys, run, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [("label", ["a", "b", "", "b", ""], ["2 clips have no label"]),
     ("label", ["a", "b", "a,b", "b", "b"], ["label", "'a,b'", "comma"]),
     ("label", ["a", "b", "[a]", "b", "b"], ["'[a]'", "bracket"]),
     ("my word", "abcde", ["'my word'", "rename the column"]),
     ("length", "abcde", ["'length'", "rename the column"]),
     ("speaker", "abcde", ["speaker", "5 values", "1 to 4"])],
)  # fmt: skip
def test_bad_columns_are_one_error(data, tmp_path, capsys, monkeypatch, name, column, words):
    monkeypatch.setattr(conditions, "MAX_VALUES", 4)
    argv = tells(data, tmp_path, "run", f"conditions=[{name}]", **{name: column})
    refused(capsys, argv, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["file", "file/run"])
def test_impossible_folders_are_named(data, tmp_path, capsys, folder):
    (tmp_path / "file").touch()
    refused(capsys, arguments(data, tmp_path / folder), "file")


def test_diffusion_with_data_std_trains(data, tmp_path):
    """The loss is relative to scaling the input."""
    run = trained(data, tmp_path / "run", *NOISY, "data_std=0.35", "n_listen=0")
    errors = [value for _, value in metrics(run, "train_relative")]
    assert errors[0] == pytest.approx(1, abs=0.5) and sum(errors[-3:]) < 0.98 * sum(errors[:3])
    assert "validation, relative" in (run / "README.md").read_text()
    assert load_checkpoint(run / "best.safetensors").config.data_std == 0.35


@pytest.mark.parametrize("more", [[], [*NOISY, "unconditional=false", "seq_len=80"]])
def test_bfloat16_trains_as_float32_does(data, tmp_path, more):
    """Losses of the first steps differ by what 8 bits of mantissa lose; weights stay float32, as do
    the spectrograms that vocoders hear."""
    losses, unit = [], "mse" if more else "bits"
    for precision in ("float32", "bfloat16"):
        few = ["n_listen=0", "max_steps=4", f"precision={precision}"]
        run = trained(data, tmp_path / precision, *more, *few)
        losses.append([value for _, value in metrics(run, f"train_{unit}")])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)
    assert all(v.dtype == torch.float32 for v in last_of(run)["model"].values())


TOLD = {"label": ["one", "two"], "speaker": ["eve", "ada", "bob"]}


def test_values_and_shares_of_conditions_are_kept_with_the_weights(data, tmp_path):
    """In the order in which they appear; the weights can be told them, and draw by their shares.
    The run goes on with clips in another order, whose values keep the rows of their embeddings."""
    train.main(tells(data, tmp_path, "run"))
    assert metrics(tmp_path / "run", "grad_norm/conditions")
    model = load_checkpoint(tmp_path / "run" / "best.safetensors")
    counts = {"label": [3, 2], "speaker": [2, 2, 1]}
    assert model.conditions == TOLD and model.config.condition_counts == counts
    cfg = train.parse(tells(data, tmp_path, "run", order=[3, 4, 2, 1, 0]))
    with Run(cfg, "") as run:
        assert run.position.step == 2 and run.model.conditions == TOLD
        assert [clip.path.stem for clip in run.train_ds.clips] == list("34210")
        for ds in (run.train_ds, run.valid_ds):
            for clip, row in zip(ds.clips, ds.told.tolist(), strict=True):
                words = {name: TOLD[name][i - 1] for name, i in zip(TOLD, row, strict=True)}
                assert words == clip.columns


def test_weights_of_another_run_take_conditions_over_by_value(runs, data, tmp_path):
    """Added to weights without any, the first loss is that of the weights as they were; then the
    tables learn. Of weights that know others, in another order, known values keep their embedding,
    new ones begin as what "not told" was, new conditions at zero."""
    init, few = f"init_from={runs['bits'] / 'best.safetensors'}", ["warmup_steps=0"]
    more = ["condition_lr=0.1", "max_steps=8", "condition_dropout=0.3", "conditions=[label]"]
    train.main(tells(data, tmp_path, "told", *few, init, *more))
    train.main(tells(data, tmp_path, "untold", *few, init, "max_steps=1", "conditions=[]"))
    first = [metrics(tmp_path / x, "train_bits")[0][1] for x in ("told", "untold")]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    told = load_checkpoint(tmp_path / "told" / "best.safetensors").told.tables[0].weight
    assert told.abs().amax(1).min() > 1e-4
    still = ["start_lr=1e-12", "ssm_lr=0", "condition_lr=1e-12", "max_steps=1", "ema=0"]
    init = f"init_from={tmp_path / 'told' / 'best.safetensors'}"
    label = ["three", "two", "one", "three", "two"]
    train.main(tells(data, tmp_path, "new", *few, init, *still, label=label))
    new = load_checkpoint(tmp_path / "new" / "last.pt")
    assert new.conditions["label"] == ["three", "two", "one"]
    untold, one, two = told
    expected = torch.stack([untold, untold, two, one])
    torch.testing.assert_close(new.told.tables[0].weight, expected, rtol=0, atol=1e-6)
    assert new.told.tables[1].weight.abs().max() < 1e-6


def test_weights_that_are_told_are_not_trained_untold(data, tmp_path, capsys, caplog):
    """Nor gone on with, nor with values that a run does not know. A value of validation clips alone
    counts as not told, with a notice."""
    argv = tells(data, tmp_path, "run")
    text = (tmp_path / "valid.csv").read_text().replace("ada", "zoe")
    (tmp_path / "valid.csv").write_text(text)
    train.main(argv)
    assert "1 of 2 clips have a speaker that is not in the training set (zoe)" in caplog.text
    init = f"init_from={tmp_path / 'run' / 'best.safetensors'}"
    for run, path, *more in [("new", "best.safetensors", "conditions=[]", init),
                             ("run", "last.pt", "conditions=[]"),
                             ("run", "last.pt", "conditions=[label]")]:  # fmt: skip
        argv = tells(data, tmp_path, run, *more)
        refused(capsys, argv, path, "write conditions=[label,speaker]")
    speaker = ["eve", "ada", "ada", "bob", "zoe"]
    argv = tells(data, tmp_path, "run", "max_steps=9", speaker=speaker)
    said = refused(capsys, argv, "last.pt", "values of speaker", "(zoe)", "init_from=")
    assert "model.conditions" not in said and not (tmp_path / "new").exists()


@pytest.mark.parametrize("probability", [0, 0.5])
def test_conditions_are_withheld_in_training_alone(data, tmp_path, monkeypatch, probability):
    seen = {"masked_bits": [], "total_bits": []}
    for name, rows in seen.items():
        real = getattr(autoregressive, name)

        def noted(model, batch, *state, real=real, rows=rows):
            rows.append(batch["told"])
            return real(model, batch, *state)

        monkeypatch.setattr(autoregressive, name, noted)
    more = [f"condition_dropout={probability}", "batch_size=5"]
    train.main(tells(data, tmp_path, "run", *more))
    trained, validated = (torch.cat(rows) for rows in seen.values())
    assert (validated > 0).all() and len(trained) == 10
    assert bool((trained == 0).any()) == (probability > 0)


@pytest.mark.parametrize(
    ("unit", "told", "backend"),
    [("bits", "", "aot_eager"), ("mse", "label", "aot_eager"), ("bits", "label", "inductor")],
)
def test_compiled_steps_have_the_same_losses(data, tmp_path, monkeypatch, unit, told, backend):
    """One graph serves batches of all lengths. Traced and differentiated as by torch.compile, but
    run without the minutes of its C++; and once, for the smallest model, with it."""
    if backend == "inductor" and not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    compiled, summarise, graphs, losses = torch.compile, train.summarise, [], []

    def counted(*args):
        graphs.append(counters["stats"]["unique_graphs"])
        summarise(*args)

    monkeypatch.setattr(train, "summarise", counted)
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend=backend))
    torch.compiler.reset()
    counters.clear()
    small = ["model.pool=[]", "model.ff=0"] if backend == "inductor" else ["model.pool=[2]"]
    more = [*KIND[unit], *small, f"conditions=[{told}]", "batch_size=1", "seq_len=200",
            "n_listen=0", "max_steps=3", "validation_interval=9"]  # fmt: skip
    for word in ("false", "true"):
        run = trained(data, tmp_path / word, *more, f"compile={word}")
        losses.append([value for _, value in metrics(run, f"train_{unit}")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 3
    assert graphs[:3] == [0] * 3 and 1 <= graphs[3] <= 2 and graphs[3:] == graphs[3:4] * 3


STATE_SPACE = ("log_dt", "log_A_real", "A_imag", "P", "B")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_spaces_have_their_own_rate_and_no_decay(data, tmp_path, optimizer):
    """Conditions, too; C, D, biases and norms: start_lr, no decay; matrices decay, and are Muon's
    where features meet features. Every parameter is in one group, once."""
    more = ["start_lr=0.5", "ssm_lr=0.25", "condition_lr=0.75", "weight_decay=0.125"]
    more += [f"optimizer={optimizer}"]
    with Run(train.parse(tells(data, tmp_path, "run", *more)), "") as run:
        groups, model = run.optimizer.param_groups, run.model
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert len(found) == len(list(model.parameters()))
    n_ssm = 0
    for name, p in model.named_parameters():
        owner, _, last = name.rpartition(".")
        expected = (0.5, 0.125 if last == "weight" and "norm" not in owner else 0)
        if isinstance(model.get_submodule(owner), S4) and last in STATE_SPACE:
            expected, n_ssm = (0.25, 0), n_ssm + 1
        elif name.startswith("told."):
            expected = (0.75, 0)
        assert (found[id(p)]["lr"], found[id(p)]["weight_decay"]) == expected, name
        inner = name.startswith("backbone.") and p.ndim == 2 and last == "weight"
        assert ("momentum" in found[id(p)]) == (optimizer == "muon" and inner), name
    assert n_ssm == 5 * 3


def test_padding_does_not_change_loss_or_gradient(data):
    """Bits of a batch are the sum of those of its clips alone, whatever they are padded with.
    Pitfall: shorter clips elsewhere train on their padding."""
    torch.manual_seed(0)
    model = SashimiAR(train.parse(arguments(data, "x")).model).double()
    clips, results = ClipDataset(data / "train.csv", RATE), []
    (batch,) = sample_batches(clips, 5, None, shuffle=False, pad_multiple=64)
    alone = list(sample_batches(clips, 1, None, shuffle=False, pad_multiple=1))
    mask = batch["mask"]
    assert not mask.all() and all(b["mask"].all() for b in alone)
    other = {k: batch[k].where(mask, torch.randint(256, mask.shape)) for k in ("x", "target")}
    for batches in (alone, [batch], [other | {"mask": mask}]):
        model.zero_grad()
        total = sum(masked_bits(model, b) for b in batches)
        total.backward()
        results.append((total, [p.grad.clone() for p in model.parameters()]))
        torch.testing.assert_close(results[-1], results[0])
    assert total / mask.sum() > 6


@pytest.mark.parametrize("schedule", ["constant", "cosine", "plateau"])
def test_learning_rates_follow_the_schedule(data, tmp_path, schedule):
    """Warm-up is linear; constant stays, cosine ends near 0, plateau is cut by its factor."""
    rate = 0.8 if schedule == "plateau" else 0.01
    more = [f"schedule={schedule}", f"start_lr={rate}", "warmup_steps=2", "max_steps=8",
            "n_listen=0", "validation_interval=2", "plateau_patience=0",
            "plateau_factor=0.5"]  # fmt: skip
    run = trained(data, tmp_path / "run", *more)
    scales = [1.0] * 8
    if schedule == "cosine":
        scales = [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    if schedule == "plateau":
        best, scale, scales = math.inf, 1.0, [1.0, 1.0]
        for _, bits in metrics(run, "valid_bits")[:-1]:
            scale, best = (scale if bits < best else scale / 2), min(best, bits)
            scales += [scale, scale]
        assert scale < 1
    wanted = [rate * scale for scale in scales]
    assert [value for _, value in metrics(run, "lr")] == pytest.approx([wanted[0] / 2, *wanted[1:]])
