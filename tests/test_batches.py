"""Batches: every sample once, in an order that hangs on the seed alone; augmentation."""

import math
import threading
import time

import numpy as np
import pytest
import torch
from clips import generator, noise, recordings, split_of

from rawaudio.batches import GainSpeed, change_speed, prefetched, sample_batches, wave_batches
from rawaudio.data import ClipDataset
from sashimi import mulaw
from sashimi.mulaw import SILENCE


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    """Forty clips of 2 to 119 samples."""
    folder = tmp_path_factory.mktemp("clips")
    waves = {f"{i:02d}.wav": noise(2 + 3 * i, seed=i) for i in range(40)}
    return ClipDataset(split_of(folder, waves), 8000, progress=False)


def rows_of(batches):
    for b in batches:
        yield from zip(b["index"].tolist(), b["x"], b["target"], b["mask"], strict=True)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_sample_of_every_clip_once(ds, shuffle):
    """Padded to a multiple; the last batch is kept."""
    seen = {}
    batches = list(sample_batches(ds, 16, None, generator(), shuffle=shuffle, pad_multiple=8))
    assert sorted(len(b["index"]) for b in batches) == [8, 16, 16]
    for b in batches:
        dtypes = [b[k].dtype for k in ("x", "target", "index", "mask")]
        assert dtypes == [torch.int64, torch.int64, torch.int64, torch.bool]
        assert b["x"].shape[1] == math.ceil(int(b["mask"].sum(1).max()) / 8) * 8
    for i, x, target, mask in rows_of(batches):
        assert i not in seen
        seen[i] = target[mask].to(torch.uint8)
        assert int(mask.sum()) == len(ds[i]) and bool(mask[: len(ds[i])].all())
        assert x[0] == SILENCE and torch.equal(x[1:][mask[1:]], target[:-1][mask[1:]])
        assert (x[~mask] == SILENCE).all() and (target[~mask] == SILENCE).all()
    assert sorted(seen) == list(range(40))
    assert all(torch.equal(seen[i], ds[i]) for i in seen)


def test_a_crop_is_a_window_of_the_clip_that_starts_with_the_true_previous_class(ds):
    starts, g = set(), generator()
    for _ in range(10):
        for i, x, target, mask in rows_of(sample_batches(ds, 8, 50, g)):
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


def test_waves_are_the_clips_followed_by_silence(ds):
    for b in wave_batches(ds, 7, 60, shuffle=False):
        for i, wav in zip(b["index"].tolist(), b["wav"], strict=True):
            clip = mulaw.decode(ds[i][:60])
            assert torch.equal(wav, torch.cat([clip, torch.zeros(60 - len(clip))]))
        assert int(b["samples"]) == b["wav"].numel()


def same(a, b):
    pairs = list(zip(a, b, strict=True)) if len(a) == len(b) else []
    return len(a) == len(b) and all(torch.equal(p[k], q[k]) for p, q in pairs for k in p)


def test_an_epoch_is_the_one_that_runs_were_begun_with(ds):
    """Recorded: they are gone on with by the same clips and crops. The next one is another."""
    g = generator(5)
    first, second = (list(sample_batches(ds, 16, 50, g)) for _ in range(2))
    wanted = [37, 33, 23, 20, 38, 30, 22, 32, 31, 29, 21, 28, 35, 17, 27, 16]
    assert first[0]["index"].tolist() == wanted and not same(first, second)
    assert first[0]["target"][0, :6].tolist() == [225, 55, 16, 224, 40, 48]
    assert first[0]["target"][1, :6].tolist() == [53, 21, 28, 69, 32, 32]


def test_an_epoch_can_be_resumed_and_shared_between_processes(ds):
    def epoch(**order):
        return list(sample_batches(ds, 6, 50, generator(1), augment=GainSpeed(), **order))

    whole = epoch()
    assert len(whole) == 7 and same(epoch(start=3), whole[3:])
    shards = [epoch(shard=(rank, 3)) for rank in range(3)]
    for together, *parts in zip(whole, *shards, strict=True):
        assert torch.cat([p["index"] for p in parts]).equal(together["index"])
        assert sum(int(p["samples"]) for p in parts) == int(together["samples"])
        assert all(p["planned"] == len(together["index"]) for p in parts)
        rows = {i: (x[mask], target[mask]) for i, x, target, mask in rows_of([together])}
        for part in parts:
            if not len(part["index"]):  # the last batch has two clips for two of the processes
                assert part["x"].shape[0] == 1 and not part["mask"].any()
                continue
            for i, x, target, mask in rows_of([part]):  # the same crop, the same augmentation
                assert torch.equal(x[1:][mask[1:]], target[:-1][mask[1:]])
                assert torch.equal(x[mask], rows[i][0]) and torch.equal(target[mask], rows[i][1])
    assert [len(b["index"]) for b in shards[2]].count(0) == 1
    parts = [list(sample_batches(ds, 6, None, shuffle=False, shard=(r, 2))) for r in (0, 1)]
    assert sum(len(b["index"]) for part in parts for b in part) == 40  # none left out


def test_little_padding_is_computed(tmp_path):
    lengths = np.random.default_rng(0).integers(100, 1000, 200)
    waves = {f"{i}.wav": noise(n) for i, n in enumerate(lengths)}
    ds = ClipDataset(split_of(tmp_path, waves), 8000)
    batches = list(sample_batches(ds, 8, None, generator()))
    assert ds.data.numel() / sum(b["mask"].numel() for b in batches) > 0.9
    assert 1 < len({b["x"].shape[1] for b in batches[:5]})  # long and short take turns


