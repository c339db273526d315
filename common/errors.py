"""A user's mistake: one exception type, reported as one line on stderr."""

import functools
import io
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from common.logging import set_script


class UserError(ValueError):
    """Something that the user can put right. The message names the option or file, what is wrong and what is valid.

    Errors of the set-up are met by every process of a machine alike (a file may be missing on one of several machines), and
    the first one speaks for all. `local=True` marks one that only the process which meets it can know (a broken data file):
    that process prints it.
    """

    def __init__(self, message: str, *, local: bool = False):
        super().__init__(message)
        self.local = local


def cli_main(main: Callable) -> Callable:
    """Decorator for a script's `main(argv=None)`: a `UserError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> Any:
        script = Path(main.__code__.co_filename).name
        set_script(script)
        for stream in (sys.stdout, sys.stderr):  # a locale without UTF-8: other characters are escaped, not an error
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except UserError as error:
            if error.local or speaks_for_machine():
                print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None

    return wrapper


def speaks_for_machine() -> bool:
    """Is this process the first one of a run on its machine? Without LOCAL_RANK in the environment: the first one of all."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known name closest to `name`, or an empty string where none is close."""
    folded = {k.lower(): k for k in known}
    found = get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return f" (did you mean {folded[found[0]]}?)" if found else ""


def first_line(error: BaseException) -> str:
    """What an exception of a library says first, for a message of one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
