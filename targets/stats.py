"""Compares two measurements: the ratio of their times, and how sure one can be of it.

The spread from process to process exceeds the spread inside one, so the bootstrap has two levels: processes first,
then runs inside each (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). With the few
processes that anyone has patience for, percentile intervals are too short: resampling n values loses the factor
(n-1)/n of their variance and ignores that it was estimated. Both are made good by widening around the estimate by
sqrt(n/(n-1)) * t[n-1] / z (Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 4).

Time is what the clock on the wall says, unless other processes had the core for a part of it: then the wall measures
the neighbours, and for models of one thread the processor time of the process is compared in its place.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from targets.base import Measurement
from targets.errors import StatsError
from targets.gates import MAX_FOREIGN_SHARE

__all__ = ["Ratio", "ratio_interval"]

RESAMPLES = 2000
# The least and the largest of n pairs hold the median between them in all but 2 of 2**n cases: under 5% from six on.
_FEWEST_PAIRS = 6
_Z = 1.959963984540054
# Student's t at 97.5% for 1..30 degrees of freedom (any statistics table).
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """Cost of `other` divided by cost of the baseline: under 1 means that `other` is cheaper.

    Attributes:
        ratio: The estimate.
        low, high: Its 95% interval; equal to the estimate for a cost that is counted, not timed.
        metric: What was compared: ``time`` (on the wall), ``processor time``, ``instructions`` or ``cycles``.
        paired: Whether runs were compared with their neighbours in time.
        processes: Number of processes that the interval rests on.
        too_few: Whether one process with so few runs is all there is, so that nothing can be told from the interval;
            a single pair has none, and `low` and `high` are `None`.
    """

    ratio: float
    low: float | None
    high: float | None
    metric: Literal["time", "processor time", "instructions", "cycles"] = "time"
    paired: bool = True
    processes: int = 1
    too_few: bool = False

    @property
    def difference_shown(self) -> bool:
        """Whether there are runs enough for an interval, and it leaves out 1."""
        if self.too_few or self.low is None or self.high is None:
            return False
        return self.high < 1.0 or self.low > 1.0

    @property
    def verdict(self) -> str:
        """One short phrase: how much less or more, ``no difference shown``, or ``too few runs to tell``."""
        if self.too_few:
            return "too few runs to tell"
        if not self.difference_shown:
            return "no difference shown"
        less = "less" if self.metric.endswith("time") else "fewer"
        if self.ratio < 1:
            return f"{1 - self.ratio:.1%} {less} {self.metric}"
        return f"{self.ratio - 1:.1%} more {self.metric}"

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values fit for JSON, with the verdict."""
        return {**asdict(self), "difference_shown": self.difference_shown, "verdict": self.verdict}

    def __str__(self) -> str:
        if not self.metric.endswith("time"):
            return f"{self.ratio:.3f} in {self.metric} (counted, not timed): {self.verdict}"
        caveat = ""
        if self.processes == 1:
            caveat = "; one process only, the spread between processes is not in the interval"
        if self.low is None or self.high is None:
            return f"{self.ratio:.3f} in {self.metric} (no interval): {self.verdict}"
        return f"{self.ratio:.3f} in {self.metric} (95% {self.low:.3f} to {self.high:.3f}): {self.verdict}{caveat}"


def ratio_interval(baseline: Measurement, other: Measurement, *, resamples: int = RESAMPLES, seed: int = 0) -> Ratio:
    """Compares two measurements by run time, else by instructions, else by cycles.

    Rows whose runs were interleaved are compared pair by pair (a quad A B B A at a time, which cancels a linear drift
    and the cost of finding the other model's data in the cache); others are compared median by median.

    Args:
        baseline: The measurement in the denominator.
        other: The measurement in the numerator.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap; the same seed gives the same interval.

    Raises:
        StatsError: If either row is a failure, they share no figure, or they are not of the same target, device and
            number of threads.
    """
    for row in (baseline, other):
        if row.failure:
            raise StatsError(f"{row.target} has no figure for {row.model}: {row.invalid_reason}")
    for what, one, another in (
        ("targets", baseline.target, other.target),
        ("devices", baseline.device.id, other.device.id),
        ("threads", baseline.threads, other.threads),
    ):
        if one != another:
            raise StatsError(f"rows of different {what} are not compared: {one} and {another}")
    if baseline.samples_ms and other.samples_ms:
        return _time_ratio(baseline, other, resamples, np.random.default_rng(seed))
    if baseline.instructions is not None and other.instructions is not None:
        return _counted(baseline.instructions, other.instructions, "instructions")
    if baseline.cycles is not None and other.cycles is not None:
        return _counted(baseline.cycles, other.cycles, "cycles")
    raise StatsError(
        f"{baseline.model} ({baseline.target}) and {other.model} ({other.target}) share no figure to compare",
        hint="measure both files on the same target",
    )


