"""Makes `import torchvision` work beside a torch of another build.

The package index serves a CUDA build of torchvision. Beside a CPU build of torch its compiled half does not load,
and `import torchvision` (and with it `import timm`) ends with `operator torchvision::nms does not exist`: the
Python half registers a meta kernel for operators that were never defined. Defining the two operators is enough:
transforms, data sets and models are plain Python. `nms` itself and torchvision's own image decoders stay
unusable, and layerfold uses neither (it decodes with Pillow).
"""

__all__ = ["is_mismatched", "repair"]

import importlib
import sys

_MISSING = "torchvision::nms does not exist"
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# The library object must outlive the process's use of the operators: torch undefines them when it is collected.
_keep_alive: list[object] = []


def repair() -> bool:
    """Imports torchvision, defining its missing operators where the import fails for want of them.

    Returns:
        Whether this process runs beside a mismatched torchvision (and the repair is in force).

    Raises:
        RuntimeError, ImportError: torchvision fails to import for any other reason.
    """
    if _keep_alive:
        return True
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
        _define_operators()
        importlib.import_module("torchvision")
    return bool(_keep_alive)


def is_mismatched() -> bool:
    """Whether torchvision's compiled half does not fit this torch (imports both)."""
    return repair()


def _define_operators() -> None:
    import torch

    # The failed import left half-initialised modules behind, which a second import would take for whole ones.
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(operator + _SIGNATURE)  # type: ignore[no-untyped-call]
    _keep_alive.append(library)
