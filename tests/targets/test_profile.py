"""Per-operator profiles of real runtimes, and the table of two of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from targets import worker
from targets.errors import ModelFileError
from targets.profile import OperatorTime, Profile, compare, profile, table
from targets.profile_worker import median_of_runs, read_litert_summary, read_ort_trace

MakeModel = Callable[..., Path]


@pytest.mark.parametrize(("form", "word"), [("tflite", "Conv"), ("onnx", "Conv")])
def test_every_convolution_is_seen_and_the_wider_one_takes_longer(make_model: MakeModel, form: str, word: str) -> None:
    found = profile(make_model(form, channels=32, layers=3), runs=9)
    convolutions = [operator for operator in found.operators if word in operator.kind]
    assert len(convolutions) == 3
    # The first has 3 input channels, the others 32: ten times the work.
    assert convolutions[0].ms < convolutions[1].ms and convolutions[0].ms < convolutions[2].ms
    assert found.runtime_version and found.total_ms > 0


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("x")
    with pytest.raises(ModelFileError):
        profile(tmp_path / "m.txt")


SUMMARY = """
===== Run Order =====
    [node type]    [start]    [first]   [avg ms]        [%]     [cdf%]   [mem KB] [times called]   [Name]
    Delegate/Convolution (NHWC, F32) IGEMM      0.000      0.012      0.011    12.877%    12.877%      0.000             1   [Delegate]:0
    SOFTMAX      0.000      0.5      0.250    80.1%    92.9%      0.000             1   [probs]:7

===== Top by Computation Time =====
    SOFTMAX      0.000      0.5      0.250    80.1%    92.9%      0.000             1   [probs]:7
"""  # noqa: E501


def test_the_run_order_table_is_read_once() -> None:
    assert read_litert_summary(SUMMARY) == [
        {"name": "[Delegate]:0", "type": "Convolution (NHWC, F32) IGEMM", "ms": 0.011},
        {"name": "[probs]:7", "type": "SOFTMAX", "ms": 0.25},
    ]


@pytest.mark.parametrize(
    "text", ["", "nothing", "===== Run Order =====\n garbage \n===== Top by Computation Time ====="]
)
def test_a_report_without_a_table_is_refused(text: str) -> None:
    with pytest.raises(worker.Refused, match="no run-order table") as caught:
        read_litert_summary(text)
    assert caught.value.kind == "ParseError"


def test_one_disturbed_run_does_not_show() -> None:
    calm = [{"name": "a", "type": "Conv", "ms": 1.0}, {"name": "b", "type": "Add", "ms": 0.1}]
    loud = [{**calm[0], "ms": 90.0}, calm[1]]
    assert median_of_runs([calm, loud, calm]) == calm
    with pytest.raises(worker.Refused, match="2 different sets"):
        median_of_runs([calm, calm[:1]])


def test_an_onnx_trace_is_read_without_its_warm_up() -> None:
    def event(name: str, dur: int) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": "Conv"}}

    trace = [event("a", 9000), event("a", 1000), event("a", 3000), {"cat": "Session", "name": "model_run", "dur": 5}]
    assert read_ort_trace(trace, 2) == [{"name": "a", "type": "Conv", "ms": 2.0}]
    with pytest.raises(worker.Refused, match="no kernel times"):
        read_ort_trace([], 2)


def test_two_profiles_become_one_table_in_the_order_of_what_was_saved() -> None:
    def made(name: str, *operators: tuple[str, float]) -> Profile:
        return Profile(
            name, "ort", "1", tuple(OperatorTime(f"n{i}", kind, ms) for i, (kind, ms) in enumerate(operators))
        )

    baseline = made("base", ("Conv", 2.0), ("Conv", 1.0), ("Add", 0.5))
    folded = made("fold", ("Conv", 2.5), ("Pad", 1.0))
    rows = compare(baseline, folded)
    assert [(row.kind, row.baseline_count, row.other_count, round(row.saved_ms, 6)) for row in rows] == [
        ("Pad", 0, 1, -1.0), ("Conv", 2, 1, 0.5), ("Add", 1, 0, 0.5),
    ]  # fmt: skip
    assert table(baseline, folded).splitlines()[-1] == "| all | 3 | 3.500 | 2 | 3.500 | +0.000 |"
