"""What the data tools read: the images of a folder tree or zip, in order, with their labels."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from common import image_files
from common.errors import UserError
from common.file_tree import FileTree
from data import latent_files
from preprocessing.unfinished import UNFINISHED_FILE

T = TypeVar("T")


R = TypeVar("R")


def open_source(source: str, dest: str) -> FileTree:
    """The source's files; `UserError` if there is no such source, or if the destination would lie inside it."""
    if not Path(source).exists():
        raise UserError(f"--source {source}: no such folder or zip file")
    files = FileTree(source)
    here, there = Path(source).resolve(), Path(dest).resolve()
    if here == there or (here.is_dir() and here in there.parents):
        raise UserError(f"--dest {dest}: lies inside --source {source}; its files would be taken for the source's")
    return files


def list_images(source: FileTree, max_images: int | None) -> tuple[list[str], list[int] | None]:
    """The names of the first `max_images` images of a source, sorted, and their labels (None: unlabelled).

    Labels come from dataset.json; only where there is none, from the sorted names of at least two top-level folders.
    """
    files = source.names()
    names = image_files.image_names(files)
    if not names:
        raise UserError(f"--source {source.path}: holds no image files")
    others = set(files) - set(names)
    if UNFINISHED_FILE in others:
        raise UserError(f"--source {source.path}: the command that makes it was stopped; continue it first")
    chosen = names[:max_images]
    if latent_files.LABEL_FILE in others:
        of_name = latent_files.read_labels(source)
        if of_name is None:
            return chosen, None
        for name in chosen:
            if name not in of_name:
                raise UserError(f"{source.where(latent_files.LABEL_FILE)}: has no label for {name}")
        if unknown := of_name.keys() - set(files):
            raise UserError(f"{source.where(latent_files.LABEL_FILE)}: labels {min(unknown)}, but there is no such file")
        return chosen, [of_name[name] for name in chosen]
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    if len(folders) < 2:
        return chosen, None
    classes = {folder: label for label, folder in enumerate(folders)}
    for name in names:
        if "/" not in name:
            raise UserError(
                f"{source.where(name)}: lies beside the class folders {folders[0]}, {folders[1]} …, so it has no label"
            )
    return chosen, [classes[name.partition("/")[0]] for name in chosen]


def image_numbers(names: list[str]) -> list[int]:
    """The number of each image: that in its name for a converted set, which may have gaps, else its place."""
    matches = [re.fullmatch(r"(\d{5})/img(\d{8})\.png", name) for name in names]
    if all(m and int(m[1]) == int(m[2]) // 1000 for m in matches):
        return [int(m[2]) for m in matches if m]
    return list(range(len(names)))


def prefetch(threads: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`map(function, items)` in order, computed by `threads` up to `ahead` items early."""
    pending: deque = deque()
    try:
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
