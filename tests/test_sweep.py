"""Curves of scores over how clips were sampled."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import classifier, scores
from metrics.sweep import SweepConfig, main, measure, picture, table
from rawaudio import audio

RATE, LENGTH = 8000, 400


class Level(torch.nn.Module):
    """Hears quiet, middle and loud clips; says so when it is one of them."""

    sample_rate, clip_length, n_features, labels = RATE, LENGTH, 2, ["quiet", "middle", "loud"]
    fingerprint = "level"

    def forward(self, wavs):
        level = wavs.square().mean(1).sqrt()[:, None]
        return -4000 * (level - torch.tensor([0.1, 0.2, 0.3])).square(), level.expand(-1, 2) + wavs[
            :, :2
        ]


def folder(path: Path, levels: list[float], **settings) -> Path:
    """Clips of noise at these levels, and the settings that generate would have left."""
    for i, level in enumerate(levels):
        wav = torch.randn(LENGTH, generator=torch.Generator().manual_seed(i))
        wav = wav.clamp(-2, 2)
        audio.write(path / f"{i:04d}.wav", level * wav / wav.square().mean().sqrt(), RATE)
    (path / ".generate").mkdir()
    (path / ".generate" / "settings.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def sets(tmp_path):
    """Real clips; clips that are as good at 0.8, doubtful at 1.0, all alike at 0.5."""
    real = folder(tmp_path / "real", [0.1, 0.2, 0.3] * 4)
    (tmp_path / "real.csv").write_text(
        "path\n" + "".join(f"{p.name}\n" for p in sorted(real.glob("*.wav")))
    )
    given = {
        0.5: [0.2] * 9,
        0.8: [0.1, 0.2, 0.3] * 3,
        1.0: [0.15, 0.25, 0.2] * 3,
    }
    made = [
        folder(tmp_path / str(t), levels, temperature=t, nucleus_p=0.9, seed=0)
        for t, levels in given.items()
    ]
    return SweepConfig(
        samples=[str(made[2]), str(made[0]), str(made[1])], real_csv=str(tmp_path / "real.csv"),
        data_root=str(real), out=str(tmp_path / "sweep.png"), cache_dir=None,
    )  # fmt: skip


def test_points_are_the_scores_of_the_folders_in_order(sets):
    points = measure(sets, Level())
    assert [point.settings for point in points] == [{"temperature": t} for t in (0.5, 0.8, 1.0)]
    assert [point.sure for point in points] == [1.0, 1.0, pytest.approx(1 / 3)]
    assert [point.spread for point in points] == pytest.approx([0, 1, 0])  # one class, three, one
    assert points[1].fid < min(points[0].fid, points[2].fid)
    wavs, theirs = (
        torch.stack([audio.read(p)[0] for p in sorted(Path(f).glob("*.wav"))])
        for f in (sets.data_root, sets.samples[2])
    )
    features = [Level()(x)[1] for x in (wavs, theirs)]
    assert points[1].fid == pytest.approx(scores.fid(*features), rel=1e-5)


def test_the_command_writes_a_table_and_a_picture(sets, capsys, monkeypatch):
    monkeypatch.setattr(classifier, "load_classifier", lambda name: Level())
    args = [f"samples=[{','.join(sets.samples)}]", f"real_csv={sets.real_csv}",
            f"data_root={sets.data_root}", f"out={sets.out}", "cache_dir="]  # fmt: skip
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "| 0.8 | 9 |" in said and "100.0%" in said
    assert Path(sets.out).read_bytes().startswith(b"\x89PNG")


def test_other_settings_that_differ_are_lines_of_their_own(sets):
    path = Path(sets.samples[0], ".generate", "settings.json")
    path.write_text(json.dumps({"temperature": 1.0, "nucleus_p": 1.0}))
    points = measure(sets, Level())
    assert [point.settings["nucleus_p"] for point in points] == [0.9, 0.9, 1.0]
    assert "nucleus_p" in table(points).splitlines()[0]
    assert len(picture(points, "temperature", "webp")) > 1000


def test_bad_settings_are_one_line(sets, capsys, monkeypatch):
    monkeypatch.setattr(classifier, "load_classifier", lambda name: Level())
    base = [f"samples=[{','.join(sets.samples)}]", f"real_csv={sets.real_csv}",
            f"data_root={sets.data_root}", f"out={sets.out}", "cache_dir="]  # fmt: skip
    empty = Path(sets.out).parent / "empty"
    empty.mkdir()
    for more, words in [
        ("over=steps", "has no steps|have no steps"),
        ("over=tempo", "over=tempo"),
        ("out=x.gif", "out=x.gif"),
        (f"samples=[{sets.samples[0]}]", "two folders"),
        (f"samples=[{sets.samples[0]},{empty}]", "settings.json"),
        ("real_csv=nowhere.csv", "nowhere.csv"),
    ]:
        try:
            status = main([*base, more])
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr().err.strip()
        assert status == 2 and said.startswith("error: ") and "\n" not in said
        assert any(word in said for word in words.split("|")), said
    assert not Path(sets.out).exists()


def test_evenness_is_1_for_equal_counts():
    from metrics.sweep import _evenness

    assert _evenness(np.array([5, 5, 5, 5])) == pytest.approx(1)
    assert _evenness(np.array([9, 0, 0])) == _evenness(np.zeros(3, dtype=int)) == 0
    assert 0 < _evenness(np.array([9, 1, 1])) < 1
