"""The in-memory source: resumable to the bit, and augmenting as it says."""

import numpy as np
import pytest
import torch

from pipeline.data.preprocessing import Preprocessing
from pipeline.data.sources import ArraySource, ImageSource
from pipeline.errors import DataError

SIDE, PAD = 12, 2
SPEC = Preprocessing(SIDE, (0.0,) * 3, (1.0,) * 3, 1.0)


def source(count: int = 50, *, channels: int = 1, flip: bool = True) -> ArraySource:
    pixels = np.random.default_rng(1).integers(1, 256, (count, channels, SIDE, SIDE), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64)  # a label of its own for each image
    return ArraySource("made", pixels, labels, SPEC, num_classes=count, crop_pad=PAD, flip=flip)


def test_it_keeps_the_protocol() -> None:
    assert isinstance(source(), ImageSource)


def test_evaluation_is_in_order_and_whole() -> None:
    batches = list(source(50).batches(16))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(50))
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (50, 3, SIDE, SIDE) and images.dtype == torch.float32
    expected = source(50)._pixels.astype(np.float64) / 255
    np.testing.assert_allclose(images.numpy(), np.broadcast_to(expected, (50, 3, SIDE, SIDE)), atol=1e-7)


def test_training_drops_the_partial_batch_and_repeats_no_image() -> None:
    made = source(50)
    labels = torch.cat([labels for _, labels in made.batches(16, train=True, seed=3)])
    assert len(labels) == 48 == 16 * made.steps(16, True)
    assert len(set(labels.tolist())) == 48
    assert labels.tolist() != sorted(labels.tolist())


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_a_pass_resumes_to_the_bit(start: int) -> None:
    whole = list(source().batches(16, train=True, seed=5, epoch=2))
    rest = list(source().batches(16, train=True, seed=5, epoch=2, start_step=start))
    assert len(rest) == len(whole) - start
    for (images, labels), (images2, labels2) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, images2) and torch.equal(labels, labels2)


def test_an_images_augmentation_ignores_the_batch_size() -> None:
    def by_label(batch_size: int) -> dict[int, torch.Tensor]:
        return {
            int(label): image
            for images, labels in source(48).batches(batch_size, train=True, seed=1, epoch=1)
            for image, label in zip(images, labels, strict=True)
        }

    small, large = by_label(4), by_label(24)
    assert small.keys() == large.keys()
    assert all(torch.equal(small[key], large[key]) for key in small)


def test_epochs_and_seeds_differ() -> None:
    def first(seed: int, epoch: int) -> torch.Tensor:
        return next(iter(source().batches(16, train=True, seed=seed, epoch=epoch)))[0]

    assert not torch.equal(first(0, 0), first(0, 1))
    assert not torch.equal(first(0, 0), first(1, 0))


@pytest.mark.parametrize(("flip", "channels"), [(True, 1), (True, 3), (False, 1)])
def test_every_training_image_is_a_crop_of_its_padded_original(flip: bool, channels: int) -> None:
    made = source(40, channels=channels, flip=flip)
    seen: set[tuple[int, int, bool]] = set()
    for epoch in range(8):
        for images, labels in made.batches(20, train=True, epoch=epoch):
            for image, label in zip(images, labels, strict=True):
                seen.add(_placement(image, made._pixels[int(label)]))
    offsets = {(top, left) for top, left, _ in seen}
    assert offsets == {(top, left) for top in range(2 * PAD + 1) for left in range(2 * PAD + 1)}
    assert {mirrored for _, _, mirrored in seen} == ({True, False} if flip else {False})


def _placement(image: torch.Tensor, original: np.ndarray) -> tuple[int, int, bool]:
    """Finds by brute force where an augmented image was cut from."""
    pixels = np.rint(image.numpy() * 255).astype(np.uint8)
    padded = np.pad(np.broadcast_to(original, (3, SIDE, SIDE)), ((0, 0), (PAD, PAD), (PAD, PAD)))
    for mirrored in (False, True):
        for top in range(2 * PAD + 1):
            for left in range(2 * PAD + 1):
                crop = padded[:, top : top + SIDE, left : left + SIDE]
                if np.array_equal(pixels, crop[..., ::-1] if mirrored else crop):
                    return top, left, mirrored
    raise AssertionError("an image is no crop of its original")


def test_unlabelled_images_have_label_minus_one() -> None:
    pixels = np.zeros((3, 3, SIDE, SIDE), dtype=np.uint8)
    made = ArraySource("made", pixels, None, SPEC)
    assert not made.labelled and made.num_classes is None
    assert next(iter(made.batches(3)))[1].tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2, np.int64), "8×8 px, preprocessing says 12"),
        (np.zeros((2, 2, SIDE, SIDE), np.uint8), np.zeros(2, np.int64), "expected uint8"),
        (np.zeros((2, 1, SIDE, SIDE), np.float32), np.zeros(2, np.int64), "expected uint8"),
        (np.zeros((2, 1, SIDE, SIDE), np.uint8), np.zeros(3, np.int64), "2 images but labels"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(pixels: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ArraySource("made", pixels, labels, SPEC)


def test_a_batch_larger_than_the_training_set_is_refused() -> None:
    with pytest.raises(DataError, match="too few for one batch of 64"):
        next(source(50).batches(64, train=True))
    with pytest.raises(DataError, match="batch size is 0"):
        next(source(50).batches(0))
