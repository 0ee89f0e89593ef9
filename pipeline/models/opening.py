"""Opens a network by a model file of ours or by its name."""

__all__ = ["open_model"]

from pathlib import Path

from pipeline.errors import ModelError
from pipeline.models import store, weights, zoo
from pipeline.models.store import StoredModel


def open_model(what: str) -> StoredModel:
    """Reads a `.pt` file of ours, or builds a published network with its pretrained weights.

    Args:
        what: A path that ends in `.pt`, or a name such as `tf_efficientnet_lite0`.

    Returns:
        The network in evaluation mode; its `meta` holds `name`, `num_classes`, `input_px`, `preprocess` and, for a
        published network, `weights`.

    Raises:
        ModelError: There is no such file, or no such name.
        WeightsError: The network has no pretrained weights, or they cannot be had.
    """
    if what.endswith(".pt"):
        return store.load(Path(what))
    if Path(what).exists():
        raise ModelError(f"{what} is no .pt file", hint="give a .pt file that layerfold wrote, or a model's name")
    # After `zoo`, which repairs torchvision before anything imports timm.
    import timm

    zoo.check_name(what)
    config = timm.get_pretrained_cfg(what)
    if config is None or weights.choose(what) == "none":
        raise ModelError(
            f"'{what}' has no published weights", hint="train it by a recipe, and give the run's models/baseline.pt"
        )
    model = zoo.create(what, num_classes=config.num_classes)
    origin = weights.load(model, what, num_classes=config.num_classes)
    input_px = config.input_size[-1]
    preprocess = {
        "input_px": input_px,
        "mean": list(config.mean),
        "std": list(config.std),
        "crop_fraction": config.crop_pct,
        "interpolation": config.interpolation,
    }
    meta = {"name": what, "num_classes": config.num_classes, "input_px": input_px, "preprocess": preprocess}
    return StoredModel(model.eval(), {**meta, "weights": origin.as_dict()})
