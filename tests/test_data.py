"""Splits, data set and batches: every sample of every clip arrives once, in its place."""

import logging
import math
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from rawaudio.batches import GainSpeed, change_speed, prefetched, sample_batches, wave_batches
from rawaudio.data import Clip, ClipDataset, read_csv
from rawaudio.progress import watched
from sashimi import mulaw
from sashimi.mulaw import SILENCE


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(n, seed=0, peak=0.5):
    """float32 (n,) that 16-bit PCM holds exactly."""
    pcm = np.random.default_rng(seed).integers(-32768 * peak, 32768 * peak, n)
    return (pcm / 32768).astype(np.float32)


def split_of(folder, waves, rate=8000, name="split.csv"):
    """Writes {name: (T,) or (T, channels)} and the CSV that lists them."""
    for file, wave in waves.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / file, wave, rate)
    path = folder / name
    path.write_text("path,label\n" + "".join(f"{f},{f[:1]}\n" for f in waves))
    return path


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    """Forty clips of 2 to 119 samples."""
    folder = tmp_path_factory.mktemp("clips")
    waves = {f"{i:02d}.wav": noise(2 + 3 * i, seed=i) for i in range(40)}
    return ClipDataset(split_of(folder, waves), 8000, progress=False)


# the CSV


def test_paths_start_from_data_root_then_the_csvs_folder_then_the_current_one(
    tmp_path, monkeypatch
):
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
    csv.write_bytes('\ufeffspeaker, path ,label\nA,"ä, b.wav",zwölf\nB, c.wav,\n\n'.encode())
    assert read_csv(csv, tmp_path) == [
        Clip(tmp_path / "ä, b.wav", "zwölf"),
        Clip(tmp_path / "c.wav", ""),
    ]


def test_a_clip_is_named_with_its_part(tmp_path):
    csv = tmp_path / "s.csv"
    csv.write_text("path,start,stop\na.wav,,\na.wav,0.5,1.25\na.wav,3600.125,\na.wav,,2\n")
    names = ["a.wav", "a.wav#t=0.5,1.25", "a.wav#t=3600.125", "a.wav#t=0,2"]
    assert [clip.name for clip in read_csv(csv)] == names
    assert [str(clip) for clip in read_csv(csv)] == [f"{tmp_path}/{name}" for name in names]


@pytest.mark.parametrize(
    "cell, there",
    [
        ('" a.wav"', " a.wav"), ("a.wav ", "a.wav "), ("./ a.wav", " a.wav"),
        (" a.wav ", "a.wav"), ('" a.wav "', "a.wav"), ("a.wav", "a.wav"),
    ],
)  # fmt: skip
def test_spaces_around_a_path_belong_to_it_if_such_a_file_is_there(tmp_path, cell, there):
    (tmp_path / there).touch()
    (tmp_path / "s.csv").write_text(f"path,label\n{cell},x\n")
    for root in (None, tmp_path):
        assert read_csv(tmp_path / "s.csv", root)[0].path == tmp_path / there


def test_a_path_may_lead_out_of_data_root_and_is_read_as_audio_alone(tmp_path, caplog):
    """Absolute or by ..: whoever writes the CSV chooses. What is no audio is not shown."""
    root = tmp_path / "root"
    root.mkdir()
    soundfile.write(tmp_path / "out.wav", noise(50), 8000)
    (tmp_path / "secret.txt").write_text("hunter2")
    csv = tmp_path / "s.csv"
    csv.write_text(f"path\n../out.wav\n{tmp_path}/out.wav\n../secret.txt\n")
    ds = ClipDataset(csv, 8000, root)
    assert len(ds) == 2 and torch.equal(ds[0], ds[1])
    assert "1 not audio" in caplog.text and "hunter2" not in caplog.text


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
    ],
)
def test_a_bad_csv_is_one_clear_error(tmp_path, content, words):
    csv = tmp_path / "bad.csv"
    csv.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_csv(csv)
    assert str(csv) in str(caught.value)


def test_a_csv_or_data_root_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.csv is not there"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_csv(tmp_path)
    csv = split_of(tmp_path, {"a.wav": noise(9)})
    with pytest.raises(FileNotFoundError, match="data_root=.*none"):
        read_csv(csv, data_root=tmp_path / "none")


