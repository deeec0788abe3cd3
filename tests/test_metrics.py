"""`python -m metrics`: from files to scores, what is kept in between, and what goes wrong.

A small stand-in classifies tones by their frequency: what the scores need, in no time.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from metrics import __main__ as command
from metrics import am_score, classifier, features, fid, inception_score, ndb, report, scores
from metrics.__main__ import MetricsConfig, by_likelihood, main, run
from metrics.features import ClipSet, extract, listed, read_published
from metrics.report import feature_map, pair_divergences, recall
from rawaudio import audio
from rawaudio.data import Clip

RATE, LENGTH, TONES = 8000, 2000, (400, 800, 1600, 3200)


class Tones(torch.nn.Module):
    """Which of four tones: what metrics.classifier promises. Features: energies around them."""

    sample_rate, clip_length, n_features = RATE, LENGTH, 4
    labels = ["low", "middle", "high", "top"]
    fingerprint = "tones"

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, wavs):
        assert wavs.shape[1:] == (LENGTH,) and wavs.dtype == torch.float32
        self.seen += len(wavs)
        spectrum = torch.fft.rfft(wavs).abs()
        bins = [round(f * LENGTH / RATE) for f in TONES]
        energy = torch.stack([spectrum[:, k - 20 : k + 20].square().sum(1) for k in bins], 1)
        energy = energy / spectrum.square().sum(1, keepdim=True).clamp(min=1e-9)
        return 12 * energy, (energy + 1e-3).log()


def tone(label: int, seed: int, noise: float = 0.0, samples: int = LENGTH) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    f, phase = TONES[label] * (1 + 0.02 * torch.rand(1, generator=g)), torch.rand(1, generator=g)
    wav = 0.3 * torch.sin(2 * torch.pi * (f * torch.arange(samples) / RATE + phase))
    wav = wav + 0.003 * torch.randn(samples, generator=g)
    return (wav + noise * torch.randn(samples, generator=g)).clamp(-1, 1)


def write_clips(folder: Path, n: int, seed: int = 0, noise: float = 0.0, labels=range(4)) -> Path:
    """n clips, and split.csv with their labels."""
    rows = []
    for i in range(n):
        label = list(labels)[i % len(labels)]
        audio.write(folder / f"{i:04d}.wav", tone(label, seed + i, noise), RATE)
        rows.append((f"{i:04d}.wav", Tones.labels[label]))
    with (folder / "split.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("real"), 80) / "split.csv"


@pytest.fixture
def samples(tmp_path):
    return write_clips(tmp_path / "samples", 40, seed=1000)


@pytest.fixture
def tones(monkeypatch):
    """The stand-in in place of any classifier, and few enough bins for it."""
    model = Tones()
    monkeypatch.setattr(classifier, "load_classifier", lambda *args, **kwargs: model)
    return model


def config(tmp_path, real, samples, **settings) -> MetricsConfig:
    settings = {"bins": 4, "cache_dir": str(tmp_path / "cache")} | settings
    return MetricsConfig(samples=str(samples), real_csv=str(real), **settings)


def scored(result, kind="generated"):
    return next(row.scores for row in result.rows if row.kind == kind)


# ---- scores of files ------------------------------------------------------------------------


def test_scores_are_those_of_what_the_classifier_says(tmp_path, real, samples):
    found = scored(run(config(tmp_path, real, samples), Tones()))

    def by_hand(paths):
        with torch.inference_mode():
            logits, x = Tones()(torch.stack([audio.read(p)[0] for p in sorted(paths)]))
        return logits.double().softmax(1), x

    (q, y), (p, x) = by_hand(real.parent.glob("*.wav")), by_hand(samples.glob("*.wav"))
    assert found["fid"] == pytest.approx(fid(y, x), rel=1e-6)
    assert found["is"] == pytest.approx(inception_score(p), rel=1e-6)
    assert found["am"] == pytest.approx(am_score(q, p), rel=1e-6)
    assert found["ndb"] == ndb(y, x, bins=4) == 0
    assert found["sure"] == (p.amax(1) >= 0.9).double().mean()


def test_every_score_is_worse_the_noisier_the_clips(tmp_path, real):
    rows = []
    for noise in (0.0, 0.1, 0.3, 1.0, 4.0):
        folder = write_clips(tmp_path / f"noise{noise}", 40, seed=1000, noise=noise)
        rows.append(scored(run(config(tmp_path, real, folder, bins=8), Tones())))
    for key, sign in (("fid", 1), ("am", 1), ("is", -1), ("mis", -1), ("sure", -1), ("ndb", 1)):
        values = np.array([sign * row[key] for row in rows])
        steps = np.diff(values)
        counts = key in ("sure", "ndb")  # of few clips or bins: may stay the same for a step
        assert (steps >= 0).all() if counts else (steps > 0).all(), (key, values)
        assert values[-1] > values[0]


def test_every_score_is_worse_without_a_class(tmp_path, real, samples):
    full = scored(run(config(tmp_path, real, samples), Tones()))
    part = write_clips(tmp_path / "part", 40, seed=1000, labels=(0, 1, 2))
    less = scored(run(config(tmp_path, real, part), Tones()))
    assert less["fid"] > full["fid"] and less["am"] > full["am"] and less["ndb"] > full["ndb"]
    assert less["is"] < full["is"] and less["mis"] < full["mis"]


def test_real_clips_score_as_if_generated(tmp_path, real):
    """A CSV of samples: the training clips themselves, and their accuracy."""
    result = run(config(tmp_path, real, real, test_csv=str(real)), Tones())
    kinds = [row.kind for row in result.rows]
    assert kinds == ["real", "test", "generated"]
    for row in result.rows:
        assert row.scores["fid"] == pytest.approx(0, abs=1e-9) and row.scores["ndb"] == 0
        assert row.scores["accuracy"] == 1 and row.clips == 80


def test_without_real_clips_there_are_fewer_scores(tmp_path, samples):
    result = run(MetricsConfig(samples=str(samples), cache_dir=None), Tones())
    assert set(scored(result)) == {"is", "mis", "sure"}
    assert any("real_csv=" in note for note in result.notes)


def test_intervals_hold_the_scores(tmp_path, real, samples):
    result = run(config(tmp_path, real, samples, bootstrap=30), Tones())
    row = result.rows[-1]
    assert set(row.intervals) == {"fid", "is", "mis", "am", "ndb", "sure"}
    assert all(low <= row.scores[key] <= high for key, (low, high) in row.intervals.items())


def test_clips_are_resampled_cut_and_padded_and_it_is_said(tmp_path, real):
    folder = tmp_path / "other"
    audio.write(folder / "long.wav", tone(0, 1, samples=3 * LENGTH), RATE)
    audio.write(folder / "short.wav", tone(1, 1, samples=LENGTH // 2), RATE)
    audio.write(folder / "double.wav", audio.resample(tone(2, 1), RATE, 2 * RATE), 2 * RATE)
    result = run(config(tmp_path, real, folder), Tones())
    assert result.sets["generated"].probs.argmax(1).tolist() == [2, 0, 1]
    said = "\n".join(result.notes)
    assert "1 clips resampled from 16,000 to 8,000 Hz" in said
    assert "1 clips cut to their first 0.25 s" in said
    again = run(config(tmp_path, real, folder), Tones())
    assert again.notes == result.notes, "what is kept remembers it"


def test_n_max_draws_clips_at_random_in_their_order(tmp_path, real, samples):
    clips = run(config(tmp_path, real, samples, n_max=10), Tones()).sets["generated"].clips
    names = [clip.path.name for clip in clips]
    assert len(names) == 10 and names == sorted(names) != [f"{i:04d}.wav" for i in range(10)]
    other = run(config(tmp_path, real, samples, n_max=10, seed=1), Tones()).sets["generated"].clips
    assert other != clips


@pytest.fixture
def parts(tmp_path):
    """The samples as parts of one recording: parts.csv, beside them in tmp_path."""
    wavs = [tone(i % 4, 1000 + i) for i in range(40)]
    audio.write(tmp_path / "all.wav", torch.cat(wavs), RATE)
    seconds = [i * LENGTH / RATE for i in range(41)]
    rows = [("all.wav", Tones.labels[i % 4], seconds[i], seconds[i + 1]) for i in range(40)]
    with (tmp_path / "parts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "start", "stop"), *rows])
    return tmp_path / "parts.csv"


def test_parts_of_one_recording_score_as_files_of_them(tmp_path, real, samples, parts):
    files = run(config(tmp_path, real, samples / "split.csv"), Tones())
    for _ in range(2):  # the second time from what is kept
        found = run(config(tmp_path, real, parts), Tones())
        assert (found.sets["generated"].probs == files.sets["generated"].probs).all()
        assert scored(found) == scored(files) and scored(found)["accuracy"] == 1
    assert not any("cut to" in note for note in found.notes)


def test_a_recording_is_hashed_once_and_a_moved_part_is_worked_out_anew(
    tmp_path, parts, monkeypatch
):
    model, hashed, digest = Tones(), [], audio.content_digest
    monkeypatch.setattr(audio, "content_digest", lambda path: hashed.append(path) or digest(path))
    args = {"cache_dir": tmp_path / "cache", "source": parts}
    extract("generated", listed(parts), model, **args)
    assert model.seen == 40 and 1 <= len(set(hashed)) <= len(hashed) <= os.cpu_count()
    parts.write_text(parts.read_text().replace("0.25,0.5", "0.26,0.5"))
    extract("generated", listed(parts), model, **args)
    assert model.seen == 41


def test_tables_and_pages_tell_the_part(tmp_path, real, parts, tones):
    parts.write_text(parts.read_text() + "all.wav,low,99,100\n")
    args = [f"samples={parts}", f"real_csv={real}", f"out_dir={tmp_path / 'out'}", "bins=4"]
    assert main([*args, "cache_dir=none"]) == 0
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    (broken,) = written["broken"]
    assert broken["file"] == f"{tmp_path}/all.wav#t=99,100" and "too short" in broken["reason"]
    page = (tmp_path / "out" / "scores.html").read_text()
    assert "all.wav#t=" in page
    header = re.search(r'src="data:audio/[a-z]+;base64,([^"]+)"', page)[1]
    sound, _ = soundfile.read(io.BytesIO(base64.b64decode(header)))
    assert len(sound) == LENGTH, "the part alone is played"


def test_a_file_with_a_name_that_is_not_utf8_is_left_out_by_name(tmp_path, real, samples, tones):
    try:
        os.rename(samples / "0003.wav", os.fsencode(samples) + b"/caf\xe9.wav")
    except OSError:
        pytest.skip("names are always UTF-8 here")
    assert main([f"samples={samples}", f"real_csv={real}", "bins=4", "cache_dir=none"]) == 0
    written = json.loads((samples / "scores.json").read_text())
    (broken,) = written["broken"]
    assert broken["file"].endswith("caf\\udce9.wav") and "not UTF-8" in broken["reason"]


def test_names_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("10.wav", "9.wav", "a2.wav", "a10.wav", "a.wav", "é².wav", ".hidden.wav"):
        audio.write(tmp_path / name, torch.zeros(10), RATE)
    (tmp_path / "notes.txt").write_text("no audio")
    names = [clip.path.name for clip in listed(tmp_path)]
    assert names == ["9.wav", "10.wav", "a2.wav", "a10.wav", "a.wav", "é².wav"]


# ---- likelihood rejection -------------------------------------------------------------------


def write_likelihoods(folder: Path, values: list[float]) -> None:
    rows = [(f"{i:04d}.wav", value) for i, value in enumerate(values)]
    with (folder / "log_likelihood.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "log_likelihood"), *rows])


def test_rejection_scores_the_kept_part_of_the_second_half(tmp_path, real):
    """The least likely third is noise: it is found, and rejected."""
    folder = write_clips(tmp_path / "samples", 120, seed=1000)
    for i in range(40):
        noise = torch.randn(LENGTH, generator=torch.Generator().manual_seed(i))
        audio.write(folder / f"{i:04d}.wav", 0.1 * noise.clamp(-4, 4), RATE)
    result = run(config(tmp_path, real, folder, threshold=True), Tones())
    facts = result.facts["thresholds"]
    assert facts["lower"] >= 0.3 and facts["tuned_on"] == facts["kept_of"] == 60
    _, held = scores.split_halves(120)
    kept = held[scores.kept(60, facts["lower"], facts["upper"])]
    assert [clip.path.name for clip in result.sets["generated"].clips] == [
        f"{i:04d}.wav" for i in kept
    ]
    plain = run(config(tmp_path, real, folder), Tones())
    assert scored(result)["fid"] < scored(plain)["fid"]
    assert scored(result)["sure"] > scored(plain)["sure"]


def test_published_rejection_takes_the_published_clips(tmp_path, real, samples):
    cfg = config(tmp_path, real, samples, threshold=True, protocol="published", test_csv=str(real))
    result = run(cfg, Tones())
    tune, held = scores.split_halves(40, protocol="published", n_test=80)
    assert result.facts["thresholds"]["lower"] == pytest.approx(0.4)
    names = [clip.path.name for clip in result.sets["generated"].clips]
    assert names == [f"{i:04d}.wav" for i in held[8:19]]
    p = result.sets["generated"].probs
    assert scored(result)["is"] == inception_score(p, "published")


def test_likelihoods_order_the_clips_not_their_names(samples):
    clips = listed(samples)
    assert by_likelihood(samples, clips) == clips
    values = np.random.default_rng(0).permutation(40).astype(float)
    write_likelihoods(samples, values.tolist())
    ordered = by_likelihood(samples, clips)
    assert [int(clip.path.stem) for clip in ordered] == np.argsort(values).tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0] * 39, "lacks '0039.wav'"), ([float("nan")] * 40, "without a value"), ("x" * 40, "'x'")],
)
def test_likelihoods_that_do_not_fit_are_refused(samples, values, message):
    write_likelihoods(samples, values)
    with pytest.raises(ValueError, match=message):
        by_likelihood(samples, listed(samples))


# ---- what is kept ---------------------------------------------------------------------------


def test_a_second_run_asks_the_classifier_nothing(tmp_path, samples):
    model = Tones()
    args = {"cache_dir": tmp_path / "cache", "source": samples, "batch_size": 7}
    first = extract("generated", listed(samples), model, **args)
    assert model.seen == 40
    second = extract("generated", listed(samples), model, **args)
    assert model.seen == 40
    assert (first.probs == second.probs).all() and (first.features == second.features).all()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_what_changed_is_worked_out_anew(tmp_path, samples):
    model = Tones()
    args = {"cache_dir": tmp_path / "cache", "source": samples}
    first = extract("generated", listed(samples), model, **args)
    stat = (samples / "0003.wav").stat()
    audio.write(samples / "0003.wav", tone(0, 77), RATE)  # was class 3; same size, same date
    os.utime(samples / "0003.wav", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(samples / "0001.wav", samples / "0041.wav")  # another name, the same sound
    changed = extract("generated", listed(samples), model, **args)
    assert model.seen == 41
    assert first.probs[3].argmax() == 3 and changed.probs[2].argmax() == 0
    assert (changed.probs[-1] == first.probs[1]).all()


def test_another_classifier_finds_nothing(tmp_path, samples):
    args = {"cache_dir": tmp_path / "cache", "source": samples}
    extract("generated", listed(samples), Tones(), **args)
    other = Tones()
    other.fingerprint = "tones, trained further"
    extract("generated", listed(samples), other, **args)
    assert other.seen == 40


def test_a_cache_of_another_classifier_under_the_right_name_is_refused(tmp_path, samples, capsys):
    args = {"cache_dir": tmp_path / "cache", "source": samples}
    extract("generated", listed(samples), Tones(), **args)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    other = Tones()
    other.fingerprint = "tones, trained further"
    extract("generated", listed(samples), other, **args)
    (right,) = set((tmp_path / "cache").iterdir()) - {path}
    right.write_bytes(whole)
    extract("generated", listed(samples), other, **args)
    assert other.seen == 80 and "of another classifier" in capsys.readouterr().err


def test_bins_are_kept_too(tmp_path, real, samples, monkeypatch):
    first = run(config(tmp_path, real, samples), Tones())
    with monkeypatch.context() as patch:
        patch.delattr(scores, "kmeans")
        again = run(config(tmp_path, real, samples), Tones())
        with pytest.raises(AttributeError):
            run(config(tmp_path, real, samples, bins=3), Tones())
    assert all((a == b).all() for a, b in zip(first.bins, again.bins, strict=True))


def test_a_damaged_cache_is_worked_out_anew(tmp_path, samples, capsys):
    args = {"cache_dir": tmp_path / "cache", "source": samples}
    first = extract("generated", listed(samples), Tones(), **args)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for k in range(12):
        broken = bytearray(whole)
        at = int(rng.integers(len(whole)))
        broken[at] ^= 0xFF
        path.write_bytes(broken[:at] if k % 3 == 0 else b"" if k == 1 else broken)
        again = extract("generated", listed(samples), Tones(), **args)
        assert (again.probs == first.probs).all() and (again.features == first.features).all()
        assert capsys.readouterr().err.count("\n") <= 1, "one line of notice at most"
        assert path.read_bytes()[:2] == b"PK"


def test_an_interruption_keeps_what_was_done(tmp_path, samples):
    class Interrupted(Tones):
        def forward(self, wavs):
            if self.seen >= 20:
                raise KeyboardInterrupt
            return super().forward(wavs)

    args = {"cache_dir": tmp_path / "cache", "source": samples, "batch_size": 10}
    with pytest.raises(KeyboardInterrupt):
        extract("generated", listed(samples), Interrupted(), **args)
    model = Tones()
    extract("generated", listed(samples), model, **args)
    assert model.seen == 20


def test_the_cache_is_bounded(tmp_path, samples, monkeypatch):
    monkeypatch.setattr(features, "ROWS", 50)
    args = {"cache_dir": tmp_path / "cache", "source": samples}
    for seed in (0, 100, 200):
        write_clips(samples, 40, seed=seed)
        extract("generated", listed(samples), Tones(), **args)
    (path,) = (tmp_path / "cache").iterdir()
    with np.load(path) as file:
        assert len(file["digests"]) == 50


def test_a_folder_that_cannot_hold_the_cache_is_no_error(tmp_path, samples, capsys):
    (tmp_path / "file").write_text("")
    found = extract("generated", listed(samples), Tones(), cache_dir=tmp_path / "file" / "cache")
    assert len(found) == 40 and "not kept" in capsys.readouterr().err


# ---- published caches -----------------------------------------------------------------------


def write_published(folder: Path, split: str, n: int, classes: int = 4, width: int = 4) -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(classes), n).astype(np.float32)
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{split}_probs.npy", p)
    x = rng.normal(size=(n, width)).astype(np.float32)
    np.save(folder / f"{split}_activations.npy", x)


def test_published_caches_take_the_place_of_clips(tmp_path, samples):
    write_published(tmp_path / "cache", "train", 60)
    write_published(tmp_path / "cache", "test", 30)
    cfg = MetricsConfig(
        samples=str(samples), published_cache=str(tmp_path / "cache"), bins=4, cache_dir=None
    )
    result = run(cfg, Tones())
    assert [(row.kind, row.clips) for row in result.rows] == [
        ("real", 60), ("test", 30), ("generated", 40),
    ]  # fmt: skip
    x = np.load(tmp_path / "cache" / "train_activations.npy")
    expected = fid(x, result.sets["generated"].features)
    assert scored(result)["fid"] == expected
    alone = run(MetricsConfig(published_cache=str(tmp_path / "cache"), bins=4))
    assert scored(alone, "test") == scored(result, "test"), "no classifier is needed for these"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "train_probs.npy").unlink(), "train_probs.npy is not there"),
        (lambda d: write_published(d, "train", 9, width=7), "7 columns, classifier= gives 4"),
        (lambda d: write_published(d, "train", 9, classes=10), "another classifier"),
        (lambda d: (d / "train_probs.npy").write_bytes(b"text"), "train_probs.npy is damaged"),
        (lambda d: np.save(d / "train_probs.npy", np.ones((60, 4), np.float32)), "rows sum to 1"),
        (lambda d: np.save(d / "train_activations.npy", np.ones((50, 4))), "50: they are of diff"),
        (lambda d: np.save(d / "train_activations.npy", np.full((60, 4), np.nan)), "NaN"),
        (lambda d: np.save(d / "train_probs.npy", np.array([{}, {}])), "damaged"),
        (lambda d: np.save(d / "train_probs.npy", np.ones(60)), "expected an array of numbers"),
    ],
)
def test_published_caches_that_do_not_fit_are_refused(tmp_path, spoil, message):
    write_published(tmp_path / "cache", "train", 60)
    spoil(tmp_path / "cache")
    with pytest.raises((ValueError, OSError), match=message):
        read_published("real", tmp_path / "cache", "train", 4, 4)


# ---- broken clips, the command --------------------------------------------------------------


def test_broken_clips_are_counted_and_listed(tmp_path, real, samples, tones, capsys):
    (samples / "0005.wav").write_bytes(b"RIFF")
    (samples / "0006.wav").write_bytes(b"")
    audio.write(samples / "0007.wav", torch.zeros(LENGTH), RATE)  # silence is no error
    args = [f"samples={samples}", f"real_csv={real}", "bins=4", "cache_dir=none", "page=false"]
    assert main([*args, f"out_dir={tmp_path / 'out'}"]) == 0
    captured = capsys.readouterr()
    assert "38 of 40 clips used, 2 broken" in captured.out
    assert "left out" in captured.err and "0005.wav" in captured.err
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [Path(entry["file"]).name for entry in written["broken"]] == ["0005.wav", "0006.wav"]
    assert written["scores"][-1]["clips"] == 38
    assert not (tmp_path / "out" / "scores.html").exists()


def test_names_of_files_are_no_markup_in_scores_md():
    row = report.Row("generated", "a|b_*c*<d>\n[e](f)", 3, {"is": 2.0})
    made = report.Report("x", [row], ["generated: `g`_h_"], ["0"], {}, None, {})
    *_, line, _, note = report.markdown(made).splitlines()
    assert line.startswith(r"| a\|b\_\*c\*\<d\>\\n\[e\](f) | 3 |")
    assert note == r"- generated: \`g\`\_h\_"


def test_the_command_writes_a_table_json_markdown_and_a_page(
    tmp_path, real, samples, tones, monkeypatch, capsys
):
    monkeypatch.setattr(report, "N_WORST", 2)
    args = [f"samples={samples}", f"real_csv={real}", f"test_csv={real}", "bins=4"]
    assert main([*args, f"cache_dir={tmp_path / 'cache'}", "bootstrap=10"]) == 0
    out = capsys.readouterr().out
    heads = "clips|FID|IS|mIS|AM|NDB|≥ 90% sure|accuracy|heard, ≥ 90% sure".split("|")
    assert re.search(rf"^ +{' +'.join(heads)}$", out, re.M)
    assert re.search(r"^samples +40 ", out, re.M)

    written = json.loads((samples / "scores.json").read_text(), parse_constant=pytest.fail)
    row = written["scores"][-1]
    assert row["kind"] == "generated" and row["clips"] == 40 and row["scores"]["sure"] == 1
    assert written["classifier"]["fingerprint"] == "tones" and written["protocol"] == "exact"
    assert sum(written["classes"]["generated"].values()) == pytest.approx(1)

    lines = (samples / "scores.md").read_text().splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[4].count("|") == len(heads) + 2
    page = (samples / "scores.html").read_text()
    assert page.count("<article>") == 7 + 4 + 2, "pictures, a clip of each class, the worst"
    assert "http" not in re.sub(r'"data:[^"]*"', "", page), "the page needs no other file"
    table = page[page.index("<table>") : page.index("</table>")]
    assert table.count('scope="col"') == 3 and table.count('scope="row"') == len(heads)
    assert "white-space: nowrap" not in page and "overflow-x" not in page, "it fits a phone"
    assert len(re.findall(r'<img alt="[^"]+"', page)) == page.count("<img")


def test_the_page_of_few_and_strange_clips(tmp_path, real, tones):
    """Two clips of one class, no real ones; names that are not HTML."""
    folder = tmp_path / "<b>&"
    for name in ("<i>.wav", "2&.wav"):
        audio.write(folder / name, torch.zeros(10), RATE)
    (folder / "<broken>.wav").write_bytes(b"")
    args = [f"samples={folder}", "cache_dir=none", f"out_dir={tmp_path / 'out'}"]
    assert main(args) == 0
    page = (tmp_path / "out" / "scores.html").read_text()
    assert "&lt;i&gt;.wav" in page and "<i>.wav" not in page and "<b>" not in page
    assert "1 clip left out" in page and "&lt;broken&gt;.wav: empty" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "samples is required"),
        (["samples=missing"], "missing is not there"),
        (["samples={empty}"], "no audio in this folder"),
        (["samples={samples}", "real_csv=missing.csv"], "missing.csv is not there"),
        (
            ["samples={samples}", "real_csv={real}"],
            "bins=50: at most as many as",
        ),
        (["samples={samples}", "protocol=fast"], "expected exact or published"),
        (["samples={samples}", "bins=0"], "bins=0: must be at least 1"),
        (["samples={samples}", "bootstrap=1"], "bootstrap=1"),
        (["samples={samples}", "threshold=true", "n_max=12"], "at least 20 clips"),
        (["test_csv={real}", "threshold=true"], "threshold=true rejects samples"),
        (["samples={samples}", "real_csv={real}", "published_cache=x"], "leave one"),
        (["samples={samples}", "nearest=true"], "audio of real clips: write real_csv="),
        (["samples={samples}", "nearest=true", "published_cache=x"], "write real_csv="),
        (["samples={samples}", "published_cache={empty}"], "train_probs.npy is not there"),
        (["samples={broken}"], "none of 2 clips can be used"),
        (["samples={one}"], "one clip has no scores"),
        (["samples={samples}", "out_dir={file}"], "file"),
        (["samples={samples}", "claßifier=x"], "unknown setting"),
    ],
)
def test_bad_settings_end_in_one_line(tmp_path, tones, samples, capsys, settings, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in ("1.wav", "2.wav"):
        (tmp_path / "broken" / name).write_text("not audio")
    audio.write(tmp_path / "one" / "1.wav", tone(0, 0), RATE)
    (tmp_path / "file").write_text("")
    write_clips(tmp_path / "few", 10)
    places = {name: tmp_path / name for name in ("empty", "broken", "one", "file")}
    places |= {"samples": samples, "real": tmp_path / "few" / "split.csv"}
    args = [text.format(**places) for text in settings] + ["cache_dir=none"]
    try:
        status = main(args)
    except SystemExit as error:
        status = error.code
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_interruption_is_no_traceback(tmp_path, samples, tones, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "extract", interrupt)
    assert main([f"samples={samples}", "cache_dir=none"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_classifier_that_gives_nan_is_named(samples):
    class Damaged(Tones):
        def forward(self, wavs):
            logits, x = super().forward(wavs)
            return logits * float("nan"), x

    with pytest.raises(ValueError, match="gives NaN for 40 clips, the first is .*0000.wav"):
        extract("generated", listed(samples), Damaged())


def test_labels_that_the_classifier_does_not_know_are_said(tmp_path, real, samples):
    other = tmp_path / "other.csv"
    other.write_text(f"path,label\n{samples / '0000.wav'},one\n{samples / '0001.wav'},two\n")
    result = run(config(tmp_path, real, samples, test_csv=str(other)), Tones())
    assert "accuracy" not in scored(result, "test") and "accuracy" in scored(result, "real")
    assert any("test: no accuracy" in note for note in result.notes)


# ---- pictures -------------------------------------------------------------------------------


def clip_set(probs, x=None, labels=()) -> ClipSet:
    probs = np.asarray(probs, float)
    x = np.zeros((len(probs), 3), np.float32) if x is None else np.asarray(x, np.float32)
    return ClipSet("test", probs, x, [Clip(Path(f"{i}"), label) for i, label in enumerate(labels)])


def test_recall_is_the_share_recognised_of_each_class():
    found = clip_set([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.2, 0.8, 0]], labels=["a", "a", "b"])
    assert recall(found, ["a", "b", "c"])[:2].tolist() == [0.5, 1]
    assert np.isnan(recall(found, ["a", "b", "c"])[2])
    assert recall(found, ["b", "c", "d"]) is None


def test_pair_map_averages_to_the_modified_inception_score():
    p = np.random.default_rng(0).dirichlet(np.ones(4) * 0.3, 50)
    values = pair_divergences(clip_set(p))
    share = np.bincount(p.argmax(1), minlength=4) / 50
    mean = share @ np.nan_to_num(values) @ share
    assert np.exp(mean) == pytest.approx(scores.modified_inception_score(p))


def test_feature_map_shows_the_axes_of_most_variance():
    rng = np.random.default_rng(0)
    x = np.zeros((500, 6))
    x[:, 4], x[:, 1] = 10 * rng.normal(size=500), 5 * rng.normal(size=500)
    sets = {"real": clip_set(np.ones((500, 1)), x), "generated": clip_set(np.ones((9, 1)), x[:9])}
    axes = feature_map(sets).axes[0]
    assert re.search(r"1, 8[0-3]%", axes.get_xlabel())
    shown = axes.collections[1].get_offsets()
    assert np.corrcoef(shown[:, 0], x[:9, 4])[0, 1] ** 2 == pytest.approx(1, abs=1e-3)


# ---- the shipped classifier -----------------------------------------------------------------


@pytest.mark.skipif(
    not (Path(classifier.__file__).parent / "weights" / "digits.safetensors").exists(),
    reason="no shipped classifier",
)
def test_digits_of_the_shipped_model_are_nearer_to_each_other_than_noise(tmp_path):
    from rawaudio.hub import load_named

    wavs = load_named("sashimi_ar_digits", device="cpu").generate(
        80, length=8000, generator=torch.Generator().manual_seed(0), progress=False
    )
    for i, wav in enumerate(wavs):
        audio.write(tmp_path / ("real" if i % 2 else "other") / f"{i}.wav", wav, 8000)
        noise = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(i))
        audio.write(tmp_path / "noise" / f"{i}.wav", noise.clamp(-1, 1), 8000)
    rows = [f"{path}\n" for path in (tmp_path / "real").iterdir()]
    (tmp_path / "real.csv").write_text("path\n" + "".join(rows))
    settings = {"real_csv": str(tmp_path / "real.csv"), "bins": 5, "cache_dir": None}
    other = scored(run(MetricsConfig(samples=str(tmp_path / "other"), **settings)))
    noise = scored(run(MetricsConfig(samples=str(tmp_path / "noise"), **settings)))
    assert noise["fid"] > 2 * other["fid"] and noise["ndb"] > other["ndb"]
    assert noise["sure"] < 0.1


# ---- what was told --------------------------------------------------------------------------


def test_what_was_told_is_compared_with_what_is_heard(tmp_path, real):
    """samples.csv of generated clips: ten of forty are told another tone, four others are noise."""
    folder = write_clips(tmp_path / "told", 40, seed=1000)
    told = [(i + (i < 10)) % 4 for i in range(40)]
    for i in range(10, 14):
        audio.write(folder / f"{i:04d}.wav", tone(told[i], i, noise=0.5), RATE)
    rows = [(f"{i:04d}.wav", Tones.labels[label], "ann") for i, label in enumerate(told)]
    with (folder / "samples.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "speaker"), *rows])
    result = run(config(tmp_path, real, folder), Tones())
    found = scored(result)
    assert 0.65 <= found["accuracy"] <= 0.75 and found["heard"] == 0.65
    figure = report.confusion_map(result.sets, result.labels)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["real", "generated"]
    real_map, map_ = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert np.array_equal(real_map, np.eye(4)) and np.allclose(map_.sum(1), 1)
    assert map_.trace() == pytest.approx(4 * found["accuracy"], abs=0.1)
    assert map_[1, 0] > 0.2, "low tones that were told to be middle ones"
    assert "told low · low" in report.page(result)
