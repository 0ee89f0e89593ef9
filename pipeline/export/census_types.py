"""What a census of an exported file says, whatever the format."""

__all__ = ["Census", "Port", "WeightRange"]

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Port:
    """An input or output of the file."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class WeightRange:
    """How one layer's weights spread over its output channels.

    Attributes:
        name: The layer.
        channels: Output channels.
        largest: The largest absolute weight.
        spread: The largest absolute weight over the median channel's: what a single scale for the tensor wastes.
    """

    name: str
    channels: int
    largest: float
    spread: float

    @classmethod
    def of(cls, name: str, weight: npt.NDArray[np.float32], axis: int) -> "WeightRange":
        """Measures a weight tensor whose output channels lie along `axis`."""
        channels = np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)).max(axis=1)
        median = float(np.median(channels))
        largest = float(channels.max())
        return cls(name, len(channels), largest, largest / median if median > 0 else float("inf"))


@dataclass(frozen=True)
class Census:
    """What a file holds.

    Attributes:
        file: The file's name.
        format: ``"tflite"``, ``"onnx"`` or ``"executorch"``.
        bytes: Its size.
        ops: Count by operator type.
        fused_activations: Count by activation, for those inside another operator (ONNX has none).
        inputs, outputs: The graph's ends.
        quantized: Whether the file holds quantised tensors.
        float_tensors: Tensors computed in float inside a statically quantised file, its ends excepted.
        weights: Range of each layer's float weights, real-valued also where they are stored as int8.
        metadata: What `pipeline.export.metadata` wrote into the file.
    """

    file: str
    format: str
    bytes: int
    ops: dict[str, int]
    fused_activations: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    quantized: bool
    float_tensors: tuple[str, ...]
    weights: tuple[WeightRange, ...]
    metadata: dict[str, Any]

    def count(self, *ops: str) -> int:
        """How many operators of these types the file holds."""
        return sum(self.ops.get(name, 0) for name in ops)

    def as_dict(self) -> dict[str, Any]:
        """The census as JSON-ready values; an infinite spread becomes None."""
        weights = [
            {key: None if value == math.inf else value for key, value in asdict(w).items()} for w in self.weights
        ]
        return {**asdict(self), "weights": weights}
