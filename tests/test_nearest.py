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
from torch.nn import functional as F

from metrics import classifier, nearest, report
from metrics.__main__ import MetricsConfig, main, run
from metrics.features import ClipSet
from metrics.nearest import Neighbours, copy_limit, neighbours, search, spectra, summary
from rawaudio import audio
from rawaudio.data import Clip
from sashimi import mulaw

RATE, LENGTH = 8000, 8000
REACH = 25  # frames of 4 ms


def word(seed: int, rate: int = RATE) -> torch.Tensor:
    """0.4 to 0.7 s: three sounds, each a gliding tone with harmonics of its own, or a hiss."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda low, high: float(torch.empty(1).uniform_(low, high, generator=g))  # noqa: E731
    sounds = []
    for _ in range(3):
        n = round(rand(0.13, 0.23) * rate)
        fade = torch.hann_window(n).sqrt()
        pitch = torch.linspace(rand(90, 240), rand(90, 240), n).cumsum(0) / rate
        sound = sum(
            rand(0, 1) ** 2 * torch.sin(2 * torch.pi * (k * pitch + rand(0, 1)))
            for k in range(1, 14)
        )
        hiss = rand(0, 0.5) ** 2 * torch.randn(n, generator=g)
        sounds.append(rand(0.3, 1) * fade * (sound + hiss))
    wav = torch.cat(sounds)
    return 0.5 * wav / wav.abs().max()


def padded(wav: torch.Tensor, length: int = LENGTH) -> torch.Tensor:
    return F.pad(wav[:length], (0, max(0, length - len(wav))))


def noisy(wav: torch.Tensor, db: float) -> torch.Tensor:
    noise = torch.randn(len(wav), generator=torch.Generator().manual_seed(0))
    return wav + noise * wav.square().mean().sqrt() * 10 ** (db / 20)


def coded(wav: torch.Tensor) -> torch.Tensor:
    return mulaw.decode(mulaw.encode(wav))


def later(wav: torch.Tensor, seconds: float) -> torch.Tensor:
    return torch.cat([torch.zeros(round(seconds * RATE)), wav])


COPIES = {
    "exact": lambda wav: wav,
    "40 ms later": lambda wav: later(wav, 0.04),
    "37 ms later": lambda wav: later(wav, 0.037),
    "90 ms earlier": lambda wav: wav[round(0.09 * RATE) :],
    "6 dB quieter": lambda wav: wav / 2,
    "mu-law": coded,
    "noise at -30 dB": lambda wav: noisy(wav, -30),
    "all of it": lambda wav: coded(noisy(later(wav / 2, 0.053), -30)),
}


@pytest.fixture(scope="module")
def real():
    """Spectra of 40 words, and each word's distance to its nearest other."""
    fine = spectra(torch.stack([padded(word(i)) for i in range(40)]), RATE)
    found, _, _ = search(fine, fine[:, :: nearest.STEP], REACH, torch.arange(40))
    return fine[:, :: nearest.STEP], found


# ---- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_found_whatever_was_done_to_it(real, name):
    """Nearer to its original than any two different words, at the right delay."""
    x, others = real
    wavs = torch.stack([padded(COPIES[name](word(i))) for i in range(20)])
    distance, index, lag = search(spectra(wavs, RATE), x, REACH)
    assert index.tolist() == list(range(20))
    if name == "90 ms earlier":  # and its first 90 ms are gone, the loudest part of some
        assert distance.max() < others.min()
    else:
        assert distance.max() < 1.5 < others.min() / 2
    expected = {"40 ms later": 10, "90 ms earlier": -22.5, "exact": 0, "6 dB quieter": 0}
    if name in expected:
        assert (lag - expected[name]).abs().max() <= 0.5
    if name in ("exact", "6 dB quieter"):
        assert distance.max() < 1e-3


def test_other_words_are_no_copies(real):
    x, others = real
    wavs = torch.stack([padded(word(i)) for i in range(100, 120)])
    distance, _, _ = search(spectra(wavs, RATE), x, REACH)
    assert distance.min() > 3 and distance.median() == pytest.approx(others.median(), rel=0.25)


def test_leave_one_out_never_finds_the_clip_itself_but_finds_its_twin(real):
    x, _ = real
    fine = spectra(torch.stack([padded(word(i)) for i in (*range(40), 7)]), RATE)
    x = fine[:, :: nearest.STEP]
    distance, index, _ = search(fine, x, REACH, torch.arange(41))
    assert (index != torch.arange(41)).all()
    assert index[7] == 40 and index[40] == 7 and distance[[7, 40]].max() == 0
    keep = [i for i in range(40) if i != 7]
    assert distance[keep].min() > 3


# ---- the definition ---------------------------------------------------------------------------


