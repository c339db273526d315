"""Where latents are written: one npy file each, or packed; filled in blocks by any number of processes."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.file_tree import FileTree
from common.files import make_folder
from common.tensor_files import npy_array, npy_bytes
from data import latent_files
from data.captions import PACKED_FILES
from data.packed import INDEX_FILE, LABELS_FILE, NAMES_FILE, shard_file
from models.vae import VAERecord
from preprocessing.output import Folder, FolderDest, ZipDest, label_file, remove_asides
from preprocessing.packed_writer import ShardWriter, shard_aside, sum_file, write_index
from preprocessing.source import prefetch
from preprocessing.unfinished import UNFINISHED_FILE, Unfinished

if TYPE_CHECKING:
    from accelerate import PartialState


class Plan(NamedTuple):
    """What shall be there in the end: latent i of `shape` and `dtype` under the name targets[i], made in blocks of `block`."""

    targets: list[str]
    labels: list[int] | None
    record: VAERecord
    shape: tuple[int, ...]
    dtype: np.dtype
    block: int

    def blocks(self, first: int, last: int) -> list[range]:
        """The indices first … last − 1 in blocks."""
        return [range(start, min(start + self.block, last)) for start in range(first, last, self.block)]


class Alone:
    """The part of accelerate's `PartialState` that is used here, for one process."""

    process_index, num_processes, is_main_process = 0, 1, True

    def wait_for_everyone(self) -> None:
        """There is nobody else."""


def fill(
    dest: "FileLatentsDest | PackedDest",
    plan: Plan,
    state: "PartialState | Alone",
    read: Callable[[range], np.ndarray],
    moments: Callable[[np.ndarray], np.ndarray],
    workers: int,
    name: str,
) -> None:
    """Make this process's share of the blocks: read by `workers` threads in advance, computed, written by another thread."""
    total, ranks = len(plan.targets), state.num_processes
    share = dest.share(plan, state.process_index, ranks)
    bar = tqdm(total=total, desc=name, unit="image", disable=not state.is_main_process)
    with bar, ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as writer:
        writing: Future | None = None
        for (there, block), content in prefetch(readers, lambda part: (part, read(part[1])), share, ahead=workers):
            with np.errstate(over="ignore"):  # it is refused below
                values = moments(content).astype(plan.dtype)
            if not np.isfinite(values).all():
                raise UserError(
                    f"{plan.targets[block[0]]} and the next {len(block) - 1}: the latents are not all finite in {plan.dtype}",
                    local=True,
                )
            if writing is not None:
                writing.result()
            writing = writer.submit(dest.write, plan, block, values)
            bar.update(min((there + len(block)) * ranks, total - bar.n))
        if writing is not None:
            writing.result()
        bar.update(total - bar.n)


def open_dest(
    path: Path, making: dict[str, Any], targets: list[str], shard_size: int | None, state: "PartialState | Alone"
) -> "FileLatentsDest | PackedDest":
    """The destination; rank 0 makes it first, and refuses it if it holds anything but a stopped run of the same."""
    if path.suffix.lower() == ".zip":
        if shard_size:
            raise UserError(f"--dest {path}: packed latents are a folder, not a zip")
        if state.num_processes > 1:
            raise UserError(f"--dest {path}: several processes cannot write one zip; give a folder, or --packed")
        return FileLatentsDest(ZipDest(path, making, targets, npy_array))
    if shard_size:
        dest = PackedDest(path, len(targets), shard_size)
        if state.is_main_process:
            dest.begin(making)
    elif state.is_main_process:
        dest = FileLatentsDest(FolderDest(path, making, targets, npy_array))
    else:
        dest = FileLatentsDest(Folder(path, npy_array))
    state.wait_for_everyone()
    return dest


