"""Settings as dataclasses: `key=value` on the command line, nested dicts in checkpoints.

A script declares its settings once, with their defaults and help texts, and gets overrides,
type checks and `--help` from that declaration:

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
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rawaudio.command import drop_output, forgiving_console
from rawaudio.errors import UserError

if TYPE_CHECKING:  # settings are read, and --help is shown, without waiting for it
    import torch

T = TypeVar("T")

# ---- declaring ----------------------------------------------------------------------------


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a help text.

    default: the value, a dataclass type (a nested group), a list or dict, or omegaconf's MISSING
    (the user must give it). Lists, dicts and groups are copied for every instance.
    """
    metadata = {"help": help}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# ---- the command line ---------------------------------------------------------------------


def parse_args(
    cls: type[T],
    argv: list[str] | None = None,
    *,
    prog: str,
    examples: str,
    notes: str = "",
    others: dict[str, list[str]] | None = None,
    check: Callable[[T], None] | None = None,
) -> T:
    """An instance of the dataclass `cls` from its defaults and `key=value` arguments.

    Nested keys are dotted, `model.d_model=32`; the last part is enough where no other setting has
    that name. Lists: `pool=[4,4]`. Strings are taken as they are written, to the last character,
    but for a ~ at the start, the home folder. `key=` and `key=none` give None where None is
    allowed. `--help` prints `examples` and a table of all settings, and exits with status 0.
    Whatever cannot be understood is answered with one line on stderr and SystemExit(2).

    argv: the arguments, sys.argv[1:] when None. prog: how the script is called, for messages.
    notes: what --help says below the table.
    others: gets the values of keys that are no settings, in place of an error.
    check: raises ValueError for settings that do not go together.
    """
    forgiving_console()
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        try:
            print(_help(cls, prog, examples, notes), flush=True)
        except BrokenPipeError:  # a pager was closed, or head has seen enough
            drop_output()
        raise SystemExit(0)
    try:
        cfg = _build(cls, _overrides(cls, argv, others), _first_example(prog, examples))
        if check is not None:
            check(cfg)
        return cfg
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _overrides(
    cls: type, argv: list[str], others: dict[str, list[str]] | None = None
) -> dict[str, Any]:
    hints = {key: hint for key, hint, _ in _settings(cls)}
    values = {}
    for i, argument in enumerate(argv):
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            following = argv[i + 1] if i + 1 < len(argv) else ""
            value = following if following and "=" not in following else "value"
            if argument.startswith("-"):
                raise UserError(f"{argument}: write {key.lstrip('-')}={value}")
            raise UserError(f"{argument}: expected key=value, as in {next(iter(hints))}=...")
        same_name = [k for k in hints if k.rpartition(".")[2] == key]
        if key not in hints and len(same_name) == 1:
            key = same_name[0]
        if others is not None and key.isidentifier() and key not in hints:
            others[key] = _parse(text, list[str]) if text.startswith("[") else [text]
            continue
        _check_known(key, hints)
        if dataclasses.is_dataclass(hints[key]):
            inner = next(k for k in hints if k.startswith(f"{key}."))
            raise UserError(f"{argument}: {key} is a group, write {inner}=...")
        if get_origin(hints[key]) is dict:
            raise UserError(f"{argument}: {key} follows from other settings and is not written")
        values[key] = _parse(text, hints[key])
    return values


def _first_example(prog: str, examples: str) -> str:
    """The first command of this program, on one line and without its comment."""
    lines = re.sub(r"\\\n\s*", "", examples).splitlines()
    own = [line.partition("  #")[0].strip() for line in lines if line.startswith(prog)]
    return own[0] if own else f"{prog} key=value ..."


def _parse(text: str, hint: Any) -> Any:
    """Text as None or a list where the type wants one; omegaconf converts the rest.

    A ~ that begins it is the home folder, as in a shell, which leaves that of key=~/x alone.
    """
    options = _options(hint)
    text = os.path.expanduser(text)
    if type(None) in options and text.lower() in ("", "none", "null"):
        return None
    is_list = any(get_origin(option) is list for option in options)
    if is_list and (match := re.fullmatch(r"\[(.*)]|([^][]+)", text, re.DOTALL)):
        items = match[1] if match[2] is None else match[2]
        return [item.strip() for item in items.split(",")] if items.strip() else []
    return text


def _help(cls: type, prog: str, examples: str, notes: str) -> str:
    defaults = OmegaConf.structured(cls)
    rows = [("key", "type", "default", "")]
    for key, hint, text in _settings(cls):
        if dataclasses.is_dataclass(hint):
            rows.append((f"{key}.*", "", "", text))
        elif get_origin(hint) is dict:
            continue
        elif OmegaConf.is_missing(defaults, key):
            rows.append((key, _type_name(hint), "required", text))
        else:
            rows.append((key, _type_name(hint), as_written(OmegaConf.select(defaults, key)), text))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    indent = sum(widths) + 6
    columns = max(shutil.get_terminal_size((100, 24)).columns, indent + 30)
    lines = []
    for row in rows:
        start = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        wrapped = textwrap.wrap(row[3], columns - indent) or [""]
        lines.append(f"{start}  {wrapped[0]}".rstrip())
        lines += [" " * indent + line for line in wrapped[1:]]
    table = "\n".join(lines)
    parts = ["Examples", textwrap.indent(examples.strip(), "  "), f"Settings of {prog}", table]
    return "\n\n".join([*parts, *filter(None, [notes.strip()])])


