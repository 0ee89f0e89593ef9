"""MobileNetV2 for small images: the same inverted residuals, with fewer strides than at 224 px.

A 224-px MobileNetV2 divides its input by 32, which leaves one pixel of a 32-px image. These networks divide by 8;
they are cut from timm's builder by architecture strings, so block and layer names are timm's (`blocks.1.0.conv_pw`).
"""

__all__ = ["WIDTHS", "create"]

from collections.abc import Mapping
from functools import partial

from torch import nn

from pipeline.errors import ModelError
from pipeline.models.torchvision_repair import repair

repair()

from timm.layers import get_act_layer  # noqa: E402  (timm imports only after the repair)
from timm.models._efficientnet_builder import decode_arch_def, round_channels  # noqa: E402
from timm.models.efficientnet import EfficientNet  # noqa: E402

WIDTHS = {
    "mobilenetv2_cifar_035": 0.35,
    "mobilenetv2_cifar_050": 0.5,
    "mobilenetv2_cifar_075": 0.75,
    "mobilenetv2_cifar_100": 1.0,
}
"""Width multiplier by name."""

# Expansion 6 and 3×3 kernels as in MobileNetV2 (Sandler et al. 2018, table 2). Ten inverted residuals, eight of
# them with stride 1; with the stem the strides multiply to 8: a 32-px image ends as a map of 4×4.
_BLOCKS = [
    ["ds_r1_k3_s1_c16"],
    ["ir_r2_k3_s1_e6_c24"],
    ["ir_r3_k3_s2_e6_c32"],
    ["ir_r3_k3_s2_e6_c64"],
    ["ir_r2_k3_s1_e6_c96"],
]
_STEM_CHANNELS = 16
_FEATURES = 256


def create(name: str, *, num_classes: int, in_chans: int = 3, args: Mapping[str, object] | None = None) -> nn.Module:
    """Builds a small MobileNetV2 with random weights.

    Args:
        name: A key of `WIDTHS`.
        num_classes: Outputs of the classifier.
        in_chans: Channels of the input, Tensor[N, in_chans, 32, 32] or larger.
        args: `drop_rate` (before the classifier) and `drop_path_rate` (stochastic depth), both 0 unless given.

    Raises:
        ModelError: An argument is unknown.
    """
    given = dict(args or {})
    unknown = sorted(set(given) - {"drop_rate", "drop_path_rate"})
    if unknown:
        raise ModelError(
            f"model '{name}' takes no argument '{unknown[0]}'",
            hint="model.args may hold drop_rate and drop_path_rate",
        )
    model: nn.Module = EfficientNet(
        decode_arch_def(_BLOCKS),
        num_classes=num_classes,
        in_chans=in_chans,
        num_features=_FEATURES,
        stem_size=_STEM_CHANNELS,
        fix_stem=True,
        round_chs_fn=partial(round_channels, multiplier=WIDTHS[name]),
        act_layer=get_act_layer("relu6"),
        norm_layer=nn.BatchNorm2d,
        **given,
    )
    return model
