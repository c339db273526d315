"""Loose latents to a few large files that training memory-maps."""

from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import DataError
from config.tool_options import PackConfig
from data import latent_files
from preprocessing.latent_output import Alone, Plan, fill, open_dest

PACK_BLOCK = 256  # latents between two marks of progress


def pack(config: PackConfig) -> None:
    """`vae-sd/` or `vae-sd.zip` → a few large files that training maps (packed.py), in the same order."""
    source, dest_path = Path(config.source), Path(config.dest)
    latents = latent_files.LatentFiles(source)
    if source.resolve() in (dest_path.resolve(), *dest_path.resolve().parents):
        raise UserError(f"--dest {config.dest}: lies inside --source {config.source}")
    dtype = latents.dtype if config.dtype == "same" else np.dtype(config.dtype)
    making = {"command": "pack", "source": str(source.resolve()), "dtype": str(dtype)}
    names = [latents.name(i) for i in range(len(latents))]
    labels = None if latents.labels is None else latents.labels.tolist()
    plan = Plan(names, labels, latents.record, latents.stored_shape, dtype, PACK_BLOCK)

    def read(block: range) -> np.ndarray:
        arrays = [latents.array(i, latents.stored_shape) for i in block]
        for i, array in zip(block, arrays, strict=True):
            if config.dtype == "same" and array.dtype != dtype:
                raise DataError(f"{latents.where(i)}: holds {array.dtype}, but {latents.where(0)} {dtype}; give --dtype")
        return np.stack(arrays)

    state = Alone()
    with open_dest(dest_path, making, names, config.shard_size, state) as dest:
        fill(dest, plan, state, read, lambda moments: moments, config.workers, "pack")
        dest.finish(plan)
    print(f"{config.dest}: {len(names)} latents of {'x'.join(map(str, latents.stored_shape))}, {dtype}")
