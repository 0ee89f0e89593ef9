"""Looks inside a file while it runs: the value of every intermediate tensor, by name."""

__all__ = ["Observer", "Observation", "observe_onnx", "observe_tflite", "regrouped"]

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import ExportError
from pipeline.export import flatbuffer
from pipeline.export.extras import require
from pipeline.export.input_format import is_channels_last
from pipeline.export.onnx_files import load_onnx
from pipeline.export.ports import Port, encoder, lay_out
from pipeline.export.quiet import quietly

# What ONNX Runtime's quantiser calls the value behind a pair of QuantizeLinear and DequantizeLinear.
_ROUNDED = "_DequantizeLinear_Output"
Observation = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Observer:
    """A file opened for watching.

    Attributes:
        watch: Runs one batch [N, C, H, W] of the file's own batch size and returns every float tensor that was
            computed, real-valued also where the file is quantised. The arrays are copies.
        batch: The file's batch size.
        ends: Names of the graph's input and output tensors.
    """

    watch: Callable[[npt.NDArray[np.float32]], Observation]
    batch: int
    ends: tuple[str, ...]


def regrouped(images: Iterable[npt.NDArray[np.float32]], size: int) -> Iterator[tuple[npt.NDArray[np.float32], int]]:
    """Regroups batches of any size into those that a file of a fixed batch size takes.

    Args:
        images: Batches [N, C, H, W] of any N.
        size: The file's batch size.

    Yields:
        A batch of `size` images, and how many of them are real: the last image is repeated to fill the last batch.
    """
    held: list[npt.NDArray[np.float32]] = []
    for batch in images:
        held.extend(np.asarray(batch, dtype=np.float32))
        while len(held) >= size:
            yield np.stack(held[:size]), size
            held = held[size:]
    if held:
        yield np.stack(held + [held[-1]] * (size - len(held))), len(held)


def observe_tflite(path: Path | str, threads: int = 2) -> Observer:
    """Opens a `.tflite` file so that intermediate tensors outlive the inference.

    Raises:
        ExportError: The file is missing or damaged, or the `tflite` extra is not installed.
    """
    file = Path(path)
    computed = _computed_tensors(file)
    runtime = require("ai_edge_litert.interpreter", extra="tflite")
    with quietly(f"open {file.name} with LiteRT"):
        interpreter = runtime.Interpreter(
            model_path=str(file), num_threads=threads, experimental_preserve_all_tensors=True
        )
        interpreter.allocate_tensors()
        source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        ports = {
            item["name"]: (item["index"], Port.of_tflite(item))
            for item in interpreter.get_tensor_details()
            if item["name"] in computed
        }
    entrance = Port.of_tflite(source)
    encode = encoder(file, entrance, channels_last=True)

    def watch(images: npt.NDArray[np.float32]) -> Observation:
        arranged = lay_out(images, entrance, channels_last=True, file=file.name)
        interpreter.set_tensor(source["index"], np.ascontiguousarray(encode(arranged)))
        interpreter.invoke()
        return {name: port.decode(interpreter.get_tensor(index)) for name, (index, port) in ports.items()}

    return Observer(watch, int(source["shape"][0]), (source["name"], target["name"]))


def _computed_tensors(file: Path) -> set[str]:
    model = flatbuffer.read(file)
    graph = model.subgraphs[0]
    indices = {int(index) for operator in graph.operators for index in operator.outputs}
    indices.update(int(index) for index in graph.inputs)
    return {
        flatbuffer.tensor_name(graph.tensors[index])
        for index in indices
        if flatbuffer.type_name(graph.tensors[index].type) in {"FLOAT32", "INT8", "UINT8"}
    }


def observe_onnx(path: Path | str, threads: int = 2) -> Observer:
    """Opens an `.onnx` file with every float tensor as an extra output.

    Raises:
        ExportError: The file is missing or damaged, or the `onnx` extra is not installed.
    """
    file = Path(path)
    onnx, runtime = require("onnx", extra="onnx"), require("onnxruntime", extra="onnx")
    loaded = load_onnx(file)
    with quietly(f"open {file.name} with ONNX Runtime"):
        model = onnx.shape_inference.infer_shapes(loaded)
        floats = [
            value for value in model.graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        ]
        computed = {name for node in model.graph.node for name in node.output}
        graph_outputs = {value.name for value in model.graph.output}
        # Quantisers leave the types of values behind that they have removed.
        watched = [value for value in floats if value.name in computed - graph_outputs]
        model.graph.output.extend(watched)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        source = session.get_inputs()[0]
        if not all(isinstance(size, int) for size in source.shape):
            raise ExportError(
                f"{file.name}: its input '{source.name}' has the shape {source.shape}, expected fixed sizes",
                hint="export the model with static shapes",
            )
        port = Port(tuple(source.shape), np.dtype(np.uint8 if source.type == "tensor(uint8)" else np.float32))
        channels_last = is_channels_last(file)
        encode = encoder(file, port, channels_last)
        ends = (source.name, session.get_outputs()[0].name)
        names = [value.name for value in watched if not value.name.endswith(_ROUNDED)] + [ends[1]]
        # What a quantised file hands on is the value after rounding, which also does the work of a removed Clip.
        fetched = [f"{name}{_ROUNDED}" if f"{name}{_ROUNDED}" in computed else name for name in names]

    def watch(images: npt.NDArray[np.float32]) -> Observation:
        encoded = np.ascontiguousarray(encode(lay_out(images, port, channels_last=channels_last, file=file.name)))
        values = dict(zip(names, session.run(fetched, {source.name: encoded}), strict=True))
        return {ends[0]: encoded.astype(np.float32), **values}

    return Observer(watch, int(source.shape[0]), ends)
