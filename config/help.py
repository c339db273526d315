"""`-h`: the options that act in a script, by group."""

import dataclasses
import shutil
import textwrap
from typing import Any

from common.sizes import Resolution
from config.options import Architecture, ConvertCheckpointConfig, TrainConfig
from config.rules import GROUPS
from config.values import Kind, kinds

_INDENT = 26  # columns before the help text


def positionals(cls: type) -> list[tuple[str, str]]:
    """The options that may be given by their place on the command line, in that order: (name, NAME in the usage line)."""
    return [(f.name, f.metadata["positional"]) for f in dataclasses.fields(cls) if f.metadata["positional"]]


def is_shown(cls: type, field: dataclasses.Field) -> bool:
    """Does this option act in the script whose options are `cls`? Others are accepted all the same, e.g. from a YAML file."""
    rules = field.metadata
    if field.name in _ARCHITECTURE and not issubclass(cls, TrainConfig):
        if issubclass(cls, ConvertCheckpointConfig):
            return rules["resume"] == "same" and rules["images"]
        return rules["images"] or rules["group"] == "system"
    return not rules["hidden"]


def from_checkpoint(cls: type, field: dataclasses.Field) -> bool:
    """Is it an option that a checkpoint records, so that a script which reads one needs it for bare weights alone?"""
    rules = field.metadata
    return field.name in _ARCHITECTURE and not issubclass(cls, TrainConfig) and rules["images"] and rules["resume"] == "same"


def print_help(cls: type, prog: str) -> None:
    """Print usage, purpose and options, by group; what a checkpoint usually supplies stands last."""
    width = min(shutil.get_terminal_size().columns, 128)
    usage = " ".join([prog, *(name for _, name in positionals(cls))])
    print(f"usage: {usage} [--option value …]\n")
    print(textwrap.fill(" ".join((cls.__doc__ or "").split()), width))
    fields = [f for f in dataclasses.fields(cls) if is_shown(cls, f)]
    for recorded in (False, True):
        if recorded and any(from_checkpoint(cls, f) for f in fields):
            print("\nRecorded in the checkpoint; needed only for one that records nothing (a bare state dict):")
        for group, title in GROUPS.items():
            members = [f for f in fields if f.metadata["group"] == group and from_checkpoint(cls, f) == recorded]
            if members:
                print(f"\n{title}:")
            for field in members:
                print(_entry(field, kinds(cls)[field.name], recorded, width))


def _entry(field: dataclasses.Field, kind: Kind, recorded: bool, width: int) -> str:
    flags = ", ".join("--" + name.replace("_", "-") for name in (field.name, *field.metadata["aliases"]))
    kind_name = "{" + ",".join(kind.choices) + "}" if kind.choices else _type_name(kind.type)
    head = f"  {flags} {kind_name}{' …' if kind.is_list else ''}"
    default = " [required]" if field.metadata["required"] else f" [{_default(field)}]"
    if recorded or "(default: " in field.metadata["help"]:
        default = ""
    indent = " " * _INDENT
    text = textwrap.fill(f"{field.metadata['help']}{default}", width, initial_indent=indent, subsequent_indent=indent)
    return head + text[len(head) :] if len(head) < _INDENT - 1 else f"{head}\n{text}"


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return " ".join(map(str, field.default_factory())) or "none"
    return "none" if field.default is None else str(field.default)


_ARCHITECTURE = {f.name for f in dataclasses.fields(Architecture)}


def _type_name(type: Any) -> str:
    return "SIZE" if type is Resolution else type.__name__.upper()
