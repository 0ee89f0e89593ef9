"""`layerfold fold`: by name, in closed form, and with units chosen for the agreement that is to be kept."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pipeline.cli.fold import command
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import LayerfoldError
from pipeline.folding import find_units
from pipeline.models import store, zoo


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


def test_auto_keeps_the_agreement_and_writes_table_and_plot(model: Path, image_folder: Path, tmp_path: Path) -> None:
    data = ("--data", "imagefolder", "--root", image_folder, "--images", 40)
    out = tmp_path / "auto.pt"
    said = fold(model, "--units", "auto", "--keep-agreement", 0.6, *data, "--window-steps", 3, "--out", out).output
    record = json.loads((tmp_path / "auto.sensitivity.json").read_text())
    foldable = [unit.name for unit in find_units(store.load(model).module) if unit.foldable]
    assert [row["unit"] for row in record["scan"]] == foldable
    kept = [trial for trial in record["trials"] if trial["accepted"]]
    assert kept and all(trial["agreement"] >= 0.6 for trial in kept)
    assert sorted(trial["unit"] for trial in kept) == sorted(record["units"])
    assert store.load(out).meta["units_folded"] == record["units"]
    table = (tmp_path / "auto.sensitivity.md").read_text()
    assert all(f"| {unit} |" in table for unit in foldable)
    with Image.open(tmp_path / "auto.sensitivity.png") as picture:
        assert picture.size[0] > 300
    assert "and the layers behind: error" in said and "that nothing was fitted to or chosen by" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--units", "auto"], "--data is missing"),
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
