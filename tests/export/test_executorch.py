"""ExecuTorch files: against float64 PyTorch, the TFLite file of the same network, and their own census.

What needs the package is skipped without it; the errors that name it are tested either way.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import NoCounterpart, images, save, tiny_net
from torch import Tensor, nn

from pipeline import preflight, recipe_files
from pipeline.errors import ExportError, RecipeError
from pipeline.export import conversion, executorch, inspect, metadata, runtimes
from pipeline.export.executorch_int8 import export_int8
from pipeline.export.input_format import PixelInput, read_pixel_input
from pipeline.export.lowering import lower

Reference = Callable[[np.ndarray], np.ndarray]
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="needs the extra 'executorch'"
)
EXAMPLE = torch.from_numpy(images(1))
IMAGENET = PixelInput.of((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def pte(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny network as a float and an int8 file."""
    folder = tmp_path_factory.mktemp("pte")
    paths = {"fp32": folder / "tiny.pte", "int8": folder / "tiny.int8.pte"}
    network = lower(tiny_net(), EXAMPLE)
    executorch.export_fp32(network, EXAMPLE, paths["fp32"])
    export_int8(network, EXAMPLE, paths["int8"], [images(64, seed=1)])
    return paths


@needs_package
def test_the_float_file_predicts_as_float64_torch(pte: dict[str, Path], reference: Reference) -> None:
    batch = images(9, seed=5)
    expected = reference(batch)
    model = runtimes.open_model(pte["fp32"])
    found = model.predict(batch)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.array_equal(found, np.concatenate([model.predict(batch[i : i + 1]) for i in range(9)]))
    assert model.predict(batch[:0]).shape == (0, 10)


@needs_package
def test_int8_keeps_what_the_tflite_file_keeps(
    pte: dict[str, Path], files: dict[str, Path], reference: Reference
) -> None:
    batch = images(64, seed=6)
    expected = reference(batch)
    found, other = (runtimes.open_model(path).predict(batch) for path in (pte["int8"], files["tflite_int8"]))
    noise, others_noise = (((logits - expected) ** 2).mean() for logits in (found, other))
    assert noise <= 1.5 * others_noise
    assert 10 * np.log10(expected.var(axis=0).mean() / noise) > 15
    assert len(np.unique(found)) <= 256


@needs_package
def test_the_census_counts_what_the_delegate_computes(pte: dict[str, Path]) -> None:
    for kind in ("fp32", "int8"):
        found = inspect.census(pte[kind])
        assert found.format == "executorch"
        assert (found.count("Conv2d"), found.count("DepthwiseConv2d"), found.count("FullyConnected")) == (5, 1, 1)
        assert found.count("Add") == 1 and found.fused_activations == {"RELU6": 4}
        assert not [name for name in found.ops if "::" in name]
        assert found.inputs == (inspect.Port("image", (1, 3, 32, 32), "float32"),)
        assert found.outputs[0].shape == (1, 10)
        assert found.quantized == (kind == "int8") and found.float_tensors == ()
        assert inspect.gate(found) == []
    # The weights once, and a graph of some kilobytes.
    assert pte["fp32"].stat().st_size < 4 * 1.5 * sum(p.numel() for p in tiny_net().parameters()) + 8_000


@needs_package
def test_weight_ranges_are_those_of_the_folded_weights(pte: dict[str, Path], files: dict[str, Path]) -> None:
    expected = {row.name: row for row in inspect.census(files["tflite"]).weights}
    for kind, tolerance in (("fp32", 1e-6), ("int8", 0.01)):
        found = inspect.census(pte[kind]).weights
        assert [row.name for row in found] == list(expected)
        for row in found:
            assert row.channels == expected[row.name].channels
            assert row.largest == pytest.approx(expected[row.name].largest, rel=tolerance)
            assert row.spread == pytest.approx(expected[row.name].spread, rel=2 * tolerance)


@needs_package
def test_metadata_is_read_back_by_us_and_by_the_runtime(pte: dict[str, Path], tmp_path: Path) -> None:
    from executorch.runtime import Runtime

    path = tmp_path / "described.pte"
    path.write_bytes(pte["int8"].read_bytes())
    assert metadata.read(path) == {}
    before = runtimes.open_model(path).predict(images(3, seed=9))
    metadata.write(path, {"labels": ["café", "b"] * 600, "version": 1})
    metadata.write(path, {"labels": ["café"] * 1000, "mean": [0.5, 0.25]})
    assert metadata.read(path) == {"labels": ["café"] * 1000, "mean": [0.5, 0.25]}
    assert np.array_equal(runtimes.open_model(path).predict(images(3, seed=9)), before)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    program = Runtime.get().load_program(path)
    assert json.loads(program.load_method("layerfold").execute([])[0]) == metadata.read(path)
    assert b"site-packages" not in path.read_bytes() and str(Path.cwd()).encode() not in path.read_bytes()


