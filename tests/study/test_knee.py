"""The knee: found where curves are made to bend, refused where there is none to find."""

import numpy as np
import pytest

from pipeline.study.knee import fit_hinge, shared_knee, tolerance_knee


def stick(knee: int, depths: range, *, plateau: float = 0.9, slope: float = 0.05) -> list[tuple[int, float]]:
    return [(d, plateau - slope * max(0, knee - d)) for d in depths]


def noisy(points: list[tuple[int, float]], seed: int, sigma: float = 0.004) -> list[tuple[int, float]]:
    noise = np.random.default_rng(seed).normal(0, sigma, len(points))
    return [(d, a + e) for (d, a), e in zip(points, noise, strict=True)]


@pytest.mark.parametrize("knee", [2, 5, 9])
def test_a_made_knee_is_found_exactly(knee: int) -> None:
    found = fit_hinge(stick(knee, range(12)))
    assert found is not None
    assert found.knee == knee == found.low == found.high
    assert (found.plateau, found.slope) == pytest.approx((0.9, 0.05))


def test_a_fit_is_the_best_of_a_fine_brute_force() -> None:
    points = noisy(stick(6, range(0, 14, 2)), seed=3, sigma=0.02)
    found = fit_hinge(points)
    assert found is not None
    brute = min(
        sum((a - (plateau - slope * max(0, knee - d))) ** 2 for d, a in points)
        for knee in range(13)
        for plateau in np.linspace(0.85, 0.95, 101)
        for slope in np.linspace(0, 0.1, 101)
    )
    assert found.rss <= brute + 1e-9 and found.rss == pytest.approx(brute, abs=1e-4)
    assert found.low <= 6 <= found.high


def test_accuracy_that_rises_with_fewer_layers_is_flat_with_its_knee_at_the_bottom() -> None:
    found = fit_hinge([(d, 0.9 - 0.01 * d) for d in range(8)])
    assert found is not None and found.slope == 0.0 and found.knee == 0


def test_too_few_points_give_no_knee() -> None:
    assert fit_hinge([(1, 0.5), (2, 0.6), (3, 0.7)]) is None
    assert fit_hinge([(3, 0.5), (3, 0.6), (3, 0.7), (3, 0.7), (4, 0.7)]) is None
    assert shared_knee({"a": stick(3, range(8)), "b": stick(3, range(2))}) is None


def test_networks_that_share_a_knee_pass_and_others_do_not() -> None:
    same = {
        n: noisy(stick(5, range(14), slope=s), i) for i, (n, s) in enumerate({"a": 0.03, "b": 0.06, "c": 0.1}.items())
    }
    shared = shared_knee(same)
    assert shared is not None and shared.knee == 5 and shared.p_value > 0.05 and shared.low <= 5 <= shared.high
    other = {"a": noisy(stick(3, range(14)), 0), "b": noisy(stick(9, range(14)), 1)}
    split = shared_knee(other)
    assert split is not None and split.p_value < 1e-6 and split.rss > 5 * split.rss_separate


def test_the_tolerance_knee_stops_at_the_first_drop_and_takes_the_best_run_of_a_depth() -> None:
    points = [(1, 0.905), (2, 0.80), (4, 0.70), (4, 0.893), (6, 0.90), (9, 0.902)]
    assert tolerance_knee(points, 0.01) == 6  # 0.893 is more than a point below the best, 0.905
    assert tolerance_knee(points, 0.013) == 4  # depth 1 is good again, but depth 2 was not
    assert tolerance_knee(points, 0.2) == 1