# the data set


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
    plain, longer = ClipDataset(csv, 8000), ClipDataset(csv, 8000, append_silence=5)
    assert longer.lengths.tolist() == [15, 25]
    for i in range(2):
        assert torch.equal(longer[i][:-5], plain[i])
        assert longer[i][-5:].tolist() == [SILENCE] * 5
    with pytest.raises(ValueError, match="append_silence"):
        ClipDataset(csv, 8000, append_silence=-1)


def test_other_rates_are_resampled_once_with_one_notice(tmp_path, caplog):
    csv = split_of(tmp_path, {"a.wav": noise(1000), "b.wav": noise(500)}, rate=16000)
    split_of(tmp_path, {"c.wav": noise(100)}, name="other.csv")
    csv.write_text(csv.read_text() + "c.wav,c\n")
    with caplog.at_level(logging.WARNING):
        ds = ClipDataset(csv, 8000)
    assert ds.lengths.tolist() == [500, 250, 100]
    assert [r.getMessage() for r in caplog.records] == [
        f"resampled 2 of 3 clips from 16,000 Hz to 8,000 Hz ({csv})"
    ]


def test_stereo_is_mixed_down_with_one_counted_notice(tmp_path, caplog):
    left, right = noise(50, 1), noise(50, 2)
    csv = split_of(tmp_path, {"s.wav": np.stack([left, right], 1), "m.wav": left})
    with caplog.at_level(logging.WARNING):
        ds = ClipDataset(csv, 8000)
    mean = torch.from_numpy((left + right) / 2)
    assert torch.equal(ds[0].long(), mulaw.encode(mean))
    assert [r.getMessage() for r in caplog.records] == [f"mixed 1 of 2 clips down to mono ({csv})"]


def test_files_that_cannot_be_used_are_skipped_counted_and_listed_in_one_warning(tmp_path, caplog):
    bad = ["none.wav", "none2.wav", "empty.wav", "text.wav", "cut.wav", "nan.wav", "one.wav"]
    csv = split_of(tmp_path, {"good.wav": noise(50), "cut.wav": noise(50), "one.wav": noise(1)})
    soundfile.write(tmp_path / "nan.wav", np.full(9, np.nan), 8000, subtype="FLOAT")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:80])
    (tmp_path / "folder.wav").mkdir()
    csv.write_text("path\n" + "\n".join([*bad, "folder.wav", "good.wav"]))
    with caplog.at_level(logging.WARNING):
        ds = ClipDataset(csv, 8000)
    assert len(ds) == 1 and len(ds[0]) == 50 and ds.clips[0].path.name == "good.wav"
    assert [clip.name for clip, _ in ds.skipped] == [*bad, "folder.wav"]
    kinds = ["not found"] * 2 + ["empty", "not audio", "truncated", "NaN", "too short", "not a"]
    assert all(reason.startswith(k) for (_, reason), k in zip(ds.skipped, kinds, strict=True))
    (record,) = caplog.records
    said = record.getMessage()
    assert "skipped 8 of 9 files" in said and "2 not found, 1 empty" in said and "\n" not in said


def test_whatever_one_row_holds_it_alone_is_skipped_and_named(tmp_path, caplog):
    csv = split_of(tmp_path, {"good.wav": noise(50), "rate.wav": noise(50)})
    raw = (tmp_path / "rate.wav").read_bytes()
    (tmp_path / "rate.wav").write_bytes(raw[:24] + b"\xff\xff\xff\x7f" + raw[28:])
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    rows = ["rate.wav,,", "loop.wav,,", "x" * 5000 + ".wav,,", "good.wav,1,2", "good.wav,,0.0001"]
    csv.write_text("\n".join(["path,start,stop", *rows, "good.wav,,"]))
    ds = ClipDataset(csv, 8000)
    names = "unreadable", "not found"  # too long a name: by the version of Python
    kinds = ["absurd sample rate", "not found", names, "too short", "too short"]
    assert len(ds) == 1 and len(ds.skipped) == 5
    for (_, reason), kind in zip(ds.skipped, kinds, strict=True):
        assert reason.startswith(kind)
    assert str(ds.skipped[3][0]) == f"{tmp_path}/good.wav#t=1,2"
    assert "skipped 5 of 6 files" in caplog.text and "rate.wav: absurd sample rate" in caplog.text


