"""Many images from one checkpoint: a folder of PNG and an .npz for evaluation.

`torchrun --nproc_per_node=N generate.py …` or plain `python generate.py …`. Image i depends on (global_seed, i) alone, so any
number of processes, batch size or restart gives the same set.
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import inference
import metrics.images
import models
from config import GenerateConfig
from errors import UserError, command
from files import FolderLock, check_name, join_inside, parse_json
from models.dfm import recompose
from pictures import save_png
from processes import end_with_launcher
from randomness import image_labels
from samplers import OnStage, parse_budget
from vae import decode

WRITERS = 4  # threads that write PNG files


@command
def main(argv: list[str] | None = None) -> None:
    config, given, found = inference.from_command_line(GenerateConfig, argv, "generate.py")
    if config.exp_name is None:
        recorded = found.config.get("exp_name") or config.model.replace("/", "-")
        config.exp_name = check_name(recorded, f"{config.ckpt}: exp_name (--exp-name gives another)", plain=True)
    check(config)
    end_with_launcher()
    if "num_steps" in given and models.model_spec(config.model).staged:
        _warn("--num-steps has no effect: a DFM model is sampled with --num-steps-per-scale")
    generate(config, found)


def check(config: GenerateConfig) -> None:
    """Refuse what cannot be sampled, before anything is loaded or written."""
    inference.check_sampler(config)
    for name in ("inference_budget", "unconditional_inference_budget"):
        inference.check_budget(config, "--" + name.replace("_", "-"), getattr(config, name))
    inference.guidance(config).check()
    if config.preview and not models.model_spec(config.model).staged:
        raise UserError(f"--preview: {config.model} has no coarser stages; only DFM models do")
    if config.inference_budget is not None:
        config.inference_budget = str(parse_budget(config.inference_budget))  # one spelling, for records and names
    if config.class_labels not in (["random"], ["balanced"]):
        for label in config.class_labels:
            if not label.isdigit():
                raise UserError(f"--class-labels {label}: not random, balanced or class ids below {config.num_classes}")
        inference.check_labels(config, "--class-labels", [int(label) for label in config.class_labels])
    images_folder(config)


def labels_of(config: GenerateConfig, indices: Sequence[int]) -> Tensor:
    """Class ids (B,) of the images `indices`: random by index, balanced, or cycling through a list."""
    if config.class_labels == ["random"]:
        return image_labels(config.global_seed, indices, config.num_classes)
    cycle = range(config.num_classes) if config.class_labels == ["balanced"] else [int(c) for c in config.class_labels]
    return torch.tensor([cycle[i % len(cycle)] for i in indices])


def draw(
    config: GenerateConfig,
    model: nn.Module,
    vae: nn.Module,
    shape: Sequence[int],
    indices: Sequence[int],
    on_stage: OnStage | None = None,
) -> Tensor:
    """Images `indices` as uint8 (B, 3, H, W); shape: (C, h, w) of the VAE latents. on_stage: see `samplers.dfm_sampler`."""
    labels, g = labels_of(config, indices), inference.guidance(config)
    return decode(vae, inference.sample(config, g, model, shape, config.global_seed, indices, labels, on_stage))


def generate(config: GenerateConfig, found: checkpoint.Weights) -> Path:
    """Draw what is missing of the images 0 … num_fid_samples − 1, then write the .npz. Returns the folder of the images."""
    on_cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    if int(os.environ.get("WORLD_SIZE", 1)) != state.num_processes:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {state.num_processes} process(es) run; start with torchrun"
        )
    inference.set_precision(config, state.device, _warn)
    model, vae, shape = inference.load(config, found, state.device)

    folder = images_folder(config)
    folders = {-1: folder} | {s: folder.with_name(f"{folder.name}-stage{s}") for s in coarser_stages(config)}
    lock, error = None, ""
    try:
        if state.is_main_process:
            try:
                lock = FolderLock(folder.with_name(f"{folder.name}.lock"), folder, _warn)
                open_folder(folder, config, found)
                for where in folders.values():
                    where.mkdir(exist_ok=True)
            except OSError as failed:
                error = f"--sample-dir {config.sample_dir}: cannot use {folder}: {failed}"
            except UserError as refused:
                error = str(refused)
        (error,) = broadcast_object_list([error])
        if error:
            raise UserError(error)
        draw_missing(config, state, model, vae, shape, folders)
    finally:
        if lock is not None:
            lock.release()
    state.destroy_process_group()
    return folder


def draw_missing(
    config: GenerateConfig,
    state: PartialState,
    model: nn.Module,
    vae: nn.Module,
    shape: Sequence[int],
    folders: dict[int, Path],
) -> None:
    """Fill `folders`, by stage (-1: the finished images), and write the .npz. Every process draws its share."""
    folder = folders[-1]
    # Each process looks at its share of the files; all then agree on what is missing.
    mine = range(state.process_index, config.num_fid_samples, state.num_processes)
    sides = {-1: config.resolution} | coarser_stages(config)
    lacking = {i for s, where in folders.items() for i in missing_images(where, mine, sides[s])}
    missing = sorted(gather_object(list(lacking)))
    todo = missing[state.process_index :: state.num_processes]
    batch_size = config.per_proc_batch_size
    start = time.perf_counter()
    with (
        torch.inference_mode(),
        ThreadPoolExecutor(WRITERS) as pool,
        tqdm(total=len(missing), desc="generate", unit="image", disable=not state.is_main_process) as bar,
    ):
        writing: list = []

        def write(images: Tensor, stage: int = -1) -> None:
            images = images.permute(0, 2, 3, 1).cpu().numpy()
            for job in writing:  # at most one batch waits to be written
                job.result()
            pairs = zip(indices, images, strict=True)
            writing[:] = [pool.submit(_write_image, folders[stage], i, image) for i, image in pairs]

        def preview(stage: int, clean: list[Tensor]) -> None:
            write(decode(vae, recompose(clean)), stage)

        for first in range(0, len(todo), batch_size):
            indices = todo[first : first + batch_size]
            write(draw(config, model, vae, shape, indices, preview if config.preview else None))
            bar.update(min(len(indices) * state.num_processes, len(missing) - bar.n))
        for job in writing:
            job.result()
    state.wait_for_everyone()
    if state.is_main_process:
        seconds = time.perf_counter() - start
        rate = f", {len(missing) / seconds:.2f} images/s" if missing else ""
        kept = config.num_fid_samples - len(missing)
        write_npz(
            folder.with_name(folder.name + ".npz"), (folder / image_name(i) for i in range(config.num_fid_samples)), config
        )
        print(f"{folder}: {len(missing)} images drawn in {seconds:.1f} s{rate}; {kept} kept; {folder.name}.npz beside it")
        flops = inference.mean_flops_per_step(config, inference.guidance(config), model)
        print(f"{flops / 1e9:.2f} GFLOPs per image and step, guidance included")
    state.wait_for_everyone()


# ------------------------------------------------------------------------------------------------------------ files


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
    steps = inference.steps_of_run(config)
    name = f"ckpt-{Path(config.ckpt).stem}-cfg-{config.cfg_scale}-steps-{steps}-seed-{config.global_seed}-{config.mode}"
    labels = "_".join(config.class_labels)
    if len(labels) > 40:
        labels = hashlib.sha256(labels.encode()).hexdigest()[:12]
    defaults = GenerateConfig()
    for option, label, value in (
        ("weights", "weights", config.weights.replace(":", "_")),
        ("inference_budget", "budget", parse_budget(config.inference_budget)),
        ("unconditional_inference_budget", "uncond", config.unconditional_inference_budget),
        ("autoguidance", "autoguidance", None),
        ("guidance_low", "low", config.guidance_low),
        ("guidance_high", "high", config.guidance_high),
        ("heun", "heun", None),
        ("class_labels", "labels", labels),
        ("mixed_precision", config.mixed_precision, None),
        *(
            (option, label, "_".join(map(str, getattr(config, option))))
            for option, label in (("num_steps_per_scale", "scales"), ("stage_sampling_thresholds", "thresholds"))
            if models.model_spec(config.model).staged
        ),
    ):
        if getattr(config, option) != getattr(defaults, option):
            name += f"-{label}" + ("" if value is None else f"-{value}")
    return name


def open_folder(folder: Path, config: GenerateConfig, found: checkpoint.Weights) -> None:
    """Make the folder and the record of its settings beside it, or check that an existing one was made with the same."""
    names = _SETTINGS | (_STAGE_SETTINGS if models.model_spec(config.model).staged else set())
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
_SETTINGS = {
    *("weights", "vae", "mode", "num_steps", "heun", "path_type", "cfg_scale", "guidance_low", "guidance_high", "autoguidance"),
    *("inference_budget", "unconditional_inference_budget", "global_seed", "class_labels", "mixed_precision", "time_shift"),
}
_STAGE_SETTINGS = {"num_steps_per_scale", "stage_sampling_thresholds"}


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


def _write_image(folder: Path, index: int, image: np.ndarray) -> None:
    save_png(Image.fromarray(image), folder / image_name(index), compress_level=1)


def _warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"generate.py: warning: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
