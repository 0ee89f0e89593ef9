"""TensorFlow's interpreter as a second opinion on a TFLite file; where TensorFlow is not installed, how it is asked."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny_models import images

from pipeline.errors import ExportError
from pipeline.export import runtimes

Files = dict[str, Path]


def test_a_missing_tensorflow_is_named_with_its_extra(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ExportError, match="'tensorflow' cannot be imported") as caught:
        runtimes.open_model(files["tflite"], tensorflow=True)
    assert caught.value.hint == "pip install 'layerfold[tensorflow]'"


def test_the_interpreter_that_was_asked_for_runs(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    from ai_edge_litert.interpreter import Interpreter

    opened: list[str] = []

    class Witness(Interpreter):
        def __init__(self, model_path: str, num_threads: int) -> None:
            opened.append(model_path)
            super().__init__(model_path=model_path, num_threads=num_threads)

    stand_in = ModuleType("tensorflow")
    stand_in.lite = ModuleType("tensorflow.lite")  # type: ignore[attr-defined]
    stand_in.lite.Interpreter = Witness  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorflow", stand_in)
    found = runtimes.open_model(files["tflite"], tensorflow=True).predict(images(2))
    assert opened == [str(files["tflite"])]
    assert np.array_equal(found, runtimes.open_model(files["tflite"]).predict(images(2)))
    assert len(opened) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tflite", "tflite_int8"])
def test_tensorflow_predicts_what_litert_predicts(files: Files, kind: str) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("needs the extra 'tensorflow'")
    batch = images(16, seed=3)
    one = runtimes.open_model(files[kind]).predict(batch)
    other = runtimes.open_model(files[kind], tensorflow=True).predict(batch)
    assert np.abs(one - other).max() <= (1e-5 if kind == "tflite" else 0.05) * np.abs(one).max()
