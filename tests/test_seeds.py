"""Streams of random numbers do not meet, whatever they are for."""

import itertools

import pytest
import soundfile
import torch
from training import NOISY, RATE, arguments, tone

import rawaudio.run
import train
from rawaudio import batches, seeds
from rawaudio.seeds import seed_of, seeded


def test_streams_of_other_purposes_seeds_steps_and_ranks_do_not_meet():
    """Among 4,000 streams no two have the same seed, nor the same first draws."""
    purposes = ("dropout", "noise", "conditions", "clip")
    places = list(itertools.product(purposes, range(10), range(50), range(2)))
    assert len({seed_of(*place) for place in places}) == len(places) == 4000
    first = {tuple(torch.rand(2, generator=seeded(*place)).tolist()) for place in places[:1000]}
    assert len(first) == 1000


def test_the_next_seed_is_not_the_same_stream_a_step_earlier():
    """What seeds of the form seed + step would be."""
    assert seed_of("noise", 1, 5) != seed_of("noise", 2, 4)
    assert not torch.equal(
        torch.rand(5, generator=seeded("noise", 1, 5)),
        torch.rand(5, generator=seeded("noise", 2, 4)),
    )


def test_a_stream_is_the_same_in_every_process():
    """A number that hangs on its parts alone: runs are gone on with by it."""
    assert seed_of("noise", 1775, 3) == 2083014969
    assert 0 <= seed_of("noise", 1775, 4) < 2**32  # what PyTorch keeps of a seed on the CPU


@pytest.mark.parametrize("kind", [["model.dropout=0.1"], [*NOISY, "model.dropout=0.1"]])
def test_no_stream_of_a_run_is_another_ones(data, tmp_path, monkeypatch, kind):
    """Everything that is drawn from in two runs, with seeds that follow each other: dropout, noise,
    order, weights, and every clip's crop have streams of their own."""
    for name in ("train", "valid"):
        (tmp_path / f"{name}.csv").write_text("path,label\n0.wav,a\n1.wav,b\n2.wav,a\n")
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", tone(90 + 60 * i, 100), RATE)
    asked = []

    def recorded(*parts):
        asked.append(parts)
        return seed_of(*parts)

    for module in (seeds, train, rawaudio.run):
        monkeypatch.setattr(module, "seed_of", recorded)
    assert batches.seeded is seeds.seeded  # which asks `seed_of` too
    for seed in (1, 2):
        more = [f"seed={seed}", "max_steps=4", "conditions=[label]", "n_listen=0", "seq_len=60"]
        train.main(arguments(tmp_path, tmp_path / f"run{seed}", *kind, *more))
    streams = set(asked)
    purposes = {parts[0] for parts in streams}
    assert purposes >= {"order", "weights", "dropout", "conditions", "clip"}
    assert ("noise" in purposes) == (kind[0] == NOISY[0])
    assert len({seed_of(*parts) for parts in streams}) == len(streams) > 20
    steps = {parts[1:] for parts in streams if parts[0] == "dropout"}
    assert steps == {(seed, step, 0) for seed in (1, 2) for step in range(4)}
