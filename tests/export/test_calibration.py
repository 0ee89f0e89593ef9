"""Calibration images: chosen by seed, recorded, never from the split that judges."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.files import FileSource, Sample
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import DataError
from pipeline.export.calibration import collect, open_images

PREPROCESSING = Preprocessing(input_px=16)


def folder(path: Path, count: int, damaged: int = 0) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        file = path / f"{i:03}.jpg"
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(file)
        if i < damaged:
            file.write_bytes(file.read_bytes()[:60])
        samples.append(Sample(file, -1))
    return samples


def source(samples: list[Sample], split: str = "calibration") -> FileSource:
    return FileSource(f"photos/{split}", samples, PREPROCESSING, num_classes=None, workers=0)


def test_the_record_says_what_was_used(tmp_path: Path) -> None:
    samples = folder(tmp_path, 10)
    taken = collect(source(samples), asked=7, seed=3, batch_size=4)
    assert [len(batch) for batch in taken.batches] == [4, 3]
    record = taken.as_dict()
    assert (record["asked"], record["count"], record["seed"], record["source"]) == (7, 7, 3, "photos/calibration")
    assert record["skipped"] == {}
    assert collect(source(samples), asked=7, seed=3, batch_size=7).sha256 == record["sha256"]
    assert collect(source(samples[::-1]), asked=7, seed=3).sha256 != record["sha256"]


@pytest.mark.parametrize("split", ["eval", "labelled", "select"])
def test_the_split_that_judges_is_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match=f"calibration on 'photos/{split}' is refused"):
        collect(source(folder(tmp_path, 2), split), asked=2, seed=0)


def test_a_damaged_photo_is_skipped_named_and_counted(tmp_path: Path) -> None:
    taken = collect(source(folder(tmp_path, 12, damaged=1)), asked=12, seed=0)
    assert taken.count == 11
    [(path, reason)] = taken.skipped.items()
    assert path.endswith("000.jpg")
    assert reason


def test_too_many_damaged_photos_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"only 9 of 12 calibration images can be read, 3 are damaged: .*000\.jpg"):
        collect(source(folder(tmp_path, 12, damaged=3)), asked=12, seed=0)


@pytest.mark.parametrize(("good", "damaged"), [(8, 1), (7, 2), (1, 1), (27, 3)])
def test_a_few_damaged_photos_are_not_too_many(tmp_path: Path, good: int, damaged: int) -> None:
    taken = collect(source(folder(tmp_path, good + damaged, damaged=damaged)), asked=200, seed=0)
    assert (taken.count, len(taken.skipped)) == (good, damaged)
    assert next(iter(taken.skipped)).endswith("000.jpg")


@pytest.mark.parametrize(("good", "damaged"), [(1, 2), (0, 1), (26, 4)])
def test_more_than_half_or_a_tenth_are(tmp_path: Path, good: int, damaged: int) -> None:
    with pytest.raises(DataError, match=f"only {good} of {good + damaged} calibration images can be read"):
        collect(source(folder(tmp_path, good + damaged, damaged=damaged)), asked=200, seed=0)


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize(
    ("files", "given", "named"),
    [
        (["set/train/cat/1.png", "set/val/cat/2.png"], "set", "val/cat"),
        (["coco/val2017/1.png"], "coco/val2017", "val2017"),
        (["in/ILSVRC2012_img_val/1.png"], "in", "ILSVRC2012_img_val"),
        (["in/test-images/1.png"], "in/test-images", "test-images"),
        (["in/train/cat/1.png", "in/val/cat/2.png"], "in/val/cat", "val"),
        (["flat/ILSVRC2012_val_00000293.png"], "flat", "ILSVRC2012_val_00000293.png"),
    ],
)
def test_a_folder_that_is_or_holds_an_evaluation_set_is_refused(
    tmp_path: Path, files: list[str], given: str, named: str
) -> None:
    for file in files:
        photo(tmp_path / file)
    with pytest.raises(DataError, match=f"'{named}' names images that judge the result") as caught:
        open_images(str(tmp_path / given), PREPROCESSING, limit=4, seed=0)
    if given == "set":
        assert caught.value.hint == f"give {tmp_path / 'set' / 'train'}"


@pytest.mark.parametrize(
    ("files", "given"),
    [
        (["test/photos/1.png"], "test/photos"),
        (["test/photos/train/val/1.png"], "test/photos"),
        (["set/train/test_tube/1.png", "set/val/cat/2.png"], "set/train"),
        (["set/test_tube/test_1.png"], "set"),
        (["set/valley/1.png"], "set"),
    ],
)
def test_training_images_are_taken_whatever_lies_around_them(tmp_path: Path, files: list[str], given: str) -> None:
    for file in files:
        photo(tmp_path / file)
    assert len(open_images(str(tmp_path / given), PREPROCESSING, limit=4, seed=0)) == 1


def test_a_missing_folder_under_a_data_sets_name_is_said_to_be_neither() -> None:
    words = "there is no folder photos/train-folder, and the data set 'photos' has no split 'train-folder'"
    with pytest.raises(DataError, match=words):
        open_images("photos/train-folder", PREPROCESSING, limit=4, seed=0)
