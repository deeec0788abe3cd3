"""What the floors of the scores share with speech, and what not."""

import numpy as np
import pytest
import soundfile
import torch
from commands import status

from metrics.floors import main
from rawaudio import audio
from sashimi import mulaw

RATE = 4000


@pytest.fixture
def arguments(tmp_path):
    wave = 0.5 * np.sin(2 * np.pi * 200 * np.arange(3000) / RATE) * np.linspace(0, 1, 3000)
    soundfile.write(tmp_path / "tone.wav", wave, RATE)
    (tmp_path / "clips.csv").write_text("path\ntone.wav\n")
    csv, out = tmp_path / "clips.csv", tmp_path / "out"
    return [f"csv={csv}", f"sample_rate={RATE}", "n=2", f"out_dir={out}"]


def test_floors_have_the_level_or_the_classes_of_the_clips(arguments, tmp_path):
    assert main(arguments) == 0
    real, _ = audio.read(tmp_path / "tone.wav")
    for i in range(2):
        noise, rate = audio.read(tmp_path / "out" / "noise" / f"000{i}.wav")
        shuffled, _ = audio.read(tmp_path / "out" / "shuffled" / f"000{i}.wav")
        assert rate == RATE and len(noise) == len(shuffled) == len(real)
        level = float(noise.square().mean() / real.square().mean())
        assert level == pytest.approx(1, abs=0.1)
        classes = [torch.bincount(mulaw.encode(x), minlength=256) for x in (real, shuffled)]
        assert (classes[0] - classes[1]).abs().sum() <= 0.02 * len(real)
        for floor in (noise, shuffled):  # white: neighbours know nothing of each other
            assert abs(torch.corrcoef(torch.stack([floor[1:], floor[:-1]]))[0, 1]) < 0.1
    assert torch.corrcoef(torch.stack([real[1:], real[:-1]]))[0, 1] > 0.9


def test_bad_settings_are_one_line_and_nothing_is_overwritten(arguments, tmp_path, capsys):
    for bad in ("n=0", "seed=5000000000"):
        assert status(main, [*arguments, bad]) == 2
        assert f"{bad}: must be" in capsys.readouterr().err
    (tmp_path / "out" / "shuffled").mkdir(parents=True)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "out_dir=" in said
    assert not (tmp_path / "out" / "noise").exists()
