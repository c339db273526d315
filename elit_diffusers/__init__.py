"""ELIT (arXiv 2603.12245) around pretrained transformers of diffusers, whose code stays as it is.

`elastic = attach(pipeline.transformer)`, then `elastic.budget = 0.25`: the pipeline samples as before, and the transformer's core
works on a quarter of the image's tokens. `elastic.detach()`: the transformer as it was. See docs/text_to_image.md.
"""

from elit_diffusers.attach import ElasticTransformer, attach, load

__all__ = ["ElasticTransformer", "attach", "load"]
