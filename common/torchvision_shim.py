"""torchvision beside any build of PyTorch, for timm and torch-fidelity, which import it.

PyPI's Linux wheel of torchvision carries detection operators built for CUDA. Beside a CPU-only PyTorch they cannot be loaded, and
the import stops at the first of them ("operator torchvision::nms does not exist"). Nothing here uses those operators: it is
enough that their names exist.

    python -m common.torchvision_shim

repairs an environment once, for programs that are not ours too: `accelerate launch` imports timm, and so torchvision. Where
torchvision can be imported, it changes nothing.
"""

import sys
import sysconfig
from pathlib import Path

NAME = "torchvision_beside_cpu_torch"  # of the module that `repair` puts among the environment's packages


# Runs at the start of every program of a repaired environment, so it waits until torchvision is imported.
HOOK = '''"""Names the operators that PyPI's torchvision cannot load beside a CPU-only PyTorch, when torchvision is imported."""

import sys
from importlib.metadata import version


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and "+" not in version("torchvision"):
                declare(torch)


def declare(torch):
    global library  # a declaration ends with its Library
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):  # those that torchvision describes on import, whether it could load them or not
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Finder())
'''


_hook = {"__name__": NAME}  # kept, and the declarations with it


def import_torchvision() -> None:
    """Import torchvision. To be called before a library is imported that does so: timm, torch_fidelity, diffusers."""
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        exec(HOOK, _hook)
        import torchvision  # noqa: F401


def repair(folder: Path) -> bool:
    """Make `import torchvision` work for every program of the environment with these site-packages; says if it was needed."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        (folder / f"{NAME}.py").write_text(HOOK)
        (folder / f"{NAME}.pth").write_text(f"import {NAME}\n")
        return True
    return False


if __name__ == "__main__":
    if repair(Path(sysconfig.get_path("purelib"))):
        print(f"{sys.prefix}: torchvision can be imported beside this CPU-only PyTorch from now on")
