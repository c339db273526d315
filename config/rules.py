"""What an option is: name, type, default, valid values and help, and the rules by which all lists of options are computed."""

import dataclasses
from collections.abc import Container
from typing import Any, Literal, TypedDict, Unpack

# Groups of `-h`, in its order, and their titles.
GROUPS = {
    "files": "files",
    "checkpoint": "checkpoint",
    "architecture": "model",
    "run": "run",
    "data": "data",
    "sample": "sampling",
    "guidance": "guidance",
    "images": "images",
    "metrics": "metrics",
    "train": "training",
    "optimizer": "optimizer",
    "path": "path, times and prediction",
    "repa": "REPA",
    "elit": "ELIT",
    "dfm": "DFM",
    "output": "output",
    "system": "speed, memory and precision",
    "plan": "plan",
}
# Options of the published code that are accepted and change nothing: name → type.
IGNORED: dict[str, type] = {"legacy": bool, "enable_repa": bool, "projector_embed_dims": str}


class Rules(TypedDict, total=False):
    """What an option may say about itself, beside group, default and help.

    resume: may a resumed run of train.py have another value? same: never; changeable: where `--allow-change` names it; free:
        always. Each option of train.py decides this.
    when: the resume rule holds only for such models or runs (default for the groups elit and dfm: the group). repa: with
        target encoders; schedule: where the learning rate depends on the number of steps.
    images: does it change the images that are drawn from one checkpoint? Each option of generate.py decides this.
    folder: place and label in the name of generate.py's folder, where the value is not the default.
    model: an argument of the model's constructor.
    hidden: accepted, but not shown by `-h`.
    positional: it may be given by its place on the command line, under this name in the usage line.
    whole: items of a list are not taken apart at spaces and commas (paths).
    distinct: no value may stand in a list twice.
    long: text that is no path and may have any length.
    aliases: other names.
    ge, gt, le, lt: the range of valid numbers.
    """

    resume: Literal["same", "changeable", "free"]
    when: Literal["elit", "dfm", "repa", "schedule"]
    images: bool
    folder: tuple[int, str]
    model: bool
    hidden: bool
    positional: str
    whole: bool
    distinct: bool
    long: bool
    aliases: tuple[str, ...]
    ge: float
    gt: float
    le: float
    lt: float


def option(group: str, default: Any, help: str, **rules: Unpack[Rules]) -> Any:
    """A dataclass field for an option.

    Args:
        group: the heading of `-h` under which it stands, one of `GROUPS`.
        default: `...` for an option that must be given.
        help: what it means, in a few words.
        **rules: see `Rules`.
    """
    if group not in GROUPS:
        raise ValueError(f"unknown group {group!r}; choose from {', '.join(GROUPS)}")
    metadata: dict[str, Any] = {"resume": None, "images": None, "folder": None, "positional": None, "aliases": ()}
    metadata |= dict.fromkeys(("model", "hidden", "whole", "distinct", "long"), False)
    metadata |= rules
    metadata |= {"group": group, "help": help, "required": default is ...}
    metadata["when"] = rules.get("when", group if group in ("elit", "dfm") else None)
    metadata["range"] = {sign: rules.get(name) for sign, name in {"≥": "ge", ">": "gt", "≤": "le", "<": "lt"}.items()}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=None if default is ... else default, metadata=metadata)


def names(cls: type, **rules: Any) -> tuple[str, ...]:
    """The options of `cls` that have these rules, in the order of their definition.

    Args:
        cls: a dataclass of options.
        rules: what `option` takes, e.g. `resume="same"`; of a set or tuple, any one counts: `group={"elit", "dfm"}`.
    """
    fields = dataclasses.fields(cls)
    return tuple(f.name for f in fields if all(_matches(f.metadata[rule], value) for rule, value in rules.items()))


def folder_labels(cls: type) -> dict[str, str]:
    """The options that the name of generate.py's folder tells, in its order, and their labels there."""
    places = sorted((f.metadata["folder"], f.name) for f in dataclasses.fields(cls) if f.metadata["folder"])
    return {name: label for (_, label), name in places}


def _matches(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, Container) and not isinstance(wanted, str) else value == wanted
