"""Streams of random numbers do not meet, whatever they are for."""

import itertools

import numpy as np
import pytest
import torch
from training import NOISY, arguments

import rawaudio.run
import train
from rawaudio import batches, seeds
from rawaudio.seeds import philox, seed_of, seeded, uniforms


def test_streams_of_other_purposes_seeds_steps_and_ranks_do_not_meet():
    """Among 4,000 streams no two have the same seed, nor the same first draws, as those of seeds
    of the form seed + step would; in every process they are the same."""
    purposes = ("dropout", "noise", "conditions", "clip")
    places = list(itertools.product(purposes, range(10), range(50), range(2)))
    assert len({seed_of(*place) for place in places}) == len(places) == 4000
    first = {tuple(torch.rand(2, generator=seeded(*place)).tolist()) for place in places[:1000]}
    assert len(first) == 1000
    assert seed_of("noise", 1775, 3) == 2083014969
    assert 0 <= seed_of("noise", 1775, 4) < 2**32  # what PyTorch keeps of a seed on the CPU


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822,
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    assert [f"{x:08x}" for x in philox(np.array([counter]), key)[0]] == words.split()


def test_uniforms_hang_on_their_place_alone_and_fill_the_unit_interval():
    u = uniforms(5, 4001)
    assert u.dtype == torch.float32 and 0 <= u.min() and u.max() < 1
    assert torch.equal(uniforms(5, 10), u[:10]) and not torch.equal(uniforms(6, 10), u[:10])
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.005
    assert u.unique().numel() > 3990


@pytest.mark.parametrize("kind", [[], NOISY])
def test_no_stream_of_a_run_is_another_ones(data, tmp_path, monkeypatch, kind):
    """Everything that is drawn from in two runs, with seeds that follow each other: dropout, noise,
    order, weights, and every clip's crop have streams of their own."""
    asked = set()

    def recorded(*parts):
        asked.add(parts)
        return seed_of(*parts)

    for module in (seeds, train, rawaudio.run):
        monkeypatch.setattr(module, "seed_of", recorded)
    assert batches.seeded is seeds.seeded  # which asks `seed_of` too
    for seed in (1, 2):
        more = [f"seed={seed}", "max_steps=4", "conditions=[label]", "n_listen=0", "seq_len=60"]
        train.main(arguments(data, tmp_path / f"{seed}", *kind, "model.dropout=0.1", *more))
    purposes = {parts[0] for parts in asked}
    assert purposes >= {"order", "weights", "dropout", "conditions", "clip"}
    assert ("noise" in purposes) == (kind == NOISY)
    assert len({seed_of(*parts) for parts in asked}) == len(asked) > 20
    steps = {parts[1:] for parts in asked if parts[0] == "dropout"}
    assert steps == {(seed, step, 0) for seed in (1, 2) for step in range(4)}
