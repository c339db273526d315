"""Options of web_demo.py."""

import dataclasses
from typing import Literal

from config.options import InferenceTool
from config.rules import option

QUICKSTART = "quickstart/quickstart/checkpoints/0002700.pt"


@dataclasses.dataclass
class WebDemoConfig(InferenceTool):
    """Options of web_demo.py: a page with a budget slider. Those of sampling and guidance are what the page starts with."""

    ckpt: str = option("checkpoint", QUICKSTART, "checkpoint, as of generate.py (default: the quick start's)", images=False)
    class_label: list[int] = option("sample", [0], "class id", ge=0)
    inference_budget: float | None = option(
        "sample", None, "where the slider stands: share of the latents to compute (default: a quarter)", gt=0, le=1
    )
    cfg_scale: float = option("guidance", 1.5, "guidance scale; 1: none", ge=1, le=1e4)
    guidance_kind: Literal["CFG", "CCFG", "AutoG", "Guide"] | None = option(
        "guidance",
        None,
        "CFG, cheap CFG, autoguidance, or the network of --guide-ckpt (default: Guide where that is given, else CFG)",
    )
    unconditional_inference_budget: float | None = option(
        "guidance", None, "budget of the guiding pass of CCFG and AutoG (default: the lowest from 1/16 on)", gt=0, le=1
    )
    autoguidance: bool = option("guidance", False, "no effect: --guidance-kind AutoG", hidden=True)
    attention_time: float = option("output", 0.5, "time t at which Read's attention is shown", ge=0, le=1)
    within_ms: float = option("output", 200.0, "milliseconds that an image may take, for the page's choice", gt=0, le=1e9)
    sweep_dir: str | None = option(
        "files", None, "folder of sweep.py's cells of this checkpoint (default: those beside it or in its run's folder)"
    )
    host: str = option("system", "127.0.0.1", "address to listen at; 0.0.0.0: whoever reaches this machine sees the page")
    port: int = option("system", 7860, "port to listen at", ge=1, le=65535)