def _counted(baseline: float, other: float, metric: Literal["instructions", "cycles"]) -> Ratio:
    if baseline <= 0 or other <= 0:
        raise StatsError(f"{metric} must be positive, found {baseline} and {other}")
    ratio = other / baseline
    return Ratio(ratio, ratio, ratio, metric=metric, paired=False)


def _time_ratio(baseline: Measurement, other: Measurement, resamples: int, generator: np.random.Generator) -> Ratio:
    paired = bool(baseline.interleaved_with) and baseline.interleaved_with == other.interleaved_with
    shares = [row.foreign_share for row in (baseline, other)]
    own = all(share is not None for share in shares) and max(filter(None, shares), default=0.0) > MAX_FOREIGN_SHARE
    a_samples, b_samples = (row.cpu_samples_ms if own else row.samples_ms for row in (baseline, other))
    if paired:
        if len(a_samples) != len(b_samples):
            raise StatsError(f"interleaved rows have {len(a_samples)} and {len(b_samples)} processes")
        blocks = [_quads(a, b) for a, b in zip(a_samples, b_samples, strict=True)]
        centre = float(np.mean([np.median(block) for block in blocks]))
        draws = _bootstrap(blocks, resamples, generator)
        processes = len(blocks)
        fewest = min(map(len, blocks))
    else:
        logs = [[np.log(np.asarray(p)) for p in samples] for samples in (a_samples, b_samples)]
        centre = float(np.mean([np.median(p) for p in logs[1]]) - np.mean([np.median(p) for p in logs[0]]))
        draws = _bootstrap(logs[1], resamples, generator) - _bootstrap(logs[0], resamples, generator)
        processes = min(len(logs[0]), len(logs[1]))
        fewest = min(len(process) for those in logs for process in those)
    # One process says nothing of the spread between processes (`Ratio.__str__` says so); its runs stand for themselves.
    alone = processes == 1
    factor = _widening(fewest if alone else processes)
    low, high = (float(value) for value in np.percentile(draws, [2.5, 97.5]))
    return Ratio(
        ratio=math.exp(centre),
        low=math.exp(centre - factor * max(centre - low, 0.0)) if factor else None,
        high=math.exp(centre + factor * max(high - centre, 0.0)) if factor else None,
        metric="processor time" if own else "time",
        paired=paired,
        processes=processes,
        too_few=alone and fewest < _FEWEST_PAIRS,
    )


def _quads(baseline: Sequence[float], other: Sequence[float]) -> NDArray[np.float64]:
    """Log ratio of each A B B A quad: runs 2k and 2k+1 of either file. A single run stands for itself."""
    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if len(a) != len(b):
        raise StatsError(f"interleaved rows have {len(a)} and {len(b)} runs in one process")
    if len(a) > 1:
        even = len(a) - len(a) % 2
        a, b = a[:even].reshape(-1, 2).sum(axis=1), b[:even].reshape(-1, 2).sum(axis=1)
    return np.asarray(np.log(b / a), dtype=np.float64)


def _bootstrap(
    blocks: Sequence[NDArray[np.float64]], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Draws processes, then runs inside each drawn one; returns the mean of the medians, shape [resamples]."""
    medians = np.empty((resamples, len(blocks)))
    chosen = generator.integers(len(blocks), size=(resamples, len(blocks)))
    for which, block in enumerate(blocks):
        rows, columns = np.nonzero(chosen == which)
        picks = generator.integers(len(block), size=(len(rows), len(block)))
        medians[rows, columns] = np.median(block[picks], axis=1)
    return np.asarray(medians.mean(axis=1), dtype=np.float64)


def _widening(values: int) -> float:
    """Factor from a percentile interval to one that is honest for so few resampled values; 0 where one is all."""
    if values < 2:
        return 0.0
    freedom = values - 1
    t = _T[freedom - 1] if freedom <= len(_T) else _Z
    return math.sqrt(values / freedom) * t / _Z
