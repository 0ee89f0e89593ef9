"""Reads the figures out of what `benchmark_model` and `onnxruntime_perf_test` print.

The rule is that a doubtful output gives a `ParseError`, never a number: every figure must stand in a line of a known
shape, be a plain finite number, and agree with the others (least <= mean <= largest, summary = statistics).
"""

import math
import re
from dataclasses import dataclass
from itertools import pairwise

from targets.errors import ParseError

__all__ = ["BenchmarkModelOutput", "PerfTestOutput", "benchmark_model", "perf_test"]

_NUMBER = r"([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?)"
# logcat's brief, time and threadtime forms, with user names and microseconds where asked for, the bare tag of TFLite's
# documentation ("... tflite  : "), then the log level that newer builds print before each message.
_PREFIX = re.compile(
    r"^(?:\.\.\. )?(?:(?:\d{4}-)?\d{2}-\d{2} \d{2}:\d{2}:\d{2}\.\d{3}(?:\d{3})?\s+"
    r"(?:(?:[\w.-]+\s+)?\d+\s+\d+\s+(?=[VDIWEF]\s))?)?"
    r"(?:(?:[VDIWEF](?:/|\s+)[\w.-]+|tflite)\s*(?:\(\s*(?:[\w.-]+:\s*)?\d+\))?\s*:\s)?"
    r"(?:(?:VERBOSE|INFO|WARN|WARNING|ERROR):\s)?\s*"
)
_SUMMARY = re.compile(
    rf"^Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}, "
    rf"Warmup \(avg\): {_NUMBER}, Inference \(avg\): {_NUMBER}$"
)
_OLD_SUMMARY = re.compile(
    rf"^Average inference timings in us: Warmup: {_NUMBER}, Init: {_NUMBER}, (?:Inference|no stats): {_NUMBER}$"
)
_STATS = re.compile(r"^count=([0-9]+)((?: [a-z0-9]+=\S+)*?)( ?\(all same\))?$")
_PEAK = re.compile(rf"^Overall peak memory footprint \(MB\) via periodic monitoring: {_NUMBER}$")
_FOOTPRINT = re.compile(
    rf"^(?:Peak memory footprint|Memory footprint delta from the start of the tool) \(MB\): "
    rf"init={_NUMBER} overall={_NUMBER}$"
)
_APPLIED = re.compile(
    r"^(?:Explicitly applied|Applied) (\w+) delegate, and the model graph will be (completely|partially) executed"
)
_NOT_APPLIED = re.compile(r"^Though (\w+) delegate is explicitly applied, the model graph will not be executed")
# A summary printed with six digits agrees with the exact statistics to about one part in 10^5.
_AGREEMENT = 1e-4
_LONGEST_US = 1e12


@dataclass(frozen=True)
class BenchmarkModelOutput:
    """What one run of TFLite's `benchmark_model` measured; times in ms, `None` where this version prints none."""

    avg_ms: float
    init_ms: float
    warmup_avg_ms: float
    accelerator: str
    first_ms: float | None = None
    count: int | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    std_ms: float | None = None
    p5_ms: float | None = None
    median_ms: float | None = None
    p95_ms: float | None = None
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class PerfTestOutput:
    """What one run of `onnxruntime_perf_test` measured; times in ms, `None` where this version prints none."""

    avg_ms: float
    count: int
    init_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    peak_memory_mb: float | None = None


