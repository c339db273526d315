"""The folder of generated images and the npz beside it: names, the record of settings, which images are missing."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from checkpoint.weights import Weights
from common.errors import UserError
from common.files import check_name, join_inside, make_folder, parse_json, write_json
from common.image_files import save_png
from common.sizes import Resolution, sides
from config.options import GenerateConfig
from config.rules import folder_labels, names
from data.captions import CAPTIONS_FILE
from flows import flow_of
from metrics.images import ImageSet, open_images
from samplers import parse_budget
from sampling.npz_writer import NpzWriter

WRITERS = 4  # threads that write PNG files

# What older records hold, too; where they lack one of these, it had its default.
SETTINGS = set(names(GenerateConfig, images=True, group=("checkpoint", "path", "sample", "guidance", "system")))


# ------------------------------------------------------------------------------------------------------------- names


def image_name(index: int) -> str:
    """The file of image `index`."""
    return f"{index:06d}.png"


def images_folder(config: GenerateConfig) -> Path:
    """SAMPLE_DIR/EXP_NAME/`folder_name`. `UserError` if either name could lead elsewhere: a checkpoint may have recorded them."""
    parent = join_inside(config.sample_dir, config.exp_name, "--exp-name", plain=True)
    name = folder_name(config)  # followed by `.npz.tmp` at the longest
    check_name(f"{name}.npz.tmp", "the folder's name, which --ckpt and the sampling options give", plain=True)
    return parent / name


def stage_folders(config: GenerateConfig) -> dict[int, tuple[Path, Resolution]]:
    """Stage → folder and size in pixels of its images: -1 for the finished ones; with `preview` also the coarser stages."""
    folder = images_folder(config)
    coarser = flow_of(config).preview_sides(config.resolution) if config.preview else {}
    return {-1: (folder, config.resolution)} | {
        s: (folder.with_name(f"{folder.name}-stage{s}"), side) for s, side in coarser.items()
    }


def folder_name(config: GenerateConfig) -> str:
    """`ckpt-{stem}-cfg-…-steps-…-seed-…-{mode}`, with every other setting that changes the images where it is not the default."""
    flow = flow_of(config)
    name = (
        f"ckpt-{Path(config.ckpt).stem}-cfg-{config.cfg_scale}-steps-{flow.total_steps}-seed-{config.global_seed}-{config.mode}"
    )
    labels = "_".join(config.class_labels)
    if len(labels) > 40:
        labels = hashlib.sha256(labels.encode()).hexdigest()[:12]
    defaults = GenerateConfig()
    special = {
        "weights": config.weights.replace(":", "_"),
        "inference_budget": parse_budget(config.inference_budget),
        "class_labels": labels,
        "prompt": config.prompt and _slug(config.prompt),
        "prompts": config.prompts and Path(config.prompts).stem,
        "guide_ckpt": config.guide_ckpt and Path(config.guide_ckpt).stem,
    }
    for option, label in folder_labels(GenerateConfig).items():
        value = getattr(config, option)
        if value == getattr(defaults, option) or option in flow.foreign_options:
            continue
        if isinstance(value, list):
            value = "_".join(map(str, value))
        name += f"-{label}" if label else ""
        name += "" if value is True else f"-{special.get(option, value)}"
    return name


def _slug(prompts: Sequence[str]) -> str:
    """Prompts in a folder's name: the first one's letters, and a hash of all."""
    letters = "_".join(re.findall(r"[a-z0-9]+", prompts[0].lower()))[:40].strip("_")
    return f"{letters or 'prompt'}-{hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:8]}"


# ------------------------------------------------------------------------------------------------------------ record


def settings(config: GenerateConfig, weights: Weights, vae_sha256: str | None) -> dict[str, Any]:
    """All that the images depend on: the record beside their folder."""
    recorded = set(names(GenerateConfig, images=True)) - flow_of(config).foreign_options
    options = {k: v for k, v in dataclasses.asdict(config).items() if k in recorded}
    if config.inference_budget is not None:
        options["inference_budget"] = str(parse_budget(config.inference_budget))  # one spelling
    guide = {} if weights.guide is None else {"guide_sha256": weights.guide.sha256}
    if weights.prompts is not None:
        del options["class_labels"]
        guide |= weights.prompts.identity
    return {"ckpt_sha256": weights.sha256, "ckpt_step": weights.step, "vae_sha256": vae_sha256, **guide, **options}


def open_folder(folder: Path, config: GenerateConfig, made_with: dict[str, Any], npz: NpzWriter, *, alone: bool) -> None:
    """Make the folder and the record of its settings beside it, or check that the images in it were made with the same.

    Args:
        folder: of the images.
        config: for messages.
        made_with: the settings.
        npz: beside it; it may hold images, too.
        alone: all images are to be in the npz, and no folder is made.

    Raises:
        UserError: they were not, or the folder cannot be written to.
    """
    record = folder.with_name(folder.name + ".json")
    try:
        holds_images = folder.is_dir() and any(folder.glob("*.png"))
        if holds_images or npz.path.exists() or npz.unfinished.exists():
            _check_record(record, folder, made_with)
        (folder.parent if alone else folder).mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):  # of a killed run
            if re.fullmatch(r"\d{6,}\.png(\.\d+)?\.tmp", leftover.name):
                leftover.unlink()
        write_json(made_with, record)
    except OSError as error:
        raise UserError(f"--sample-dir {config.sample_dir}: cannot use {folder}: {error}") from None


def _check_record(record: Path, folder: Path, made_with: dict[str, Any]) -> None:
    before = parse_json(record.read_bytes(), record) if record.is_file() else {}
    if not isinstance(before, dict):
        raise UserError(f"{record}: not what generate.py writes; move it and {folder} away")
    defaults = GenerateConfig()
    for name, value in made_with.items():
        if name not in before and name not in SETTINGS:
            continue  # of an older version, which did not record it
        was = before.get(name, getattr(defaults, name, None))
        if was != value:
            raise UserError(
                f"{folder}: holds images made with {name} {was}, not {value}; move it away or choose another --sample-dir or --exp-name"
            )


def write_captions(folder: Path, prompts: Sequence[str], count: int) -> None:
    """captions.json beside the images, in the format of data folders: the prompt of each. Without PNG it is alone in the folder."""
    make_folder(folder, "--sample-dir")
    entries = [[image_name(i), [prompts[i % len(prompts)]]] for i in range(count)]
    write_json({"captions": entries}, folder / CAPTIONS_FILE)


# ------------------------------------------------------------------------------------------------------------ images


def missing_images(
    folder: Path, indices: Iterable[int], resolution: Resolution, keep: Callable[[int, np.ndarray], None] | None = None
) -> list[int]:
    """Those of `indices` whose file is not there or is not a whole PNG of the right size; `keep` gets the others' pixels."""

    def good(index: int) -> bool:
        try:
            with Image.open(folder / image_name(index), formats=["PNG"]) as image:
                image.load()
                if image.size[::-1] != sides(resolution) or image.mode != "RGB":
                    return False
                pixels = np.asarray(image)
        except (OSError, SyntaxError, ValueError):
            return False
        if keep is not None:
            keep(index, pixels)
        return True

    indices = list(indices)
    with ThreadPoolExecutor(WRITERS) as pool:
        return [i for i, ok in zip(indices, pool.map(good, indices), strict=True) if not ok]


