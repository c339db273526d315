"""Where the data tools write: a folder or a zip, filled file by file; a stopped run is continued, another one refused."""

import contextlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.file_tree import FileTree
from common.files import WriteError, make_folder, remove_leftovers, write_atomically
from data import latent_files
from preprocessing.unfinished import UNFINISHED_FILE, Unfinished

SKIPPED_FILE = "skipped.txt"


Decode = Callable[[bytes], np.ndarray]  # bytes of a complete file → its content; ValueError for others


class Folder:
    """Files of one kind in a folder, which `option` named: what is there already, and writing them. Any process may have one."""

    def __init__(self, path: Path, decode: Decode, option: str = "--dest"):
        self.path, self._decode, self._option = path, decode, option

    def existing(self, name: str) -> tuple[int, ...] | None:
        """The shape of a file's content, or None where it is missing or broken."""
        try:
            return self._decode((self.path / name).read_bytes()).shape
        except (ValueError, OSError):
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write one file, in a sub-folder that is made where it is not there. Raises WriteError."""
        path = self.path / name
        make_folder(path.parent, self._option)
        write_atomically(path, content, option=self._option)


class FolderDest(Folder):
    """A folder to be filled by this process and, through `Folder`, others.

    `targets`: every file that this run may write; `making`: what is made, so that nothing else is continued.
    """

    def __init__(self, path: Path, making: dict[str, Any], targets: Iterable[str], decode: Decode):
        super().__init__(path, decode)
        self._targets = set(targets)
        if path.exists() and not path.is_dir():
            raise UserError(f"--dest {path}: is a file; wanted: a new folder, or a name ending in .zip")
        self._is_new = not path.exists()
        present = set() if self._is_new else set(FileTree(path).names())
        self._check(present)
        make_folder(path)
        self._record = Unfinished(path / UNFINISHED_FILE, making, path, is_begun=bool(present & self._targets))
        remove_asides(path, [*self._targets, SKIPPED_FILE, latent_files.LABEL_FILE, latent_files.VAE_FILE])

    def __enter__(self) -> "FolderDest":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failure the record stays for the next run, unless there is nothing to continue.
        is_empty = kind is not None and not any((self.path / name).exists() for name in self._targets)
        self._record.release(remove=kind is None or is_empty)
        if is_empty and self._is_new:
            with contextlib.suppress(OSError):  # not empty after all
                for folder in sorted((p for p in self.path.rglob("*") if p.is_dir()), reverse=True):
                    folder.rmdir()
                self.path.rmdir()

    def finish(self, label_file: dict[str, Any]) -> None:
        """Write dataset.json (where there is one to write): from here on the set is whole."""
        if label_file:
            self.write(latent_files.LABEL_FILE, json.dumps(label_file).encode())

    def _check(self, present: set[str]) -> None:
        present = {name for name in present if not name.endswith(".tmp")}
        if latent_files.LABEL_FILE in present and UNFINISHED_FILE not in present:
            raise UserError(f"--dest {self.path}: holds a finished data set; give a new folder, or remove that one")
        own = {UNFINISHED_FILE, latent_files.LABEL_FILE, latent_files.VAE_FILE, SKIPPED_FILE}
        if foreign := present - self._targets - own:
            raise UserError(
                f"--dest {self.path}: not empty, it holds {min(foreign)}, which is no part of this run; give a new folder"
            )


class ZipDest:
    """A zip (stored, not compressed), written aside in order and renamed when it is whole.

    A stopped run goes on behind the last member that is whole. `targets`: every file that this run may write.
    """

    def __init__(self, path: Path, making: dict[str, Any], targets: Iterable[str], decode: Decode):
        self.path, self._targets, self._decode = path, set(targets), decode
        self._aside = path.with_name(path.name + ".tmp")
        if path.exists():
            raise UserError(f"--dest {path}: exists already; give a new name, or remove it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(path, error, "--dest") from None
        record = path.with_name(f"{path.name}.{UNFINISHED_FILE}")
        self._record = Unfinished(record, making, path, is_begun=self._aside.exists())
        if not self._starts_as_ours():
            self._record.check_aside([self._aside], path)
        self._shapes: dict[str, tuple[int, ...]] = {}
        try:
            self._zip = self._continued()
        except (OSError, UserError) as error:
            self._record.release(remove=False)
            raise WriteError(path, error, "--dest") if isinstance(error, OSError) else error from None

    def __enter__(self) -> "ZipDest":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_empty = kind is not None and not self._zip.filelist
        with contextlib.suppress(OSError):  # a full disk was reported already
            self._zip.close()
        if is_empty:
            self._aside.unlink(missing_ok=True)
        self._record.release(remove=kind is None or is_empty)

    def existing(self, name: str) -> tuple[int, ...] | None:
        """The shape of a member's content, or None where it is not written yet."""
        return self._shapes.get(name)

    def write(self, name: str, content: bytes) -> None:
        """Write one member. Raises WriteError."""
        try:
            self._zip.writestr(zipfile.ZipInfo(name), content)  # a fixed date: the same images give the same bytes
        except OSError as error:
            raise WriteError(self.path, error, "--dest") from None

    def finish(self, label_file: dict[str, Any]) -> None:
        """Write dataset.json (where there is one to write) and give the zip its name."""
        if label_file:
            self.write(latent_files.LABEL_FILE, json.dumps(label_file).encode())
        try:
            self._zip.close()
            with self._aside.open("rb") as file:
                os.fsync(file.fileno())
            self._aside.replace(self.path)
        except OSError as error:
            raise WriteError(self.path, error, "--dest") from None

    def _starts_as_ours(self) -> bool:
        """Is what lies aside, as far as it goes, the start of a zip of the targets? Then a missing record is no matter."""
        if self._aside.is_symlink() or not self._aside.is_file():
            return False
        with self._aside.open("rb") as file:
            header = file.read(30)
            name = file.read(int.from_bytes(header[26:28], "little") if len(header) == 30 else 0)
        return b"PK\3\4".startswith(header[:4]) and any(target.encode().startswith(name) for target in self._targets)

    def _continued(self) -> zipfile.ZipFile:
        """The zip that a stopped run left, cut behind its last whole member; a new one where there is none."""
        if not self._aside.exists():
            return zipfile.ZipFile(self._aside, "w", zipfile.ZIP_STORED)
        members, end = [], 0
        with self._aside.open("rb") as file:
            while (info := _next_member(file)) is not None:
                try:
                    self._shapes[info.filename] = self._decode(file.read(info.file_size)).shape
                except ValueError:  # dataset.json and the like are written again
                    file.seek(end)
                    break
                if info.filename not in self._targets:
                    raise UserError(
                        f"--dest {self.path}: {self._aside.name} beside it holds {info.filename[:80]!r}, which is no part of this run; "
                        "move it away, or give a new name"
                    )
                members.append(info)
                end = file.tell()
        file = self._aside.open("r+b")
        file.truncate(end)
        file.seek(end)
        archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        archive.filelist, archive.NameToInfo = members, {info.filename: info for info in members}
        archive.start_dir = end
        return archive


