"""Conditions: what a model is told changes what it makes, the same way in each of its forms."""

import csv
import itertools
import json
import math

import pytest
import torch

from rawaudio import audio, generate, likelihood, seeds
from rawaudio.autoregressive import shift
from rawaudio.checkpoint import save_checkpoint
from rawaudio.conditions import Conditions, guided, in_pairs, withhold
from rawaudio.samplers import level_at
from rawaudio.sampling import Graph, Plain, sample
from sashimi import mulaw, realtime
from sashimi.autoregressive import AutoregressiveConfig, SashimiAR
from sashimi.diffwave import DiffusionConfig, SashimiDiffWave
from sashimi.realtime import Engine

VALUES = {"label": ["zero", "one", "two"], "speaker": ["ann", "bob"]}
COUNTS = {"label": [1, 2, 5], "speaker": [3, 1]}
KINDS = [
    {},
    {"unet": True, "n_layers": [1, 2, 3]},
    {"pool": [], "ff": 0},
    {"tied": False, "d_model": 20},
]
LABELS = list(itertools.islice(itertools.cycle(["one", None, "two", "zero"]), 16))
compiled = pytest.mark.skipif(realtime._library()[0] is None, reason="no C++ compiler")


def engine(threads):
    """A runner with so many threads, made as `Plain` and `Graph` are."""

    def make(model, n, *conditions):
        return Engine(model, n, "float32", threads, *conditions)

    return pytest.param(make, marks=compiled, id=f"Engine, {threads}")


