"""The file source: the same images whatever the workers, and damaged files named, not fatal."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.files import FileSource, Sample
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import DataError

SPEC = Preprocessing(16)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(23):
        path = tmp_path / f"{i:02d}.png"
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(path)
        made.append(Sample(path, i))
    return made


def source(samples: list[Sample], workers: int = 0) -> FileSource:
    return FileSource("made", samples, SPEC, num_classes=len(samples), workers=workers)


def collected(made: FileSource, **options: int | bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images.clone(), labels.clone()) for images, labels in made.batches(5, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("train", [False, True])
def test_images_do_not_depend_on_the_number_of_workers(samples: list[Sample], train: bool) -> None:
    alone = collected(source(samples, 0), train=train, seed=2, epoch=1)
    together = collected(source(samples, 2), train=train, seed=2, epoch=1)
    assert len(alone) == len(together) == (4 if train else 5)
    for (images, labels), (images2, labels2) in zip(alone, together, strict=True):
        assert torch.equal(images, images2) and torch.equal(labels, labels2)


def test_a_pass_resumes_to_the_bit_and_epochs_differ(samples: list[Sample]) -> None:
    whole = collected(source(samples), train=True, seed=2, epoch=1)
    rest = collected(source(samples), train=True, seed=2, epoch=1, start_step=3)
    assert torch.equal(whole[3][0], rest[0][0]) and len(rest) == 1
    other = collected(source(samples), train=True, seed=2, epoch=2)
    assert not torch.equal(whole[0][0], other[0][0])


def test_evaluation_is_the_preprocessing_in_order(samples: list[Sample]) -> None:
    images = torch.cat([images for images, _ in collected(source(samples))])
    for i, sample in enumerate(samples):
        with Image.open(sample.path) as picture:
            assert torch.equal(images[i], SPEC.eval_image(picture))


def test_torchs_global_generator_is_left_alone(samples: list[Sample]) -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    collected(source(samples), train=True)
    assert torch.equal(torch.rand(3), expected)


def damage(samples: list[Sample], which: dict[int, bytes]) -> None:
    for i, content in which.items():
        samples[i].path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_are_left_out_of_evaluation_and_named(samples: list[Sample], workers: int) -> None:
    damage(samples, {3: b"", 7: samples[7].path.read_bytes()[:200], 9: b"<html>404</html>"})
    made = source(samples, workers)
    labels = torch.cat([labels for _, labels in collected(made)])
    assert labels.tolist() == [i for i in range(23) if i not in (3, 7, 9)]
    assert set(made.unreadable) == {str(samples[i].path) for i in (3, 7, 9)}
    assert "UnidentifiedImageError" in made.unreadable[str(samples[9].path)]


def test_training_batches_keep_their_size_around_a_damaged_file(samples: list[Sample]) -> None:
    whole = collected(source(samples), train=True, seed=1)
    damage(samples, {6: b"no image"})
    made = source(samples)
    repaired = collected(made, train=True, seed=1)
    assert [len(labels) for _, labels in repaired] == [5, 5, 5, 5]
    for (images, labels), (images2, labels2) in zip(whole, repaired, strict=True):
        for i in range(5):
            if labels[i] == 6:
                assert labels2[i] == 7
            else:
                assert labels2[i] == labels[i] and torch.equal(images[i], images2[i])
    assert list(made.unreadable) == [str(samples[6].path)]


def test_many_damaged_files_are_an_error(samples: list[Sample]) -> None:
    damage(samples, dict.fromkeys(range(11), b""))
    with pytest.raises(DataError, match="more than 10 of 23 image files cannot be decoded") as caught:
        collected(source(samples))
    assert str(samples[0].path) in caught.value.what


def test_samples_are_named_by_their_files(samples: list[Sample]) -> None:
    made = source(samples)
    assert made.paths(4) == str(samples[4].path)
    assert str(samples[4].path) in made.describe(4)
