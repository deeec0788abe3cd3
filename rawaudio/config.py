"""Settings as dataclasses: `key=value` on the command line, nested dicts in checkpoints.

    @dataclass
    class TrainConfig:
        batch_size: int = setting(8, "clips per optimizer step")
        model: ModelConfig = setting(ModelConfig, "the network")

    cfg = parse_args(TrainConfig, prog="python train.py", examples="python train.py batch_size=4")

Fields may be int, float, bool, str, list[...] of these, `... | None`, and dataclasses. A dict is
filled by the program: it is kept in checkpoints, and not for the command line.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import logging
import operator
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rawaudio.command import drop_output, forgiving_console
from rawaudio.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")


def setting(default: Any, help: str, allowed: str = "", *, was: str | None = None) -> Any:
    """A dataclass field with a help text.

    default: the value, a dataclass (a nested group), a list or dict, or omegaconf's MISSING (the
    user must give it). was: its former name in the same group, which is still understood.
    allowed: a number's bounds, ">=0 <1", or the words it may be, "a|b", see `check_allowed`.
    """
    metadata = {"help": help, "was": was, "allowed": allowed}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


BOUNDS = {
    ">=": ("at least", operator.ge),
    ">": ("above", operator.gt),
    "<=": ("at most", operator.le),
    "<": ("below", operator.lt),
}


def check_allowed(cfg: Any) -> None:
    """UserError for a setting of the dataclass that its declaration does not allow, or an item of a
    list; None is always allowed. For its `__post_init__`."""
    for field in dataclasses.fields(cfg):
        allowed, value = field.metadata.get("allowed"), getattr(cfg, field.name)
        for item in value if isinstance(value, list) else [value]:
            if not allowed or item is None:
                continue
            if "|" in allowed:
                valid, words = item in allowed.split("|"), allowed.replace("|", " or ")
            else:
                bounds = re.findall(r"([<>]=?)(\S+)", allowed)
                valid = all(BOUNDS[sign][1](item, float(bound)) for sign, bound in bounds)
                words = " and ".join(f"{BOUNDS[sign][0]} {bound}" for sign, bound in bounds)
            if not valid:
                raise UserError(f"{field.name}={as_written(value)}: must be {words}")


class _Setting(NamedTuple):
    hint: Any  # its type
    help: str
    was: str | None  # its former key


def _settings(cls: type, prefix: str = "") -> dict[str, _Setting]:
    """Dotted key -> setting, groups directly before their members."""
    hints, settings = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        key, hint, was = prefix + field.name, hints[field.name], field.metadata.get("was")
        settings[key] = _Setting(hint, field.metadata.get("help", ""), was and prefix + was)
        if dataclasses.is_dataclass(hint):
            settings |= _settings(hint, f"{key}.")
    return settings


def settings_of(cls: type) -> list[str]:
    """The keys of all settings, dotted."""
    return list(_settings(cls))


# ---- the command line ---------------------------------------------------------------------


def parse_args(
    cls: type[T],
    argv: list[str] | None = None,
    *,
    prog: str,
    examples: str,
    notes: str = "",
    defaults: Mapping[str, Any] | None = None,
    others: dict[str, list[str]] | None = None,
    check: Callable[[T], None] | None = None,
) -> T:
    """The dataclass `cls` from `key=value` arguments; argv None: sys.argv[1:].

    Nested keys are dotted, `model.d_model=32`; the last part is enough where no other setting has
    that name. Lists: `pool=[4,4]`. Strings are taken as they are written, to the last character,
    but for a ~ at the start, the home folder. `key=` and `key=none` give None where None is
    allowed. `--help` prints `examples`, a table of all settings and `notes`, and exits with 0.
    Whatever cannot be understood is answered with one line on stderr and SystemExit(2).

    prog: how the script is called. defaults: dotted key -> value, in place of those of `cls`.
    others: gets the values of keys that are no settings, in place of an error.
    check: raises UserError for settings that do not go together.
    """
    forgiving_console()
    argv = sys.argv[1:] if argv is None else argv
    defaults = dict(defaults or {})
    if "--help" in argv or "-h" in argv:
        parts = ["Examples", textwrap.indent(examples.strip(), "  "), f"Settings of {prog}"]
        parts += [_table(cls, defaults), notes.strip()]
        try:
            print("\n\n".join(filter(None, parts)), flush=True)
        except BrokenPipeError:  # a pager was closed, or head has seen enough
            drop_output()
        raise SystemExit(0)
    lines = re.sub(r"\\\n\s*", "", examples).splitlines()
    own = [line.partition("  #")[0].strip() for line in lines if line.startswith(prog)]
    try:
        values = {_find(key, _settings(cls), required=True): v for key, v in defaults.items()}
        values |= _overrides(cls, argv, others)
        cfg = _build(cls, values, example=[*own, f"{prog} key=value ..."][0])
        if check is not None:
            check(cfg)
        return cfg
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _overrides(cls: type, argv: list[str], others: dict[str, list[str]] | None) -> dict[str, Any]:
    """Dotted key -> value of every argument but those that go to `others`."""
    settings, values = _settings(cls), {}
    for argument, following in zip(argv, [*argv[1:], "="], strict=False):
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            value = "..." if "=" in following else following
            raise UserError(f"{argument}: expected key=value, as in {key.lstrip('-')}={value}")
        same_name = [k for k in settings if k.rpartition(".")[2] == key]
        if key not in settings and len(same_name) == 1:
            key = same_name[0]
        if known := _find(key, settings, required=others is None or not key.isidentifier()):
            values[known] = _parse(text, settings[known].hint)
        else:
            others[key] = _parse(text, list[str]) if text.startswith("[") else [text]
            if not others[key]:
                raise UserError(f"{key}=[]: give one value or more")
    return values


def _parse(text: str, hint: Any) -> Any:
    """Text as None or a list where the type wants one; omegaconf converts the rest."""
    text = os.path.expanduser(text)  # a shell leaves the ~ of key=~/x alone
    if type(None) in get_args(hint) and text.lower() in ("", "none", "null"):
        return None
    is_list = list in map(get_origin, (hint, *get_args(hint)))
    if is_list and (match := re.fullmatch(r"\[(.*)]|([^][]*)", text, re.DOTALL)):
        items = match[1] or match[2] or ""
        return [item.strip() for item in items.split(",")] if items.strip() else []
    return text


def _table(cls: type, defaults: dict[str, Any]) -> str:
    """Key, type, default and meaning of every setting, in columns."""
    rows, config = [("key", "type", "default", "")], OmegaConf.structured(cls)
    for key, (hint, help, _) in _settings(cls).items():
        if dataclasses.is_dataclass(hint):
            rows.append((f"{key}.*", "", "", help))
        elif get_origin(hint) is not dict:
            missing = OmegaConf.is_missing(config, key) and key not in defaults
            default = defaults.get(key) if key in defaults else OmegaConf.select(config, key)
            kind = inspect.formatannotation(hint).replace("None", "none")
            rows.append((key, kind, "required" if missing else as_written(default), help))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
    indent = " " * (sum(widths) + 6)
    columns = max(shutil.get_terminal_size((100, 24)).columns, len(indent) + 30)
    lines = []
    for row in rows:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True))
        lines += textwrap.wrap(
            row[3], columns, initial_indent=f"{cells}  ", subsequent_indent=indent
        ) or [cells.rstrip()]
    return "\n".join(lines)


# ---- dicts --------------------------------------------------------------------------------


def to_dict(cfg: Any) -> dict[str, Any]:
    """The settings as a nested dict of plain values, ready for JSON or YAML."""
    return dataclasses.asdict(cfg)


def from_dict(cls: type[T], d: dict[str, Any], *, ignore_unknown: bool = False) -> T:
    """The dataclass `cls` from a nested dict; what the dict lacks keeps its default.

    Raises UserError for a value of the wrong type and for a key that `cls` does not have; with
    `ignore_unknown` such keys are skipped.
    """
    settings, values = _settings(cls), {}

    def flatten(group: dict[str, Any], prefix: str) -> None:
        for name, value in group.items():
            key = _find(f"{prefix}{name}", settings, required=not ignore_unknown)
            if key and dataclasses.is_dataclass(settings[key].hint) and isinstance(value, dict):
                flatten(value, f"{key}.")
            elif key:
                values[key] = value

    flatten(d, "")
    return _build(cls, values)


def _build(cls: type[T], values: dict[str, Any], example: str = "") -> T:
    """The dataclass with these values, dotted key -> value, converted and checked."""
    settings, config = _settings(cls), OmegaConf.structured(cls)
    for key, value in values.items():
        hint = settings[key].hint
        if get_origin(hint) is list and isinstance(value, int):  # in files of older versions
            value = [value]
        try:
            OmegaConf.update(config, key, _escape(value))
            stored = OmegaConf.select(config, key)
            valid = as_written(stored) and stored == stored  # reads a list's items; NaN is not
        except OmegaConfBaseException:
            valid = False
        if not valid:
            raise UserError(f"{key}={as_written(value)}: expected {_expected(hint)}")
    if missing := [key for key in settings if OmegaConf.is_missing(config, key)]:
        as_in = f"as in: {example}" if example else f"write {missing[0]}=..."
        raise UserError(f"{', '.join(missing)}: required, {as_in}")
    try:
        return OmegaConf.to_object(config)
    except (UserError, OmegaConfBaseException) as error:  # omegaconf appends lines of its own
        raise UserError(str(error).splitlines()[0]) from None


def _escape(value: Any) -> Any:
    """Strings such that omegaconf gives them back unchanged, and resolves no ${...}."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {k: _escape(v) for k, v in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list | tuple) else value


