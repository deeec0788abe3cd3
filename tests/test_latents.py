"""Planes between classes, what they tell, ways through latents, and the commands that show them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_of, status
from models import ADVERSARIAL, TINY, make, seeded

from metrics import latents
from metrics.latents import (
    conditional_entropy,
    linear_separability,
    path_length,
    separating_planes,
)
from rawaudio import audio, interpolate
from rawaudio.checkpoint import save_checkpoint
from rawaudio.errors import UserError
from rawaudio.hub import load_named
from rawaudio.spaces import Space

# RF5/simple-asgan b6afc626, see fixtures/README.md
RECORDED = torch.load(Path(__file__).parent / "fixtures" / "separability.pt", weights_only=True)
WITH_LATENTS = [*ADVERSARIAL, "diffwave"]


@pytest.mark.parametrize("share", RECORDED)
def test_conditional_entropy_is_the_recorded_one(share):
    case = RECORDED[share]
    found = math.exp(conditional_entropy(case["labels"], case["decisions"]))
    assert found == pytest.approx(case["exp_conditional_entropy"], rel=1e-12)
    assert conditional_entropy(case["labels"], case["labels"]) == pytest.approx(0, abs=1e-12)


def clouds(distance):
    """Three clouds of 100 points, so far apart, far from 0 and small; and their numbers."""
    rng, labels = np.random.default_rng(0), np.arange(300) % 3
    return 7 + 1e-3 * (rng.normal(size=(300, 5)) + distance * np.eye(5)[labels]), labels


def test_planes_part_what_can_be_parted():
    """Of any place and scale; each has its class in front of it, and the others behind."""
    points, labels = clouds(9)
    normals, offsets = separating_planes(points, labels, 4)
    sides = points @ normals.T + offsets
    assert np.array_equal(sides[:, :3] > 0, labels[:, None] == np.arange(3))
    assert (sides[:, 3] < 0).all()  # a class without points


@pytest.mark.parametrize(("distance", "low", "high"), [(9, 1, 1.001), (2, 1.1, 2), (0, 2.7, 3)])
def test_separability_is_of_points_that_were_not_fitted_to(distance, low, high):
    """From 1 to the number of classes, which the planes do not tell at all; also with as many
    dimensions as points. Of the surest clips alone, if one likes."""
    points, labels = clouds(distance)
    probs = 0.1 + 0.7 * np.eye(3)[labels]
    assert low <= linear_separability(points, probs, 1.0) <= high
    noise = np.random.default_rng(1).normal(size=(300, 300))
    assert linear_separability(noise, probs, 1.0) > 2.5
    probs[::2] = [0.4, 0.35, 0.25]  # wrong, and unsure
    assert linear_separability(points, probs, 0.5) == pytest.approx(
        linear_separability(points[1::2], probs[1::2], 1.0)
    )


def test_path_length_is_of_squared_steps_without_the_extreme_ones():
    there = np.full((200, 2), [3.0, 4.0])
    there[:2], there[2:4] = 0, 1e6
    assert path_length(np.zeros((200, 2)), there, 0.1) == pytest.approx(2500)


@pytest.mark.parametrize("kind", WITH_LATENTS)
def test_ways_begin_and_end_at_clips_and_are_as_likely_as_these(kind):
    """The clips of `generate`, with what they are told; halfway, latents are spread as theirs."""
    model = make(kind, told=True)
    for space in [Space(model)] + [Space(model, "z")] * hasattr(model, "z2w"):
        points, told = space.draw(2, seeded(1))
        for t, end in ((0, 0), (1, 1)):
            torch.testing.assert_close(space.between(*points, t), points[end])
        more = {} if kind != "diffwave" else {"sampler": "ddim"}
        wanted = model.generate(2, generator=seeded(1), **more)
        torch.testing.assert_close(space.hear(points, told), wanted, rtol=1e-3, atol=1e-3)
    a, b = (model.latents(4000, seeded(i)) for i in (2, 3))
    middle = model.between(a, b, torch.full((4000, 1), 0.5))
    torch.testing.assert_close(middle, model.between(a, b, 0.5))
    for q in (0.01, 0.2, 0.5, 0.9, 0.99):
        ours, theirs = (x.flatten()[:20000].quantile(q) for x in (middle, a))
        assert abs(ours - theirs) < 0.1


def test_models_without_such_points_are_named():
    bad = (("autoregressive", {}, "no latents"), ("wavegan", {"name": "w"}, "no styles"),
           ("asgan", {"steps": 3}, "steps=3"))  # fmt: skip
    for kind, settings, words in bad:
        with pytest.raises(UserError, match=words):
            Space(make(kind), **settings)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """kind -> weights of a tiny model that can be told."""
    folder = tmp_path_factory.mktemp("files")
    for kind in ("asgan", "wavegan", "diffwave", "autoregressive"):
        save_checkpoint(folder / f"{kind}.safetensors", make(kind, told=True))
    return {kind: str(folder / f"{kind}.safetensors") for kind in TINY}


@pytest.mark.parametrize(
    ("kind", "more"),
    [("asgan", ["label=[a,b]"]), ("asgan", ["space=z", "label=a"]), ("asgan", ["way=mix"]),
     ("wavegan", []), ("diffwave", ["steps=2", "speaker=x"])],
)  # fmt: skip
def test_a_way_is_written_once_as_files_and_a_page(kind, more, files, tmp_path):
    out = tmp_path / "out"
    argv = [f"checkpoint={files[kind]}", f"out_dir={out}", "n=3", *more]
    assert interpolate.main(argv) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["00.wav", "01.wav", "02.wav", "index.html"]
    wavs = [audio.read(out / name)[0] for name in names[:3]]
    assert all(not torch.equal(a, b) for a, b in zip(wavs, wavs[1:], strict=False))
    assert (out / "index.html").read_text().count("<audio") == 3
    assert status(interpolate.main, argv) == 2 and len(list(out.iterdir())) == 4


def test_mixed_clips_begin_and_end_with_one_style(files, tmp_path):
    """With that of the path's ends: all layers of the one, and none."""
    for way in ("path", "mix"):
        argv = [f"checkpoint={files['asgan']}", f"out_dir={tmp_path / way}", f"way={way}", "n=3"]
        assert interpolate.main(argv) == 0
    for name in ("00.wav", "02.wav"):
        ends = [audio.read(tmp_path / way / name)[0] for way in ("path", "mix")]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-3)
    middle = [audio.read(tmp_path / way / "01.wav")[0] for way in ("path", "mix")]
    assert (middle[0] - middle[1]).abs().max() > 1e-2