class FileLatentsDest:
    """One npy file for each latent, in a folder or zip."""

    def __init__(self, files: Folder | FolderDest | ZipDest):
        self.files = files  # a `Folder` where another process has the destination

    def __enter__(self) -> "FileLatentsDest":
        return self

    def __exit__(self, *error: Any) -> None:
        if isinstance(self.files, FolderDest | ZipDest):
            self.files.__exit__(*error)

    def share(self, plan: Plan, rank: int, ranks: int) -> Iterator[tuple[int, range]]:
        """Each block of one process of which something is missing, and how many latents were passed over before it."""
        there = 0
        for block in plan.blocks(0, len(plan.targets))[rank::ranks]:
            if all(self.files.existing(plan.targets[i]) == plan.shape for i in block):
                there += len(block)
            else:
                yield there, block
                there = 0

    def write(self, plan: Plan, block: range, moments: np.ndarray) -> None:
        """Write the latents `moments` (n, 2C, h, w) of a block."""
        for i, values in zip(block, moments, strict=True):
            if self.files.existing(plan.targets[i]) != plan.shape:
                self.files.write(plan.targets[i], npy_bytes(values))

    def finish(self, plan: Plan) -> None:
        """Write vae.json and dataset.json: from here on the set is whole."""
        self.files.write(latent_files.VAE_FILE, json.dumps(plan.record.to_dict(), indent=2).encode())
        labels = None if plan.labels is None else dict(zip(plan.targets, plan.labels, strict=True))
        if isinstance(self.files, FolderDest | ZipDest):
            self.files.finish(label_file(plan.targets, labels))


class PackedDest:
    """Packed files of `shard_size` latents each; a file belongs to one process."""

    def __init__(self, path: Path, total: int, shard_size: int):
        self.path, self.shard_size = path, shard_size
        self.counts = [min(shard_size, total - start) for start in range(0, total, shard_size)]
        self._writers: dict[int, ShardWriter] = {}
        self._record: Unfinished | None = None

    def begin(self, making: dict[str, Any]) -> None:
        """Make the folder, and lock it for this run."""
        path, making = self.path, making | {"shard_size": self.shard_size}
        if path.exists() and not path.is_dir():
            raise UserError(f"--dest {path}: is a file; wanted: a new folder")
        present = set(FileTree(path).names()) if path.exists() else set()
        if INDEX_FILE in present and UNFINISHED_FILE not in present:
            raise UserError(f"--dest {path}: holds finished packed latents; give a new folder, or remove that one")
        own = {UNFINISHED_FILE, INDEX_FILE, LABELS_FILE, NAMES_FILE, *PACKED_FILES}
        for number in range(len(self.counts)):
            own |= {shard_file(number), sum_file(path, number).name}
        if foreign := {name for name in present if not name.endswith(".tmp")} - own:
            raise UserError(
                f"--dest {path}: not empty, it holds {min(foreign)}, which is no part of this run; give a new folder"
            )
        make_folder(path)
        self._record = Unfinished(path / UNFINISHED_FILE, making, path, is_begun=bool(present - {UNFINISHED_FILE}))
        self._record.check_aside((shard_aside(path, number) for number in range(len(self.counts))), path)  # are continued
        remove_asides(path, own - {shard_file(number) for number in range(len(self.counts))})

    def __enter__(self) -> "PackedDest":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._record is not None:
            is_empty = kind is not None and {p.name for p in self.path.iterdir()} == {UNFINISHED_FILE}
            self._record.release(remove=kind is None or is_empty)
            if is_empty:
                self.path.rmdir()

    def share(self, plan: Plan, rank: int, ranks: int) -> Iterator[tuple[int, range]]:
        """Each block of one process's files that is missing, and how many latents were passed over before it."""
        if (self.path / INDEX_FILE).exists():  # killed while tidying up
            return
        there = 0
        for number in range(len(self.counts))[rank::ranks]:
            first, count = number * self.shard_size, self.counts[number]
            writer = ShardWriter(self.path, number, count, plan.shape, plan.dtype, plan.block)
            self._writers[number] = writer
            there += writer.done
            for block in plan.blocks(first + writer.done, first + count):
                yield there, block
                there = 0

    def write(self, plan: Plan, block: range, moments: np.ndarray) -> None:
        """Write the latents `moments` (n, 2C, h, w) of a block, which is the next of its file."""
        number = block[0] // self.shard_size
        self._writers[number].append(moments)
        if self._writers[number].done == self.counts[number]:
            del self._writers[number]

    def finish(self, plan: Plan) -> None:
        """Write labels, names and the index: from here on the set is whole."""
        if not (self.path / INDEX_FILE).exists():
            for number in range(len(self.counts)):
                if not sum_file(self.path, number).exists():
                    raise UserError(
                        f"--dest {self.path}: {shard_file(number)} is missing: another process failed; run it again"
                    )
            write_index(self.path, plan.targets, plan.labels, plan.record, self.counts)
        for number in range(len(self.counts)):
            sum_file(self.path, number).unlink(missing_ok=True)
