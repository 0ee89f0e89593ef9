"""`layerfold export` and `layerfold inspect`: every precision from one command, and what broken inputs leave behind."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import SPEC, NoCounterpart, save, tiny_net
from torch import Tensor, nn

from pipeline.export import inspect, metadata, runtimes
from pipeline.models import store

Call = Callable[..., tuple[int, str, str]]


def photos(folder: Path, count: int, damaged: int = 0) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        file = folder / f"{i:03}.jpg"
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file, quality=95)
        if i < damaged:
            file.write_bytes(file.read_bytes()[:80])
    return folder


def test_every_precision_of_pixel_files_from_one_command(call: Call, tmp_path: Path) -> None:
    model, folder, out = save(tmp_path, tiny_net()), photos(tmp_path / "train", 20, damaged=1), tmp_path / "out"
    code, printed, said = call(
        "export", model, "--precision", "fp32,fp16,dynamic,int8", "--input", "uint8", "--batch", "2", "--calibration",
        folder, "--out", out,
    )  # fmt: skip
    assert code == 0, said
    assert "000.jpg" in said and "1 damaged images left out, 19 used" in said
    names = {f"tiny{infix}.{form}" for infix in ("", ".fp16", ".dynamic", ".int8") for form in ("tflite", "onnx")}
    assert {path.name for path in out.iterdir()} == {*names, "MODEL_CARD.md"}
    assert all(name in printed for name in names)
    assert "tiny.onnx: simplified by onnxsim" in said
    assert metadata.read(out / "tiny.onnx")["notes"][0].startswith("simplified by onnxsim")
    card = (out / "MODEL_CARD.md").read_text()
    assert all(f"| `{name}` |" in card for name in names) and "not stated by the source of the weights" in card
    levels = np.random.default_rng(1).integers(0, 256, (6, 3, 32, 32))
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (SPEC.mean, SPEC.std))
    batch = ((levels / 255 - mean) / std).astype(np.float32)
    with torch.no_grad():
        expected = tiny_net().double()(torch.from_numpy(batch).double()).numpy()
    for path in [out / name for name in names]:
        port = inspect.census(path).inputs[0]
        assert (port.dtype, port.shape[0]) == ("uint8", 2), path.name
        found = runtimes.open_model(path).predict(batch)
        error, largest = np.abs(found - expected), np.abs(expected).max()
        if path.name in ("tiny.tflite", "tiny.onnx"):
            assert error.max() <= 1e-5 * largest, path.name
        assert error.mean() <= 0.15 * largest, path.name
    record = metadata.read(out / "tiny.int8.tflite")
    assert record["calibration"]["count"] == 19 and record["calibration"]["seed"] == 0
    assert [Path(name).name for name in record["calibration"]["skipped"]] == ["000.jpg"]
    assert record["quantised"]["method"] == "ptq" and record["precision"] == "int8"
    assert "calibration" not in metadata.read(out / "tiny.tflite")
    code, printed, _ = call("inspect", out / "tiny.int8.tflite")
    assert code == 0 and "CONV_2D" in printed and "uint8 2×32×32×3" in printed
    code, printed, _ = call("inspect", out / "tiny.int8.tflite", "--json")
    shown = json.loads(printed)
    assert shown["metadata"]["preprocess"]["std"] == [0.3, 0.4, 0.5]
    assert shown["ops"]["CONV_2D"] == 5 and len(shown["weights"]) == 7


def test_float_units_stay_float_and_the_gate_knows_it(call: Call, tmp_path: Path) -> None:
    model, folder = save(tmp_path, tiny_net()), photos(tmp_path / "train", 8)
    code, _, said = call(
        "export", model, "--to", "tflite", "--precision", "int8", "--calibration", folder, "--float-units",
        "blocks.folded", "--ranges", "mse", "--equalise", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, said
    found = inspect.census(tmp_path / "out" / "tiny.int8.tflite")
    assert found.float_tensors == ("blocks.folded",)
    options = found.metadata["quantised"]
    assert (options["float_units"], options["ranges"], options["equalise"]) == (["blocks.folded"], "mse", True)


class _Sine(nn.Module):
    """An operation that both converters know and no mobile delegate runs."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = tiny_net()

    def forward(self, image: Tensor) -> Tensor:
        return torch.sin(self.tiny(image))


class _DynamicShape(nn.Module):
    """How many numbers come out depends on the picture."""

    def forward(self, image: Tensor) -> Tensor:
        return image[image > 0].reshape(1, -1)


class _OneOfTwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tiny = tiny_net()

    def forward(self, image: Tensor) -> Tensor:
        return self.tiny(image) if image.sum() > 0 else -self.tiny(image)


