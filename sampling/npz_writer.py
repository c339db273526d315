"""The npz of a sample set while it is drawn: every process writes its images to their places in it."""

import contextlib
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from common.files import WriteError

ENTRY = struct.Struct("<II")  # of an image that has been written: its CRC-32, and 1


class NpzWriter:
    """ADM's format, `arr_0` uint8 (M, H, W, 3), in a file beside `path` that gets this name once all images are in it.

    After the pixels the unfinished file has an entry for each image, so that a killed run continues: an entry that does not match
    its pixels counts for nothing. The finished file is that of `metrics.images.write_npz`, to the byte.

    Args:
        path: the npz.
        count: of images.
        size: (height, width) of them.
    """

    def __init__(self, path: Path, count: int, size: tuple[int, int]):
        self.path, self.unfinished = path, path.with_name(path.name + ".tmp")
        self._count, self._size = count, size[0] * size[1] * 3
        header = io.BytesIO()
        shape = (count, *size, 3)
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        self._header = header.getvalue()
        self._start = len(self._member(0).FileHeader(zip64=True)) + len(self._header)
        self._entries = self._start + count * self._size  # where they begin
        self._file: int | None = None

    def _member(self, crc: int) -> zipfile.ZipInfo:
        member = zipfile.ZipInfo("arr_0.npy")  # without a date: the same images make the same file
        member.external_attr, member.header_offset = 0o600 << 16, 0
        member.file_size = member.compress_size = len(self._header) + self._count * self._size
        member.CRC = crc
        return member

    def __enter__(self) -> "NpzWriter":
        try:
            self._file = os.open(self.unfinished, os.O_RDWR)
        except OSError as error:
            raise WriteError(self.path, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def prepare(self, *, keep: bool) -> None:
        """Make the unfinished file, by one process before the others open it. keep: with the images that are in one already.

        Raises WriteError.
        """
        try:
            with self.unfinished.open("r+b" if keep and self.unfinished.is_file() else "w+b") as file:
                before = (file.seek(0, os.SEEK_END) - self._start) // (self._size + ENTRY.size)  # images of the file so far
                file.seek(self._start + max(0, before) * self._size)
                entries = file.read(ENTRY.size * min(max(0, before), self._count))
                file.truncate(self._entries)  # whatever its end was
                file.truncate(self._entries + self._count * ENTRY.size)
                file.seek(self._entries)
                file.write(entries)
        except OSError as error:
            self.remove()
            raise WriteError(self.path, error) from None

    def remove(self) -> None:
        """Give up the unfinished file."""
        with contextlib.suppress(OSError):
            self.unfinished.unlink(missing_ok=True)

    def write(self, index: int, image: np.ndarray) -> None:
        """Image `index`, uint8 (H, W, 3); from any thread. Raises WriteError."""
        assert self._file is not None
        pixels = image.tobytes()
        try:
            _write_all(self._file, pixels, self._start + index * self._size)
            _write_all(self._file, ENTRY.pack(zlib.crc32(pixels), 1), self._entries + index * ENTRY.size)
        except OSError as error:
            raise WriteError(self.path, error) from None

    def holds(self, index: int) -> bool:
        """Whether image `index` is in the file, whole."""
        assert self._file is not None
        crc, is_there = ENTRY.unpack(os.pread(self._file, ENTRY.size, self._entries + index * ENTRY.size))
        return is_there == 1 and zlib.crc32(os.pread(self._file, self._size, self._start + index * self._size)) == crc

    def finish(self) -> None:
        """Give the file its name; by one process, once all images are written. Its checksum is put together from the images'.

        Raises WriteError.
        """
        try:
            with self.unfinished.open("r+b") as file:
                file.seek(self._entries)
                entries = np.frombuffer(file.read(self._count * ENTRY.size), "<u4").reshape(-1, 2)
                if len(entries) != self._count or not entries[:, 1].all():
                    raise ValueError(f"{self.unfinished}: lacks images")
                member = self._member(_joined(zlib.crc32(self._header), entries[:, 0], self._size))
                file.truncate(self._entries)
                file.seek(0)
                file.write(member.FileHeader(zip64=True) + self._header)
                file.seek(0)
                archive = zipfile.ZipFile(file, "w")  # writes the directory of what it takes to have written
                archive.filelist.append(member)
                archive.start_dir = self._entries
                archive.close()
            self.unfinished.replace(self.path)
        except OSError as error:
            raise WriteError(self.path, error) from None


def _write_all(file: int, content: bytes, place: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, place)
        view, place = view[written:], place + written


def _joined(crc: int, crcs: np.ndarray, size: int) -> int:
    """CRC-32 of a whole: of its beginning, and of the parts of `size` bytes each that follow.

    What `size` more bytes make of a CRC-32 is linear in its bits, and zlib tells it for zeros.
    """
    zeros = bytes(size)
    offset = zlib.crc32(zeros, 0)
    bits = [zlib.crc32(zeros, 1 << bit) ^ offset for bit in range(32)]
    tables = []
    for byte in range(4):
        table = [0]
        for image in bits[8 * byte : 8 * byte + 8]:
            table += [value ^ image for value in table]
        tables.append(table)
    first, second, third, fourth = tables
    for own in crcs.tolist():
        crc = first[crc & 255] ^ second[crc >> 8 & 255] ^ third[crc >> 16 & 255] ^ fourth[crc >> 24] ^ own
    return crc
