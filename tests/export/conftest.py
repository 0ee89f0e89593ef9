"""One conversion of each model, shared by all tests: a real one costs ten seconds and more."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TinyNet, images, tiny_net

from pipeline import cli
from pipeline.export import onnx, quantize, tflite


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These networks are too small to share: threads that wait for each other cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process, which has the heavy libraries already: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["layerfold", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def network() -> TinyNet:
    return tiny_net()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, network: TinyNet) -> dict[str, Path]:
    """The tiny network as float and int8 files of both formats."""
    folder = tmp_path_factory.mktemp("exported")
    example = torch.from_numpy(images(1))
    calibration = images(64, seed=1)
    paths = {
        "tflite": folder / "tiny.tflite",
        "onnx": folder / "tiny.onnx",
        "tflite_int8": folder / "tiny.int8.tflite",
        "onnx_int8": folder / "tiny.int8.onnx",
    }
    tflite.export_fp32(network, example, paths["tflite"])
    onnx.export_fp32(network, example, paths["onnx"])
    quantize.tflite_int8(paths["tflite"], paths["tflite_int8"], [calibration])
    quantize.onnx_int8(paths["onnx"], paths["onnx_int8"], [calibration])
    return paths


@pytest.fixture(scope="session")
def reference(network: TinyNet) -> Callable[[np.ndarray], np.ndarray]:
    """The network's logits in float64: the judge of every file."""
    double = tiny_net().double()

    def logits(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return double(torch.from_numpy(batch).double()).numpy()

    return logits
