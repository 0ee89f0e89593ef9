"""Calibration images: chosen by seed, recorded, never from the split that judges."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.files import FileSource, Sample
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import DataError
from pipeline.export.calibration import collect

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
