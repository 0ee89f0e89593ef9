"""Models by name, with random weights: timm's, and the families that layerfold adds.

Importing this module first repairs `import timm` beside a mismatched torchvision; see `torchvision_repair`.
"""

__all__ = ["check_name", "create", "family", "names"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from pipeline.errors import ModelError, nearest
from pipeline.models import cifar_resnet, cifar_vgg, mlp, small_mobilenet
from pipeline.models.torchvision_repair import repair

repair()

import timm  # noqa: E402  (timm imports only after the repair)


@dataclass(frozen=True)
class Family:
    """A group of models that one function builds.

    Attributes:
        title: What the family is, for listings.
        names: The names it answers to.
        build: `build(name, num_classes=, in_chans=, input_px=, args=)` with random weights.
    """

    title: str
    names: tuple[str, ...]
    build: Callable[..., nn.Module]


def _build_small_mobilenet(
    name: str, *, num_classes: int, in_chans: int, input_px: int, args: Mapping[str, object]
) -> nn.Module:
    return small_mobilenet.create(name, num_classes=num_classes, in_chans=in_chans, args=args)


FAMILIES: tuple[Family, ...] = (
    Family("MobileNetV2 for 32-px images", tuple(small_mobilenet.WIDTHS), _build_small_mobilenet),
    Family("ResNet for 32-px images", cifar_resnet.NAMES, cifar_resnet.build),
    Family("VGG for 32-px images", cifar_vgg.NAMES, cifar_vgg.build),
    Family("fully connected networks", mlp.NAMES, mlp.build),
)
"""Families beside timm's; a name found here wins over timm."""


def create(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    input_px: int = 224,
    args: Mapping[str, object] | None = None,
) -> nn.Module:
    """Builds a model with random weights (`weights.load` fills them).

    Args:
        name: A name of `names()`, e.g. `mobilenetv2_100`, `tf_efficientnet_lite0`, `mobilenetv2_cifar_050`.
        num_classes: Outputs of the classifier.
        in_chans: Channels of the input image.
        input_px: Side of the square input, in pixels; only networks of fixed input size read it.
        args: Further keyword arguments of the builder (for timm: of `timm.create_model`), e.g. `drop_rate`.

    Returns:
        A module from Tensor[N, in_chans, input_px, input_px] to logits Tensor[N, num_classes].

    Raises:
        ModelError: The name is unknown (the nearest one is named) or the builder refuses the arguments.
    """
    given = dict(args or {})
    own = family(name)
    if own is not None:
        return own.build(name, num_classes=num_classes, in_chans=in_chans, input_px=input_px, args=given)
    check_name(name)
    if _has_fixed_input(name):
        given.setdefault("img_size", input_px)
    try:
        model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_chans, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise ModelError(
            f"timm cannot build '{name}' with {given or 'no arguments'}: {error}",
            hint="mend model.args and model.input_px",
        ) from error
    assert isinstance(model, nn.Module)
    return model


def check_name(name: str) -> None:
    """Refuses a name that `create` does not know.

    Raises:
        ModelError: The name is unknown; the nearest known one is in the message.
    """
    if family(name) is None and not timm.is_model(name):
        raise ModelError(
            "; ".join(filter(None, [f"unknown model '{name}'", nearest(name, names())])),
            hint="model.name is a name of timm.list_models() or one of "
            + ", ".join(n for f in FAMILIES for n in f.names),
        )


def family(name: str) -> Family | None:
    """The own family that answers to the name; None for timm's models and unknown names."""
    return next((f for f in FAMILIES if name in f.names), None)


def names() -> list[str]:
    """Every name that `create` answers to, own families first (timm's pretrained tags left out)."""
    return [name for f in FAMILIES for name in f.names] + list(timm.list_models())


def _has_fixed_input(name: str) -> bool:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(config is not None and config.fixed_input_size)
