"""Every family of models can do what the others can, through the same commands."""

import math
from operator import attrgetter

import pytest
import torch
from models import (
    ADVERSARIAL,
    COUNTS,
    DIFFUSION,
    GUIDED,
    STEPPED,
    TINY,
    TOLD,
    audio,
    families,
    make,
    seeded,
)
from training import RATE, arguments, assert_same, last_of, rows

import train
from rawaudio import autoregressive, generate, likelihood, sampling
from rawaudio.adversarial import Adversarial
from rawaudio.autoregressive import Autoregressive
from rawaudio.checkpoint import load_checkpoint, save_checkpoint
from rawaudio.data import read_samples
from rawaudio.diffusion import Diffusion
from rawaudio.engine import Engine
from rawaudio.families import FAMILIES, MODELS, RECIPES
from rawaudio.files import read_metadata
from rawaudio.sampling import UNIFORM_BLOCK, Graph, Plain, sample, shift, start_state
from sashimi import mulaw

LABELS = ["a", None, "b", "c"] * 4


def test_every_family_is_tried_here():
    assert TINY.keys() == FAMILIES.keys()


def output(model, n=2, **told):
    """What the network gives for fixed clips, (n, ...)."""
    t = torch.arange(50) ** 2
    if isinstance(model, Autoregressive):
        return model((t % 256).expand(n, -1), **told)
    if isinstance(model, Adversarial):
        return model((t[:6] / 9).sin().expand(n, -1), **told)
    return model((t / 9).sin().expand(n, -1), torch.full((n,), 3), **told)


def log_probabilities(model, q, **told):
    """(n, T), of each class of q (n, T), by the definition: after those before it, the first one
    after class 128."""
    inputs = torch.cat([torch.full_like(q[:, :1], 128), q[:, :-1]], 1)
    with torch.no_grad():
        return model(inputs, **told).double().log_softmax(-1).gather(-1, q[..., None])[..., 0]


@pytest.mark.parametrize("told", [False, True])
@families(STEPPED)
@torch.no_grad()
def test_recurrence_is_convolution(tiny, told):
    """From the first sample on: step by step, and in parallel pieces of odd lengths that are gone
    on from by steps. The state holds the conditions, and ends the same."""
    model = make(tiny, told=told).double()
    x = torch.randint(256, (3, 61), generator=seeded())
    given = model.told.rows(3, {"label": LABELS[:3]} if told else {})
    wanted, ends = model(x, rows=given), []
    model.setup_rnn()
    for sizes in ([], [1, 2, 19, 27]):
        state, logits = model.default_state(given), []
        for part in x[:, : sum(sizes)].split(sizes, 1):
            logits.append(model.head(model.absorb(part, state)))
            assert state.position == sum(y.shape[1] for y in logits)
        for q in x[:, sum(sizes) :].unbind(1):
            y, state = model.step(q, state)
            logits.append(y[:, None])
        torch.testing.assert_close(torch.cat(logits, 1), wanted, rtol=0, atol=1e-9)
        assert state.position == 61
        ends.append(state.tensors())
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def engine(threads):
    """A runner with so many threads, made as `Plain` and `Graph` are."""
    return lambda model, n, *conditions: Engine(model, n, "float32", threads, *conditions)


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
COMPILED = pytest.mark.skipif(not Engine.available(make())[0], reason="no C++ compiler")
RUNNERS = [("Plain", Plain, 3, "cpu", []), ("Graph", Graph, 3, "cpu", []),
           ("Graph on a GPU", Graph, 3, "cuda", GPU), ("Engine, 1", engine(1), 1, "cpu", COMPILED),
           ("Engine, 2", engine(2), 3, "cpu", COMPILED),
           ("Engine, 16", engine(1), 16, "cpu", COMPILED)]  # fmt: skip
RUNS = [
    pytest.param(tiny, runner, n, device, marks=marks, id=f"{name} {tiny[0]} {len(tiny[1])}")
    for tiny in STEPPED
    for name, runner, n, device, marks in RUNNERS
]


