"""Command line, YAML and recorded configurations → option dataclasses.

Option names may be spelled with hyphens or underscores; YAML keys are the names with underscores.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from common.errors import UserError, did_you_mean
from common.logging import warn
from config.help import positionals, print_help
from config.options import ARCHITECTURE_KEYS, GenerateConfig, TrainConfig
from config.rules import IGNORED
from config.values import Kind, coerce, is_boolean, kinds, number

MAX_YAML = 2**20  # bytes: what is larger is no config


def parse(cls: type, argv: list[str] | None, *, prog: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Command line over YAML over defaults.

    Args:
        cls: a dataclass of options.
        argv: the command line without the script (None: that of this process).
        prog: name of the script, for `-h`.

    Returns:
        The filled dataclass, and the options that the user gave by hand or YAML (name → value). Required options that are
        missing are left `None` for `require_options`, since a checkpoint may still supply them.
    """
    given = parse_command_line(cls, sys.argv[1:] if argv is None else argv, prog=prog)
    for path in reversed(given.get("config") or []):  # a later file counts over an earlier one
        given = read_yaml(path, cls) | given
    for path in reversed(given.get("train_config") or []):
        train = read_yaml(path, TrainConfig, others=spellings(cls))
        given = {k: v for k, v in train.items() if k in ARCHITECTURE_KEYS and k in kinds(cls)} | given
    for name in IGNORED.keys() & given.keys():
        given.pop(name)
        warn(f"{flag(name)} has no effect")
    return cls(**given), given


def require_options(config: Any, *names: str) -> None:
    """Raise a `UserError` for a required option that no source gave (`names`: all required ones where none are named)."""
    for field in dataclasses.fields(config):
        wanted = field.name in names if names else field.metadata["required"]
        if wanted and getattr(config, field.name) is None:
            place = field.metadata["positional"]
            raise UserError(f"{f'{place} or ' if place else ''}{flag(field.name)} is required: {field.metadata['help']}")


def parse_command_line(cls: type, argv: Sequence[str], *, prog: str | None = None) -> dict[str, Any]:
    """The options on the command line, by name: `--name value`, `--name=value`, positional ones, and `-h`, which exits.

    Of an option that is given again the last counts, so that scripts can be overridden; of a list, which one might expect to be
    joined, a warning says so.

    Raises:
        UserError: an unknown option (with the nearest name), a missing or a wrong value, too many positional arguments.
    """
    flags, places = _flags(cls), [name for name, _ in positionals(cls)]
    given: dict[str, Any] = {}
    replaced: dict[str, str] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print_help(cls, prog or Path(sys.argv[0]).name)
            raise SystemExit(0)
        if _is_flag(argument):
            where, equals, value = argument.partition("=")
            if (known := flags.get(where.replace("_", "-"))) is None:
                raise UserError(f"unknown option {where[:80]}{did_you_mean(where[:80], flags)}")
            value = _value(where, known, value if equals else None, rest, bool(places))
            name, where = known.option, flag(known.option)
        elif places:
            name, value, where = places[0], argument, flag(places.pop(0))
        else:
            raise UserError(f"unexpected argument {argument[:80]!r}: options are written as --name value")
        value = value if name in IGNORED else coerce(cls, name, value, where)
        if name not in IGNORED and kinds(cls)[name].is_list and given.get(name, value) != value:
            replaced[name] = f"{where}: is given again, and the last one alone counts; several values stand after one {where}"
        given[name] = value
    for message in replaced.values():
        warn(message)
    return given


