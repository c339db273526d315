"""The kinds of guidance that the tools compare and the page offers, by name."""

from typing import Any

import models
from samplers import Guidance
from sampling import session

KINDS = {"CFG": "CFG", "CCFG": "cheap CFG", "AutoG": "autoguidance", "Guide": "guide"}


def kinds_of(config: Any) -> dict[str, str]:
    """Those that the options and the model allow: name → what it is called."""
    allowed = {
        "CFG": True,
        "CCFG": models.model_spec(config.model).elastic,
        "AutoG": models.model_spec(config.model).elastic,
        "Guide": config.guide_ckpt is not None,
    }
    return {kind: title for kind, title in KINDS.items() if allowed[kind]}


def guidance_of_kind(config: Any, kind: str, cfg_scale: float) -> Guidance:
    """One of the kinds of guidance, at a scale; all else by the options."""
    return session.guidance(
        config,
        cfg_scale=cfg_scale,
        unconditional_inference_budget=config.unconditional_inference_budget if kind in ("CCFG", "AutoG") else None,
        autoguidance=kind == "AutoG",
        guide_label=config.guide_label if kind == "Guide" else None,
    )