@pytest.mark.parametrize(("tiny", "runner", "n", "device"), RUNS)
@pytest.mark.parametrize(
    ("guidance", "towards"), [(1.0, []), (0.0, []), (3.0, []), (3.0, ["label"])]
)
@torch.no_grad()
def test_every_runner_draws_from_the_guided_logits(tiny, runner, n, device, guidance, towards):
    """From those of the parallel form, untold + guidance (told - untold), in runs of any length,
    from silence and from the state after a prefix. Untold is what guidance pushes towards alone.
    The logits and likelihoods that come out are the told model's own."""
    how = (0.9, 60, 0.95)
    model = make(tiny, told=True, guided=towards).to(device)
    told = {"label": LABELS[:n], "speaker": "y"}
    given = model.told.rows(n, told)
    twins = model.told.rows(n, {k: v for k, v in told.items() if towards and k not in towards})
    uniforms = torch.rand(31, n, generator=seeded()).to(device)
    for length in (0, 7):
        x = torch.randint(256, (n, length + 1), generator=seeded()).to(device)
        walk, q, classes, logits = runner(model, n, given, guidance), x[:, -1], [], []
        log_p = torch.zeros(n, dtype=torch.float64, device=device)
        if length:
            state = start_state(model, n, given, guidance)
            model.absorb(x[:, :-1].repeat_interleave(1 if guidance == 1 else 2, 0), state)
            walk.load_state(state)
        for part in uniforms.split([1, 13, 17]):
            logits.append(torch.zeros(n, len(part), 256, device=device))
            classes.append(walk.run(q, part, *how, log_p, logits[-1]))
            q = classes[-1][:, -1]
        classes = torch.cat(classes, 1)
        inputs = torch.cat([x, classes[:, :-1]], 1)
        told, untold = (model(inputs, rows=r)[:, length:] for r in (given, twins))
        torch.testing.assert_close(torch.cat(logits, 1), told, rtol=1e-4, atol=1e-4)
        guided = untold + guidance * (told - untold)
        for t, uniform in enumerate(uniforms):
            assert torch.equal(classes[:, t], sample(guided[:, t], uniform, *how))
        own = told.log_softmax(-1).gather(-1, classes[..., None])[..., 0].sum(1)
        torch.testing.assert_close(log_p.float(), own, rtol=1e-4, atol=1e-4)


GIVEN = {"label": ["a", "b", "c"], "speaker": "x"}
DRAWN = [{}, {"temperature": 0.7, "nucleus_p": 0.9, "top_k": 40}, {"prefix": audio(3, 21)},
         {"prefix": audio(1, 29)[0], "temperature": 1.3, "guidance": 2.5}]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", DRAWN, ids=lambda how: "-".join(how))
@families(STEPPED)
def test_streams_and_likelihoods_are_those_of_the_clips(tiny, how, dtype, monkeypatch):
    """Clips begin with their prefix, one for all or one each; whatever the chunk, and across the
    blocks in which uniforms are drawn; with the engine, in float32, too. Likelihoods are those
    under the told model itself, however classes were chosen."""
    monkeypatch.setattr(sampling, "UNIFORM_BLOCK", 16)
    model, prefix = make(tiny, told=True).to(dtype), how.get("prefix", audio(3, 0))
    wavs, log_p = model.generate(3, generator=seeded(), return_log_likelihood=True, **how, **GIVEN)
    start = prefix.shape[-1]
    assert wavs.shape == (3, 40) and wavs.dtype == torch.float32 and log_p.shape == (3,)
    assert torch.equal(wavs[:, :start], mulaw.decode(mulaw.encode(prefix)).expand(3, -1))
    torch.testing.assert_close(log_p, -model.nll(wavs, **GIVEN).float(), rtol=0, atol=1e-5)
    assert (model.nll(wavs, **GIVEN) - model.nll(wavs)).abs().min() > 1e-4
    for chunk in (None, 7, 16, 33):
        chunks = list(model.stream(3, 40 - start, chunk, generator=seeded(), **how, **GIVEN))
        size = chunk or 20  # 20 ms at 1,000 Hz
        assert [c.shape[1] for c in chunks[:-1]] == [size] * (len(chunks) - 1)
        assert torch.equal(torch.cat(chunks, 1), wavs[:, start:])
    endless = model.stream(3, generator=seeded(), **how, **GIVEN)
    assert [next(endless).shape for _ in range(4)] == [(3, 20)] * 4


