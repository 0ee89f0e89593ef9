"""What can be told about a file without running it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

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
