"""Estimators for NPUs: what they say of real compilations, and of files that an NPU cannot run."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

import targets
from targets.errors import ModelFileError, OptionError, ParseError, StatsError
from targets.ethos_u import read_operators, read_summary
from targets.stats import ratio_interval

MakeModel = Callable[..., Path]
needs_vela = pytest.mark.skipif(importlib.util.find_spec("ethosu") is None, reason="needs layerfold[npu]: ethos-u-vela")
needs_qnn = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None, reason="needs layerfold[npu]: onnxruntime-qnn"
)


@needs_vela
def test_ethos_u_counts_the_macs_that_are_there_and_more_work_costs_more(make_model: MakeModel) -> None:
    files = [make_model("tflite", kind="int8"), make_model("tflite", kind="int8", layers=4)]
    small, large = targets.get("ethos-u").benchmark(files)
    # 16 x 16 outputs, 3 x 3 kernels, 3 to 8 channels and then 8 to 8. Vela counts the NPU's own: it pads channels.
    by_hand = 16 * 16 * 9 * (3 * 8 + 8 * 8)
    assert by_hand <= small.counters["macs"] <= 2 * by_hand
    assert small.cycles is not None and large.cycles is not None and small.cycles < large.cycles
    assert small.median_ms is None and small.device.kind == "estimator"
    assert small.valid and small.counters["operators_left_on_cpu"] == 0
    found = ratio_interval(small, large)
    assert found.metric == "cycles" and found.ratio > 1
    assert small.actual_accelerator == "ethos-u55-256"
    (slow,) = targets.get("ethos-u:ethos-u55-32").benchmark(files[:1])
    assert slow.cycles is not None and slow.cycles > small.cycles, "a smaller NPU takes longer"


def test_operators_that_the_npu_leaves_are_counted() -> None:
    report = "x\nCPU operators = {} (25.0%)\n   CPU: Erf = y\nNPU operators = 3 (75.0%)\n"
    assert read_operators(report.format(1)) == (1, 3)
    for text in ("", report, report.format(1) * 2):
        with pytest.raises(ParseError, match="expected once"):
            read_operators(text)


@needs_vela
def test_ethos_u_refuses_what_it_cannot_run(make_model: MakeModel) -> None:
    with pytest.raises(ModelFileError, match="is fp32"):
        targets.get("ethos-u").benchmark([make_model("tflite")])
    with pytest.raises(ModelFileError):
        targets.get("ethos-u").benchmark([make_model("onnx")])


def test_unknown_npus_are_refused() -> None:
    with pytest.raises(OptionError, match="ethos-u55-256"):
        targets.get("ethos-u:ethos-u99")
    with pytest.raises(OptionError, match="75"):
        targets.get("qnn-htp:12")


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "cycles_total\nnan\n", "cycles_total\n5\n6\n"])
def test_a_summary_that_is_none_gives_no_cycles(text: str) -> None:
    with pytest.raises(ParseError):
        read_summary(text)


@needs_qnn
def test_an_int8_model_compiles_whole_for_htp(make_model: MakeModel) -> None:
    a, b = targets.get("qnn-htp").benchmark(
        [make_model("onnx", kind="int8"), make_model("onnx", kind="int8", layers=4)]
    )
    assert a.actual_accelerator == "htp" and a.valid, a.invalid_reason
    assert a.counters["npu_partitions"] == 1 and a.counters["operators_left_on_cpu"] == 0
    assert a.counters["compiled_mb"] > 0
    with pytest.raises(StatsError, match="share no figure"):
        ratio_interval(a, b)
