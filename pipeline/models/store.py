"""Models on disk: one `.pt` file with the module, its shape and where it came from.

The file holds the pickled module, because a folded network has a graph of its own that no constructor makes. Like
every pickle it can run code when it is read: open only files that you or layerfold wrote.
"""

__all__ = ["FORMAT", "StoredModel", "load", "save"]

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.artifacts import write_atomic
from pipeline.errors import ModelError

FORMAT = "layerfold-model-1"
"""Mark of the files that `save` writes."""


@dataclass(frozen=True)
class StoredModel:
    """A model read from disk, in eval mode, on the CPU.

    Attributes:
        module: The network, Tensor[N, 3, input_px, input_px] → Tensor[N, num_classes].
        meta: Plain data that was saved with it: `name`, `num_classes`, `input_px`, `preprocess`, …
    """

    module: nn.Module
    meta: Mapping[str, Any]


def save(path: Path, module: nn.Module, meta: Mapping[str, Any]) -> None:
    """Writes a model in one step: the file is the old one or the new one, never half.

    Args:
        path: Where to, usually `*.pt`.
        module: The network; written as it is, on the CPU.
        meta: Plain data to keep with it.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "meta": dict(meta), "module": module.cpu().eval()}, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path) -> StoredModel:
    """Reads a model that `save` wrote.

    Raises:
        ModelError: The file is missing, damaged, or holds something else.
    """
    import pipeline.models.zoo  # noqa: F401  repairs torchvision before the pickle imports timm

    try:
        payload = torch.load(path, map_location="cpu", weights_only=False)
    except FileNotFoundError as error:
        raise ModelError(f"no model file {path}", hint="give the path of a .pt file that layerfold wrote") from error
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{path} holds a module whose code is not to be found here: {error}",
            hint="install what defines it, or make the file anew with this version of the libraries",
        ) from error
    # A damaged file leads the unpickler anywhere: BadZipFile, IndexError, struct.error, AssertionError, TypeError, …
    except Exception as error:
        raise ModelError(
            f"{path} is no readable model file: {str(error) or type(error).__name__}",
            hint="make it anew; it may be cut short",
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise ModelError(
            f"{path} is a PyTorch file, but not a layerfold model",
            hint="load state dicts through a recipe's model.weights instead",
        )
    module, meta = payload.get("module"), payload.get("meta")
    if not isinstance(module, nn.Module) or not isinstance(meta, dict):
        raise ModelError(f"{path} holds no module with its description", hint="make it anew with `layerfold run`")
    return StoredModel(module.eval(), meta)
