"""Copies are found whatever was done to them, other words are not; distances are the definition's.

Words are made of gliding harmonics and hisses; no two are alike.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from levels import Level
from torch.nn import functional as F

from metrics import __main__ as command
from metrics import nearest, report
from metrics.features import ClipSet
from metrics.nearest import Neighbours, copy_limit, neighbours, search, spectra, summary
from rawaudio import audio
from rawaudio.data import Clip
from sashimi import mulaw

RATE, LENGTH = 8000, 8000
REACH = 25  # frames of 4 ms


def word(seed: int) -> torch.Tensor:
    """0.4 to 0.7 s: three sounds, each a gliding tone with harmonics of its own, or a hiss."""
    g = torch.Generator().manual_seed(seed)

    def rand(low, high):
        return float(torch.empty(1).uniform_(low, high, generator=g))

    sounds = []
    for _ in range(3):
        n = round(rand(0.13, 0.23) * RATE)
        fade = torch.hann_window(n).sqrt()
        pitch = torch.linspace(rand(90, 240), rand(90, 240), n).cumsum(0) / RATE
        sound = sum(
            rand(0, 1) ** 2 * torch.sin(2 * torch.pi * (k * pitch + rand(0, 1)))
            for k in range(1, 14)
        )
        hiss = rand(0, 0.5) ** 2 * torch.randn(n, generator=g)
        sounds.append(rand(0.3, 1) * fade * (sound + hiss))
    wav = torch.cat(sounds)
    return 0.5 * wav / wav.abs().max()


def heard(wavs, length: int = LENGTH, rate: int = RATE) -> torch.Tensor:
    """Spectra of clips, cut or padded."""
    padded = [F.pad(wav[:length], (0, max(0, length - len(wav)))) for wav in wavs]
    return spectra(torch.stack(padded), rate)


def coded(wav: torch.Tensor) -> torch.Tensor:
    return mulaw.decode(mulaw.encode(wav))


def noisy(wav: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(len(wav), generator=torch.Generator().manual_seed(0))
    return wav + noise * wav.square().mean().sqrt() * 10 ** (-30 / 20)


def later(wav: torch.Tensor, seconds: float) -> torch.Tensor:
    return F.pad(wav, (round(seconds * RATE), 0))


def everything(wav: torch.Tensor) -> torch.Tensor:
    return coded(noisy(later(wav / 2, 0.053)))


@pytest.fixture(scope="module")
def real():
    """Spectra of 40 words, and each word's distance to its nearest other."""
    fine = heard(word(i) for i in range(40))
    distance, _, _ = search(fine, fine[:, :: nearest.STEP], REACH, torch.arange(40))
    return fine[:, :: nearest.STEP], distance


@pytest.mark.parametrize(
    ("change", "lag", "most"),
    [(lambda wav: wav, 0, 1e-3),
     (lambda wav: wav / 2, 0, 1e-3),
     (lambda wav: later(wav, 0.04), 10, 1.5),
     (lambda wav: later(wav, 0.037), 9.25, 1.5),
     (lambda wav: wav[round(0.09 * RATE) :], -22.5, None),  # cut: the loudest part of some
     (coded, 0, 1.5), (noisy, 0, 1.5), (everything, 13.25, 1.5)],
    ids=["exact", "quieter", "40 ms", "37 ms", "earlier", "mu-law", "noise", "all of it"],
)  # fmt: skip
def test_a_copy_is_found_whatever_was_done_to_it(real, change, lag, most):
    """Nearer to its original than any two different words, at the right delay."""
    x, others = real
    distance, index, lags = search(heard(change(word(i)) for i in range(20)), x, REACH)
    assert index.tolist() == list(range(20))
    assert distance.max() < (most or others.min()) and 1.5 < others.min() / 2
    assert (lags - lag).abs().max() <= 1


def test_other_words_are_no_copies(real):
    """Leave-one-out never finds the clip itself, but its twin."""
    x, others = real
    distance, _, _ = search(heard(word(i) for i in range(100, 120)), x, REACH)
    assert distance.min() > 3 and distance.median() == pytest.approx(others.median(), rel=0.25)
    fine = heard(word(i) for i in (*range(20), 7))
    distance, index, _ = search(fine, fine[:, :: nearest.STEP], REACH, torch.arange(21))
    assert index[7] == 20 and index[20] == 7 and distance[[7, 20]].max() == 0
    assert distance[[i for i in range(20) if i != 7]].min() > 3


