"""Command line, YAML and recorded configurations → option dataclasses.

Option names may be spelled with hyphens or underscores; YAML keys are the names with underscores.
"""

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from common.errors import UserError, did_you_mean
from config.options import ARCHITECTURE_KEYS, GenerateConfig, TrainConfig, _hints


def parse(cls: type, argv: list[str] | None, *, prog: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Command line over YAML over defaults.

    Returns the filled dataclass and the options that the user gave by hand or YAML (name → value); required options that
    are missing are left `None` for `require_options`, since a checkpoint may still supply them.
    """
    given = parse_command_line(cls, argv, prog=prog)
    if given.get("config"):
        given = read_yaml(given["config"], cls) | given
    if given.get("train_config"):
        train = read_yaml(given["train_config"], TrainConfig, others=_names(cls))
        names = {f.name for f in dataclasses.fields(cls)}
        given = {k: v for k, v in train.items() if k in ARCHITECTURE_KEYS & names} | given
    return cls(**given), given


def require_options(config: Any, *names: str) -> None:
    """Raise a `UserError` for a required option that no source gave (`names`: all required ones where none are named)."""
    for field in dataclasses.fields(config):
        wanted = field.name in names if names else field.metadata["required"]
        if wanted and getattr(config, field.name) is None:
            raise UserError(f"--{field.name.replace('_', '-')} is required: {field.metadata['help']}")


def parse_command_line(cls: type, argv: list[str] | None, *, prog: str | None = None) -> dict[str, Any]:
    """The options that stand on the command line, by name. Unknown ones are a `UserError` with the nearest name."""
    argv = sys.argv[1:] if argv is None else argv
    # --elit_group_size=4 and --elit-group-size=4 are one option.
    argv = ["-".join(a.partition("=")[0].split("_")) + "".join(a.partition("=")[1:]) if a.startswith("--") else a for a in argv]
    parser = _Parser(prog=prog, description=(cls.__doc__ or "").split("\n")[0], allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        flags = ["--" + name.replace("_", "-") for name in (field.name, *field.metadata["aliases"])]
        default = "required" if field.metadata["required"] else _default(field)
        text = f"{field.metadata['help']} [{default}]".replace("%", "%%")
        kind, items = _base_type(hints[field.name])
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "metavar": kind.__name__.upper()}
        if typing.get_origin(hints[field.name]) is Literal:
            options["metavar"] = "{" + ",".join(typing.get_args(hints[field.name])) + "}"
        if kind is bool:
            options |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
            no_flags = ["--no-" + flag[2:] for flag in flags]
            parser.add_argument(*no_flags, dest=field.name, action="store_const", const="false", default=argparse.SUPPRESS,
                                help=argparse.SUPPRESS)  # fmt: skip
        if items:
            options["nargs"] = "+"
        parser.add_argument(*flags, help=text, **options)
    parsed, rest = parser.parse_known_args(argv)
    if rest:
        flag = rest[0].partition("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"unexpected argument {flag!r}: options are written as --name value")
        raise UserError(f"unknown option {flag}{did_you_mean(flag, parser._option_string_actions)}")
    return {name: coerce(cls, name, value, "--" + name.replace("_", "-")) for name, value in vars(parsed).items()}


def with_names(cls: type, argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """A command line whose positional arguments, wherever they stand among the options, are given by option `names`."""
    hints = typing.get_type_hints(cls)
    switches = {"--" + name for name, hint in hints.items() if hint is bool}
    named: list[str] = []
    places, takes = ["--" + name for name in names], 0  # takes: how many more arguments belong to the last option
    for argument in argv:
        if argument.startswith("--"):
            hint = hints.get(argument.removeprefix("--").replace("-", "_"))
            takes = 0 if hint in (bool, None) else len(argv) if typing.get_origin(hint) is list else 1
        elif takes:
            takes -= 1
        elif argument.startswith("-") or (named and named[-1] in switches and argument.lower() in ("true", "false")):
            pass
        elif places:
            named.append(places.pop(0))
        named.append(argument)
    return named


def read_yaml(path: str, cls: type, *, others: Iterable[str] = ()) -> dict[str, Any]:
    """The options in a YAML file, by name.

    Keys of the other scripts' options (`others`, for a training config) are passed over; a key that is no option at all is a
    `UserError` that names the file, the key and the nearest known one.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file")
    try:
        # As text: the option's type decides what a value is, so that `no` and `007` stay what they are.
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(loaded or {}, dict):
        raise UserError(f"{path}: must hold `option: value` lines")
    own = _names(cls)
    others = dict.fromkeys(others) if cls is TrainConfig else _names(TrainConfig) | _names(GenerateConfig)
    if cls is TrainConfig and not others and "ckpt" in (loaded or {}):
        raise UserError(f"{path}: this is a generation config (it names a checkpoint); train.py wants a training config")
    found = {}
    for key, value in (loaded or {}).items():
        name = str(key).replace("-", "_")
        if name in own:
            found[own[name]] = coerce(cls, own[name], value, f"{path}: {key}")
        elif name not in others:
            raise UserError(f"{path}: unknown key {key!r}{did_you_mean(name, {**own, **others})}")
    found.pop("config", None)
    return found


def coerce(cls: type, name: str, value: Any, where: str) -> Any:
    """`value` (text of the command line, or what YAML or a checkpoint holds) as the option's type, its range checked."""
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    hint = _hints(cls)[name]
    kind, items = _base_type(hint)
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "~", "null", "none")):
        if type(None) in typing.get_args(hint) or field.metadata["required"]:
            return None
        value = "none"
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
    if items:
        value = list(value) if isinstance(value, (list, tuple)) else str(value).replace(",", " ").split()
        value = [part for v in value for part in (v.replace(",", " ").split() if isinstance(v, str) else [v])]
    try:
        found = [_scalar(v, kind) for v in value] if items else _scalar(value, kind)
    except (ValueError, TypeError, OverflowError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        raise UserError(f"{where}: {value!r} is not {wanted}{' (or a list of them)' if items else ''}") from None
    if choices and found not in choices:
        raise UserError(f"{where}: {found!r} is not valid; choose from {', '.join(choices)}")
    for v in found if items else [found]:
        for sign, bound in field.metadata["range"].items():
            if bound is not None and not {"≥": v >= bound, ">": v > bound, "≤": v <= bound, "<": v < bound}[sign]:
                raise UserError(f"{where}: {v} is out of range; it must be {sign} {bound}")
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _names(cls: type) -> dict[str, str]:
    """Every accepted spelling (with underscores) → option name."""
    return {n: f.name for f in dataclasses.fields(cls) for n in (f.name, *f.metadata["aliases"])}


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return " ".join(map(str, field.default_factory()))
    return "none" if field.default is None else field.default


def _base_type(hint: Any) -> tuple[type, bool]:
    """(scalar type, is it a list) of `int`, `float | None`, `list[int]`, `Literal["a", "b"]`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, False
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


_BOOLEANS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


def _scalar(value: Any, kind: type) -> Any:
    """`value` as a bool, int, float or str; raises ValueError where it is none."""
    if kind is bool:
        if str(value).lower() not in _BOOLEANS:
            raise ValueError
        return _BOOLEANS[str(value).lower()]
    if isinstance(value, bool) and kind is not str:
        raise ValueError
    if kind is int:
        number = float(value)
        if not number.is_integer():
            raise ValueError
        return int(number)
    if kind is float:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    if isinstance(value, (dict, list)):
        raise ValueError
    return str(value)
