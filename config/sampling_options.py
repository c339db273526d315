"""Groups of sampling options: prompts, another network that guides, and the core cache."""

import dataclasses
from typing import Literal

from config.rules import option


@dataclasses.dataclass
class PromptOptions:
    """What models conditioned on text are told. The images depend on the prompts and on the encoder's weights."""

    prompt: list[str] | None = option(
        "sample",
        None,
        "text models: one or several prompts",
        whole=True,
        long=True,
        images=False,
        folder=(20, ""),
    )
    prompts: str | None = option(
        "sample",
        None,
        "text models: file with a prompt in each line, or data folder, whose captions and text features are taken",
        images=False,
        folder=(21, "prompts"),
    )
    text_encoder: str | None = option(
        "checkpoint",
        None,
        "text models: encoder of the prompts, as of dataset_tools.py text (default: the checkpoint's record)",
        images=False,
    )


@dataclasses.dataclass
class GuideOptions:
    """What guides the model, beside its own passes, and where."""

    cfg_channels: int | None = option(
        "guidance",
        None,
        "guide only the first so many latent channels (3: as SiT's and DiT's published samples; default: all)",
        ge=1,
        le=2**16,
        images=True,
        folder=(12, "channels"),
    )
    guide_ckpt: str | None = option(  # its SHA-256 is what the images depend on
        "guidance",
        None,
        "checkpoint of another network, whose velocity is the weaker one that guidance starts from",
        images=False,
        folder=(13, "guide"),
    )
    guide_weights: str = option(
        "guidance", "ema", "which weights of the guide: ema, ema:DECAY or model", images=True, folder=(14, "")
    )
    guide_label: Literal["same", "none"] = option(
        "guidance", "same", "label of the guide: the image's, or none (its null label)", images=True, folder=(15, "label")
    )
    guide_budget: float | None = option(
        "guidance", None, "budget of an ELIT guide (default: all latents)", gt=0, le=1, images=True, folder=(16, "at")
    )


@dataclasses.dataclass
class CoreCacheOptions:
    """When a step reuses what the core added in an earlier one."""

    core_cache: float = option(
        "sample",
        0.0,
        "reuse what the core added last until this relative change, e.g. 0.1; 0: the core always runs",
        ge=0,
        le=1e4,
        images=True,
        folder=(17, "cache"),
    )
    cache_rule: Literal["time", "head"] = option(
        "sample",
        "time",
        "change of the time embedding (the same for all images), or of the head's output (for each image)",
        images=True,
        folder=(18, "by"),
    )
    cache_after: int | None = option(
        "sample",
        None,
        "models without ELIT: blocks before those that are reused (default: 1; HDiT: its outer levels)",
        ge=0,
        le=1000,
        images=True,
        folder=(19, "after"),
    )