RUNNERS = [Plain, Graph, engine(1), engine(2)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(model):
    """The model with tables of conditions that say something: they begin at zero."""
    with torch.no_grad():
        for table in model.told.tables:
            torch.nn.init.normal_(table.weight)
    return model.eval()


def make(values=VALUES, seed=0, **kwargs):
    """A tiny autoregressive model, float32, whose distributions are far from uniform."""
    torch.manual_seed(seed)
    settings = dict(d_model=8, n_layers=1, pool=[2, 3], d_state=8, l_max=48, clip_length=40,
                    sample_rate=1000, d_condition=5)  # fmt: skip
    counts = {name: COUNTS[name] for name in values}
    config = AutoregressiveConfig(**settings | kwargs, conditions=values, condition_counts=counts)
    model = moved(SashimiAR(config))
    with torch.no_grad():
        model.head.weight *= 5
    return model


def diffusion(values=VALUES, **kwargs):
    torch.manual_seed(0)
    settings = dict(d_model=4, n_layers=1, pool=[2, 2], d_state=4, l_max=64, clip_length=40)
    counts = {name: COUNTS[name] for name in values}
    config = DiffusionConfig(**settings | kwargs, conditions=values, condition_counts=counts)
    model = moved(SashimiDiffWave(config))
    torch.nn.init.normal_(model.output[2].weight, std=0.3)
    return model


def noise_clips(n, length, seed=0):
    return (torch.rand(n, length, generator=seeded(seed)) - 0.5) * 1.4


# ---- one function -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_convolution_is_recurrence_with_conditions(kind):
    """forward(x, label=...) == step from the default state that holds the label, clip by clip."""
    model, q = make(**kind), mulaw.encode(noise_clips(4, 61))
    rows = model.told.rows(4, {"label": LABELS[:4], "speaker": "bob"})
    model.backbone.setup_rnn()
    with torch.no_grad():
        parallel, state = model(q, label=LABELS[:4], speaker="bob"), model.default_state(rows)
        for t in range(61):
            logits, state = model.step(q[:, t], state)
            torch.testing.assert_close(logits, parallel[:, t], rtol=1e-5, atol=1e-5)
        untold = model(q)
    told = [label is not None for label in LABELS[:4]]
    assert ((parallel - untold).abs().amax((1, 2)) > 0.01).all()  # all are told the speaker
    assert (model(q, label=LABELS[:4]) - untold).abs().amax((1, 2)).gt(0.01).tolist() == told


def test_the_state_holds_the_conditions():
    """Pieces after the first are told nothing more: the logits are those of the whole."""
    model, q = make(unet=True), mulaw.encode(noise_clips(2, 50))
    state = model.default_state(model.told.rows(2, {"label": ["one", None]}))
    with torch.no_grad():
        whole = model(q, label=["one", None])
        pieces = [model.head(model.absorb(part, state)) for part in q.split([17, 33], 1)]
        pieces = torch.cat(pieces, 1)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("n", [1, 3, 16])
@pytest.mark.parametrize("guidance", [1.0, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_every_runner_draws_from_the_guided_logits_of_two_walks(runner, n, guidance, kind):
    """untold + guidance (told - untold) of two walks side by side, one told and one not, gives the
    classes; the logits and likelihoods that come out are the told model's own."""
    model, how = make(**kind), (0.9, 60, 0.95)
    rows, uniforms = (
        model.told.rows(n, {"label": LABELS[:n]}),
        torch.rand(31, n, generator=seeded()),
    )
    q, log_p = torch.full((n,), 128), torch.zeros(n, dtype=torch.float64)
    logits = torch.empty(n, 31, 256)
    got = runner(model, n, rows, guidance).run(q, uniforms, *how, log_p, logits)

    model.backbone.setup_rnn()
    told, untold = model.default_state(rows), model.default_state(torch.zeros_like(rows))
    expected_log_p = torch.zeros(n)
    with torch.no_grad():
        for t in range(31):
            (a, told), (b, untold) = model.step(q, told), model.step(q, untold)
            torch.testing.assert_close(logits[:, t], a, rtol=1e-4, atol=1e-4)
            q = sample(b + guidance * (a - b), uniforms[t], *how)
            expected_log_p += a.log_softmax(1).gather(1, q[:, None])[:, 0]
            assert torch.equal(got[:, t], q)
    torch.testing.assert_close(log_p.float(), expected_log_p, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("length", [1, 6, 13])
def test_a_prefix_with_conditions_is_gone_on_from(runner, guidance, length):
    """The state of a parallel pass over a prefix == that of the run that made it."""
    model, n = make(unet=True), 3
    rows, uniforms = (
        model.told.rows(n, {"label": LABELS[:n]}),
        torch.rand(40, n, generator=seeded()),
    )
    silence = torch.full((n,), 128)
    whole = runner(model, n, rows, guidance).run(silence, uniforms)
    per = 1 if guidance == 1 else 2
    state = model.default_state(rows if per == 1 else in_pairs(rows))
    with torch.no_grad():
        inputs = torch.cat([silence[:, None], whole[:, : length - 1]], 1)
        inputs = inputs.repeat_interleave(per, 0)
        model.absorb(inputs, state)
    goes_on = runner(model, n, None, guidance)
    goes_on.load_state(state)
    assert torch.equal(goes_on.run(whole[:, length - 1], uniforms[length:]), whole[:, length:])


@pytest.mark.parametrize("engine", ["", "off"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("prefix", [None, noise_clips(3, 14)])
def test_log_likelihood_is_minus_the_nll_of_what_was_told(engine, guidance, prefix, monkeypatch):
    """Under the told model itself, whatever guidance chose; and a stream makes the same audio."""
    monkeypatch.setenv("SASHIMI_ENGINE", engine)
    model = make()
    given = {"label": ["one", "two", "zero"], "speaker": ["ann", "bob", "bob"]}
    how = dict(prefix=prefix, guidance=guidance, **given)
    wavs, log_p = model.generate(3, generator=seeded(), return_log_likelihood=True, **how)
    torch.testing.assert_close(log_p, -model.nll(wavs, **given), rtol=0, atol=1e-5)
    assert (model.nll(wavs, **given) - model.nll(wavs)).abs().min() > 1e-4
    start = 0 if prefix is None else 14
    chunks = model.stream(3, 40 - start, 9, generator=seeded(), **how)
    assert torch.equal(torch.cat(list(chunks), 1), wavs[:, start:])


def test_guidance_1_is_no_guidance_to_the_bit(monkeypatch):
    """And 0 draws from the model that was told nothing, with the uniforms of the same generator."""
    for engine in ("", "off"):
        monkeypatch.setenv("SASHIMI_ENGINE", engine)
        model = make()
        given = model.draw_conditions(3, seeded())
        plain = model.generate(3, generator=seeded(1), **given)
        assert torch.equal(model.generate(3, generator=seeded(1), guidance=1.0, **given), plain)
        assert not torch.equal(model.generate(3, generator=seeded(1), guidance=4, **given), plain)
        model.config.guidance = 4.0  # the model's own, where none is given
        pushed = model.generate(3, generator=seeded(1), **given)
        assert torch.equal(pushed, model.generate(3, generator=seeded(1), guidance=4, **given))
        untold = model.generate(3, generator=seeded(1), guidance=0, **given)
        g, rows = seeded(1), torch.zeros(3, 2, dtype=torch.int64)
        torch.rand(3, 2, generator=g)  # as `draw` takes for conditions
        uniforms = torch.rand(1024, 3, generator=g)[:40]
        expected = Plain(model, 3, rows).run(torch.full((3,), 128), uniforms)
        assert torch.equal(mulaw.encode(untold), expected)
    assert torch.equal(guided(torch.ones(3), torch.zeros(3), 2.5), torch.full((3,), 2.5))


# ---- models that are told nothing ---------------------------------------------------------------


def test_told_nothing_a_fresh_model_is_one_without_conditions():
    """The tables and what they feed begin at zero: the logits are those of the same weights."""
    plain, told = make({}), make()
    with torch.no_grad():
        for table in told.told.tables:
            table.weight.zero_()
    told.load_state_dict(plain.state_dict(), strict=False)
    q = mulaw.encode(noise_clips(2, 30))
    with torch.no_grad():
        for given in ({}, {"label": "one"}, {"label": ["two", None], "speaker": "bob"}):
            torch.testing.assert_close(told(q, **given), plain(q), rtol=0, atol=1e-6)
    assert plain.conditions == {} and not any("told" in name for name in plain.state_dict())
    assert plain.draw_conditions(3) == {}
    state = seeded()
    plain.told.draw(3, {}, state)
    assert torch.equal(torch.rand(2, generator=state), torch.rand(2, generator=seeded()))


@pytest.mark.parametrize("model", [make({}), diffusion({})], ids=["autoregressive", "diffusion"])
def test_a_model_without_conditions_cannot_be_told_anything(model):
    """The error says what kind of model can; guidance is refused as well."""
    for words, given in {
        r"label=one: this model cannot be told anything; one trained with conditions=\[label\] can":
            {"label": "one"},
        "guidance=2.0: this model cannot be told anything": {"guidance": 2.0},
        "guidance=-1": {"guidance": -1},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model.generate(1, **given)
    wav = noise_clips(1, 20)
    judge = model.nll if isinstance(model, SashimiAR) else model.invert
    with pytest.raises(ValueError, match="cannot be told anything"):
        judge(wav, label="one")


# ---- asking and drawing -------------------------------------------------------------------------


@pytest.mark.parametrize("model", [make(), diffusion()], ids=["autoregressive", "diffusion"])
def test_what_is_not_given_is_drawn_as_generate_draws_it(model):
    """By its shares; the words that were drawn, given by name, make the same clips; and so does a
    part of them, the rest being drawn again."""
    steps = {} if isinstance(model, SashimiAR) else {"steps": 3}
    drawn = model.draw_conditions(4, seeded(5))
    clips = model.generate(4, generator=seeded(5), **steps)
    assert set(drawn) == set(VALUES) and all(len(x) == 4 for x in drawn.values())
    for given in (drawn, {"label": drawn["label"]}, {"speaker": drawn["speaker"]}):
        assert torch.equal(model.generate(4, generator=seeded(5), **steps, **given), clips)
        assert torch.equal(
            model.unconditional_generate(4, generator=seeded(5), **steps, **given), clips
        )
    other = ["one" if label != "one" else "two" for label in drawn["label"]]
    assert not torch.equal(model.generate(4, generator=seeded(5), **steps, label=other), clips)
    assert model.conditions == VALUES

    many = model.draw_conditions(8000, seeded())
    for name, counts in COUNTS.items():
        for value, count in zip(VALUES[name], counts, strict=True):
            share = count / sum(counts)
            sigma = math.sqrt(share * (1 - share) / 8000)
            assert abs(many[name].count(value) / 8000 - share) < 4 * sigma
    assert set(model.draw_conditions(50, seeded(), speaker="ann")["speaker"]) == {"ann"}


def test_rows_and_words_are_inverses():
    told = make().told
    rows = told.rows(4, {"label": LABELS[:4], "speaker": "ann"})
    assert rows.tolist() == [[2, 1], [0, 1], [3, 1], [1, 1]]
    assert told.words(rows) == {"label": LABELS[:4], "speaker": ["ann"] * 4}
    assert told.rows(2, {"label": None}).tolist() == [[0, 0]] * 2
    assert in_pairs(rows)[::2].equal(rows) and not in_pairs(rows)[1::2].any()


@pytest.mark.parametrize(
    ("given", "words"),
    [({"lable": "one"}, "lable=one: .* did you mean label"),
     ({"label": "tow"}, "label=tow: .* did you mean two"),
     ({"label": ["one", "zeroo"]}, r"label=zeroo: .* did you mean zero"),
     ({"label": ["one"]}, r"label=\[one\]: 1 values for 2 clips"),
     ({"speaker": ["ann"] * 3}, "3 values for 2 clips"),
     ({"label": 3}, "label=3: not a value"),
     ({"guidance": -0.5}, "guidance=-0.5"), ({"guidance": math.inf}, "guidance=inf"),
     ({"guidance": math.nan}, "guidance=nan")],
)  # fmt: skip
@pytest.mark.parametrize("model", [make(), diffusion()], ids=["autoregressive", "diffusion"])
def test_wrong_names_values_and_numbers_of_them_are_named(model, given, words):
    with pytest.raises(ValueError, match=words) as raised:
        model.generate(2, **given)
    assert "\n" not in str(raised.value)


def test_withheld_rows_are_each_and_all_at_once():
    """A share of every condition, and of whole clips beside; a part of a batch loses the same."""
    rows = torch.ones(20000, 2, dtype=torch.int64)
    left = withhold(rows, 0.1, seeded(), (0, 20000))
    for kept, expected in [(left[:, 0], 0.81), (left[:, 1], 0.81), (left.amax(1), 0.891)]:
        assert kept.double().mean() == pytest.approx(expected, abs=0.01)
    parts = [withhold(rows[i : i + 5000], 0.1, seeded(), (i, 20000)) for i in range(0, 20000, 5000)]
    assert torch.equal(torch.cat(parts), left) and rows.all()


def test_tables_are_taken_over_value_by_value():
    """A model that knows more words starts from one that knows fewer, in another order."""
    old = make().told
    new = Conditions({"label": ["two", "three", "zero"], "room": ["x"]},
                     {"label": [1, 1, 1], "room": [1]}, 5)  # fmt: skip
    new.start_from(old)
    theirs, ours = old.tables[0].weight, new.tables[0].weight
    assert torch.equal(ours, theirs[[0, 3, 0, 1]]) and not new.tables[1].weight.any()


# ---- classification -----------------------------------------------------------------------------


def test_classification_is_bayes_rule():
    """p(value) p(clip | value) over their sum, each likelihood by hand; other conditions known."""
    model, wavs, lengths = make(), noise_clips(3, 30), torch.tensor([30, 9, 22])
    q = mulaw.encode(wavs)
    for by, given in [("label", {}), ("label", {"speaker": "bob"}), ("speaker", {"label": "two"})]:
        joint = torch.zeros(3, len(VALUES[by]), dtype=torch.float64)
        with torch.no_grad():
            for i, value in enumerate(VALUES[by]):
                log_p = model(shift(q), **given, **{by: value}).double().log_softmax(-1)
                log_p = log_p.gather(2, q[..., None])[..., 0]
                share = COUNTS[by][i] / sum(COUNTS[by])
                for clip, length in enumerate(lengths):
                    joint[clip, i] = share * log_p[clip, :length].sum().exp()
        expected = joint / joint.sum(1, keepdim=True)
        got = model.classify(wavs, lengths, by, **given)
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(model.classify(wavs), model.classify(wavs.numpy(), by="label"))
    assert model.classify(wavs[:0]).shape == (0, 3)
    for model, by, given in [(make(), "room", {}), (make(), "label", {"label": "one"}),
                             (make({}), None, {})]:  # fmt: skip
        with pytest.raises(ValueError, match="expected a condition that is not told"):
            model.classify(wavs, by=by, **given)


def test_a_model_that_hears_its_label_classifies_its_own_clips():
    """The label that clips were generated with is the likeliest of all, nearly always."""
    model = make({"label": VALUES["label"]})
    with torch.no_grad():
        model.told.tables[0].weight *= 4
    labels = VALUES["label"] * 5
    p = model.classify(model.generate(15, 200, label=labels, generator=seeded()))
    right = [VALUES["label"].index(label) for label in labels]
    assert (p.argmax(1) == torch.tensor(right)).float().mean() > 0.9


# ---- diffusion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"bidirectional": False}, {"data_std": 0.2}], ids=str)
def test_told_noise_differs_clip_by_clip(kind):
    """A clip that is told nothing has the noise of a model that was not asked."""
    model, x = diffusion(**kind), torch.randn(3, 40, generator=seeded())
    t = torch.tensor([5.0, 90.5, 199.0])
    with torch.no_grad():
        told, untold = model(x, t, label=["one", None, "two"]), model(x, t)
        alone = model(x[:1], t[:1], label="one")
    torch.testing.assert_close(told[:1], alone, rtol=0, atol=1e-5)
    differs = (told - untold).abs().amax(1) > 1e-4
    assert differs.tolist() == [True, False, True]


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_guided_noise_is_that_of_two_passes(guidance):
    """untold + guidance (told - untold), one DDIM step by hand from a latent."""
    model, z = diffusion(), torch.randn(2, 40, generator=seeded())
    a = float(level_at(model.alpha_bar, 199.0))
    with torch.no_grad():
        t = torch.full((2,), 199.0)
        told, untold = model(z, t, label=["one", "two"]), model(z, t)
        noise = untold + guidance * (told - untold)
        expected = ((z - math.sqrt(1 - a) * noise) / math.sqrt(a)).clamp(-1, 1)
    got = model.generate_from_latent(z, 1, guidance=guidance, label=["one", "two"])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (got.abs() < 1).any()  # clamping has left something to compare


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_inversion_closes_the_loop_with_the_same_conditions(guidance):
    """invert, then generate_from_latent: the clip comes back; with other conditions it does not."""
    model = diffusion()
    wav = 0.5 * torch.sin(torch.arange(40) / 3).expand(2, -1)
    given = dict(label=["one", "two"], speaker="bob", guidance=guidance)
    z = model.invert(wav, 20, iterations=8, **given)
    back = model.generate_from_latent(z, 20, **given)
    other = model.generate_from_latent(z, 20, **given | {"label": ["two", "zero"]})
    assert (back - wav).abs().max() < 1e-3 < 1e-2 < (other - wav).abs().max()
    untold = model.generate_from_latent(z, 20)  # nothing is drawn where nothing is given
    assert torch.equal(untold, model.generate_from_latent(z, 20, label=None, speaker=None))


def test_vocoders_are_told_things_too():
    model = diffusion(unconditional=False, n_mels=5, hop=6, n_fft=12)
    mel = model.log_mel(noise_clips(2, 36))
    wavs = [model.vocode(mel, generator=seeded(), label=x) for x in (None, "one", ["one", None])]
    assert torch.equal(wavs[2][0], wavs[1][0]) and torch.equal(wavs[2][1], wavs[0][1])
    assert not torch.equal(wavs[0][0], wavs[1][0])


# ---- the commands -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, make())
    return path


def status_of(given):
    """The exit status of generate: some settings are refused before a model is loaded."""
    try:
        return generate.main(given)
    except SystemExit as stop:
        return stop.code


def rows_of(folder):
    with (folder / "samples.csv").open(newline="") as file:
        return {row["clip"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("kind", [make, diffusion])
def test_clips_are_told_by_name_listed_and_shown(kind, tmp_path):
    """One clip for each value of a list, what is not given drawn; audio as `model.generate`'s."""
    model, path, out = kind(), tmp_path / "model.safetensors", tmp_path / "out"
    save_checkpoint(path, model)
    given = [f"checkpoint={path}", "label=[one,two,zero]", f"out_dir={out}", "device=cpu"]
    assert generate.main([*given, "guidance=2", "seed=3"]) == 0
    rows = rows_of(out)
    assert [rows[str(i)]["label"] for i in range(3)] == ["one", "two", "zero"]
    expected = model.generate(
        3, generator=seeds.seeded(3, 0), guidance=2.0, label=["one", "two", "zero"]
    )
    told = model.draw_conditions(3, seeds.seeded(3, 0), label=["one", "two", "zero"])
    for i, wav in enumerate(expected):
        assert rows[str(i)]["speaker"] == told["speaker"][i]
        got, _ = audio.read(out / rows[str(i)]["file"])
        torch.testing.assert_close(got, wav, atol=1 / 2**15, rtol=0)
    page = (out / "index.html").read_text()
    assert f"two · {told['speaker'][1]}" in page and "guidance 2" in page
    settings = json.loads((out / ".generate" / "settings.json").read_text())
    assert settings["guidance"] == 2 and settings["told"] == {"label": ["one", "two", "zero"]}


def test_lists_are_cut_into_batches(saved, tmp_path):
    """Clip i is told value i, whatever the batches."""
    labels = ["zero", "one", "two", "two", "one"]
    given = [f"checkpoint={saved}", f"label=[{','.join(labels)}]", "speaker=bob", "n_batch=2"]
    assert generate.main([*given, f"out_dir={tmp_path / 'out'}", "page=false"]) == 0
    rows = rows_of(tmp_path / "out")
    assert [rows[str(i)]["label"] for i in range(5)] == labels
    assert {row["speaker"] for row in rows.values()} == {"bob"}


@pytest.mark.parametrize(
    "given, said",
    [
        (["label=[one,two]", "n_samples=3"], "label=[one,two]: 2 values for 3 clips"),
        (["label=to"], "label=to: not a value of it, did you mean two? (zero, one, two)"),
        (["lable=one"], "lable=one: unknown, did you mean label?"),
        (["n_sample=3"], "n_sample=3: unknown, did you mean n_samples?"),
        (["guidance=-0.5"], "guidance=-0.5: must be a number, at least 0"),
        (["guidance=nan"], "guidance="),
        (["told=one"], "told"),
    ],
)
def test_a_wrong_condition_is_one_line_and_nothing_is_written(given, said, saved, tmp_path, capsys):
    out = tmp_path / "out"
    status = status_of([f"checkpoint={saved}", *given, f"out_dir={out}"])
    error = capsys.readouterr().err
    assert status == 2 and said in error and error.count("\n") == 1 and not out.exists()


def test_a_model_without_conditions_cannot_be_told(tmp_path, capsys):
    save_checkpoint(tmp_path / "plain.safetensors", make(values={}))
    given = [f"checkpoint={tmp_path / 'plain.safetensors'}", f"out_dir={tmp_path / 'out'}"]
    for told, said in (("label=one", "this model can be told nothing"), ("guidance=2", "guidance")):
        assert status_of([*given, told]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_the_likelihood_command_tells_and_classifies(saved, tmp_path, capsys):
    """Bits when told are those of the columns; accuracy is that of `classify`, by hand."""
    model, rows, right, bits = make(), [("path", "label", "speaker")], 0, {True: 0.0, False: 0.0}
    for i, label in enumerate(["one", "two", "zero", "two", "one", "two"]):
        wav = model.generate(1, length=30 + i, generator=seeded(i), label=label, speaker="ann")
        audio.write(tmp_path / f"{i}.wav", wav[0], 1000)
        rows.append((f"{i}.wav", label, "ann"))
        wav = audio.read(tmp_path / f"{i}.wav")[0][None]
        for told in bits:
            names = {"label": label, "speaker": "ann"} if told else {}
            bits[told] += float(model.nll(wav, **names)) * wav.shape[1] / math.log(2)
        right += model.conditions["label"][int(model.classify(wav).argmax())] == label
    with (tmp_path / "split.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    likelihood.main([f"csv={tmp_path / 'split.csv'}", f"checkpoint={saved}", "classify=label",
                     "batch_size=4", "device=cpu"])  # fmt: skip
    said = capsys.readouterr().out
    samples = sum(30 + i for i in range(6))
    for told, words in ((True, "told label and speaker"), (False, "told nothing")):
        line = next(line for line in said.splitlines() if words in line)
        assert float(line.split()[0]) == pytest.approx(bits[told] / samples, abs=2e-4)
    assert f"{right / 6:.1%} of the clips: the likeliest label" in said and bits[True] < bits[False]
