"""Where the time goes: each operator's time by the runtime's own profiler, and two models side by side.

A profiler slows what it watches, so these times say where to look; the benchmark says how long it takes.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from targets.errors import ParseError
from targets.model_file import inspect
from targets.worker_process import run_worker

__all__ = ["KindRow", "OperatorTime", "Profile", "compare", "comparison", "profile", "table"]

_RUNTIMES = {".tflite": ("litert", "tflite", "LiteRT"), ".onnx": ("ort", "onnx", "ONNX Runtime")}


@dataclass(frozen=True)
class OperatorTime:
    """One operator: its name in the graph or the delegate, its kind (or kernel), and its time in ms."""

    name: str
    kind: str
    ms: float


@dataclass(frozen=True)
class Profile:
    """The operators of one model in the order in which they run."""

    model: str
    runtime: str
    runtime_version: str
    operators: tuple[OperatorTime, ...]

    @property
    def total_ms(self) -> float:
        """Sum over all operators."""
        return sum(operator.ms for operator in self.operators)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values fit for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class KindRow:
    """One kind of operator in two models: how many there are and what they take in all, in ms."""

    kind: str
    baseline_count: int
    baseline_ms: float
    other_count: int
    other_ms: float

    @property
    def saved_ms(self) -> float:
        """What the other model spends less on this kind; negative if it spends more."""
        return self.baseline_ms - self.other_ms


def profile(
    path: Path | str,
    *,
    threads: int = 1,
    cores: Sequence[int] = (),
    warmup: int = 3,
    runs: int = 15,
    timeout_s: float = 300.0,
) -> Profile:
    """Profiles a model on this machine, with the runtime that its format calls for.

    Args:
        path: A .tflite or .onnx file.
        threads: Threads of the runtime.
        cores: Cores to pin to; empty for any.
        warmup: Runs that do not count.
        runs: Runs that do.
        timeout_s: Limit for all of it, in seconds.

    Raises:
        ModelFileError: If the file is missing, damaged or of another format.
        RuntimeMissingError: If the runtime, or its profiler, is not there.
        ParseError: If the profiler's report cannot be read.
        WorkerError: If the process dies.
        TimeoutExpiredError: If it takes longer than the limit.
    """
    path = Path(path)
    runtime, form, title = _RUNTIMES.get(path.suffix.lower(), _RUNTIMES[".tflite"])
    inspect(path, expected=form, runtime=title)
    request = {
        "runtime": runtime, "models": [str(path.resolve())], "threads": threads, "cores": list(cores) or None,
        "warmup": warmup, "runs": runs,
    }  # fmt: skip
    # The worker imports its sibling by the package's name, which may be reachable only as this process reaches it.
    home = str(Path(__file__).resolve().parents[1])
    start = f"import sys; sys.path.append({home!r}); from targets.profile_worker import main; sys.exit(main())"
    reply = run_worker([sys.executable, "-P", "-c", start], request, timeout_s=timeout_s)
    operators = tuple(OperatorTime(row["name"], row["type"], row["ms"]) for row in reply["operators"])
    if sum(operator.ms for operator in operators) <= 0:
        raise ParseError(f"the profile of {path.name} has no time in it", hint="profile a larger model, or more runs")
    return Profile(path.name, runtime, reply["runtime_version"], operators)


def compare(baseline: Profile, other: Profile) -> list[KindRow]:
    """Sums both profiles by kind of operator; the kinds that differ most in time come first."""
    rows = []
    for kind in dict.fromkeys(operator.kind for operator in (*baseline.operators, *other.operators)):
        ours = [operator.ms for operator in baseline.operators if operator.kind == kind]
        theirs = [operator.ms for operator in other.operators if operator.kind == kind]
        rows.append(KindRow(kind, len(ours), sum(ours), len(theirs), sum(theirs)))
    return sorted(rows, key=lambda row: -abs(row.saved_ms))


def comparison(baseline: Profile, other: Profile | None = None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Formats profiles by kind of operator as a header and lines of cells, with the totals in the last line.

    Args:
        baseline: The model in the first columns.
        other: The model beside it, with what it saves; left out, the table is of one model.
    """
    header: tuple[str, ...] = ("operator", baseline.model, "ms")
    if other is not None:
        header += (other.model, "ms", "saved ms")
    beside = other if other is not None else Profile("", "", "", ())
    total = KindRow("all", len(baseline.operators), baseline.total_ms, len(beside.operators), beside.total_ms)
    lines = []
    for row in [*compare(baseline, beside), total]:
        line: tuple[str, ...] = (row.kind, str(row.baseline_count), f"{row.baseline_ms:.3f}")
        if other is not None:
            line += (str(row.other_count), f"{row.other_ms:.3f}", f"{row.saved_ms:+.3f}")
        lines.append(line)
    return header, lines


def table(baseline: Profile, other: Profile) -> str:
    """Formats `comparison` as a Markdown table."""
    header, lines = comparison(baseline, other)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ("---", *["---:"] * 5), *lines))
