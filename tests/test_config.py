"""The command line gives exactly what was written, or one line saying what is wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from omegaconf import MISSING

from rawaudio.config import (
    AutoregressiveConfig,
    DiffusionConfig,
    from_dict,
    parse_args,
    setting,
    to_dict,
)
from rawaudio.errors import UserError


@dataclass
class Model:
    d_model: int = setting(64, "features")
    pool: list[int] = setting([4, 4], "pooling factors, finest tier first")

    def __post_init__(self) -> None:
        if self.d_model < 1:
            raise UserError("model.d_model must be at least 1")


@dataclass
class Config:
    train_csv: str = setting(MISSING, "training clips")
    path: str = setting("", "where to write")
    batch_size: int = setting(8, "clips")
    lr: float = setting(4e-3, "learning rate")
    compile: bool = setting(False, "use torch.compile")
    top_k: int | None = setting(None, "keep the k likeliest classes")
    device: str | None = setting(None, "device")
    names: list[str] = setting([], "names")
    model: Model = setting(Model, "the network")


def parse(*argv: str) -> Config:
    return parse_args(Config, list(argv), prog="python train.py", examples="python train.py a=b")


def test_overrides_have_the_declared_types():
    cfg = parse(
        "train_csv=a.csv", "batch_size=16", "lr=1e-4", "compile=yes", "top_k=5", "device=cpu",
        "names=[a b, c]", "model.d_model=32", "model.pool=[2,8]",
    )  # fmt: skip
    assert cfg == Config("a.csv", "", 16, 1e-4, True, 5, "cpu", ["a b", "c"], Model(32, [2, 8]))
    assert isinstance(cfg.model, Model) and type(cfg.model.pool) is list


def test_no_arguments_are_the_defaults():
    assert parse("train_csv=a") == Config("a")
    assert Config().names is not Config().names
    assert Config().model is not Config().model


def test_a_tilde_at_the_start_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/jo")
    cfg = parse("train_csv=~/a.csv", "path=a~b", "device=~", "names=[a~b]")
    assert (cfg.train_csv, cfg.path, cfg.device) == ("/home/jo/a.csv", "a~b", "/home/jo")
    assert cfg.names == ["a~b"]


@pytest.mark.parametrize("text", ["", "none", "null", "None"])
def test_none_where_none_is_allowed(text):
    cfg = parse("train_csv=a", "top_k=5", f"top_k={text}", f"device={text}", f"path={text}")
    assert cfg.top_k is None and cfg.device is None
    assert cfg.path == text  # a plain str field keeps what is written


@pytest.mark.parametrize(
    "text, pool", [("[]", []), ("[4]", [4]), ("4,2", [4, 2]), ("[ 4, 2 ]", [4, 2]), ("3", [3])]
)
def test_lists(text, pool):
    assert parse("train_csv=a", f"model.pool={text}").model.pool == pool


def test_strings_are_exact_to_the_last_character():
    rng = random.Random(0)
    pieces = ["${", "$", "{", "}", "\\", "'", '"', ":", ",", "=", "[", "]", " ", "é", "\n", "#"]
    texts = ["/a b/c=d,{e}", "1e-3", "true", "null", "${path}", "${oc.env:HOME}", r"\${a} \\${b}"]
    texts += ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(60)]
    for text in texts:
        assert parse("train_csv=a", f"path={text}").path == text
        assert from_dict(Config, {"train_csv": "a", "names": [text, text]}).names == [text, text]


def test_dashes_before_a_key_are_tolerated():
    assert parse("--train_csv=a", "--model.d_model=3").model.d_model == 3


@pytest.mark.parametrize(
    "argument, message",
    [
        ("batch_size=four", "batch_size=four: expected an integer"),
        ("batch_size=1.5", "batch_size=1.5: expected an integer"),
        ("batch_size=", "batch_size='': expected an integer"),
        ("batch_size=none", "batch_size=none: expected an integer"),
        ("batch_size=${lr}", "batch_size=${lr}: expected an integer"),
        ("lr=fast", "lr=fast: expected a number"),
        ("lr=nan", "lr=nan: expected a number"),
        ("compile=maybe", "compile=maybe: expected true or false"),
        ("top_k=x", "top_k=x: expected an integer or none"),
        ("model.pool=[4,x]", "model.pool=[4,x]: expected a list such as [a,b], each an integer"),
        ("model.pool=[4", "model.pool=[4: expected a list such as [a,b], each an integer"),
        (
            "model.pool=[${lr}]",
            "model.pool=[${lr}]: expected a list such as [a,b], each an integer",
        ),
        ("model=small", "model=small: expected a group of settings, such as d_model"),
        ("bach_size=4", "unknown setting bach_size, did you mean batch_size?"),
        ("d_modl=4", "unknown setting d_modl, did you mean model.d_model?"),
        ("modl.pol=4", "unknown setting modl.pol, did you mean model.pool?"),
        ("xyzzy=4", "unknown setting xyzzy"),
        ("=4", "unknown setting "),
        ("batch_size", "batch_size: expected key=value, as in batch_size=..."),
        ("--batch_size 4", "--batch_size: expected key=value, as in batch_size=4"),
        ("--batch_size", "--batch_size: expected key=value, as in batch_size=..."),
        ("path=x", "train_csv: required, as in: python train.py a=b"),
        ("train_csv=a model.d_model=0", "model.d_model must be at least 1"),
    ],
)
def test_what_cannot_be_understood_is_one_line_and_status_2(argument, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(*argument.split())
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"error: {message}\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_examples_then_every_setting(flag, capsys):
    with pytest.raises(SystemExit) as exit:
        parse("batch_size=four", flag)
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert text.index("python train.py a=b") < text.index("train_csv")
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert rows["train_csv"].split()[1:3] == ["str", "required"]
    assert rows["top_k"].split()[1:5] == ["int", "|", "none", "none"]
    assert rows["model.pool"].split()[1:3] == ["list[int]", "[4,4]"]
    columns = {rows[key].index(help) for key, help in [("lr", "learning"), ("path", "where")]}
    assert len(columns) == 1, "the help texts stand in one column"


def test_dict_and_back_is_the_same_config():
    cfg = parse("train_csv=${x}", "model.pool=[2]", "top_k=3")
    assert from_dict(Config, to_dict(cfg)) == cfg
    assert to_dict(cfg)["model"] == {"d_model": 64, "pool": [2]}


def test_dicts_are_checked():
    with pytest.raises(ValueError, match="unknown setting model.dmodel, did you mean model.d_mod"):
        from_dict(Config, {"train_csv": "a", "model": {"dmodel": 3}})
    with pytest.raises(ValueError, match=r"model.pool=\[x\]: expected a list"):
        from_dict(Config, {"train_csv": "a", "model": {"pool": ["x"]}})
    with pytest.raises(ValueError, match="model=3: expected a group of settings"):
        from_dict(Config, {"train_csv": "a", "model": 3})
    with pytest.raises(ValueError, match="train_csv: required, write train_csv="):
        from_dict(Config, {})
    loose = {"train_csv": "a", "model": {"dmodel": 3, "d_model": 5}, "extra": {"a": 1}}
    assert from_dict(Config, loose, ignore_unknown=True) == Config("a", model=Model(5))


def test_the_last_part_of_a_key_is_enough_where_it_is_clear():
    assert parse("train_csv=a", "d_model=7").model.d_model == 7


@pytest.mark.parametrize("config", [AutoregressiveConfig, DiffusionConfig])
@pytest.mark.parametrize(
    "name, value",
    [("sample_rate", 768_001), ("clip_length", 10**12), ("l_max", 10**9), ("d_model", 10**9),
     ("n_layers", 10**9), ("expand", 1000), ("ff", 1000), ("d_state", 10**6),
     ("tier_lengths", [10, 10**9, 1]), ("pool", [2, 10**9]), ("pool", [1] * 17)],
)  # fmt: skip
def test_sizes_that_no_model_has_are_named(config, name, value):
    """Before anything of that size is made."""
    with pytest.raises(ValueError, match=f"{name}=.*at most"):
        config(**{name: value})
    config(sample_rate=768_000)
