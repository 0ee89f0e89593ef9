"""Where an accuracy–depth curve bends: the broken-stick knee, and whether several networks share one.

The model of a network's curve is flat down to the knee k and falls linearly below it,
accuracy(d) = plateau − slope·max(0, k − d) with slope ≥ 0, fitted by least squares for every integer k ("broken stick",
Hinkley 1969). Two networks share a knee if one k for both explains the points about as well as two.
"""

__all__ = ["Hinge", "SharedKnee", "fit_hinge", "shared_knee", "tolerance_knee"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Points = Sequence[tuple[int, float]]
"""(depth, accuracy as a fraction), any order; several points may have one depth."""

_MIN_POINTS = 4
_CHI2_95 = 3.84
# Accuracies are counts over thousands of images: a fit cannot be trusted to be closer than this.
_FLOOR = 1e-6


@dataclass(frozen=True)
class Hinge:
    """A broken stick.

    Attributes:
        knee: The depth k below which accuracy falls.
        low: Smallest depth in k's 95 % profile-likelihood interval.
        high: Largest depth in it.
        plateau: Accuracy from k upwards.
        slope: Accuracy lost per non-linear layer below k.
        rss: Residual sum of squares.
    """

    knee: int
    low: int
    high: int
    plateau: float
    slope: float
    rss: float


@dataclass(frozen=True)
class SharedKnee:
    """One knee for several networks, each with its own plateau and slope.

    Attributes:
        knee: The common k of least squares.
        low: Smallest depth in its 95 % profile-likelihood interval.
        high: Largest depth in it.
        rss: Residual sum of squares with the common k.
        rss_separate: The same with a k for each network.
        p_value: Of the likelihood-ratio test of "one knee for all" (χ², networks − 1 degrees of freedom); small
            means that the networks do not share it. Optimistic with few points: neighbouring runs are not independent.
    """

    knee: int
    low: int
    high: int
    rss: float
    rss_separate: float
    p_value: float


def tolerance_knee(points: Points, tolerance: float) -> int:
    """The smallest measured depth from which no deeper one lies more than `tolerance` below the best accuracy."""
    best = max(accuracy for _, accuracy in points)
    kept = None
    for depth in sorted({d for d, _ in points}, reverse=True):
        # The best run of a depth speaks for it: others of the same depth removed worse-chosen activations.
        if max(a for d, a in points if d == depth) < best - tolerance:
            break
        kept = depth
    return max(d for d, _ in points) if kept is None else kept


def fit_hinge(points: Points) -> Hinge | None:
    """Fits a broken stick; None for fewer than four points or a single depth."""
    if not _enough(points):
        return None
    profile = _profile(points)
    knee, (plateau, slope, rss) = min(profile.items(), key=lambda item: (item[1][2], item[0]))
    low, high = _interval({k: row[2] for k, row in profile.items()}, len(points))
    return Hinge(knee, low, high, plateau, slope, rss)


def shared_knee(curves: Mapping[str, Points]) -> SharedKnee | None:
    """Fits one knee to all networks that have enough points; None for fewer than two of them."""
    usable = {name: points for name, points in curves.items() if _enough(points)}
    if len(usable) < 2:
        return None
    shallow = max(min(d for d, _ in points) for points in usable.values())
    deep = min(max(d for d, _ in points) for points in usable.values())
    profiles = [_profile(points) for points in usable.values()]
    common = {k: sum(profile[k][2] for profile in profiles) for k in range(shallow, deep + 1) if _in_all(k, profiles)}
    if not common:
        return None
    count = sum(len(points) for points in usable.values())
    knee = min(common, key=lambda k: (common[k], k))
    separate = sum(min(row[2] for row in profile.values()) for profile in profiles)
    ratio = count * math.log(max(common[knee], _FLOOR) / max(separate, _FLOOR))
    half_df = torch.tensor((len(usable) - 1) / 2, dtype=torch.float64)
    p_value = float(torch.special.gammaincc(half_df, torch.tensor(max(ratio, 0.0) / 2, dtype=torch.float64)))
    low, high = _interval(common, count)
    return SharedKnee(knee, low, high, common[knee], separate, p_value)


def _enough(points: Points) -> bool:
    return len(points) >= _MIN_POINTS and len({d for d, _ in points}) > 2


def _in_all(knee: int, profiles: Sequence[Mapping[int, object]]) -> bool:
    return all(knee in profile for profile in profiles)


def _profile(points: Points) -> dict[int, tuple[float, float, float]]:
    """Plateau, slope and residual sum of squares of the best stick for each k."""
    depths = np.array([d for d, _ in points], dtype=np.float64)
    accuracies = np.array([a for _, a in points], dtype=np.float64)
    fits = {}
    for knee in range(int(depths.min()), int(depths.max()) + 1):
        below = np.maximum(knee - depths, 0.0)
        plateau, slope = float(accuracies.mean()), 0.0
        if below.any():
            design = np.stack([np.ones_like(below), -below], axis=1)
            solved = np.linalg.lstsq(design, accuracies, rcond=None)[0]
            if solved[1] > 0:
                plateau, slope = float(solved[0]), float(solved[1])
        residual = accuracies - (plateau - slope * below)
        fits[knee] = plateau, slope, float(residual @ residual)
    return fits


def _interval(rss: Mapping[int, float], count: int) -> tuple[int, int]:
    """The k that a likelihood-ratio test at 5 % does not refuse."""
    best = max(min(rss.values()), _FLOOR)
    inside = [k for k, value in rss.items() if count * math.log(max(value, _FLOOR) / best) <= _CHI2_95]
    return min(inside), max(inside)
