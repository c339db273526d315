"""Captions that images of several blocks share, such as "a photo of a dog": each is encoded once, for all of them.

Their features lie aside in the folder until all is written, so that any process finds them, after any stop.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.files import write_atomically
from common.tensor_files import npy_bytes

BLOCKS_OPEN = 64  # of which only what is read is in memory


class SharedCaptions:
    """The captions of more than one block of images, and the files that hold their features.

    Attributes:
        rows: each caption's place among them. Blocks of them are encoded together, as those of images are.
        files: one for each block of captions, memory-mapped.
    """

    def __init__(self, folder: Path, digest: str, prompts: Sequence[Sequence[str]], block: int):
        """Find them; nothing is read or written.

        Args:
            folder: where the files lie.
            digest: of all that the features depend on.
            prompts: the captions of every image.
            block: images of a block, and captions of a file.
        """
        first_block: dict[str, int] = {}
        shared = dict.fromkeys(
            caption
            for i, of_image in enumerate(prompts)
            for caption in of_image
            if first_block.setdefault(caption, i // block) != i // block
        )
        self.rows = {caption: row for row, caption in enumerate(shared)}
        self._folder, self._block, self._captions = folder, block, list(shared)
        self.files = [folder / f"text-shared-{digest[:16]}-{n:05d}.npy" for n in range(-(-len(self.rows) // block))]
        self._read = functools.lru_cache(BLOCKS_OPEN)(functools.partial(np.load, mmap_mode="r"))

    def make(self, n: int, features: Callable[[list[str]], list[np.ndarray]]) -> None:
        """Write file `n`, if it is not there: `features` of its captions, a few arrays (captions, …), side by side."""
        file = self.files[n]
        if not file.is_file():
            arrays = features(self._captions[n * self._block : (n + 1) * self._block])
            row = np.dtype([("", array.dtype, array.shape[1:]) for array in arrays])
            rows = np.empty(len(arrays[0]), row)
            for name, array in zip(rows.dtype.names or (), arrays, strict=True):
                rows[name] = array
            write_atomically(file, npy_bytes(rows), fsync=True, option="--source")

    def of(self, caption: str) -> tuple[np.ndarray, ...]:
        """The features of one of the captions."""
        block, row = divmod(self.rows[caption], self._block)
        return self._read(self.files[block])[row].item()

    def remove(self) -> None:
        """Remove the files, of stopped runs with other features, too."""
        for file in self._folder.glob("text-shared-*.npy*"):
            file.unlink(missing_ok=True)
