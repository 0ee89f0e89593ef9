"""What files that `layerfold export` makes say about themselves, from what their `.pt` file knows."""

__all__ = ["card_of", "file_content"]

from collections.abc import Sequence
from typing import Any

import pipeline
from pipeline.export.calibration import Calibration
from pipeline.export.census_types import Census
from pipeline.export.model_card import ModelCard


def file_content(meta: dict[str, Any], stem: str, input_kind: str) -> dict[str, Any]:
    """What every file says about itself: what the `.pt` file knows, without where its images lay on that machine."""
    data = meta.get("data")
    return {
        **meta,
        "model": stem,
        "units_folded": list(meta.get("units_folded", [])),
        "labels": list(meta.get("labels", [])),
        "licence": meta.get("licence") or "not stated by the source of the weights",
        "data": data.get("name") if isinstance(data, dict) else None,
        "layerfold": pipeline.__version__,
        "input": input_kind,
    }


def card_of(stem: str, content: dict[str, Any], taken: Calibration | None, files: Sequence[Census]) -> ModelCard:
    """The card of files that were made without a recipe; what nobody knows is said to be not stated."""
    weights = content.get("weights")
    origin = f"{weights['source']}: {weights['detail']}" if isinstance(weights, dict) else "not stated by the .pt file"
    data = {} if content["data"] is None else {"Trained or fitted on": content["data"]}
    if taken is not None:
        data["Calibrated on"] = f"{taken.count} images of {taken.source}, seed {taken.seed}"
    kind = "uint8 pixels" if content["input"] == "uint8" else "normalised float32"
    made_with = {"layerfold": content["layerfold"], "recipe": content.get("recipe"), "hash": content.get("recipe_hash")}
    return ModelCard(
        name=stem,
        summary=f"An image classifier, {content.get('name', stem)} at {content['input_px']} px.",
        licence=content["licence"],
        weights=origin,
        data=data,
        preprocessing=dict(content.get("preprocess") or {}) | {"input": kind},
        units_folded=content["units_folded"],
        files=files,
        made_with={key: str(value) for key, value in made_with.items() if value},
        limits=["The classes are those of the training data; a picture of anything else is still given one of them."],
    )
