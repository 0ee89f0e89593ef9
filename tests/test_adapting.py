"""A trial's recipe takes its classes and batch sizes from the folder it is pointed at."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import adapting, recipe_files


def folder_of(root: Path, classes: int, each: int) -> Path:
    for split in ("train", "val"):
        for label in range(classes):
            place = root / split / f"n{label:08d}"
            place.mkdir(parents=True)
            for index in range(each):
                Image.fromarray(np.full((8, 8, 3), 40 * label + index, np.uint8)).save(place / f"{index}.png")
    return root


def load(root: Path, *overrides: str, quick: bool = True) -> tuple[adapting.Recipe, list[str]]:
    said: list[str] = []
    name = "mobilenet_v2/imagenet_100"
    recipe = recipe_files.load(name, quick=quick, overrides=[f"data.root={root}", *overrides])
    return adapting.adapted(recipe, say=said.append), said


@pytest.mark.parametrize(("classes", "each", "batch"), [(6, 2, 8), (3, 2, 6), (2, 1, 2)])
def test_classes_and_batches_follow_the_folder(tmp_path: Path, classes: int, each: int, batch: int) -> None:
    recipe, said = load(folder_of(tmp_path, classes, each))
    assert recipe.model.num_classes == classes
    for section in (recipe.prefold, recipe.postfold):
        assert section.train is not None and section.train.batch_size == batch
    assert any(text.startswith(f"model.num_classes is {classes}") for text in said)


def test_parts_and_pairs_of_a_batch_stay_whole_and_held_out_images_do_not_count(tmp_path: Path) -> None:
    root = folder_of(tmp_path, 3, 5)
    keys = {"accumulate": 2, "mixup": 0.2, "patience": 1, "holdout": 0.25}
    recipe, _ = load(root, *(f"prefold.train.{key}={value}" for key, value in keys.items()))
    # 15 images less a quarter are 11; two parts of pairs make it 8.
    assert recipe.prefold.train is not None and recipe.prefold.train.batch_size == 8


def test_a_whole_run_is_never_adapted(tmp_path: Path) -> None:
    recipe, said = load(folder_of(tmp_path, 2, 1), quick=False)
    assert recipe.model.num_classes == 1000 and said == []
