"""Options of train.py for its data: how latents are drawn and normalised."""

import dataclasses
from typing import Literal

from config.rules import option


@dataclasses.dataclass
class LatentOptions:
    """What a run makes of the latents of its data set."""

    latent_norm: Literal["vae", "channel", "position"] = option(
        "data",
        "vae",
        "latents by the VAE's own scale and shift, or by the statistics of each channel or position (`dataset_tools.py stats`)",
        resume="same",
    )
    flip: bool | None = option(
        "data", None, "draw each image or its mirror image (default: if the data set has both)", resume="changeable"
    )
