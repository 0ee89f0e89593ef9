"""Activation ranges against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ExportError
from pipeline.export.observe import Observer
from pipeline.export.ranges import Range, activation_ranges


def observer_of(batch: int = 1, ends: tuple[str, ...] = ()) -> Observer:
    """A file whose only activation is its input."""
    return Observer(lambda images: {"x": images}, batch, ends)


def pictures(values: np.ndarray) -> list[np.ndarray]:
    return [values.astype(np.float32).reshape(-1, 1, 1, values.shape[-1])]


@settings(deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=40), st.integers(1, 7))
def test_minmax_is_the_extremes_and_zero_whatever_the_batch(values: list[float], batch: int) -> None:
    array = np.array(values, dtype=np.float32).reshape(-1, 1)
    found = activation_ranges(observer_of(batch), pictures(array))["x"]
    assert found == Range(min(0.0, float(array.min())), max(0.0, float(array.max())))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_percentile_keeps_the_share_asked_for(seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((40, 500))
    found = activation_ranges(observer_of(), pictures(values), method="percentile", percentile=98.0)["x"]
    low, high = np.percentile(values, [1.0, 99.0])
    width = (values.max() - values.min()) / 2048
    assert found.low == pytest.approx(low, abs=2 * width)
    assert found.high == pytest.approx(high, abs=2 * width)


def test_mse_beats_every_other_clipping_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal(20_000), [60.0, -45.0]]).astype(np.float32)

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        rounded = np.clip(np.round((values - low) / step), 0, 255) * step + low
        return float(((values - rounded) ** 2).mean())

    found = activation_ranges(observer_of(), pictures(values.reshape(1, -1)), method="mse")["x"]
    grid = [error(-45 * a, 60 * b) for a in np.linspace(0.05, 1, 40) for b in np.linspace(0.05, 1, 40)]
    assert found.high < 60 and found.low > -45
    assert error(found.low, found.high) <= 1.05 * min(grid)


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_the_ends_of_the_graph_are_never_clipped(method: str) -> None:
    values = np.concatenate([np.random.default_rng(1).standard_normal(5000), [80.0]]).reshape(1, -1)
    found = activation_ranges(observer_of(ends=("x",)), pictures(values), method=method)["x"]
    assert found.high == 80.0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no calibration images"),
        ([np.full((1, 1, 1, 2), np.nan, np.float32)], "calibration batch 0 holds NaN"),
    ],
)
def test_useless_images_are_refused(images: list[np.ndarray], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        activation_ranges(observer_of(), images)


def test_an_activation_that_is_not_finite_is_named() -> None:
    broken = Observer(lambda images: {"blocks.3.2": images / 0.0}, 1, ())
    with np.errstate(divide="ignore"), pytest.raises(ExportError, match=r"'blocks\.3\.2' is NaN or infinite"):
        activation_ranges(broken, [np.ones((1, 1, 1, 2), np.float32)])


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ExportError, match="unknown range method 'entropy'"):
        activation_ranges(observer_of(), [], method="entropy")
