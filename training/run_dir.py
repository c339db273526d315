"""Files of a run folder: config.yaml, metrics.jsonl, status.json."""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger("train")  # to log.txt alone; what a user must see is printed too


log.addHandler(logging.NullHandler())


log.propagate = False


def read_or_create(path: Path, value: str) -> str:
    """What the file holds; `value` the first time, which is then kept."""
    if not path.exists():
        write_aside(path, value)
    return path.read_text()


def log_tracker_errors(action: Callable[[], None]) -> None:
    """A tracker that fails is a warning, never the end of a run."""
    try:
        action()
    except Exception as error:
        warn(f"tracker: {error}")


def warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"train.py: warning: {message}", file=sys.stderr, flush=True)
        log.warning(message)


def write_aside(path: Path, content: str | bytes) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.move(aside, path)


def append_line(path: Path, lines: str | bytes) -> None:
    """The whole of it or nothing."""
    data = lines if isinstance(lines, bytes) else lines.encode()
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def warn_if_unwritable(path: Path) -> Iterator[None]:
    """A file beside the checkpoints that cannot be written is a warning: disks fill, and get emptied."""
    try:
        yield
    except OSError as error:
        warn(f"{path}: cannot be written: {error.strerror}")


def step_of_line(line: bytes) -> float:
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, LookupError, TypeError, RecursionError):  # cut short by a kill, or damaged
        return math.inf
    return step if type(step) in (int, float) else math.inf
