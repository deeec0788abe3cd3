"""Truncated back-propagation: clips in pieces, the state carried on from one to the next."""

import pytest
import torch
from training import RATE, assert_same, in_processes, last_of, refused

import train
from rawaudio import tbptt
from rawaudio.autoregressive import masked_bits
from rawaudio.batches import sample_batches
from rawaudio.data import ClipDataset
from rawaudio.families import FAMILIES

TINY = {
    "samplernn": {"frame_sizes": [4, 2], "d_hidden": 8, "d_embedding": 4},
    "wavenet": {"layers": 2, "blocks": 2, "residual_channels": 4, "dilation_channels": 4,
                "skip_channels": 8, "end_channels": 8},
}  # fmt: skip
SIZE = 70  # no multiple of anything


def batches(data, **settings):
    ds = ClipDataset(data / "train.csv", RATE, progress=False)
    return list(sample_batches(ds, 2, None, torch.Generator().manual_seed(0), **settings))


def test_pieces_hold_every_sample_once(data):
    whole = batches(data)
    pieces = list(tbptt.pieces(iter(whole), SIZE, 0))
    ends = [i + 1 for i, piece in enumerate(pieces) if piece["last"]]
    assert len(ends) == len(whole) and ends[-1] == len(pieces) > len(whole)
    for batch, first, end in zip(whole, [0, *ends], ends, strict=False):
        own = pieces[first:end]
        assert sum(int(piece["samples"]) for piece in own) == batch["samples"]
        assert all(piece["mask"].shape[1] == SIZE for piece in own[:-1])
        length = int(batch["mask"].sum(1).max())
        for key in ("x", "target", "mask"):
            joined = torch.cat([piece[key] for piece in own], 1)
            assert torch.equal(joined[:, :length], batch[key][:, :length])
        assert not batch["mask"][:, joined.shape[1] :].any()
    rest = list(tbptt.pieces(iter(whole), SIZE, 1))
    assert len(rest) == len(pieces) - 1 and torch.equal(rest[0]["x"], pieces[1]["x"])


@pytest.mark.parametrize("kind", TINY)
def test_carried_states_give_the_loss_of_whole_clips(kind, data):
    """And gradients that end where a piece begins, but for what the clips are told."""
    torch.manual_seed(0)
    told = {"conditions": {"label": ["a", "b"]}, "condition_counts": {"label": [1, 1]}}
    model = FAMILIES[kind].module(FAMILIES[kind].config(**TINY[kind], **told))
    torch.nn.init.normal_(model.told.tables[0].weight)
    batch = batches(data)[0]
    batch["told"] = torch.tensor([[1], [2]])
    rows, carried, total = model.rows_of(batch, 2), tbptt.Carried([]), 0.0
    for k, piece in enumerate(tbptt.pieces(iter([batch]), SIZE, 0)):
        if k == 2:  # as if saved and gone on from
            carried = tbptt.Carried(carried.tensors())
        model.zero_grad()
        state = carried.begin(model, 0, rows, k * SIZE)
        loss = masked_bits(model, piece, state)
        loss.backward()
        total += loss.item()
        assert model.told.tables[0].weight.grad.any()
    assert k >= 2 and total == pytest.approx(masked_bits(model, batch).item(), rel=1e-5)


def arguments(data, run, kind, *more):
    model = TINY[kind] | {"sample_rate": RATE, "clip_length": 40}
    return [
        f"train_csv={data / 'train.csv'}", f"valid_csv={data / 'valid.csv'}", "device=cpu",
        f"checkpoint_path={run}", f"model={kind}", f"tbptt={SIZE}", "batch_size=2", "max_steps=9",
        "seq_len=400", "checkpoint_interval=3", "n_listen=0", "grad_clip_value=0.01",
        *(f"model.{key}={train.as_written(value)}" for key, value in model.items()), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", TINY)
def test_a_run_that_died_inside_a_batch_ends_as_if_nothing_had(kind, data, tmp_path, monkeypatch):
    argv, summarise = arguments(data, tmp_path / "died", kind), train.summarise
    train.main(arguments(data, tmp_path / "whole", kind))

    def dies(run, *rest):
        summarise(run, *rest)
        if run.position.step == 5:
            raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "summarise", dies)
        train.main(argv)
    saved = last_of(tmp_path / "died")
    assert saved["step"] == 3 and saved["pieces_done"] and saved["carried"]
    train.main(argv)
    assert_same(last_of(tmp_path / "whole"), last_of(tmp_path / "died"))


def test_processes_and_parts_take_the_same_steps(data, tmp_path):
    one, two, parts = (
        arguments(data, tmp_path / name, "samplernn", "max_steps=5") for name in ("1", "2", "p")
    )
    train.main(one)
    train.main([*parts, "accumulate=2"])
    in_processes(2, two)
    wanted = last_of(tmp_path / "1")
    for name in ("2", "p"):
        other = last_of(tmp_path / name)
        assert [other[key] for key in ("epoch", "batches_done", "pieces_done")] == [
            wanted[key] for key in ("epoch", "batches_done", "pieces_done")
        ]
        for key, value in wanted["model"].items():
            assert torch.allclose(value, other["model"][key], atol=1e-4), key


@pytest.mark.parametrize(
    ("settings", "words"),
    [(["model=autoregressive"], ["tbptt=8", "wavenet, samplernn"]),
     (["model=wavenet", "compile=true"], ["tbptt=8", "compile=true"]),
     (["model=wavenet", "tbptt=0"], ["tbptt=0"])],
)  # fmt: skip
def test_what_cannot_be_is_refused(settings, words, data, tmp_path, capsys):
    files = [f"train_csv={data / 'train.csv'}", f"valid_csv={data / 'valid.csv'}"]
    refused(capsys, [*files, f"checkpoint_path={tmp_path / 'r'}", "tbptt=8", *settings], *words)
