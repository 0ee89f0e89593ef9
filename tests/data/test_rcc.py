"""Qt resource files, written here byte by byte from the format's facts."""

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.rcc import read_rcc
from pipeline.errors import DataError

Tree = dict[str, "bytes | Tree"]


def build(tree: Tree, version: int, *, compress: bool = False) -> bytes:
    """A resource file: nodes breadth first, as Qt's compiler lays them out."""
    nodes: list[tuple[str, bytes | Tree]] = [("", tree)]
    first_child: dict[int, int] = {}
    for index, (_, value) in enumerate(nodes):  # grows while it is walked
        if isinstance(value, dict):
            first_child[index] = len(nodes)
            nodes.extend(value.items())
    names, data, table = b"", b"", b""
    for index, (name, value) in enumerate(nodes):
        name_at = len(names)
        encoded = name.encode("utf-16-be")
        names += struct.pack(">HI", len(encoded) // 2, 0) + encoded
        if isinstance(value, dict):
            table += struct.pack(">IHII", name_at, 2, len(value), first_child[index])
        else:
            content = struct.pack(">I", len(value)) + zlib.compress(value) if compress else value
            table += struct.pack(">IHHHI", name_at, 1 if compress else 0, 0, 1, len(data))
            data += struct.pack(">I", len(content)) + content
        if version > 1:
            table += struct.pack(">q", 1_600_000_000_000)
    header = 20 if version < 3 else 24
    offsets = (header + len(data) + len(names), header, header + len(data))
    head = b"qres" + struct.pack(">iiii", version, *offsets) + (struct.pack(">i", 0) if version > 2 else b"")
    return head + data + names + table


NAMES = st.text(st.characters(codec="utf-16-be", exclude_characters="/\0"), min_size=1, max_size=6)
TREES = st.recursive(
    st.dictionaries(NAMES, st.binary(max_size=20), max_size=3),
    lambda inner: st.dictionaries(NAMES, st.one_of(st.binary(max_size=20), inner), max_size=3),
    max_leaves=8,
)


def flat(tree: Tree, parent: str = "") -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, value in tree.items():
        path = f"{parent}/{name}" if parent else name
        found.update(flat(value, path) if isinstance(value, dict) else {path: value})
    return found


@settings(max_examples=60, deadline=None)
@given(tree=TREES, version=st.sampled_from([1, 2, 3]), compress=st.booleans())
def test_every_tree_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, tree: Tree, version: int, compress: bool
) -> None:
    path = tmp_path_factory.mktemp("rcc") / "made.rcc"
    path.write_bytes(build(tree, version, compress=compress))
    assert read_rcc(path) == flat(tree)


TREE: Tree = {"a": {"one.WEBP": b"1" * 40, "two.txt": b"2"}, "three.png": b"3"}


def test_suffixes_choose_files(tmp_path: Path) -> None:
    (tmp_path / "made.rcc").write_bytes(build(TREE, 3))
    assert list(read_rcc(tmp_path / "made.rcc", suffixes=(".webp", ".png"))) == ["three.png", "a/one.WEBP"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda blob: b"PK\x03\x04" + blob[4:], "no Qt resource file"),
        (lambda blob: blob[:4] + struct.pack(">i", 9) + blob[8:], "version 9"),
        (lambda blob: blob[:12], "damaged"),
        (lambda blob: blob[:-10], "damaged"),
        (lambda blob: blob[:-3], "damaged"),
        (lambda blob: b"", "no Qt resource file"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "made.rcc"
    path.write_bytes(damage(build(TREE, 3, compress=True)))  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        read_rcc(path)
    assert str(path) in caught.value.what


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.rcc"):
        read_rcc(tmp_path / "nowhere.rcc")