def by_hand(query, real, reach, own):
    """Distance, row and lag by one loop over everything, in double precision."""
    best = (math.inf, -1, 0)
    for i, y in enumerate(real):
        for lag in range(-reach, reach + 1):
            total, n = 0.0, 0
            for j in range(len(y)):
                k = 4 * j + lag
                if 0 <= k < len(query) and (query[k].max() > 0 or y[j].max() > 0):
                    total += np.square(query[k] - y[j]).mean()
                    n += 1
            halves = (query[lag % 4 :: 4].max(1) > 0).sum() / 2, (y.max(1) > 0).sum() / 2
            if i != own and min(halves) > 0 and n >= max(halves):
                best = min(best, (math.sqrt(total / n), i, lag))
    return best


@pytest.mark.parametrize("n_frames", [21, 22, 24, 41])
def test_matrix_products_give_the_distances_of_the_definition(n_frames, monkeypatch):
    monkeypatch.setattr(nearest, "PART", 4)
    g = torch.Generator().manual_seed(n_frames)
    fine = 40 * torch.rand(9, n_frames, 32, generator=g)
    sounds = torch.rand(9, n_frames, 1, generator=g) < 0.6  # gaps
    fine = fine * sounds * torch.linspace(0.2, 1, 9)[:, None, None]
    fine[3, 4:] = 0  # short ones
    fine[5, :-5] = 0
    fine[6] = fine[2] + 0.001 * fine[7]  # nearly a copy
    real = fine[:, ::4].contiguous()
    for own in (None, torch.arange(9)):
        for i, (a, *b) in enumerate(zip(*search(fine, real, 6, own), strict=True)):
            me = None if own is None else i
            expected = by_hand(fine[i].double().numpy(), real.double().numpy(), 6, me)
            assert (a, *b) == (pytest.approx(expected[0], abs=1e-3), *expected[1:])


