"""Finds recipes by shipped name or path, reads them, and applies `--quick` and `--set` overrides."""

__all__ = ["apply_overrides", "find", "load", "parse_override", "shipped"]

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import RecipeError, nearest
from pipeline.recipe import Recipe, parse


def shipped() -> dict[str, Path]:
    """Names of the recipes that come with the package, e.g. `mobilenet_v2/imagenet_100`, and their files."""
    root = Path(str(resources.files("pipeline.recipes").joinpath("__init__.py"))).parent
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.yaml"))}


def find(recipe: str) -> Path:
    """The file of a recipe given by shipped name or by path.

    Raises:
        RecipeError: There is no such file and no shipped recipe of that name.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    known = shipped()
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
    if quick:
        raw = apply_overrides(raw, {**(raw.get("quick") or {}), "variant": "quick"}, origin=f"{path}: quick")
    raw = apply_overrides(raw, dict(parse_override(text) for text in overrides), origin="--set")
    return parse(raw, origin=str(path))


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