def benchmark_model(text: str) -> BenchmarkModelOutput:
    """Reads the output (standard output, standard error and logcat lines may be mixed) of one `benchmark_model` run.

    Raises:
        ParseError: If there is no summary, more than one that differ, or figures that contradict each other.
    """
    lines = _messages(text)
    summaries: set[tuple[float | None, float, float, float]] = set()
    statistics: list[dict[str, float]] = []
    peak_mb: float | None = None
    footprint_mb: float | None = None
    accelerator = "cpu"
    for line in lines:
        if found := _SUMMARY.match(line):
            # A load that took less than a microsecond is printed as 0; an inference cannot.
            init = _number(found[1], line)
            first, warmup, average = (_positive(word, line) for word in found.groups()[1:])
            summaries.add((first, init, warmup, average))
        elif found := _OLD_SUMMARY.match(line):
            init = _number(found[2], line)
            warmup, average = (_positive(found[index], line) for index in (1, 3))
            summaries.add((None, init, warmup, average))
        elif line.startswith("count="):
            statistics.append(_statistics(line))
        elif found := _PEAK.match(line):
            peak_mb = _number(found[1], line)
        elif found := _FOOTPRINT.match(line):
            footprint_mb = _number(found[2], line)
        else:
            accelerator = _accelerator(line, accelerator)
    if len(summaries) != 1:
        raise ParseError(
            f"benchmark_model printed {len(summaries) or 'no'} summaries with different figures: {_excerpt(text)}",
            hint="run one model at a time, and look at what the tool printed",
        )
    first_us, init_us, warmup_us, average_us = summaries.pop()
    run = statistics[-1] if statistics else {}
    if run and not math.isclose(run["avg"], average_us, rel_tol=_AGREEMENT):
        raise ParseError(f"benchmark_model's summary says {average_us} us, its statistics {run['avg']} us on average")

    def ms(name: str) -> float | None:
        return run[name] / 1e3 if name in run else None

    return BenchmarkModelOutput(
        avg_ms=average_us / 1e3,
        init_ms=init_us / 1e3,
        warmup_avg_ms=warmup_us / 1e3,
        accelerator=accelerator,
        first_ms=first_us / 1e3 if first_us is not None else None,
        count=int(run["count"]) if run else None,
        min_ms=ms("min"),
        max_ms=ms("max"),
        std_ms=ms("std"),
        p5_ms=ms("p5"),
        median_ms=ms("median"),
        p95_ms=ms("p95"),
        # The monitored peak is the better figure; some builds print -1 or nothing for it.
        peak_memory_mb=peak_mb or footprint_mb or None,
    )


def _messages(text: str) -> list[str]:
    """Splits into lines without prefixes; a last line without an end is dropped.

    It may be whole, but nothing tells it from one that was cut inside its last figure, which then passes for another.
    """
    complete, _, _ = text.rpartition("\n")
    return [_PREFIX.sub("", line.rstrip("\r ")).rstrip() for line in complete.split("\n")]


def _statistics(line: str) -> dict[str, float]:
    """Reads one ``count=…`` line; times in microseconds."""
    found = _STATS.match(line)
    if not found:
        raise ParseError(f"cannot read the statistics line {line!r}")
    values = {"count": float(found[1])}
    for pair in found[2].split():
        name, _, word = pair.partition("=")
        if name in values:
            raise ParseError(f"{name} stands twice in {line!r}")
        values[name] = _number(word.removesuffix("(all"), line)
    if values["count"] < 1:
        raise ParseError(f"no run was counted in {line!r}")
    if set(values) == {"count", "curr"}:
        # One run, or runs that all took the same time: the tool prints that time alone.
        same = _positive(str(values["curr"]), line)
        return {**values, "first": same, "min": same, "max": same, "avg": same, "std": 0.0}
    if not {"first", "curr", "min", "max", "avg", "std"} <= set(values):
        raise ParseError(f"the statistics line {line!r} is cut")
    order = [values[name] for name in ("min", "p5", "median", "p95", "max") if name in values]
    slack = 1 + _AGREEMENT
    if any(low > high * slack for low, high in pairwise(order)) or values["min"] <= 0:
        raise ParseError(f"the figures of {line!r} are out of order")
    if not values["min"] <= values["avg"] * slack or not values["avg"] <= values["max"] * slack:
        raise ParseError(f"the mean of {line!r} lies outside its own range")
    return values


