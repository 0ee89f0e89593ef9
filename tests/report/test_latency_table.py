"""The latency table names what it compares: milliseconds, instructions and cycles are never mixed up."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.report.latency import latency_table
from pipeline.results.schema import LatencyRow


def row(**change: Any) -> LatencyRow:
    base = {
        "target": "host-litert", "runtime": "litert 2.3", "precision": "int8", "threads": 1, "baseline_ms": 2.0,
        "folded_ms": 1.5, "ratio": 0.75, "ratio_low": 0.7, "ratio_high": 0.8, "valid": True, "note": "",
    }  # fmt: skip
    return LatencyRow.model_validate(base | change)


def cells(*rows: LatencyRow) -> tuple[list[tuple[str, ...]], str]:
    report: Any = SimpleNamespace(batch=1, latency=list(rows))
    table = latency_table(report)
    assert all(len(line.cells) == len(table.header) for line in table.rows)
    return [line.cells for line in table.rows], table.note


@pytest.mark.parametrize("metric", ["time", "processor time"])
def test_times_have_milliseconds_and_an_interval(metric: str) -> None:
    ((target, _, before, after, compared, change, interval),), note = cells(row(metric=metric))
    assert target == "host-litert (litert 2.3, 1 thread)"
    assert (before, after, compared, change, interval) == ("2.000 ms", "1.500 ms", metric, "-25.0%", "0.700 to 0.800")
    assert ("Processor time leaves out" in note) == (metric == "processor time")
    assert "counted" not in note


@pytest.mark.parametrize("metric", ["instructions", "cycles"])
def test_counts_have_no_milliseconds(metric: str) -> None:
    counted = row(
        target="emulated-arm64", metric=metric, baseline_ms=None, folded_ms=None, baseline_count=49_168_000,
        folded_count=41_511_000, ratio=0.8443, ratio_low=0.8443, ratio_high=0.8443,
    )  # fmt: skip
    ((_, _, before, after, compared, change, interval),), note = cells(counted)
    assert (before, after, compared, change, interval) == ("49.168 M", "41.511 M", metric, "-15.6%", "counted")
    assert "say nothing of milliseconds" in note and "interleaved" not in note


def test_equal_counts_show_no_difference() -> None:
    same = row(metric="instructions", baseline_count=5, folded_count=5, ratio=1.0, ratio_low=1.0, ratio_high=1.0)
    assert cells(same)[0][0][-1] == "counted (no difference shown)"


def test_a_compile_check_has_no_cost_and_is_no_failure() -> None:
    check = row(metric="none", ratio=None, baseline_ms=None, folded_ms=None, note="ran: htp")
    lines, _ = cells(check)
    assert lines[0][2:] == ("", "", "compiles?", "", "ran: htp") and not check.failed
    lost = row(ratio=None, baseline_ms=None, folded_ms=None, note="gone", valid=False)
    assert lost.failed and cells(lost)[0][0][-1] == "gone"


def test_a_ratio_without_an_interval_says_why() -> None:
    (only,), _ = cells(row(ratio_low=None, ratio_high=None))
    assert only[-1] == "too few runs to tell"


def test_a_doubt_stands_once_below_the_table() -> None:
    doubtful = {"valid": False, "note": "the cores were busy"}
    lines, note = cells(
        row(), row(precision="fp32", **doubtful), row(target="b", **doubtful), row(**{**doubtful, "note": "hot"})
    )
    assert [line[-1].removeprefix("0.700 to 0.800") for line in lines] == ["", " [1]", " [1]", " [2]"]
    assert note.endswith("[1] the cores were busy. [2] hot.") and note.count("busy") == 1
