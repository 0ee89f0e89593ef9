"""What a run refuses before it writes anything."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import preflight
from pipeline.errors import WeightsError
from pipeline.recipe import parse


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
    with pytest.raises(WeightsError, match="published weights for model.name 'mobilenetv2_075'") as caught:
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
