"""What a run refuses before it writes anything."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline import preflight
from pipeline.errors import LayerfoldError, RecipeError, UnitError, WeightsError
from pipeline.recipe import parse
from targets.errors import TargetError


def recipe_of(folder: Path, **sections: Any) -> dict[str, Any]:
    train = {"epochs": 1, "batch_size": 8, "lr": 0.01}
    raw = {
        "name": "tiny",
        "model": {"name": "mobilenetv2_cifar_035", "num_classes": 4, "input_px": 16, "weights": "none"},
        "data": {"name": "imagefolder", "root": str(folder)},
        "prefold": {"method": "fixed", "units": ["blocks.1.1"], "train": train},
        "postfold": {"train": dict(train)},
    }
    return {key: {**value, **sections.get(key, {})} if isinstance(value, dict) else value for key, value in raw.items()}


def test_a_network_that_is_neither_pretrained_nor_trained_is_refused(image_folder: Path) -> None:
    raw = recipe_of(image_folder, model={"name": "mobilenetv2_075", "input_px": 32, "weights": "auto"})
    with pytest.raises(WeightsError, match="published weights for model\\.name 'mobilenetv2_075'") as caught:
        preflight.check(parse(raw), load_weights=False)
    assert "model.weights=" in caught.value.hint and "baseline.train" in caught.value.hint
    trained = raw | {"baseline": {"train": raw["postfold"]["train"]}}
    preflight.check(parse(trained), load_weights=True)
    raw["model"]["weights"] = "none"
    preflight.check(parse(raw), load_weights=True)


def test_shipped_recipes_start_from_weights_or_train() -> None:
    from pipeline import recipe_files
    from pipeline.models import weights

    for name in recipe_files.shipped():
        recipe = recipe_files.load(name)
        origin = recipe.model.weights if recipe.model.weights != "auto" else weights.choose(recipe.model.name)
        assert origin != "none" or recipe.baseline.train is not None, name


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "units",
            "blocks.1.l",
            ["prefold.units", "'blocks.1.l'", "did you mean 'blocks.1.", "its units are blocks.0.0"],
        ),
        ("units", "al", ["prefold.units", "'al'", "did you mean 'all'"]),
        ("exclude", ["blocks.9.1"], ["prefold.exclude", "'blocks.9.1'", "did you mean"]),
    ],
)
def test_a_unit_that_is_none_is_named_with_its_key_and_the_nearest(
    image_folder: Path, key: str, value: object, words: list[str]
) -> None:
    with pytest.raises(UnitError) as caught:
        preflight.check(parse(recipe_of(image_folder, prefold={key: value})), load_weights=False)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index in range(30):
        noise = np.random.default_rng(index).integers(0, 256, (20, 20, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({}, "so prefold can only learn from the baseline", "prefold.distill.weight=1"),
        ({"prefold": {"distill": {"weight": 1}}}, "so postfold can only learn", "postfold.distill.weight=1"),
        (
            {"baseline": {"train": {"epochs": 1, "lr": 0.1}}},
            "baseline.train has nothing to learn from",
            "model.weights",
        ),
    ],
)
def test_data_without_labels_are_refused_where_labels_are_asked_for(
    photos: Path, changes: dict[str, Any], what: str, fix: str
) -> None:
    raw = recipe_of(photos, data={"name": "photos"}, prefold=changes.get("prefold", {}))
    with pytest.raises(RecipeError, match=what) as caught:
        preflight.check(parse(raw | {k: v for k, v in changes.items() if k == "baseline"}), load_weights=False)
    assert fix in caught.value.hint


def test_a_batch_larger_than_the_data_is_refused(image_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"postfold\.train: 40 images in batches of 64"):
        train = {"epochs": 1, "batch_size": 64, "lr": 0.1}
        preflight.check(parse(recipe_of(image_folder, postfold={"train": train})), load_weights=False)


def test_a_run_is_checked_however_much_of_it_is_done(image_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """An unknown target comes to light though only the first stages are cached."""
    from pipeline import facts, plan
    from pipeline.cli.run import command

    raw = recipe_of(image_folder) | {"bench": {"targets": ["no-such-target"]}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    planned = plan.build(parse(raw), facts.gather(parse(raw), say=print))
    for stage in planned.stages[:4]:
        (tmp_path / "run" / "stages" / stage.folder).mkdir(parents=True)
    with pytest.raises((LayerfoldError, TargetError), match="no-such-target"):
        command.callback(str(path), tmp_path / "run", (), False)  # type: ignore[misc]
    assert not (tmp_path / "run" / "manifest.json").exists()
