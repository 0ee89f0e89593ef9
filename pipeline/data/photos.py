"""Unlabelled photos that come as Debian packages, for distillation without labels.

GCompris carries natural photos inside Qt resource files, Tux Paint carries cut-out photos with transparency. They are
prepared once: laid on white, at most 640 px, one PNG each, named by origin.
"""

__all__ = ["PACKAGES", "fetch", "find_here"]

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
from PIL import Image

from pipeline.data import cache, debian
from pipeline.data.preprocessing import to_rgb
from pipeline.data.rcc import read_rcc
from pipeline.errors import DataError

PACKAGES = ("gcompris-qt-data", "tuxpaint-stamps-default")

_MAX_PX = 640
_MIN_PX = 96
_VERSION = 1
_GCOMPRIS_FOLDER = "usr/share/gcompris-qt/rcc"
# Resource files whose pictures are photographs, and the folder inside that holds them (the others are drawings).
_GCOMPRIS_PHOTOS = {
    "categorization.rcc": "categorization/resource/images/",
    "erase.rcc": "erase/resource/",
    "explore_farm_animals.rcc": "explore_farm_animals/resource/animals/",
    "explore_monuments.rcc": "explore_monuments/resource/",
    "explore_world_animals.rcc": "explore_world_animals/resource/animals/",
    "explore_world_music.rcc": "explore_world_music/resource/music/",
}
_TUXPAINT_FOLDER = "usr/share/tuxpaint/stamps"
_TUXPAINT_DRAWN = {"symbols", "cartoon", "flags", "roadsigns"}


def find_here() -> tuple[Path, str] | None:
    """The prepared photos where an earlier run left them; None where they would have to be fetched."""
    record = _folder() / "photos.json"
    if not record.is_file():
        return None
    try:
        raw = json.loads(record.read_text(encoding="utf-8"))
        return _folder(), f"{raw['count']} photos of the Debian packages {', '.join(raw['packages'])}"
    except (ValueError, KeyError, TypeError):
        return None


def fetch(say: Callable[[str], None]) -> tuple[Path, str]:
    """Fetches the packages and prepares their photos in the cache.

    Raises:
        DataError: A package cannot be fetched, or the cache cannot be written.
    """
    packages = [debian.obtain(name, say=say) for name in PACKAGES]
    target = _folder()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_suffix(".lock")):
            found = find_here()
            if found is not None:
                return found
            say("preparing the photos")
            _prepare({package.name: package.root for package in packages}, target, packages)
    except OSError as error:
        raise DataError(
            f"cannot prepare photos in {target}: {error}",
            hint="free some disk, or set LAYERFOLD_CACHE to a writable folder",
        ) from error
    found = find_here()
    assert found is not None
    return found


def _prepare(roots: dict[str, Path], target: Path, packages: list[debian.Package]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".photos-") as text:
        work = Path(text) / "new"
        work.mkdir()
        seen: set[str] = set()
        for name, content in [*_gcompris(roots[PACKAGES[0]]), *_tuxpaint(roots[PACKAGES[1]])]:
            picture = _picture(content)
            digest = hashlib.sha256(picture.tobytes()).hexdigest() if picture else ""
            if picture is None or digest in seen:
                continue
            seen.add(digest)
            picture.save(work / f"{name}.png", compress_level=1)
        if not seen:
            raise DataError(f"the packages {', '.join(PACKAGES)} hold no photos where they used to")
        record = {"count": len(seen), "packages": [f"{package.name} {package.version}" for package in packages]}
        (work / "photos.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)


def _gcompris(root: Path) -> Iterator[tuple[str, bytes]]:
    for file, inside in _GCOMPRIS_PHOTOS.items():
        for name, content in read_rcc(root / _GCOMPRIS_FOLDER / file, suffixes=(".webp", ".jpg", ".png")).items():
            if inside in name:
                yield f"gcompris-{file.removesuffix('.rcc')}-{_flat(name.split(inside, 1)[1])}", content


def _tuxpaint(root: Path) -> Iterator[tuple[str, bytes]]:
    stamps = root / _TUXPAINT_FOLDER
    for path in sorted(stamps.rglob("*.png")):
        parts = path.relative_to(stamps).parts
        if not _TUXPAINT_DRAWN.intersection(parts):
            yield f"tuxpaint-{_flat('/'.join(parts))}", path.read_bytes()


def _picture(content: bytes) -> Image.Image | None:
    """The photo on white, at most 640 px; None for pictures too small to be photos."""
    with Image.open(io.BytesIO(content)) as opened:
        if min(opened.size) < _MIN_PX:
            return None
        picture = to_rgb(opened)
    picture.thumbnail((_MAX_PX, _MAX_PX), Image.Resampling.LANCZOS)
    return picture


def _flat(name: str) -> str:
    return name.rpartition(".")[0].replace("/", "-")


def _folder() -> Path:
    return cache.folder(f"photos-{_VERSION}")