def _next_member(file: io.BufferedIOBase) -> zipfile.ZipInfo | None:
    """The member whose local header starts here, with the file at its content; None where there is no whole one."""
    start = file.tell()
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        return None
    flags, method = int.from_bytes(header[6:8], "little"), int.from_bytes(header[8:10], "little")
    crc, packed, size = (int.from_bytes(header[i : i + 4], "little") for i in (14, 18, 22))
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    if flags & ~0x800 or method or packed != size or extra:
        return None
    info = zipfile.ZipInfo(file.read(name).decode(errors="replace"))
    content = file.tell()
    if zlib.crc32(file.read(size)) != crc or file.tell() != content + size:
        return None
    file.seek(content)
    info.external_attr = 0o600 << 16  # what zipfile gives to a member that it writes
    info.header_offset, info.CRC, info.file_size, info.compress_size = start, crc, size, size
    return info


def remove_asides(root: Path, names: Iterable[str]) -> None:
    """Remove what killed runs left aside of the files `names` in a folder. Nothing else, and nothing behind a link."""
    of_folder: dict[str, set[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        of_folder.setdefault(folder, set()).add(file)
    for folder, files in of_folder.items():
        path = root / folder
        if path.is_dir() and path.resolve() == root.resolve() / folder:
            remove_leftovers(path, files.__contains__)


def create(dest: str, making: dict[str, Any], targets: list[str], decode: Decode) -> FolderDest | ZipDest:
    """The destination of a command, refused if it holds anything but a stopped run of the same."""
    if dest.lower().endswith(".zip"):
        return ZipDest(Path(dest), making, targets, decode)
    return FolderDest(Path(dest), making, targets, decode)


def label_file(names: Iterable[str], labels: dict[str, int] | None) -> dict[str, Any]:
    """The content of dataset.json."""
    return {"labels": None if labels is None else [[name, labels[name]] for name in names]}
