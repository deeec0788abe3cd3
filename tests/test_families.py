"""Every family of models can do what the others can, through the same commands."""

import csv

import pytest
import torch
import training
from training import RATE, assert_same, last_of, rows

import train
from rawaudio import generate, likelihood
from rawaudio.autoregressive import Autoregressive, shift
from rawaudio.checkpoint import load_checkpoint, save_checkpoint
from rawaudio.data import ClipDataset
from rawaudio.families import FAMILIES, MODELS, RECIPES
from rawaudio.files import read_metadata
from rawaudio.sampling import Graph, Plain
from sashimi import mulaw

TOLD = {"label": ["a", "b", "c"], "speaker": ["x", "y"]}
COUNTS = {"label": [1, 2, 3], "speaker": [4, 4]}
S4 = {"d_model": 8, "n_layers": [1], "pool": [2, 2], "d_state": 8, "l_max": 64}
MEL = {"n_mels": 4, "hop": 8, "n_fft": 32}
WAVENET = {"layers": 3, "blocks": 2, "residual_channels": 8, "dilation_channels": 6,
           "skip_channels": 16, "end_channels": 12}  # fmt: skip
SAMPLERNN = {"frame_sizes": [4, 2, 2], "d_hidden": 12, "d_embedding": 6}
DIFFWAVE = {"layers": 4, "cycle": 3, "residual_channels": 8, "skip_channels": 12}
TINY = {
    "autoregressive": S4,
    "diffwave": S4 | MEL,
    "wavenet": WAVENET,
    "samplernn": SAMPLERNN,
    "diffwave_wavenet": DIFFWAVE | MEL,
}
ROWS = [
    *TINY.items(),
    ("wavenet", WAVENET | {"kernel_size": 3}),
    ("samplernn", SAMPLERNN | {"frame_sizes": [2, 1, 3], "n_rnn": 2, "quantizer": "linear"}),
]
STEPPED = [row for row in ROWS if issubclass(FAMILIES[row[0]].module, Autoregressive)]
DIFFUSION = [kind for kind in TINY if hasattr(FAMILIES[kind].config, "unconditional")]
data = training.data


def test_every_family_is_tried_here():
    assert TINY.keys() == FAMILIES.keys()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(kind, settings, **more):
    """A tiny model; what begins at zero says something."""
    torch.manual_seed(0)
    family = FAMILIES[kind]
    size = {"sample_rate": RATE, "clip_length": 40}
    model = family.module(family.config(**size, **settings, **more)).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def make_told(kind, settings):
    return make(kind, settings, conditions=TOLD, condition_counts=COUNTS)


def output(model, n=2, **told):
    """What the network gives for fixed clips, (n, ...)."""
    t = torch.arange(50) ** 2
    if isinstance(model, Autoregressive):
        return model((t % 256).expand(n, -1), **told)
    return model((t / 9).sin().expand(n, -1), torch.full((n,), 3), **told)


