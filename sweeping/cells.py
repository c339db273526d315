"""Cells: one point of a sweep, named by the hash of all that decides its figures, and their files."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import Busy, FolderLock, parse_json, remove_leftovers, write_json
from config.options import GenerateConfig

Warn = Callable[[str], None]
Record = dict[str, Any]  # the content of a cell's file

KEYS = {"name", "ckpt", "ref", "options", "figures", "gflops_per_image", "ms_per_image", "num_samples", "versions"}


@dataclass(frozen=True)
class Cell:
    """One point of a sweep.

    Attributes:
        config: all options of sampling, with the architecture filled in.
        ref: the reference.
        count: images.
        options: everything that decides the figures.
        gflops: of the transformer for one image, guidance included, without a core cache.
    """

    config: GenerateConfig
    ref: str
    count: int
    options: dict[str, Any]
    gflops: float

    @cached_property
    def key(self) -> str:
        """The hash of `options`, which names the file."""
        return key_of(self.options)


def key_of(options: dict[str, Any]) -> str:
    """24 hexadecimal digits of the SHA-256 of options."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:24]


class Store:
    """The folder of cells: `cells/HASH.json`, each written at once or not at all, and a lock for each that is being done."""

    def __init__(self, dest: str | Path, warn: Warn):
        self.folder = Path(dest) / "cells"
        self._warn = warn
        self._damaged: set[Path] = set()
        self._said_no_locks = False

    def path(self, key: str) -> Path:
        """The file of a cell."""
        return self.folder / f"{key}.json"

    def read(self, key: str) -> Record | None:
        """What the file of a cell holds; None where it does not exist or is damaged, which is said once."""
        path = self.path(key)
        try:
            record = parse_json(path.read_bytes(), path)
        except FileNotFoundError:
            return None
        except (OSError, UserError):
            record = None
        if (
            not isinstance(record, dict)
            or not record.keys() >= KEYS
            or not _is_whole(record)
            or key_of(record["options"]) != key
        ):
            if path not in self._damaged:
                self._warn(f"{path}: damaged; the cell is done again")
                self._damaged.add(path)
            return None
        return record | {"key": key}

    def read_all(self) -> list[Record]:
        """Every whole cell of the folder."""
        records = (self.read(path.stem) for path in sorted(self.folder.glob("*.json")))
        return [record for record in records if record is not None]

    def write(self, key: str, record: Record) -> None:
        """Write the file of a cell."""
        write_json(record, self.path(key), option="--dest")

    def lock(self, key: str) -> FolderLock | None:
        """Keep other jobs from doing a cell; None where one of them is doing it."""
        try:
            lock = FolderLock(self.folder / f"{key}.lock", self.folder, self._warn_once)
        except Busy:
            return None
        except OSError as error:
            raise UserError(f"--dest {self.folder.parent}: cannot be used: {error.strerror}") from None
        remove_leftovers(self.folder, lambda name: name == f"{key}.json")
        return lock

    def _warn_once(self, message: str) -> None:
        """A file system without locks has none for any cell."""
        if not self._said_no_locks:
            self._warn(message)
        self._said_no_locks = True


def _is_whole(record: Record) -> bool:
    """Are the parts that tables and plots use of their types?"""
    numbers = (
        (*record["figures"].values(), record["gflops_per_image"], record["ms_per_image"]) if _has_figures(record) else (None,)
    )
    return isinstance(record["options"], dict) and all(type(number) in (int, float) for number in numbers)


def _has_figures(record: Record) -> bool:
    return isinstance(record["figures"], dict) and bool(record["figures"])