@needs_package
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_named_by_every_reader(pte: dict[str, Path], share: float, tmp_path: Path) -> None:
    content = pte["fp32"].read_bytes()
    path = tmp_path / "cut.pte"
    path.write_bytes(content[: int(share * len(content))])
    readers: list[Callable[[Path], object]] = [runtimes.open_model, inspect.census, metadata.read]
    for reader in readers:
        with pytest.raises(ExportError, match=r"cut\.pte"):
            reader(path)
        with pytest.raises(ExportError, match=r"gone\.pte"):
            reader(tmp_path / "gone.pte")


@needs_package
def test_float_units_stay_float_and_per_tensor_has_one_scale(pte: dict[str, Path], tmp_path: Path) -> None:
    network = lower(tiny_net(), EXAMPLE)
    path = tmp_path / "mixed.pte"
    export_int8(network, EXAMPLE, path, [images(16)], float_layers=["blocks.folded"], per_channel=False)
    found = inspect.census(path)
    assert found.float_tensors == ("blocks.folded",)
    assert inspect.gate(found) and inspect.gate(found, float_tensors=["blocks.folded"]) == []
    batch = images(16, seed=3)
    assert not np.array_equal(runtimes.open_model(path).predict(batch), runtimes.open_model(pte["int8"]).predict(batch))
    with pytest.raises(ExportError, match=r"'blocks\.9'"):
        export_int8(network, EXAMPLE, tmp_path / "x.pte", [images(2)], float_layers=["blocks.9"])
    with pytest.raises(ExportError, match="no calibration images"):
        export_int8(network, EXAMPLE, tmp_path / "x.pte", [])
    assert [item.name for item in tmp_path.iterdir()] == ["mixed.pte"]


@needs_package
def test_dead_channels_stay_silent(tmp_path: Path) -> None:
    model = tiny_net()
    with torch.no_grad():
        for channel, bias in ((3, -4.0), (5, 2.0)):
            model.stem[0].weight[channel] *= 1e-10
            model.stem[1].bias[channel] = bias
            model.stem[1].running_mean[channel] = 0.0
    batch = images(32, seed=4)
    with torch.no_grad():
        expected = model(torch.from_numpy(batch)).numpy()
    export_int8(lower(model, EXAMPLE), EXAMPLE, tmp_path / "dead.pte", [images(64, seed=1)])
    found = runtimes.open_model(tmp_path / "dead.pte").predict(batch)
    assert 10 * np.log10(expected.var(axis=0).mean() / ((found - expected) ** 2).mean()) > 15


class _Padded(nn.Module):
    """TensorFlow's SAME padding before a strided layer, which is the network's first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, 10)

    def forward(self, image: Tensor) -> Tensor:
        features = torch.relu(self.conv(nn.functional.pad(image, (0, 1, 0, 1))))
        return self.head(features.mean((2, 3)))


@needs_package
@pytest.mark.parametrize("pixels", [None, IMAGENET], ids=["float", "uint8"])
def test_padding_is_integer_and_pixels_are_taken(pixels: PixelInput | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = lower(_Padded().eval(), EXAMPLE)
    raw = (127 + 40 * images(16, seed=2)).clip(0, 255).astype(np.uint8)
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (IMAGENET.mean, IMAGENET.std))
    batch = ((raw / 255.0 - mean) / std).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(batch)).numpy()
    paths = {"fp32": tmp_path / "pad.pte", "int8": tmp_path / "pad.int8.pte"}
    executorch.export_fp32(network, EXAMPLE, paths["fp32"], pixels=pixels)
    export_int8(network, EXAMPLE, paths["int8"], [batch], pixels=pixels)
    for kind, path in paths.items():
        metadata.write(path, {"labels": []})
        found = inspect.census(path)
        assert found.inputs[0].dtype == ("float32" if pixels is None else "uint8")
        assert read_pixel_input(path) == pixels
        assert found.float_tensors == () and inspect.gate(found) == []
        error = np.abs(runtimes.open_model(path).predict(batch) - expected).max()
        assert error <= (1e-5 if kind == "fp32" else 0.1) * np.abs(expected).max()


class _Left(nn.Module):
    """With an operation that ExecuTorch runs by a portable kernel, beside the delegate."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = tiny_net()

    def forward(self, image: Tensor) -> Tensor:
        return torch.atan(self.tiny(image))