# ---- autoregressive ones ----------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("kind", "settings"), STEPPED)
@torch.no_grad()
def test_recurrence_is_convolution(kind, settings, told):
    """From the first sample on: step by step, in parallel, and in parallel pieces of odd lengths,
    gone on from by steps."""
    model = make_told(kind, settings) if told else make(kind, settings)
    x = torch.randint(256, (3, 61), generator=seeded())
    given = model.told.rows(3, {"label": ["a", None, "c"]} if told else {})
    wanted = model(x, rows=given)
    model.setup_rnn()
    stepped, pieces = model.default_state(given), model.default_state(given)
    logits = []
    for t in range(61):
        y, stepped = model.step(x[:, t], stepped)
        logits.append(y)
    assert torch.allclose(torch.stack(logits, 1), wanted, atol=1e-5)
    first, position = [], 0
    for size in (1, 2, 19, 27):
        first.append(model.head(model.absorb(x[:, position : position + size], pieces)))
        position += size
        assert pieces.position == position
    rest = []
    for t in range(position, 61):
        y, pieces = model.step(x[:, t], pieces)
        rest.append(y[:, None])
    assert torch.allclose(torch.cat([*first, *rest], 1), wanted, atol=1e-5)
    assert stepped.position == pieces.position == 61
    for a, b in zip(stepped.tensors(), pieces.tensors(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("kind", "settings"), STEPPED)
@torch.no_grad()
def test_a_recorded_period_is_the_plain_loop(kind, settings):
    """From silence and from the state after a prefix, in chunks of any size, with guidance."""
    model = make_told(kind, settings)
    given = model.told.rows(2, {"label": ["a", "c"], "speaker": "y"})
    uniforms = torch.rand(37, 2, generator=seeded())
    before = model.told.rows(4, {"label": "b"})
    results = []
    for runner in (Plain(model, 2, given, 2.0), Graph(model, 2, given, 2.0)):
        q, parts = torch.full((2,), mulaw.SILENCE), []
        log_p = torch.zeros(2, dtype=torch.float64)
        logits = torch.zeros(2, 19, 256)
        for part in uniforms[:18].split([1, 12, 5]):
            parts.append(runner.run(q, part, 0.9, 50, 0.95, log_p))
            q = parts[-1][:, -1]
        state = model.default_state(before)
        model.absorb(torch.randint(256, (4, 7), generator=seeded()), state)
        runner.load_state(state)
        parts.append(runner.run(q, uniforms[18:], log_p=log_p, logits_out=logits))
        results.append((torch.cat(parts, 1), log_p, logits))
    (q, log_p, logits), (others, *their) = results
    assert torch.equal(q, others) and len(q.unique()) > 10
    assert torch.allclose(log_p, their[0]) and torch.allclose(logits, their[1], atol=1e-5)


@pytest.mark.parametrize(("kind", "settings"), STEPPED)
def test_clips_prefixes_streams_and_likelihoods_agree(kind, settings):
    model = make_told(kind, settings)
    prefix = model.quantizer.decode(torch.randint(256, (2, 9), generator=seeded()))
    how = {"prefix": prefix, "guidance": 1.5, "label": ["a", "c"], "speaker": "x"}
    wavs, log_p = model.generate(2, 33, generator=seeded(), return_log_likelihood=True, **how)
    chunks = list(model.stream(2, 24, 7, generator=seeded(), **how))
    assert torch.equal(torch.cat(chunks, 1), wavs[:, 9:]) and torch.equal(wavs[:, :9], prefix)
    told = {"label": ["a", "c"], "speaker": "x"}
    assert torch.allclose(log_p, -model.nll(wavs, **told), atol=1e-5)
    q = model.quantizer.encode(wavs)
    logits = model(shift(q), **told)
    each = logits.log_softmax(-1).gather(-1, q[..., None]).mean((1, 2))
    assert torch.allclose(log_p, each, atol=1e-5)
    shares = model.classify(wavs, by="label", speaker="x")
    assert shares.shape == (2, 3) and torch.allclose(shares.sum(1), torch.ones(2))


# ---- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "settings"), ROWS)
def test_a_generator_decides_the_clips(kind, settings):
    model = make(kind, settings)
    a, b, c = (model.unconditional_generate(3, generator=seeded(s)) for s in (1, 1, 2))
    assert a.shape == (3, 40) and a.abs().max() <= 1
    assert torch.equal(a, b) and not torch.equal(a, c)
    if kind in DIFFUSION:
        z = torch.randn(2, 40, generator=seeded())
        wav = model.generate_from_latent(z, steps=5)
        assert torch.equal(wav, model.generate_from_latent(z, steps=5)) and wav.std() > 0.01


@pytest.mark.parametrize(("kind", "settings"), ROWS)
@torch.no_grad()
def test_conditions_begin_as_nothing_and_end_as_something(kind, settings):
    """Weights of a model that cannot be told anything go on in one that can, and give what they
    gave; once the tables have moved, each clip of a batch hears what it is told."""
    plain, family = make(kind, settings), FAMILIES[kind]
    told = family.module(type(plain.config)(**vars(plain.config) | {
        "conditions": TOLD, "condition_counts": COUNTS})).eval()  # fmt: skip
    told.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(output(told, label=["b", "c"]), output(told))
    assert torch.allclose(output(told), output(plain), atol=1e-6)
    for table in told.told.tables:
        torch.nn.init.normal_(table.weight)
    alone = [output(told, 1, label=label) for label in ("b", "c")]
    together = output(told, label=["b", "c"])
    assert torch.allclose(torch.cat(alone), together, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "settings"), ROWS)
