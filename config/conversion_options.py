"""Options of convert_checkpoint.py that make a pipeline of diffusers."""

import dataclasses
from typing import Literal

from config.rules import option


@dataclasses.dataclass
class PipelineOptions:
    """What is made of a checkpoint for others' code."""

    to: Literal["diffusers"] | None = option(
        "files", None, "diffusers: OUT is the folder of a pipeline, elit_diffusers.ELITPipeline, with the VAE and a model card"
    )
    figures: str | None = option(
        "files", None, "--to diffusers: folder of sweep.py or of the quick start (or a .md file), whose tables the card shows"
    )