def _with_nan() -> nn.Module:
    model = tiny_net()
    with torch.no_grad():
        model.head[0].weight[3] = float("nan")
    return model


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (NoCounterpart(), ["counterpart"]),
        (_DynamicShape(), ["depends on the image", "static shapes"]),
        (_OneOfTwoWays(), ["cannot be traced", "static shapes"]),
        (_with_nan(), ["'head.0.weight'", "NaN"]),
    ],
    ids=["unsupported", "dynamic", "branches", "nan"],
)
def test_a_network_that_cannot_be_exported_is_named_and_leaves_nothing(
    module: nn.Module, words: list[str], call: Call, tmp_path: Path
) -> None:
    model = save(tmp_path, module)
    for form in ("tflite", "onnx"):
        code, printed, said = call("export", model, "--to", form, "--out", tmp_path / "out")
        assert (code, printed) == (2, "")
        assert all(word in said for word in words), said
        assert not (tmp_path / "out").exists()


def test_operators_outside_the_targets_set_fail_unless_allowed(call: Call, tmp_path: Path) -> None:
    model, out = save(tmp_path, _Sine()), tmp_path / "out"
    code, _, said = call("export", model, "--to", "tflite", "--out", out)
    assert code == 2 and "operators outside the target's set: SIN" in said and "--allow-operators" in said
    assert not out.exists()
    code, _, said = call("export", model, "--to", "tflite", "--out", out, "--gate", "warn")
    assert code == 0 and "warning: tiny.tflite: operators outside" in said
    assert {path.name for path in out.iterdir()} == {"tiny.tflite", "MODEL_CARD.md"}
    code, _, said = call("export", model, "--to", "onnx", "--out", out, "--allow-operators", "Sin")
    assert code == 0 and "outside" not in said


def test_calibration_is_refused_without_readable_training_images(call: Call, tmp_path: Path) -> None:
    model, out = save(tmp_path, tiny_net()), tmp_path / "out"
    cases = [
        ([], "--precision int8 needs images"),
        (["--calibration", photos(tmp_path / "imagenet" / "val", 2)], "names images that judge the result"),
        (["--calibration", "mnist/eval"], "calibration on 'mnist/eval' is refused"),
        (["--calibration", photos(tmp_path / "damaged", 12, damaged=3)], "only 9 of 12 calibration images"),
        (["--calibration", photos(tmp_path / "broken", 40, damaged=15)], "cannot be decoded"),
        (["--calibration", tmp_path / "nowhere"], "nowhere"),
    ]
    for arguments, words in cases:
        code, printed, said = call("export", model, "--precision", "int8", "--out", out, *arguments)
        assert (code, printed) == (2, ""), said
        assert words in said and "fix:" in said, said
        assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--precision", "int4"], "--precision: 'int4' is none of"),
        (["--precision", ""], "--precision"),
        (["--to", "tflit"], "did you mean 'tflite'?"),
    ],
)
def test_wrong_words_name_the_nearest(arguments: list[str], words: str, call: Call, tmp_path: Path) -> None:
    code, _, said = call("export", save(tmp_path, tiny_net()), "--out", tmp_path / "out", *arguments)
    assert code == 2 and words in said
    assert not (tmp_path / "out").exists()


