"""Checkpoints: what was saved comes back to the bit, what other programs wrote computes what it
computed there, and everything else is one clear error."""

import functools
import json
import os
import pickle
import re
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import PROGRAMS, SECRET, Trap, assert_refused, with_pickle
from models import make, seeded
from safetensors.torch import load_file, save_file

from rawaudio import checkpoint
from rawaudio.checkpoint import load_checkpoint, save_checkpoint
from rawaudio.files import read_metadata
from sashimi.backbone import Sashimi
from sashimi.s4 import S4

FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED = FIXTURES / "published_ar.pt"
either = pytest.mark.parametrize("suffix", [".safetensors", ".pt"])


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, make(), step=20)
    return path


@pytest.fixture(scope="module")
def published():
    return load_checkpoint(PUBLISHED)


@pytest.fixture(autouse=True)
def warm(published):
    """The first load takes longest."""


def write_pt(path, tensors, config, **more):
    """What the trainer writes as last.pt, as far as weights are concerned."""
    content = {"format": "simple-sashimi", "kind": "autoregressive", "averaged": None}
    torch.save(content | {"model": tensors, "config": config} | more, path)


def raw_metadata(path):
    """The safetensors metadata as stored: text to text."""
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def config_of(path):
    return json.loads(raw_metadata(path)["config"])


def rewrite(path, tensors=None, **metadata):
    """The same safetensors file with other tensors or metadata; None removes an entry."""
    kept = {k: v for k, v in (raw_metadata(path) | metadata).items() if v is not None}
    save_file(load_file(path) if tensors is None else tensors, path, kept)


def assert_same(a, b):
    assert a.config == b.config
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


def assert_trainable(model):
    """Every parameter has its own contiguous memory and moves by one AdamW step: expanded or
    shared ones raise in `load_state_dict` and AdamW."""
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        assert p.requires_grad and p.is_contiguous() and p.dtype == torch.float32, name
        assert p.untyped_storage().nbytes() == p.numel() * 4, name
    assert len({p.data_ptr() for p in parameters.values()}) == len(parameters)
    x = torch.randint(256, (1, 100))
    if isinstance(model, Sashimi):
        x = torch.randn(1, 100, model.d_model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    model(x).square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert all((before[name] != p).any() for name, p in parameters.items())
    model.load_state_dict(before)


@pytest.mark.parametrize("kwargs", [{}, {"unet": True, "glu": False}, {"tied": True, "ff": 0}])
def test_what_was_saved_comes_back_to_the_bit(tmp_path, kwargs):
    """Config, parameters, audio, in eval mode, trainable; text, numbers and groups beside it, for
    any reader of safetensors."""
    model, path = make(**kwargs), tmp_path / "new" / "folder" / "model.safetensors"
    about = {"data": "tones", "step": 20, "bits": 4.25, "scores": {"bits": 4.5, "n": [1, 2]}}
    save_checkpoint(path, model, **about)
    loaded, metadata = load_checkpoint(str(path)), read_metadata(path)
    assert_same(loaded, model)
    assert torch.equal(*(m.generate(2, generator=seeded()) for m in (model, loaded)))
    assert not loaded.training
    assert_trainable(loaded)
    assert {k: metadata[k] for k in about} == about
    assert metadata["format"] == "simple-sashimi" and metadata["config"]["d_model"] == 8
    assert load_file(path).keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(saved, monkeypatch, name):
    """Disk full, or stopped at the last moment: the old weights stay, nothing else is left."""
    old = saved.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, name, fail)
        save_checkpoint(saved, make(seed=1))
    assert saved.read_bytes() == old and list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path / "model.safetensors", make())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode


@torch.no_grad()
def test_published_weights_give_their_logits(published):
    """Trained weights: logits within 1e-5 of the double evaluation with exact nodes, and 4e-4 of
    their own float32, to the end of the clip; in the recurrence 1e-5, and 1e-4 of theirs. Their
    CPU path, which forgets the conjugate poles, is off by 0.1 and not matched."""
    io = torch.load(FIXTURES / "published_ar_io.pt", weights_only=True)
    x = io["x"].long()
    logits = published(x)
    assert (logits[0, :256] - io["exact"]).abs().max() < 1e-5
    assert (logits[1, -64:] - io["end"]).abs().max() < 4e-4
    assert (logits[0, :32] - io["as_shipped"]).abs().max() > 0.1
    published.backbone.setup_rnn()
    state, out = published.backbone.default_state(1), []
    for now in x[:1, :256].unbind(1):
        logits, state = published.step(now, state)
        out.append(logits[0])
    assert (torch.stack(out) - io["exact"]).abs().max() < 1e-5
    assert (torch.stack(out[:64]) - io["step"]).abs().max() < 1e-4


