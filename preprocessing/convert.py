"""Images to numbered square PNGs, by many processes, and the quick start's canvases."""

import multiprocessing
from collections.abc import Generator
from contextlib import ExitStack, closing
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import image_files
from common.distributed import cpu_count, data_workers, end_with_parent
from common.errors import UserError, first_line
from common.file_tree import FileTree
from common.files import DataError, encode_name
from common.image_files import png_bytes, png_pixels
from common.sizes import format_sides
from config.tool_options import ConvertConfig
from preprocessing.output import SKIPPED_FILE, Folder, ZipDest, create, label_file
from preprocessing.source import list_images, open_source
from preprocessing.transforms import Transform, make_transform, parse_resolution

GROUP = 8  # images that a worker takes up and hands over together


def convert(config: ConvertConfig) -> None:
    """Any images → `00000/img00000000.png` …: RGB PNGs of one size, square but for resize-crop, numbered by their place in the sorted source."""
    transform = make_transform(config.transform, parse_resolution(config.resolution))
    source = open_source(config.source, config.dest)
    names, labels = list_images(source, config.max_images)
    targets = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(names))]
    any_shape = config.transform == "resize-crop"
    size = first_size(source, names, transform, strict=config.strict, any_shape=any_shape)
    if size is None:
        raise UserError(
            f"--source {config.source}: no image can be read, or none is large enough for {config.transform} at {config.resolution}"
        )
    making = {
        "command": "convert",
        "source": str(source.path.resolve()),
        "transform": config.transform,
        "resolution": config.resolution,
    }
    written: list[str] = []
    skipped: list[str] = []
    with create(config.dest, making, targets, png_pixels) as dest, ExitStack() as stack:
        folder = None if isinstance(dest, ZipDest) else Folder(dest.path, png_pixels)
        present = {} if folder else {target: dest.existing(target) for target in targets}
        work = Conversion(source, names, targets, transform, size, folder, present)
        results = stack.enter_context(closing(work.results(config.workers or cpu_count())))
        bar = stack.enter_context(tqdm(total=len(names), desc="convert", unit="image"))
        for result, name, target in zip(results, names, targets, strict=True):
            bar.update()
            if result.error:
                raise UserError(result.error)
            if result.unreadable:
                if config.strict:
                    raise UserError(result.unreadable)
                skipped.append(f"{name}\t{result.unreadable.removeprefix(source.where(name) + ': ')}\n")
            if result.content is not None:
                dest.write(target, result.content)
            if result.is_there:
                written.append(target)
        if skipped:
            dest.write(SKIPPED_FILE, encode_name("".join(skipped)))
        dest.finish(label_file(written, None if labels is None else dict(zip(targets, labels, strict=True))))
    print(f"{config.dest}: {len(written)} images of {format_sides(size)}, {'unlabelled' if labels is None else 'labelled'}")
    if skipped:
        print(f"{len(skipped)} images could not be read: {SKIPPED_FILE} there says why (--strict stops at the first)")


class Result(NamedTuple):
    """What became of one image; all is empty for one that the transform leaves out as too small."""

    is_there: bool = False
    content: bytes | None = None  # of the PNG, for a zip, which one process writes
    unreadable: str | None = None
    error: str | None = None


class Conversion(Dataset):
    """[i] → what became of image i. A folder is written by whoever converts; PNGs for a zip are handed over.

    `size`: (height, width) that all results must have; `present`: the shapes of the targets that a zip holds already.
    """

    def __init__(
        self,
        source: FileTree,
        names: list[str],
        targets: list[str],
        transform: Transform,
        size: tuple[int, int],
        folder: Folder | None,
        present: dict[str, tuple[int, ...] | None],
    ):
        self.source, self.names, self.targets, self.transform = source, names, targets, transform
        self.size, self.folder, self.present = size, folder, present

    def results(self, workers: int) -> Generator[Result, None, None]:
        """The results in order, computed by `workers` processes a bounded number of images ahead."""
        if workers == 1:
            return (self[i] for i in range(len(self)))
        # A DataLoader is a bounded, ordered queue of work; handing over one image at a time would cost a tenth of it.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None  # Windows has none
        context = {"multiprocessing_context": method, "worker_init_fn": _end_with_parent}
        return _results(DataLoader(self, batch_size=GROUP, collate_fn=list, num_workers=workers, **context))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Result:
        name, target = self.names[index], self.targets[index]
        try:
            shape = self.folder.existing(target) if self.folder else self.present[target]
            if shape is not None:
                check_size(target, shape, self.size)
                return Result(is_there=True)
            image = transformed(self.source, name, self.transform)
            if image is None:  # too small for center-crop-wide: left out, the number used up
                return Result()
            check_size(self.source.where(name), image.shape, self.size)
            content = png_bytes(image)
            if self.folder is None:
                return Result(is_there=True, content=content)
            self.folder.write(target, content)
            return Result(is_there=True)
        except DataError as error:
            return Result(unreadable=str(error))
        except UserError as error:
            return Result(error=str(error))


def first_size(
    source: FileTree, names: list[str], transform: Transform, *, strict: bool, any_shape: bool
) -> tuple[int, int] | None:
    """(height, width) of the first result, which all others must have; None where no image gives one."""
    for name in names:
        try:
            image = transformed(source, name, transform)
        except DataError:
            if strict:
                raise
            continue
        if image is not None:
            if not any_shape:
                check_square(source.where(name), image.shape[1], image.shape[0])
            return image.shape[0], image.shape[1]
    return None


def transformed(source: FileTree, name: str, transform: Transform) -> np.ndarray | None:
    """An image of the source, transformed; None if it is too small. `DataError` if it is broken, or would become too large."""
    image = image_files.read_image(source, name)
    try:
        return transform(image)
    except (ValueError, MemoryError) as error:
        raise DataError(f"{source.where(name)}: cannot be transformed: {first_line(error)}") from None


def check_size(where: str, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    """Raise `UserError` for a result (height, width, 3) that is not of `size`."""
    if size[0] == size[1] and not size[0] & (size[0] - 1):
        check_square(where, shape[1], shape[0])
    if shape[:2] != size:
        raise UserError(
            f"{where}: the result has {format_sides(shape)} pixels, others {format_sides(size)}; give --transform and --resolution"
        )


def check_square(where: str, width: int, height: int) -> None:
    """Raise `UserError` for a result that is not a square whose side is a power of two."""
    if height != width:
        raise UserError(f"{where}: the result has {width}x{height} pixels, not a square; give --transform and --resolution")
    if width & (width - 1):
        raise UserError(f"{where}: the result is {width} pixels wide, not a power of two; give --transform and --resolution")


def _end_with_parent(_: int) -> None:
    """A worker that waits to hand over a result would wait for ever for a parent that was killed."""
    end_with_parent()


def _results(loader: DataLoader) -> Generator[Result, None, None]:
    """Group by group. The workers end with it: what they still write must not meet what comes after."""
    with data_workers(loader, "the same command goes on from there") as groups:
        for group in groups:
            yield from group
