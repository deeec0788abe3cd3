"""Whatever happens in between, the files are those of a run that was never interrupted."""

import errno
import fnmatch
import json
import os
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from commands import error_of
from models import make
from training import in_processes

from rawaudio import audio, clips, data, generate, request
from rawaudio.autoregressive import Autoregressive, AutoregressiveSettings
from rawaudio.clips import read_sources
from rawaudio.conditions import Conditions
from rawaudio.generate import main, wav_header
from rawaudio.request import GenerateConfig, fitted
from rawaudio.seeds import seeded
from sashimi import mulaw

RATE, LENGTH = 8000, 400


class Fake(Autoregressive):
    """Noise in place of a network, in no time."""

    def __init__(self, weight: float = 1.0, interrupt_at: int | None = None, **own: float):
        super().__init__()
        self.config = AutoregressiveSettings(sample_rate=RATE, clip_length=LENGTH, **own)
        self.told = Conditions({}, {}, 1)
        self.register_buffer("weight", torch.tensor(weight))
        self.calls, self.interrupt_at = [], interrupt_at

    def generate(self, n, length, prefix, temperature, top_k, generator, **settings):
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        self.calls.append(n)
        q = torch.randint(top_k or 256, (length, n), generator=generator).T
        wavs = mulaw.decode(q) * temperature
        if prefix is not None:
            assert len(prefix) == n
            wavs[:, : prefix.shape[1]] = mulaw.decode(mulaw.encode(prefix))
        return wavs, -wavs.abs().mean(1)

    def stream(self, n, length, prefix, **settings):
        done = 0 if prefix is None else len(prefix)
        prefix = None if prefix is None else prefix[None]
        wavs, _ = self.generate(n, done + length, prefix, **settings)
        yield from wavs[:, done:].split(RATE // 50, 1)


def config(folder: Path, **settings) -> GenerateConfig:
    return GenerateConfig(**{"out_dir": str(folder), "page": False, "n_samples": 5} | settings)


def run(folder: Path, model=None, **settings) -> list[dict[str, str]]:
    """The rows of the table."""
    model = model or Fake()
    clips.run(fitted(config(folder, **settings), model), model)
    return list(data.read_samples(folder).values())


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def faked(monkeypatch):
    """main() with a Fake instead of a trained model."""
    fake = Fake()
    monkeypatch.setattr(generate, "load_asked", lambda *_: fake)
    return fake


@pytest.mark.parametrize(
    "given, model",
    [("seed=1", "asgan_digits"), ("steps=3", "sashimi_diffwave_digits"),
     ("temperature=0.9", "sashimi_ar_digits"), ("play=wav", "sashimi_ar_digits")],
)  # fmt: skip
def test_the_settings_choose_the_model_that_is_understood_best(given, model):
    assert request.parse([given]).model == model


def test_clips_are_sorted_by_log_likelihood_listed_and_shown(tmp_path):
    """With the model's own temperature: another default later is another folder's."""
    rows = run(tmp_path, Fake(temperature=0.5, nucleus_p=0.9), n_batch=2, page=True)
    assert [row["file"] for row in rows] == [f"{i:04d}.wav" for i in range(5)]
    likelihoods = [float(row["log_likelihood"]) for row in rows]
    assert likelihoods == sorted(likelihoods)
    assert sorted(int(row["clip"]) for row in rows) == list(range(5))
    for row in rows:
        wav, rate = audio.read(tmp_path / row["file"])
        assert (rate, len(wav), float(row["seconds"])) == (RATE, LENGTH, LENGTH / RATE)
        assert -wav.abs().mean() == pytest.approx(float(row["log_likelihood"]), abs=1e-4)
        assert wav.abs().max() <= 0.5
    page = (tmp_path / "index.html").read_text()
    assert page.count("<audio") == 5 and "temperature 0.5 · nucleus 0.9" in page
    assert os.listdir(tmp_path / ".generate") == ["settings.json"]
    settings = json.loads((tmp_path / ".generate" / "settings.json").read_text())
    assert (settings["temperature"], settings["nucleus_p"]) == (0.5, 0.9)


def test_batch_k_depends_on_the_seed_and_k_alone(tmp_path):
    def made(name, **settings):
        rows = run(tmp_path / name, n_batch=2, **settings)
        return {row["clip"]: (tmp_path / name / row["file"]).read_bytes() for row in rows}

    short, long = made("short", n_samples=4), made("long", n_samples=6)
    assert len(set(long.values())) == 6 and short == {i: long[i] for i in "0123"}
    assert not set(made("other", n_samples=4, seed=1).values()) & set(long.values())


def test_pages_of_long_lists_show_a_part(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(clips, "write_page", lambda path, clips, *text: shown.append(clips))
    run(tmp_path, n_samples=130, length=20, page=True)
    names = [clip.name for clip in shown[0]]
    assert len(names) == 64 and (names[0], names[-1]) == ("0000.wav", "0129.wav")
    monkeypatch.setattr(clips, "PAGE_SECONDS", 2 * LENGTH / RATE)
    run(tmp_path / "long", page=True)
    assert len(shown[1]) == 2


def diffuser(**settings):
    sizes = {"sample_rate": RATE, "clip_length": LENGTH, "n_mels": 8, "n_fft": 64, "hop": 16}
    return make("diffwave", **sizes, **settings)


def test_diffusion_clips_are_listed_as_they_were_made(tmp_path):
    """In a table without likelihoods; batch 1 is the second of its seed."""
    model = diffuser()
    rows = run(tmp_path, model, n_batch=2, steps=3, sampler="ddim", page=True)
    assert [row["file"] for row in rows] == [f"{i:04d}.wav" for i in range(5)]
    assert [row["clip"] for row in rows] == list("01234") and "log_likelihood" not in rows[0]
    wav, _ = audio.read(tmp_path / "0002.wav")
    expected = model.unconditional_generate(2, 3, "ddim", seeded(0, 1))[0]
    torch.testing.assert_close(wav, expected, atol=1e-4, rtol=0)
    assert (tmp_path / "index.html").read_text().count("<audio") == 5


def test_a_vocoder_speaks_the_spectrogram_of_each_file(prefixes, tmp_path):
    """As long as its source, n_reps times; what is heard is vocode(log_mel(source))."""
    model, out = diffuser(unconditional=False), tmp_path / "out"
    source = prefixes / "a.wav"  # 100 samples: no multiple of the hop
    rows = run(out, model, mel_from=str(source), n_reps=2)
    wav, _ = audio.read(source)
    made = torch.stack([audio.read(out / row["file"])[0] for row in rows])
    mel = model.log_mel(torch.stack([wav, wav]))
    expected = model.vocode(mel, generator=seeded(0, 0))[:, : len(wav)]
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)
    assert [float(row["seconds"]) for row in rows] == [len(wav) / RATE] * 2
    assert all(row["prefix"] == str(source) for row in rows)


@pytest.mark.parametrize(
    "unconditional, settings, message",
    [
        (True, {"temperature": 0.5}, "temperature=0.5: a diffusion model has no temperature"),
        (True, {"play": "wav"}, "play=wav: a diffusion model has no play"),
        (True, {"steps": 201}, "steps=201: must be an integer from 1 to 200"),
        (True, {"sampler": "fast", "steps": 5}, "the fast sampler has exactly 6 steps"),
        (True, {"mel_from": "a.wav"}, "unconditional, not a vocoder"),
        (False, {}, "give it audio with mel_from="),
        (False, {"mel_from": "a.wav", "length": 9}, "length=9"),
    ],
)
def test_settings_of_another_kind_of_model_are_refused(tmp_path, unconditional, settings, message):
    with pytest.raises(ValueError, match=message):
        fitted(config(tmp_path, **settings), diffuser(unconditional=unconditional))


def test_what_was_made_before_an_interruption_is_not_made_again(tmp_path):
    run(tmp_path / "whole", n_batch=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Fake(interrupt_at=2), n_batch=2)
    run(tmp_path / "parts", rest := Fake(), n_batch=2)
    assert rest.calls == [1] and files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_at_any_write_and_continued_is_never_interrupted(tmp_path, monkeypatch, when):
    run(tmp_path / "whole", n_batch=2)
    whole, replace = files(tmp_path / "whole"), os.replace
    for k in range(100):
        folder, count = tmp_path / str(k), iter(range(1000))

        def interrupted(source, target, k=k, count=count):
            stop = next(count) == k
            if not (stop and when == "before"):
                replace(source, target)
            if stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        try:
            run(folder, n_batch=2)
            break  # fewer than k writes: every one of them has had its turn
        except KeyboardInterrupt:
            assert all(soundfile.info(p).frames == LENGTH for p in folder.glob("*.wav"))
        finally:
            monkeypatch.setattr(os, "replace", replace)
        run(folder, n_batch=2)
        assert files(folder) == whole
    assert k == 1 + 5 + 3 + 5 + 1 + 1  # settings, clips, records, moves, CSV, settings


def test_a_second_call_does_nothing_and_says_so(tmp_path, capsys):
    run(tmp_path)
    before = files(tmp_path)
    capsys.readouterr()
    run(tmp_path, again := Fake())
    assert again.calls == [] and files(tmp_path) == before
    assert capsys.readouterr().out == f"nothing to do: all 5 clips are in {tmp_path}\n"
    run(tmp_path, again, page=True)
    assert again.calls == [] and (tmp_path / "index.html").exists(), "only the page was missing"
    (tmp_path / "0001.wav").unlink()
    run(tmp_path, again)
    assert "1 of 5 clips were removed" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_samples": 6}, {"temperature": 0.5}, "model"])
def test_other_settings_never_mix_with_what_is_there(tmp_path, change):
    """Neither in a folder that was begun nor in one that is finished."""
    model, change = (Fake(weight=2.0), {}) if change == "model" else (None, change)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fake(interrupt_at=1), n_batch=2)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"made with another {next(iter(change), 'model')}"):
            run(tmp_path, model, n_batch=2, **change)
        run(tmp_path, n_batch=2)


