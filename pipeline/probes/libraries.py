"""Libraries: whether they are there, in a version that layerfold asks for, and whether they can be imported."""

__all__ = ["probe"]

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

from packaging.requirements import Requirement

from pipeline.probes import Finding

_TIMEOUT_S = 180
# Extras without which `layerfold run quickstart` does not work; the others serve some recipes or developers only.
_NEEDED_EXTRAS = ("", "tflite", "onnx")
_SHOWN_EXTRAS = (*_NEEDED_EXTRAS, "weights", "data", "executorch", "tensorflow", "ray")
# Libraries with a compiled half that can be the wrong build, and the names they are imported by.
_MODULES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "litert-torch": "litert_torch",
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "ai-edge-quantizer": "ai_edge_quantizer.quantizer",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "onnxsim": "onnxsim",
    "onnxslim": "onnxslim",
    "executorch": "executorch.runtime",
    "tensorflow": "tensorflow",
}
_REPAIRED = "torchvision was repaired"
_IMPORT = f"""
import sys, warnings
warnings.simplefilter("ignore")
if sys.argv[1] in ("torchvision", "timm", "litert_torch"):
    from pipeline.models.torchvision_repair import repair
    if repair():
        print("{_REPAIRED}")
__import__(sys.argv[1])
"""


def probe(*, imports: bool = True, own: str = "layerfold") -> list[Finding]:
    """Examines every library that layerfold's metadata asks for, extras for developers left out.

    Args:
        imports: Whether to import those with compiled parts too, in processes of their own (seconds); versions alone
            are instant.
        own: The distribution whose requirements are examined.
    """
    try:
        texts = metadata.requires(own) or []
    except metadata.PackageNotFoundError:
        detail = f"the distribution {own} is not installed, so its requirements are unknown"
        return [Finding("layerfold", own, "broken", detail, "pip install -e . in layerfold's folder")]
    wanted = _requirements([Requirement(text) for text in texts])
    findings = {name: _version_finding(requirement, extra) for name, (requirement, extra) in wanted.items()}
    if imports:
        tried = [finding for name, finding in findings.items() if finding.status == "ok" and name in _MODULES]
        with ThreadPoolExecutor(max_workers=2) as pool:
            findings.update((finding.name, finding) for finding in pool.map(_import_finding, tried))
    return list(findings.values())


def _requirements(requirements: list[Requirement]) -> dict[str, tuple[Requirement, str]]:
    """The requirement and its extra ('' for the core) by distribution; the most needed extra wins."""
    wanted: dict[str, tuple[Requirement, str]] = {}
    for extra in _SHOWN_EXTRAS:
        for requirement in requirements:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted.setdefault(requirement.name, (requirement, extra))
    return wanted


def _version_finding(requirement: Requirement, extra: str) -> Finding:
    asked = str(requirement.specifier)
    install = f"pip install '{requirement.name}{asked}'"
    needed = extra in _NEEDED_EXTRAS
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        where = f"extra '{extra}'" if extra else "core"
        return Finding(
            "library", requirement.name, "missing" if needed else "optional", f"not installed ({where})", install
        )
    if not requirement.specifier.contains(version, prereleases=True):
        detail = f"{version} is installed, layerfold asks for {asked}"
        return Finding("library", requirement.name, "broken", detail, install)
    return Finding("library", requirement.name, "ok", version)


def _import_finding(found: Finding) -> Finding:
    """Imports a library that is there in the right version, in a process of its own: a crash is an answer too."""
    name, version = found.name, found.detail
    command = [sys.executable, "-c", _IMPORT, _MODULES[name]]
    fix = f"pip install --force-reinstall '{name}=={version}'"
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding("library", name, "broken", f"{version}: the import takes longer than {_TIMEOUT_S} s", fix)
    if done.returncode < 0:
        return Finding("library", name, "broken", f"{version}: the import dies of signal {-done.returncode}", fix)
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Finding("library", name, "broken", f"{version} does not import: {lines[-1]}", fix)
    if name == "torchvision" and _REPAIRED in done.stdout:
        detail = f"{version}, built for another torch; layerfold repairs the import and uses no compiled operator"
        return Finding("library", name, "ok", detail)
    return found
