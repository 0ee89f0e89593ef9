"""Runs exported files through the runtimes that ship them: LiteRT, ONNX Runtime and ExecuTorch."""

__all__ = ["Predictor", "open_model"]

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import ExportError
from pipeline.export.extras import require
from pipeline.export.input_format import is_channels_last
from pipeline.export.ports import Port, encoder, lay_out
from pipeline.export.pte_files import FORWARD, load_executorch, load_pte
from pipeline.export.quiet import quietly

Images = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]


class Predictor(Protocol):
    """One opened file."""

    def predict(self, batch: Images) -> Logits:
        """Normalised images [N, C, H, W] to logits [N, classes], N as the caller likes, float32 both."""
        ...


def open_model(path: Path | str, threads: int = 2, *, tensorflow: bool = False) -> Predictor:
    """Opens a `.tflite`, `.onnx` or `.pte` file with its runtime, chosen by the suffix.

    The predictor hides what differs between files: the layout (NHWC or NCHW), the batch size written into the
    file, int8 or uint8 inputs and outputs. A file that takes raw uint8 pixels is given the pixels that its own
    metadata says the normalised images came from.

    Args:
        path: The file.
        threads: Threads of one inference; ExecuTorch has one pool a process and keeps the size that it chose.
        tensorflow: Run a `.tflite` file by TensorFlow's own interpreter instead of LiteRT's: a second opinion.

    Raises:
        ExportError: The file is missing, damaged, of another format, or needs an extra that is not installed.
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"no such file: {file}", hint="export it first")
    if file.suffix == ".tflite":
        return _File(file, *_open_tflite(file, threads, tensorflow))
    if file.suffix in {".onnx", ".ort"}:
        return _File(file, *_open_onnx(file, threads))
    if file.suffix == ".pte":
        return _File(file, *_open_executorch(file))
    raise ExportError(f"no runtime for '{file.suffix}' ({file.name})", hint="expected .tflite, .onnx, .ort or .pte")


_Invoke = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


class _File:
    """A predictor over one compiled inference of a fixed batch size."""

    def __init__(self, path: Path, invoke: _Invoke, source: Port, target: Port, channels_last: bool) -> None:
        self._path = path
        self._invoke = invoke
        self._source = source
        self._target = target
        self._channels_last = channels_last
        self._encode = encoder(path, source, channels_last)

    def predict(self, batch: Images) -> Logits:
        images = lay_out(
            np.asarray(batch, dtype=np.float32), self._source, channels_last=self._channels_last, file=self._path.name
        )
        encoded = self._encode(images)
        step = self._source.shape[0]
        outputs = [self._run(encoded[start : start + step], step) for start in range(0, len(encoded), step)]
        if not outputs:
            return np.empty((0, *self._target.shape[1:]), dtype=np.float32)
        return self._target.decode(np.concatenate(outputs))

    def _run(self, images: npt.NDArray[Any], step: int) -> npt.NDArray[Any]:
        missing = step - len(images)
        if missing:
            images = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        try:
            return self._invoke(np.ascontiguousarray(images))[: step - missing]
        except Exception as error:  # each runtime raises what it likes
            raise ExportError(
                f"{self._path.name} fails while it runs: {type(error).__name__}: {str(error)[:500]}",
                hint="the file is damaged, or its runtime lacks an operator: export it again",
            ) from error


def _open_tflite(path: Path, threads: int, tensorflow: bool) -> tuple[_Invoke, Port, Port, bool]:
    if tensorflow:
        runtime: Any = require("tensorflow", extra="tensorflow").lite
    else:
        runtime = require("ai_edge_litert.interpreter", extra="tflite")
    hint = "the file is damaged or was not written to its end: export it again"
    with quietly(f"open {path.name} with {'TensorFlow' if tensorflow else 'LiteRT'}", hint=hint):
        interpreter = runtime.Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
        source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def invoke(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        interpreter.set_tensor(source["index"], images)
        interpreter.invoke()
        result: npt.NDArray[Any] = interpreter.get_tensor(target["index"])
        return result

    return invoke, Port.of_tflite(source), Port.of_tflite(target), True


_ONNX_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


def _open_onnx(path: Path, threads: int) -> tuple[_Invoke, Port, Port, bool]:
    runtime = require("onnxruntime", extra="onnx")
    hint = "the file is damaged or was not written to its end: export it again"
    with quietly(f"open {path.name} with ONNX Runtime", hint=hint):
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # x86 without VNNI multiplies uint8 by int8 with saturating 16-bit sums unless told otherwise. Phones do
        # not saturate, so without this a correct file would look wrong on such a machine.
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        source, target = session.get_inputs()[0], session.get_outputs()[0]

    def invoke(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        result: npt.NDArray[Any] = session.run(None, {source.name: images})[0]
        return result

    return invoke, _onnx_port(path, source), _onnx_port(path, target), is_channels_last(path)


def _onnx_port(path: Path, value: Any) -> Port:
    kind = _ONNX_TYPES.get(value.type)
    if kind is None or not all(isinstance(size, int) for size in value.shape):
        raise ExportError(
            f"{path.name}: '{value.name}' is {value.type} {value.shape}, expected float or uint8 of a fixed shape",
            hint="export the model with static shapes",
        )
    return Port(tuple(value.shape), np.dtype(kind))


# The numbers of PyTorch's scalar types.
_EXECUTORCH_TYPES = {0: np.uint8, 6: np.float32}


def _open_executorch(path: Path) -> tuple[_Invoke, Port, Port, bool]:
    # Parsed once in Python: the runtime stops the whole process at some damaged files.
    load_pte(path)
    runtime = load_executorch("executorch.runtime")
    torch = require("torch", extra="executorch")
    with quietly(f"open {path.name} with ExecuTorch", hint="export it again with this version of ExecuTorch"):
        program = runtime.Runtime.get().load_program(path)
        method = program.load_method(FORWARD)
        meta = method.metadata
        source, target = (_executorch_port(path, info(0)) for info in (meta.input_tensor_meta, meta.output_tensor_meta))

    def invoke(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        owned = images if images.flags.writeable else images.copy()
        result: npt.NDArray[Any] = method.execute([torch.from_numpy(owned)])[0].numpy()
        return result

    return invoke, source, target, False


def _executorch_port(path: Path, info: Any) -> Port:
    kind = _EXECUTORCH_TYPES.get(info.dtype())
    if kind is None:
        raise ExportError(
            f"{path.name}: its input or output is of PyTorch's scalar type {info.dtype()}, expected float32 or uint8",
            hint="export it with layerfold",
        )
    return Port(tuple(info.sizes()), np.dtype(kind))
