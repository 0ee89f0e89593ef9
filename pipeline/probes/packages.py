"""Whether the packages that Python finds as `pipeline` and `targets` are layerfold's.

Both names are common. Another distribution, or a folder earlier on the path, can hide ours, and what then runs is not
what was installed.
"""

__all__ = ["probe"]

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

from pipeline.probes import Finding

_NAMES = ("pipeline", "targets")


def probe(*, own: str = "layerfold", path: Sequence[str] | None = None) -> list[Finding]:
    """Compares where `pipeline` and `targets` were imported from with where layerfold is installed.

    Args:
        own: Layerfold's distribution.
        path: The import path; Python's own unless given.
    """
    try:
        distribution = metadata.distribution(own)
    except metadata.PackageNotFoundError:
        return [Finding("layerfold", own, "broken", "not installed", "pip install -e . in layerfold's folder")]
    owners = metadata.packages_distributions()
    return [_examine(name, distribution, owners, sys.path if path is None else path) for name in _NAMES]


def _examine(
    name: str, distribution: metadata.Distribution, owners: Mapping[str, list[str]], path: Sequence[str]
) -> Finding:
    expected = _installed_at(distribution, name)
    imported = Path(str(import_module(name).__file__)).resolve().parent
    title = f"package {name}"
    if imported != expected:
        fix = f"remove {imported.parent} from PYTHONPATH, or run outside it; or install layerfold alone in a new .venv"
        return Finding("layerfold", title, "broken", f"imported from {imported}, layerfold's is {expected}", fix)
    others = sorted(set(owners.get(name, [])) - {distribution.metadata["Name"]})
    if others:
        detail = f"{imported}; the distribution {', '.join(others)} brings a package of the same name"
        return Finding("layerfold", title, "optional", detail, f"pip uninstall {' '.join(others)}, or use a new .venv")
    rivals = [str(rival) for rival in _rivals(name, path) if rival != imported]
    if rivals:
        detail = f"{imported}; a package of the same name lies in {', '.join(rivals)}"
        return Finding("layerfold", title, "optional", detail, "remove that folder from the import path")
    return Finding("layerfold", title, "ok", f"{distribution.version} at {imported}")


def _installed_at(distribution: metadata.Distribution, name: str) -> Path:
    """The package's folder as the distribution knows it; an editable install names its source folder."""
    text = distribution.read_text("direct_url.json")
    if text:
        record = json.loads(text)
        if record.get("dir_info", {}).get("editable"):
            return (Path(unquote(urlparse(record["url"]).path)) / name).resolve()
    return Path(str(distribution.locate_file(name))).resolve()


def _rivals(name: str, path: Sequence[str]) -> list[Path]:
    found = []
    for entry in path:
        folder = Path(entry or ".").resolve()
        if (folder / name / "__init__.py").is_file():
            found.append(folder / name)
        elif (folder / f"{name}.py").is_file():
            found.append(folder / f"{name}.py")
    return found
