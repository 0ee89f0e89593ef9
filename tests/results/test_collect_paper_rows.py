"""The published figures are those of the paper's table, and a wrong key is named."""

import pytest

from pipeline.errors import RecipeError
from pipeline.results.collect import paper_row


def test_the_rows_are_the_papers() -> None:
    # Layer Folding, BMVC 2022, table 2: accuracy, drop, latency reduction, FLOPs reduction.
    published = {
        "mobilenetv2_075": (68.1, 1.7, 21, 4),
        "mobilenetv2_100": (71.0, 0.8, 25, 7),
        "mobilenetv2_140": (75.5, 0.5, 19, 3),
        "efficientnet_lite0": (74.6, 0.5, 15, 3),
        "efficientnet_lite1": (75.8, 1.0, 13, 0),
    }
    for key, figures in published.items():
        row = paper_row(key)
        assert row is not None
        reductions = (row.latency_reduction_percent, row.flops_reduction_percent)
        ours = (100 * row.accuracy, row.accuracy_drop_points, *reductions)
        assert ours == pytest.approx(figures)


def test_a_wrong_row_names_the_nearest() -> None:
    assert paper_row(None) is None
    with pytest.raises(RecipeError, match="did you mean 'mobilenetv2_100'"):
        paper_row("mobilnetv2_100")