@families(STEPPED)
@torch.no_grad()
def test_classes_are_drawn_by_the_uniforms_of_the_generator(tiny):
    """From the logits after all before; where the prefix is the clip, nothing is left to draw."""
    model, prefix = make(tiny).double(), audio(2, 12)
    q = mulaw.encode(model.generate(2, 30, prefix, 0.9, 60, generator=seeded(9)))
    uniforms = torch.rand(UNIFORM_BLOCK, 2, generator=seeded(9))
    for t, logits in enumerate(model(shift(q))[:, 12:].unbind(1)):
        assert torch.equal(q[:, 12 + t], sample(logits, uniforms[t], temperature=0.9, top_k=60))
    assert torch.equal(mulaw.encode(model.generate(2, 12, prefix)), mulaw.encode(prefix))


@families(STEPPED)
def test_likelihood_is_that_of_every_class_after_those_before_it(tiny):
    """The first one after class 128; padding, with anything, does not count; and what can be said
    shares all probability."""
    model, wavs, lengths = make(tiny).double(), audio(3, 40), torch.tensor([40, 1, 23])
    log_p = log_probabilities(model, mulaw.encode(wavs))
    expected = torch.stack([-x[:n].mean() for x, n in zip(log_p, lengths, strict=True)])
    torch.testing.assert_close(model.nll(wavs, lengths), expected, rtol=0, atol=1e-9)
    assert model.nll(wavs[:0]).shape == (0,)
    pairs = mulaw.decode(torch.stack([torch.full((256,), 77), torch.arange(256)], 1))
    first = torch.exp(-model.nll(pairs[:1, :1]))[0]
    torch.testing.assert_close(torch.exp(-2 * model.nll(pairs)).sum(), first)


@families(STEPPED)
def test_long_clips_go_through_in_pieces(tiny, monkeypatch):
    """Nothing is as long as the clip, and no more logits than fit at once. Those of a prefix are
    made for its likelihood alone."""
    monkeypatch.setenv("SASHIMI_ENGINE", "off")
    model, wavs, lengths = make(tiny).double(), audio(3, 500), torch.tensor([500, 7, 411])
    expected, absorbed, logits, absorb = model.nll(wavs, lengths), [], [], model.absorb
    monkeypatch.setattr(
        model, "absorb", lambda x, state: absorbed.append(x.numel()) or absorb(x, state)
    )
    model.head.register_forward_hook(lambda _, __, y: logits.append(y.shape[:-1].numel()))
    for per_pass, per_head in [(409, 100), (90, 16)]:
        monkeypatch.setattr(autoregressive, "PER_PASS", per_pass)
        monkeypatch.setattr(autoregressive, "PER_HEAD", per_head)
        absorbed.clear(), logits.clear()
        torch.testing.assert_close(model.nll(wavs, lengths), expected, rtol=0, atol=1e-9)
        assert max(absorbed) <= per_pass and sum(absorbed) == sum(logits) == 1500
        assert max(logits) == per_head
    for wanted in (True, False):
        absorbed.clear(), logits.clear()
        model.generate(3, 501, wavs, return_log_likelihood=wanted, generator=seeded())
        # and three of the step, which may have weights of its own
        assert sum(logits) - 1500 * wanted in (0, 3) and max(logits, default=0) <= 16
        assert sum(absorbed) == 1500 and max(absorbed) <= 90