def test_a_digit_becomes_another_across_the_plane(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(interpolate, "FITTED", 64)
    argv = ["way=edit", "label=one", "n=2", "speaker=theo", "device=cpu"]
    assert interpolate.main([*argv, "towards=seven", f"out_dir={tmp_path / 'out'}"]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.index("heard as one") < page.index("heard as seven")
    for word, reason in (("one", "the first clip is heard as that"), ("sevn", "did you mean")):
        assert interpolate.main([*argv, f"towards={word}", f"out_dir={tmp_path / 'no'}"]) == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("kind", "argument", "reason"),
    [("asgan", "label=[a,b,c]", "one value, or two"),
     ("asgan", "label=[a,b] way=edit towards=one", "label=[a,b]: way=edit takes one value"),
     ("asgan", "label=[]", "label=[]: give one value"),
     ("asgan", "lable=a", "did you mean label"),
     ("wavegan", "label=[a,b]", "the same all the way"),
     ("wavegan", "way=mix", "in space=w alone"),
     ("wavegan", "way=edit", "needs towards="),
     ("wavegan", "towards=one", "needs towards="),
     ("wavegan", "n=1", "n=1"),
     ("wavegan", "way=walk", "path or mix or edit"),
     ("wavegan", "vocoder=griffin_lim", "no vocoder"),
     ("autoregressive", "n=3", "no latents")],
)  # fmt: skip
def test_what_no_way_can_be_is_named(kind, argument, reason, files, tmp_path, capsys):
    argv = [f"checkpoint={files[kind]}", f"out_dir={tmp_path / 'out'}", *argument.split()]
    assert reason in error_of(interpolate.main, argv, capsys)
    assert not (tmp_path / "out").exists()


def test_latents_are_measured(files, capsys):
    """A row for each space, which the same seed gives again."""
    argv = [f"checkpoint={files['asgan']}", "n=100", "device=cpu"]
    printed = []
    for _ in range(2):
        assert latents.main(argv) == 0
        printed.append(capsys.readouterr().out)
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in printed[0].splitlines()]
    assert printed[0] == printed[1] and [row[0] for row in rows[2:]] == ["z", "w"]
    assert all(float(row[1]) >= 1 and float(row[2].replace(",", "")) > 0 for row in rows[2:])


@pytest.mark.parametrize("argument", ["keep=0.02", "epsilon=1e-09", "n=99", "steps=2"])
def test_what_cannot_be_measured_is_one_line_without_a_table(argument, files, capsys):
    assert status(latents.main, [f"checkpoint={files['wavegan']}", argument]) == 2
    said = capsys.readouterr()
    assert argument in said.err and said.err.count("\n") == 1 and not said.out


def test_what_the_digits_model_is_told_is_parted_in_its_styles():
    """And not in its latents, which do not know it."""
    model = load_named("asgan_digits", device="cpu")
    for name, low, high in (("z", 4, 10), ("w", 1, 1.1)):
        points, told = Space(model, name).draw(400, seeded())
        words = np.array([model.conditions["label"].index(word) for word in told["label"]])
        assert low <= linear_separability(points, np.eye(10)[words], 1.0) <= high
