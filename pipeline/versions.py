"""Versions of the software that a result depends on, read from the installed distributions' metadata."""

__all__ = ["installed", "stack"]

from importlib import metadata

import pipeline

_STACK = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "litert-torch",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "onnxslim",
    "executorch",
)


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def stack() -> dict[str, str]:
    """Versions of layerfold and of every library that computes or converts; absent ones are left out."""
    found = {name: version for name in _STACK if (version := installed(name)) is not None}
    return {"layerfold": pipeline.__version__, **found}