@needs_package
def test_one_command_writes_and_inspects_both_precisions(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    photos = tmp_path / "train"
    photos.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
    out = tmp_path / "out"
    code, _, said = call(
        "export", save(tmp_path, tiny_net()), "--to", "executorch", "--precision", "fp32,int8", "--batch", "2",
        "--calibration", photos, "--out", out,
    )  # fmt: skip
    assert code == 0, said
    assert {path.name for path in out.iterdir()} == {"tiny.pte", "tiny.int8.pte", "MODEL_CARD.md"}
    record = metadata.read(out / "tiny.int8.pte")
    assert record["precision"] == "int8" and record["calibration"]["count"] == 8
    assert record["converter"].startswith("executorch ")
    assert "calibration" not in metadata.read(out / "tiny.pte")
    code, printed, _ = call("inspect", out / "tiny.int8.pte")
    assert code == 0 and "DepthwiseConv2d" in printed and "float32 2×3×32×32" in printed and "  ! " not in printed


@needs_package
def test_what_the_delegate_leaves_is_a_finding(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    model, out = save(tmp_path, _Left()), tmp_path / "out"
    code, _, said = call("export", model, "--to", "executorch", "--out", out)
    assert code == 2 and "operators outside the target's set: aten::atan.out" in said
    assert not out.exists()
    code, _, said = call("export", model, "--to", "executorch", "--out", out, "--gate", "warn")
    assert code == 0 and "warning: tiny.pte: operators outside" in said


@needs_package
def test_a_network_that_cannot_be_converted_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"eigh|eigvalsh|linalg") as caught:
        executorch.export_fp32(NoCounterpart(), EXAMPLE, tmp_path / "model.pte")
    assert "no ExecuTorch counterpart" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_missing_package_is_named_before_anything_is_done(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "executorch"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "executorch", None)
    fix = "pip install 'layerfold[executorch]'"
    code, printed, said = call("export", tmp_path / "gone.pt", "--to", "onnx,executorch", "--out", tmp_path / "out")
    assert (code, printed) == (2, "") and fix in said and "'executorch' is not installed" in said
    assert not (tmp_path / "out").exists()
    recipe = recipe_files.load("quickstart", overrides=["export.formats=[tflite,executorch]"])
    with pytest.raises(ExportError) as caught:
        preflight.check(recipe, load_weights=False)
    assert caught.value.hint == fix and caught.value.exit_code == 2
    (tmp_path / "model.pte").write_bytes(b"\0\0\0\0ET12")
    readers: list[Callable[[Path], object]] = [runtimes.open_model, inspect.census, metadata.read]
    for act in (*readers, lambda path: executorch.export_fp32(tiny_net(), EXAMPLE, path)):
        with pytest.raises(ExportError) as caught:
            act(tmp_path / "model.pte")
        assert caught.value.hint == fix


def test_precisions_that_do_not_exist_are_refused_with_the_fix(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    for precision in ("fp16", "dynamic"):
        code, _, said = call(
            "export", tmp_path / "gone.pt", "--to", "tflite,executorch", "--precision", f"fp32,{precision}"
        )
        assert code == 2 and f"executorch files are not written in {precision}" in said and f"leave {precision}" in said
        with pytest.raises(RecipeError, match=rf"asks for {precision}, in which ExecuTorch files are not written"):
            recipe_files.load(
                "quickstart", overrides=["export.formats=[onnx,executorch]", f"export.precisions=[{precision}]"]
            )


def test_recipes_know_the_format_and_its_files() -> None:
    recipe = recipe_files.load("quickstart", overrides=["export.formats=[tflite,onnx,executorch]"])
    assert recipe.export.formats[-1] == "executorch"
    assert conversion.file_name("folded", "int8", "executorch") == "folded.int8.pte"
    assert set(conversion.SUFFIXES) == set(conversion.EXPORTERS)
    with pytest.raises(RecipeError, match=r"bench\.formats"):
        recipe_files.load("quickstart", overrides=["bench.formats=[executorch]"])
