"""Sets of images that are read slice by slice: ADM's npz files, and folders (or zips) of image files."""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import Image

from common import image_files
from common.errors import UserError, first_line
from common.file_tree import FileTree
from common.files import DataError, file_sha256, written_aside

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s", "mu_dinov2", "sigma_dinov2")
READERS = 4  # threads that decode image files
SKIP = 2**24  # bytes that are read at once to get on in a deflated member, or to hash
MAX_STATISTICS = 2**30  # bytes of an array of statistics: 11,000 dimensions
MAX_VALUE = 1e100  # of statistics: what is above overflows in their products

T = TypeVar("T")


class ImageSet:
    """Images uint8 RGB of one size, by index; and the statistics that a file may hold.

    `count`, `size` (height, width): 0 where there are only statistics. `statistics`: name → array.
    """

    count = 0
    size = (0, 0)

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.statistics: dict[str, np.ndarray] = {}

    def check(self) -> None:
        """Raise a `UserError` for what is wrong with the images and shows without decoding them."""

    def read(self, span: range) -> np.ndarray:
        """Images `span`: uint8 (len(span), H, W, 3). Quick where the spans of the calls ascend. `DataError` if they are broken."""
        raise NotImplementedError

    def sha256(self) -> str:
        """Of the file; of a folder, that of the lines that `sha256sum` prints for its images in order."""
        raise NotImplementedError