@families(STEPPED)
def test_classification_is_bayes_rule(tiny):
    """p(value) p(clip | value) over their sum, each likelihood by hand; other conditions known."""
    model, wavs, lengths = make(tiny, told=True), audio(3, 30), torch.tensor([30, 9, 22])
    q = mulaw.encode(wavs)
    for by, given in [("label", {}), ("label", {"speaker": "y"}), ("speaker", {"label": "b"})]:
        joint = torch.zeros(3, len(TOLD[by]), dtype=torch.float64)
        for i, (value, count) in enumerate(zip(TOLD[by], COUNTS[by], strict=True)):
            each = log_probabilities(model, q, **given, **{by: value})
            each = [log_p[:n].sum().exp() for log_p, n in zip(each, lengths, strict=True)]
            joint[:, i] = count * torch.stack(each)
        expected = joint / joint.sum(1, keepdim=True)
        classified = model.classify(wavs, lengths, by, **given)
        torch.testing.assert_close(classified.double(), expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(model.classify(wavs), model.classify(wavs.numpy(), by="label"))
    assert model.classify(wavs[:0]).shape == (0, 3)
    cases = [(model, "room", {}), (model, "label", {"label": "b"}), (make(tiny), None, {})]
    for asked, by, given in cases:
        with pytest.raises(ValueError, match="expected a condition that is not told"):
            asked.classify(wavs, by=by, **given)


def brief(model):
    """Settings that make generation quick."""
    return {"steps": 3} if isinstance(model, Diffusion) else {}


@families()
def test_a_generator_decides_the_clips(tiny):
    """With conditions drawn by their shares; what was drawn, or a part of it, given by name, makes
    the same clips."""
    model = make(tiny, told=True)
    quick, before = brief(model), torch.get_rng_state()
    a, b, c = (model.unconditional_generate(3, generator=seeded(s), **quick) for s in (1, 1, 2))
    assert a.shape == (3, 40) and a.abs().max() <= 1 and not a.requires_grad
    assert torch.equal(a, b) and not torch.equal(a, c)
    drawn = model.draw_conditions(3, seeded(1))
    for given in (drawn, {"label": drawn["label"]}, {"speaker": drawn["speaker"]}):
        assert torch.equal(model.generate(3, generator=seeded(1), **quick, **given), a)
    other = ["b" if label != "b" else "c" for label in drawn["label"]]
    assert not torch.equal(model.generate(3, generator=seeded(1), **quick, label=other), a)
    assert torch.equal(before, torch.get_rng_state())  # torch's own is left alone, and serves
    torch.manual_seed(7)  # where none is given
    first = model.generate(1, **quick)
    assert not torch.equal(first, model.generate(1, **quick))
    torch.manual_seed(7)
    assert torch.equal(first, model.generate(1, **quick))
    many = model.draw_conditions(8000, seeded())
    for name, counts in COUNTS.items():
        shares = [many[name].count(value) / 8000 for value in TOLD[name]]
        assert shares == pytest.approx([count / sum(counts) for count in counts], abs=0.022)
    assert set(model.draw_conditions(50, seeded(), speaker="x")["speaker"]) == {"x"}
    assert model.conditions == TOLD


@families(GUIDED)
def test_guidance_1_is_none_and_0_is_untold(tiny):
    """To the bit; where none is given it is the model's own."""
    model = make(tiny, told=True)

    def clips(**more):
        return model.generate(3, generator=seeded(1), **brief(model), **given | more)

    given = model.draw_conditions(3, seeded())
    plain, pushed, untold = clips(), clips(guidance=4), clips(guidance=0)
    assert torch.equal(clips(guidance=1.0), plain) and not torch.equal(pushed, plain)
    model.config.guidance = 4.0
    assert torch.equal(clips(), pushed)
    with torch.no_grad():  # whatever it is told, it hears nothing
        for table in model.told.tables:
            table.weight[1:] = table.weight[0]
    torch.testing.assert_close(clips(guidance=1.0), untold, rtol=0, atol=1e-5)
    assert not torch.equal(untold, plain)


@families()
@torch.no_grad()
def test_conditions_begin_as_nothing_and_end_as_something(tiny):
    """Weights of a model that cannot be told anything go on in one that can, and give what they
    gave; once the tables have moved, each clip of a batch hears what it is told."""
    plain, family = make(tiny), FAMILIES[tiny[0]]
    told = family.module(
        type(plain.config)(**vars(plain.config) | {"conditions": TOLD, "condition_counts": COUNTS})
    ).eval()
    told.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(output(told, label=["b", "c"]), output(told))
    torch.testing.assert_close(output(told), output(plain), rtol=1e-5, atol=1e-5)
    for table in told.told.tables:
        torch.nn.init.normal_(table.weight)
    alone = [output(told, 1, label=label) for label in ("b", None, "c")]
    together = output(told, 3, label=["b", None, "c"])
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(told, 1), together[1:2], rtol=1e-4, atol=1e-4)
    assert (together[[0, 0, 1]] - together[[1, 2, 2]]).flatten(1).abs().amax(1).min() > 1e-3
    state = seeded()  # nothing is drawn where there is nothing
    assert plain.conditions == plain.draw_conditions(3, state) == {}
    assert torch.equal(torch.rand(2, generator=state), torch.rand(2, generator=seeded()))
    assert not any("told" in name for name in plain.state_dict())