# ---- dicts --------------------------------------------------------------------------------


def to_dict(cfg: Any) -> dict[str, Any]:
    """The settings as a nested dict of plain values, ready for JSON or YAML."""
    return dataclasses.asdict(cfg)


def from_dict(cls: type[T], d: dict[str, Any], *, ignore_unknown: bool = False) -> T:
    """The dataclass `cls` from a nested dict; what the dict lacks keeps its default.

    Raises ValueError for a value of the wrong type and for a key that `cls` does not have; with
    `ignore_unknown` such keys are skipped.
    """
    hints = {key: hint for key, hint, _ in _settings(cls)}
    values = {}

    def flatten(group: dict[str, Any], prefix: str) -> None:
        for name, value in group.items():
            key = f"{prefix}{name}"
            if ignore_unknown and key not in hints:
                continue
            _check_known(key, hints)
            if not dataclasses.is_dataclass(hints[key]):
                values[key] = value
            elif isinstance(value, dict):
                flatten(value, f"{key}.")
            else:
                raise UserError(f"{key}={as_written(value)}: expected a group of settings")

    flatten(d, "")
    return _build(cls, values)


# ---- shared -------------------------------------------------------------------------------


def _settings(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, type, help) of every field, groups directly before their members."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = prefix + field.name, hints[field.name]
        yield key, hint, field.metadata.get("help", "")
        if dataclasses.is_dataclass(hint):
            yield from _settings(hint, f"{key}.")


def _build(cls: type[T], values: dict[str, Any], example: str = "") -> T:
    hints = {key: hint for key, hint, _ in _settings(cls)}
    cfg = OmegaConf.structured(cls)
    for key, value in values.items():
        if get_origin(hints[key]) is list and isinstance(value, int):  # of older versions
            value = [value]
        try:
            OmegaConf.update(cfg, key, _escape(value))
            stored = OmegaConf.select(cfg, key)
            if OmegaConf.is_config(stored):  # its items may have the wrong type too
                OmegaConf.to_container(stored, resolve=True)
        except OmegaConfBaseException:
            stored = float("nan")
        if stored != stored:  # not a number is never a sensible setting
            raise UserError(f"{key}={as_written(value)}: expected {_expected(hints[key])}")
    if missing := OmegaConf.missing_keys(cfg):
        names = [key for key in hints if key in missing]
        as_in = f"as in: {example}" if example else f"write {names[0]}=..."
        raise UserError(f"{', '.join(names)}: required, {as_in}")
    try:
        return OmegaConf.to_object(cfg)
    except UserError as error:  # from a __post_init__; omegaconf appends lines of its own
        raise UserError(str(error).splitlines()[0]) from None


def _escape(value: Any) -> Any:
    """Strings such that omegaconf gives them back unchanged: no interpolation of ${...}."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {_escape(k): _escape(v) for k, v in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list | tuple) else value


def settings_of(cls: type) -> list[str]:
    """The keys of all settings, dotted."""
    return [key for key, _, _ in _settings(cls)]


def _check_known(key: str, known: dict[str, Any]) -> None:
    if key in known:
        return
    # a slip of the fingers, or of the group
    by_name = {k.rpartition(".")[2]: k for k in known}
    names = difflib.get_close_matches(key.rpartition(".")[2], by_name)
    near = [by_name[name] for name in names] + difflib.get_close_matches(key, known)
    raise UserError(f"unknown setting {key}" + (f", did you mean {near[0]}?" if near else ""))


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; any other type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _expected(hint: Any) -> str:
    """What a user has to write, for messages."""
    if len(options := _options(hint)) > 1:
        return " or ".join(map(_expected, options))
    if get_origin(hint) is list:
        return f"a list such as [a,b], each {_expected(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "a dict of lists"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, "none")


def _type_name(hint: Any) -> str:
    """The type in short, for the table."""
    if len(options := _options(hint)) > 1:
        return " | ".join(map(_type_name, options))
    return "none" if hint is type(None) else inspect.formatannotation(hint)


def as_written(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if OmegaConf.is_list(value) or isinstance(value, list | tuple):
        return "[" + ",".join(map(as_written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {as_written(v)}" for k, v in value.items()) + "}"
    return "''" if value == "" else str(value)


# ---- the device -----------------------------------------------------------------------------


def usable_device(device: str | torch.device | None) -> torch.device:
    """`device`, or for None the GPU if there is one; ValueError for one that cannot be used."""
    import torch

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
