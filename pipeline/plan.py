"""From a recipe to its ordered stages, each with a content hash. Pure: no files are read or written.

A stage's hash covers its own sections of the recipe, its code version, the outside facts that its result depends
on (which data set is there, which weights, which host), and the hashes of its parents. Equal hash means equal
result, so a finished stage is never run again.
"""

__all__ = ["Plan", "PlannedStage", "build", "run_folder_name"]

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.recipe import Recipe

_HASH_CHARS = 12


@dataclass(frozen=True)
class _StageSpec:
    name: str
    sections: tuple[str, ...]
    parents: tuple[str, ...]
    facts: tuple[str, ...] = ()
    code_version: int = 1
    """Raised by hand when a stage's code changes what it computes."""


_SPECS = (
    _StageSpec(
        "baseline", ("seed", "model", "preprocess", "data", "baseline"), (), ("data", "weights"), code_version=2
    ),
    _StageSpec("prefold", ("prefold",), ("baseline",), code_version=3),
    _StageSpec("fold", ("fold",), ("baseline", "prefold"), code_version=3),
    _StageSpec("postfold", ("postfold",), ("baseline", "fold"), code_version=2),
    _StageSpec("export", ("export",), ("baseline", "postfold"), code_version=4),
    _StageSpec("quantize", ("quantize",), ("baseline", "postfold", "export"), code_version=4),
    _StageSpec("verify", ("verify",), ("baseline", "postfold", "export", "quantize"), code_version=3),
    _StageSpec("bench", ("bench",), ("export", "quantize"), ("host",), code_version=3),
    _StageSpec(
        "report",
        ("report", "name", "description", "variant"),
        ("baseline", "prefold", "fold", "postfold", "export", "quantize", "verify", "bench"),
        code_version=3,
    ),
)


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan.

    Attributes:
        index: Position in the plan, from 0.
        name: The stage's name, which is also its module in `pipeline.stages`.
        config: The recipe's sections that the stage reads.
        facts: The outside facts that its result depends on.
        parents: Names of the stages whose output it reads.
        hash: Content hash over all of the above and the parents' hashes, hexadecimal.
    """

    index: int
    name: str
    config: Mapping[str, Any]
    facts: Mapping[str, str]
    parents: tuple[str, ...]
    hash: str

    @property
    def folder(self) -> str:
        """Name of the stage's folder inside `stages/`."""
        return f"{self.index}-{self.name}-{self.hash}"


@dataclass(frozen=True)
class Plan:
    """A recipe's stages in the order in which they run."""

    recipe: Recipe
    stages: tuple[PlannedStage, ...]

    def stage(self, name: str) -> PlannedStage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


def build(recipe: Recipe, facts: Mapping[str, str]) -> Plan:
    """Plans a recipe.

    Args:
        recipe: The checked recipe.
        facts: `data`, `weights` and `host`: what the machine offers, as `pipeline.facts.gather` found it.
    """
    resolved = recipe.resolved()
    hashes: dict[str, str] = {}
    stages = []
    for index, spec in enumerate(_SPECS):
        config = {section: resolved[section] for section in spec.sections}
        stage_facts = {fact: facts[fact] for fact in spec.facts}
        content = {
            "stage": spec.name,
            "code_version": spec.code_version,
            "config": config,
            "facts": stage_facts,
            "parents": [hashes[parent] for parent in spec.parents],
        }
        hashes[spec.name] = _digest(content)
        stages.append(
            PlannedStage(index, spec.name, config, stage_facts, spec.parents, hashes[spec.name]),
        )
    return Plan(recipe, tuple(stages))


def run_folder_name(recipe: Recipe) -> str:
    """`<recipe>-<hash>` over the whole resolved recipe, the default name of a run's folder."""
    return f"{recipe.name}-{_digest(recipe.resolved())[:8]}"


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_CHARS]
