"""A remote folder, file by file: each is fetched when it is first read, and then lies in a cache of this machine."""

import hashlib
import io
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from typing_extensions import override

from common.errors import UserError
from common.file_tree import MAX_BYTES, FileTree, check_bytes
from common.files import DataError, cache_folder, check_name, decode_name, encode_name, write_atomically
from data import remote
from data.file_cache import FileCache

FETCHES = 16  # files at once
GIB = 2**30


class RemoteTree(FileTree):
    """The files of a remote folder by their path inside it, as `FileTree` has those of a local one.

    The names and sizes are listed once a machine, for as long as the `stamps` do not change, and files are fetched by the
    processes that read them. Works in DataLoader workers, forked or spawned: each connects for itself.

    Args:
        url: of the folder.
        option: how errors name it.
        cache_dir: the cache folder (default: the project's).
        cache_size: GiB that the files in it may take together; None: unbounded.
        stamps: small files that say which version of the folder it is, those that are there.

    Raises:
        UserError: it holds no file, cannot be read, or has a file larger than the cache.
    """

    def __init__(
        self,
        url: str,
        option: str = "--data-dir",
        cache_dir: str | None = None,
        cache_size: float | None = None,
        stamps: Sequence[str] = ("dataset.json", "vae.json"),
    ):
        self.url, self.option = url.rstrip("/"), option
        self.path: Any = self.url  # for messages
        self._connection: tuple[int, Any, str] | None = None
        version = b"\0".join(filter(None, map(self._stamp, stamps)))
        root = Path(cache_dir).expanduser() if cache_dir else cache_folder()
        self._cache = FileCache(root, None if cache_size is None else int(cache_size * GIB))
        digest = hashlib.sha256(encode_name(self.url) + b"\0" + version).hexdigest()[:16]
        self._folder = f"{check_name(self.url.rpartition('/')[2], f'{option} {url}', plain=True)}-{digest}"
        listing = self._cache.root / f"{self._folder}.npz"
        with remote.alone(listing):
            try:
                self._read_listing(listing)
            except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):  # not there, or damaged by a power cut
                self._write_listing(listing)
                self._read_listing(listing)
        largest = int(np.argmax(self._sizes))
        if cache_size is not None and self._sizes[largest] > cache_size * GIB:
            name, size = decode_name(self._names[largest]), int(self._sizes[largest])
            raise UserError(f"--cache-size {cache_size:g}: smaller than one file: {self.where(name)} has {size / GIB:.3g} GiB")

    @override
    def names(self) -> list[str]:
        return [decode_name(name) for name in self._names]

    @override
    def read(self, name: str, limit: int = MAX_BYTES) -> bytes:
        size = self._size(name)
        try:
            check_bytes(size, limit)
        except OSError as error:
            raise DataError(f"{self.where(name)}: cannot be read: {error.strerror}") from None
        content = self._cache.read(f"{self._folder}/{name}", size)
        return self._fetch(name) if content is None else content

    @override
    def prefetch(self, names: Sequence[str]) -> None:
        missing = [name for name in names if not self._cache.has(f"{self._folder}/{name}", self._size(name))]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(FETCHES, len(missing))) as threads:
                for _ in threads.map(self._fetch, missing):
                    pass

    @override
    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name))

    @override
    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def _size(self, name: str) -> int:
        encoded = encode_name(name)
        place = int(np.searchsorted(self._names, encoded))
        if place == len(self._names) or self._names[place] != encoded:
            raise DataError(f"{self.where(name)}: no such file")
        return int(self._sizes[place])

    def _files(self) -> tuple[Any, str]:
        """The file system of this process, and the folder in it."""
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = (os.getpid(), *remote.connect(self.url, self.option))
        return self._connection[1:]

    def _stamp(self, name: str) -> bytes:
        files, root = self._files()
        try:
            return files.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            return b""
        except Exception as error:  # each protocol has its own: network, credentials …
            raise remote.unreadable(self.option, self.where(name), error) from None

    def _read_listing(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self._names, self._sizes = arrays["names"], arrays["sizes"]

    def _write_listing(self, path: Path) -> None:
        files, root = self._files()
        try:
            files.invalidate_cache()  # of listings
            found = {file: about["size"] for file, about in files.find(root, detail=True).items() if about["type"] == "file"}
            untold = [file for file, size in found.items() if size is None]  # of HTTP
            found |= dict(zip(untold, files.sizes(untold) if untold else [], strict=True))
        except FileNotFoundError:
            found = {}
        except Exception as error:
            raise remote.unreadable(self.option, self.url, error) from None
        prefix = len(root.rstrip("/")) + 1
        if unknown := next((file for file, size in found.items() if size is None), None):
            raise UserError(f"{self.option} {unknown}: its server does not say how large it is")
        sizes = {file[prefix:]: int(size) for file, size in found.items()}
        names = sorted(
            encode_name(check_name(name, f"{self.option} {self.url}")) for name in sizes if name and not name.endswith("/")
        )
        if not names:
            raise remote.NotThere(f"{self.option} {self.url}: holds no file")
        listed = [sizes[decode_name(name)] for name in names]

        def write(file: BinaryIO) -> None:
            np.savez(file, names=np.array(names), sizes=np.array(listed, dtype=np.int64))

        write_atomically(path, write, option="--cache-dir")

    def _fetch(self, name: str) -> bytes:
        """Read a file where it lies, and keep it."""
        files, root = self._files()
        try:
            content = files.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            raise DataError(f"{self.option} {self.where(name)}: missing; it was there when the folder was listed") from None
        except Exception as error:
            raise DataError(str(remote.unreadable(self.option, self.where(name), error))) from None
        if len(content) != (size := self._size(name)):
            listing = self._cache.root / f"{self._folder}.npz"
            raise DataError(
                f"{self.option} {self.where(name)}: has {len(content):,} bytes, but {size:,} when the folder was listed; "
                f"remove {listing} if it has changed"
            )
        self._cache.keep(f"{self._folder}/{name}", content)
        return content