def open_images(path: str | Path) -> ImageSet:
    """The set in an npz file or a folder (or zip) of image files. `UserError` where it is none, or broken."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; wanted: an .npz file or a folder of PNG")
    return NpzImages(path) if path.is_file() and path.suffix.lower() != ".zip" else FolderImages(path)


def write_npz(
    path: Path, shape: tuple[int, ...], images: Iterable[np.ndarray], arrays: dict[str, np.ndarray] | None = None
) -> None:
    """ADM's format: arr_0 uint8 of `shape` (M, H, W, 3), and other arrays. Image by image, written atomically. WriteError if it cannot."""
    member = zipfile.ZipInfo("arr_0.npy")  # without a date: the same images make the same file
    with written_aside(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(member, "w", force_zip64=True) as out:
            np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for image in images:
                out.write(image.tobytes())
        for name, array in (arrays or {}).items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as out:
                np.lib.format.write_array(out, array, allow_pickle=False)


class NpzImages(ImageSet):
    """ADM's format: arr_0 uint8 (N, H, W, 3), and for a reference `mu`, `sigma`, …; arr_0 is never in memory as a whole."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._offset: int | None = None  # of the first stored pixel
        self._header_bytes = self._image_bytes = self._crc = 0  # of arr_0
        members: dict[str, zipfile.ZipInfo] = {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                for name in STATISTICS:
                    if name in members:
                        self.statistics[name] = self._small_array(archive, members[name])
                if "arr_0" in members:
                    self._open_images(archive, members["arr_0"])
        except UserError:
            raise
        except Exception as error:  # zipfile and NumPy's header raise whatever they like on damaged, odd or encrypted members
            raise UserError(f"{self.path}: truncated, or not an .npz file: {first_line(error)}") from None
        if not self.statistics and not self.count:
            held = ", ".join(members) or "nothing"
            raise UserError(f"{self.path}: holds no arr_0 (it holds {held}); wanted: images, uint8 (N, H, W, 3)")
        self._stream: IO[bytes] | None = None  # of a deflated member, and the image that it has come to
        self._place = 0

    def read(self, span: range) -> np.ndarray:
        """Images `span`: uint8 (len(span), H, W, 3), quick where the spans of the calls ascend."""
        start, wanted = span.start * self._image_bytes, len(span) * self._image_bytes
        try:
            content = self._read_stored(start, wanted) if self._offset is not None else self._read_deflated(start, wanted)
            if len(content) != wanted:
                raise EOFError(f"arr_0 ends before image {span.stop - 1}")
        except Exception as error:  # as above
            raise DataError(f"{self.path}: truncated or damaged: {first_line(error)}") from None
        return np.frombuffer(content, dtype=np.uint8).reshape(len(span), *self.size, 3)

    def _read_stored(self, start: int, size: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek((self._offset or 0) + start)
            return file.read(size)

    def _read_deflated(self, start: int, size: int) -> bytes:
        if self._stream is None or self._place > start:
            self._stream = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115, kept for the next call
            self._stream.read(self._header_bytes)
            self._place = 0
        while self._place < start:
            skipped = len(self._stream.read(min(SKIP, start - self._place)))
            if not skipped:
                break
            self._place += skipped
        content = self._stream.read(size)
        self._place += len(content)
        return content

    def sha256(self) -> str:
        """Of the file. `DataError` where stored images are damaged, which only their CRC-32 tells; zipfile looks at deflated ones."""
        if self._offset is None:
            return file_sha256(self.path)
        digest, crc = hashlib.sha256(), 0
        start = self._offset - self._header_bytes
        end = self._offset + self.count * self._image_bytes
        with self.path.open("rb") as file:
            place = 0
            while block := file.read(SKIP):
                digest.update(block)
                crc = zlib.crc32(memoryview(block)[max(0, start - place) : max(0, end - place)], crc)
                place += len(block)
        if crc != self._crc:
            raise DataError(f"{self.path}: damaged: arr_0 does not match its CRC-32")
        return digest.hexdigest()

    def _small_array(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
        if info.file_size > MAX_STATISTICS:
            raise UserError(f"{self.path}: {info.filename} has {info.file_size:,} bytes; the limit is {MAX_STATISTICS:,}")
        with archive.open(info) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.kind != "f" or not (np.abs(array) <= MAX_VALUE).all():
            raise UserError(f"{self.path}: {info.filename} holds values that are not finite numbers of a sensible size")
        return array

    def _open_images(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
            if header is None:
                raise UserError(f"{self.path}: arr_0 is an npy array of version {version}; wanted: 1.0 or 2.0")
            shape, fortran_order, dtype = header(file)
            self._header_bytes = file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or 0 in shape:
            raise UserError(
                f"{self.path}: arr_0 is {dtype} {shape}{' in Fortran order' if fortran_order else ''}; "
                "wanted: RGB images, uint8 (N, H, W, 3)"
            )
        self.count, self.size, self._image_bytes, self._crc = shape[0], shape[1:3], math.prod(shape[1:]), info.CRC
        if info.file_size != self._header_bytes + self.count * self._image_bytes:
            raise UserError(f"{self.path}: damaged: arr_0 has {info.file_size} bytes, not those of {self.count} images")
        if info.compress_type == zipfile.ZIP_STORED:
            with self.path.open("rb") as file:  # a local header, whose last two lengths the central directory need not share
                file.seek(info.header_offset + 26)
                lengths = file.read(4)
            name, extra = (int.from_bytes(part, "little") for part in (lengths[:2], lengths[2:]))
            self._offset = info.header_offset + 30 + name + extra + self._header_bytes


class FolderImages(ImageSet):
    """Image files of a folder tree or zip, in the order of their paths; RGB, of one size."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._files = FileTree(self.path)
        self.names = image_files.image_names(self._files.names())
        if not self.names:
            raise UserError(f"{self.path}: holds no image files")
        self.count = len(self.names)
        self.size = self._header(0)[0]
        self._threads = ThreadPoolExecutor(READERS) if self.path.is_dir() else None  # a zip file has one place to read from

    def check(self) -> None:
        """Every image is RGB and of one size, by its header."""
        for index, (size, mode) in enumerate(self._map(self._header, range(self.count))):
            where = self._files.where(self.names[index])
            if mode != "RGB":
                raise UserError(f"{where}: is of mode {mode}; wanted: RGB images (`dataset_tools.py convert` makes them)")
            if size != self.size:
                raise UserError(
                    f"{where}: has {size[1]}x{size[0]} pixels, but {self.names[0]} {self.size[1]}x{self.size[0]}; one size only"
                )

    def read(self, span: range) -> np.ndarray:
        """Images `span`: uint8 (len(span), H, W, 3)."""
        return np.stack(list(self._map(lambda i: image_files.read_image(self._files, self.names[i]), span)))

    def sha256(self) -> str:
        """Of the lines that `sha256sum` prints."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{hashlib.sha256(self._files.read(name)).hexdigest()}  {name}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _map(self, function: Callable[[int], T], indices: range) -> Iterable[T]:
        return self._threads.map(function, indices) if self._threads else map(function, indices)

    def _header(self, index: int) -> tuple[tuple[int, int], str]:
        """(height, width) and mode of a file, of which only the start is read."""
        name = self.names[index]
        with self._files.open(name) as source:
            try:
                with Image.open(source) as image:
                    image_files.check_pixels(image.width, image.height)
                    return (image.height, image.width), image.mode
            except Exception as error:  # whatever Pillow's plugins raise
                problem = image_files.image_problem(error)
                raise UserError(f"{self._files.where(name)}: not a readable image: {problem}") from None
