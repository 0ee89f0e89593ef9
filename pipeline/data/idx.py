"""Reads the idx files of the MNIST family, gzipped or plain.

Format (LeCun's MNIST page): two zero bytes, a type byte (8 = unsigned byte), the number of dimensions, each dimension
as a big-endian uint32, then the values in row-major order.
"""

__all__ = ["has_files", "read", "read_split"]

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from pipeline.errors import DataError

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

_STEMS = {"train": "train", "test": "t10k"}


def has_files(root: Path) -> bool:
    """Whether a folder holds the four files of a data set, each gzipped or plain."""
    return all(
        _find(root, f"{stem}-{kind}-ubyte") is not None
        for stem in _STEMS.values()
        for kind in ("images-idx3", "labels-idx1")
    )


def read_split(root: Path, split: str) -> tuple[Bytes, Bytes]:
    """Images and labels of one split.

    Args:
        root: Folder that holds `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte` and so on, with or without `.gz`.
        split: `train` or `test`.

    Returns:
        Images uint8 array[n, H, W] and labels uint8 array[n].

    Raises:
        DataError: A file is missing or damaged, or the numbers of images and labels differ.
    """
    found: list[Bytes] = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        name = f"{_STEMS[split]}-{kind}-ubyte"
        path = _find(root, name)
        if path is None:
            raise DataError(f"{root} holds no {name}[.gz]", hint="give the folder of the four idx files as data.root")
        values = read(path)
        if values.ndim != dimensions:
            raise DataError(f"{path} has {values.ndim} dimensions, expected {dimensions}")
        found.append(values)
    images, labels = found
    if len(images) != len(labels):
        raise DataError(f"{root}: {len(images)} {split} images but {len(labels)} labels")
    return images, labels


def read(path: Path) -> Bytes:
    """The uint8 array of one idx file.

    Raises:
        DataError: The file cannot be read, is no idx file of unsigned bytes, or has the wrong length.
    """
    try:
        blob = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="fetch the data set again") from error
    if len(blob) < 4 or blob[:3] != b"\0\0\x08":
        raise DataError(f"{path} is no idx file of unsigned bytes: it starts with {blob[:4].hex()}")
    dimensions = blob[3]
    start = 4 + 4 * dimensions
    if len(blob) < start:
        raise DataError(f"{path} is cut short inside its header")
    shape = struct.unpack_from(f">{dimensions}I", blob, 4)
    if len(blob) - start != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path} holds {len(blob) - start} values, its header says {' × '.join(map(str, shape))}")
    return np.frombuffer(blob, dtype=np.uint8, offset=start).reshape(shape)


def _find(root: Path, name: str) -> Path | None:
    return next((path for path in (root / f"{name}.gz", root / name) if path.is_file()), None)