class ImageWriter:
    """Writes batches of images in threads while the next one is drawn; all are there at the end of its context."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(WRITERS)
        self._jobs: list[Future[None]] = []

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._pool:
            if error is None:
                self._wait()

    def write(self, folder: Path | None, indices: Sequence[int], images: Tensor, npz: NpzWriter | None = None) -> None:
        """Images `indices`, uint8 (B, 3, H, W), to a folder of PNG and an npz, as far as they are given; at most one batch waits.

        Raises WriteError, of the batch before, too.
        """
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        self._wait()
        self._jobs = [self._pool.submit(_write_image, folder, npz, i, p) for i, p in zip(indices, pixels, strict=True)]

    def _wait(self) -> None:
        for job in self._jobs:
            job.result()


def _write_image(folder: Path | None, npz: NpzWriter | None, index: int, image: np.ndarray) -> None:
    if folder is not None:
        save_png(Image.fromarray(image), folder / image_name(index), compress_level=1)
    if npz is not None:
        npz.write(index, image)


def npz_writer(config: GenerateConfig) -> NpzWriter:
    """Of the npz beside the folder."""
    folder = images_folder(config)
    return NpzWriter(folder.with_name(folder.name + ".npz"), config.num_fid_samples, sides(config.resolution))


def missing_in_npz(npz: NpzWriter, before: ImageSet | None, indices: Sequence[int]) -> list[int]:
    """Those of `indices` that are neither in the unfinished npz nor in the one `before` it, of which they are taken over."""

    def good(index: int) -> bool:
        if npz.holds(index):
            return True
        if before is None or index >= before.count:
            return False
        npz.write(index, before.read(range(index, index + 1))[0])
        return True

    with ThreadPoolExecutor(WRITERS) as pool:
        return [i for i, ok in zip(indices, pool.map(good, indices), strict=True) if not ok]


def whole_npz(path: Path, size: tuple[int, int]) -> ImageSet | None:
    """The npz of an earlier run with images of `size` (height, width); None where there is none, or it is damaged. Reads all of it."""
    try:
        images = open_images(path)
        images.sha256()
        return images if images.size == size else None
    except UserError:
        return None
