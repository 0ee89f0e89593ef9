"""Damaged files, networks that cannot be exported, libraries that are not there: one clear error and no file."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import images, tiny_net
from torch import Tensor, nn

from pipeline.errors import ExportError
from pipeline.export import inspect, metadata, onnx, precision, quantize, runtimes, tflite
from pipeline.export.writing import replacing

Files = dict[str, Path]
EXAMPLE = torch.from_numpy(images(1))
READERS: list[Callable[[Path], object]] = [runtimes.open_model, inspect.census, metadata.read]
QUANTISERS = {"tflite": quantize.tflite_int8, "onnx": quantize.onnx_int8}
EXPORTERS = {"tflite": tflite.export_fp32, "onnx": onnx.export_fp32}


@pytest.mark.parametrize("form", ["tflite", "onnx", "tflite_int8"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_named_by_every_reader(files: Files, form: str, share: float, tmp_path: Path) -> None:
    content = files[form].read_bytes()
    path = tmp_path / files[form].name
    path.write_bytes(content[: int(share * len(content))])
    for reader in READERS:
        with pytest.raises(ExportError, match=path.name):
            reader(path)


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_a_truncated_file_is_not_quantised(files: Files, form: str, tmp_path: Path) -> None:
    source = tmp_path / files[form].name
    source.write_bytes(files[form].read_bytes()[:-500])
    with pytest.raises(ExportError, match=source.name):
        QUANTISERS[form](source, tmp_path / f"int8.{form}", [images(2)])
    small = precision.tflite_fp16 if form == "tflite" else precision.onnx_fp16
    with pytest.raises(ExportError, match=source.name):
        small(source, tmp_path / f"half.{form}")
    assert [item.name for item in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_file_is_named(reader: Callable[[Path], object], tmp_path: Path) -> None:
    for name in ("gone.tflite", "gone.onnx"):
        with pytest.raises(ExportError, match=name):
            reader(tmp_path / name)


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_an_operation_without_counterpart_is_named_and_no_file_is_left(form: str, tmp_path: Path) -> None:
    class Unusual(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(image.mean(1) @ image.mean(1).mT)

    with pytest.raises(ExportError, match=r"eigh|eigvalsh|linalg") as caught:
        EXPORTERS[form](Unusual(), EXAMPLE, tmp_path / f"model.{form}")
    assert "no TFLite counterpart" in caught.value.hint or "no ONNX counterpart" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_nan_weights_are_refused_before_anything_is_written(form: str, tmp_path: Path) -> None:
    model = tiny_net()
    with torch.no_grad():
        model.stem[1].running_var[0] = float("nan")
    with pytest.raises(ExportError, match=r"'stem\.1\.running_var'"):
        EXPORTERS[form](model, EXAMPLE, tmp_path / f"model.{form}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_a_failed_export_leaves_the_older_file_whole(form: str, files: Files, tmp_path: Path) -> None:
    path = tmp_path / f"model.{form}"
    path.write_bytes(files[form].read_bytes())

    class Two(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return image.mean((2, 3)), image.amax((2, 3))

    with pytest.raises(ExportError):
        EXPORTERS[form](Two(), EXAMPLE, path)
    assert path.read_bytes() == files[form].read_bytes()
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_a_quantiser_without_images_leaves_no_file(form: str, files: Files, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no calibration images"):
        QUANTISERS[form](files[form], tmp_path / f"int8.{form}", [])
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_any_batch_size_is_not_quantised(files: Files, tmp_path: Path) -> None:
    import onnx as library

    model = library.load(files["onnx"])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    library.save(model, tmp_path / "any.onnx")
    with pytest.raises(ExportError, match=r"any\.onnx: its input 'image' has the shape \['batch', 3, 32, 32\]"):
        quantize.onnx_int8(tmp_path / "any.onnx", tmp_path / "int8.onnx", [images(2)])
    assert [item.name for item in tmp_path.iterdir()] == ["any.onnx"]


def test_calibration_images_of_another_size_are_refused(files: Files, tmp_path: Path) -> None:
    for form, quantise in QUANTISERS.items():
        with pytest.raises(ExportError, match=r"was given \((3, 16, 16|16, 16, 3)\)"):
            quantise(files[form], tmp_path / f"int8.{form}", [images(2, px=16)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "extra", "action"),
    [
        ("litert_torch", "tflite", lambda path: tflite.export_fp32(tiny_net(), EXAMPLE, path / "x.tflite")),
        ("onnxscript", "onnx", lambda path: onnx.export_fp32(tiny_net(), EXAMPLE, path / "x.onnx")),
        ("ai_edge_litert", "tflite", lambda path: runtimes.open_model(path / "x.tflite")),
        ("onnxruntime", "onnx", lambda path: runtimes.open_model(path / "x.onnx")),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    module: str,
    extra: str,
    action: Callable[[Path], object],
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if module in {"ai_edge_litert", "onnxruntime"}:
        form = "tflite" if extra == "tflite" else "onnx"
        (tmp_path / f"x.{form}").write_bytes(files[form].read_bytes())
    before = sorted(tmp_path.iterdir())
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExportError, match=f"'{module}' cannot be imported") as caught:
        action(tmp_path)
    assert caught.value.hint == f"pip install 'layerfold[{extra}]'"
    assert sorted(tmp_path.iterdir()) == before


def test_onnxslim_steps_in_where_onnxsim_fails(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    info = onnx.export_fp32(tiny_net(), EXAMPLE, tmp_path / "slim.onnx")
    assert info.notes[0].startswith("simplified by onnxslim")
    assert "'onnxsim' cannot be imported" in info.notes[0]
    batch = images(3, seed=2)
    expected = runtimes.open_model(files["onnx"]).predict(batch)
    assert abs(runtimes.open_model(tmp_path / "slim.onnx").predict(batch) - expected).max() < 1e-5


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("two")
        raise RuntimeError
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "one"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_flipped_bytes_are_read_or_refused_clearly(form: str, files: Files, tmp_path: Path) -> None:
    content, chance, path = files[form].read_bytes(), np.random.default_rng(0), tmp_path / f"flipped.{form}"
    refused = 0
    for _ in range(40):
        flipped = bytearray(content)
        # The graph lies at the end of one format and at the start of the other; the weights hold no rules to break.
        for place in chance.integers(0, min(2000, len(content)), 3):
            flipped[-1 - place if form == "tflite" else place] = chance.integers(0, 256)
        path.write_bytes(flipped)
        try:
            inspect.census(path)
        except ExportError as error:
            assert path.name in error.what
            refused += 1
    assert refused > 0


def test_a_census_with_a_dead_median_channel_is_still_json(files: Files) -> None:
    from dataclasses import replace

    found = inspect.census(files["onnx"])
    weight = inspect.WeightRange.of("x", np.array([[0.0], [0.0], [1.0]], dtype=np.float32), 0)
    record = replace(found, weights=(weight,)).as_dict()
    assert record["weights"][0]["spread"] is None and record["weights"][0]["largest"] == 1.0
    json.dumps(record, allow_nan=False)


def test_what_a_runtime_raises_while_it_runs_names_the_file(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class Session(onnxruntime.InferenceSession):
        def run(self, *_: object) -> list[object]:
            raise RuntimeError("node 3")

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(ExportError, match=r"tiny\.onnx fails while it runs: RuntimeError: node 3"):
        runtimes.open_model(files["onnx"]).predict(images(1))


def test_calibration_images_that_are_no_numbers_are_named() -> None:
    from pipeline.export.int8 import Int8Options, operate
    from pipeline.export.lowering import lower

    broken = images(2)
    broken[1, 0, 3, 3] = np.nan
    with pytest.raises(ExportError, match="calibration batch 1 holds NaN"):
        operate(lower(tiny_net(), EXAMPLE), [images(2), broken], Int8Options())
