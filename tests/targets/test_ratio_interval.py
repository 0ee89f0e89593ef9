"""The interval must hold its promise on data whose truth is known."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from targets.base import Device, Measurement
from targets.errors import StatsError
from targets.stats import ratio_interval

ROW = {
    "target": "t", "model_sha256": "", "precision": "fp32", "runtime": "", "runtime_version": "",
    "requested_accelerator": "cpu", "actual_accelerator": "cpu", "device": Device("h", "host"), "threads": 1,
    "pinned_cores": (), "warmup": 0, "runs": 1, "restarts": 1,
}  # fmt: skip


def row(samples: Sequence[Sequence[float]], group: str = "g") -> Measurement:
    return Measurement.from_samples(samples, model="m", interleaved_with=group, **ROW)


def simulate(
    generator: np.random.Generator, *, truth: float, between: float, within: float, processes: int, runs: int
) -> tuple[Measurement, Measurement]:
    """Two files in `processes` processes: a spread of the process, of the file in the process, and of the run."""
    a, b = [], []
    for _ in range(processes):
        shared = generator.normal(0, 0.1)
        drift = np.linspace(0, generator.normal(0, 0.1), runs)
        for file, level in ((a, 0.0), (b, np.log(truth))):
            own = level + generator.normal(0, between)
            file.append(10 * np.exp(shared + own + drift + generator.normal(0, within, runs)))
    return row(a), row(b)


@pytest.mark.parametrize("processes", [3, 6])
@pytest.mark.parametrize(("between", "within"), [(0.01, 0.002), (0.001, 0.05), (0.01, 0.05)])
def test_the_interval_covers_the_truth_as_often_as_it_says(processes: int, between: float, within: float) -> None:
    generator = np.random.default_rng(0)
    covered = 0
    trials = 120
    for _ in range(trials):
        pair = simulate(generator, truth=0.93, between=between, within=within, processes=processes, runs=20)
        found = ratio_interval(*pair, resamples=200)
        covered += found.low <= 0.93 <= found.high
    # 95% promised; three standard errors of the trials below it.
    assert covered / trials >= 0.95 - 3 * (0.95 * 0.05 / trials) ** 0.5


def test_it_is_sharp_enough_to_show_a_real_difference() -> None:
    generator = np.random.default_rng(1)
    shown = 0
    for _ in range(40):
        pair = simulate(generator, truth=0.95, between=0.008, within=0.02, processes=5, runs=40)
        shown += ratio_interval(*pair, resamples=300).difference_shown
    assert shown >= 38


def test_pairing_cancels_a_drift_that_swamps_the_difference() -> None:
    # The machine becomes twice as slow during the run; B costs 3% more at any moment.
    order = np.exp(np.linspace(0, np.log(2), 80))
    a, b = np.empty(40), np.empty(40)
    for quad in range(20):
        slots = order[4 * quad : 4 * quad + 4]
        a[2 * quad], b[2 * quad], b[2 * quad + 1], a[2 * quad + 1] = slots * [1, 1.03, 1.03, 1]
    paired = ratio_interval(row([a, a, a]), row([b, b, b]))
    assert paired.paired
    # A drift that is not quite linear inside a quad leaves a trace of second order.
    assert paired.ratio == pytest.approx(1.03, abs=2e-4)
    assert paired.high - paired.low < 0.001
    alone = ratio_interval(row([a, a, a], ""), row([b, b, b], ""))
    assert not alone.paired
    assert alone.high - alone.low > 0.05


def test_time_that_others_had_the_core_for_is_left_out() -> None:
    generator = np.random.default_rng(3)
    own_a = 10 * np.exp(generator.normal(0, 0.01, (3, 40)))
    own_b = 9 * np.exp(generator.normal(0, 0.01, (3, 40)))
    stolen = generator.exponential(15, (2, 3, 40))
    a = replace(row((own_a + stolen[0]).tolist()), cpu_samples_ms=tuple(map(tuple, own_a.tolist())))
    b = replace(row((own_b + stolen[1]).tolist()), cpu_samples_ms=tuple(map(tuple, own_b.tolist())))
    assert a.foreign_share == pytest.approx(float(stolen[0].sum() / (own_a + stolen[0]).sum()))
    found = ratio_interval(a, b)
    assert found.metric == "processor time" and found.verdict.endswith("less processor time")
    assert found.low <= 0.9 <= found.high and found.high - found.low < 0.03
    # Left to themselves, or with several threads that wait for each other, the clock on the wall counts.
    quiet = [replace(r, samples_ms=r.cpu_samples_ms) for r in (a, b)]
    assert ratio_interval(*quiet).metric == "time"
    assert ratio_interval(replace(a, threads=2), replace(b, threads=2)).metric == "time"


def test_the_same_samples_show_no_difference() -> None:
    found = ratio_interval(row([[1.0, 1.1, 0.9, 1.0]] * 3), row([[1.0, 1.1, 0.9, 1.0]] * 3))
    assert (found.ratio, found.verdict) == (1.0, "no difference shown")
    assert "no difference shown" in str(found)


def test_one_process_alone_says_what_its_interval_leaves_out() -> None:
    found = ratio_interval(row([[1.0, 1.1, 0.9, 1.0] * 3]), row([[2.0, 2.2, 1.8, 2.0] * 3]))
    assert found.difference_shown and "one process only" in str(found)


@pytest.mark.parametrize("group", ["g", ""])
@pytest.mark.parametrize("runs", [1, 2, 3, 5])
def test_a_handful_of_runs_in_one_process_shows_nothing(runs: int, group: str) -> None:
    a, b = [10.0, 10.1, 9.0, 9.9, 10.2][:runs], [10.04, 10.18, 9.3, 9.7, 10.0][:runs]
    found = ratio_interval(row([a], group), row([b], group))
    assert not found.difference_shown and found.too_few and "too few runs to tell" in str(found)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["verdict"] == "too few runs to tell"
    # A single pair has no spread to make an interval of.
    assert (found.low is None) == (runs < 2 or (group == "g" and runs < 4))
    # Several processes with a run each are the tools' way, and enough.
    assert not ratio_interval(row([a[:1]] * 3, group), row([a[:1]] * 3, group)).too_few


@pytest.mark.parametrize("runs", [12, 40])
def test_the_interval_of_one_process_covers_the_truth_inside_it(runs: int) -> None:
    generator = np.random.default_rng(5)
    trials, covered = 200, 0
    for _ in range(trials):
        pair = simulate(generator, truth=1.0, between=0.0, within=0.02, processes=1, runs=runs)
        covered += not ratio_interval(*pair, resamples=300).difference_shown
    assert covered / trials >= 0.95 - 3 * (0.95 * 0.05 / trials) ** 0.5


@pytest.mark.parametrize(
    "change", [{"target": "u"}, {"device": Device("h2", "host")}, {"threads": 4}], ids=["target", "device", "threads"]
)
def test_rows_of_different_conditions_are_not_compared(change: dict[str, Any]) -> None:
    one = row([[1.0] * 4] * 2, "")
    with pytest.raises(StatsError, match="different"):
        ratio_interval(one, replace(one, **change))


def test_the_same_seed_gives_the_same_interval() -> None:
    pair = simulate(np.random.default_rng(2), truth=0.9, between=0.01, within=0.02, processes=3, runs=10)
    assert ratio_interval(*pair, seed=4) == ratio_interval(*pair, seed=4)
    assert ratio_interval(*pair, seed=4) != ratio_interval(*pair, seed=5)


def test_counted_costs_have_no_spread() -> None:
    empty = replace(row([[1.0]]), samples_ms=(), median_ms=None)
    a, b = replace(empty, instructions=2.0e8), replace(empty, instructions=1.5e8)
    found = ratio_interval(a, b)
    assert (found.metric, found.ratio, found.low, found.high) == ("instructions", 0.75, 0.75, 0.75)
    assert found.verdict == "25.0% fewer instructions"


def test_rows_without_a_shared_figure_are_not_compared() -> None:
    timed = row([[1.0]])
    counted = replace(timed, samples_ms=(), median_ms=None, instructions=1.0)
    with pytest.raises(StatsError, match="share no figure"):
        ratio_interval(timed, counted)
    failed = replace(timed, failure="DeviceLostError", invalid_reason="gone")
    with pytest.raises(StatsError, match="gone"):
        ratio_interval(timed, failed)


def test_interleaved_rows_of_unequal_length_are_refused() -> None:
    with pytest.raises(StatsError, match="2 and 3 runs"):
        ratio_interval(row([[1.0, 1.0]]), row([[1.0, 1.0, 1.0]]))
