"""What a run's results depend on outside its recipe."""

import hashlib
from pathlib import Path

import pytest

from pipeline import facts, recipe_files
from pipeline.errors import ModelError, WeightsError


def weights_of(source: str, image_folder: Path, *overrides: str) -> str:
    keys = [f"model.weights={source}", "data.name=imagefolder", f"data.root={image_folder}", *overrides]
    return facts.gather(recipe_files.load("quickstart", overrides=keys), say=print)["weights"]


def test_a_file_inside_a_package_is_a_source_of_weights(image_folder: Path) -> None:
    # Any installed file will do: only its digest is taken here.
    path = Path(pytest.__file__).with_name("__init__.py")
    text = weights_of("package:pytest/pytest/__init__.py", image_folder)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    with pytest.raises(WeightsError, match=r"no one file 'no_such\.h5'"):
        weights_of("package:pytest/no_such.h5", image_folder)


def test_other_weights_are_another_fact(image_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(b"one")
    first = weights_of(str(path), image_folder)
    path.write_bytes(b"two")
    assert weights_of(str(path), image_folder) != first
    assert weights_of("none", image_folder) == "none"
    with pytest.raises(WeightsError, match="did you mean 'packaged'"):
        weights_of("packagd", image_folder)
    with pytest.raises(ModelError, match="unknown model 'mobilenetv2_10O'"):
        weights_of("hub", image_folder, "model.name=mobilenetv2_10O")
