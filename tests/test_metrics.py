"""`python -m metrics`: from files to scores, the cache in between, and what goes wrong.

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
from commands import error_of

from metrics import __main__ as command
from metrics import am_score, fid, inception_score, ndb, pictures, report, scores
from metrics.__main__ import MetricsConfig, main, run
from metrics.classifier import load_classifier
from metrics.features import extract, listed, read_published
from metrics.rejection import by_likelihood
from rawaudio import audio
from rawaudio.data import Clip
from rawaudio.hub import load_named

RATE, LENGTH, TONES = 8000, 2000, (400, 800, 1600, 3200)


class Tones(torch.nn.Module):
    """Which of four tones: what metrics.classifier promises. Features: energies around them."""

    sample_rate, clip_length, n_features = RATE, LENGTH, 4
    labels = ["low", "middle", "high", "top"]

    def __init__(self, fingerprint="tones", limit=10**9):
        super().__init__()
        self.seen, self.fingerprint, self.limit = 0, fingerprint, limit

    def forward(self, wavs):
        assert wavs.shape[1:] == (LENGTH,) and wavs.dtype == torch.float32
        if self.seen >= self.limit:
            raise KeyboardInterrupt
        self.seen += len(wavs)
        spectrum = torch.fft.rfft(wavs).abs()
        bins = [round(f * LENGTH / RATE) for f in TONES]
        energy = torch.stack([spectrum[:, k - 20 : k + 20].square().sum(1) for k in bins], 1)
        energy = energy / spectrum.square().sum(1, keepdim=True).clamp(min=1e-9)
        return 12 * energy, (energy + 1e-3).log()


def noise(seed: int, level: float, samples: int = LENGTH) -> torch.Tensor:
    return level * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def tone(label: int, seed: int, noisy: float = 0.003, samples: int = LENGTH) -> torch.Tensor:
    f, phase = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    turns = TONES[label] * (1 + 0.02 * f) * torch.arange(samples) / RATE + phase
    return (0.3 * torch.sin(2 * torch.pi * turns) + noise(seed + 1, noisy, samples)).clamp(-1, 1)


def write_csv(path: Path, *rows: tuple) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_clips(folder: Path, n: int, seed: int = 0) -> Path:
    """n clips, and split.csv with their labels."""
    for i in range(n):
        audio.write(folder / f"{i:04d}.wav", tone(i % 4, seed + i), RATE)
    rows = [(f"{i:04d}.wav", Tones.labels[i % 4]) for i in range(n)]
    write_csv(folder / "split.csv", ("path", "label"), *rows)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("real"), 80) / "split.csv"


@pytest.fixture
def samples(tmp_path):
    return write_clips(tmp_path / "samples", 40, seed=1000)


@pytest.fixture(autouse=True)
def tones(monkeypatch):
    """The stand-in in place of any classifier, and few clips on the pages."""
    monkeypatch.setattr(command, "load_classifier", lambda *args, **kwargs: Tones())
    monkeypatch.setattr(report, "N_WORST", 2)


def run_tones(real, samples, **settings):
    """The report of the samples, and the scores of them."""
    settings = {"bins": 4, "cache_dir": None} | settings
    result = run(MetricsConfig(samples=str(samples), real_csv=str(real), **settings), Tones())
    return result, result.rows[-1].scores


def names(clips: list[Clip]) -> list[str]:
    return [clip.path.name for clip in clips]


def test_scores_are_those_of_the_classifiers_outputs(real, samples):
    result, made = run_tones(real, samples, test_csv=str(real))
    assert [(row.kind, row.clips) for row in result.rows] == [
        ("real", 80), ("test", 80), ("generated", 40),
    ]  # fmt: skip
    assert result.rows[1].scores["fid"] == pytest.approx(0, abs=1e-9)

    def by_hand(folder):
        wavs = [audio.read(path)[0] for path in sorted(folder.glob("*.wav"))]
        logits, x = Tones()(torch.stack(wavs))
        return logits.double().softmax(1), x

    (q, y), (p, x) = by_hand(real.parent), by_hand(samples)
    assert made["fid"] == pytest.approx(fid(y, x), rel=1e-6)
    assert made["is"] == pytest.approx(inception_score(p), rel=1e-6)
    assert made["am"] == pytest.approx(am_score(q, p), rel=1e-6)
    assert made["ndb"] == ndb(y, x, bins=4) == 0
    assert made["sure"] == (p.amax(1) >= 0.9).double().mean()


def test_clips_are_resampled_cut_and_padded_with_a_note(tmp_path, real):
    folder = tmp_path / "other"
    audio.write(folder / "long.wav", tone(0, 1, samples=3 * LENGTH), RATE)
    audio.write(folder / "short.wav", tone(1, 1, samples=LENGTH // 2), RATE)
    audio.write(folder / "double.wav", audio.resample(tone(2, 1), RATE, 2 * RATE), 2 * RATE)
    for _ in range(2):  # the second time from the cache
        result, _ = run_tones(real, folder, cache_dir=str(tmp_path / "cache"))
        assert result.sets["generated"].probs.argmax(1).tolist() == [2, 0, 1]
        assert "generated: 1 clips resampled from 16,000 to 8,000 Hz" in result.notes
        assert "generated: 1 clips cut to their first 0.25 s" in result.notes


def test_n_max_draws_clips_at_random_in_their_order(real, samples):
    drawn = []
    for seed in (0, 1):
        result, _ = run_tones(real, samples, n_max=10, seed=seed)
        drawn.append(names(result.sets["generated"].clips))
        assert len(drawn[-1]) == 10 and drawn[-1] == sorted(drawn[-1])
    assert drawn[0] != drawn[1] != [f"{i:04d}.wav" for i in range(10)]


@pytest.fixture
def parts(tmp_path):
    """The samples as parts of one recording: parts.csv, beside it in tmp_path."""
    audio.write(tmp_path / "all.wav", torch.cat([tone(i % 4, 1000 + i) for i in range(40)]), RATE)
    seconds = LENGTH / RATE
    rows = [("all.wav", Tones.labels[i % 4], i * seconds, (i + 1) * seconds) for i in range(40)]
    return write_csv(tmp_path / "parts.csv", ("path", "label", "start", "stop"), *rows)


def test_parts_of_one_recording_score_as_files_of_them(tmp_path, real, samples, parts):
    files, expected = run_tones(real, samples / "split.csv")
    for _ in range(2):  # the second time from the cache
        result, made = run_tones(real, parts, cache_dir=str(tmp_path / "cache"))
        assert (result.sets["generated"].probs == files.sets["generated"].probs).all()
        assert made == expected and made["accuracy"] == 1
    assert not any("cut to" in note for note in result.notes)


def test_what_was_told_is_compared_with_what_is_heard(tmp_path, real):
    """samples.csv of generated clips: ten of forty are told another tone, four others are noise."""
    folder = write_clips(tmp_path / "told", 40, seed=1000)
    told = [(i + (i < 10)) % 4 for i in range(40)]
    for i in range(10, 14):
        audio.write(folder / f"{i:04d}.wav", tone(told[i], i, noisy=0.5), RATE)
    rows = [(f"{i:04d}.wav", Tones.labels[label], "ann") for i, label in enumerate(told)]
    write_csv(folder / "samples.csv", ("file", "label", "speaker"), *rows)
    result, made = run_tones(real, folder)
    assert 0.65 <= made["accuracy"] <= 0.75 and made["heard"] == 0.65
    clips = result.sets["generated"]
    heard = pictures.confusion(clips.probs, clips.truth(Tones.labels))
    assert heard.trace() == pytest.approx(4 * made["accuracy"], abs=0.1)
    assert heard[1, 0] > 0.2, "low tones that were told to be middle ones"
    assert np.allclose(heard.sum(1), 1) and clips.truth(["low", "high"]) is None
    report.write_page(tmp_path / "page.html", result)
    assert "told low · low" in (tmp_path / "page.html").read_text()


def test_labels_that_the_classifier_does_not_know_give_no_accuracy(tmp_path, real, samples):
    other = tmp_path / "other.csv"
    other.write_text(f"path,label\n{samples / '0000.wav'},one\n{samples / '0001.wav'},two\n")
    result, _ = run_tones(real, samples, test_csv=str(other))
    assert ["accuracy" in row.scores for row in result.rows] == [True, False, False]
    assert any("test: no accuracy" in note for note in result.notes)


def write_likelihoods(folder: Path, values) -> None:
    rows = [(f"{i:04d}.wav", value) for i, value in enumerate(values)]
    write_csv(folder / "log_likelihood.csv", ("file", "log_likelihood"), *rows)


def test_rejection_scores_the_likely_part_of_the_second_half(tmp_path, real):
    """The least likely third is noise, and rejected."""
    folder = write_clips(tmp_path / "samples", 120, seed=1000)
    for i in range(40):
        audio.write(folder / f"{i:04d}.wav", noise(i, 0.1), RATE)
    result, made = run_tones(real, folder, threshold=True)
    facts = result.facts["thresholds"]
    assert facts["lower"] >= 0.3 and facts["tuned_on"] == facts["kept_of"] == 60
    _, held = scores.split_halves(120)
    kept = held[scores.kept(60, facts["lower"], facts["upper"])]
    assert names(result.sets["generated"].clips) == [f"{i:04d}.wav" for i in kept]
    _, plain = run_tones(real, folder)
    assert made["fid"] < plain["fid"] and made["sure"] > plain["sure"]


def test_published_rejection_takes_the_published_clips(real, samples):
    settings = {"threshold": True, "protocol": "published", "test_csv": str(real)}
    result, made = run_tones(real, samples, **settings)
    _, held = scores.split_halves(40, protocol="published", n_test=80)
    assert result.facts["thresholds"]["lower"] == pytest.approx(0.4)
    assert names(result.sets["generated"].clips) == [f"{i:04d}.wav" for i in held[8:19]]
    assert made["is"] == inception_score(result.sets["generated"].probs, "published")


def test_likelihoods_order_the_clips_not_their_names(samples):
    clips = listed(samples)
    assert by_likelihood(samples, clips) == clips
    values = np.random.default_rng(0).permutation(40).astype(float)
    write_likelihoods(samples, values)
    order = [int(clip.path.stem) for clip in by_likelihood(samples, clips)]
    assert order == np.argsort(values).tolist()
    for values, message in (([1.0] * 39, "lacks '0039.wav'"), ("x" * 40, "'x'"),
                            ([float("nan")] * 40, "without a value")):  # fmt: skip
        write_likelihoods(samples, values)
        with pytest.raises(ValueError, match=message):
            by_likelihood(samples, clips)


@pytest.fixture
def cached(tmp_path, samples):
    """extract of the samples, through a cache."""

    def extracted(model, **more):
        args = {"cache_dir": tmp_path / "cache", "source": samples, "batch_size": 10} | more
        return extract("generated", listed(samples), model, **args)

    return extracted


def test_only_what_changed_is_classified_again(tmp_path, samples, cached):
    model = Tones()
    first, second = cached(model, batch_size=7), cached(model)
    assert model.seen == 40 and len(list((tmp_path / "cache").iterdir())) == 1
    assert (first.probs == second.probs).all() and (first.features == second.features).all()
    stat = (samples / "0003.wav").stat()
    audio.write(samples / "0003.wav", tone(0, 77), RATE)  # was class 3; same size, same date
    os.utime(samples / "0003.wav", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(samples / "0001.wav", samples / "0041.wav")  # another name, the same sound
    changed = cached(model)
    assert model.seen == 41
    assert first.probs[3].argmax() == 3 and changed.probs[2].argmax() == 0
    assert (changed.probs[-1] == first.probs[1]).all()


def test_outputs_of_another_classifier_are_not_taken(tmp_path, cached, capsys):
    """Nor under the right name."""
    cached(Tones())
    (path,) = (tmp_path / "cache").iterdir()
    other = Tones("tones, trained further")
    cached(other)
    assert other.seen == 40
    (right,) = {*(tmp_path / "cache").iterdir()} - {path}
    right.write_bytes(path.read_bytes())
    cached(other)
    assert other.seen == 80 and "of another classifier" in capsys.readouterr().err


def test_an_interruption_keeps_the_clips_that_are_done_and_no_others_are_kept_for_ever(
    tmp_path, samples, cached
):
    for seed in (0, 100):  # of other clips
        write_clips(samples, 40, seed=seed)
        with pytest.raises(KeyboardInterrupt):
            cached(Tones(limit=20))
        model = Tones()
        cached(model)
        assert model.seen == 20
    (path,) = (tmp_path / "cache").iterdir()
    with np.load(path) as file:
        assert len(file["digests"]) == 40


def test_a_damaged_cache_is_made_again(tmp_path, cached, capsys):
    first = cached(Tones())
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for k in range(12):
        broken = bytearray(whole)
        place = int(rng.integers(len(whole)))
        broken[place] ^= 0xFF
        path.write_bytes(broken[:place] if k % 3 == 0 else b"" if k == 1 else broken)
        again = cached(Tones())
        assert (again.probs == first.probs).all() and (again.features == first.features).all()
        assert capsys.readouterr().err.count("\n") <= 1, "one line of notice at most"
        assert path.read_bytes()[:2] == b"PK"


def test_a_folder_that_cannot_hold_the_cache_is_no_error(tmp_path, cached, capsys):
    (tmp_path / "file").write_text("")
    assert len(cached(Tones(), cache_dir=tmp_path / "file" / "cache")) == 40
    assert "not kept" in capsys.readouterr().err


def write_published(folder: Path, split: str, n: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{split}_probs.npy", rng.dirichlet(np.ones(4), n).astype(np.float32))
    np.save(folder / f"{split}_activations.npy", rng.normal(size=(n, 4)).astype(np.float32))


def test_published_caches_take_the_place_of_clips(tmp_path, samples):
    folder = tmp_path / "cache"
    write_published(folder, "train", 60)
    write_published(folder, "test", 30)
    settings = {"published_cache": str(folder), "bins": 4, "cache_dir": None}
    result = run(MetricsConfig(samples=str(samples), **settings), Tones())
    counts = {row.kind: row.clips for row in result.rows}
    assert counts == {"real": 60, "test": 30, "generated": 40}
    x = np.load(folder / "train_activations.npy")
    assert result.rows[-1].scores["fid"] == fid(x, result.sets["generated"].features)
    alone = run(MetricsConfig(**settings))
    assert alone.rows[1].scores == result.rows[1].scores, "no classifier is needed for these"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [("probs", None, "train_probs.npy is not there"),
     ("probs", b"text", "train_probs.npy is damaged"),
     ("probs", np.array([{}, {}]), "damaged"),
     ("probs", np.ones((60, 10)), "10 columns, classifier= gives 4.*another classifier"),
     ("probs", np.ones((60, 4)), "rows sum to 1"),
     ("probs", np.ones(60), "expected an array of numbers"),
     ("activations", np.ones((60, 7)), "7 columns, classifier= gives 4"),
     ("activations", np.ones((50, 4)), "50: they are of different runs"),
     ("activations", np.full((60, 4), np.nan), "NaN")],
)  # fmt: skip
def test_published_caches_that_do_not_fit_are_refused(tmp_path, file, content, message):
    write_published(tmp_path / "cache", "train", 60)
    path = tmp_path / "cache" / f"train_{file}.npy"
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises((ValueError, OSError), match=message):
        read_published("real", tmp_path / "cache", "train", Tones())


def score(samples, *args: str) -> tuple[dict, str]:
    """scores.json and the page of the command, in the folder `out` beside the samples."""
    out = samples.parent / "out"
    assert main([f"samples={samples}", f"out_dir={out}", "bins=4", "cache_dir=none", *args]) == 0
    page = out / "scores.html"
    written = json.loads((out / "scores.json").read_text(), parse_constant=pytest.fail)
    return written, page.read_text() if page.exists() else ""


def test_broken_clips_are_counted_and_listed(real, samples, capsys):
    (samples / "0005.wav").write_bytes(b"RIFF")
    (samples / "0006.wav").write_bytes(b"")
    audio.write(samples / "0007.wav", torch.zeros(LENGTH), RATE)  # silence is no error
    expected = ["0005.wav", "0006.wav"]
    try:
        os.rename(samples / "0008.wav", os.fsencode(samples) + b"/caf\xe9.wav")
        expected.append("caf\\udce9.wav")
    except OSError:  # names are always UTF-8 here
        (samples / "0008.wav").unlink()
    written, page = score(samples, f"real_csv={real}", "page=false")
    broken = {Path(entry["file"]).name: entry["reason"] for entry in written["broken"]}
    assert list(broken) == expected
    assert "not UTF-8" in broken.get("caf\\udce9.wav", "not UTF-8")
    used = 40 - 1 - 2
    assert written["scores"][-1]["clips"] == used and not page
    printed = capsys.readouterr()
    assert f"{used} of {used + len(broken)} clips used, {len(broken)} broken" in printed.out
    assert "left out" in printed.err and "0005.wav" in printed.err


def test_tables_and_pages_tell_the_part(tmp_path, real, parts):
    parts.write_text(parts.read_text() + "all.wav,low,99,100\n")
    written, page = score(parts, f"real_csv={real}")
    (broken,) = written["broken"]
    assert broken["file"] == f"{tmp_path}/all.wav#t=99,100" and "too short" in broken["reason"]
    assert "all.wav#t=" in page
    wav = base64.b64decode(re.search(r'src="data:audio/[a-z]+;base64,([^"]+)"', page)[1])
    assert len(soundfile.read(io.BytesIO(wav))[0]) == LENGTH, "the part alone is played"


def test_names_of_files_are_no_markup_in_scores_md():
    row = report.Row("generated", "a|b_*c*<d>\n[e](f)", 3, {"is": 2.0})
    made = report.Report("x", [row], ["generated: `g`_h_"], ["0"], {}, None, {})
    *_, line, _, note = report.markdown(made).splitlines()
    assert line.startswith(r"| a\|b\_\*c\*\<d\>\\n\[e\](f) | 3 |")
    assert note == r"- generated: \`g\`\_h\_"


def test_the_command_writes_a_table_json_markdown_and_a_page(tmp_path, real, samples, capsys):
    written, page = score(samples, f"real_csv={real}", f"test_csv={real}", "bootstrap=10")
    out = capsys.readouterr().out
    heads = "clips|FID|IS|mIS|AM|NDB|≥ 90% sure|accuracy|heard, ≥ 90% sure".split("|")
    assert re.search(rf"^ +{' +'.join(heads)}$", out, re.M)
    assert re.search(r"^samples +40 ", out, re.M)
    row = written["scores"][-1]
    assert row["kind"] == "generated" and row["clips"] == 40 and row["scores"]["sure"] == 1
    assert row["intervals"].keys() == row["scores"].keys()
    assert all(low <= row["scores"][k] <= high for k, (low, high) in row["intervals"].items())
    assert written["classifier"]["fingerprint"] == "tones" and written["protocol"] == "exact"
    assert sum(written["classes"]["generated"].values()) == pytest.approx(1)
    lines = (tmp_path / "out" / "scores.md").read_text().splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[4].count("|") == len(heads) + 2
    assert page.count("<article>") == 7 + 4 + 2, "pictures, a clip of each class, the worst"
    assert "http" not in re.sub(r'"data:[^"]*"', "", page), "the page needs no other file"
    table = page[page.index("<table>") : page.index("</table>")]
    assert table.count('scope="col"') == 3 and table.count('scope="row"') == len(heads)
    assert "white-space: nowrap" not in page and "overflow-x" not in page, "it fits a phone"
    assert len(re.findall(r'<img alt="[^"]+"', page)) == page.count("<img")


def test_the_page_of_few_and_strange_clips(tmp_path):
    """Two clips of one class, no real ones; names that are not HTML."""
    folder = tmp_path / "<b>&"
    for name in ("<i>.wav", "2&.wav"):
        audio.write(folder / name, torch.zeros(10), RATE)
    (folder / "<broken>.wav").write_bytes(b"")
    written, page = score(folder)
    assert set(written["scores"][0]["scores"]) == {"is", "mis", "sure"}
    assert any("real_csv=" in note for note in written["notes"])
    assert "&lt;i&gt;.wav" in page and "<i>.wav" not in page and "<b>" not in page
    assert "1 clip left out" in page and "&lt;broken&gt;.wav: empty" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [("", "samples is required"),
     ("samples=missing", "missing is not there"),
     ("samples={empty}", "no audio in this folder"),
     ("samples={samples} real_csv=missing.csv", "missing.csv is not there"),
     ("samples={samples} real_csv={samples}/split.csv", "bins=50: at most as many as"),
     ("samples={samples} protocol=fast", "expected exact or published"),
     ("samples={samples} bins=0", "bins=0: must be at least 1"),
     ("samples={samples} bootstrap=1", "bootstrap=1"),
     ("samples={samples} threshold=true n_max=12", "at least 20 clips"),
     ("test_csv={samples}/split.csv threshold=true", "threshold=true rejects samples"),
     ("samples={samples} real_csv=x published_cache=x", "leave one"),
     ("samples={samples} nearest=true", "audio of real clips: write real_csv="),
     ("samples={samples} nearest=true published_cache=x", "write real_csv="),
     ("samples={samples} published_cache={empty}", "train_probs.npy is not there"),
     ("samples={broken}", "none of 2 clips can be used"),
     ("samples={one}", "one clip has no scores"),
     ("samples={samples} out_dir={samples}/0000.wav", "0000.wav"),
     ("samples={samples} claßifier=x", "unknown setting")],
)  # fmt: skip
def test_bad_settings_end_in_one_line(tmp_path, samples, capsys, settings, message):
    places = {name: tmp_path / name for name in ("empty", "broken", "one", "samples")}
    for name in ("empty", "broken"):
        places[name].mkdir()
    audio.write(places["one"] / "1.wav", tone(0, 0), RATE)
    for name in ("1.wav", "2.wav"):
        (places["broken"] / name).write_text("not audio")
    assert message in error_of(main, [*settings.format(**places).split(), "cache_dir=none"], capsys)


def test_a_classifier_that_gives_nan_is_named(samples):
    class Damaged(Tones):
        def forward(self, wavs):
            logits, x = super().forward(wavs)
            return logits * float("nan"), x

    with pytest.raises(ValueError, match="gives NaN for 40 clips, the first is .*0000.wav"):
        extract("generated", listed(samples), Damaged())


def test_digits_of_the_shipped_model_are_nearer_to_each_other_than_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_classifier", load_classifier)
    wavs = load_named("sashimi_ar_digits", device="cpu").generate(
        24, length=8000, generator=torch.Generator().manual_seed(0), progress=False, label="seven"
    )
    for i, wav in enumerate(wavs):
        audio.write(tmp_path / ("real" if i % 2 else "other") / f"{i}.wav", wav, 8000)
        audio.write(tmp_path / "noise" / f"{i}.wav", noise(i, 0.1, 8000), 8000)
    write_csv(tmp_path / "real.csv", ("path",), *((p,) for p in (tmp_path / "real").iterdir()))
    settings = {"real_csv": str(tmp_path / "real.csv"), "bins": 5, "cache_dir": None}
    other, noisy = (
        run(MetricsConfig(samples=str(tmp_path / kind), **settings)).rows[-1].scores
        for kind in ("other", "noise")
    )
    assert noisy["fid"] > 2 * other["fid"] and noisy["ndb"] > other["ndb"]
    assert noisy["sure"] < 0.1