@torch.no_grad()
def test_saved_weights_are_the_model(kind, settings, tmp_path):
    model = make_told(kind, settings)
    save_checkpoint(tmp_path / "w.safetensors", model, data="tones")
    loaded = load_checkpoint(tmp_path / "w.safetensors")
    assert type(loaded) is type(model) and loaded.config == model.config
    assert read_metadata(tmp_path / "w.safetensors")["model"] == kind
    assert torch.equal(output(loaded, label="b"), output(model, label="b"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_has_its_settings_and_recipes(kind, capsys):
    """--help of each name lists the family's own settings; each recipe is one that can be run."""
    family, files = FAMILIES[kind], ["train_csv=x", "valid_csv=x", "checkpoint_path=x"]
    assert kind in family.models  # messages say model=KIND
    for name, settings in family.models.items():
        with pytest.raises(SystemExit) as ended:
            train.main([f"model={name}", "--help"])
        said = capsys.readouterr().out
        assert ended.value.code == 0
        assert all(f"model.{setting}" in said for setting in (*TINY[kind], *settings))
        model = train.parse([*files, f"model={name}"]).model
        assert MODELS[name] == (family, settings) and type(model) is family.config
        assert all(getattr(model, setting) == value for setting, value in settings.items())
    for name, settings in family.recipes.items():
        cfg = train.parse([*files, f"recipe={name}"])
        assert RECIPES[name][0] is family and type(cfg.model) is family.config
        model = family.models[settings.get("model", next(iter(family.models)))]
        wanted = settings | {f"model.{key}": value for key, value in model.items()}
        wanted.pop("model", None)
        for key, value in wanted.items():
            place = cfg.model if key.startswith("model.") else cfg
            stored = getattr(place, key.removeprefix("model."))
            assert stored in (value, [value]), key
        assert cfg.sample_len in (None, cfg.model.training_length)


# ---- training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told_data(data):
    """The folder of tones, with a label for each clip."""
    for name in ("train", "valid"):
        with open(data / f"{name}.csv") as file:
            paths = [row["path"] for row in csv.DictReader(file)]
        lines = [f"{path},{'ab'[int(path[0]) % 2]}\n" for path in paths]
        (data / f"told-{name}.csv").write_text("path,label\n" + "".join(lines))
    return data


def arguments(data, folder, kind, *more, **settings):
    model = TINY[kind] | {"sample_rate": RATE, "clip_length": 40} | settings
    return [
        f"train_csv={data / 'told-train.csv'}", f"valid_csv={data / 'told-valid.csv'}",
        f"checkpoint_path={folder}", f"model={next(iter(FAMILIES[kind].models))}", "device=cpu",
        "conditions=[label]", "batch_size=4", "accumulate=2", "max_steps=4", "seq_len=64",
        "warmup_steps=2", "start_lr=0.01", "ema=0.9", "grad_clip=1", "weight_decay=0.1",
        "checkpoint_interval=2", "validation_interval=2", "summary_interval=1", "n_listen=1",
        *(f"model.{key}={train.as_written(value)}" for key, value in model.items()), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", params=list(TINY))
def run(request, told_data, tmp_path_factory):
    """A family and the folder of a run of four steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    train.main(arguments(told_data, folder, request.param))
    return request.param, folder


def test_a_run_that_died_ends_as_if_nothing_had(run, told_data, tmp_path, monkeypatch):
    """It dies after step 3, which no file knows of; the same command ends with the same bits."""
    kind, whole = run
    argv, summarise = arguments(told_data, tmp_path / "died", kind), train.summarise

    def dies(run, *rest):
        summarise(run, *rest)
        if run.position.step == 3:
            raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "summarise", dies)
        train.main(argv)
    assert last_of(tmp_path / "died")["step"] == 2
    torch.manual_seed(99)  # nothing may hang on what else the process drew
    train.main(argv)
    assert_same(last_of(whole), last_of(tmp_path / "died"))
    curves = [[{**row, **dict.fromkeys(("lr", "grad_norm"))} for row in rows(folder)
               if "lr" in row] for folder in (whole, tmp_path / "died")]  # fmt: skip
    assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]] == [1, 2, 3, 4]


def test_every_weight_learns(run):
    """What is trained has moved; nothing that a network does not read is trained, which several
    processes would wait for."""
    kind, whole = run
    model, moments = FAMILIES[kind].module, last_of(whole)["optimizer"]["state"]
    config = load_checkpoint(whole / "best.safetensors").config
    learning = [p for p in model(config).parameters() if p.requires_grad]
    assert len(moments) == len(learning)
    assert all(state["exp_avg"].isfinite().all() for state in moments.values())


def test_the_commands_take_its_checkpoint(run, told_data, tmp_path, capsys):
    """generate: clips, table and page; likelihood: of autoregressive ones, with classification."""
    kind, whole = run
    checkpoint = f"checkpoint={whole / 'best.safetensors'}"
    argv = [checkpoint, f"out_dir={tmp_path / 'out'}", "label=[a,b]", "guidance=2", "device=cpu"]
    assert generate.main(argv) == 0
    clips = list(csv.DictReader(open(tmp_path / "out" / "samples.csv")))
    assert sorted(row["label"] for row in clips) == ["a", "b"]
    assert (tmp_path / "out" / "index.html").exists()
    assert all((tmp_path / "out" / row["file"]).stat().st_size == 44 + 80 for row in clips)
    argv = [checkpoint, f"csv={told_data / 'told-valid.csv'}", "classify=label", "device=cpu"]
    stepped = issubclass(FAMILIES[kind].module, Autoregressive)
    capsys.readouterr()
    assert likelihood.main(argv) == (0 if stepped else 2)
    said = capsys.readouterr()
    assert ("bits per sample" in said.out) if stepped else ("only autoregressive" in said.err)


@pytest.mark.parametrize("kind", DIFFUSION)
def test_it_can_be_a_vocoder(kind, told_data, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    train.main(arguments(told_data, folder, kind, "max_steps=1", unconditional=False))
    argv = [f"checkpoint={folder / 'best.safetensors'}", f"mel_from={told_data / '1.wav'}"]
    assert generate.main([*argv, f"out_dir={out}", "device=cpu"]) == 0
    samples = ClipDataset(told_data / "told-valid.csv", RATE, pcm=True).lengths[0]
    assert (out / "0000.wav").stat().st_size == 44 + 2 * samples


@pytest.mark.parametrize(("kind", "settings"), ROWS)
def test_golden_outputs_are_those_of_the_weights(kind, settings):
    """What the publisher records can be had again."""
    model = make(kind, settings, **({"diffusion_steps": 10} if kind in DIFFUSION else {}))
    golden = FAMILIES[kind].task.golden(model)
    assert golden == FAMILIES[kind].task.golden(model) and golden
