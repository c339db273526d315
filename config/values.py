"""Text of the command line, YAML values and recorded values → an option's type, with its range checked."""

import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple

from common.errors import UserError
from common.files import is_unicode
from common.sizes import Resolution, parse_size, sides

LARGEST = 2**63 - 1  # of a whole number without a bound of its own
HUGE = 10**30  # stands for every larger one
# Bytes of a part of a path and of a whole one: file systems take 255 and 4095, less what is added to a name that is written.
MAX_PART, MAX_PATH = 240, 2048
_NULL = ("", "~", "null", "none")
_BOOLEANS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
_NUMBER = re.compile(r"[+-]?(\d+(_\d+)*(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


class Kind(NamedTuple):
    """The type of an option: `int`, `float | None`, `list[int]`, `Literal["a", "b"]`."""

    type: Any  # of a value, or of the items of a list
    is_list: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False


@functools.cache
def kinds(cls: type) -> dict[str, Kind]:
    """The types of all options of `cls`, by name."""
    return {name: _kind(hint) for name, hint in typing.get_type_hints(cls).items()}


def coerce(cls: type, name: str, value: Any, where: str) -> Any:
    """`value` (text of the command line, or what YAML or a checkpoint holds) as the type of the option `name` of `cls`.

    Args:
        cls: a dataclass of options.
        name: an option of it.
        value: what was given.
        where: the option or file, for messages.

    Raises:
        UserError: another type, outside of the range or the choices, an empty list, or repeated values where they must differ.
    """
    field, kind = cls.__dataclass_fields__[name], kinds(cls)[name]  # type: ignore[attr-defined]
    if kind.is_list and isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if _is_null(value):
        if kind.optional or field.metadata["required"]:
            return None
        value = _none_of(field, kind, value)
    if not kind.is_list:
        return _checked(value, field, kind, where)
    values = [_checked(v, field, kind, where) for v in _items(value, split=not field.metadata["whole"])]
    if not values and (field.default_factory is dataclasses.MISSING or field.default_factory()):
        raise UserError(f"{where}: the list is empty; it needs at least one value")
    if field.metadata["distinct"]:
        spellings = [f"{v:g}" if kind.type is float else str(v) for v in values]
        twice = next((s for i, s in enumerate(spellings) if s in spellings[:i]), None)
        if twice is not None:
            differ = " in their first 6 digits" if kind.type is float else ""
            raise UserError(f"{where}: {twice} is given twice; the values must differ{differ}")
    return values


def whole_number(value: Any) -> int:
    """An int from an int, a float without a fraction, or text such as `7`, `4e5`, `1_000`; exact at any size.

    Raises:
        ValueError: anything else, booleans among it.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = Decimal(value)
    elif isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        try:
            number = Decimal(value.strip())
        except InvalidOperation:  # an exponent of 20 digits
            raise ValueError from None
    else:
        raise ValueError
    if not number.is_finite():
        raise ValueError
    if number.adjusted() > 30:  # beyond every range, and too long to be worked out
        return -HUGE if number < 0 else HUGE
    if number.adjusted() < -30 or number != number.to_integral_value():
        if number:
            raise ValueError
        return 0
    return int(number)


def whole_numbers(values: Any, where: str) -> list[int]:
    """One or several numbers from 0 on, Python's or NumPy's or PyTorch's. Raises UserError, which begins with `where`."""

    def plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else value

    values = plain(values)
    items = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    try:
        numbers = [whole_number(plain(item)) for item in items]
    except ValueError:
        numbers = [-1]
    if min(numbers, default=0) < 0:
        raise UserError(f"{where} {str(values)[:80]}: must be whole numbers from 0 on")
    return numbers


def number(value: Any) -> float:
    """A finite float from a number or its text. Raises ValueError for anything else."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        raise ValueError
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    try:
        found = float(value)
    except OverflowError:  # a huge int
        raise ValueError from None
    if not math.isfinite(found):
        raise ValueError
    return found


def boolean(value: Any) -> bool:
    """A bool from one or its text (true, yes, on, 1, …). Raises ValueError for anything else."""
    text = str(value).strip().lower() if isinstance(value, (bool, int, str)) else ""
    if text not in _BOOLEANS:
        raise ValueError
    return _BOOLEANS[text]


def is_boolean(text: str) -> bool:
    """Is this a spelling of a bool?"""
    return text.strip().lower() in _BOOLEANS


def text(value: Any) -> str:
    """Text from text or a number. Raises ValueError for a list, a mapping, or what no file system and no terminal takes."""
    if not isinstance(value, (str, bool, int, float)):
        raise ValueError
    if "\0" in (found := str(value)):
        raise ValueError("holds a NUL character, which no text may")
    return found


def resolution(value: Any) -> Resolution:
    """The side of a square, or text like 256x384, from a number or such text. Raises ValueError for anything else."""
    try:
        return whole_number(value)
    except ValueError:
        return parse_size(value)


_PARSERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (boolean, "true or false"),
    int: (whole_number, "a whole number"),
    float: (number, "a number"),
    str: (text, "text"),
    Resolution: (resolution, "a whole number of pixels, or WIDTHxHEIGHT"),
}


def _kind(hint: Any) -> Kind:
    arguments = typing.get_args(hint)
    if hint == Resolution:
        return Kind(Resolution)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return _kind(next(a for a in arguments if a is not type(None)))._replace(optional=type(None) in arguments)
    if typing.get_origin(hint) is Literal:
        return Kind(str, choices=arguments)
    if typing.get_origin(hint) is list:
        return Kind(arguments[0], is_list=True)
    return Kind(hint)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _NULL)


def _none_of(field: dataclasses.Field, kind: Kind, value: Any) -> Any:
    """What "no value" means where there must be one: the text `none` if that is the default, a choice, or was written."""
    if "none" in (*kind.choices, field.default) or (isinstance(value, str) and value.strip().lower() == "none"):
        return "none"
    return "" if kind.is_list else value or ""


def _items(value: Any, split: bool) -> list[Any]:
    """The values of a list; text of several, with spaces or commas between them, is taken apart."""
    values = value if isinstance(value, (list, tuple)) else [value]
    parts = [v.replace(",", " ").split() if isinstance(v, str) and split else [v] for v in values]
    return [part for some in parts for part in some]


def _checked(value: Any, field: dataclasses.Field, kind: Kind, where: str) -> Any:
    """One value, or one item of a list, as its type."""
    parse, wanted = _PARSERS[kind.type]
    try:
        found = parse(value)
    except (ValueError, TypeError) as error:
        wrong = str(error) or f"is not {wanted}{' (or a list of them)' if kind.is_list else ''}"
        raise UserError(f"{where}: {_shown(value)} {wrong}") from None
    if kind.choices and found not in kind.choices:
        raise UserError(f"{where}: {_shown(found)} is not valid; choose from {', '.join(kind.choices)}")
    if kind.type is str and not kind.choices:
        _check_text(found, field, where)
    if kind.type in (int, float):
        _check_range(found, value, field, kind, where)
    for side in sides(found) if kind.type is Resolution else ():
        _check_range(side, side, field, kind, where)
    return found


def _check_text(value: str, field: dataclasses.Field, where: str) -> None:
    if not value.strip() or value.strip().lower() in ("~", "null"):
        raise UserError(f"{where}: {_shown(value)} is no value here; it must be text")
    if field.metadata["long"]:
        if not is_unicode(value):
            raise UserError(f"{where}: {_shown(value)} is no Unicode")
        return
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError:  # half a surrogate pair, which YAML can spell
        raise UserError(f"{where}: {_shown(value)} holds a character that no file name has") from None
    long_part = max(map(len, encoded.split(b"/"))) > MAX_PART and b"://" not in encoded
    if long_part or len(encoded) > MAX_PATH:
        limits = f"a path may have {MAX_PATH} bytes, and each name in it {MAX_PART}"
        raise UserError(f"{where}: {_shown(value)} is too long: {limits}")


def _check_range(found: float, value: Any, field: dataclasses.Field, kind: Kind, where: str) -> None:
    bounds = dict(field.metadata["range"])
    if kind.type is int and bounds["≤"] is None and bounds["<"] is None:
        bounds["≤"] = LARGEST
    for sign, bound in bounds.items():
        if bound is not None and not {"≥": found >= bound, ">": found > bound, "≤": found <= bound, "<": found < bound}[sign]:
            shown = found if abs(found) < HUGE else _shown(value)
            raise UserError(f"{where}: {shown} is out of range; it must be {sign} {bound}")


def _shown(value: Any) -> str:
    """A value for a message of one line: its start, if it is long."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    if isinstance(value, (list, tuple, dict)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'}"
    return repr(value) if len(str(value)) <= 80 else f"{str(value)[:80]!r}…"