def test_nothing_left_is_an_error_that_names_data_root(tmp_path):
    csv = tmp_path / "s.csv"
    csv.write_text("path\na.wav\nb.wav\n")
    with pytest.raises(ValueError, match=r"no clip is left of 2 files.*2 not found.*data_root="):
        ClipDataset(csv, 8000)


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


# batches


def rows_of(batch):
    return [batch[name] for name in ("index", "x", "target", "mask")]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_sample_of_every_clip_once(ds, shuffle):
    seen = {}
    for batch in sample_batches(ds, 7, None, generator(), shuffle=shuffle):
        for i, x, target, mask in zip(*rows_of(batch), strict=True):
            assert i.item() not in seen
            seen[i.item()] = target[mask].to(torch.uint8)
            assert int(mask.sum()) == len(ds[i]) and bool(mask[: len(ds[i])].all())
            assert x[0] == SILENCE and torch.equal(x[1:][mask[1:]], target[:-1][mask[1:]])
            assert (x[~mask] == SILENCE).all() and (target[~mask] == SILENCE).all()
    assert sorted(seen) == list(range(40))
    assert all(torch.equal(seen[i], ds[i]) for i in seen)


def test_shapes_and_dtypes_are_as_promised_and_the_last_batch_is_kept(ds):
    batches = list(sample_batches(ds, 16, None, generator(), pad_multiple=8))
    assert sorted(len(b["index"]) for b in batches) == [8, 16, 16]
    for b in batches:
        assert b["x"].shape == b["target"].shape == b["mask"].shape
        assert [b[k].dtype for k in ("x", "target", "mask", "index")] == [
            *(torch.int64, torch.int64, torch.bool, torch.int64)
        ]
        assert b["x"].shape[1] == math.ceil(int(b["mask"].sum(1).max()) / 8) * 8


def test_a_crop_is_a_window_of_the_clip_that_starts_with_the_true_previous_class(ds):
    starts = set()
    g = generator()
    for _ in range(20):
        for b in sample_batches(ds, 8, 50, g):
            for i, x, target, mask in zip(*rows_of(b), strict=True):
                clip, n = ds[i].long(), int(mask.sum())
                assert n == min(len(clip), 50)
                padded = torch.cat([torch.tensor([SILENCE]), clip])
                windows = padded.unfold(0, n + 1, 1)  # every window with the class before it
                row = torch.cat([x[:1], target[:n]])
                where = (windows == row).all(1).nonzero().flatten()
                assert len(where) >= 1 and torch.equal(x[1:n], target[: n - 1])
                if i == 39:
                    starts.add(int(where[0]))
    assert len(starts) > 5 and max(starts) <= 119 - 50


def test_without_shuffling_crops_start_at_the_start_and_no_generator_is_needed(ds):
    for b in sample_batches(ds, 8, 50, shuffle=False):
        for i, _, target, mask in zip(*rows_of(b), strict=True):
            assert torch.equal(target[mask].to(torch.uint8), ds[i][:50])


def same(a, b):
    pairs = list(zip(a, b, strict=True)) if len(a) == len(b) else []
    return len(a) == len(b) and all(torch.equal(p[k], q[k]) for p, q in pairs for k in p)


def test_the_same_generator_gives_the_same_epoch_and_the_next_epoch_differs(ds):
    g, h = generator(3), generator(3)
    args = (ds, 8, 50)
    first, again = list(sample_batches(*args, g)), list(sample_batches(*args, h))
    assert same(first, again)
    second = list(sample_batches(*args, g))
    assert not same(first, second)
    assert same(second, list(sample_batches(*args, h)))


def test_an_epoch_can_be_resumed_and_shared_between_processes(ds):
    def epoch(**kw):
        return list(sample_batches(ds, 6, 50, generator(1), augment=GainSpeed(), **kw))

    whole = epoch()
    assert len(whole) == 7
    assert same(epoch(start=3), whole[3:])
    for k, batches in enumerate(zip(whole, epoch(shard=(0, 3)), epoch(shard=(1, 3)),
                                    epoch(shard=(2, 3)), strict=True)):  # fmt: skip
        together, *parts = batches  # every process has its part of the clips of each batch
        assert torch.cat([p["index"] for p in parts]).equal(together["index"]), k
        assert sum(int(p["samples"]) for p in parts) == int(together["samples"])
        assert all(p["planned"] == len(together["index"]) for p in parts)
        for row, (i, n) in enumerate(
            zip(together["index"], together["mask"].sum(1).tolist(), strict=True)
        ):
            part = next(p for p in parts if i in p["index"])
            there = int((part["index"] == i).nonzero())
            for key in ("x", "target"):  # the same crop, the same augmentation
                assert together[key][row, :n].equal(part[key][there, :n])
        if len(together["index"]) == 4:  # the last one: two clips each, and a row of padding
            assert len(parts[2]["index"]) == 0 and not parts[2]["mask"].any()
    parts = [list(sample_batches(ds, 6, None, shuffle=False, shard=(r, 2))) for r in (0, 1)]
    assert sum(len(b["index"]) for part in parts for b in part) == 40  # none left out


