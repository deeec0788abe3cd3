"""Splits and data sets: every sample of every clip arrives once, in its place."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from clips import noise, recordings, split_of

from rawaudio import audio
from rawaudio.data import Clip, ClipDataset, read_csv
from rawaudio.progress import watched
from sashimi import mulaw
from sashimi.mulaw import SILENCE


def test_paths_start_from_data_root_the_csvs_folder_or_the_current_one(tmp_path, monkeypatch):
    csv = split_of(tmp_path / "a", {"x.wav": noise(9)})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "y.wav").touch()
    monkeypatch.chdir(tmp_path / "b")
    csv.write_text(f"path\nx.wav\ny.wav\n{tmp_path}/z.wav\nnone.wav\n")
    beside = [clip.path for clip in read_csv(csv)]
    assert beside[0] == tmp_path / "a" / "x.wav"
    assert beside[1].resolve() == tmp_path / "b" / "y.wav"
    assert beside[2:] == [tmp_path / "z.wav", tmp_path / "a" / "none.wav"]
    rooted = [clip.path for clip in read_csv(csv, data_root=tmp_path / "b")]
    assert rooted[0] == tmp_path / "b" / "x.wav" and rooted[2] == tmp_path / "z.wav"


def test_bom_spaces_quotes_umlauts_and_other_columns_are_read(tmp_path):
    csv = tmp_path / "s.csv"
    csv.write_bytes('\ufeffspeaker, path ,label\nA ,"ä, b.wav", zwölf\nB, c.wav,\n\n'.encode())
    clips = read_csv(csv, tmp_path)
    assert clips == [Clip(tmp_path / "ä, b.wav", "zwölf"), Clip(tmp_path / "c.wav", "")]
    assert clips[0].columns == {"speaker": "A", "label": "zwölf"}


def test_a_clip_is_named_with_its_part(tmp_path):
    csv = tmp_path / "s.csv"
    csv.write_text("path,start,stop\na.wav,,\na.wav,0.5,1.25\na.wav,3600.125,\na.wav,,2\n")
    names = ["a.wav", "a.wav#t=0.5,1.25", "a.wav#t=3600.125", "a.wav#t=0,2"]
    assert [clip.name for clip in read_csv(csv)] == names
    assert [str(clip) for clip in read_csv(csv)] == [f"{tmp_path}/{name}" for name in names]


def test_spaces_around_a_path_belong_to_it_if_such_a_file_is_there(tmp_path):
    cells = {'" a.wav"': " a.wav", "a.wav ": "a.wav ", "./ a.wav": " a.wav", " a.wav ": "a.wav",
             '" a.wav "': "a.wav", "a.wav": "a.wav"}  # fmt: skip
    for i, (cell, there) in enumerate(cells.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / there).touch()
        (folder / "s.csv").write_text(f"path,label\n{cell},x\n")
        for root in (None, folder):
            assert read_csv(folder / "s.csv", root)[0].path == folder / there, cell


@pytest.mark.parametrize(
    "content, words",
    [
        (b"file,label\na.wav,x\n", "no column `path`; its columns: file, label"),
        (b"path;label\na.wav;x\n", "its columns: path;label"),
        (b"", "is empty"),
        (b"path,label\n", "is empty"),
        (b"path,label\na.wav,x\n,y\n", "line 3: the path is empty"),
        (b"label,path\nx\n", "line 2: the path is empty"),
        (b"\xff\xfepath\n\xe9.wav\n", "not a UTF-8 CSV"),
        *[(f"path,start,stop\na.wav,{part}\n".encode(), "line 2: start,stop = .*seconds")
          for part in ("-1,", "2,1", "x,", ",0")],
    ],
)  # fmt: skip
def test_a_bad_csv_is_one_clear_error(tmp_path, content, words):
    csv = tmp_path / "bad.csv"
    csv.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_csv(csv)
    assert str(csv) in str(caught.value)


def test_a_csv_or_data_root_that_is_not_there_is_named(tmp_path):
    csv = split_of(tmp_path, {"a.wav": noise(9)})
    for path, root, words in ((tmp_path / "none.csv", None, "none.csv is not there"),
                              (tmp_path, None, "is not a file"),
                              (csv, tmp_path / "none", "data_root=.*none")):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=words):
            read_csv(path, root)


def test_a_data_set_is_the_mulaw_classes_of_its_files_end_to_end(tmp_path):
    waves = {"b.wav": noise(100, 1), "a.flac": noise(7, 2), "c/d.wav": noise(2, 3)}
    ds = ClipDataset(split_of(tmp_path, waves), 8000)
    classes = [mulaw.encode(torch.from_numpy(w)).to(torch.uint8) for w in waves.values()]
    assert len(ds) == 3 and ds.data.dtype == torch.uint8
    assert torch.equal(ds.data, torch.cat(classes))  # one byte a sample, in the CSV's order
    assert ds.offsets.tolist() == [0, 100, 107, 109] and ds.lengths.tolist() == [100, 7, 2]
    assert all(torch.equal(ds[i], classes[i]) for i in range(3))
    assert torch.equal(ds[-1], ds[2]) and len(list(ds)) == 3
    assert [clip.label for clip in ds.clips] == ["b", "a", "c"] and ds.skipped == []
    with pytest.raises(IndexError):
        ds[3]


def test_appended_silence_is_part_of_every_clip(tmp_path):
    csv = split_of(tmp_path, {"a.wav": noise(10, 1), "b.wav": noise(20, 2)})
    for pcm, silence in ((False, SILENCE), (True, 0)):
        plain, longer = (ClipDataset(csv, 8000, append_silence=n, pcm=pcm) for n in (0, 5))
        assert longer.lengths.tolist() == [15, 25]
        for i in range(2):
            assert torch.equal(longer[i][:-5], plain[i])
            assert longer[i][-5:].tolist() == [silence] * 5


def test_impossible_settings_are_refused_by_name(tmp_path):
    for name, value in {"append_silence": -1, "peak": 0, "sample_len": 1}.items():
        with pytest.raises(ValueError, match=name):
            ClipDataset(tmp_path / "s.csv", 8000, **{name: value})


def test_resampled_and_stereo_files_are_told_once_each(tmp_path, caplog):
    left, right = noise(500, 1), noise(500, 2)
    csv = split_of(tmp_path, {"a.wav": noise(1000), "b.wav": noise(500)}, rate=16000)
    split_of(tmp_path, {"s.wav": np.stack([left, right], 1), "m.wav": left}, name="other.csv")
    csv.write_text("path\na.wav\nb.wav\ns.wav\nm.wav\n")
    ds = ClipDataset(csv, 8000)
    assert ds.lengths.tolist() == [500, 250, 500, 500]
    assert torch.equal(ds[2].long(), mulaw.encode(torch.from_numpy((left + right) / 2)))
    assert [r.getMessage() for r in caplog.records] == [
        f"resampled 2 of 4 clips from 16,000 Hz to 8,000 Hz ({csv})",
        f"mixed 1 of 4 clips down to mono ({csv})",
    ]


def test_files_that_cannot_be_used_are_skipped_counted_and_listed_in_one_warning(tmp_path, caplog):
    """Whatever a row holds: it alone is left out, and what is no audio is not shown."""
    root = tmp_path / "root"
    csv = split_of(root, {"good.wav": noise(50), "one.wav": noise(1)})
    split_of(tmp_path, {"out.wav": noise(50)})
    (root / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("hunter2")
    (root / "loop.wav").symlink_to("loop.wav")
    bad = {  # by the version of Python, too long a name is one or the other
        "none.wav": "not found", "none2.wav": "not found", "empty.wav": "empty",
        "../text.wav": "not audio", "one.wav": "too short", "loop.wav": "not found",
        "x" * 5000 + ".wav": ("unreadable", "not found"),
        "good.wav,1,2": "too short", "good.wav,,0.0001": "too short",
    }  # fmt: skip
    rows = [*bad, "good.wav", "../out.wav", f"{tmp_path}/out.wav"]  # out of data_root
    csv.write_text("\n".join(["path,start,stop", *rows]))
    ds = ClipDataset(csv, 8000, root)
    assert [clip.path.name for clip in ds.clips] == ["good.wav", "out.wav", "out.wav"]
    assert torch.equal(ds[1], ds[2]) and len(ds.skipped) == len(bad)
    for (_, reason), kind in zip(ds.skipped, bad.values(), strict=True):
        assert reason.startswith(kind)
    assert str(ds.skipped[-2][0]) == f"{root}/good.wav#t=1,2"
    (message,) = caplog.messages
    assert f"skipped {len(bad)} of {len(rows)} files" in message and "\n" not in message
    assert "3 not found" in message or "4 not found" in message
    assert "the first: " in message and "hunter2" not in message
    csv.write_text("path\na.wav\nb.wav\n")
    with pytest.raises(ValueError, match=r"no clip is left of 2 files.*2 not found.*data_root="):
        ClipDataset(csv, 8000)


def test_recordings_come_in_pieces_whose_samples_are_those_of_the_file(tmp_path):
    csv = recordings(tmp_path)
    for pcm in (False, True):
        whole = ClipDataset(csv, 8000, pcm=pcm)
        assert whole.lengths.tolist() == [20_000, 9_600, 6_000]
        assert torch.equal(whole[2], whole[0][4_000:10_000])
        pieces = ClipDataset(csv, 8000, sample_len=8000, cache=tmp_path / "cache", pcm=pcm)
        assert torch.equal(pieces.data, whole.data) and pieces.data.dtype == whole.data.dtype
        assert pieces.lengths.tolist() == [8000, 8000, 4000, 8000, 1600, 6000]
        assert [clip.label for clip in pieces.clips] == list("xxxyyz")
        assert torch.equal(pieces[4], whole[1][8000:])


@pytest.mark.parametrize("rate", [8000, 16_000])
@pytest.mark.parametrize("change", [{"peak": 0.9}, {"append_silence": 7}, {"pcm": True}])
@pytest.mark.parametrize("sample_len", [None, 2500])
def test_parts_of_a_recording_are_clips_of_their_own(tmp_path, rate, change, sample_len):
    borders = [0, 1.25, 2, 3.5]
    wave = noise(28_000, 1)
    parts = [wave[round(a * 8000) : round(b * 8000)] for a, b in pairwise(borders)]
    files = split_of(tmp_path, {f"{i}.wav": part for i, part in enumerate(parts)})
    soundfile.write(tmp_path / "all.wav", wave, 8000)
    rows = [f"all.wav,{a},{b}" for a, b in pairwise(borders)]
    (tmp_path / "parts.csv").write_text("\n".join(["path,start,stop", *rows]))
    change = change | {"sample_len": sample_len, "cache": tmp_path / "cache"}
    of_parts, of_files = (ClipDataset(c, rate, **change) for c in (tmp_path / "parts.csv", files))
    assert torch.equal(of_parts.data, of_files.data)
    assert torch.equal(of_parts.offsets, of_files.offsets)


def test_recordings_are_decoded_once_and_mapped(tmp_path, monkeypatch, caplog):
    """The cache is known by what the files hold; skipped files are told again."""
    csv, cache = recordings(tmp_path), tmp_path / "cache"

    def read(sample_len=8000):
        caplog.clear()
        ds = ClipDataset(csv, 8000, sample_len=sample_len, cache=cache)
        assert ds.mapped is not None and "1 not found" in caplog.text
        return ds

    csv.write_text(csv.read_text() + "gone.wav,x,,\n")
    first = read()
    (path,) = cache.glob("*.samples")
    assert len(list(cache.iterdir())) == 2, "samples and what is known of them, and no draft"
    if (maps := Path("/proc/self/maps")).exists():
        assert str(path) in maps.read_text()  # pages of a file: of any length, in no memory
    with monkeypatch.context() as patched:
        patched.setattr(audio, "decode", None)
        again = read(sample_len=4000)
    assert torch.equal(again.data, first.data) and again.skipped == first.skipped
    assert len(again) > len(first)
    whole = first.data.clone()
    path.write_bytes(path.read_bytes()[:100])  # cut short: made anew
    assert torch.equal(read().data, whole)
    split_of(tmp_path, {"b.wav": noise(9_600, 3)}, name="other.csv")
    assert not torch.equal(read().data, whole)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_passes_items_on_and_shows_a_bar_on_a_terminal(terminal, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert list(watched(iter(range(5)), "reading", 9, each=2)) == list(range(5))
    printed = capsys.readouterr()
    assert ("100.00%" in printed.out) == terminal and printed.err == "", "quick work is quiet"
    assert list(watched(iter(range(5)), "reading", 5, show=False)) == list(range(5))
    assert capsys.readouterr().out == ""


def test_progress_in_a_pipe_is_a_line_soon_and_every_ten_seconds(capsys, monkeypatch):
    clock = iter(range(0, 300, 3))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    assert len(list(watched(range(8), "real", 30, each=4))) == 8
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "real: 4 of 30 clips, 0:00:20 left"
    assert [int(line.split()[1]) for line in lines] == [4, 20]
