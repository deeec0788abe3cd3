"""split_data.py: official splits as published, other folders stable, no CSV lost."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import error_of, status
from test_audio import music, touch, write_mp3

import split_data
from rawaudio import audio
from rawaudio.data import read_clip, read_csv
from split_data import DIGITS, SPLITS

SHIPPED = Path(split_data.__file__).parent / "splits"


def run(root, out, *args):
    return status(split_data.main, ["--root_path", str(root), "--out_dir", str(out), *args])


def rows(folder, name, columns=("path", "label", "speaker")):
    """Split -> rows of its CSV."""
    found = {}
    for split in SPLITS:
        with open(folder / f"{name}-{split}.csv", newline="") as file:
            header, *found[split] = csv.reader(file)
        assert header == list(columns)
    return found


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


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


def test_shipped_sc09_holds_every_digit_clip_of_v001_and_shares_no_speaker():
    speakers = []
    for split, listed in rows(SHIPPED, "sc09").items():
        n = {"train": 18_620, "valid": 2_494, "test": 2_552}[split]
        assert len(listed) == n == len({path for path, _, _ in listed})
        assert listed == sorted(listed) and {label for _, label, _ in listed} == set(DIGITS)
        for path, label, speaker in listed:
            assert path.startswith(f"{label}/{speaker}_nohash_") and path.endswith(".wav")
        speakers.append({speaker for _, _, speaker in listed})
    assert len(set.union(*speakers)) == sum(map(len, speakers))


def test_fsdd_is_split_by_take_as_it_is_shipped(tmp_path, out, capsys):
    shipped = rows(SHIPPED, "fsdd")
    paths = [path for listed in shipped.values() for path, _, _ in listed]
    touch(tmp_path / "recordings", *paths, "other.wav")
    assert run(tmp_path / "recordings", out, "--fsdd", "True") == 0
    assert rows(out, "fsdd") == shipped and len(set(paths)) == 3000
    assert "1 files with other names" in capsys.readouterr().out
    takes = {"train": range(8, 50), "valid": range(5, 8), "test": range(5)}
    for split, listed in shipped.items():
        for path, label, speaker in listed:
            digit, name, take = path.removesuffix(".wav").split("_")
            assert int(take) in takes[split] and (DIGITS[int(digit)], name) == (label, speaker)


@pytest.mark.parametrize("digits", [["--sc09_only"], ["--sc09_only=1"], ["--sc09_only", "False"]])
def test_speech_commands_are_split_by_their_lists(commands, out, capsys, digits):
    """The digits or all words that are on disk, without background noise."""
    all_words = digits[-1] == "False"
    assert run(commands, out, *digits, "--overwrite", "no") == 0
    got = rows(out, "commands" if all_words else "sc09")
    assert [len(got[split]) for split in SPLITS] == ([12, 2, 2] if all_words else [10, 1, 1])
    assert ["zero/a_nohash_0.wav", "zero", "a"] in got["valid"]
    assert ["nine/b_nohash_0.wav", "nine", "b"] in got["test"]
    assert got["train"] == sorted(got["train"])
    labels = {label for of in got.values() for _, label, _ in of}
    assert labels == {"zero", "one", "nine", *(["cat"] if all_words else [])}
    printed = capsys.readouterr().out
    assert all_words or "testing_list.txt: 1 of 2 files are not on disk" in printed
    assert f"data_root={commands}" in printed


def test_csvs_of_other_clips_are_kept_beside_the_new_ones(commands, out, capsys):
    digits = ["--sc09_only", "True"]
    out.mkdir()
    (out / "sc09-train.csv").write_text("path,label\nshipped.wav,x\n")
    for said in ("sc09-local-*.csv", "unchanged"):
        assert run(commands, out, *digits) == 0
        assert (out / "sc09-train.csv").read_text() == "path,label\nshipped.wav,x\n"
        assert not (out / "sc09-test.csv").exists()
        assert len(rows(out, "sc09-local")["train"]) == 10 and said in capsys.readouterr().out
    assert run(commands, out, *digits, "--overwrite", "True") == 0
    assert len(rows(out, "sc09")["train"]) == 10 and "replaced" in capsys.readouterr().out


def test_a_named_csv_that_differs_is_refused_and_nothing_is_written(commands, out, capsys):
    assert run(commands, out, "--name", "mine") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    touch(commands, "one/new_nohash_0.wav")
    assert run(commands, out, "--name", "mine") == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "overwrite=true" in capsys.readouterr().err


def test_a_folder_is_split_by_file_in_about_the_fractions_asked_for(tmp_path, out):
    """New files leave the others in their splits."""
    root, fractions = tmp_path / "birds", ["--valid_fraction", "0.1", "--test_fraction", "0.2"]
    names = [f"{kind}/{i}{end}" for kind in "ab" for i in range(500) for end in (".wav", ".FLAC")]
    touch(root, *names, "notes.txt")
    assert run(root, out, *fractions) == 0
    got = rows(out, "birds", ["path", "label"])
    assert sorted(path for of in got.values() for path, _ in of) == sorted(names)
    assert all(path[0] == label for of in got.values() for path, label in of)
    assert 160 <= len(got["valid"]) <= 240 and 340 <= len(got["test"]) <= 460
    touch(root, *(f"a/new{i}.wav" for i in range(100)))
    assert run(root, out, *fractions, "--name", "more") == 0
    more = rows(out, "more", ["path", "label"])
    assert all(row in more[split] for split in SPLITS for row in got[split])


@pytest.mark.parametrize(
    "name, regex", [("{s}_{i}.wav", None), ("{i}_{s}.wav", r"_(.+)\.wav"), ("{i}{s}.wav", "[a-z]+")]
)
def test_by_speaker_no_speaker_is_in_two_splits(tmp_path, out, name, regex):
    names = {chr(97 + s // 26) + chr(97 + s % 26) for s in range(60)}
    touch(tmp_path / "talk", *(name.format(s=s, i=i) for s in names for i in range(3)))
    args = ["--by", "speaker", "--valid_fraction", "0.2", "--test_fraction", "0.2"]
    args += ["--speaker_regex", regex] if regex else []
    assert run(tmp_path / "talk", out, *args) == 0
    speakers = []
    for of in rows(out, "talk").values():
        speakers.append({speaker for _, _, speaker in of})
        assert {path for path, *_ in of} == {
            name.format(s=speaker, i=i) for speaker in speakers[-1] for i in range(3)
        }
    assert all(speakers) and set.union(*speakers) == names and sum(map(len, speakers)) == 60


def test_names_with_spaces_at_either_end_are_found_again(tmp_path, out):
    names = [" a.wav", "b .wav", " c/d.wav", " e / f.wav", "g.wav"]
    touch(tmp_path / "root", *names)
    args = ["--name", "x", "--valid_fraction", "0", "--test_fraction", "0"]
    assert run(tmp_path / "root", out, *args) == 0
    clips = read_csv(out / "x-train.csv", tmp_path / "root")
    assert {clip.path for clip in clips} == {tmp_path / "root" / name for name in names}


def test_names_that_are_not_utf8_are_left_out_named_and_counted(tmp_path, out, capsys):
    touch(tmp_path / "root", "a.wav")
    try:
        open(os.fsencode(tmp_path) + b"/root/caf\xe9.wav", "wb").close()
    except OSError:
        pytest.skip("names are always UTF-8 here")
    assert run(tmp_path / "root", out, "--name", "x") == 0
    printed = capsys.readouterr().err
    assert "left out 1 files" in printed and r"caf\udce9.wav" in printed
    assert sum(rows(out, "x", ["path", "label"]).values(), []) == [["a.wav", ""]]


def test_a_tilde_in_a_folder_is_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "root/a.wav")
    assert split_data.main(["--root_path=~/root", "--out_dir=~/out", "--name=x"]) == 0
    assert (tmp_path / "out" / "x-train.csv").is_file()
    assert "valid is empty" in capsys.readouterr().out


@pytest.mark.parametrize(
    "root, args, words",
    [
        ("none", "", "not there"),
        ("some/notes.txt", "", "a file"),
        ("some", "", "no audio below"),
        ("fsdd", "--fsdd True", "recordings?"),
        ("up", "--sc09_only True", "/up/sc?"),
        ("half", "", "no testing_list.txt"),
        ("cats", "--sc09_only True", "zero .. nine"),
        ("any", "--sc09_only True --fsdd True", "choose one"),
        ("any", "--valid_fraction 0.5 --test_fraction 0.5", "nothing to train on"),
        ("any", "--by speaker --speaker_regex (", "speaker_regex=("),
        ("any", "--by speaker --speaker_regex [0-9]+", "finds no speaker"),
        ("any", "--by day", "by=day: expected file, speaker, time"),
        ("any", "--valid_fraction 1.5", "valid_fraction=1.5"),
        ("any", "--test_fraction ten", "test_fraction=ten"),
        ("any", "--fsdd maybe", "fsdd=maybe"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(tmp_path, out, capsys, root, args, words):
    touch(tmp_path, "some/notes.txt", "fsdd/recordings/0_jo_1.wav", "any/a.wav", "half/zero/a.wav",
          "half/validation_list.txt", "cats/cat/a.wav")  # fmt: skip
    for folder in ("up/sc", "cats"):
        touch(tmp_path / folder, "validation_list.txt", "testing_list.txt")
    argv = ["--root_path", str(tmp_path / root), "--out_dir", str(out), *args.split()]
    assert words in error_of(split_data.main, argv, capsys) and not out.exists()


def test_an_out_dir_that_is_a_file_is_refused(commands, out, capsys):
    out.write_text("kept")
    assert run(commands, out, "--sc09_only", "True") == 2
    assert "out" in capsys.readouterr().err and out.read_text() == "kept"


def test_recordings_are_split_by_time_in_natural_order(tmp_path, out, capsys):
    """88/6/6 % of all seconds; the recording at a border is in two splits, each second in one."""
    for name, seconds in {"10.wav": 40, "2.wav": 50, "1.flac": 10}.items():
        soundfile.write(tmp_path / name, np.zeros(seconds * 1000), 1000)
    (tmp_path / "broken.wav").write_text("no audio")
    assert run(tmp_path, out, "--by", "time", "--name", "piano") == 0
    printed = capsys.readouterr().out
    assert "broken.wav left out: not audio" in printed and "1 of 4 files are left out" in printed
    assert "minutes: train 1.5, valid 0.1, test 0.1" in printed
    assert rows(out, "piano", ["path", "label", "start", "stop"]) == {
        "train": [["1.flac", "", "", ""], ["2.wav", "", "", ""], ["10.wav", "", "", "28.000"]],
        "valid": [["10.wav", "", "28.000", "34.000"]],
        "test": [["10.wav", "", "34.000", ""]],
    }


def test_durations_are_those_of_what_is_read(tmp_path, out):
    """Of an mp3 without a header too, which libsndfile takes for shorter or longer."""
    (tmp_path / "root").mkdir()
    write_mp3(tmp_path / "root" / "a.mp3", music(160_000), bitrate_mode="VARIABLE")
    args = ["--by", "time", "--name", "x", "--valid_fraction", "0.2", "--test_fraction", "0.3"]
    assert run(tmp_path / "root", out, *args) == 0
    clips = [read_csv(out / f"x-{split}.csv", tmp_path / "root")[0] for split in SPLITS]
    whole, _ = audio.read(tmp_path / "root" / "a.mp3")
    parts = [read_clip(clip).wav for clip in clips]
    assert [len(part) / len(whole) for part in parts] == pytest.approx([0.5, 0.2, 0.3], abs=1e-3)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
