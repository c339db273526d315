"""Warnings, once for a run: one line on stderr and in the run's log file, where it has one."""

import logging
import os
import sys

# Handlers (a run's log.txt) are added by who has such a file; nothing goes to the root logger.
log = logging.getLogger("elastic-dit")
log.addHandler(logging.NullHandler())
log.propagate = False

_script = os.path.basename(sys.argv[0]) if sys.argv else ""  # noqa: PTH119, may be empty


def set_script(name: str) -> None:
    """Tell how warnings name the program that runs; `cli_main` does it."""
    global _script
    _script = name


def is_first_process() -> bool:
    """Is this the first process of a run, the one that speaks?"""
    return os.environ.get("RANK", "0") == "0"


def warn(message: str) -> None:
    """Print `SCRIPT: warning: MESSAGE` on stderr and log it, in the first process of a run alone."""
    if is_first_process():
        print(f"{_script}: warning: {' '.join(message.split())}", file=sys.stderr, flush=True)
        log.warning(message)
