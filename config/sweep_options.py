"""Options of sweep.py: any sampling option of generate.py becomes an axis by its name, with several values."""

import dataclasses
from typing import Any

from config.options import Architecture, GenerateConfig
from config.rules import folder_labels, names, option
from config.system_options import ProcessOptions
from config.tool_options import MetricOptions
from config.values import kinds


@dataclasses.dataclass
class SweepOptions(MetricOptions, Architecture, ProcessOptions):
    """Options of sweep.py: figures of one or several checkpoints over guidance, budgets, steps and any other sampling option."""

    ckpt: list[str] = option("checkpoint", ..., "one or several checkpoints, as of generate.py", whole=True, distinct=True)
    ref: list[str] = option(
        "files", ..., "reference: .npz in ADM's format or a folder of PNG; one for all checkpoints, or one for each", whole=True
    )
    seeds: list[int] = option(
        "sample", [0], "seeds of noise and labels: figures are means over them", ge=0, distinct=True, aliases=("global_seed",)
    )
    guidance_interval: list[str] = option(
        "guidance",
        [],
        "guidance intervals LOW-HIGH in t, e.g. 0-1 0.1-0.7 (default: --guidance-low to --guidance-high)",
        distinct=True,
    )
    num_fid_samples: int = option("metrics", 50000, "images of a cell", ge=2, le=10**7)
    coarse: int | None = option(
        "metrics", None, "score all cells with so many images, and then only the best three with all", ge=2, le=10**7
    )
    best_under: str | None = option(
        "output", None, "print the generate.py line of the best cell within a bound for one image: 500GFLOPs or 40ms"
    )
    keep_images: int = option("output", 0, "write the first so many images of each cell", ge=0, le=10**7)
    dest: str = option("files", "sweep", "folder of the cells, tables and plots; several jobs may share it")
    plan: bool = option("plan", False, "print the cells, their GFLOPs and the estimated time, and stop")


# Of generate.py, as they are there; those that change images are the same for all cells.
PROMPTS = ("prompt", "prompts", "text_encoder")
SHARED = ("config", "train_config", "vae", "tf32", "compile", "cuda_graphs", "per_proc_batch_size", *PROMPTS)
_FIXED = {*names(Architecture, resume="same"), *SHARED, "global_seed"}
_IN_FOLDERS = folder_labels(GenerateConfig)  # among them what is told by the hash of a file
AXES = tuple(
    f.name
    for f in dataclasses.fields(GenerateConfig)
    if (f.metadata["images"] or f.name in _IN_FOLDERS) and f.name not in _FIXED
)
DEFAULTS = {"class_labels": ["balanced"]}  # where a sweep's default is another than generate.py's


def _shared(name: str) -> tuple[str, Any, Any]:
    source = GenerateConfig.__dataclass_fields__[name]
    return name, source.type, dataclasses.field(default=source.default, metadata=source.metadata)


def _axis(name: str) -> tuple[str, Any, Any]:
    """Several values of an option, as text; of a switch, true and false."""
    source = GenerateConfig.__dataclass_fields__[name]
    kind = kinds(GenerateConfig)[name]
    default: Any = DEFAULTS.get(name, getattr(GenerateConfig(), name))
    shown = [",".join(map(str, default))] if kind.is_list else ["none" if default is None else default]
    shown = shown if kind.type is bool else [str(value) for value in shown]
    choices = f" ({', '.join(kind.choices)})" if kind.choices else ""
    metadata = source.metadata | {"whole": True, "distinct": True, "range": {}, "help": source.metadata["help"] + choices}
    return (
        name,
        list[bool] if kind.type is bool else list[str],
        dataclasses.field(default_factory=lambda: shown, metadata=metadata),
    )


SweepConfig: Any = dataclasses.make_dataclass(
    "SweepConfig",
    [*map(_shared, SHARED), *map(_axis, AXES)],
    bases=(SweepOptions,),
    namespace={"__doc__": SweepOptions.__doc__, "__module__": __name__},
)
