"""idx files, gzipped or plain, whole or damaged."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import idx
from pipeline.errors import DataError


def encode(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_set(folder: Path, images: int = 6, labels: int = 6, *, compress: bool = True) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (images, 28, 28), dtype=np.uint8)
    classes = np.arange(labels, dtype=np.uint8) % 10
    for stem in ("train", "t10k"):
        for kind, values in (("images-idx3", pixels), ("labels-idx1", classes)):
            name = f"{stem}-{kind}-ubyte"
            blob = encode(values)
            (folder / (name + ".gz" if compress else name)).write_bytes(gzip.compress(blob) if compress else blob)
    return pixels


@pytest.mark.parametrize("compress", [True, False])
def test_what_is_written_is_read(tmp_path: Path, compress: bool) -> None:
    assert not idx.has_files(tmp_path)
    pixels = write_set(tmp_path, compress=compress)
    assert idx.has_files(tmp_path)
    images, labels = idx.read_split(tmp_path, "test")
    assert np.array_equal(images, pixels)
    assert labels.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda blob: gzip.compress(gzip.decompress(blob)[:-5]), "its header says 6 × 28 × 28"),
        (lambda blob: blob[: len(blob) // 2], "cannot be read"),
        (lambda blob: b"<html>", "cannot be read"),
        (lambda blob: gzip.compress(b"\0\0\x0d\x01" + bytes(8)), "no idx file of unsigned bytes"),
        (lambda blob: gzip.compress(b"\0\0\x08\x03\0\0"), "cut short"),
        (lambda blob: gzip.compress(encode(np.zeros((6, 28), np.uint8))), "2 dimensions, expected 3"),
        (lambda blob: gzip.compress(encode(np.zeros((5, 28, 28), np.uint8))), "5 train images but 6 labels"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: object, message: str) -> None:
    write_set(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        idx.read_split(tmp_path, "train")
    assert str(tmp_path) in caught.value.what