def test_little_padding_is_computed(tmp_path):
    lengths = np.random.default_rng(0).integers(100, 1000, 200)
    ds = ClipDataset(
        split_of(tmp_path, {f"{i}.wav": noise(n) for i, n in enumerate(lengths)}), 8000
    )
    batches = list(sample_batches(ds, 8, None, generator()))
    cells = sum(b["mask"].numel() for b in batches)
    assert ds.data.numel() / cells > 0.9
    assert 1 < len({b["x"].shape[1] for b in batches[:5]})  # long and short take turns


@pytest.mark.parametrize(
    "change, words",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"max_len": 0}, "max_len"),
        ({"pad_multiple": 0}, "pad_multiple"),
        ({"shard": (2, 2)}, "shard"),
        ({"shard": (0, 3)}, "batch_size=4: must be divisible by the 3 processes"),
    ],
)
def test_impossible_sizes_are_refused_before_the_first_batch(ds, change, words):
    with pytest.raises(ValueError, match=words):
        sample_batches(**{"ds": ds, "batch_size": 4, "max_len": None, **change})


# long recordings


@pytest.fixture
def recordings(tmp_path):
    """Two recordings of 2.5 and 1.2 s, and the middle of the first one once more."""
    csv = split_of(tmp_path, {"a.wav": noise(20_000, 1), "b.wav": noise(9_600, 2)})
    csv.write_text("path,label,start,stop\na.wav,x,,\nb.wav,y,,\na.wav,z,0.5,1.25\n")
    return csv


def test_recordings_come_in_pieces_whose_samples_are_those_of_the_file(recordings, tmp_path):
    whole = ClipDataset(recordings, 8000)
    assert whole.lengths.tolist() == [20_000, 9_600, 6_000]
    assert torch.equal(whole[2], whole[0][4_000:10_000])
    for pcm in (False, True):
        whole = ClipDataset(recordings, 8000, pcm=pcm)
        kept = {"sample_len": 8000, "cache": tmp_path / "cache", "pcm": pcm}
        pieces = ClipDataset(recordings, 8000, **kept)
        assert torch.equal(pieces.data, whole.data) and pieces.data.dtype == whole.data.dtype
        assert pieces.lengths.tolist() == [8000, 8000, 4000, 8000, 1600, 6000]
        assert [clip.label for clip in pieces.clips] == list("xxxyyz")
        assert torch.equal(pieces[4], whole[1][8000:])


@pytest.mark.parametrize("rate", [8000, 16_000])
@pytest.mark.parametrize("how", [{}, {"peak": 0.9}, {"append_silence": 7}, {"pcm": True}])
@pytest.mark.parametrize("sample_len", [None, 2500])
def test_parts_of_a_recording_are_the_clips_that_files_of_them_would_be(
    tmp_path, rate, how, sample_len
):
    borders = [0, 1.25, 2, 3.5]
    wave = noise(28_000, 1)
    parts = [wave[round(a * 8000) : round(b * 8000)] for a, b in pairwise(borders)]
    files = split_of(tmp_path, {f"{i}.wav": part for i, part in enumerate(parts)})
    soundfile.write(tmp_path / "all.wav", wave, 8000)
    rows = [f"all.wav,{a},{b}" for a, b in pairwise(borders)]
    (tmp_path / "parts.csv").write_text("\n".join(["path,start,stop", *rows]))
    how = how | {"sample_len": sample_len, "cache": tmp_path / "cache"}
    found, expected = (ClipDataset(c, rate, **how) for c in (tmp_path / "parts.csv", files))
    assert torch.equal(found.data, expected.data) and torch.equal(found.offsets, expected.offsets)