@pytest.mark.parametrize(
    "change, words",
    [({"batch_size": 0}, "batch_size"), ({"max_len": 0}, "max_len"), ({"shard": (2, 2)}, "shard"),
     ({"pad_multiple": 0}, "pad_multiple"),
     ({"shard": (0, 3)}, "batch_size=4: must be divisible by the 3 processes")],
)  # fmt: skip
def test_impossible_sizes_are_refused_before_the_first_batch(ds, change, words):
    with pytest.raises(ValueError, match=words):
        sample_batches(**{"ds": ds, "batch_size": 4, "max_len": None, **change})


def test_a_file_that_breaks_in_mid_run_is_left_out_and_counted(tmp_path, caplog):
    """Its pieces are missing from then on, with one warning; the others come as before."""
    ds = ClipDataset(recordings(tmp_path), 8000, sample_len=8000, cache=tmp_path / "cache")
    before = list(sample_batches(ds, 4, None, generator()))
    path = next((tmp_path / "cache").glob("*.samples"))
    with open(path, "r+b") as file:
        file.truncate(26_000)  # the last pieces are no longer there
    after = list(sample_batches(ds, 4, None, generator()))
    waves = list(wave_batches(ds, 4, 8000, generator()))
    assert [b["planned"] for b in before] == [b["planned"] for b in after]
    for batches in (after, waves):
        assert {i for b in batches for i in b["index"].tolist()} == {0, 1, 2}
    for i, _, target, mask in rows_of(b for b in after if len(b["index"])):
        assert torch.equal(target[mask].to(torch.uint8), ds[i])
    assert all(int(b["samples"]) == int(b["mask"].sum()) for b in after)
    assert len(ds.broken) == 2 and len(caplog.records) == 2  # a file each


def test_prefetched_batches_are_the_batches(ds):
    """In their order, with errors raised where they are used, and an end of the thread."""

    def failing():
        yield from plain
        raise ValueError("here")

    plain = list(sample_batches(ds, 7, 50, generator(1)))
    batches = prefetched(failing(), pin=False)
    assert same([next(batches) for _ in plain], plain)
    with pytest.raises(ValueError, match="here"):
        next(batches)
    few = prefetched(sample_batches(ds, 2, 50, generator(1)), pin=False, depth=1)
    next(few)
    few.close()
    end = time.monotonic() + 5
    while any("batches" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.1)


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
    high = tone(8000, 3900)
    fast = change_speed(high, 1.1)  # 4,290 Hz at 8 kHz: gone, not folded back to 3,710 Hz
    assert fast[200:-200].abs().max() < 0.01 * high.abs().max()


def test_gain_changes_the_level_within_its_range_and_never_clips():
    quiet, loud = as_clip(tone(4000, 300, 0.1)), as_clip(tone(4000, 300, 0.9))
    gains, augment = [], GainSpeed(gain_db=6, speed=0)
    assert torch.equal(GainSpeed(0, 0)(loud, generator()), loud)
    for seed in range(30):
        out = augment(quiet, generator(seed))
        assert len(out) == 4000
        gains.append(20 * math.log10(mulaw.decode(out).std() / mulaw.decode(quiet).std()))
        wave, before = mulaw.decode(augment(loud, generator(seed))), mulaw.decode(loud)
        gain = (wave @ before) / (before @ before)
        assert gain < 1.12  # 1 / 0.9: where the peak meets full scale
        assert (wave - gain * before).abs().max() < 0.03  # scaled, up to rounding: no flat tops
    assert -6.1 < min(gains) < -4 and 4 < max(gains) < 6.1


def test_a_share_of_the_clips_is_changed_the_others_are_as_recorded():
    clip, augment = as_clip(tone(1000, 300)), GainSpeed(speed=0.5, share=0.3)
    rng = generator()
    same = [torch.equal(augment(clip, rng), clip) for _ in range(1000)]
    assert sum(same) == pytest.approx(700, abs=50)  # three standard deviations


def test_appended_silence_comes_through_unchanged():
    clip = torch.cat([as_clip(tone(1000, 500)), torch.full((300,), SILENCE, dtype=torch.uint8)])
    for seed in range(5):
        out = GainSpeed()(clip, generator(seed))
        assert (out[-300:] == SILENCE).all() and len(out) != len(clip)
        assert int((out != SILENCE).nonzero().max()) >= len(out) - 305


@pytest.mark.parametrize("n", [0, 1, 2, 3, 50])
def test_short_and_silent_clips_are_augmented_too(n):
    silent = torch.full((n,), SILENCE, dtype=torch.uint8)
    for clip in (silent, silent - 1, torch.arange(n, dtype=torch.uint8)):
        out = GainSpeed()(clip, generator())
        assert out.dtype == torch.uint8 and abs(len(out) - n) <= 0.12 * n + 1


@pytest.mark.parametrize("bad", [{"gain_db": -1}, {"speed": 1.0}, {"speed": -0.1}, {"share": 0}])
def test_impossible_augmentation_is_refused(bad):
    with pytest.raises(ValueError, match="speed|share=0: must be above 0"):
        GainSpeed(**bad)