def test_pixels_need_to_know_the_normalisation(call: Call, tmp_path: Path) -> None:
    model = save(tmp_path, tiny_net(), preprocess=None)
    code, _, said = call("export", model, "--input", "uint8", "--out", tmp_path / "out")
    assert code == 2 and "preprocessed" in said


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_a_truncated_file_is_named(form: str, files: dict[str, Path], call: Call, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{form}"
    path.write_bytes(files[form].read_bytes()[:-700])
    code, printed, said = call("inspect", path)
    assert (code, printed) == (2, "") and path.name in said and "export it again" in said
    half = tmp_path / "half.pt"
    half.write_bytes(save(tmp_path, tiny_net()).read_bytes()[:2000])
    code, _, said = call("export", half, "--to", form)
    assert code == 2 and "half.pt" in said


def test_damaged_models_and_run_folders_are_named(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    gone = types.ModuleType("gone_module")
    gone.Net = type("Net", (nn.Identity,), {"__module__": "gone_module"})
    monkeypatch.setitem(sys.modules, "gone_module", gone)
    foreign = save(tmp_path, gone.Net())
    monkeypatch.delitem(sys.modules, "gone_module")
    code, _, said = call("export", foreign, "--out", tmp_path / "out")
    assert code == 2 and "No module named 'gone_module'" in said and "fix:" in said
    nameless = tmp_path / "nameless.pt"
    store.save(nameless, tiny_net(), {})
    code, _, said = call("export", nameless, "--out", tmp_path / "out")
    assert code == 2 and "nameless.pt" in said and "input_px" in said
    (tmp_path / "run").mkdir()
    for text in ("{", "[]", "{}"):
        (tmp_path / "run" / "manifest.json").write_text(text)
        code, _, said = call("inspect", tmp_path / "run")
        assert code == 2 and "manifest.json is damaged" in said
    assert not (tmp_path / "out").exists()


def test_a_torch_files_record_is_json(call: Call, tmp_path: Path) -> None:
    code, printed, _ = call("inspect", save(tmp_path, tiny_net()), "--json")
    record = json.loads(printed)
    assert code == 0 and record["input_px"] == 32 and record["parameters"] > 1000


def test_what_the_model_knows_goes_into_the_files_and_the_card(call: Call, tmp_path: Path) -> None:
    origin = {"source": "hub", "detail": "timm/tiny", "sha256": "ab", "licence": "Apache-2.0"}
    model = save(
        tmp_path, tiny_net(), labels=[f"thing {i}" for i in range(10)], weights=origin, licence="Apache-2.0",
        recipe_hash="0123abcd", units_folded=["blocks.folded"], data={"name": "mnist", "root": None},
    )  # fmt: skip
    # As this file was named, its float file once was what the surgery for int8 had left.
    model = model.rename(tmp_path / "operated.pt")
    out = tmp_path / "out"
    code, _, said = call(
        "export", model, "--to", "onnx", "--precision", "fp16,int8,fp32", "--calibration-images", "12", "--out", out
    )
    assert code == 0, said
    assert "calibration: 12 images of mnist/calibration" in said
    records = {name: metadata.read(out / f"operated.{name}") for name in ("onnx", "fp16.onnx", "int8.onnx")}
    for record in records.values():
        assert record["labels"][9] == "thing 9" and record["licence"] == "Apache-2.0" and record["weights"] == origin
        assert record["recipe_hash"] == "0123abcd" and record["units_folded"] == ["blocks.folded"]
        assert record["data"] == "mnist"
    makers = [records[name]["converter"].split()[0] for name in ("onnx", "fp16.onnx", "int8.onnx")]
    assert makers == ["torch.onnx", "onnxruntime", "onnxruntime"]
    batch = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        expected = tiny_net()(torch.from_numpy(batch)).numpy()
    assert np.abs(runtimes.open_model(out / "operated.onnx").predict(batch) - expected).max() < 1e-4
    card = (out / "MODEL_CARD.md").read_text()
    assert "Licence of the weights: Apache-2.0" in card and "hub: timm/tiny" in card and "`blocks.folded`" in card
    assert "12 images of mnist/calibration" in card


def test_the_models_own_images_may_be_gone(call: Call, tmp_path: Path) -> None:
    model = save(tmp_path, tiny_net(), data={"name": "mnist", "root": str(tmp_path / "gone")})
    code, _, said = call("export", model, "--precision", "int8", "--out", tmp_path / "out")
    assert code == 2 and "the model's own are not to be had: data.root" in said and "--calibration FOLDER" in said
    assert not (tmp_path / "out").exists()


def test_a_runs_recorded_files_are_not_overwritten(call: Call, tmp_path: Path) -> None:
    models = tmp_path / "run" / "models"
    models.mkdir(parents=True)
    (tmp_path / "run" / "manifest.json").write_text("{}")
    model = save(models, tiny_net())
    (models / "tiny.onnx").write_text("recorded")
    (models / "MODEL_CARD.md").write_text("recorded")
    code, _, said = call("export", model, "--to", "onnx", "--out", models)
    assert code == 2 and "a run has recorded" in said
    code, printed, said = call("export", model, "--to", "onnx")
    assert code == 0, said
    assert str(models / "exported" / "tiny.onnx") in printed
    assert (models / "tiny.onnx").read_text() == (models / "MODEL_CARD.md").read_text() == "recorded"
    # A card that somebody else wrote is not ours to replace.
    (models / "exported" / "MODEL_CARD.md").write_text("# Mine")
    code, _, said = call("export", model, "--to", "onnx", "--out", models / "exported")
    assert code == 0 and "left as it is" in said
    assert (models / "exported" / "MODEL_CARD.md").read_text() == "# Mine"


def test_an_output_folder_that_cannot_be_is_found_before_the_work(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path, tiny_net())
    monkeypatch.setattr("pipeline.export.lowering.lower", lambda *_: pytest.fail("the work began"))
    code, _, said = call("export", model, "--to", "onnx", "--out", model / "sub")
    assert code == 2 and "a part of the path is a file" in said and "--out" in said


def test_a_misspelt_float_unit_is_found_before_the_images_are_read(call: Call, tmp_path: Path) -> None:
    code, _, said = call(
        "export", save(tmp_path, tiny_net()), "--precision", "int8", "--calibration", tmp_path / "nowhere",
        "--float-units", "blocks.foldde", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2 and "'blocks.foldde'; did you mean 'blocks.folded'?" in said
    assert not (tmp_path / "out").exists()


def test_an_interrupt_of_an_export_promises_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.export.lowering.lower", stop)
    code, _, said = call("export", save(tmp_path, tiny_net()), "--to", "onnx", "--out", tmp_path / "out")
    assert code == 130 and "resume" not in said and "stopped" in said
    assert not (tmp_path / "out").exists()
