"""The record of a command that fills a folder or zip: what it makes, and that it is not done."""

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import WriteError, lock

UNFINISHED_FILE = "unfinished.json"  # in a folder (beside a zip) while a command fills it


class Unfinished:
    """The record of what is being made in a place: the file `path`, locked by the process that makes it, until that is done.

    `continued`: there was one before, so that what lies aside is the work of a stopped run.
    """

    def __init__(self, path: Path, making: dict[str, Any], dest: Path, *, is_begun: bool):
        """Lock and write the record. `UserError` if another run has it, or if what `is_begun` in `dest` is something else."""
        self.path, self.continued = path, path.exists()
        try:
            self._file = lock(path)
        except OSError as error:
            raise WriteError(dest, error, "--dest") from None
        if self._file is None:
            raise UserError(f"--dest {dest}: another run is writing there (it holds {path.name}); wait for its end")
        self._file.seek(0)
        try:
            before = json.loads(self._file.read(2**20))
        except (ValueError, RecursionError):  # new, or killed before anything was made
            before = None
        before = before if isinstance(before, dict) else {}
        for key, value in making.items() if is_begun else ():
            if key in before and before[key] != value:
                self.release(remove=False)
                raise UserError(
                    f"--dest {dest}: holds a stopped run of another {key} ({before[key]}, not {value}); give a new name"
                )
        if before != making:
            try:
                os.truncate(self._file.fileno(), 0)
                content = json.dumps(making, indent=2).encode()
                if os.write(self._file.fileno(), content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self.release(remove=not is_begun)
                raise WriteError(dest, error, "--dest") from None

    def check_aside(self, paths: Iterable[Path], dest: Path) -> None:
        """Raise UserError if one of `paths`, which a stopped run would leave and which this one fills, is not of such a run."""
        for path in paths:
            if path.is_symlink() or (path.exists() and not self.continued):
                self.release(remove=not self.continued)
                raise UserError(f"--dest {dest}: {path} is there, and is no part of this run; move it away, or give a new name")

    def release(self, *, remove: bool) -> None:
        """Give up the lock; `remove`: the work is done, or has not begun."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._file.close()
