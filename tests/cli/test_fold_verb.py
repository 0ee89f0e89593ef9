"""`layerfold fold`: by name, in closed form, and with units chosen for the agreement that is to be kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pipeline import folding
from pipeline.cli.fold import command
from pipeline.data import datasets
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import LayerfoldError, UnitError
from pipeline.folding import Selection, find_units
from pipeline.models import store, zoo
from pipeline.stages import unit_latency
from pipeline.stages.unit_latency import UnitLatency


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MobileNetV2 with random weights at 32 px; what is kept of its predictions can still be counted."""
    torch.manual_seed(0)
    network = zoo.create("mobilenetv2_cifar_035", num_classes=10, input_px=32).eval()
    path = tmp_path_factory.mktemp("model") / "small.pt"
    preprocess = Preprocessing(input_px=32, mean=(0.5,) * 3, std=(0.5,) * 3, crop_fraction=1.0).as_dict()
    store.save(path, network, {"name": "small", "num_classes": 10, "input_px": 32, "preprocess": preprocess})
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def fold(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_named_units_fold_without_data(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "folded.pt"
    said = fold(model, "--units", "blocks.1.1,blocks.2.1", "--out", out).output
    stored = store.load(out)
    assert stored.meta["units_folded"] == ["blocks.1.1", "blocks.2.1"]
    assert "layers became one" in said and "depth" in said
    error = float(said.split("linearised model: ")[1].split()[0])
    assert 0 < error < 1e-4  # measured on an image; zeros would hide whatever the weights do
    fold(out, "--units", "blocks.3.1,blocks.3.1", "--out", tmp_path / "more.pt")
    assert store.load(tmp_path / "more.pt").meta["units_folded"] == ["blocks.1.1", "blocks.2.1", "blocks.3.1"]


def test_only_units_that_folded_are_recorded_and_none_is_refused(tmp_path: Path) -> None:
    """A 3×3 after a padded 3×3 has no exact single convolution."""
    torch.manual_seed(0)
    network = zoo.create("cifar_resnet20", num_classes=10, input_px=32).eval()
    path = tmp_path / "r20.pt"
    store.save(path, network, {"name": "r20", "num_classes": 10, "input_px": 32})
    unit = next(unit.name for unit in find_units(network) if unit.foldable)
    refused = call(path, "--units", unit, "--border", "exact", "--out", tmp_path / "f.pt")
    assert isinstance(refused.exception, UnitError) and "zero padding between them" in str(refused.exception)
    assert not (tmp_path / "f.pt").exists()
    fold(path, "--units", unit, "--out", tmp_path / "f.pt")
    assert store.load(tmp_path / "f.pt").meta["units_folded"] == [unit]


def test_the_closed_form_is_nearer_than_taking_activations_away(
    model: Path, image_folder: Path, tmp_path: Path
) -> None:
    data = ("--data", "imagefolder", "--root", image_folder, "--images", 40)
    said = fold(model, "--units", "blocks.1.1", "--method", "closed_form", *data, "--out", tmp_path / "c.pt").output
    fold(model, "--units", "blocks.1.1", "--out", tmp_path / "l.pt")
    assert "agreement with the original" in said and "variance not explained" in said
    teacher = store.load(model).module
    preprocessing = Preprocessing.from_dict(store.load(model).meta["preprocess"])
    files = sorted((image_folder / "val").rglob("*.JPEG"))
    images = []
    for file in files:
        with Image.open(file) as picture:
            images.append(preprocessing.eval_image(picture))
    with torch.no_grad():
        x = torch.stack(images)
        truth = teacher(x)
        errors = [float((store.load(tmp_path / f"{n}.pt").module(x) - truth).square().mean()) for n in "cl"]
    assert errors[0] < errors[1]


def test_auto_alone_measures_latency_fits_to_photos_and_writes_beside_the_model(
    model: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`layerfold fold MODEL --units auto --keep-agreement 0.6`, with a clock and photos that are made up."""
    asked: list[str] = []

    def resolve(name: str, root: Path | None, *, say: Callable[[str], None]) -> datasets.Resolved:
        asked.append(f"{name} in {root}")
        return datasets.Resolved("imagefolder", str(image_folder), "made up")

    def clock(*arguments: Any, on_unit: Callable[[int, int], None]) -> list[UnitLatency]:
        asked.append(arguments[3].name)
        saved = {"blocks.4.1": 0.1, "blocks.2.1": 50.0, "blocks.0.0": -1.0}
        return [UnitLatency(unit, 60.0, 60.0 - saved.get(unit, 0.0), unit in saved) for unit in arguments[1]]

    monkeypatch.setattr(datasets, "resolve", resolve)
    monkeypatch.setattr(unit_latency, "measure", clock)
    copied = shutil.copy(model, tmp_path / "my.0.35.pt")
    said = fold(copied, "--units", "auto", "--keep-agreement", 0.6, "--window-steps", 3).output
    assert asked == ["photos in None", "host-litert"]
    record = json.loads((tmp_path / "my.0.35-folded.sensitivity.json").read_text())
    foldable = [unit.name for unit in find_units(store.load(model).module) if unit.foldable]
    assert [row["unit"] for row in record["scan"]] == foldable
    assert [trial["unit"] for trial in record["trials"]] == ["blocks.2.1", "blocks.4.1"]
    assert record["savings_in"] == "ms on host-litert, each unit alone" and "saves 50 ms" in said
    kept = [trial for trial in record["trials"] if trial["accepted"]]
    assert kept and all(trial["agreement"] >= 0.6 for trial in kept)
    assert sorted(trial["unit"] for trial in kept) == record["units"]
    assert store.load(tmp_path / "my.0.35-folded.pt").meta["units_folded"] == record["units"]
    table = (tmp_path / "my.0.35-folded.sensitivity.md").read_text()
    assert all(f"| {unit} |" in table for unit in foldable)
    with Image.open(tmp_path / "my.0.35-folded.sensitivity.png") as picture:
        assert picture.size[0] > 300
    assert "and the layers behind: error" in said and "that nothing was fitted to or chosen by" in said


def test_auto_counts_macs_where_no_time_is_shown(
    model: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock(*arguments: Any, on_unit: Callable[[int, int], None]) -> list[UnitLatency]:
        return [UnitLatency(unit, 2.0, 1.0, False) for unit in arguments[1]]

    def choose(*arguments: Any, savings: object, **_: object) -> Selection:
        assert savings is None
        return Selection((), None, (), ())

    monkeypatch.setattr(unit_latency, "measure", clock)
    monkeypatch.setattr(folding, "select_units", choose)
    data = ("--data", "imagefolder", "--root", image_folder, "--images", 10)
    said = fold(model, "--units", "auto", *data, "--out", tmp_path / "f.pt").output
    assert "shown to save time on host-litert: choosing by MACs" in said
    assert json.loads((tmp_path / "f.sensitivity.json").read_text())["savings_in"] == "MACs"
    assert "no unit can fold at an agreement of 0.95" in said and not (tmp_path / "f.pt").exists()
    refused = call(model, "--units", "auto", "--save-by", "latency", *data, "--out", tmp_path / "f.pt")
    assert isinstance(refused.exception, AssertionError)  # asked for by name, latency is not given up


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--units", " , "], "names no unit"),
        (["--units", "auto", "--root", "somewhere"], "--root is given, but --data is not"),
        (["--units", "auto", "--method", "linear", "--data", "mnist"], "leave --method out"),
        (["--units", "blocks.9.9"], "blocks.9.9"),
        (["--units", "blocks.1.1", "--method", "closed_form", "--data", "mnits"], "mnist"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(
    arguments: list[str], words: str, model: Path, tmp_path: Path
) -> None:
    result = call(model, *arguments, "--out", tmp_path / "f.pt")
    assert isinstance(result.exception, LayerfoldError)
    assert words in str(result.exception) + str(result.exception.hint)
    assert list(tmp_path.iterdir()) == []


def test_what_is_neither_file_nor_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    for what, words in (("tf_eficientnet_lite0", "tf_efficientnet_lite0"), (tmp_path / "model.onnx", "no .pt file")):
        result = call(what, "--units", "blocks.1.1", "--out", tmp_path / "f.pt")
        assert isinstance(result.exception, LayerfoldError) and words in str(result.exception)
