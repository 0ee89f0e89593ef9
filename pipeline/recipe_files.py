"""Finds recipes by shipped name or path, reads them, and applies `--quick` and `--set` overrides."""

__all__ = ["apply_overrides", "find", "load", "overridden", "parse_override", "read", "shipped", "shipped_studies"]

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import RecipeError, nearest
from pipeline.recipe import Recipe, parse

_STUDIES = "study/"


def shipped() -> dict[str, Path]:
    """Names of the recipes that come with the package, e.g. `mobilenet_v2/imagenet_100`, and their files."""
    return {name: path for name, path in _files().items() if not name.startswith(_STUDIES)}


def shipped_studies() -> dict[str, Path]:
    """Names of the studies that come with the package, e.g. `study/ednl`, and their files."""
    return {name: path for name, path in _files().items() if name.startswith(_STUDIES)}


def _files() -> dict[str, Path]:
    root = Path(str(resources.files("pipeline.recipes").joinpath("__init__.py"))).parent
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.yaml"))}


def find(recipe: str) -> Path:
    """The file of a recipe or study given by shipped name or by path.

    Raises:
        RecipeError: There is no such file and no shipped recipe of that name.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    known = _files()
    name = recipe.removesuffix(".yaml").removeprefix("recipes/")
    if name in known:
        return known[name]
    raise RecipeError(
        f"no recipe '{recipe}': neither a file nor a shipped name; {nearest(name, known)}".rstrip("; "),
        hint=f"give a YAML file's path or one of: {', '.join(known)}",
    )


def load(recipe: str, *, overrides: Iterable[str] = (), quick: bool = False) -> Recipe:
    """Reads a recipe by shipped name or path, with overrides applied in the order `quick`, then `--set`.

    Args:
        recipe: Shipped name or path of a YAML file.
        overrides: Texts `a.b=value`; the value is read as YAML.
        quick: Whether the recipe's `quick` overrides apply.

    Raises:
        RecipeError: The file is no YAML mapping, a key is unknown, or a value does not fit.
    """
    path = find(recipe)
    raw = read(path)
    if "study" in raw:
        raise RecipeError(
            f"{path} is a study, not a recipe", hint=f"`layerfold run {recipe}` runs it; a recipe has no key 'study'"
        )
    return parse(overridden(raw, path, overrides, quick), origin=str(path))


def read(path: Path, *, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The raw mapping of a recipe's or study's file.

    A recipe with the key `base` (a shipped name or a path) holds only what it changes in that recipe.

    Args:
        path: The file.
        above: Files that were read for the sake of their base, to notice a circle.

    Raises:
        RecipeError: The file cannot be read, is no YAML mapping, or is its own base.
    """
    raw = _read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return raw
    below = find(str(base))
    if below.resolve() in {p.resolve() for p in (*above, path)}:
        raise RecipeError(f"{path}: base '{base}' leads back to itself", hint="name another base")
    return _merged(read(below, above=(*above, path)), raw)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the changes laid over it, section by section."""
    result = _copy(base)
    for key, value in changes.items():
        below = result.get(key)
        merge = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = _merged(below or {}, value) if merge else value
    return result


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read recipe {path}: {error}", hint="give a readable YAML file") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}", hint="mend the YAML at the place named") from error
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path} holds {type(raw).__name__}, not a mapping of keys", hint="see recipes/quickstart.yaml"
        )
    return raw


def overridden(raw: Mapping[str, Any], path: Path, overrides: Iterable[str], quick: bool) -> dict[str, Any]:
    """A raw mapping with its own section `quick` applied where asked, then the `--set` texts."""
    result = dict(raw)
    if quick:
        own = raw.get("quick") or {}
        if not isinstance(own, Mapping):
            raise RecipeError(
                f"{path}: 'quick' is {own!r}, expected dotted keys with their values",
                hint="write it as recipes/quickstart.yaml does, or leave it out",
            )
        result = apply_overrides(raw, {**own, "variant": "quick"}, origin=f"{path}: quick")
    return apply_overrides(result, dict(parse_override(text) for text in overrides), origin="--set")


def parse_override(text: str) -> tuple[str, Any]:
    """Splits `a.b=value` into the dotted key and the value read as YAML."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise RecipeError(
            f"override '{text}' is not of the form key.subkey=value",
            hint="write --set baseline.train.epochs=2",
        )
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"override '{text}': the value is not valid YAML", hint="quote it: --set 'key=\"text\"'"
        ) from error


def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """A copy of a recipe's raw mapping in which each dotted key holds the given value.

    Raises:
        RecipeError: A key goes through something that is not a section.
    """
    result = _copy(raw)
    for dotted, value in overrides.items():
        if not isinstance(dotted, str):
            raise RecipeError(f"{origin}: the key {dotted!r} is no text", hint="keys are such as baseline.train.epochs")
        *parents, last = dotted.split(".")
        node = result
        for depth, parent in enumerate(parents):
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                at = ".".join(parents[: depth + 1])
                raise RecipeError(f"{origin}: {dotted}: '{at}' holds a value, not a section", hint=f"set '{at}' itself")
            node = child
        node[last] = value
    return result


def _copy(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
