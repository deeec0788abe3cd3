"""Curves of scores over the settings of sampling."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_of
from levels import Level, folder_of

from metrics import scores, sweep
from metrics.sweep import SweepConfig, evenness, main, measure, picture, table
from rawaudio import audio


def made(path: Path, levels: list[float], **settings) -> str:
    """Such a folder as generate would have left it, with its settings."""
    folder_of(path, levels)
    (path / ".generate").mkdir()
    (path / ".generate" / "settings.json").write_text(json.dumps(settings))
    return str(path)


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """Real clips; clips that are as good at 0.8, doubtful at 1.0, all alike at 0.5."""
    monkeypatch.setattr(sweep, "load_classifier", lambda name: Level())
    real = folder_of(tmp_path / "real", [0.1, 0.2, 0.3] * 4)
    (tmp_path / "real.csv").write_text("\n".join(["path", *(x.name for x in real.iterdir())]))
    levels = {1.0: [0.15, 0.25, 0.2] * 3, 0.5: [0.2] * 9, 0.8: [0.1, 0.2, 0.3] * 3}
    return SweepConfig(
        samples=[made(tmp_path / str(t), x, temperature=t, nucleus_p=0.9, seed=0)
                 for t, x in levels.items()],
        real_csv=str(tmp_path / "real.csv"),
        data_root=str(real),
        out=str(tmp_path / "sweep.png"),
        cache_dir=None,
    )  # fmt: skip


def arguments(cfg: SweepConfig) -> list[str]:
    settings = [f"{name}={getattr(cfg, name)}" for name in ("real_csv", "data_root", "out")]
    return [f"samples=[{','.join(cfg.samples)}]", "cache_dir=", *settings]


def test_points_are_the_scores_of_the_folders_in_order(cfg):
    points = measure(cfg)
    assert [point.settings for point in points] == [{"temperature": t} for t in (0.5, 0.8, 1.0)]
    assert [point.sure for point in points] == [1.0, 1.0, pytest.approx(1 / 3)]
    assert [point.spread for point in points] == pytest.approx([0, 1, 0])  # one class, three, one
    features = [
        Level()(torch.stack([audio.read(path)[0] for path in sorted(Path(x).glob("*.wav"))]))[1]
        for x in (cfg.data_root, cfg.samples[2])
    ]
    assert points[1].fid == pytest.approx(scores.fid(*features), rel=1e-5)
    assert points[1].fid < min(points[0].fid, points[2].fid)


def test_the_command_writes_a_table_and_a_picture(cfg, capsys):
    assert main(arguments(cfg)) == 0
    printed = capsys.readouterr().out
    assert "| 0.8 | 9 |" in printed and "100.0%" in printed
    assert Path(cfg.out).read_bytes().startswith(b"\x89PNG")


def test_other_settings_that_differ_are_lines_of_their_own(cfg):
    path = Path(cfg.samples[0], ".generate", "settings.json")
    path.write_text(json.dumps({"temperature": 1.0, "nucleus_p": 1.0}))
    points = measure(cfg)
    assert [point.settings["nucleus_p"] for point in points] == [0.9, 0.9, 1.0]
    assert "nucleus_p" in table(points).splitlines()[0]
    assert len(picture(points, "temperature", "webp")) > 1000


@pytest.mark.parametrize(
    ("setting", "message"),
    [("over=steps", "have no steps"), ("over=tempo", "over=tempo"), ("out=x.gif", "out=x.gif"),
     ("samples=[{0}]", "two folders"), ("samples=[{0},.]", "settings.json"),
     ("real_csv=nowhere.csv", "nowhere.csv")],
)  # fmt: skip
def test_bad_settings_are_one_line(cfg, capsys, setting, message):
    assert message in error_of(main, [*arguments(cfg), setting.format(*cfg.samples)], capsys)
    assert not Path(cfg.out).exists()


def test_evenness_is_1_for_equal_counts():
    assert evenness(np.array([5, 5, 5, 5])) == pytest.approx(1)
    assert evenness(np.array([9, 0, 0])) == evenness(np.zeros(3, dtype=int)) == 0
    assert 0 < evenness(np.array([9, 1, 1])) < 1
