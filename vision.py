"""torchvision beside any build of PyTorch, for timm, torch-fidelity and diffusers, which import it.

PyPI's Linux wheel of torchvision carries detection operators built for CUDA. Beside a CPU-only PyTorch they cannot be loaded, and
the import stops at the first of them ("operator torchvision::nms does not exist"). Nothing here uses those operators: it is
enough that their names exist.
"""

import sys

import torch

_DETECTION = ("nms", "qnms")  # the operators that torchvision describes on import, whether it could load them or not
_declared: list[torch.library.Library] = []  # kept alive: a declaration ends with its Library


def import_torchvision() -> None:
    """Import torchvision. To be called before `timm`, `torch_fidelity` or `diffusers` is imported."""
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in _DETECTION:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision  # noqa: F401
