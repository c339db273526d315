"""Small files from elsewhere, kept on this machine: shared by its processes, and bounded."""

import contextlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import first_line
from common.file_tree import read_regular
from common.files import DataError

FOLDER = "files"  # in the cache folder
LEDGER, PARTIAL = "ledger.sqlite", "partial"
STALE = 600  # seconds after which what a killed process left in `partial/` is removed; a file takes a few


class FileCache:
    """Files by name in a folder.

    A file under its own name is complete: it is written in `partial/` and renamed. A ledger, a SQLite database that the processes of
    the machine share, lists the files in the order in which they came, with their sizes; where these are more than `limit` bytes
    together, the oldest files go.

    Args:
        cache_dir: the cache folder; the files lie in its `files/`.
        limit: bytes of all files; None: unbounded.

    Raises:
        UserError: the folder cannot be used.
    """

    def __init__(self, cache_dir: Path, limit: int | None = None):
        self.cache_dir, self.root, self.limit = cache_dir, cache_dir / FOLDER, limit
        with self._usable(at_start=True):
            (self.root / PARTIAL).mkdir(parents=True, exist_ok=True)
            with os.scandir(self.root / PARTIAL) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # its process has renamed it, or another one removed it
                        if entry.stat().st_mtime < time.time() - STALE:
                            Path(entry.path).unlink()
            with self._ledger() as ledger:
                if not ledger.execute("SELECT * FROM sqlite_master WHERE name = 'total'").fetchone():
                    ledger.execute("CREATE TABLE files (place INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, size)")
                    ledger.execute("CREATE TABLE total (bytes)")
                    files = self._existing()
                    ledger.executemany("INSERT INTO files (name, size) VALUES (?, ?)", files)
                    ledger.execute("INSERT INTO total VALUES (?)", (sum(size for _, size in files),))
                self._evict(ledger)

    def read(self, name: str, size: int) -> bytes | None:
        """The content of a file; None where it is not here, or has not `size` bytes."""
        try:
            content = read_regular(self.root / name)
        except OSError:
            return None
        return content if len(content) == size else None

    def has(self, name: str, size: int) -> bool:
        """Whether a file is here, with `size` bytes."""
        try:
            return (self.root / name).stat().st_size == size
        except OSError:
            return False

    def keep(self, name: str, content: bytes) -> None:
        """Write a file. What other processes do with the same one meanwhile does no harm. Raises UserError."""
        with self._usable():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=self.root / PARTIAL, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                Path(aside).chmod(0o644)  # which mkstemp leaves to its owner alone
                # What a killed process has entered and not renamed is fetched again.
                with self._ledger() as ledger:
                    before = ledger.execute("SELECT size FROM files WHERE name = ?", (name,)).fetchone()
                    ledger.execute("INSERT OR REPLACE INTO files (name, size) VALUES (?, ?)", (name, len(content)))
                    ledger.execute("UPDATE total SET bytes = bytes + ?", (len(content) - (before[0] if before else 0),))
                    evicted = self._evict(ledger)
                if name in evicted:  # larger than the cache
                    Path(aside).unlink()
                else:
                    Path(aside).replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(aside).unlink()
                raise

    def _evict(self, ledger: sqlite3.Connection) -> list[str]:
        """Remove the oldest files, and take them out of the ledger, until the others fit; returns their names.

        A process that is killed meanwhile leaves them in the ledger, and not files that it does not list.
        """
        evicted: list[str] = []
        ((total,),) = ledger.execute("SELECT bytes FROM total")
        while self.limit is not None and total > self.limit:
            oldest = ledger.execute("SELECT place, name, size FROM files ORDER BY place LIMIT 1").fetchone()
            if oldest is None:
                total = 0
                break
            place, name, size = oldest
            ledger.execute("DELETE FROM files WHERE place = ?", (place,))
            (self.root / name).unlink(missing_ok=True)
            total -= size
            evicted.append(name)
        ledger.execute("UPDATE total SET bytes = ?", (total,))
        return evicted

    def _existing(self) -> list[tuple[str, int]]:
        """Names and sizes of the files that lie here without a ledger, the oldest first."""
        folders = [folder for folder in self.root.iterdir() if folder.is_dir() and folder.name != PARTIAL]
        found = [(path, path.stat()) for folder in folders for path in folder.rglob("*") if path.is_file()]
        found.sort(key=lambda item: item[1].st_mtime)
        return [(path.relative_to(self.root).as_posix(), stat.st_size) for path, stat in found]

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[sqlite3.Connection]:
        """The ledger in a transaction, which other processes wait for. A connection lasts no longer: none crosses a fork."""
        with contextlib.closing(sqlite3.connect(self.root / LEDGER, timeout=60, isolation_level=None)) as ledger:
            ledger.execute("PRAGMA synchronous = OFF")  # after a power cut, files are fetched again
            ledger.execute("BEGIN IMMEDIATE")
            yield ledger
            ledger.execute("COMMIT")

    @contextlib.contextmanager
    def _usable(self, at_start: bool = False) -> Iterator[None]:
        """Errors as one line, which at the start all processes meet alike."""
        try:
            yield
        except sqlite3.Error as error:
            reason = f"{first_line(error)}; remove it, and the files are fetched again"
            raise DataError(f"--cache-dir {self.cache_dir}: {self.root / LEDGER}: {reason}", local=not at_start) from None
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise DataError(f"--cache-dir {self.cache_dir}: cannot be written: {reason}", local=not at_start) from None