def test_published_files_of_all_times_are_read(published, tmp_path):
    """One l_max for every tier, tied (Lambda, P, B), weight normalisation multiplied out, node
    buffers dropped. Those written on a GPU hold `batch_size_per_gpu` too; containers from before
    torch 1.6. In our format they stay what they are."""
    c = published.config
    assert (c.d_model, c.n_layers, c.pool, c.expand, c.ff, c.d_state) == (16, [2], [4, 4], 2, 2, 64)
    assert c.tied and c.glu and not c.unet and c.dropout == 0 and c.sample_rate == 16000
    assert c.tier_lengths == [1024] * 3 and c.l_max == c.clip_length == 1024
    assert {m.l_max for m in published.modules() if isinstance(m, S4)} == {1024}
    assert not list(published.buffers())
    content = torch.load(PUBLISHED, weights_only=True)
    content["cfg_yaml"] += "batch_size_per_gpu: 8\n"
    for zipped in (True, False):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        assert_same(load_checkpoint(tmp_path / "w.pt"), published)
    save_checkpoint(tmp_path / "ours.safetensors", published)
    assert_same(load_checkpoint(tmp_path / "ours.safetensors"), published)


@pytest.mark.parametrize("name", ["published_ar", "state_spaces_ar", "state_spaces_unet_bidir"])
def test_weights_of_other_programs_can_be_trained(name):
    assert_trainable(load_checkpoint(FIXTURES / f"{name}.pt"))


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1, None])
@either
def test_truncated_files_are_refused(saved, tmp_path, suffix, size):
    """At any place: empty, inside the header, in the middle, without the last byte."""
    content = (saved if suffix == ".safetensors" else PUBLISHED).read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(content[: len(content) // 2 if size is None else size])
    assert_refused(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_what_is_no_checkpoint_is_refused(tmp_path, suffix):
    """Garbage, nothing, a folder, tensors of other programs."""
    path = tmp_path / f"other{suffix}"
    assert_refused(path, "not there")
    for content in (b"\xff" * 5000, b"RIFF0000WAVEfmt ", b"hello\n" * 99, b"\x80"):
        path.write_bytes(content)
        assert_refused(path)
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, path, metadata)
        assert_refused(path)
    w = torch.zeros(3)
    for content in ({"weight": w}, {"state_dict": {"weight": w}}, {"state_dict": 5}, {}, [w], w):
        torch.save(content, path)
        assert_refused(path)
    path.unlink()
    path.mkdir()
    assert_refused(path, "folder")


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_code_in_a_pickle_is_never_executed(tmp_path, suffix, raw):
    """A checkpoint that would run code on loading is refused before it runs."""
    path, sign = tmp_path / f"evil{suffix}", tmp_path / "executed"
    content = {"model_state_dict": {"w": Trap(Path.touch, sign)}, "cfg_yaml": ""}
    if raw:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    assert_refused(path)
    assert not sign.exists()
    if not raw:
        with open(path, "rb") as file:
            torch.load(file, weights_only=False)
        assert sign.exists()  # the trap itself works


def each(table):
    return [{key: value} for key, values in table.items() for value in values]


def nested(wrap):
    return functools.reduce(lambda x, _: wrap(x), range(60), 1)


HOSTILE = [None, {"pool": [2] * 16, "tier_lengths": None}, {f"key{i}": i for i in range(100_000)}]
HOSTILE += each({  # settings that no model has, or not this one
    "d_modell": [8],
    "d_model": ["wide", 16, 60_000, 10**9, 10**30, 1e30, 10**4000, "x" * 10**6, SECRET, [None],
                "\x1b[31mred\x07\u202e\n"],
    "d_state": [7, 16_000, 10**9],
    "pool": [[0], [10**9, 3], [2] * 200_000, nested(lambda x: [x]), nested(lambda x: {"a": x}),
             [SECRET, 3], [[SECRET], 3], {"a": SECRET}],
    "l_max": [0, 10**12],
    "tier_lengths": [[1], [10**12, 24, 8]],
    "n_layers": [900, 10**9, 1e9],
    "expand": [10**9, 250],
    "ff": [250],
    "sample_rate": [5 * 10**9, 5e9],
    "clip_length": [10**12],
    "temperature": [float("inf")],
    "dropout": [float("nan")],
    SECRET: [1],
    "\x1b]0;title\x07": [1],
})  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda change: str(change)[:40])
@either
def test_settings_of_no_model_or_another_are_refused(saved, hostile, suffix):
    """In our weights and in the trainer's last.pt."""
    tensors, config, path = load_file(saved), config_of(saved), saved.with_suffix(suffix)
    changed = hostile and config | hostile
    if suffix == ".pt":
        write_pt(path, tensors, config)
        load_checkpoint(path)  # it is the change that is refused
        write_pt(path, tensors, changed)
    else:
        rewrite(path, config=json.dumps(changed))
    assert_refused(path)


NESTED = '{"a":' * 900 + "1" + "}" * 900
METADATA = each({
    "config": [None, "", "{", "[]", "5", '"text"', "[" * 100_000, NESTED,
               '{"d_model": %s}' % ("9" * 5000)],
    "version": ["2", "9" * 5000, NESTED, '"\\u001b[2J"', f'"{SECRET}"'],
    "format": ["\x1b[2J" * 10_000],
    "model": [NESTED, '"\\u001b[2J"', "[" * 100_000],
    "scores": ["[" * 100_000, "9" * 5000],
    "x" * 5 * 10**6: ["1"],
})  # fmt: skip


@pytest.mark.parametrize("metadata", METADATA, ids=lambda change: str(change)[:30])
def test_metadata_that_is_none_or_hostile_is_refused(saved, metadata):
    rewrite(saved, **metadata)
    assert_refused(saved, *(["version 2"] if metadata == {"version": "2"} else []))


KEY = "backbone.center.0.layer.C"


@pytest.mark.parametrize(
    "change, words",
    [(lambda w: {k: v for k, v in w.items() if k != KEY}, [KEY]),
     (lambda w: w | {"surplus": torch.zeros(1)}, ["surplus"]),
     (lambda w: w | {KEY: w[KEY][..., :1].contiguous()}, [KEY]),
     (lambda w: w | {KEY: w[KEY] / 0}, [KEY, "finite"]),
     (lambda w: w | {KEY: w[KEY] * float("nan")}, [KEY, "finite"])],
    ids=["missing", "extra", "of another shape", "infinite", "nan"],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(saved, change, words):
    rewrite(saved, change(load_file(saved)))
    assert_refused(saved, *words)


@pytest.mark.parametrize("none", [5, torch.zeros(3), [], "text"])
def test_weights_that_are_none_are_refused(saved, none):
    path = saved.with_suffix(".pt")
    for state in (none, {}, {"a": 1}, None):
        content = torch.load(PUBLISHED, weights_only=True) | {"model_state_dict": state}
        torch.save(content, path)
        assert_refused(path)
    write_pt(path, load_file(saved), config_of(saved), averaged=none)
    assert_refused(path)


def compress(path):
    """The same archive deflated, as torch.load takes it too."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


BOMBS = {  # one tensor of a last.pt that is otherwise right, or what becomes of the file
    "expanded": lambda w: torch.zeros(1).expand(10**11),
    "meta": lambda w: torch.zeros(10**11, device="meta"),
    "sparse": lambda w: torch.sparse_coo_tensor(torch.zeros(1, 0).long(), [], (10**11,)),
    "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "integers": lambda w: w.long(),
    "complex": lambda w: w.to(torch.complex64),
    "too large for float32": lambda w: torch.full_like(w, 1e300, dtype=torch.float64),
    "compressed": lambda w: torch.zeros(3 * 10**7),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse|quantize|TypedStorage)")
@pytest.mark.parametrize("what", BOMBS)
def test_tensors_that_are_none_or_unpack_to_more_than_the_file_are_refused(saved, what):
    tensors, path = load_file(saved), saved.with_suffix(".pt")
    key = "backbone.norm.weight"
    write_pt(path, tensors | {key: BOMBS[what](tensors[key])}, config_of(saved))
    if what == "compressed":
        compress(path)
        assert path.stat().st_size < 10**6
    assert_refused(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("what", PROGRAMS)
def test_pickles_that_never_end_are_refused(tmp_path, what, zipped):
    """Keys that take forever to hash; structures that hold themselves."""
    path = with_pickle(tmp_path / "bomb.pt", pickle.dumps({"a": (1, 2)}, protocol=2), zipped)
    assert torch.load(path, weights_only=True) == {"a": (1, 2)}  # the container is right
    assert_refused(with_pickle(path, PROGRAMS[what], zipped))


FOREIGN = {  # the key of the weights -> file
    "model_state_dict": PUBLISHED,
    "state_dict": FIXTURES / "state_spaces_unet.pt",
}


@pytest.mark.parametrize("damage", ["missing", "reshaped", "not a tensor", "not finite"])
@pytest.mark.parametrize("key_of_weights", FOREIGN)
def test_damaged_tensors_of_other_formats_are_refused(key_of_weights, damage, monkeypatch):
    """One tensor of any kind, but for those that are dropped."""
    path = FOREIGN[key_of_weights]
    content = torch.load(path, weights_only=True)
    weights = content[key_of_weights]
    optional = ("kernel.omega", "kernel.z")
    if damage in ("not finite", "missing"):
        optional += ("l_kernel",)  # an integer; one other layer of the tier knows it too
    kinds = {re.sub(r"\d+", "#", key): key for key in weights if not key.endswith(optional)}
    assert len(kinds) > 20
    for key in kinds.values():  # the last of each kind
        value = weights[key]
        state = weights | {
            "reshaped": {key: torch.cat([value.reshape(-1), value.new_zeros(1)])},
            "not a tensor": {key: "text"},
            "not finite": {key: value * float("nan")},
        }.get(damage, {})
        if damage == "missing":
            del state[key]
        changed = content | {key_of_weights: state}
        monkeypatch.setattr(checkpoint, "read_pt", lambda _, changed=changed: changed)
        assert_refused(path)


BOMB = "a0: &a0 [1]\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], b{i}: 1}}\n" for i in range(1, 40)
).replace("a0, *a0", "m, *m").replace("a0: &a0 [1]", "m: &m {x: 1}")
GOOD = "model_cfg: {l_max: 1024}\n"
L_MAX = ["many", "0", "1024, dropout: much", "1000000000000", ".inf", "9" * 5000, "9" * 4000,
         f"'{SECRET}'", '"\\e[31mred"', "1024, dropout: " + "9" * 4000]  # fmt: skip
AFTER_GOOD = ["sample_rate: fast", "sample_rate: 5000000000", "sample_rate: 0", "sample_rate: .inf",
              "seq_len: []", "seq_len: 1000000000000", "seq_len: -1", "{a: " * 10_000,
              "a: 1\n" * 100_000, "x: " + "y" * 10**7]  # fmt: skip
SETTINGS = ["", "[", "5", "model_cfg: 5", "model_cfg: {}", "[" * 10_000, BOMB + GOOD,
            "!!python/object/apply:os.getcwd []"]  # fmt: skip
SETTINGS += [f"model_cfg: {{l_max: {value}}}" for value in L_MAX]
SETTINGS += [GOOD + text for text in AFTER_GOOD]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda text: text.replace(GOOD, "")[:30])
def test_published_settings_that_are_none_or_hostile_are_refused(tmp_path, settings):
    """YAML that is none, lacks what is needed, would construct Python objects or never end."""
    content = torch.load(PUBLISHED, weights_only=True) | {"cfg_yaml": settings}
    torch.save(content, tmp_path / "settings.pt")
    assert_refused(tmp_path / "settings.pt")


def deeper(state):
    """The same flattened backbone with forty times as many blocks in the centre."""
    centre = {key: key.split(".", 2) for key in state if key.startswith("c_layers.")}
    n = len({index for _, index, _ in centre.values()})
    return state | {
        f"c_layers.{int(index) + copy * n}.{rest}": state[key].clone()
        for copy in range(1, 40)
        for key, (_, index, rest) in centre.items()
    }


def with_length(length, of="l_kernel"):
    """Those S4 layers record another length."""
    return lambda s: {k: torch.tensor(length) if k.endswith(of) else v for k, v in s.items()}


NORM = "norm.weight"
IMPOSSIBLE = [
    (with_length(0), "l_kernel"),  # never run: C is not in the stored form, nothing tells
    (with_length(99, "d_layers.0.layer.layer.kernel.l_kernel"), "l_kernel"),  # two in a tier
    (with_length(10**12), ""),
    (with_length(-5), ""),
    (with_length(float("inf")), ""),
    (deeper, ""),
    (lambda s: s | {NORM: torch.zeros(0)}, ""),
    (lambda s: s | {NORM: torch.zeros(10**6)}, ""),
    (lambda s: s | {NORM: "\x1b[2J"}, ""),
    (lambda s: s | {f"c_layers.{'9' * 5000}.layer.D": s[NORM]}, ""),
    (lambda s: s | {"\x1b[2J" * 10_000: s[NORM]}, ""),
]


@pytest.mark.parametrize("change, word", IMPOSSIBLE)
def test_backbones_of_state_spaces_that_cannot_be_are_refused(tmp_path, change, word):
    content = torch.load(FOREIGN["state_dict"], weights_only=True)
    torch.save({"state_dict": change(content["state_dict"])}, tmp_path / "backbone.pt")
    assert_refused(tmp_path / "backbone.pt", word)
