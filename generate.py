"""Many images from one checkpoint: a folder of PNG and an .npz for evaluation.

`torchrun --nproc_per_node=N generate.py …` or plain `python generate.py …`. Image i depends on (global_seed, i) alone, so any
number of processes, batch size or restart gives the same set.
"""

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

import models
from checkpoint import weights
from common.distributed import end_with_launcher
from common.errors import UserError, cli_main
from common.files import FolderLock, check_name
from config.options import GenerateConfig
from models.dfm import recompose
from models.vae import decode
from randomness import image_labels
from samplers import OnStage, parse_budget
from sampling import checks, cost, session
from sampling.image_folder import (
    WRITERS,
    coarser_stages,
    image_name,
    images_folder,
    missing_images,
    open_folder,
    write_image,
    write_npz,
)


@cli_main
def main(argv: list[str] | None = None) -> None:
    config, given, found = session.from_command_line(GenerateConfig, argv, "generate.py")
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
    checks.check_sampler(config)
    for name in ("inference_budget", "unconditional_inference_budget"):
        checks.check_budget(config, "--" + name.replace("_", "-"), getattr(config, name))
    session.guidance(config).check()
    if config.preview and not models.model_spec(config.model).staged:
        raise UserError(f"--preview: {config.model} has no coarser stages; only DFM models do")
    if config.inference_budget is not None:
        config.inference_budget = str(parse_budget(config.inference_budget))  # one spelling, for records and names
    if config.class_labels not in (["random"], ["balanced"]):
        for label in config.class_labels:
            if not label.isdigit():
                raise UserError(f"--class-labels {label}: not random, balanced or class ids below {config.num_classes}")
        checks.check_labels(config, "--class-labels", [int(label) for label in config.class_labels])
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
    labels, g = labels_of(config, indices), session.guidance(config)
    return decode(vae, session.sample(config, g, model, shape, config.global_seed, indices, labels, on_stage))


def generate(config: GenerateConfig, found: weights.Weights) -> Path:
    """Draw what is missing of the images 0 … num_fid_samples − 1, then write the .npz. Returns the folder of the images."""
    on_cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    if int(os.environ.get("WORLD_SIZE", 1)) != state.num_processes:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {state.num_processes} process(es) run; start with torchrun"
        )
    session.set_precision(config, state.device, _warn)
    model, vae, shape = session.load(config, found, state.device)

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
            writing[:] = [pool.submit(write_image, folders[stage], i, image) for i, image in pairs]

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
        flops = cost.mean_flops_per_step(config, session.guidance(config), model)
        print(f"{flops / 1e9:.2f} GFLOPs per image and step, guidance included")
    state.wait_for_everyone()


def _warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"generate.py: warning: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
