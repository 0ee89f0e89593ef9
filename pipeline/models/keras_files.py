"""Reads Keras checkpoints (`.h5`) of MobileNetV2 under timm's names.

Keras's MobileNetV2 is TensorFlow's: padding `same`, BatchNorm with ε 1e-3, input scaled to [-1, 1]. Build the model to
match: `model.args: {pad_type: same, bn_eps: 0.001}` and `preprocess.mean = std = 0.5`.
"""

__all__ = ["read_mobilenetv2"]

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import WeightsError

if TYPE_CHECKING:
    import h5py

# Inverted residuals in each stage of MobileNetV2 (Sandler et al. 2018, table 2).
_REPEATS = (1, 2, 3, 4, 3, 3, 1)
_TENSORS = {
    "beta": "bias",
    "bias": "bias",
    "depthwise_kernel": "weight",
    "gamma": "weight",
    "kernel": "weight",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_OUTSIDE = {"Conv1": "conv_stem", "bn_Conv1": "bn1", "Conv_1": "conv_head", "Conv_1_bn": "bn2"}
_INSIDE = {
    "expand": "conv_pw",
    "expand_BN": "bn1",
    "depthwise": "conv_dw",
    "depthwise_BN": "bn2",
    "project": "conv_pwl",
    "project_BN": "bn3",
}
# The first block has no expansion, so timm's layers in it move up by one.
_FIRST = {"depthwise": "conv_dw", "depthwise_BN": "bn1", "project": "conv_pw", "project_BN": "bn2"}
_BLOCK = re.compile(r"(?:expanded_conv|block_(\d+))_(\w+)")


def read_mobilenetv2(path: Path) -> dict[str, Tensor]:
    """The tensors of a Keras MobileNetV2, with whatever dense classifier it ends in, by timm's names.

    Args:
        path: A `.h5` file written by `model.save` or `model.save_weights`.

    Raises:
        WeightsError: h5py is not installed, the file is unreadable, or it holds another network.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise WeightsError(f"{path} is a Keras file, and h5py is not installed", hint="pip install h5py") from error
    try:
        with h5py.File(path, "r") as file:
            found: dict[str, Tensor] = {}
            file.get("model_weights", file).visititems(lambda name, node: _collect(name, node, found, path))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read as a Keras file: {error}", hint="fetch it again") from error
    return found


def _collect(name: str, node: "h5py.Dataset | h5py.Group", found: dict[str, Tensor], path: Path) -> None:
    if not hasattr(node, "shape"):
        return
    *_, layer, tensor = name.split("/")
    tensor = tensor.partition(":")[0]
    target = _timm_layer(layer)
    if target is None or tensor not in _TENSORS:
        raise WeightsError(
            f"{path} holds '{name}', which no MobileNetV2 has",
            hint="only Keras's MobileNetV2 is read; convert other networks to a PyTorch state dict",
        )
    found[f"{target}.{_TENSORS[tensor]}"] = torch.from_numpy(_to_torch_layout(np.asarray(node), layer))


def _timm_layer(layer: str) -> str | None:
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    match = _BLOCK.fullmatch(layer)
    if match is None:
        return "classifier" if layer.startswith(("dense", "predictions")) else None
    index = int(match[1] or 0)
    inside = (_INSIDE if index else _FIRST).get(match[2])
    for stage, repeats in enumerate(_REPEATS):
        if index < repeats:
            return f"blocks.{stage}.{index}.{inside}" if inside else None
        index -= repeats
    return None


def _to_torch_layout(values: Any, layer: str) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Kernels from [H, W, in, out] to [out, in, H, W]; depthwise ones from [H, W, C, 1] to [C, 1, H, W]."""
    if values.ndim == 4:
        values = values.transpose((2, 3, 0, 1) if layer.endswith("depthwise") else (3, 2, 0, 1))
    elif values.ndim == 2:
        values = values.T
    return np.ascontiguousarray(values, dtype=np.float32)
