"""A reference batch from one's own images, in ADM's format: statistics of all of them, and some of them for the neighbours."""

from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState

import randomness
from common.errors import UserError
from common.files import check_folder, make_folder
from config.tool_options import ReferenceConfig
from metrics.evaluation import load_networks
from metrics.features import IN_FILE, Features, gather, read_batches
from metrics.images import open_images, write_npz


def make_reference(config: ReferenceConfig, state: PartialState, warn: Callable[[str], None]) -> None:
    """Write `config.dest`: arr_0, mu, sigma, mu_s, sigma_s, and mu_dinov2, sigma_dinov2 where they are asked for."""
    dest = Path(config.dest)
    if dest.suffix != ".npz" or dest.exists():
        raise UserError(
            f"--dest {dest}: {'exists already' if dest.exists() else 'its name must end in .npz'}; give a new .npz file"
        )
    check_folder("--dest: the folder", dest.parent)
    images = open_images(config.source)
    if images.count < 2:
        raise UserError(f"--source {images.path}: holds {images.count} image(s); statistics need at least 2")
    if state.is_main_process:
        images.check()
    state.wait_for_everyone()
    features = Features(images, {"pool", "spatial"} | ({"dinov2"} if config.dino else set()), set())
    used = load_networks(config, features.wanted, [images], state, warn)
    gather(features, used, read_batches(features, config.batch_size, state), config.batch_size, state, "reference")
    if not state.is_main_process:
        return
    order = randomness.generator("reference", config.seed, 0).permutation(images.count)
    chosen = sorted(order[: config.num_images].tolist())
    statistics = {name: a for kind in features.gathered for name, a in zip(IN_FILE[kind], features.gaussian(kind), strict=True)}
    make_folder(dest.parent)
    images.sha256()  # which finds damage, too
    height, width = images.size
    write_npz(dest, (len(chosen), height, width, 3), (images.read(range(i, i + 1)) for i in chosen), statistics)
    print(f"{dest}: {len(chosen)} of {images.count} images, {', '.join(statistics)}")