BAD = {
    r"lable=b: .* did you mean label": {"lable": "b"},
    r"label=cc: .* did you mean c": {"label": ["b", "cc"]},
    r"label=\[b\]: 1 values for 2 clips": {"label": ["b"]},
    r"label=3: not a value": {"label": 3},
    r"guidance=-0.5": {"guidance": -0.5},
    r"guidance=inf": {"guidance": math.inf},
    r"guidance=nan": {"guidance": math.nan},
}
JUDGES = {"nll": audio(1, 20), "invert": audio(1, 20), "generate_from_latent": torch.zeros(1, 6)}
NONE = {
    r"label=b: .* one trained with conditions=\[label\] can": {"label": "b"},
    r"guidance=2.0: this model cannot be told anything": {"guidance": 2.0},
}


@pytest.mark.parametrize("told", [True, False])
@families()
def test_what_cannot_be_told_is_named(tiny, told):
    """In one line; a model without conditions says which kind can be told something."""
    model = make(tiny, told=told)
    for words, given in (BAD if told else NONE).items():
        if tiny[0] in ADVERSARIAL and "guidance" in given:
            words = "no condition has that name|cannot be told anything"
        with pytest.raises(ValueError, match=words) as raised:
            model.generate(2, **given)
        assert "\n" not in str(raised.value)
    judge, given = next(
        (getattr(model, name), given) for name, given in JUDGES.items() if hasattr(model, name)
    )
    with pytest.raises(ValueError, match="did you mean" if told else "cannot be told anything"):
        judge(given, room="one")


@pytest.mark.parametrize("training_mode", [True, False])
@families()
def test_generating_leaves_the_model_as_it_was(tiny, training_mode, monkeypatch):
    """Also where it fails, and while a bar is shown: the mode is eval inside and as before after
    it; parameters and gradients are untouched."""
    model = make(tiny, **({"dropout": 0.5} if "d_state" in tiny[1] else {}))
    quick = brief(model)
    output(model.train(training_mode)).sum().backward()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    a, b = (model.generate(1, generator=seeded(), progress=p, **quick) for p in (False, True))
    assert torch.equal(a, b)  # no dropout
    if isinstance(model, Autoregressive):
        stream = model.stream(1, chunk=5, generator=seeded())
        assert torch.equal(next(stream), a[:, :5])
        stream.close()
    inner = next(name for name in ("step", "denoise", "make_features") if hasattr(model, name))
    monkeypatch.setattr(model, inner, None)
    monkeypatch.setenv("SASHIMI_ENGINE", "off")
    with pytest.raises(TypeError):
        model.generate(1, **quick)
    assert all(m.training == training_mode for m in model.modules())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is None if gradient is None else torch.equal(p.grad, gradient)


@families()
@torch.no_grad()
def test_saved_weights_are_the_model(tiny, tmp_path):
    model = make(tiny, told=True)
    save_checkpoint(tmp_path / "w.safetensors", model, data="tones")
    loaded = load_checkpoint(tmp_path / "w.safetensors")
    assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
    assert read_metadata(tmp_path / "w.safetensors")["model"] == tiny[0]
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
        help_text = capsys.readouterr().out
        assert ended.value.code == 0
        assert all(f"model.{setting}" in help_text for setting in (*TINY[kind], *settings))
        model = train.parse([*files, f"model={name}"]).model
        assert MODELS[name] == (family, settings) and type(model) is family.config
        assert all(getattr(model, setting) == value for setting, value in settings.items())
    for name, settings in family.recipes.items():
        cfg = train.parse([*files, f"recipe={name}"])
        assert RECIPES[name][0] is family and type(cfg.model) is family.config
        model = family.models[settings.get("model", next(iter(family.models)))]
        for key, value in (settings | {f"model.{k}": v for k, v in model.items()}).items():
            assert key == "model" or attrgetter(key)(cfg) in (value, [value]), key
        assert cfg.sample_len in (None, cfg.model.training_length)


