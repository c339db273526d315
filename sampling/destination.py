"""Where generate.py puts images, and which it finds there: PNG files and an npz that is made of them, or the npz alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from typing_extensions import override

from common.sizes import sides
from config.options import GenerateConfig
from sampling.image_folder import (
    images_folder,
    missing_images,
    missing_in_npz,
    npz_writer,
    open_folder,
    stage_folders,
    whole_npz,
)

if TYPE_CHECKING:
    from accelerate import PartialState


class Destination:
    """The folder of PNG files, and the npz beside it, which each run makes anew of them.

    `folder`: that of the finished images; `png`: the same, if their files are written; `npz`: its writer.
    """

    def __init__(self, config: GenerateConfig):
        self._config = config
        self.folder, self.stages, self.npz = images_folder(config), stage_folders(config), npz_writer(config)
        self.png: Path | None = self.folder

    def open(self, made_with: dict[str, Any]) -> None:
        """Make it, or check that what it holds was made with the same settings; by one process before the others use it.

        Raises:
            UserError: it was not, or cannot be written to.
        """
        open_folder(self.folder, self._config, made_with, self.npz, alone=False)
        for where, _ in self.stages.values():
            where.mkdir(exist_ok=True)
        self.npz.prepare(keep=False)

    def missing(self, own: Sequence[int], state: "PartialState") -> set[int]:
        """Those of the images `own` that are to be drawn. What an earlier run has drawn is put into the npz."""
        return {
            i
            for stage, (where, side) in self.stages.items()
            for i in missing_images(where, own, side, self.npz.write if stage == -1 else None)
        }

    def close(self) -> None:
        """Remove what only this run can use; by one process, whether all images are drawn or not."""
        self.npz.remove()  # all of it is in the folder

    def __str__(self) -> str:
        return f"{self.folder}"

    @property
    def also(self) -> str:
        """What lies beside it, in words."""
        return f"; {self.folder.name}.npz beside it"


class NpzAlone(Destination):
    """The npz, of which a killed run leaves what it has drawn."""

    def __init__(self, config: GenerateConfig):
        super().__init__(config)
        self.png = None

    @override
    def open(self, made_with: dict[str, Any]) -> None:
        open_folder(self.folder, self._config, made_with, self.npz, alone=True)
        self.npz.prepare(keep=True)

    @override
    def missing(self, own: Sequence[int], state: "PartialState") -> set[int]:
        (before,) = broadcast_object_list(
            [whole_npz(self.npz.path, sides(self._config.resolution)) if state.is_main_process else None]
        )
        return set(missing_in_npz(self.npz, before, own))

    @override
    def close(self) -> None:
        pass

    def __str__(self) -> str:
        return f"{self.npz.path}"

    @property
    @override
    def also(self) -> str:
        return ""


def destination(config: GenerateConfig) -> Destination:
    """Of the images that the options describe."""
    return NpzAlone(config) if config.no_png else Destination(config)
