"""Images to VAE latents, on any number of processes, and loose latents to packed ones.

The VAE sees fixed blocks of images by index, so that its latents are the same bits whatever the number of processes, and after
any stop.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common import image_files
from common.distributed import start_processes
from common.files import DataError
from common.precision import set_tf32
from config.tool_options import EncodeConfig
from models.autoencoders import class_of
from models.vae import encode_moments, load_vae
from preprocessing.latent_output import Plan, fill, open_dest
from preprocessing.source import image_numbers, list_images, open_source

if TYPE_CHECKING:
    pass


def encode(config: EncodeConfig) -> None:
    """Images → `00000/img-mean-std-00000000.npy` … (or packed files): (2C, h, w), mean and std of the VAE's posterior.

    Of an autoencoder without a posterior (C, h, w). With --flip two of them: the image's, then its mirror image's.
    """
    source = open_source(config.source, config.dest)
    names, labels = list_images(source, config.max_images)
    targets = [f"{i // 1000:05d}/img-mean-std-{i:08d}.npy" for i in image_numbers(names)]
    first = image_files.read_image(source, names[0]).shape  # (H, W, 3)
    made_by = {"vae": config.vae, "dtype": config.dtype, "flip": config.flip}
    making = {"command": "encode", "source": str(source.path.resolve()), **made_by}
    # They meet again at the end alone, and that of the slowest may be hours after that of the quickest.
    state = start_processes(config.timeout_minutes)
    with open_dest(Path(config.dest), making, targets, config.shard_size if config.packed else None, state) as dest:
        set_tf32(False)  # the latents are promised in float32
        vae, record = load_vae(config.vae, state.device or "cpu")
        factor = record.downsample_factor
        class_of(record.vae_class, "").check_pixels(vae, first[0], first[1], source.where(names[0]))
        shape = (record.stored_channels, first[0] // factor, first[1] // factor)
        shape = (2, *shape) if config.flip else shape
        plan = Plan(targets, labels, record, shape, np.dtype(config.dtype), config.batch_size)

        def read(block: range) -> np.ndarray:
            images = [image_files.read_image(source, names[i]) for i in block]
            for i, image in zip(block, images, strict=True):
                if image.shape != first:
                    raise DataError(
                        f"{source.where(names[i])}: has {image.shape[1]}x{image.shape[0]} pixels, but {names[0]} {first[1]}x{first[0]}; "
                        "`dataset_tools.py convert` makes them one size"
                    )
            return np.stack(images)

        def moments(images: np.ndarray) -> np.ndarray:
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            plain = encode_moments(vae, pixels).cpu().numpy()  # (B, 2C, h, w)
            return np.stack([plain, encode_moments(vae, pixels.flip(-1)).cpu().numpy()], axis=1) if config.flip else plain

        fill(dest, plan, state, read, moments, config.workers, "encode")
        state.wait_for_everyone()
        if state.is_main_process:
            dest.finish(plan)
            print(f"{config.dest}: {len(names)} latents of {'x'.join(map(str, shape))} by {record.vae}")
    state.wait_for_everyone()
    state.destroy_process_group()
