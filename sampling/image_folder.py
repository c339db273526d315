"""The folder of generated images: names, the record of settings, which images are missing, the npz."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

import metrics.images
import models
from checkpoint import weights
from common.errors import UserError
from common.files import check_name, join_inside, parse_json
from common.image_files import save_png
from config.options import GenerateConfig
from config.rules import folder_labels, names
from samplers import parse_budget
from sampling import cost

WRITERS = 4  # threads that write PNG files


def coarser_stages(config: GenerateConfig) -> dict[int, int]:
    """The stages whose images are written beside the finished ones, and the side of those in pixels."""
    if not config.preview:
        return {}
    last = config.stages_count - 1
    return {s: config.resolution // 2 ** (last - s) for s in range(last)}


def image_name(index: int) -> str:
    return f"{index:06d}.png"


def images_folder(config: GenerateConfig) -> Path:
    """SAMPLE_DIR/EXP_NAME/`folder_name`. `UserError` if either name could lead elsewhere: a checkpoint may have recorded them."""
    parent = join_inside(config.sample_dir, config.exp_name, "--exp-name", plain=True)
    name = folder_name(config)  # followed by `.npz.tmp` at the longest
    check_name(f"{name}.npz.tmp", "the folder's name, which --ckpt and the sampling options give", plain=True)
    return parent / name


def folder_name(config: GenerateConfig) -> str:
    """`ckpt-{stem}-cfg-…-steps-…-seed-…-{mode}`, with every other setting that changes the images where it is not the default."""
    steps = cost.steps_of_run(config)
    name = f"ckpt-{Path(config.ckpt).stem}-cfg-{config.cfg_scale}-steps-{steps}-seed-{config.global_seed}-{config.mode}"
    labels = "_".join(config.class_labels)
    if len(labels) > 40:
        labels = hashlib.sha256(labels.encode()).hexdigest()[:12]
    defaults = GenerateConfig()
    special = {
        "weights": config.weights.replace(":", "_"),
        "inference_budget": parse_budget(config.inference_budget),
        "class_labels": labels,
    }
    for option, label in folder_labels(GenerateConfig).items():
        value = getattr(config, option)
        if value == getattr(defaults, option) or (option in STAGE_SETTINGS and not models.model_spec(config.model).staged):
            continue
        if isinstance(value, list):
            value = "_".join(map(str, value))
        name += f"-{label}" if label else ""
        name += "" if value is True else f"-{special.get(option, value)}"
    return name


def open_folder(folder: Path, config: GenerateConfig, found: weights.Weights) -> None:
    """Make the folder and the record of its settings beside it, or check that an existing one was made with the same."""
    names = SETTINGS | (STAGE_SETTINGS if models.model_spec(config.model).staged else set())
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k in names} | {
        "ckpt_sha256": found.checksum.value(),
        "ckpt_step": found.step,
    }
    record = folder.with_name(folder.name + ".json")
    try:
        if folder.is_dir() and any(folder.glob("*.png")):
            made_with = parse_json(record.read_bytes(), record) if record.is_file() else {}
            if not isinstance(made_with, dict):
                raise UserError(f"{record}: not what generate.py writes; move it and {folder} away")
            for name, value in settings.items():
                made = made_with.get(name, getattr(GenerateConfig(), name, None))  # older records lack newer options
                if made != value:
                    raise UserError(
                        f"{folder}: holds images made with {name} {made}, not {value}; move it away or choose another --sample-dir or --exp-name"
                    )
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        aside = record.with_suffix(".tmp")
        aside.write_text(json.dumps(settings, indent=1) + "\n")
        aside.replace(record)
    except OSError as error:
        raise UserError(f"--sample-dir {config.sample_dir}: cannot use {folder}: {error}") from None


# What an image depends on, beside the checkpoint.
SETTINGS = set(names(GenerateConfig, images=True, group=("checkpoint", "path", "sample", "guidance", "system")))


STAGE_SETTINGS = set(names(GenerateConfig, images=True, model=False, group="dfm"))


def missing_images(folder: Path, indices: Iterable[int], resolution: int) -> Iterable[int]:
    """Those of `indices` whose file is not there or is not a whole PNG of the right size."""

    def good(index: int) -> bool:
        try:
            with Image.open(folder / image_name(index)) as image:
                image.load()
                return image.size == (resolution, resolution) and image.mode == "RGB"
        except (OSError, SyntaxError, ValueError):
            return False

    indices = list(indices)
    with ThreadPoolExecutor(WRITERS) as pool:
        return [i for i, ok in zip(indices, pool.map(good, indices), strict=True) if not ok]


def write_npz(path: Path, files: Iterable[Path], config: GenerateConfig) -> None:
    """ADM's sample format: arr_0 uint8 (M, H, W, 3) of the image files."""
    shape = (config.num_fid_samples, config.resolution, config.resolution, 3)
    metrics.images.write_npz(path, shape, (np.asarray(Image.open(file)) for file in files))


def write_image(folder: Path, index: int, image: np.ndarray) -> None:
    save_png(Image.fromarray(image), folder / image_name(index), compress_level=1)
