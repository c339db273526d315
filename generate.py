"""Many images from one checkpoint: an .npz for evaluation, and a folder of PNG.

`torchrun --nproc_per_node=N generate.py …` or plain `python generate.py …`. Image i depends on (global_seed, i) alone, so any
number of processes, batch size or restart gives the same set.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from checkpoint.weights import Weights
from common.distributed import end_with_launcher, start_processes
from common.errors import UserError, cli_main
from common.files import FolderLock, check_folder, check_name
from common.logging import warn
from config.options import GenerateConfig
from flows import flow_of
from sampling import checks, cost, session
from sampling.destination import Destination, destination
from sampling.image_folder import ImageWriter, images_folder, settings, write_captions
from sampling.images import images
from sampling.session import Session

if TYPE_CHECKING:
    from accelerate import PartialState


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → `generate`."""
    config, given, weights = session.from_command_line(GenerateConfig, argv, "generate.py", check_options)
    if weights.prompts is not None and "num_fid_samples" not in given:
        config.num_fid_samples = len(weights.prompts)
    name_run(config, weights)
    check(config)
    end_with_launcher()
    for option, reason in flow_of(config).ignored_options.items():
        if option in given:
            warn(f"--{option.replace('_', '-')} has no effect: {reason}")
    checks.warn_of_budgets(config)
    generate(config, weights)


def check_options(config: GenerateConfig) -> None:
    """Refuse what no checkpoint can be sampled with; nothing is read or downloaded before."""
    checks.check_generation(config)
    check_folder("--sample-dir", config.sample_dir)


def name_run(config: GenerateConfig, weights: Weights) -> None:
    """Fill in `exp_name`: the checkpoint's, else the model's name."""
    if config.exp_name is None:
        recorded = weights.config.get("exp_name") or config.model.replace("/", "-")
        config.exp_name = check_name(recorded, f"{config.ckpt}: exp_name (--exp-name gives another)", plain=True)


def check(config: GenerateConfig) -> None:
    """Refuse what the model cannot be sampled with, before anything is loaded or written."""
    check_options(config)
    checks.check_generation_model(config)
    if config.preview and not flow_of(config).preview_sides(config.resolution):
        raise UserError(f"--preview: {config.model} has no coarser stages; only DFM models do")
    if config.preview and config.no_png:
        raise UserError("--no-png: --preview writes PNG; leave one of them out")
    images_folder(config)


def generate(config: GenerateConfig, weights: Weights) -> Path:
    """Draw what is missing of the images 0 … num_fid_samples − 1, then write the .npz. Returns the folder of the images.

    Args:
        config: options that passed `check`, with the architecture and name filled in.
        weights: of the checkpoint.

    Raises:
        UserError: the folder holds other images or cannot be written, or latents are not finite.
    """
    state = start_processes(config.timeout_minutes)
    device = torch.device(state.device or "cpu")
    session.set_precision(config, device)
    loaded = session.load(config, weights, device)
    dest = destination(config)
    lock = lock_folder(config, settings(config, weights, loaded.vae_sha256) if state.is_main_process else {}, dest, state)
    try:
        with dest.npz:
            drawn, seconds = draw_missing(config, loaded, dest, state)
        for other in gather_object([loaded.drawn])[1:] if config.core_cache else []:
            loaded.drawn.add(other)
        if state.is_main_process:
            dest.npz.finish()
            if weights.prompts is not None and weights.prompts.words is not None:
                write_captions(dest.folder, weights.prompts.words, config.num_fid_samples)
            report(config, loaded, dest, drawn, seconds)
        state.wait_for_everyone()
    finally:
        if lock is not None:
            dest.close()
            lock.release()
    state.destroy_process_group()
    return dest.folder


def lock_folder(
    config: GenerateConfig, made_with: dict[str, Any], dest: Destination, state: "PartialState"
) -> FolderLock | None:
    """Keep other runs out of the folder, and open it; rank 0 does it, and all raise what it met."""
    folder, lock, error = dest.folder, None, ""
    if state.is_main_process:
        try:
            lock = FolderLock(folder.with_name(f"{folder.name}.lock"), folder, warn)
            dest.open(made_with)
        except UserError as refused:
            error = str(refused)
        except OSError as failed:
            error = f"--sample-dir {config.sample_dir}: cannot use {folder}: {failed}"
    (error,) = broadcast_object_list([error])
    if error:
        if lock is not None:
            lock.release()
        raise UserError(error)
    return lock


def draw_missing(config: GenerateConfig, loaded: Session, dest: Destination, state: "PartialState") -> tuple[int, float]:
    """Fill folders and npz, each process its share. Returns how many images were missing, and the seconds it took."""
    # Each process looks at its share of the files; all then agree on what is missing.
    own = range(state.process_index, config.num_fid_samples, state.num_processes)
    missing = sorted(gather_object(list(dest.missing(own, state))))
    start = time.perf_counter()
    with (
        ImageWriter() as writer,
        tqdm(total=len(missing), desc="generate", unit="image", disable=not state.is_main_process) as bar,
    ):

        def preview(indices: Sequence[int], stage: int, latents: Tensor) -> None:
            writer.write(dest.stages[stage][0], indices, loaded.decode(latents))

        share = images(loaded, config, missing, state.process_index, state.num_processes, preview if config.preview else None)
        for indices, drawn in share:
            writer.write(dest.png, indices, drawn, dest.npz)
            bar.update(min(len(indices) * state.num_processes, len(missing) - bar.n))
    state.wait_for_everyone()
    return len(missing), time.perf_counter() - start


def report(config: GenerateConfig, loaded: Session, dest: Destination, drawn: int, seconds: float) -> None:
    """Say what was drawn at what rate and cost."""
    rate = f", {drawn / seconds:.2f} images/s" if drawn else ""
    kept = config.num_fid_samples - drawn
    print(f"{dest}: {drawn} images drawn in {seconds:.1f} s{rate}; {kept} kept{dest.also}")
    if not config.core_cache:
        flops = cost.mean_flops_per_step(config, session.guidance(config), loaded.model, loaded.guide)
        print(f"{flops / 1e9:.2f} GFLOPs per image and step, guidance included")
    elif drawn:
        flops, ran = cost.drawn_flops_per_step(loaded, loaded.drawn), loaded.drawn
        print(
            f"{flops / 1e9:.2f} GFLOPs per image and step, guidance included: the core ran in {100 * ran.share:.1f}% of the passes "
            f"and reused what it had added in the others; the cache held {ran.cache_bytes / 2**20:.1f} MiB a process"
        )


if __name__ == "__main__":
    main()
