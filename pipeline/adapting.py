"""Makes a recipe of a short trial fit the data set that is there: its classes, and batches no larger than it."""

__all__ = ["adapted"]

from collections.abc import Callable

from pipeline.recipe import Recipe, TrainSection, parse
from pipeline.recipe_files import apply_overrides


def adapted(recipe: Recipe, *, say: Callable[[str], None]) -> Recipe:
    """The recipe with the class count of its data set and batches that its training images can fill.

    Args:
        recipe: The checked recipe; without `data.adapt` it comes back as it is.
        say: Told of every value that changes, and of downloads.

    Raises:
        DataError: The data set is not there.
    """
    if not recipe.data.adapt:
        return recipe
    from pipeline.data import datasets
    from pipeline.stages import workbench

    resolved = datasets.resolve_once(recipe.data.name, recipe.data.root, recipe.data.fallback, say=say)
    source = datasets.open_split(
        resolved, "train", workbench.preprocessing(recipe), limit=recipe.data.train_images, seed=recipe.seed
    )
    changes: dict[str, int] = {}
    if source.num_classes is not None:
        changes["model.num_classes"] = source.num_classes
    for stage in ("baseline", "prefold", "postfold"):
        train = getattr(recipe, stage).train
        if train is not None:
            changes[f"{stage}.train.batch_size"] = _batch_size(train, len(source))
    if recipe.quantize.method == "qat":
        changes["quantize.qat.batch_size"] = min(recipe.quantize.qat.batch_size, len(source))
    raw = recipe.model_dump(mode="json")
    fitted = apply_overrides(raw, changes, origin="data.adapt")
    for key, value in changes.items():
        section: object = recipe
        for part in key.split("."):
            section = getattr(section, part)
        if section != value:
            say(
                f"{key} is {value}, by {len(source)} training images of {resolved.location} (the recipe says {section})"
            )
    return parse(fitted, origin="data.adapt")


def _batch_size(train: TrainSection, images: int) -> int:
    """The section's batch size, or the largest that the images fill; parts and pairs stay whole."""
    if train.patience is not None:
        images = int(images * (1 - train.holdout))
    whole = train.accumulate * (2 if train.mixup or train.cutmix else 1)
    return min(train.batch_size, max(images // whole, 1) * whole)