def test_recordings_are_decoded_once_and_mapped(recordings, tmp_path, monkeypatch, caplog):
    """The second time nothing is read but the cache, which is known by what the files hold: moved
    they are the same, changed they are not; skipped files are told again."""
    from rawaudio import audio

    cache = tmp_path / "cache"
    recordings.write_text(recordings.read_text() + "gone.wav,x,,\n")
    first = ClipDataset(recordings, 8000, sample_len=8000, cache=cache)
    names = sorted(path.name for path in cache.iterdir())
    assert len(names) == 2 and not any(name.endswith(".tmp") for name in names)
    assert first.mapped is not None and "1 not found" in caplog.text
    caplog.clear()
    decode = audio.decode
    monkeypatch.setattr(audio, "decode", None)
    again = ClipDataset(recordings, 8000, sample_len=4000, cache=cache)
    assert torch.equal(again.data, first.data) and "1 not found" in caplog.text
    assert again.skipped == first.skipped and len(again) > len(first)
    monkeypatch.setattr(audio, "decode", decode)
    split_of(tmp_path, {"b.wav": noise(9_600, 3)}, name="other.csv")
    changed = ClipDataset(recordings, 8000, sample_len=8000, cache=cache)
    assert not torch.equal(changed.data, first.data)
    (path,) = [p for p in cache.glob("*.samples") if p.stat().st_size == changed.data.numel()
               and p.name not in names]  # fmt: skip
    path.write_bytes(path.read_bytes()[:100])  # cut short: made anew
    whole = ClipDataset(recordings, 8000)
    assert torch.equal(ClipDataset(recordings, 8000, sample_len=8000, cache=cache).data, whole.data)


def test_a_recording_longer_than_memory_would_like_takes_none(tmp_path):
    """Mapped samples are pages of a file: data sets of any length are opened in no memory."""
    csv = split_of(tmp_path, {"a.wav": noise(16_000)})
    ds = ClipDataset(csv, 8000, sample_len=8000, cache=tmp_path / "cache")
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(next((tmp_path / "cache").glob("*.samples"))) in maps.read_text()
    assert ds.data.untyped_storage().nbytes() == 16_000


def test_a_file_that_breaks_in_mid_run_is_left_out_and_counted(recordings, tmp_path, caplog):
    """Its pieces are missing from then on, with one warning; the others come as before."""
    ds = ClipDataset(recordings, 8000, sample_len=8000, cache=tmp_path / "cache")
    before = list(sample_batches(ds, 4, None, generator()))
    path = next((tmp_path / "cache").glob("*.samples"))
    with open(path, "r+b") as file:
        file.truncate(26_000)  # the last two pieces are no longer there
    with caplog.at_level(logging.WARNING):
        after = list(sample_batches(ds, 4, None, generator()))
        waves = list(wave_batches(ds, 4, 8000, generator()))
    assert [b["planned"] for b in before] == [b["planned"] for b in after]
    left = {i for b in after for i in b["index"].tolist()}
    assert left == {i for b in waves for i in b["index"].tolist()} == {0, 1, 2}
    for b in after:
        for i, target, mask in zip(b["index"].tolist(), b["target"], b["mask"], strict=False):
            assert torch.equal(target[mask].to(torch.uint8), ds[i])
        assert int(b["samples"]) == int(b["mask"].sum())
    assert len(ds.broken) == 2 and len(caplog.records) == 2  # a file each


def test_prefetched_batches_are_the_batches(ds):
    """In their order, with errors raised where they are used, and an end of the thread."""
    plain = list(sample_batches(ds, 7, 50, generator(1)))
    assert same(list(prefetched(sample_batches(ds, 7, 50, generator(1)), pin=False)), plain)
    few = prefetched(sample_batches(ds, 2, 50, generator(1)), pin=False, depth=1)
    next(few)
    few.close()

    def failing():
        yield plain[0]
        raise ValueError("here")

    batches = prefetched(failing(), pin=False)
    next(batches)
    with pytest.raises(ValueError, match="here"):
        next(batches)
    for _ in range(50):
        if threading.active_count() == 1:
            break
        time.sleep(0.1)
    assert not [t for t in threading.enumerate() if "work" in t.name]