def read_yaml(path: str, cls: type, *, others: Iterable[str] = ()) -> dict[str, Any]:
    """The options in a YAML file, by name.

    Keys of the other scripts' options (`others`, for a training config) are passed over.

    Raises:
        UserError: names the file and the key: no option (with the nearest known one), given twice, or with a wrong value.
    """
    own, items = spellings(cls), _yaml_items(path)
    if cls is TrainConfig and not others and "ckpt" in dict(items):
        raise UserError(f"{path}: this is a generation config (it names a checkpoint); train.py wants a training config")
    others = dict.fromkeys(others) if cls is TrainConfig else spellings(TrainConfig) | spellings(GenerateConfig)
    given: dict[str, Any] = {}
    seen: set[str] = set()
    for key, value in items:
        name = key.replace("-", "_")
        name = own.get(name, name)
        if name in seen:
            raise UserError(f"{path}: {key[:80]}: is given twice, or under two names")
        seen.add(name)
        if name in IGNORED:
            given[name] = value
        elif name in own:
            given[name] = coerce(cls, name, value, f"{path}: {key}")
        elif name not in others:
            raise UserError(f"{path}: unknown key {key[:80]!r}{did_you_mean(name[:80], {**own, **others})}")
    given.pop("config", None)
    return given


def spellings(cls: type) -> dict[str, str]:
    """Every accepted spelling (with underscores) → option name."""
    return {n: f.name for f in dataclasses.fields(cls) for n in (f.name, *f.metadata["aliases"])}


def flag(name: str) -> str:
    """An option as it is written on the command line."""
    return "--" + name.replace("_", "-")


def _is_flag(argument: str) -> bool:
    """Is it an option, not a value? Negative numbers are values, and so is a single hyphen."""
    if not argument.startswith("-") or argument == "-":
        return False
    try:
        number(argument)
    except ValueError:
        return argument not in ("-inf", "-nan")
    return False


class _Flag(NamedTuple):
    """What a `--name` on the command line stands for."""

    option: str
    kind: Kind
    alone: bool | None  # its value where none follows; None: one must


def _flags(cls: type) -> dict[str, _Flag]:
    """Every `--name` of a script, with hyphens; of a switch, `--no-name` too."""
    options = {name: (option, kinds(cls)[option]) for name, option in spellings(cls).items()}
    if "config" in kinds(cls):
        options |= {name: (name, Kind(kind)) for name, kind in IGNORED.items()}
    flags = {flag(name): _Flag(option, kind, True if kind.type is bool else None) for name, (option, kind) in options.items()}
    no = {flag(f"no_{name}"): _Flag(option, kind, False) for name, (option, kind) in options.items() if kind.type is bool}
    return no | flags


def _value(written: str, known: _Flag, value: str | None, rest: list[str], has_places: bool) -> Any:
    """The value of an option: that after its `=`, else what stands next in `rest`, which is taken out of it."""
    if known.alone is False and value is not None:
        raise UserError(f"{written}: takes no value")
    if value is not None or known.alone is False:
        return known.alone if value is None else value
    following = next((i for i, argument in enumerate(rest) if _is_flag(argument)), len(rest))
    if known.alone and known.kind.is_list:
        values = list(itertools.takewhile(is_boolean, rest))
        del rest[: len(values)]
        return values or [True]
    if known.alone:
        # Before positional arguments only a boolean is taken as the value: `convert_checkpoint.py --show IN`.
        return rest.pop(0) if following and (is_boolean(rest[0]) or not has_places) else True
    if not following:
        raise UserError(f"{written}: needs a value")
    values = [rest.pop(0) for _ in range(following if known.kind.is_list else 1)]
    return values if known.kind.is_list else values[0]


def _yaml_items(path: str) -> list[tuple[str, str | list[str]]]:
    """The `option: value` lines of a YAML file; values are text or flat lists of it.

    The option's type decides what a value is, so that `no` and `007` stay what they are.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file{did_you_mean(Path(path).name, _siblings(path))}")
    if Path(path).stat().st_size > MAX_YAML:
        raise UserError(f"{path}: not a config file: larger than {MAX_YAML // 2**20} MiB")
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not a config file: nested too deeply") from None
    if root is None or root.value == "":
        return []
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise UserError(f"{path}: must hold `option: value` lines")
    return [(key.value, _yaml_value(node, f"{path}: {key.value[:80]}")) for key, node in root.value]


def _siblings(path: str) -> list[str]:
    """The names of the YAML files beside it."""
    return [file.name for file in Path(path).parent.glob("*.yaml")]


def _yaml_value(node: yaml.Node, where: str) -> str | list[str]:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    raise UserError(f"{where}: must be a value or a list of values, without lists or mappings inside")