def test_other_settings_are_taken_before_anything_is_made_and_no_files_of_others(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "begun", Fake(interrupt_at=0))
    assert {row["seed"] for row in run(tmp_path / "begun", seed=1)} == {"1"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        run(tmp_path / "other")
    assert files(tmp_path / "other") == {"index.html": b"mine"}


def test_two_processes_share_the_batches_and_give_the_files_of_one(tmp_path, faked):
    run(tmp_path / "one", n_samples=7, n_batch=2)
    faked.interrupt_at = 2  # a third batch would end a process
    argv = [f"out_dir={tmp_path / 'two'}", "page=false", "n_samples=7", "n_batch=2"]
    in_processes(2, argv, main)
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.fixture
def prefixes(tmp_path) -> Path:
    """A folder of three prefixes, of 100, 100 and 60 samples, and CSVs of the first two."""
    folder = tmp_path / "prefixes"
    for name, size in (("a", 100), ("b", 100), ("c", 60)):
        audio.write(folder / f"{name}.wav", mulaw.decode(torch.arange(size) % 256), RATE)
    (folder / "notes.txt").write_text("no audio")
    (folder / "split.csv").write_text("path,label\na.wav,x\nb.wav,y\n")
    parts = "path,start,stop\na.wav,0.0025,0.005\na.wav,0.0025,\nb.wav,,\n"
    (folder / "parts.csv").write_text(parts)
    return folder


def sources(path: Path, rate: int = RATE, **settings) -> list[tuple[str, int]]:
    """Names and lengths."""
    cfg = config("out", prefix=str(path), length=LENGTH, **settings)
    return [(Path(name).name, len(wav)) for name, wav in read_sources(cfg, rate)]


def test_every_clip_starts_with_its_prefix(prefixes, tmp_path):
    rows = run(tmp_path / "out", fake := Fake(), prefix=str(prefixes), n_reps=2, n_batch=3)
    assert fake.calls == [3, 1, 2], "one length per batch"
    for row in rows:
        start = audio.read(row["prefix"])[0]
        wav = audio.read(tmp_path / "out" / row["file"])[0]
        assert len(wav) == LENGTH and torch.allclose(wav[: len(start)], start, atol=1e-4)
    names = [Path(row["prefix"]).name for row in rows]
    assert sorted(names) == ["a.wav", "a.wav", "b.wav", "b.wav", "c.wav", "c.wav"]


@pytest.mark.parametrize(
    "source, settings, expected",
    [
        ("a.wav", {}, [("a.wav", 100)]),
        ("a.wav", {"l_prefix": 50}, [("a.wav", 50)]),
        ("a.wav", {"rate": 2 * RATE}, [("a.wav", 200)]),
        (".", {}, [("a.wav", 100), ("b.wav", 100), ("c.wav", 60)]),
        (".", {"n_samples": 2}, [("a.wav", 100), ("b.wav", 100)]),
        (".", {"l_prefix": 80}, [("a.wav", 80), ("b.wav", 80)]),
        ("split.csv", {}, [("a.wav", 100), ("b.wav", 100)]),
        ("parts.csv", {}, [("a.wav#t=0.0025,0.005", 20), ("a.wav#t=0.0025", 80), ("b.wav", 100)]),
        ("parts.csv", {"l_prefix": 50}, [("a.wav#t=0.0025", 50), ("b.wav", 50)]),
    ],
)
def test_prefixes_come_from_a_file_a_folder_or_a_split(prefixes, source, settings, expected):
    assert sources(prefixes / source, **settings) == expected


def test_prefixes_that_cannot_be_used_are_left_out_and_named(prefixes, capsys):
    """In a folder and in a CSV; linked folders are looked into."""
    (prefixes / "linked").symlink_to(prefixes)
    (prefixes / "a.wav").write_text("no audio")
    (prefixes / "split.csv").write_text("path,start,stop\na.wav,,\nb.wav,9,\nb.wav,,\n")
    for source, names, left_out in ((".", "bc", 1), ("split.csv", "b", 2)):
        assert [name for name, _ in sources(prefixes / source)] == [f"{x}.wav" for x in names]
        said = capsys.readouterr().err
        assert said.count("left out") == left_out and "a.wav: not audio" in said
    assert sources(prefixes, l_prefix=61) == [("b.wav", 61)]
    assert "c.wav: too short (60 samples); l_prefix=61 needs more" in capsys.readouterr().err
    (prefixes / "b.wav").unlink()
    with pytest.raises(ValueError, match="no audio to begin with; 3 left out, the first: "):
        sources(prefixes / "split.csv")


@pytest.mark.parametrize("prefix", [None, "a.wav"])
def test_the_streamed_clip_is_that_of_a_run(prefix, prefixes, tmp_path, faked, capsysbinary):
    settings = {"prefix": str(prefixes / prefix)} if prefix else {"temperature": 0.5}
    arguments = [f"{k}={v}" for k, v in settings.items()]
    assert main(["play=wav", *arguments]) == 0
    wav = capsysbinary.readouterr().out
    assert main(["play=raw", *arguments]) == 0
    assert capsysbinary.readouterr().out == wav[44:]
    run(tmp_path / "out", n_samples=1, **settings)
    assert wav == (tmp_path / "out" / "0000.wav").read_bytes()
    assert len(wav_header(2**40, 16000)) == 44  # of what no header can tell


def test_a_closed_player_ends_the_stream_quietly(faked, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["play=raw"]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments, folder",
    [("device=cpu page=false", "generated"), ("seed=1", "generated-seed-1"),
     ("seed=1 temperature=0.9", "generated-seed-1-temperature-0.9"),
     ("out_dir=mine seed=1", "mine"), ("model=sashimi_ar_sc09", "generated-sashimi_ar_sc09"),
     ("checkpoint=FOLDER/a.pt", "generated-checkpoint-a.pt-??????"),
     ("prefix=a.wav l_prefix=50", "generated-prefix-a.wav-l_prefix-50"),
     ("prefix=PREFIXES/a.wav", "generated-prefix-a.wav-??????")],
)  # fmt: skip
def test_every_request_has_its_own_folder(arguments, folder, prefixes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").touch()
    argv = arguments.replace("PREFIXES", str(prefixes)).split()
    assert fnmatch.fnmatchcase(request.parse(argv).out_dir, folder)


def test_long_settings_have_folders_that_differ_and_that_a_disk_takes():
    lists = [[f"wörd-{i + k}" for i in range(99)] for k in range(2)]
    told = [GenerateConfig(told=dict.fromkeys("abcdef", words)) for words in lists]
    folders = set(map(request.default_folder, told))
    assert len(folders) == 2 and all(len(name.encode()) < 255 for name in folders)


def test_one_command_after_the_other_needs_no_out_dir(tmp_path, faked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in ([], ["seed=1"], ["n_samples=2"], []):
        assert main([*argv, "page=false"]) == 0
    expected = {"generated", "generated-seed-1", "generated-n_samples-2"}
    assert {path.name for path in tmp_path.iterdir()} == expected


ERRORS = [
    ("n_samples=0", "n_samples=0: must be an integer, at least 1"),
    ("n_batch=0", "n_batch=0: must be an integer, at least 1"),
    ("length=0", "length=0: must be an integer, at least 1"),
    ("temperature=0", "temperature=0.0: must be a positive number"),
    ("temperature=inf", "temperature=inf: must be a positive number"),
    ("nucleus_p=0", "nucleus_p=0.0: must be above 0 and at most 1"),
    ("nucleus_p=1.5", "nucleus_p=1.5: must be above 0 and at most 1"),
    ("top_k=257", "top_k=257: must be an integer from 1 to 256"),
    ("play=true", "play=true: must be wav or raw"),
    ("precision=half", "precision=half: must be auto or float32 or float16"),
    ("sampler=dmp", "no sampler named dmp, did you mean ddpm?"),
    ("mel_from=nowhere.wav", "mel_from=nowhere.wav is not there"),
    ("mel_from=DIR/a.wav prefix=DIR/a.wav", "prefix= is for autoregressive models"),
    ("steps=5", "steps=5: an autoregressive model has no steps"),
    ("n_reps=2", "n_reps=2 needs prefix="),
    ("l_prefix=2", "l_prefix=2 needs prefix="),
    ("prefix=nowhere.wav", "prefix=nowhere.wav is not there"),
    ("prefix=DIR/notes.txt", "DIR/notes.txt: not audio"),
    ("prefix=DIR/a.wav length=99", "DIR/a.wav: a prefix of 100 samples is longer than length=99; "
     "use less of it with l_prefix="),
    ("prefix=DIR/a.wav l_prefix=101", "DIR/a.wav: too short (100 samples)"),
    ("prefix=DIR/split.csv data_root=nowhere", "data_root=nowhere is not a folder"),
    ("out_dir=DIR/a.wav", "out_dir=DIR/a.wav is not a folder"),
    ("model=sashimi_digit", "no model named sashimi_digit, did you mean sashimi_ar_"),
    ("model=DIR/a.wav", "model=DIR/a.wav is a file: write checkpoint=DIR/a.wav"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", ERRORS)
def test_errors_are_one_line(arguments, message, prefixes, tmp_path, faked, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before, argv = sorted(tmp_path.rglob("*")), arguments.replace("DIR", str(prefixes)).split()
    error = "error: " + message.replace("DIR", str(prefixes))
    assert error_of(main, argv, capsys).startswith(error)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("batches", [0, 1])
def test_interrupted_says_how_to_go_on_where_something_was_made(batches, tmp_path, faked, capsys):
    faked.interrupt_at = batches
    assert main([f"out_dir={tmp_path / 'out'}", "n_batch=2"]) == 130
    kept = f"; what was made is kept in {tmp_path / 'out'}, the same command goes on"
    assert capsys.readouterr().err == f"interrupted{kept * batches}\n"


def test_a_full_disk_is_one_line_and_can_be_continued(tmp_path, faked, monkeypatch, capsys):
    run(tmp_path / "whole")
    made = tmp_path / "out" / ".generate"

    def full(descriptor):
        if len(list(made.glob("*.wav"))) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    arguments = [f"out_dir={tmp_path / 'out'}", "n_samples=5", "page=false"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "make room" in error_of(main, arguments, capsys, 1)
    assert all(soundfile.info(p).frames == LENGTH for p in made.glob("*.wav"))
    assert not list(made.glob("*.tmp")) and main(arguments) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