@pytest.mark.parametrize("part", ["-1,", "2,1", "x,", ",0"])
def test_a_part_that_is_none_is_refused(tmp_path, part):
    (tmp_path / "s.csv").write_text(f"path,start,stop\na.wav,{part}\n")
    with pytest.raises(ValueError, match=r"s.csv, line 2: start,stop = .*seconds"):
        read_csv(tmp_path / "s.csv")


# augmentation


def tone(n, hz, peak=0.3, rate=8000):
    return peak * torch.sin(2 * math.pi * hz / rate * torch.arange(n))


def as_clip(wav):
    return mulaw.encode(wav).to(torch.uint8)


def pitch(clip, rate=8000):
    spectrum = torch.fft.rfft(mulaw.decode(clip) * torch.hann_window(len(clip))).abs()
    return spectrum.argmax().item() * rate / len(clip)


def test_speed_changes_length_and_pitch_together_within_its_range():
    clip, speeds = as_clip(tone(8000, 1000)), []
    for seed in range(20):
        out = GainSpeed(gain_db=0, speed=0.1)(clip, generator(seed))
        speeds.append(8000 / len(out))
        assert out.dtype == torch.uint8
        assert pitch(out) == pytest.approx(1000 * speeds[-1], abs=2)
    assert 0.9 <= min(speeds) < 0.95 and 1.05 < max(speeds) <= 1.1


def test_gain_changes_the_level_within_its_range_and_never_clips():
    quiet, loud = as_clip(tone(4000, 300, 0.1)), as_clip(tone(4000, 300, 0.9))
    gains = []
    for seed in range(30):
        augment = GainSpeed(gain_db=6, speed=0)
        out = augment(quiet, generator(seed))
        assert len(out) == 4000
        gains.append(20 * math.log10(mulaw.decode(out).std() / mulaw.decode(quiet).std()))
        wave, before = mulaw.decode(augment(loud, generator(seed))), mulaw.decode(loud)
        gain = (wave @ before) / (before @ before)
        assert gain < 1.12  # 1 / 0.9: where the peak meets full scale
        assert (wave - gain * before).abs().max() < 0.03  # scaled, up to rounding: no flat tops
    assert -6.1 < min(gains) < -4 and 4 < max(gains) < 6.1


def test_what_the_new_rate_cannot_hold_does_not_fold_back():
    high = tone(8000, 3900)
    fast = change_speed(high, 1.1)  # 4,290 Hz at 8 kHz: gone, not 3,710 Hz
    assert fast[200:-200].abs().max() < 0.01 * high.abs().max()


def test_no_change_is_the_identity():
    clip = torch.randint(256, (500,), generator=generator(), dtype=torch.uint8)
    assert torch.equal(GainSpeed(0, 0)(clip, generator()), clip)


def test_appended_silence_comes_through_unchanged():
    clip = torch.cat([as_clip(tone(1000, 500)), torch.full((300,), SILENCE, dtype=torch.uint8)])
    for seed in range(5):
        out = GainSpeed()(clip, generator(seed))
        assert (out[-300:] == SILENCE).all() and len(out) != len(clip)
        assert int((out != SILENCE).nonzero().max()) >= len(out) - 305


@pytest.mark.parametrize("n", [0, 1, 2, 3, 50])
def test_short_and_silent_clips_are_augmented_too(n):
    for clip in (
        torch.full((n,), SILENCE, dtype=torch.uint8),
        torch.full((n,), SILENCE - 1, dtype=torch.uint8),
        torch.arange(n, dtype=torch.uint8),
    ):
        out = GainSpeed()(clip, generator())
        assert out.dtype == torch.uint8 and abs(len(out) - n) <= 0.12 * n + 1


def test_augmented_batches_keep_the_shift_between_input_and_target(ds):
    for b in sample_batches(ds, 8, 50, generator(), augment=GainSpeed()):
        n = b["mask"].sum(1)
        assert (n <= 50).all() and (n >= 1).all()
        inside = b["mask"][:, 1:]
        assert torch.equal(b["x"][:, 1:][inside], b["target"][:, :-1][inside])


@pytest.mark.parametrize("bad", [{"gain_db": -1}, {"speed": 1.0}, {"speed": -0.1}])
def test_impossible_augmentation_is_refused(bad):
    with pytest.raises(ValueError, match="speed"):
        GainSpeed(**bad)
