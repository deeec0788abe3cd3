"""Conditions: what a model can be told, in names and in rows, and the commands that tell it."""

import json
import math

import pytest
import torch
from commands import error_of
from models import TOLD, audio, make, seeded

from rawaudio import audio as files
from rawaudio import generate, likelihood, seeds
from rawaudio.checkpoint import save_checkpoint
from rawaudio.conditions import guided, withhold
from rawaudio.data import read_samples
from rawaudio.samplers import level_at


def test_rows_and_words_are_inverses():
    told = make(told=True).told
    rows = told.rows(4, {"label": ["b", None, "c", "a"], "speaker": "x"})
    assert rows.tolist() == [[2, 1], [0, 1], [3, 1], [1, 1]]
    assert told.words(rows) == {"label": ["b", None, "c", "a"], "speaker": ["x"] * 4}
    assert told.rows(2, {"label": None}).tolist() == [[0, 0]] * 2


def test_withheld_rows_are_each_and_all_at_once():
    """A share of every condition, and of whole clips beside; a part of a batch loses the same."""
    rows = torch.ones(20000, 2, dtype=torch.int64)
    left = withhold(rows, 0.1, seeded(), (0, 20000))
    for told, expected in [(left[:, 0], 0.81), (left[:, 1], 0.81), (left.amax(1), 0.891)]:
        assert told.double().mean() == pytest.approx(expected, abs=0.01)
    parts = [withhold(rows[i : i + 5000], 0.1, seeded(), (i, 20000)) for i in range(0, 20000, 5000)]
    assert torch.equal(torch.cat(parts), left) and rows.all()


@pytest.mark.parametrize(
    ("guidance", "towards", "kept"),
    [(0.0, [], {}), (1.0, [], {}), (3.0, [], {}), (3.0, ["label"], {"speaker": "y"}),
     (3.0, ["label", "speaker"], {})],
)  # fmt: skip
def test_guided_noise_is_that_of_two_passes(guidance, towards, kept):
    """untold + guidance (told - untold), one DDIM step by hand from a latent."""
    model, z = make("diffwave", told=True, guided=towards), torch.randn(2, 40, generator=seeded())
    a = float(level_at(model.alpha_bar, 199.0))
    given = {"label": ["b", "c"], "speaker": "y"}
    with torch.no_grad():
        t = torch.full((2,), 199.0)
        told, untold = model(z, t, **given), model(z, t, **kept)
        noise = untold + guidance * (told - untold)
        expected = ((z - math.sqrt(1 - a) * noise) / math.sqrt(a)).clamp(-1, 1)
    wavs = model.generate_from_latent(z, 1, guidance=guidance, **given)
    torch.testing.assert_close(wavs, expected, rtol=0, atol=1e-4)
    assert (wavs.abs() < 1).any()  # clamping has left something to compare
    assert torch.equal(guided(told, untold, 2.5), untold + 2.5 * (told - untold))


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_inversion_closes_the_loop_with_the_same_conditions(guidance):
    """invert, then generate_from_latent: the clip comes back; with other conditions it does not."""
    model = make("diffwave", told=True)
    with torch.no_grad():
        model.output[2].weight *= 0.1
    wav = 0.5 * torch.sin(torch.arange(40) / 3).expand(2, -1)
    given = {"label": ["b", "c"], "speaker": "y", "guidance": guidance}
    z = model.invert(wav, 20, iterations=8, **given)
    back = model.generate_from_latent(z, 20, **given)
    other = model.generate_from_latent(z, 20, **given | {"label": ["c", "a"]})
    assert (back - wav).abs().max() < 1e-3 < 1e-2 < (other - wav).abs().max()
    untold = model.generate_from_latent(z, 20)  # nothing is drawn where nothing is given
    assert torch.equal(untold, model.generate_from_latent(z, 20, label=None, speaker=None))


def test_guidance_is_towards_conditions_that_there_are():
    message = r"guided=\[lable\]: the model can be told label, speaker"
    with pytest.raises(ValueError, match=message):
        make(told=True, guided=["label", "lable"])


def test_vocoders_are_told_things_too():
    model = make("diffwave", told=True, unconditional=False)
    mel = model.log_mel(audio(2, 36))
    wavs = [model.vocode(mel, generator=seeded(), label=x) for x in (None, "b", ["b", None])]
    assert torch.equal(wavs[2][0], wavs[1][0]) and torch.equal(wavs[2][1], wavs[0][1])
    assert not torch.equal(wavs[0][0], wavs[1][0])


