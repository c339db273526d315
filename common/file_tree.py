"""Files to read: folders and zips by relative names, of regular files alone, and none larger than is sensible."""

import errno
import io
import os
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError, first_line
from common.files import DataError, check_name, parse_json
from common.logging import warn

# The most that is read of one file at once. What claims more (a sparse file, a zip bomb) is refused before it is read.
MAX_BYTES = 2**30
MAX_JSON_BYTES = 2**31  # labels of tens of millions of images


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; OSError for what is no regular file: a FIFO would wait for ever, a device never ends."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(errno.EINVAL, "not a regular file")


def read_regular(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes. OSError if it cannot be read, or is larger."""
    with open_regular(path) as file:
        check_bytes(os.fstat(file.fileno()).st_size, limit)
        return file.read()


def check_bytes(size: int, limit: int) -> None:
    """Raise OSError for a file that is too large to be read at once."""
    if size > limit:
        raise OSError(errno.EFBIG, f"has {size:,} bytes; the limit is {limit:,}")


class FileTree:
    """The files of a folder or of a zip, by their path inside it with forward slashes.

    Works in DataLoader workers, forked or spawned: a zip is opened by each process for itself, when it first reads.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        if not os.path.exists(self.path):  # noqa: PTH110, Path.exists raises for a name that is too long
            raise UserError(f"{self.path}: no such folder or zip file")
        if not self.path.is_dir():
            names = self._archive().namelist()
            for name in names:
                # Nothing is ever extracted here, but such names come from no honest data set, and others may extract.
                if name != "./":  # the folder itself, which some archivers store
                    check_name(name, self.path)
            if len(set(names)) < len(names):
                seen: set[str] = set()
                twice = next(name for name in names if name in seen or seen.add(name))
                raise UserError(f"{self.path}: refused, since it holds two files of one name: {twice!r}")

    def names(self) -> list[str]:
        """Every file, sorted by path as text.

        Links to folders are followed, but no folder is read twice: a link to one that was read is skipped with a warning.
        """
        if not self.path.is_dir():
            return sorted(name for name in self._archive().namelist() if not name.endswith("/"))
        names: list[str] = []
        read: dict[tuple[int, int], str] = {}  # (device, inode) of each folder → its path
        folders, links = [""], []  # class folders are often links; real folders go first
        while folders or links:
            inside = folders.pop() if folders else links.pop(0)
            folder = os.path.join(self.path, inside)  # noqa: PTH118, there may be millions of files
            try:
                status = os.stat(folder)  # noqa: PTH116
                first = read.setdefault((status.st_dev, status.st_ino), folder)
                if first != folder:
                    warn(f"{folder}: is a link to {first}, whose files are read already; skipped")
                    continue
                with os.scandir(folder) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        name = f"{inside}/{entry.name}" if inside else entry.name
                        (names if not _is_folder(entry) else links if entry.is_symlink() else folders).append(name)
            except OSError as error:
                raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
        return sorted(names)

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes:
        """The content of one file of at most `limit` bytes. `DataError` if it cannot be read, or is larger."""
        try:
            if self.path.is_dir():
                return read_regular(self.path / name, limit)
            archive = self._archive()
            check_bytes(archive.getinfo(name).file_size, limit)
            return archive.read(name)
        except UserError:
            raise
        except Exception as error:  # zipfile and its decompressors raise whatever they like on damaged or encrypted members
            raise DataError(f"{self.where(name)}: cannot be read: {_reason(error)}") from None

    def prefetch(self, names: Sequence[str]) -> None:
        """Say which files are read next: those of another machine are fetched together."""

    def open(self, name: str) -> BinaryIO:
        """One file, open for reading: of a folder without reading it yet. `DataError` if that is impossible."""
        if not self.path.is_dir():
            return io.BytesIO(self.read(name))
        try:
            return open_regular(self.path / name)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.where(name)}: cannot be read: {_reason(error)}") from None

    def where(self, name: str) -> str:
        """How messages name a file."""
        return str(self.path / name)

    def _archive(self) -> zipfile.ZipFile:
        if self._zip is None or self._zip[0] != os.getpid():
            try:
                open_regular(self.path).close()
                self._zip = (os.getpid(), zipfile.ZipFile(self.path))
            except Exception as error:  # names that are no UTF-8, offsets below zero … and OSError
                raise UserError(f"{self.path}: neither a folder nor a readable zip file: {_reason(error)}") from None
        return self._zip[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def read_json(files: FileTree, name: str) -> Any:
    """The content of a JSON file; `UserError` that names it if it is none."""
    return parse_json(files.read(name, MAX_JSON_BYTES), files.where(name))
