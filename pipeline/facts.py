"""Facts about the machine that results depend on: which data set is there, which weights, which host.

They are gathered once, before planning, so that planning stays pure and a cached result is never taken for one
of another data set, other weights or another processor.
"""

__all__ = ["gather"]

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.recipe import Recipe
from pipeline.versions import installed

if TYPE_CHECKING:
    from pipeline.data.datasets import Resolved


def gather(recipe: Recipe, *, say: Callable[[str], None]) -> dict[str, str]:
    """Looks up the facts for a recipe; obtains the data set where it has to be fetched.

    Args:
        recipe: The checked recipe.
        say: Told what is being downloaded, which may take a minute.

    Returns:
        `data`: name of the data set that is there; `weights`: where weights will come from; `host`: processor
        and runtime versions.

    Raises:
        DataError: Neither the data set nor its fallback is there.
        ModelError: The model is unknown.
        WeightsError: There are no such weights, or their file is missing.
    """
    from pipeline.data import datasets

    data = datasets.resolve_once(recipe.data.name, recipe.data.root, recipe.data.fallback, say=say)
    return {"data": _data(data), "weights": _weights(recipe), "host": _host()}


def _data(resolved: "Resolved") -> str:
    """The set's name; for photos gathered from packages also which packages, since others give other splits."""
    return f"{resolved.name} ({resolved.note})" if resolved.name == "photos" else resolved.name


def _weights(recipe: Recipe) -> str:
    """The source that will serve, with version or SHA-256, so that changed weights are not taken for the old."""
    from pipeline.models import weights, zoo

    zoo.check_name(recipe.model.name)
    return weights.choose(recipe.model.name, recipe.model.weights)


def _host() -> str:
    runtimes = " ".join(f"{name} {installed(name) or '-'}" for name in ("ai-edge-litert", "onnxruntime"))
    return f"{_processor()} x{os.cpu_count()} {runtimes}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
