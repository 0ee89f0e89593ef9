"""The schema of a study file, and the recipe runs that it stands for."""

__all__ = ["Cell", "Study", "cells", "is_study", "load", "study_folder_name"]

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from pipeline import recipe_files
from pipeline.errors import RecipeError, nearest
from pipeline.recipe import Recipe, parse
from pipeline.recipe_training import Positive, Section

Strength = Annotated[float, Field(ge=0)]
Strengths = Annotated[tuple[Strength, ...], Field(min_length=1)]

# What a study gives each of its runs, and where it says so; the same key in its recipe would be lost.
_GIVEN_BY_THE_STUDY = {
    "name": "the study's name and the network's make it",
    "variant": "`--quick` sets it",
    "seed": "list them in the study's key 'seeds'",
    "prefold.lambda_c": "list them in the key 'lambda_c' of the study or of the network",
    "quick": "put what `--quick` changes into the study's own section 'quick', as 'recipe.…'",
}


class Study(Section):
    """Several networks × several λ_c, each a run of the same recipe with some keys changed."""

    study: Literal["ednl"]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: str = ""
    variant: Literal["full", "quick"] = "full"
    """Set by `--quick`, so that a short study is never taken for a full one."""
    reduced: str = ""
    """What is less than in the paper (images, epochs, resolution); shown with every result."""
    lambda_c: Strengths
    """λ_c of each run; 0 keeps the depth and is what the others are compared with."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)] = (0,)
    measure: Literal["settled", "folded"] = "settled"
    """What is scored: the network with its linear activations gone, or that network folded and fine-tuned."""
    tolerance_points: Positive = 1.0
    """Percentage points below a network's best that still count as no loss."""
    recipe: dict[str, Any]
    """The recipe that all runs share, without a name."""
    networks: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """For each network what it changes in the recipe: dotted keys and values, such as `model.name: mlp_4`.

    The key `lambda_c` is no recipe key: it holds the network's own list in place of the study's. What the study
    itself says of each run (`seed`, `prefold.lambda_c`) has no place here, nor in `recipe`.
    """
    quick: dict[str, Any] = Field(default_factory=dict)
    """Dotted overrides that `--quick` applies before `--set`."""

    def resolved(self) -> dict[str, Any]:
        """The study with every default written out, as plain data."""
        return self.model_dump(mode="json", exclude={"quick"})


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        network: The network's name in the study.
        lambda_c: λ_c of its pre-folding.
        seed: Its seed.
        recipe: The run's whole recipe.
    """

    network: str
    lambda_c: float
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> str:
        """Name of the run's folder inside the study's `cells`."""
        return f"{self.network}-lambda{self.lambda_c:g}-seed{self.seed}"


def is_study(name: str) -> bool:
    """Whether a shipped name or a path is a study file rather than a recipe.

    Raises:
        RecipeError: There is no such file, or it is no YAML mapping.
    """
    return "study" in recipe_files.read(recipe_files.find(name))


def load(name: str, *, overrides: Iterable[str] = (), quick: bool = False) -> Study:
    """Reads a study by shipped name or path, with overrides applied in the order `quick`, then `--set`.

    Raises:
        RecipeError: A key is unknown or a value does not fit, in the study or in one of its runs.
    """
    path = recipe_files.find(name)
    raw = recipe_files.overridden(recipe_files.read(path), path, overrides, quick)
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(
            f"{path}: " + "; ".join(_explain(d) for d in error.errors()), hint="mend the study"
        ) from error
    cells(study)
    return study


def _explain(detail: Any) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{key}' {nearest(str(detail['loc'][-1]), Study.model_fields)}".rstrip()
    return f"'{key}': {detail['msg']}"


def cells(study: Study) -> list[Cell]:
    """The runs of a study, network by network, λ_c rising.

    Raises:
        RecipeError: A run's recipe does not fit the recipe schema, or has a key that the study gives each run;
            network and key are named.
    """
    found = []
    _refuse_given(_dotted(study.recipe), f"study '{study.name}', recipe")
    for network, given in study.networks.items():
        origin = f"study '{study.name}', network '{network}'"
        changes = dict(given)
        strengths = _strengths(changes.pop("lambda_c", study.lambda_c), origin)
        _refuse_given(_dotted(changes), origin)
        for seed in study.seeds:
            for lambda_c in strengths:
                keys = {**_dotted(changes), "prefold.lambda_c": lambda_c, "seed": seed}
                keys |= {"name": f"{study.name}-{network}", "variant": study.variant}
                raw = recipe_files.apply_overrides(study.recipe, keys, origin=origin)
                found.append(Cell(network, lambda_c, seed, parse(raw, origin=origin)))
    return found


def _strengths(given: Any, origin: str) -> list[float]:
    """The λ_c of a network, rising, each once."""
    try:
        return sorted(set(TypeAdapter(Strengths).validate_python(given)))
    except ValidationError as error:
        raise RecipeError(
            f"{origin}: lambda_c is {given!r}, expected one or more numbers of 0 or more", hint="mend it"
        ) from error


def _refuse_given(keys: Iterable[str], origin: str) -> None:
    """Refuses what the study would silently put its own value over."""
    for key in keys:
        for given, instead in _GIVEN_BY_THE_STUDY.items():
            if f"{key}.".startswith(f"{given}."):
                raise RecipeError(f"{origin}: '{key}' is given by the study", hint=f"leave it out: {instead}")


def study_folder_name(study: Study) -> str:
    """`<study>-<hash>` over the whole resolved study, the default name of its folder."""
    text = json.dumps(study.resolved(), sort_keys=True)
    return f"{study.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _dotted(changes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys: what `--set networks.a.model.name=b` makes of a network's changes."""
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        if isinstance(value, Mapping) and key != "args":
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def study_folder(study: Study, out: Path | None) -> Path:
    """The study's folder: the one asked for, else `runs/<study>-<hash>` below the current folder."""
    return out if out is not None else Path("runs") / study_folder_name(study)