@pytest.mark.parametrize("kind", ["autoregressive", "diffwave"])
def test_clips_are_told_by_name_listed_and_shown(kind, tmp_path):
    """A value of a list for each clip, what is not given drawn; audio as `model.generate`'s."""
    model, path = make(kind, told=True, guided=["label"]), tmp_path / "model.safetensors"
    out = tmp_path / "out"
    save_checkpoint(path, model)
    labels = ["b", "c", "a", "a", "c"]
    argv = [f"checkpoint={path}", f"label=[{','.join(labels)}]", f"out_dir={out}", "device=cpu"]
    assert generate.main([*argv, "guidance=2", "seed=3", "n_batch=3"]) == 0
    rows = {row["clip"]: row for row in read_samples(out).values()}
    for k, batch in enumerate((labels[:3], labels[3:])):
        n = len(batch)
        told = model.draw_conditions(n, seeds.seeded(3, k), label=batch)
        wavs = model.generate(n, generator=seeds.seeded(3, k), guidance=2.0, label=batch)
        for i, wav in enumerate(wavs):
            row = rows[str(3 * k + i)]
            assert (row["label"], row["speaker"]) == (batch[i], told["speaker"][i])
            torch.testing.assert_close(files.read(out / row["file"])[0], wav, atol=2**-15, rtol=0)
    page = (out / "index.html").read_text()
    assert f"c · {rows['1']['speaker']}" in page and "guidance 2 towards label" in page
    settings = json.loads((out / ".generate" / "settings.json").read_text())
    assert settings["guidance"] == 2 and settings["told"] == {"label": labels}
    assert settings["guided"] == ["label"]


REFUSED = {
    "label=[b,c] n_samples=3": "label=[b,c]: 2 values for 3 clips",
    "label=bb": "label=bb: not a value of it, did you mean b? (a, b, c)",
    "lable=b": "lable=b: unknown, did you mean label? (this model can be told label, speaker)",
    "n_sample=3": "n_sample=3: unknown, did you mean n_samples?",
    "guidance=-0.5": "guidance=-0.5: must be a number, at least 0",
    "told=b": "told",
}
REFUSED_UNTOLD = {
    "label=b": "this model can be told nothing",
    f"label=[{'b,' * 200}b]": "b,b ... b,b",
    "guidance=2": "guidance",
}


@pytest.mark.parametrize("told", [True, False])
def test_a_wrong_condition_is_one_line_and_nothing_is_written(told, tmp_path, capsys):
    save_checkpoint(tmp_path / "model.safetensors", make(told=told))
    for argv, words in (REFUSED if told else REFUSED_UNTOLD).items():
        argv = [f"checkpoint={tmp_path / 'model.safetensors'}", *argv.split()]
        argv = [*argv, f"out_dir={tmp_path / 'out'}"]
        assert words in error_of(generate.main, argv, capsys) and not (tmp_path / "out").exists()


def test_the_likelihood_command_tells_and_classifies(tmp_path, capsys):
    """Bits when told are those of the columns; accuracy is that of `classify`, by hand."""
    model, right, bits = make(told=True), 0, {True: 0.0, False: 0.0}
    save_checkpoint(tmp_path / "model.safetensors", model)
    rows = ["path,label,speaker"]
    for i, label in enumerate("bcacbc"):
        wav = model.generate(1, 30 + i, generator=seeded(i), label=label, speaker="x")
        files.write(tmp_path / f"{i}.wav", wav[0], 1000)
        rows.append(f"{i}.wav,{label},x")
        wav = files.read(tmp_path / f"{i}.wav")[0][None]
        for told in bits:
            names = {"label": label, "speaker": "x"} if told else {}
            bits[told] += float(model.nll(wav, **names)) * wav.shape[1] / math.log(2)
        right += TOLD["label"][int(model.classify(wav).argmax())] == label
    (tmp_path / "split.csv").write_text("\n".join(rows))
    argv = [f"csv={tmp_path / 'split.csv'}", f"checkpoint={tmp_path}/model.safetensors"]
    likelihood.main([*argv, "classify=label", "batch_size=4", "device=cpu"])
    printed = capsys.readouterr().out
    for told, words in ((True, "told label and speaker"), (False, "told nothing")):
        line = next(line for line in printed.splitlines() if words in line)
        assert float(line.split()[0]) == pytest.approx(bits[told] / 195, abs=2e-4)
    assert f"{right / 6:.1%} of the clips: the likeliest label" in printed
    assert bits[True] < bits[False]
    refused = error_of(likelihood.main, ["csv=x", "batch_size=0"], capsys)
    assert "batch_size=0: must be above 0" in refused
