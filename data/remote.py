"""Remote data behind any URL that fsspec reads (`s3://`, `hf://`, …): packed latents and packed text features, copied to a local cache once a machine.

What is not packed is read file by file (`data.remote_tree`).

S3's endpoint and credentials come from its usual environment variables and files (AWS_ENDPOINT_URL, AWS_PROFILE, …).
"""

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import (
    cache_folder,
    encode_name,
    file_sha256,
    join_inside,
    lock,
    remove_leftovers,
    write_atomically,
    written_aside,
)
from data.captions import RECORD_FILE, packed_checksums
from data.packed import INDEX_FILE, checksums, parse_index

DOWNLOADS = 4  # files at once


class NotThere(UserError):
    """A remote folder without what is looked for."""


def is_remote(path: str | Path) -> bool:
    """Is it a URL, such as `s3://bucket/folder`?"""
    return "://" in str(path)


def connect(url: str, option: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises UserError."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except Exception as error:  # each protocol has its own: unknown protocol, credentials …
        raise unreadable(option, url, error) from None


def unreadable(option: str, where: str, error: Exception) -> UserError:
    """One line for what fsspec or a protocol's library raised."""
    return UserError(f"{option} {where}: cannot be read ({type(error).__name__}: {first_line(error)})")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Among the processes of the machine, the one that makes the file `path`; the others wait."""
    lock_file = path.with_name(f"{path.name}.lock")
    while (locked := lock(lock_file)) is None:  # a blocking one would be taken for a deadlock of two processes
        time.sleep(0.1)
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)
        locked.close()


def local_copy(url: str, cache_dir: str | None = None, option: str = "--data-dir") -> Path:
    """The local folder that holds a whole copy of the packed latents at `url` (the folder itself, or the one that holds packed/).

    `option`: how errors name the URL. `UserError` if it cannot be read, or is not what the index says.
    """
    return _local_copy(_Source(url, option), cache_dir, lambda index, where: checksums(parse_index(index, where)))


def local_text(url: str, cache_dir: str | None = None, option: str = "--data-dir") -> Path:
    """The same of the packed text features at `url`, whose index is text.json."""
    return _local_copy(_Source(url, option, RECORD_FILE), cache_dir, packed_checksums)


def _local_copy(source: "_Source", cache_dir: str | None, files_of: Callable[[bytes, str], dict[str, str]]) -> Path:
    """The local copy of the files, with SHA-256, that `files_of` finds in the index that `source` has.

    Each file is written aside, compared with the index's checksum and renamed. Processes of one machine share the work: one
    copies a file, the others wait for it.
    """
    url, option, index = source.url, source.option, source.read(source.index_file)
    files = list(files_of(index, f"{option} {url}/{source.index_file}").items())  # before anything is written
    name = f"{url.rpartition('/')[2]}-{hashlib.sha256(encode_name(url) + index).hexdigest()[:16]}"
    cache = Path(cache_dir).expanduser() if cache_dir else cache_folder()
    folder = join_inside(cache, name, f"{option} {url}", plain=True)  # other content at the same URL is another folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / source.index_file, index)
        # The processes begin at different files, so that they rarely wait for each other.
        first = int(os.environ.get("LOCAL_RANK", 0)) * len(files) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        files = files[first:] + files[:first]
        missing = [(file, digest) for file, digest in files if not (folder / file).exists()]
        quiet = not missing or os.environ.get("LOCAL_RANK", "0") != "0"
        with ThreadPoolExecutor(DOWNLOADS) as threads, tqdm(total=len(missing), desc=url, unit="file", disable=quiet) as bar:
            for _ in threads.map(lambda item: source.copy(item[0], item[1], folder), missing):
                bar.update()
    except OSError as error:
        raise UserError(f"--cache-dir {cache}: cannot be written: {error.strerror or error}") from None
    return folder


def read(url: str, file: str) -> bytes:
    """One file of the remote folder `url`. FileNotFoundError if it is not there."""
    source = _Source(url)
    try:
        return source.files.cat_file(f"{source.given}/{file}")
    except FileNotFoundError:
        raise
    except Exception as error:
        raise unreadable(source.option, f"{source.url}/{file}", error) from None


class _Source:
    """A remote folder of packed files, whose index is `index_file`."""

    def __init__(self, url: str, option: str = "--data-dir", index_file: str = INDEX_FILE):
        self.url, self.option, self.index_file = url.rstrip("/"), option, index_file
        self.files, self.given = connect(self.url, option)
        inside = f"{self.given}/packed"
        try:
            self._path = inside if self.files.exists(f"{inside}/{index_file}") else self.given
        except Exception as error:  # each protocol has its own: network, credentials …
            raise unreadable(option, self.url, error) from None

    def read(self, file: str) -> bytes:
        """One file of the folder. Raises UserError."""
        try:
            return self.files.cat_file(f"{self._path}/{file}")
        except FileNotFoundError:
            raise NotThere(
                f"{self.option} {self.url}: holds no {file}; remote text features must be packed (`dataset_tools.py text --packed`)"
            ) from None
        except Exception as error:
            raise unreadable(self.option, self.url, error) from None

    def copy(self, file: str, digest: str, folder: Path) -> None:
        """Copy one file into `folder`, unless another process has done so meanwhile."""
        path = join_inside(folder, file, f"{self.option} {self.url}/{self.index_file}", plain=True)
        with alone(path):
            if path.exists():
                return
            remove_leftovers(folder, file.__eq__)
            with written_aside(path) as aside:
                try:
                    self.files.get_file(f"{self._path}/{file}", str(aside))
                except Exception as error:
                    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                        raise  # it is the cache
                    raise unreadable(self.option, f"{self.url}/{file}", error) from None
                if file_sha256(aside) != digest:
                    raise UserError(f"{self.option} {self.url}/{file}: damaged: its SHA-256 is not what {self.index_file} says")
