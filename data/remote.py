"""Remote data: packed latents behind any URL that fsspec reads (`s3://`, `hf://`, …), copied to a local cache once a machine.

S3's endpoint and credentials come from its usual environment variables and files (AWS_ENDPOINT_URL, AWS_PROFILE, …).
"""

import errno
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.files import file_sha256, join_inside, lock
from data.packed import INDEX_FILE, checksums, parse_index

DEFAULT_CACHE = "~/.cache/elastic-dit"


DOWNLOADS = 4  # files at once


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def local_copy(url: str, cache_dir: str | None = None) -> Path:
    """The local folder that holds a whole copy of the packed latents at `url` (the folder itself, or the one that holds packed/).

    Each file is written aside, compared with the index's checksum and renamed. Processes of one machine share the work: one
    copies a file, the others wait for it. `UserError` if it cannot be read, or is not what the index says.
    """
    source = _Source(url)
    index = source.read(INDEX_FILE)
    files = list(checksums(parse_index(index, f"--data-dir {source.url}/{INDEX_FILE}")).items())  # before anything is written
    name = f"{url.rstrip('/').rpartition('/')[2]}-{hashlib.sha256(url.encode() + index).hexdigest()[:16]}"
    cache = Path(cache_dir or DEFAULT_CACHE).expanduser()
    folder = join_inside(cache, name, f"--data-dir {url}", plain=True)  # other content at the same URL is another folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{INDEX_FILE}.{os.getpid()}.tmp"
        aside.write_bytes(index)
        aside.replace(folder / INDEX_FILE)
        # The processes begin at different files, so that they rarely wait for each other.
        first = int(os.environ.get("LOCAL_RANK", 0)) * len(files) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        files = files[first:] + files[:first]
        missing = [(file, digest) for file, digest in files if not (folder / file).exists()]
        quiet = not missing or os.environ.get("LOCAL_RANK", "0") != "0"
        with ThreadPoolExecutor(DOWNLOADS) as threads, tqdm(total=len(missing), desc=url, unit="file", disable=quiet) as bar:
            for _ in threads.map(lambda item: source.copy(*item, folder), missing):
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
        raise source.unreadable(error, file) from None


class _Source:
    """A remote folder of packed latents."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.files, self.given = fsspec.core.url_to_fs(self.url)
            inside = f"{self.given}/packed"
            self._path = inside if self.files.exists(f"{inside}/{INDEX_FILE}") else self.given
        except Exception as error:  # each protocol has its own: network, credentials, unknown protocol …
            raise self.unreadable(error) from None

    def read(self, file: str) -> bytes:
        try:
            return self.files.cat_file(f"{self._path}/{file}")
        except FileNotFoundError:
            raise UserError(
                f"--data-dir {self.url}: holds no {file}; remote data must be packed (`dataset_tools.py pack`)"
            ) from None
        except Exception as error:
            raise self.unreadable(error) from None

    def copy(self, file: str, digest: str, folder: Path) -> None:
        """Copy one file into `folder`, unless another process has done so meanwhile."""
        path = join_inside(folder, file, f"--data-dir {self.url}/{INDEX_FILE}", plain=True)
        locked, aside = path.with_name(f"{file}.lock"), path.with_name(f"{file}.tmp")
        while (held := lock(locked)) is None:  # a blocking one would be taken for a deadlock of two processes
            time.sleep(0.1)
        try:
            if path.exists():
                return
            try:
                self.files.get_file(f"{self._path}/{file}", str(aside))
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise  # it is the cache
                raise self.unreadable(error, file) from None
            if file_sha256(aside) != digest:
                aside.unlink()
                raise UserError(f"--data-dir {self.url}/{file}: damaged: its SHA-256 is not what {INDEX_FILE} says")
            aside.replace(path)
        finally:
            locked.unlink(missing_ok=True)
            held.close()

    def unreadable(self, error: Any, file: str = "") -> UserError:
        reason = (str(error).strip().splitlines() or [""])[0]
        return UserError(f"--data-dir {self.url}{file and '/' + file}: cannot be read ({type(error).__name__}: {reason})")
