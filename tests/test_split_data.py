"""split_data.py: official splits as published, other folders stable, no CSV lost."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import status
from test_audio import music, write_mp3

import split_data
from rawaudio import audio
from rawaudio.data import read_clip, read_csv
from split_data import DIGITS, SPLITS

SHIPPED = Path(split_data.__file__).parent / "splits"


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def run(root, out, *args):
    return status(split_data.main, ["--root_path", str(root), "--out_dir", str(out), *args])


def rows(path):
    with open(path, newline="") as file:
        header, *rest = csv.reader(file)
    assert header in (["path", "label"], ["path", "label", "speaker"])
    return rest


def paths(out, name):
    return {split: [r[0] for r in rows(out / f"{name}-{split}.csv")] for split in SPLITS}


@pytest.fixture
def commands(tmp_path):
    """Speech Commands in small: 3 digits, 1 other word, 1 listed file that is not there."""
    root = tmp_path / "sc"
    for word in ("zero", "one", "nine", "cat"):
        touch(root, *(f"{word}/{s}_nohash_0.wav" for s in "abcd"))
    touch(root, "_background_noise_/hum.wav", "README.md", "zero/.hidden.wav")
    (root / "validation_list.txt").write_text("zero/a_nohash_0.wav\ncat/a_nohash_0.wav\n")
    (root / "testing_list.txt").write_text(
        "nine/b_nohash_0.wav\none/missing_nohash_0.wav\ncat/b_nohash_0.wav\n"
    )
    return root


# the shipped splits


@pytest.mark.parametrize("split, n", [("train", 18_620), ("valid", 2_494), ("test", 2_552)])
def test_shipped_sc09_holds_every_digit_clip_of_v001(split, n):
    listed = rows(SHIPPED / f"sc09-{split}.csv")
    assert len(listed) == n and len({path for path, _, _ in listed}) == n
    assert listed == sorted(listed)
    assert {label for _, label, _ in listed} == set(DIGITS)
    for path, label, speaker in listed:
        assert path.startswith(f"{label}/{speaker}_nohash_") and path.endswith(".wav")
    assert len(read_csv(SHIPPED / f"sc09-{split}.csv")) == n


def test_shipped_sc09_splits_share_no_clip_and_no_speaker():
    speakers = {
        split: {speaker for _, _, speaker in rows(SHIPPED / f"sc09-{split}.csv")}
        for split in SPLITS
    }
    assert not speakers["train"] & speakers["valid"]
    assert not speakers["train"] & speakers["test"]
    assert not speakers["valid"] & speakers["test"]


def test_shipped_fsdd_is_its_own_split_by_take():
    takes = {"train": range(8, 50), "valid": range(5, 8), "test": range(5)}
    for split, n in (("train", 2520), ("valid", 180), ("test", 300)):
        listed = rows(SHIPPED / f"fsdd-{split}.csv")
        assert len(listed) == n == len({path for path, _, _ in listed})
        fields = [path.removesuffix(".wav").split("_") for path, _, _ in listed]
        assert {int(take) for _, _, take in fields} == set(takes[split])
        told = [(DIGITS[int(digit)], speaker) for digit, speaker, _ in fields]
        assert told == [(label, speaker) for _, label, speaker in listed]
        assert len({speaker for _, speaker in told}) == 6


# Speech Commands


def test_sc09_is_the_listed_digits_that_are_on_disk(commands, tmp_path, capsys):
    assert run(commands, tmp_path / "out", "--sc09_only", "True") == 0
    got = paths(tmp_path / "out", "sc09")
    assert got["valid"] == ["zero/a_nohash_0.wav"] and got["test"] == ["nine/b_nohash_0.wav"]
    assert len(got["train"]) == 10 and got["train"] == sorted(got["train"])
    assert rows(tmp_path / "out" / "sc09-test.csv") == [["nine/b_nohash_0.wav", "nine", "b"]]
    said = capsys.readouterr().out
    assert "testing_list.txt: 1 of 2 files are not on disk" in said
    assert f"data_root={commands}" in said


def test_all_words_are_split_without_background_noise(commands, tmp_path):
    assert run(commands, tmp_path / "out", "--sc09_only", "False") == 0
    got = paths(tmp_path / "out", "commands")
    assert len(got["train"]) == 12 and len(got["valid"]) == 2 and len(got["test"]) == 2
    assert not any("_background_noise_" in path for path in got["train"])


@pytest.mark.parametrize("yes", ["True", "true", "1", "yes"])
@pytest.mark.parametrize("no", ["False", "false", "0", "no"])
def test_booleans_are_words_or_digits(commands, tmp_path, yes, no):
    assert run(commands, tmp_path / "out", "--sc09_only", yes, "--overwrite", no) == 0
    assert (tmp_path / "out" / "sc09-train.csv").exists()


def test_a_csv_that_lists_other_clips_is_kept_and_the_new_one_gets_its_own_name(
    commands, tmp_path, capsys
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "sc09-train.csv").write_text("path,label\nshipped.wav,x\n")
    assert run(commands, out, "--sc09_only", "True") == 0
    assert (out / "sc09-train.csv").read_text() == "path,label\nshipped.wav,x\n"
    assert not (out / "sc09-test.csv").exists()
    assert len(paths(out, "sc09-local")["train"]) == 10
    assert "sc09-local-*.csv" in capsys.readouterr().out
    assert run(commands, out, "--sc09_only", "True") == 0  # again: unchanged

    assert run(commands, out, "--sc09_only", "True", "--overwrite", "True") == 0
    assert len(paths(out, "sc09")["train"]) == 10
    assert "replaced" in capsys.readouterr().out


def test_a_named_csv_that_differs_is_refused_and_nothing_is_written(commands, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(commands, out, "--name", "mine") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    touch(commands, "one/new_nohash_0.wav")
    assert run(commands, out, "--name", "mine") == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "--overwrite True" in capsys.readouterr().err


# FSDD


def test_fsdd_is_split_by_take(tmp_path, capsys):
    root = tmp_path / "recordings"
    touch(root, *(f"{d}_{s}_{t}.wav" for d in (0, 7) for s in ("jo", "al") for t in range(12)))
    touch(root, "other.wav")
    assert run(root, tmp_path / "out", "--fsdd", "True") == 0
    got = paths(tmp_path / "out", "fsdd")
    assert [len(got[s]) for s in SPLITS] == [16, 12, 20]
    assert rows(tmp_path / "out" / "fsdd-test.csv")[0] == ["0_al_0.wav", "zero", "al"]
    assert "1 files with other names" in capsys.readouterr().out


# any folder


def test_a_folder_is_split_by_file_in_about_the_fractions_asked_for(tmp_path):
    root = tmp_path / "birds"
    names = [f"{kind}/{i}{end}" for kind in "ab" for i in range(500) for end in (".wav", ".FLAC")]
    touch(root, *names, "notes.txt")
    assert run(root, tmp_path / "out", "--valid_fraction", "0.1", "--test_fraction", "0.2") == 0
    got = paths(tmp_path / "out", "birds")
    assert sorted(sum(got.values(), [])) == sorted(names)
    assert 160 <= len(got["valid"]) <= 240 and 340 <= len(got["test"]) <= 460
    assert ["a/0.FLAC", "a"] in rows(tmp_path / "out" / "birds-train.csv") + rows(
        tmp_path / "out" / "birds-valid.csv"
    ) + rows(tmp_path / "out" / "birds-test.csv")


def test_a_clip_keeps_its_split_when_others_are_added(tmp_path):
    root = tmp_path / "birds"
    touch(root, *(f"{i}.wav" for i in range(100)))
    run(root, tmp_path / "one")
    touch(root, *(f"new{i}.wav" for i in range(100)))
    run(root, tmp_path / "two")
    before, after = paths(tmp_path / "one", "birds"), paths(tmp_path / "two", "birds")
    assert all(set(before[split]) <= set(after[split]) for split in SPLITS)


@pytest.mark.parametrize(
    "name, regex", [("{s}_{i}.wav", None), ("{i}_{s}.wav", r"_(.+)\.wav"), ("{i}{s}.wav", "[a-z]+")]
)
def test_by_speaker_no_speaker_is_in_two_splits(tmp_path, name, regex):
    root = tmp_path / "talk"
    names = {chr(97 + s // 26) + chr(97 + s % 26): s for s in range(60)}
    touch(root, *(name.format(s=s, i=i) for s in names for i in range(3)))
    args = ["--by", "speaker", "--valid_fraction", "0.2", "--test_fraction", "0.2"]
    assert run(root, tmp_path / "out", *args, *(["--speaker_regex", regex] if regex else [])) == 0
    got = paths(tmp_path / "out", "talk")
    speakers = [
        {s for s in names for p in got[split] if p in {name.format(s=s, i=i) for i in range(3)}}
        for split in SPLITS
    ]
    assert sum(len(s) for s in speakers) == 60 and all(speakers)


def test_linked_folders_are_split_under_their_own_names(tmp_path):
    touch(tmp_path, "root/cat/1.wav", "elsewhere/2.wav", "elsewhere/3.wav")
    (tmp_path / "root" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "dog" / "loop").symlink_to(tmp_path / "root")
    assert split_data.find_audio(tmp_path / "root") == ["cat/1.wav", "dog/2.wav", "dog/3.wav"]


def test_names_with_spaces_at_either_end_are_found_again(tmp_path):
    names = [" a.wav", "b .wav", " c/d.wav", " e / f.wav", "g.wav"]
    touch(tmp_path / "root", *names)
    args = ["--name", "x", "--valid_fraction", "0", "--test_fraction", "0"]
    assert run(tmp_path / "root", tmp_path / "out", *args) == 0
    clips = read_csv(tmp_path / "out" / "x-train.csv", tmp_path / "root")
    assert sorted(clip.path for clip in clips) == sorted(tmp_path / "root" / n for n in names)
    assert all(clip.path.is_file() for clip in clips)


def test_names_that_are_not_utf8_are_left_out_named_and_counted(tmp_path, capsys):
    touch(tmp_path / "root", "a.wav")
    try:
        with open(os.fsencode(tmp_path) + b"/root/caf\xe9.wav", "wb"):
            pass
    except OSError:
        pytest.skip("names are always UTF-8 here")
    assert run(tmp_path / "root", tmp_path / "out", "--name", "x") == 0
    assert "left out 1 files" in (said := capsys.readouterr().err) and r"caf\udce9.wav" in said
    assert sum(paths(tmp_path / "out", "x").values(), []) == ["a.wav"]


def test_a_tilde_in_a_folder_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "root/a.wav")
    args = ["--root_path=~/root", "--out_dir=~/out", "--name=x"]
    assert split_data.main(args) == 0 and (tmp_path / "out" / "x-train.csv").is_file()


# bad input: one line on stderr, status 1, nothing written


def refused(capsys, root, out, *args):
    assert run(root, out, *args) == 2
    assert not out.exists()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_wrong_roots_are_refused(tmp_path, capsys):
    out = tmp_path / "out"
    assert "not there" in refused(capsys, tmp_path / "none", out)
    touch(tmp_path, "some/notes.txt", "fsdd/recordings/0_jo_1.wav", "up/sc/validation_list.txt")
    touch(tmp_path, "half/validation_list.txt", "half/zero/a.wav", "up/sc/testing_list.txt")
    assert "a file" in refused(capsys, tmp_path / "some" / "notes.txt", out)
    assert "no audio below" in refused(capsys, tmp_path / "some", out)
    assert "recordings?" in refused(capsys, tmp_path / "fsdd", out, "--fsdd", "True")
    assert f"{tmp_path}/up/sc?" in refused(capsys, tmp_path / "up", out, "--sc09_only", "True")
    assert "no testing_list.txt" in refused(capsys, tmp_path / "half", out)


def test_an_out_dir_that_is_a_file_is_refused(commands, tmp_path, capsys):
    (tmp_path / "out").write_text("kept")
    assert run(commands, tmp_path / "out", "--sc09_only", "True") == 2
    assert "out" in capsys.readouterr().err and (tmp_path / "out").read_text() == "kept"


def test_lists_without_digits_are_refused(commands, tmp_path, capsys):
    for word in ("zero", "one", "nine"):
        (commands / word).rename(commands / f"x{word}")
    assert "zero .. nine" in refused(capsys, commands, tmp_path / "out", "--sc09_only", "True")


def test_impossible_choices_are_refused(commands, tmp_path, capsys):
    out = tmp_path / "out"
    both = ("--sc09_only", "True", "--fsdd", "True")
    assert "choose one" in refused(capsys, commands, out, *both)
    halves = ("--valid_fraction", "0.5", "--test_fraction", "0.5")
    assert "nothing to train on" in refused(capsys, commands, out, *halves)
    touch(tmp_path, "any/a.wav")
    regex = ("--by", "speaker", "--speaker_regex")
    assert "--speaker_regex" in refused(capsys, tmp_path / "any", out, *regex, "(")
    assert "finds no speaker" in refused(capsys, tmp_path / "any", out, *regex, "[0-9]+")


@pytest.mark.parametrize(
    "args", [("--valid_fraction", "1.5"), ("--test_fraction", "ten"), ("--fsdd", "maybe")]
)
def test_wrong_values_are_refused_by_name(tmp_path, capsys, args):
    assert run(tmp_path, tmp_path / "out", *args) == 2
    assert args[0] in capsys.readouterr().err


def test_an_empty_validation_split_is_said(tmp_path, capsys):
    touch(tmp_path / "few", "c.wav")
    assert run(tmp_path / "few", tmp_path / "out") == 0
    assert "valid is empty" in capsys.readouterr().out


def test_help_shows_examples_first(capsys):
    with pytest.raises(SystemExit):
        split_data.main(["--help"])
    said = capsys.readouterr().out
    assert said.index("examples:") < said.index("options:")
    assert all(len(line) <= 100 for line in said.splitlines())


# by time


def test_recordings_are_split_by_time_in_natural_order(tmp_path, capsys):
    """88/6/6 % of all seconds; the recording at a border is in two splits, each second in one."""
    for name, seconds in {"10.wav": 40, "2.wav": 50, "1.flac": 10}.items():
        soundfile.write(tmp_path / name, np.zeros(seconds * 1000), 1000)
    (tmp_path / "broken.wav").write_text("no audio")
    assert run(tmp_path, tmp_path / "out", "--by", "time", "--name", "piano") == 0
    said = capsys.readouterr().out
    assert "broken.wav left out: not audio" in said and "1 of 4 files are left out" in said
    assert "minutes: train 1.5, valid 0.1, test 0.1" in said
    parts = {s: read_csv(tmp_path / "out" / f"piano-{s}.csv", tmp_path) for s in SPLITS}
    found = {s: [(c.path.name, c.start, c.stop) for c in clips] for s, clips in parts.items()}
    assert found == {
        "train": [("1.flac", 0, None), ("2.wav", 0, None), ("10.wav", 0, 28)],
        "valid": [("10.wav", 28, 34)],
        "test": [("10.wav", 34, None)],
    }


def test_durations_are_those_of_what_is_read(tmp_path):
    """Of an mp3 without a header too, which libsndfile takes for shorter or longer."""
    (tmp_path / "root").mkdir()
    write_mp3(tmp_path / "root" / "a.mp3", music(160_000), bitrate_mode="VARIABLE")
    args = ["--by", "time", "--name", "x", "--valid_fraction", "0.2", "--test_fraction", "0.3"]
    assert run(tmp_path / "root", tmp_path / "out", *args) == 0
    clips = [read_csv(tmp_path / "out" / f"x-{s}.csv", tmp_path / "root")[0] for s in SPLITS]
    whole, _ = audio.read(tmp_path / "root" / "a.mp3")
    parts = [read_clip(clip).wav for clip in clips]
    assert [len(part) / len(whole) for part in parts] == pytest.approx([0.5, 0.2, 0.3], abs=1e-3)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
