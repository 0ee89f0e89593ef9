"""What can be told about a file without running it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from targets.errors import ModelFileError
from targets.model_file import inspect

MakeModel = Callable[..., Path]


@pytest.mark.parametrize("form", ["tflite", "onnx"])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "int8-weights"])
def test_names_the_precision_that_the_file_was_written_in(make_model: MakeModel, form: str, kind: str) -> None:
    path = make_model(form, kind=kind)
    found = inspect(path, expected=form, runtime="x")
    assert found.precision == kind
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.size_bytes == path.stat().st_size


def test_the_other_runtime_is_named_for_a_file_of_the_other_kind(make_model: MakeModel) -> None:
    with pytest.raises(ModelFileError, match="host-ort"):
        inspect(make_model("onnx"), expected="tflite", runtime="LiteRT")
    with pytest.raises(ModelFileError, match="host-litert"):
        inspect(make_model("tflite"), expected="onnx", runtime="ONNX Runtime")


@pytest.mark.parametrize(
    ("name", "content", "expected", "says"),
    [
        ("missing.tflite", None, "tflite", "no model file"),
        ("empty.tflite", b"", "tflite", "empty"),
        ("text.tflite", b"not a model at all", "tflite", "no TFL3"),
        ("cut.tflite", b"\xff\xff\xff\x7fTFL3" + b"\xff" * 40, "tflite", "damaged"),
        ("text.onnx", b"not a model at all", "onnx", "not an ONNX file|no graph"),
        ("model.pb", b"x", "tflite", "runs .tflite files"),
    ],
)
def test_a_file_that_is_no_model_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes | None, expected: str, says: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelFileError, match=says) as caught:
        inspect(path, expected=expected, runtime="x")
    assert name in str(caught.value)


def one_node(path: Path, op: str, kind: str, weights_kind: str) -> Path:
    """An ONNX file of one product of a 2x2 input with 2x2 weights."""
    import onnx
    from onnx import helper, numpy_helper

    types = {"float64": onnx.TensorProto.DOUBLE, "float32": onnx.TensorProto.FLOAT, "uint8": onnx.TensorProto.UINT8}
    made = types[kind] if kind != "uint8" else onnx.TensorProto.INT32
    weights = numpy_helper.from_array(np.ones((2, 2), weights_kind), "w")
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", types[kind], [2, 2])], [helper.make_tensor_value_info("y", made, [2, 2])],
        [weights],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(path))
    return path


@pytest.mark.parametrize(
    ("op", "kind", "weights", "precision"),
    [("MatMulInteger", "uint8", "int8", "dynamic"), ("MatMul", "float64", "float64", "fp64")],
)
def test_rarer_precisions_are_not_called_by_a_common_name(
    tmp_path: Path, op: str, kind: str, weights: str, precision: str
) -> None:
    path = one_node(tmp_path / "m.onnx", op, kind, weights)
    assert inspect(path, expected="onnx", runtime="x").precision == precision


def test_a_model_that_is_not_all_in_its_file_is_refused(tmp_path: Path) -> None:
    import onnx

    path = one_node(tmp_path / "m.onnx", "MatMul", "float32", "float32")
    onnx.save(
        onnx.load(str(path)), str(tmp_path / "out.onnx"), save_as_external_data=True, size_threshold=0, location="w.bin"
    )
    with pytest.raises(ModelFileError, match=r"out.onnx keeps 1 tensors \(w"):
        inspect(tmp_path / "out.onnx", expected="onnx", runtime="x")