@pytest.mark.parametrize(("rate", "length"), [(16000, 16000), (22050, 22050), (48, 9)])
def test_any_rate_and_length(rate, length):
    """Also shorter than a window."""
    fine = heard((word(i)[1000:] for i in range(6)), length, rate)
    assert fine.shape == (6, 1 + length // nearest._hops(rate)[1], 32)
    assert 0 <= fine.min() and fine.max() <= 40
    distance, index, _ = search(fine, fine[:, ::4], REACH)
    assert index.tolist() == list(range(6)) and distance.max() < 1e-3


def made_of(distances, index=None) -> Neighbours:
    n = len(distances)
    return Neighbours(np.arange(n), index or np.zeros(n, int), np.array(distances), np.zeros(n))


def test_silence_is_nobodys_copy_and_nobodys_neighbour(real):
    queries = heard([torch.zeros(LENGTH), torch.full((LENGTH,), 1 / 2**15), word(3)])
    distance, index, _ = search(queries, torch.cat([torch.zeros_like(real[0][:2]), real[0]]), REACH)
    assert distance[:2].isnan().all() and index.tolist() == [-1, -1, 5]
    near = made_of(distance.tolist())
    assert near.silent == 2 and near.closest().tolist() == [2]
    facts = summary(near, 1.0)
    assert (facts["clips"], facts["silent"], facts["copies"]) == (1, 2, 1)
    assert summary(made_of([math.nan] * 2), 1.0) == {"clips": 0, "silent": 2, "copies": 0}


def test_fewer_than_two_real_clips_that_sound_are_refused(tmp_path):
    for name, wav in {"a": word(0), "b": torch.zeros(100)}.items():
        audio.write(tmp_path / f"{name}.wav", wav, RATE)
    clips = [Clip(tmp_path / "a.wav"), Clip(tmp_path / "b.wav")]
    with pytest.raises(ValueError, match="at least two real clips that are not silent"):
        neighbours({"real": ClipSet("real", np.ones((2, 1)), np.ones((2, 1)), clips)}, RATE, LENGTH)


def test_duplicates_among_real_clips_do_not_hide_copies():
    distances = np.linspace(1.5, 6.5, 3000)
    limit = copy_limit(made_of(distances))
    assert limit == distances[2] and (distances < limit).sum() == 2, "one in a thousand"
    distances[:30] = 0
    assert copy_limit(made_of(distances)) == 1
    distances[5] = np.nan
    assert copy_limit(made_of(distances)) == 1
    assert copy_limit(made_of([11.0, 12.0, 13.0])) == 6, "of few clips, half the median"


class Hears(Level):
    clip_length = LENGTH


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Ten real words, four test words, and five generated ones of which two are copies."""
    monkeypatch.setattr(command, "load_classifier", lambda *args, **kwargs: Hears())
    monkeypatch.setattr(report, "N_WORST", 0)
    for kind, seeds in {"real": range(10), "test": range(50, 54), "generated": (70, 71)}.items():
        for i in seeds:
            audio.write(tmp_path / kind / f"{i}.wav", word(i), RATE)
        rows = [f"{tmp_path / kind / f'{i}.wav'}\n" for i in seeds]
        (tmp_path / f"{kind}.csv").write_text("path\n" + "".join(rows))
    generated = tmp_path / "generated"
    audio.write(generated / "72.wav", torch.zeros(500), RATE)
    audio.write(generated / "copy 3.wav", everything(word(3)), RATE)
    double = audio.resample(word(8), RATE, 2 * RATE).clamp(-1, 1)
    audio.write(generated / "copy 8.wav", double, 2 * RATE)
    return {"samples": str(generated), "real_csv": f"{tmp_path}/real.csv", "bins": 2,
            "test_csv": f"{tmp_path}/test.csv", "nearest": True, "cache_dir": None}  # fmt: skip


def pairs_of(facts: dict) -> dict[str, str]:
    return {Path(pair["file"]).name: Path(pair["nearest"]).name for pair in facts["closest"]}


def test_the_command_names_the_copies(settings, capsys):
    assert command.main([f"{k}={v}" for k, v in settings.items()]) == 0
    out, folder = capsys.readouterr().out, Path(settings["samples"])
    written = json.loads((folder / "scores.json").read_text())
    page = (folder / "scores.html").read_text()
    assert "nearest, dB" in out.splitlines()[0]
    assert "generated: 2 of its clips count as copies of real ones, above all copy " in out
    assert "generated: no nearest clip of 1 silent ones" in out

    facts = written["nearest"]
    pairs = pairs_of(facts["generated"])
    assert len(pairs) == 4 and set(list(pairs)[:2]) == {"copy 3.wav", "copy 8.wav"}
    assert (pairs["copy 3.wav"], pairs["copy 8.wav"]) == ("3.wav", "8.wav")
    delays = {Path(p["file"]).name: p["delay"] for p in facts["generated"]["closest"]}
    assert delays["copy 3.wav"] == pytest.approx(0.053, abs=0.003)
    copies = {kind: facts[kind]["copies"] for kind in ("real", "test", "generated")}
    assert copies == {"real": 0, "test": 0, "generated": 2}
    assert facts["copy_limit"] == facts["real"]["median"] / 2 > 3
    assert all(a != b for a, b in pairs_of(facts["real"]).items()), "leave-one-out"
    for row in written["scores"]:
        assert row["scores"]["nearest"] == facts[row["kind"]]["median"]
    assert "<h2>Nearest neighbours</h2>" in page and "dB from 3.wav" in page
    assert page.count("closest to a real clip") == page.count("its nearest real clip") == 3


def test_many_real_clips_are_sampled_for_the_reference_and_compared_with_all(settings, monkeypatch):
    monkeypatch.setattr(nearest, "MAX_REAL", 4)
    monkeypatch.setattr(nearest, "BLOCK", 3)
    near = command.run(command.MetricsConfig(**settings), Hears()).nearest
    assert len(near["real"]) == 4 and (np.diff(near["real"].rows) > 0).all()
    assert (near["real"].index != near["real"].rows).all()
    assert near["generated"].index.tolist()[-2:] == [3, 8]
