"""Files: names from outside, writes that are whole or not at all, locks."""

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from common.errors import UserError, first_line


class DataError(UserError):
    """A broken data file, met by one process alone.

    A DataLoader worker passes an exception on as type(traceback text): only the line of the message itself is kept.
    """

    def __init__(self, message: str, *, local: bool = True):
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip(), local=local)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where this project keeps what it can make or fetch again: `$XDG_CACHE_HOME/elastic-dit`, `~/.cache/elastic-dit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "elastic-dit"


MAX_PART, MAX_PATH = 255, 4095  # bytes of a file name and of a path, on Linux


def check_name(name: Any, source: str | Path, *, plain: bool = False) -> str:
    """`name`, a relative path that comes from outside (an index, an archive, an option …), unless it could lead out of a folder.

    Args:
        name: what should be a relative path.
        source: what holds the name (a file, an option), for the message.
        plain: the name of one file or folder; no separator is allowed.

    Raises:
        UserError: not text, empty, too long, absolute, with a drive letter, a backslash, a NUL or a part `..`.
    """
    wanted = "the name of one file or folder" if plain else "a path inside the folder, with forward slashes"
    if not isinstance(name, str):
        raise UserError(f"{source}: {str(name)[:80]!r} is no file name; wanted: {wanted}")
    parts = name.split("/")
    try:
        # Nearly all are short and ASCII; there are millions of them.
        sizes = [len(name)] if len(name) <= MAX_PART and name.isascii() else [len(os.fsencode(part)) for part in parts]
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        sizes = []
    if not set(parts) - {"", "."}:
        wrong = "names nothing"
    elif name.startswith("/") or ".." in parts or re.match("[A-Za-z]:", name) or "\\" in name or (plain and "/" in name):
        wrong = "leads outside"
    elif "\0" in name or not sizes:
        wrong = "holds a character that no file name has"
    elif max(sizes) > MAX_PART or sum(sizes) + len(sizes) > MAX_PATH:
        wrong = "is too long"
    else:
        return name
    raise UserError(f"{source}: refused: {name[:80]!r} {wrong}; wanted: {wanted}")


def encode_name(name: str) -> bytes:
    """A file name as bytes: UTF-8, and what is none as the file system gave it."""
    return name.encode("utf-8", "surrogateescape")


def decode_name(name: bytes) -> str:
    """The inverse of `encode_name`."""
    return name.decode("utf-8", "surrogateescape")


def join_inside(folder: str | Path, name: Any, source: str | Path, *, plain: bool = False) -> Path:
    """`folder / name` for a name that comes from outside; `UserError` unless it lies below the folder (see `check_name`)."""
    return Path(folder) / check_name(name, source, plain=plain)


def is_unicode(text: str) -> bool:
    """Can it be encoded: does it hold no half of a surrogate pair, which JSON, YAML and command lines can spell?"""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(content: bytes, source: str | Path) -> Any:
    """The value that a JSON file holds; `UserError` that names `source` if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise UserError(f"{source}: not valid JSON: {first_line(error)}") from None


def aside_of(path: Path) -> Path:
    """Where a file is written before it gets its name: `{name}.{pid}.tmp` beside it, so that no two processes share one."""
    ending = f".{os.getpid()}.tmp"
    return path.with_name(os.fsdecode(os.fsencode(path.name)[: MAX_PART - len(ending)]) + ending)


class WriteError(UserError, OSError):
    """A file that cannot be written: disk full, read-only folder …. One line for users; an OSError for whoever can do without.

    Only the process that meets it knows of it.
    """

    def __init__(self, path: str | Path, error: OSError, option: str = ""):
        super().__init__(f"{option} {path}: cannot be written: {error.strerror or error}".strip(), local=True)
        self.errno, self.strerror, self.filename = error.errno, error.strerror or str(error), str(path)

    def __str__(self) -> str:
        return self.args[0]


@contextlib.contextmanager
def written_aside(path: str | Path, *, fsync: bool = False, option: str = "") -> Iterator[Path]:
    """The path to write `path` under; renamed to `path` at the end of the context, removed where that is left by an error.

    Args:
        path: the file.
        fsync: the content and the new name survive a power cut.
        option: how an error names the file, e.g. `--output`.

    Raises:
        WriteError: for an OSError; `path` is then what it was.
    """
    path = Path(path)
    # A device or a FIFO (/dev/null, /dev/stdout) is written to, never replaced.
    is_special = os.path.exists(path) and not (path.is_file() or path.is_dir())  # noqa: PTH110
    aside = path if is_special else aside_of(path)
    try:
        yield aside
        if not is_special:
            if fsync:
                _sync(aside)
            aside.replace(path)
    except BaseException as error:
        if not is_special:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, UserError):
            raise WriteError(path, error, option) from None
        raise
    if fsync:
        sync_folder(path.parent)


def write_atomically(
    path: str | Path, content: bytes | str | Callable[[BinaryIO], object], *, fsync: bool = False, option: str = ""
) -> None:
    """Write a file that is whole under its name or not there: aside, then renamed.

    Args:
        path: the file.
        content: bytes, text (UTF-8), or what writes to the open file.
        fsync: the content and the new name survive a power cut.
        option: how an error names the file, e.g. `--output`.

    Raises:
        WriteError: which is a UserError and an OSError.
    """
    with written_aside(path, fsync=fsync, option=option) as aside, aside.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):  # not on every file system, and not on Windows
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: str | Path, is_target: Callable[[str], object]) -> None:
    """Remove what killed runs left of files that `written_aside` wrote: `{name}.{pid}.tmp` (or `{name}.tmp`) of `is_target(name)`.

    Only regular files directly in `folder` are removed: other files named `*.tmp`, links and subfolders stay.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            match = re.fullmatch(r"(.+?)(\.\d+)?\.tmp", entry.name, re.DOTALL)
            if match and is_target(match[1]) and entry.is_file(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)


def check_folder(option: str, folder: str | Path) -> None:
    """Refuse a folder that cannot be made or written to; nothing is made."""
    there = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if os.path.exists(p))  # noqa: PTH110
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{option} {folder}: cannot write there: {there} is no folder that can be written to")


def check_output(option: str, path: str | Path) -> None:
    """Refuse a file that cannot be written: its name is a folder's, or its folder cannot be made. `UserError` names the option."""
    if Path(path).is_dir() or not Path(path).name:
        raise UserError(f"{option} {path}: is a folder; wanted: a file")
    check_folder(f"{option}: the folder", Path(path).parent)


def make_folder(path: Path, option: str = "--dest") -> None:
    """Make a folder and its parents, if they are not there. `UserError` where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be made: {error.strerror}", local=True) from None


def lock(path: Path) -> Any:
    """Open a file (made where there is none) and lock it for this process; None where another one has it. OSError: no locks.

    The lock ends with the process. On POSIX no forked worker inherits it.
    """
    while True:
        file = path.open("a+")
        try:
            _take_lock(file)
        except OSError as error:
            file.close()
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                return None
            raise
        try:
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        except FileNotFoundError:
            pass
        file.close()  # its owner removed it meanwhile


def _take_lock(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        # A byte far behind the end: nobody else could read one that is locked.
        os.lseek(file.fileno(), 2**30, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        os.lseek(file.fileno(), 0, os.SEEK_END)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Busy(UserError):
    """Another process writes there."""


class FolderLock:
    """A file that this process has locked for as long as it writes in a folder; it says who has it.

    Raises `Busy` where another process has it, and OSError. A file system without locks is a warning.
    """

    def __init__(self, path: Path, folder: Path, warn: Callable[[str], None]):
        self._path = path
        self._made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = lock(path)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            warn(f"{path}: this file system has no locks ({error.strerror}): nothing keeps a second run out of {folder}")
            self._file = path.open("a")
        if self._file is None:
            raise Busy(f"{folder}: another run is writing there{_owner(path)}; wait for its end")
        with contextlib.suppress(OSError):  # a full disk
            os.truncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Give it up, and leave nothing of it: a folder that was made for it goes where it is empty."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        self._file.close()
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()


def _owner(path: Path) -> str:
    """` (process … on …)` as a lock file says it; an empty text where it does not."""
    with contextlib.suppress(OSError, ValueError):
        if text := path.read_text()[:200].strip():
            return f" ({text})"
    return ""


def write_json(values: object, path: str | Path, *, option: str = "") -> None:
    """A JSON file, written atomically; `option`: see `write_atomically`."""
    write_atomically(path, json.dumps(values, indent=1, allow_nan=False) + "\n", option=option)
