"""The command line gives exactly what was written, or one line saying what is wrong."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import pytest
from omegaconf import MISSING

from rawaudio.config import from_dict, parse_args, setting, to_dict
from rawaudio.errors import UserError
from sashimi.autoregressive import AutoregressiveConfig
from sashimi.diffwave import DiffusionConfig


@dataclass
class Model:
    d_model: int = setting(64, "features", was="width")
    pool: list[int] = setting([4, 4], "pooling factors, finest tier first")

    def __post_init__(self) -> None:
        if self.d_model < 1:
            raise UserError("model.d_model must be at least 1")


@dataclass
class Config:
    train_csv: str = setting(MISSING, "training clips")
    path: str = setting("", "where to write")
    batch_size: int = setting(8, "clips", was="batch")
    lr: float = setting(4e-3, "learning rate")
    compile: bool = setting(False, "use torch.compile")
    top_k: int | None = setting(None, "keep the k likeliest classes")
    device: str | None = setting(None, "device")
    names: list[str] = setting([], "names")
    told: dict[str, list[str]] = setting({}, "filled by the program")
    model: Model = setting(Model, "the network")


def parse(*argv: str, **more) -> Config:
    more = {"prog": "python train.py", "examples": "python train.py a=b  # so"} | more
    return parse_args(Config, ["train_csv=a", *argv], **more)


VALUES = [  # what is written, what it changes
    ([], {}),
    (["train_csv=b", "batch_size=16", "lr=1e-4", "compile=yes", "names=[a b, c]"],
     {"train_csv": "b", "batch_size": 16, "lr": 1e-4, "compile": True, "names": ["a b", "c"]}),
    (["top_k=5", "device=cpu"], {"top_k": 5, "device": "cpu"}),
    *[(["top_k=5", "device=cpu", f"top_k={none}", f"device={none}", f"path={none}"],
       {"path": none}) for none in ("", "none", "null", "None")],
    (["--model.d_model=3", "model.pool=[2,8]"], {"model": Model(3, [2, 8])}),
    (["d_model=7"], {"model": Model(7)}),  # the last part is enough where it is clear
    (["path=~/a.csv", "device=~", "names=[a~b]"],
     {"path": "/home/jo/a.csv", "device": "/home/jo", "names": ["a~b"]}),
    (["path=a~b", "names=~"], {"path": "a~b", "names": ["/home/jo"]}),
    (["model.pool=[]"], {"model": Model(64, [])}),
    (["model.pool=[4]"], {"model": Model(64, [4])}),
    (["model.pool=4,2"], {"model": Model(64, [4, 2])}),
    (["model.pool=[ 4, 2 ]"], {"model": Model(64, [4, 2])}),
    (["model.pool=3"], {"model": Model(64, [3])}),
]  # fmt: skip


@pytest.mark.parametrize("argv, changed", VALUES)
def test_arguments_become_values_of_the_declared_types(argv, changed, monkeypatch):
    monkeypatch.setenv("HOME", "/home/jo")
    cfg = parse(*argv)
    assert cfg == Config(**{"train_csv": "a"} | changed)
    assert isinstance(cfg.model, Model) and type(cfg.model.pool) is list
    assert cfg.names is not parse().names, "lists are copied"


def test_strings_are_exact_to_the_last_character():
    rng = random.Random(0)
    pieces = ["${", "$", "{", "}", "\\", "'", '"', ":", ",", "=", "[", "]", " ", "é", "\n", "#"]
    texts = ["/a b/c=d,{e}", "1e-3", "007", "true", "null", "${path}", "${oc.env:HOME}"]
    texts += ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(60)]
    for text in [*texts, r"\${a} \\${b}"]:
        assert parse(f"path={text}").path == text
        names = {"train_csv": "a", "names": [text, text], "told": {"a": [text]}}
        assert to_dict(from_dict(Config, names)) == to_dict(Config()) | names


LIST = "expected a list such as [a,b], each an integer"
ERRORS = {
    "batch_size=four": "batch_size=four: expected an integer",
    "batch_size=1.5": "batch_size=1.5: expected an integer",
    "batch_size=": "batch_size='': expected an integer",
    "batch_size=none": "batch_size=none: expected an integer",
    "batch_size=${lr}": "batch_size=${lr}: expected an integer",
    "lr=fast": "lr=fast: expected a number",
    "lr=nan": "lr=nan: expected a number",
    "compile=maybe": "compile=maybe: expected true or false",
    "top_k=x": "top_k=x: expected an integer or none",
    "model.pool=[4,x]": f"model.pool=[4,x]: {LIST}",
    "model.pool=[4": f"model.pool=[4: {LIST}",
    "model.pool=[${lr}]": f"model.pool=[${{lr}}]: {LIST}",
    "model=small": "model=small: expected a group of settings, such as d_model",
    "told=[a]": "told=[a]: expected a dict of lists, which follows from other settings",
    "bach_size=4": "unknown setting bach_size, did you mean batch_size?",
    "d_modl=4": "unknown setting d_modl, did you mean model.d_model?",
    "modl.pol=4": "unknown setting modl.pol, did you mean model.pool?",
    "xyzzy=4": "unknown setting xyzzy",
    "=4": "unknown setting",
    "batch_size": "batch_size: expected key=value, as in batch_size=...",
    "--batch_size 4": "--batch_size: expected key=value, as in batch_size=4",
    "--batch_size lr=4": "--batch_size: expected key=value, as in batch_size=...",
    "train_csv=???": "train_csv: required, as in: python train.py a=b",
    "model.d_model=0": "model.d_model must be at least 1",
    "path=wrong": "path is wrong",
}


@pytest.mark.parametrize("argument", ERRORS)
def test_what_cannot_be_understood_is_one_line_and_status_2(argument, capsys):
    def check(cfg):
        if cfg.path == "wrong":
            raise UserError("path is wrong")

    with pytest.raises(SystemExit) as exit:
        parse(*argument.split(), check=check)
    assert exit.value.code == 2
    assert tuple(capsys.readouterr()) == ("", f"error: {ERRORS[argument]}\n")


def test_defaults_of_the_program_are_weaker_than_the_command_line(capsys):
    defaults = {"train_csv": "b", "batch_size": 2, "model.pool": 3, "names": ["${a}"], "lr": 1}
    cfg = parse("batch_size=4", defaults=defaults)
    assert cfg == Config("a", "", 4, 1.0, names=["${a}"], model=Model(64, [3]))
    for key, value in {"batch_size": "four", "bach_size": 4}.items():
        with pytest.raises(SystemExit):
            parse(defaults={key: value})
        assert key in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--help", defaults=defaults)
    assert re.search("batch_size +int +2 +clips", capsys.readouterr().out)


def test_former_names_are_understood_and_a_notice_tells_the_new_ones(caplog):
    want = Config("a", batch_size=3, model=Model(5))
    assert parse("batch=3", "model.width=5") == want
    assert from_dict(Config, {"train_csv": "a", "batch": 3, "model": {"width": 5}}) == want
    notices = [record.getMessage() for record in caplog.records]
    assert notices == 2 * [
        "the setting batch is now called batch_size",
        "the setting model.width is now called model.d_model",
    ]


def test_values_of_other_keys_go_where_they_are_asked_for():
    others: dict[str, list[str]] = {}
    parse("label=two", "speaker=[a, b]", "lr=1", others=others)
    assert others == {"label": ["two"], "speaker": ["a", "b"]}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_examples_then_every_setting(flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    with pytest.raises(SystemExit) as exit:
        parse("batch_size=four", flag, notes="the end")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert text.index("python train.py a=b") < text.index("train_csv") and "told" not in text
    assert text.endswith("\n\nthe end\n")
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert rows["train_csv"].split()[1:3] == ["str", "required"]
    assert rows["top_k"].split()[1:5] == ["int", "|", "none", "none"]
    assert rows["model.pool"].split()[1:3] == ["list[int]", "[4,4]"]
    columns = {rows[key].index(help) for key, help in [("lr", "learning"), ("path", "where")]}
    columns.add(rows["first"].index("first"))  # the second line of model.pool
    assert len(columns) == 1, "the help texts stand in one column"


@pytest.mark.parametrize(
    "changed, message",
    [({"model": {"dmodel": 3}}, "unknown setting model.dmodel, did you mean model.d_model"),
     ({"d_model": 3}, "unknown setting d_model, did you mean model.d_model"),
     ({"model": {"pool": ["x"]}}, r"model.pool=\[x\]: expected a list"),
     ({"model": 3}, "model=3: expected a group of settings"),
     ({"told": {"a": 3}}, "told={a: 3}: expected a dict of lists"),
     ({"train_csv": "???"}, "train_csv: required, write train_csv=")],
)  # fmt: skip
def test_dicts_are_checked(changed, message):
    with pytest.raises(UserError, match=message):
        from_dict(Config, {"train_csv": "a"} | changed)


def test_keys_of_another_version_are_skipped_where_that_is_asked_for():
    loose = {"train_csv": "a", "model": {"dmodel": 3, "d_model": 5, "pool": 2}, "extra": {"a": 1}}
    assert from_dict(Config, loose, ignore_unknown=True) == Config("a", model=Model(5, [2]))


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
