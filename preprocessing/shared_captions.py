"""Captions that images of several blocks share, such as "a photo of a dog": each is encoded once, for all of them.

Their features lie aside in the folder until all is written, so that any process finds them, after any stop.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.files import write_atomically

BLOCKS_IN_MEMORY = 64


class SharedCaptions:
    """The captions of more than one block of images, and the files that hold their features.

    Attributes:
        rows: each caption's place among them. Blocks of them are encoded together, as those of images are.
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
        self._folder, self._name, self._block = folder, f"text-shared-{digest[:16]}", block
        self._read = functools.lru_cache(BLOCKS_IN_MEMORY)(self._load)

    @property
    def files(self) -> list[Path]:
        """One for each block of captions."""
        return [self._folder / f"{self._name}-{n:05d}.npz" for n in range(-(-len(self.rows) // self._block))]

    def make(self, n: int, features: Callable[[list[str]], list[np.ndarray]]) -> None:
        """Write file `n`, if it is not there: `features` of its captions, a few arrays (captions, …)."""
        file = self.files[n]
        if not file.is_file():
            arrays = features(list(self.rows)[n * self._block : (n + 1) * self._block])
            write_atomically(file, lambda opened: np.savez(opened, *arrays), fsync=True, option="--source")

    def of(self, caption: str) -> list[np.ndarray]:
        """The features of one of the captions."""
        block, row = divmod(self.rows[caption], self._block)
        return [array[row] for array in self._read(block)]

    def _load(self, block: int) -> list[np.ndarray]:
        with np.load(self.files[block]) as arrays:
            return list(arrays.values())

    def remove(self) -> None:
        """Remove the files, of stopped runs with other features, too."""
        for file in self._folder.glob("text-shared-*.npz*"):
            file.unlink(missing_ok=True)