def _find(key: str, settings: dict[str, _Setting], required: bool) -> str | None:
    """The key, for a former one that of today; for an unknown one UserError, or None."""
    if key in settings:
        return key
    for current, setting in settings.items():
        if setting.was == key:
            log.warning("the setting %s is now called %s", key, current)
            return current
    if not required:
        return None
    by_name = {k.rpartition(".")[2]: k for k in settings}
    names = difflib.get_close_matches(key.rpartition(".")[2], by_name)
    near = [by_name[name] for name in names] + difflib.get_close_matches(key, settings)
    raise UserError(f"unknown setting {key}" + (f", did you mean {near[0]}?" if near else ""))


def _expected(hint: Any) -> str:
    """What a user has to write."""
    if dataclasses.is_dataclass(hint):
        return f"a group of settings, such as {dataclasses.fields(hint)[0].name}"
    if get_origin(hint) is list:
        return f"a list such as [a,b], each {_expected(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "a dict of lists, which follows from other settings"
    if options := get_args(hint):
        return " or ".join(map(_expected, options))
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, "none")


def as_written(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {as_written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(as_written, value)) + "]"
    return "''" if value == "" else str(value)


def usable_device(device: str | torch.device | None) -> torch.device:
    """`device`, or for None the GPU if there is one; UserError for one that cannot be used."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch raises either, by build and device
        reason = str(error).splitlines()[0]
        raise UserError(f"device={device} cannot be used here ({reason}); try cpu") from None


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """ValueError for a name that is not known; it tells the nearest one."""
    if name not in (known := list(known)):
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
        raise UserError(f"no {what} named {name}, did you mean {near[0]}? ({', '.join(known)})")
