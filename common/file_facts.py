"""What was found out about a large file, remembered for as long as the file has not been written to."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.files import cache_folder, encode_name, file_sha256, write_atomically

# A file written this recently may change again under the same time stamp (some file systems count in steps of two seconds).
_SETTLED_NS = 3_000_000_000


def known_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal; the file is read only where it was written to since the last time."""
    return known(path, "sha256", lambda: file_sha256(path))


def known(path: str | Path, fact: str, compute: Callable[[], Any]) -> Any:
    """compute(), or what it returned the last time if the file `path` has not been written to since.

    "Written to" is what git's index takes for it: another device, inode, size, time of modification or of change. What a disk
    corrupts by itself is not seen, so whatever must find that reads the file. The memory is a small file in the cache folder;
    where none can be written, nothing is remembered.

    Args:
        path: the file.
        fact: a name for what is computed.
        compute: returns what JSON can hold; what it raises is not remembered.
    """
    before, memory = _identity(path), _memory(path)
    facts = _read(memory, before)
    if fact in facts:
        return facts[fact]
    value = compute()
    settled = before is not None and before == _identity(path) and time.time_ns() - max(before[3:]) > _SETTLED_NS
    if memory is not None and settled:
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(memory, json.dumps({"file": before, "facts": _read(memory, before) | {fact: value}}))
    return value


def recall(path: str | Path, fact: str) -> Any:
    """What `known` would return without computing it, else None."""
    return _read(_memory(path), _identity(path)).get(fact)


def _memory(path: str | Path) -> Path | None:
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        return cache_folder() / "facts" / f"{hashlib.sha256(encode_name(str(Path(path).resolve()))).hexdigest()[:32]}.json"
    return None


def _identity(path: str | Path) -> list[int] | None:
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read(memory: Path | None, identity: list[int] | None) -> dict[str, Any]:
    """The facts of the file with this identity."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(memory.read_bytes()) if memory else {}
        if identity is not None and found["file"] == identity and isinstance(found["facts"], dict):
            return found["facts"]
    return {}