def told_run(data, folder, kind, *more, **settings):
    """Four steps of a model that is told labels."""
    few = [f"model={next(iter(FAMILIES[kind].models))}", "conditions=[label]", "batch_size=4",
           "accumulate=2", "max_steps=4", "seq_len=64", "warmup_steps=2", "ema=0.9", "grad_clip=1",
           "weight_decay=0.1", "checkpoint_interval=2", "validation_interval=2"]  # fmt: skip
    sizes = TINY[kind] | {"sample_rate": RATE, "clip_length": 40} | settings
    sizes = [f"model.{key}={train.as_written(value)}" for key, value in sizes.items()]
    return arguments(data, folder, *few, *more, model=sizes)


@pytest.fixture(scope="module", params=list(TINY))
def run(request, data, tmp_path_factory):
    """A family and the folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    train.main(told_run(data, folder, request.param))
    return request.param, folder


def test_a_run_that_died_ends_as_if_nothing_had(run, data, tmp_path, monkeypatch):
    """It dies after step 3, which no file knows of; the same command ends with the same bits."""
    kind, whole = run
    argv, summarise = told_run(data, tmp_path / "died", kind), train.summarise

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
    for folder in (whole, tmp_path / "died"):
        assert [row["step"] for row in rows(folder) if "lr" in row] == [1, 2, 3, 4]
    # every weight has learned; none that a network does not read, for which processes would wait
    moments = last_of(whole)["optimizer"]["state"]
    family, config = FAMILIES[kind], load_checkpoint(whole / "best.safetensors").config
    networks = family.task(config, 64).networks(family.module(config)).values()
    learning = [p for network in networks for p in network.parameters() if p.requires_grad]
    assert len(moments) == len(learning)
    assert all(state["exp_avg"].isfinite().all() for state in moments.values())


def test_the_commands_take_its_checkpoint(run, data, tmp_path, capsys):
    """generate: clips, table and page; likelihood: of autoregressive ones, with classification."""
    kind, whole = run
    checkpoint, out = f"checkpoint={whole / 'best.safetensors'}", tmp_path / "out"
    guidance = [] if kind in ADVERSARIAL else ["guidance=2"]
    argv = [checkpoint, "label=[one,two]", "device=cpu", *guidance]
    assert generate.main([*argv, f"out_dir={out}"]) == 0
    clips = read_samples(out).values()
    assert sorted(row["label"] for row in clips) == ["one", "two"]
    assert all((out / row["file"]).stat().st_size == 44 + 80 for row in clips)
    assert (out / "index.html").exists()
    argv = [checkpoint, f"csv={data / 'valid.csv'}", "classify=label", "device=cpu"]
    stepped = issubclass(FAMILIES[kind].module, Autoregressive)
    capsys.readouterr()
    assert likelihood.main(argv) == (0 if stepped else 2)
    said = capsys.readouterr()
    assert "bits per sample" in said.out if stepped else "only autoregressive" in said.err


@pytest.mark.parametrize("kind", DIFFUSION)
def test_it_can_be_a_vocoder(kind, data, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    train.main(told_run(data, run, kind, "max_steps=1", unconditional=False))
    argv = [f"checkpoint={run / 'best.safetensors'}", f"mel_from={data / '1.wav'}"]
    assert generate.main([*argv, f"out_dir={out}", "device=cpu"]) == 0
    assert (out / "0000.wav").stat().st_size == (data / "1.wav").stat().st_size


@pytest.mark.parametrize("kind", TINY)
def test_golden_outputs_are_those_of_the_weights(kind):
    """What the publisher records can be had again."""
    model = make(kind, **({"diffusion_steps": 10} if kind in DIFFUSION else {}))
    if isinstance(model, Autoregressive):
        with torch.no_grad():  # far from uniform, most seeds come too close to an edge
            getattr(model.head, "weight_g", model.head.weight).div_(5)
    golden = FAMILIES[kind].task.golden(model)
    assert golden == FAMILIES[kind].task.golden(model) and golden
