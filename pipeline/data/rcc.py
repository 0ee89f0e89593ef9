"""Reads Qt binary resource files (`.rcc`): archives of files under a tree of names.

The format, from the bytes that Qt 5 and 6 write (all numbers big-endian):

    header  'qres', int32 version 1–3, int32 offset of the tree, of the data, of the names (version 3: int32 flags)
    tree    one node each 14 bytes (version 1) or 22 (from version 2, which append an int64 modification time):
            uint32 offset of the name, uint16 flags (1 zlib-compressed, 2 directory, 4 zstd-compressed), then
            a directory: uint32 number of children, uint32 index of the first one
            a file:      uint16 country, uint16 language, uint32 offset in the data
    names   uint16 length in characters, uint32 hash, UTF-16 characters
    data    uint32 length, then the bytes; compressed ones start with the uint32 uncompressed length (zlib only)
"""

__all__ = ["read_rcc"]

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError

_COMPRESSED_ZLIB, _DIRECTORY, _COMPRESSED_ZSTD = 1, 2, 4
_MAX_DEPTH = 32


def read_rcc(path: Path, *, suffixes: tuple[str, ...] = ()) -> dict[str, bytes]:
    """The files of a Qt resource archive.

    Args:
        path: The `.rcc` file.
        suffixes: Keeps only names that end so, in lower case, e.g. `('.jpg',)`; all files unless given.

    Returns:
        Contents by path inside the archive, in the order of the archive's tree, e.g. `gcompris/src/….jpg`.

    Raises:
        DataError: The file cannot be read, is no such archive, is cut short, or uses zstd compression.
    """
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}", hint="give a readable .rcc file") from error
    try:
        return {name: content for name, content in _walk(blob, path) if not suffixes or name.lower().endswith(suffixes)}
    except (struct.error, zlib.error, UnicodeDecodeError, IndexError) as error:
        raise DataError(f"{path} is damaged: {error}", hint="fetch the package that holds it again") from error


def _walk(blob: bytes, path: Path) -> Iterator[tuple[str, bytes]]:
    if blob[:4] != b"qres":
        raise DataError(f"{path} is no Qt resource file: it starts with {blob[:4]!r}, not b'qres'")
    version, tree, data, names = struct.unpack_from(">4i", blob, 4)
    if version not in (1, 2, 3):
        raise DataError(f"{path} has Qt resource version {version}, expected 1, 2 or 3")
    node_bytes = 14 if version == 1 else 22
    # Directories yet to open: (index of the node, path so far, depth). The root has no name of its own.
    pending = [(0, "", 0)]
    while pending:
        index, parent, depth = pending.pop(0)
        at = tree + index * node_bytes
        name_offset, flags = struct.unpack_from(">IH", blob, at)
        name = _name(blob, names + name_offset) if index else ""
        full = f"{parent}/{name}" if parent else name
        if flags & _DIRECTORY:
            if depth > _MAX_DEPTH:
                raise DataError(f"{path} is damaged: folders nest deeper than {_MAX_DEPTH}")
            children, first = struct.unpack_from(">II", blob, at + 6)
            if tree + (first + children) * node_bytes > len(blob):
                raise DataError(f"{path} is damaged: folder '{full}' lists {children} entries beyond the file's end")
            pending.extend((child, full, depth + 1) for child in range(first, first + children))
            continue
        offset = data + struct.unpack_from(">I", blob, at + 10)[0]
        yield full, _content(blob, offset, flags, path, full)


def _name(blob: bytes, at: int) -> str:
    (length,) = struct.unpack_from(">H", blob, at)
    return blob[at + 6 : at + 6 + 2 * length].decode("utf-16-be")


def _content(blob: bytes, at: int, flags: int, path: Path, name: str) -> bytes:
    (length,) = struct.unpack_from(">I", blob, at)
    raw = blob[at + 4 : at + 4 + length]
    if len(raw) != length:
        raise DataError(f"{path} is damaged: '{name}' should have {length} bytes, {len(raw)} are there")
    if flags & _COMPRESSED_ZSTD:
        raise DataError(f"{path}: '{name}' is zstd-compressed, which is not supported")
    if flags & _COMPRESSED_ZLIB:
        return zlib.decompress(raw[4:])
    return raw
