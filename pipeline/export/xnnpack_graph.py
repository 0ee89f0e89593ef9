"""The graph that a `.pte` file hands to XNNPACK, read out of the delegate's payload."""

__all__ = ["XnnpackGraph", "XnnpackNode", "payload_of"]

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ExportError
from pipeline.export.pte_files import load_executorch
from pipeline.export.quiet import quietly

_WEIGHTED = frozenset({"Conv2d", "DepthwiseConv2d", "FullyConnected"})
# What moves or re-expresses values without computing.
_CONVERSIONS = ("Convert", "Copy", "StaticReshape", "StaticTranspose")
_ELEMENTS: Mapping[str, np.dtype[Any]] = {
    "xnn_datatype_fp32": np.dtype(np.float32),
    "xnn_datatype_qint8": np.dtype(np.int8),
    "xnn_datatype_qcint8": np.dtype(np.int8),
}
_INTEGERS = frozenset({"xnn_datatype_qint8", "xnn_datatype_qcint8"})
_FLOAT = "xnn_datatype_fp32"


@dataclass(frozen=True)
class XnnpackNode:
    """One operator of the graph.

    Attributes:
        kind: XNNPACK's name of it, such as ``Conv2d``. A StaticTranspose that brings the image into XNNPACK's order
            says ``of the input``, one of a map without two pixels ``of one pixel``: neither can be avoided.
        activation: ``RELU`` or ``RELU6`` where one is fused into it; empty otherwise.
        output: The id of the value that it computes.
        weight: The id of its weights; None where it has none.
    """

    kind: str
    activation: str
    output: int
    weight: int | None

    @property
    def is_weighted(self) -> bool:
        """Whether it is a convolution or a fully connected layer."""
        return self.kind in _WEIGHTED

    @property
    def channel_axis(self) -> int:
        """The axis of the output channels in its weights."""
        return 3 if self.kind == "DepthwiseConv2d" else 0


@dataclass(frozen=True)
class XnnpackGraph:
    """What one delegate computes.

    Attributes:
        nodes: Its operators in order.
        values: Its tensors by id, as the flatbuffer's JSON form describes them.
        constants: Where its weights are: keys of `data`, by index.
        data: The program's named data.
        file: The file's name, for errors.
    """

    nodes: tuple[XnnpackNode, ...]
    values: Mapping[int, Mapping[str, Any]]
    constants: Sequence[str]
    data: Any
    file: str

    @classmethod
    def of(cls, payload: bytes, data: Any, file: str, *, first: bool = True) -> "XnnpackGraph":
        """Parses a delegate's payload.

        Args:
            payload: Header, flatbuffer and what follows.
            data: The program's named data, which holds the weights.
            file: The file's name, for errors.
            first: Whether it is the first graph of the file, to which the image goes.

        Raises:
            ExportError: It is no XNNPACK graph.
        """
        content = _as_json(payload, file)
        values = {}
        for item in content["xvalues"]:
            value = item["xvalue_union"]
            tensor = value.get("tensor_value", value)
            values[int(tensor["id_out"])] = {**tensor, "quant_params": value.get("quant_params") or {}}
        constants = [str(item.get("named_key", "")) for item in content.get("constant_data", ())]
        nodes: list[XnnpackNode] = []
        for item in content["xnodes"]:
            nodes.append(_node(item, values, before=first and not any(node.is_weighted for node in nodes)))
        return cls(tuple(nodes), values, constants, data, file)

    @property
    def holds_integers(self) -> bool:
        """Whether an operator computes in int8."""
        return any(self.values[node.output]["datatype"] in _INTEGERS for node in self.nodes if node.is_weighted)

    def computes_in_float(self, node: XnnpackNode) -> bool:
        """Whether an operator computes float values; mere conversions do not."""
        return self.values[node.output]["datatype"] == _FLOAT and not node.kind.startswith(_CONVERSIONS)

    def weight(self, node: XnnpackNode) -> npt.NDArray[np.float32]:
        """The real-valued weights of a node, in XNNPACK's layout.

        Raises:
            ExportError: The file does not hold them.
        """
        assert node.weight is not None
        tensor = self.values[node.weight]
        kind = _ELEMENTS.get(tensor["datatype"])
        if kind is None:
            raise ExportError(
                f"{self.file}: weights of type {tensor['datatype']}, expected float32 or int8",
                hint="export it with layerfold",
            )
        values = np.frombuffer(self._constant(tensor["constant_buffer_idx"]), dtype=kind)
        shaped = values[: int(np.prod(tensor["dims"]))].reshape(tensor["dims"]).astype(np.float32)
        quantised = tensor["quant_params"]
        if "scale_buffer_idx" in quantised:
            scale = np.frombuffer(self._constant(quantised["scale_buffer_idx"]), dtype=np.float32)
            shape = [1] * shaped.ndim
            shape[node.channel_axis] = -1
            return np.asarray(shaped * scale[: int(quantised["num_scales"])].reshape(shape), dtype=np.float32)
        return np.asarray(shaped * np.float32(quantised.get("scale", 1.0)), dtype=np.float32)

    def _constant(self, index: int) -> bytes:
        key = self.constants[index]
        entry = self.data.pte_data.get(key) if self.data is not None else None
        if entry is None:
            raise ExportError(f"{self.file} lacks the weights '{key[:12]}'", hint="export it again")
        return bytes(self.data.buffers[entry.buffer_index])


def payload_of(loaded: Any, delegate: Any) -> bytes:
    """The bytes that a parsed program hands to a delegate."""
    return bytes(loaded.program.backend_delegate_data[delegate.processed.index].data)


def _node(item: Mapping[str, Any], values: Mapping[int, Mapping[str, Any]], *, before: bool) -> XnnpackNode:
    """Reads an operator; `before` says that no layer of the network comes before it."""
    content = item["xnode_union"]
    limits = item.get("output_min_max") or {}
    span = (float(limits.get("output_min", "-inf")), float(limits.get("output_max", "inf")))
    activation = {(0.0, 6.0): "RELU6", (0.0, float("inf")): "RELU"}.get(span, "")
    weight = content.get("filter_id")
    kind = str(item["xnode_union_type"]).removeprefix("XNN").lstrip("_")
    if kind == "StaticTranspose":
        dims = values[int(content["input_id"])]["dims"]
        if before:
            kind += " of the input"
        elif sum(size > 1 for size in dims[1:]) <= 1:
            kind += " of one pixel"
    return XnnpackNode(kind, activation, int(content["output_id"]), None if weight is None else int(weight))


def _as_json(payload: bytes, file: str) -> Any:
    flatbuffer = load_executorch("executorch.exir._serialize._flatbuffer")
    graphs = load_executorch("executorch.backends.xnnpack.serialization.xnnpack_graph_serialize")
    serialization = load_executorch("executorch.backends.xnnpack.serialization")
    with quietly(f"read what {file} hands to XNNPACK"), tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        header = graphs.XNNHeader.from_bytes(payload[: graphs.XNNHeader.EXPECTED_LENGTH])
        start = header.flatbuffer_offset
        (folder / "graph.bin").write_bytes(payload[start : start + header.flatbuffer_size])
        schema = folder / "schema.fbs"
        schema.write_bytes(resources.files(serialization).joinpath("schema.fbs").read_bytes())
        flatbuffer._flatc_decompile(str(folder), str(schema), str(folder / "graph.bin"), ["--raw-binary"])
        # JSON has no infinity, but flatc writes one.
        content = re.sub(r"(?<=: )-?inf\b", lambda found: f'"{found[0]}"', (folder / "graph.json").read_text())
        return json.loads(content)
