"""ELIT (arXiv 2603.12245) and diffusers: around its pretrained transformers, and our checkpoints as its pipelines.

`elastic = attach(pipeline.transformer)`, then `elastic.budget = 0.25`: the pipeline samples as before, and the transformer's core
works on a quarter of the image's tokens. `elastic.detach()`: the transformer as it was. See docs/text_to_image.md.

`ELITPipeline.from_checkpoint(path)(class_labels=[207], budget=0.25).images[0]`: see docs/checkpoints.md.
"""

from typing import TYPE_CHECKING, Any

from elit_diffusers.attach import ElasticTransformer, attach, load

if TYPE_CHECKING:
    from elit_diffusers.pipeline import ELITPipeline

__all__ = ["ELITPipeline", "ElasticTransformer", "attach", "load"]


def __getattr__(name: str) -> Any:
    """`ELITPipeline`, which imports diffusers, when it is asked for."""
    if name == "ELITPipeline":
        from elit_diffusers.pipeline import ELITPipeline

        return ELITPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
