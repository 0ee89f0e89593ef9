"""Parsers of tools' output: right on every variant that the tools print, and never a number out of garbage."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from targets.errors import ParseError
from targets.parsers import benchmark_model, perf_test

RECORDED = Path(__file__).with_name("recorded")


def recorded(name: str) -> str:
    return (RECORDED / f"{name}.txt").read_text()


def test_plain_output() -> None:
    found = benchmark_model(recorded("benchmark_model_plain"))
    times = (found.avg_ms, found.init_ms, found.warmup_avg_ms, found.first_ms)
    assert times == pytest.approx((23.8412, 21.43, 24.3106, 31.204))
    assert (found.count, found.min_ms, found.max_ms, found.std_ms) == (50, 23.566, 24.502, 0.188)
    assert (found.median_ms, found.peak_memory_mb, found.accelerator) == (None, 21.5, "cpu-xnnpack")


def test_percentiles_scientific_notation_and_a_single_warmup_run() -> None:
    found = benchmark_model(recorded("benchmark_model_percentiles"))
    assert (found.avg_ms, found.p5_ms, found.median_ms, found.p95_ms) == (1240.27, 1238.753, 1239.807, 1247.415)
    assert (found.peak_memory_mb, found.accelerator) == (44.75, "gpu")


def test_logcat_prefixes_and_a_delegate_that_took_nothing() -> None:
    found = benchmark_model(recorded("benchmark_model_logcat"))
    assert (found.avg_ms, found.count, found.peak_memory_mb) == (0.9035, 60, 12.8672)
    assert found.accelerator == "cpu (nnapi took nothing)"


def test_the_old_summary() -> None:
    found = benchmark_model(recorded("benchmark_model_old"))
    assert (found.avg_ms, found.init_ms, found.first_ms, found.count) == (37.5204, 4.183, None, 25)


def test_runs_that_all_took_the_same_time() -> None:
    for line in ("count=1 curr=500", "count=7 curr=500(all same)", "count=7 curr=500 (all same)"):
        text = f"{line}\nInference timings in us: Init: 10, First inference: 9, Warmup (avg): 8, Inference (avg): 500\n"
        found = benchmark_model(text)
        assert (found.min_ms, found.avg_ms, found.max_ms, found.std_ms) == (0.5, 0.5, 0.5, 0.0)


def test_windows_line_ends_of_adb_change_nothing() -> None:
    plain = recorded("benchmark_model_plain")
    assert benchmark_model(plain.replace("\n", "\r\n")) == benchmark_model(plain)


def test_partly_delegated() -> None:
    text = recorded("benchmark_model_percentiles").replace("completely executed", "partially executed")
    assert benchmark_model(text).accelerator == "gpu-partial"


SUMMARY = "Inference timings in us: Init: 5685, First inference: 18535, Warmup (avg): 14462.3, Inference (avg): 14575.2"


@pytest.mark.parametrize(
    "prefix",
    [
        "... tflite  : ",
        "tflite  : ",
        "I tflite  : ",
        "I/tflite  ( 4321): ",
        "06-21 10:12:13.101  4321  4321 I tflite  : ",
        "06-21 10:12:13.101 10123  4321  4321 I tflite  : ",
        "06-21 10:12:13.101 u0_a12  4321  4321 I tflite  : ",
        "06-21 10:12:13.101123  4321  4321 I tflite  : ",
        "2024-06-21 10:12:13.101 I/tflite  ( 4321): ",
    ],
)
def test_every_form_of_prefix_in_the_wild(prefix: str) -> None:
    assert benchmark_model(f"{prefix}{SUMMARY}\n") == benchmark_model(f"{SUMMARY}\n")


def test_the_line_of_tflites_own_documentation() -> None:
    text = "... tflite  : Average inference timings in us: Warmup: 91471, Init: 4108, Inference: 80660.1\n"
    found = benchmark_model(text)
    assert (found.avg_ms, found.init_ms, found.warmup_avg_ms) == pytest.approx((80.6601, 4.108, 91.471))


def test_a_load_of_no_time_and_an_inference_of_none_are_different_things() -> None:
    assert benchmark_model(SUMMARY.replace("5685", "0") + "\n").init_ms == 0
    with pytest.raises(ParseError, match="not a time"):
        benchmark_model(SUMMARY.replace("18535", "0") + "\n")


@pytest.mark.parametrize(
    ("first", "second", "ran"),
    [
        ("Explicitly applied GPU", "Explicitly applied XNNPACK", "gpu-partial"),
        ("Explicitly applied XNNPACK", "Explicitly applied GPU", "gpu-partial"),
        ("Applied GPU", "Applied XNNPACK", "gpu-partial"),
    ],
)
def test_what_xnnpack_takes_of_the_rest_hides_no_other_delegate(first: str, second: str, ran: str) -> None:
    form = "INFO: {} delegate, and the model graph will be partially executed by the delegate w/ 2 delegate kernels.\n"
    assert benchmark_model(form.format(first) + form.format(second) + SUMMARY + "\n").accelerator == ran


def test_the_old_words_for_a_delegate() -> None:
    line = "Applied GPU delegate, and the model graph will be completely executed w/ the delegate.\n"
    assert benchmark_model(line + SUMMARY + "\n").accelerator == "gpu"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("Inference (avg): 23841.2", "Inference (avg): nan", "no summaries"),
        ("Inference (avg): 23841.2", "Inference (avg): 0", "not a time"),
        ("Inference (avg): 23841.2", "Inference (avg): -5", "no summaries"),
        ("Inference (avg): 23841.2", "Inference (avg): 1e99", "beyond belief"),
        ("Inference (avg): 23841.2", "Inference (avg): 2384", "summary says"),
        ("Inference (avg): 23841.2", "Inference (a", "no summaries"),
        ("avg=23841.2", "avg=99999.9", "outside its own range"),
        ("min=23566", "min=29999", "out of order"),
        ("min=23566", "min=x", "not a number"),
        (" avg=23841.2 std=188", "", "cut"),
        ("count=50", "count=0", "no run was counted"),
        ("std=188", "std=188 std=189", "stands twice"),
    ],
)
def test_doubtful_benchmark_output_is_refused(old: str, new: str, says: str) -> None:
    text = recorded("benchmark_model_plain")
    assert text.count(old) == 1
    with pytest.raises(ParseError, match=re.escape(says)):
        benchmark_model(text.replace(old, new))


def test_two_runs_in_one_output_are_not_mixed_up() -> None:
    with pytest.raises(ParseError, match="2 summaries"):
        benchmark_model(recorded("benchmark_model_plain") + recorded("benchmark_model_logcat"))
    with pytest.raises(ParseError, match="nothing at all"):
        benchmark_model("")


def test_new_perf_test_output() -> None:
    found = perf_test(recorded("perf_test_new"))
    assert (found.avg_ms, found.count, found.init_ms) == (12.3456, 100, pytest.approx(29.3873))
    assert (found.min_ms, found.p50_ms, found.p90_ms, found.max_ms) == pytest.approx((11.7, 12.0, 13.0, 23.4))
    assert found.peak_memory_mb == 53248000 / 2**20


def test_newest_perf_test_output_calls_the_mean_total() -> None:
    text = recorded("perf_test_new").replace("time cost: 12.3456 ms", "time cost total: 12.345600 ms")
    assert "cost total: 12.3456" in text
    assert perf_test(text) == perf_test(recorded("perf_test_new"))
    with pytest.raises(ParseError, match="two values"):
        perf_test(text + "Average inference time cost: 13.9 ms\n")


def test_old_perf_test_output() -> None:
    found = perf_test(recorded("perf_test_old"))
    assert (found.avg_ms, found.count, found.peak_memory_mb) == (83.8059, 7160, None)
    assert found.p50_ms == pytest.approx(83.7108)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("Average inference time cost: 12.3456 ms", "Average inference time cost: inf ms", "no avg_ms"),
        ("Average inference time cost: 12.3456 ms", "Average inference time cost: 99.9 ms", "its total"),
        ("Total inference requests: 100", "Total inference requests: 0", "counted no run"),
        ("P50 Latency: 0.0120 s", "P50 Latency: 0.9 s", "out of order"),
        ("Total inference requests: 100", "Total inference requests: 100\nTotal inference requests: 7", "two values"),
    ],
)
def test_doubtful_perf_test_output_is_refused(old: str, new: str, says: str) -> None:
    text = recorded("perf_test_new")
    assert text.count(old) == 1
    with pytest.raises(ParseError, match=re.escape(says)):
        perf_test(text.replace(old, new))


@given(st.text(max_size=400))
def test_garbage_never_yields_a_number(text: str) -> None:
    for parse in (benchmark_model, perf_test):
        with pytest.raises(ParseError):
            parse(text)


FRAGMENTS = st.sampled_from(
    ["count=", "50", " first=", " curr=", " min=", " max=", " avg=", "23841.2", "1e+06", "nan", "-3", "\n", "\r\n", " ",
     "Inference timings in us: Init: ", ", First inference: ", ", Warmup (avg): ", ", Inference (avg): ", "INFO: ",
     "Average inference time cost: ", " ms", "Total inference requests: ", "I/tflite  ( 1): "]
)  # fmt: skip


@given(st.lists(FRAGMENTS, max_size=40).map("".join))
def test_scrambled_output_yields_a_sane_number_or_an_error(text: str) -> None:
    for parse in (benchmark_model, perf_test):
        try:
            found = parse(text)
        except ParseError:
            continue
        assert math.isfinite(found.avg_ms) and found.avg_ms > 0
        assert str(found.avg_ms * (1e3 if parse is benchmark_model else 1)).rstrip("0.")[:4] in text.replace("+", "")


@given(st.sampled_from(["benchmark_model_plain", "benchmark_model_percentiles"]), st.data())
def test_a_cut_output_yields_the_whole_figure_or_an_error(name: str, data: st.DataObject) -> None:
    text = recorded(name)
    end = text.index("Inference (avg): ") + len("Inference (avg): 12345.6")
    cut = text[: data.draw(st.integers(0, len(text)) | st.integers(end - 8, end + 2))]
    try:
        found = benchmark_model(cut)
    except ParseError:
        return
    # A cut inside the last digits of the summary must not pass for a smaller figure.
    assert found.avg_ms == benchmark_model(text).avg_ms