def _accelerator(line: str, known: str) -> str:
    """Says what ran the model, from the tool's messages about delegates; the explicit ones win."""
    if found := _NOT_APPLIED.match(line):
        return f"cpu ({found[1].lower()} took nothing)"
    if found := _APPLIED.match(line):
        name = found[1].lower()
        if name == "xnnpack":
            # It often takes what another delegate left: that other one is what was asked for, and what to tell of.
            return (
                known
                if not known.startswith("cpu")
                else "cpu-xnnpack" + ("" if found[2] == "completely" else "-partial")
            )
        return name if found[2] == "completely" else f"{name}-partial"
    if line.startswith("Created TensorFlow Lite XNNPACK delegate for CPU") and known == "cpu":
        return "cpu-xnnpack"
    return known


_PERF_LINES = {
    "init_s": re.compile(rf"^Session creation time cost: ?{_NUMBER} s$"),
    # Newer versions say "total" here; it is the same mean of one inference.
    "avg_ms": re.compile(rf"^Average inference time cost(?: total)?: ?{_NUMBER} ms$"),
    "count": re.compile(r"^Total inference requests: ?([0-9]+)$"),
    "total_s": re.compile(rf"^Total inference time cost: ?{_NUMBER} s$"),
    "peak_bytes": re.compile(r"^Peak working set size: ?([0-9]+) bytes$"),
    "min_s": re.compile(rf"^Min Latency(?: is|:) {_NUMBER} s(?:ec)?$"),
    "max_s": re.compile(rf"^Max Latency(?: is|:) {_NUMBER} s(?:ec)?$"),
    "p50_s": re.compile(rf"^P50 Latency(?: is|:) {_NUMBER} s(?:ec)?$"),
    "p90_s": re.compile(rf"^P90 Latency(?: is|:) {_NUMBER} s(?:ec)?$"),
}


def perf_test(text: str) -> PerfTestOutput:
    """Reads the output of one `onnxruntime_perf_test` run.

    Raises:
        ParseError: If a needed figure is missing, stands twice with different values, or contradicts another.
    """
    values: dict[str, float] = {}
    for line in _messages(text):
        for name, pattern in _PERF_LINES.items():
            if found := pattern.match(line):
                value = _number(found[1], line)
                if values.setdefault(name, value) != value:
                    raise ParseError(f"onnxruntime_perf_test printed two values for one figure: {line!r}")
    if missing := {"avg_ms", "count"} - set(values):
        raise ParseError(f"onnxruntime_perf_test printed no {' and no '.join(sorted(missing))}: {_excerpt(text)}")
    average_ms = _positive(str(values["avg_ms"]), "average inference time")
    if values["count"] < 1:
        raise ParseError("onnxruntime_perf_test counted no run")
    if "total_s" in values:
        mean_ms = values["total_s"] * 1e3 / values["count"]
        if not math.isclose(mean_ms, average_ms, rel_tol=1e-3):
            raise ParseError(f"onnxruntime_perf_test says {average_ms} ms on average, its total {mean_ms:.6g} ms")
    order = [values[name] * 1e3 for name in ("min_s", "p50_s", "p90_s", "max_s") if name in values]
    if order != sorted(order) or any(value <= 0 for value in order):
        raise ParseError(f"the latencies of onnxruntime_perf_test are out of order: {order} ms")

    def ms(name: str) -> float | None:
        return values[name] * 1e3 if name in values else None

    return PerfTestOutput(
        avg_ms=average_ms,
        count=int(values["count"]),
        init_ms=ms("init_s"),
        min_ms=ms("min_s"),
        max_ms=ms("max_s"),
        p50_ms=ms("p50_s"),
        p90_ms=ms("p90_s"),
        peak_memory_mb=values["peak_bytes"] / 2**20 if "peak_bytes" in values else None,
    )


def _number(word: str, line: str) -> float:
    if not re.fullmatch(_NUMBER, word):
        raise ParseError(f"{word!r} in {line!r} is not a number")
    value = float(word)
    if not math.isfinite(value) or value > _LONGEST_US:
        raise ParseError(f"{word!r} in {line!r} is beyond belief")
    return value


def _positive(word: str, line: str) -> float:
    value = _number(word, line)
    if value <= 0:
        raise ParseError(f"{word!r} in {line!r} is not a time")
    return value


def _excerpt(text: str) -> str:
    return repr(text.strip()[-300:]) if text.strip() else "it printed nothing at all"
