"""Images to VAE latents, on any number of processes, and loose latents to packed ones.

The VAE sees fixed blocks of images by index, so that its latents are the same bits whatever the number of processes, and after
any stop.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
from config import EncodeConfig, PackConfig
from data_tools.dest import UNFINISHED_FILE, Folder, FolderDest, ZipDest, label_file, npy_array, npy_bytes, remove_files
from data_tools.source import image_numbers, list_images, open_source, prefetch
from errors import UserError
from files import DataError, FileTree, Unfinished, make_folder
from packed import INDEX_FILE, LABELS_FILE, NAMES_FILE, ShardWriter, shard_file, sum_file, write_index
from vae import VAERecord, encode_moments, load_vae

if TYPE_CHECKING:
    from accelerate import PartialState

PACK_BLOCK = 256  # latents between two marks of progress


def encode(config: EncodeConfig) -> None:
    """Images → `00000/img-mean-std-00000000.npy` … (or packed files): (2C, h, w), mean and std of the VAE's posterior."""
    source = open_source(config.source, config.dest)
    names, labels = list_images(source, config.max_images)
    targets = [f"{i // 1000:05d}/img-mean-std-{i:08d}.npy" for i in image_numbers(names)]
    first = data.read_image(source, names[0]).shape  # (H, W, 3)
    making = {"command": "encode", "source": str(source.path.resolve()), "vae": config.vae, "dtype": config.dtype}
    state = _processes()
    with open_dest(Path(config.dest), making, targets, config.shard_size if config.packed else None, state) as dest:
        torch.backends.cudnn.allow_tf32 = False  # the latents are promised in float32
        vae, record = load_vae(config.vae, state.device)
        factor = record.downsample_factor
        if first[0] % factor or first[1] % factor:
            raise UserError(
                f"{source.where(names[0])}: has {first[1]}x{first[0]} pixels, not divisible by the VAE's factor {factor}"
            )
        shape = (2 * record.latent_channels, first[0] // factor, first[1] // factor)
        plan = Plan(targets, labels, record, shape, np.dtype(config.dtype), config.batch_size)

        def read(block: range) -> np.ndarray:
            images = [data.read_image(source, names[i]) for i in block]
            for i, image in zip(block, images, strict=True):
                if image.shape != first:
                    raise DataError(
                        f"{source.where(names[i])}: has {image.shape[1]}x{image.shape[0]} pixels, but {names[0]} {first[1]}x{first[0]}; "
                        "`dataset_tools.py convert` makes them one size"
                    )
            return np.stack(images)

        def moments(images: np.ndarray) -> np.ndarray:
            return encode_moments(vae, torch.from_numpy(images).permute(0, 3, 1, 2)).cpu().numpy()  # (B, 2C, h, w)

        fill(dest, plan, state, read, moments, config.workers, "encode")
        state.wait_for_everyone()
        if state.is_main_process:
            dest.finish(plan)
            print(f"{config.dest}: {len(names)} latents of {'x'.join(map(str, shape))} by {record.vae}")
    state.wait_for_everyone()
    state.destroy_process_group()


def pack(config: PackConfig) -> None:
    """`vae-sd/` or `vae-sd.zip` → a few large files that training maps (packed.py), in the same order."""
    source, dest_path = Path(config.source), Path(config.dest)
    latents = data.LatentFiles(source)
    if source.resolve() in (dest_path.resolve(), *dest_path.resolve().parents):
        raise UserError(f"--dest {config.dest}: lies inside --source {config.source}")
    dtype = latents.dtype if config.dtype == "same" else np.dtype(config.dtype)
    making = {"command": "pack", "source": str(source.resolve()), "dtype": str(dtype)}
    names = [latents.name(i) for i in range(len(latents))]
    labels = None if latents.labels is None else latents.labels.tolist()
    plan = Plan(names, labels, latents.record, latents.shape, dtype, PACK_BLOCK)

    def read(block: range) -> np.ndarray:
        arrays = [latents.array(i, latents.shape) for i in block]
        for i, array in zip(block, arrays, strict=True):
            if config.dtype == "same" and array.dtype != dtype:
                raise DataError(f"{latents.where(i)}: holds {array.dtype}, but {latents.where(0)} {dtype}; give --dtype")
        return np.stack(arrays)

    state = Alone()
    with open_dest(dest_path, making, names, config.shard_size, state) as dest:
        fill(dest, plan, state, read, lambda moments: moments, config.workers, "pack")
        dest.finish(plan)
    print(f"{config.dest}: {len(names)} latents of {'x'.join(map(str, latents.shape))}, {dtype}")


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
        pass


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


# ---------------------------------------------------------------------------------------------------------- destinations


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
        self.files = files

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
        for i, values in zip(block, moments, strict=True):
            if self.files.existing(plan.targets[i]) != plan.shape:
                self.files.write(plan.targets[i], npy_bytes(values))

    def finish(self, plan: Plan) -> None:
        """Write vae.json and dataset.json: from here on the set is whole."""
        self.files.write(data.VAE_FILE, json.dumps(plan.record.to_dict(), indent=2).encode())
        labels = None if plan.labels is None else dict(zip(plan.targets, plan.labels, strict=True))
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
        own = {UNFINISHED_FILE, INDEX_FILE, LABELS_FILE, NAMES_FILE}
        for number in range(len(self.counts)):
            own |= {shard_file(number), sum_file(path, number).name}
        if foreign := {name for name in present if not name.endswith(".tmp")} - own:
            raise UserError(
                f"--dest {path}: not empty, it holds {min(foreign)}, which is no part of this run; give a new folder"
            )
        make_folder(path)
        self._record = Unfinished(path / UNFINISHED_FILE, making, path, is_begun=bool(present - {UNFINISHED_FILE}))
        shards = {shard_file(number) + ".tmp" for number in range(len(self.counts))}  # are continued
        remove_files(path, (name for name in present - shards if name.endswith(".tmp")))

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


def _processes() -> "PartialState":
    """This process among those of torchrun or accelerate launch."""
    from accelerate import PartialState

    # They meet again at the end alone, and that of the slowest may be hours after that of the quickest.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    if int(os.environ.get("WORLD_SIZE", 1)) != state.num_processes:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {state.num_processes} process(es) run; start with torchrun"
        )
    return state