def by_hand(query, real, reach, own=None):
    """Distance, row and lag by one loop over everything, in double precision."""
    best = (math.inf, -1, 0)
    for i, y in enumerate(real):
        for lag in range(-reach, reach + 1):
            cells, n = 0.0, 0
            phase = lag % 4
            for j in range(len(y)):
                k = 4 * j + lag
                if not 0 <= k < len(query):
                    continue
                if query[k].max() > 0 or y[j].max() > 0:
                    cells += np.square(query[k] - y[j]).mean()
                    n += 1
            halves = (query[phase::4].max(1) > 0).sum() / 2, (y.max(1) > 0).sum() / 2
            if i != own and min(halves) > 0 and n >= max(halves):
                best = min(best, (math.sqrt(cells / n), i, lag))
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
        distance, index, lag = search(fine, real, 6, own)
        for i in range(9):
            a, b, c = by_hand(fine[i].double().numpy(), real.double().numpy(), 6,
                              None if own is None else i)  # fmt: skip
            assert distance[i] == pytest.approx(a, abs=1e-3)
            assert (int(index[i]), int(lag[i])) == (b, c)


def test_six_decibels_in_half_of_the_frames_are_the_distance_that_one_expects():
    """Two hisses one after the other, the second 12 or 18 dB below the first."""
    hiss = 0.1 * torch.randn(LENGTH // 2, generator=torch.Generator().manual_seed(0))
    fine = spectra(torch.stack([torch.cat([hiss, a * hiss]) for a in (0.25, 0.125)]), RATE)
    distance, _, _ = search(fine[:1], fine[1:, ::4], 0)
    assert distance == pytest.approx(6.02 / math.sqrt(2), rel=0.03)


@pytest.mark.parametrize(
    ("rate", "length"), [(16000, 16000), (22050, 22050), (8000, 2400), (48, 9)]
)
def test_any_rate_and_length(rate, length):
    """Also shorter than a window: one second at 16 kHz, 0.3 s, nine samples."""
    wavs = torch.stack([padded(word(i, max(rate, 8000))[1000:], length) for i in range(6)])
    fine = spectra(wavs, rate)
    n_frames = 1 + length // nearest._hops(rate)[1]
    assert fine.shape == (6, n_frames, 32) and 0 <= fine.min() and fine.max() <= 40
    distance, index, _ = search(fine, fine[:, ::4], REACH)
    assert index.tolist() == list(range(6)) and distance.max() < 1e-3


# ---- silence ----------------------------------------------------------------------------------


def test_silence_is_nobodys_copy_and_nobodys_neighbour(real):
    x, _ = real
    faint = torch.full((LENGTH,), 1 / 2**15)
    queries = spectra(torch.stack([torch.zeros(LENGTH), faint, padded(word(3))]), RATE)
    with_silence = torch.cat([torch.zeros_like(x[:2]), x])
    distance, index, _ = search(queries, with_silence, REACH)
    assert distance[:2].isnan().all() and index.tolist() == [-1, -1, 5]
    found = Neighbours(np.arange(3), index.numpy(), distance.numpy(), np.zeros(3))
    assert found.silent == 2 and found.closest().tolist() == [2]
    facts = summary(found, 1.0)
    assert (facts["clips"], facts["silent"], facts["copies"]) == (1, 2, 1)
    nothing = Neighbours(np.arange(2), index.numpy()[:2], distance.numpy()[:2], np.zeros(2))
    assert summary(nothing, 1.0) == {"clips": 0, "silent": 2, "copies": 0}


def test_fewer_than_two_real_clips_that_sound_are_refused(tmp_path):
    for name, wav in {"a": word(0), "b": torch.zeros(100)}.items():
        audio.write(tmp_path / f"{name}.wav", wav, RATE)
    clips = [Clip(tmp_path / "a.wav"), Clip(tmp_path / "b.wav")]
    found = ClipSet("real", np.ones((2, 1)), np.ones((2, 1)), clips)
    with pytest.raises(ValueError, match="at least two real clips that are not silent"):
        neighbours({"real": found}, RATE, LENGTH)


# ---- the limit --------------------------------------------------------------------------------


def test_duplicates_among_real_clips_do_not_hide_copies():
    def limit(distances):
        n = len(distances)
        return copy_limit(Neighbours(np.arange(n), np.zeros(n, int), distances, np.zeros(n)))

    distances = np.linspace(1.5, 6.5, 3000)
    assert limit(distances) == distances[2]
    assert (distances < limit(distances)).sum() == 2, "one in a thousand"
    distances[:30] = 0
    assert limit(distances) == 1
    distances[5] = np.nan
    assert limit(distances) == 1
    assert limit(np.array([11.0, 12.0, 13.0])) == 6, "of few clips, half the median"


# ---- from files -------------------------------------------------------------------------------


class Halves(torch.nn.Module):
    """What metrics.classifier promises, of nothing in particular: is the beginning the louder?"""

    sample_rate, clip_length, n_features = RATE, LENGTH, 2
    labels, fingerprint = ["early", "late"], "halves"

    def forward(self, wavs):
        energy = wavs.view(len(wavs), 2, -1).square().sum(2)
        return energy, energy


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Ten real words, four test words, and five generated ones of which two are copies."""
    monkeypatch.setattr(classifier, "load_classifier", lambda *args, **kwargs: Halves())
    for kind, seeds in {"real": range(10), "test": range(50, 54)}.items():
        for i in seeds:
            audio.write(tmp_path / kind / f"{i}.wav", word(i), RATE)
        rows = [f"{tmp_path / kind / f'{i}.wav'}\n" for i in seeds]
        (tmp_path / f"{kind}.csv").write_text("path\n" + "".join(rows))
    for i in (70, 71):
        audio.write(tmp_path / "generated" / f"{i}.wav", word(i), RATE)
    audio.write(tmp_path / "generated" / "72.wav", torch.zeros(500), RATE)
    audio.write(tmp_path / "generated" / "copy 3.wav", COPIES["all of it"](word(3)), RATE)
    double = audio.resample(word(8), RATE, 2 * RATE).clamp(-1, 1)
    audio.write(tmp_path / "generated" / "copy 8.wav", double, 2 * RATE)
    return tmp_path


def arguments(folders: Path) -> list[str]:
    return [
        f"samples={folders / 'generated'}", f"real_csv={folders / 'real.csv'}", "bins=2",
        f"test_csv={folders / 'test.csv'}", "nearest=true", "cache_dir=none",
    ]  # fmt: skip


def test_the_nearest_parts_of_a_recording_are_found_and_named(folders):
    wavs = [padded(word(i)) for i in range(10)]
    audio.write(folders / "all.wav", torch.cat(wavs), RATE)
    rows = [f"{folders / 'all.wav'},{i},{i + 1}\n" for i in range(10)]
    (folders / "real.csv").write_text("path,start,stop\n" + "".join(rows))
    assert main(arguments(folders)) == 0
    written = json.loads((folders / "generated" / "scores.json").read_text())
    closest = written["nearest"]["generated"]["closest"][:2]
    found = {Path(pair["file"]).name: Path(pair["nearest"]).name for pair in closest}
    assert found == {"copy 3.wav": "all.wav#t=3,4", "copy 8.wav": "all.wav#t=8,9"}
    assert "dB from all.wav#t=3,4" in (folders / "generated" / "scores.html").read_text()


def test_the_command_names_the_copies(folders, monkeypatch, capsys):
    monkeypatch.setattr(report, "N_WORST", 0)
    assert main(arguments(folders)) == 0
    out = capsys.readouterr().out
    assert "nearest, dB" in out.splitlines()[0]
    assert "generated: 2 of its clips count as copies of real ones, above all copy " in out
    assert "generated: no nearest clip of 1 silent ones" in out

    written = json.loads((folders / "generated" / "scores.json").read_text())
    facts = written["nearest"]
    names = lambda pair: (Path(pair["file"]).name, Path(pair["nearest"]).name)  # noqa: E731
    pairs = dict(map(names, facts["generated"]["closest"]))
    assert len(pairs) == 4
    assert set(list(pairs)[:2]) == {"copy 3.wav", "copy 8.wav"}
    assert pairs["copy 3.wav"] == "3.wav" and pairs["copy 8.wav"] == "8.wav"
    delays = {names(pair)[0]: pair["delay"] for pair in facts["generated"]["closest"]}
    assert delays["copy 3.wav"] == pytest.approx(0.053, abs=0.003)
    copies = {kind: facts[kind]["copies"] for kind in ("real", "test", "generated")}
    assert copies == {"real": 0, "test": 0, "generated": 2}
    assert facts["copy_limit"] == facts["real"]["median"] / 2 > 3
    assert all(a != b for a, b in map(names, facts["real"]["closest"])), "leave-one-out"
    for row in written["scores"]:
        assert row["scores"]["nearest"] == facts[row["kind"]]["median"]

    page = (folders / "generated" / "scores.html").read_text()
    assert "<h2>Nearest neighbours</h2>" in page
    pairs_part = page.split("The clips closest to real ones")[1]
    assert pairs_part.count("<article>") == 6 and "dB from 3.wav" in pairs_part


def test_it_is_off_unless_asked_for(folders):
    args = dict(text.split("=") for text in arguments(folders)) | {"cache_dir": None, "bins": 2}
    result = run(MetricsConfig(**args | {"nearest": False}), Halves())
    assert result.nearest == {} and "nearest" not in result.facts
    assert all("nearest" not in row.scores for row in result.rows)


def test_many_real_clips_are_sampled_for_the_reference_and_compared_with_all(folders, monkeypatch):
    monkeypatch.setattr(nearest, "MAX_REAL", 4)
    monkeypatch.setattr(nearest, "BLOCK", 3)
    args = dict(text.split("=") for text in arguments(folders)) | {"cache_dir": None, "bins": 2}
    found = run(MetricsConfig(**args), Halves()).nearest
    assert len(found["real"]) == 4 and (np.diff(found["real"].rows) > 0).all()
    assert (found["real"].index != found["real"].rows).all()
    assert found["generated"].index.tolist()[-2:] == [3, 8]
