"""Published figures that tables are set beside (Layer Folding, BMVC 2022, table 2; latency on a Titan X Pascal)."""

__all__ = ["IMAGENET_ROWS"]

from pipeline.results.schema import PaperRow


def _row(model: str, accuracy: float, drop: float, latency: float, flops: float) -> PaperRow:
    return PaperRow(
        model=model,
        accuracy=accuracy,
        accuracy_drop_points=drop,
        latency_reduction_percent=latency,
        flops_reduction_percent=flops,
    )


IMAGENET_ROWS = {
    "mobilenetv2_075": _row("MNV2-0.75", 0.681, 1.7, 21, 4),
    "mobilenetv2_100": _row("MNV2-1.0", 0.710, 0.8, 25, 7),
    "mobilenetv2_140": _row("MNV2-1.4", 0.755, 0.5, 19, 3),
    "efficientnet_lite0": _row("EffNet-lite0", 0.746, 0.5, 15, 3),
    "efficientnet_lite1": _row("EffNet-lite1", 0.758, 1.0, 13, 0),
}
