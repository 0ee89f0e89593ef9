"""What every target is and gives back: `Target`, `Device`, `Measurement`.

This module imports nothing heavy, so that listing targets costs nothing.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from targets.errors import OptionError, TargetError
from targets.gates import MAX_FOREIGN_SHARE, Gates

__all__ = [
    "Device",
    "DeviceKind",
    "Measurement",
    "OnProgress",
    "Target",
    "check_counts",
    "layerfold_version",
    "timestamp",
]

OnProgress = Callable[[int, int], None]
"""Called with (runs done, runs in all) while a benchmark goes on."""

DeviceKind = Literal["host", "emulated", "adb", "adb-emulated", "ssh", "estimator", "third-party"]


@dataclass(frozen=True)
class Device:
    """One thing that models can run on.

    Attributes:
        id: What tells it from others of its kind: serial, host name, or the target's name.
        kind: Which kind of device it is; emulated ones are never mixed up with real ones.
        name: Maker and model, for people.
        arch: Machine architecture as ``uname -m`` says it.
        os: Operating system and its version.
        cpu: Name of the processor.
        cores: Number of cores that can be used.
        memory_mb: Memory in MiB.
        fingerprint: What identifies the exact build of the device's software.
        state: ``ready``, or what stands in the way.
    """

    id: str
    kind: DeviceKind
    name: str = ""
    arch: str = ""
    os: str = ""
    cpu: str = ""
    cores: int = 0
    memory_mb: int = 0
    fingerprint: str = ""
    state: str = "ready"

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values fit for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Measurement:
    """What one target says about one model file; also the row of a failure.

    Times are milliseconds, sizes MiB (2**20 bytes). A figure that the target does not have is `None`, never NaN.

    Attributes:
        target: Name of the target, such as ``host-litert``.
        model: File name of the model, with as many folders as tell it from the others measured with it.
        model_sha256: SHA-256 of the file, in hex; empty if it could not be read.
        precision: ``fp32``, ``fp16``, ``int8``, ``int8-weights``, ``int16x8``, ``dynamic``, ``fp64``, ``mixed`` or
            ``unknown``.
        runtime: Name of the runtime, such as ``litert``.
        runtime_version: Its version.
        requested_accelerator: What was asked for, such as ``cpu``, ``gpu``, ``nnapi``.
        actual_accelerator: What ran, such as ``cpu-xnnpack``.
        device: The device.
        threads: Threads that the runtime was given.
        pinned_cores: Cores that the process was confined to; empty if not pinned.
        warmup: Untimed inferences before the timed ones, in each process.
        runs: Timed inferences asked for in each process.
        restarts: Processes asked for.
        quick: Whether this was a quick look, unfit for publication.
        interleaved_with: Identity shared by rows whose runs alternated in the same processes; empty if alone.
        samples_ms: Time of each run, one tuple for each process.
        cpu_samples_ms: The same runs in processor time of the process, where the target can tell; it leaves out what
            other processes took.
        median_ms, p10_ms, p90_ms: Quantiles over all runs of all processes.
        mad_ms: Median absolute deviation from the median, unscaled.
        init_ms: Time to load the model and make it ready in a fresh process.
        peak_memory_mb: Highest resident memory that loading and running the model added to its process.
        instructions: Executed guest instructions of one inference.
        cycles: Estimated accelerator cycles of one inference.
        counters: Further figures by name (instructions by class, cache misses, tool-specific ones).
        output_sha256: SHA-256 of the raw output bytes for the fixed input, to compare devices.
        gates_before, gates_after: State of the device around the measurement.
        valid: Whether the absolute figures can be trusted.
        invalid_reason: Why not.
        note: What else is to be known, though it does not touch the figures.
        failure: Name of the error class if there is no figure at all; empty otherwise.
        timestamp: When the row was made, ISO 8601 in UTC.
        layerfold_version: Version that made it.
    """

    target: str
    model: str
    model_sha256: str
    precision: str
    runtime: str
    runtime_version: str
    requested_accelerator: str
    actual_accelerator: str
    device: Device
    threads: int
    pinned_cores: tuple[int, ...]
    warmup: int
    runs: int
    restarts: int
    quick: bool = False
    interleaved_with: str = ""
    samples_ms: tuple[tuple[float, ...], ...] = ()
    cpu_samples_ms: tuple[tuple[float, ...], ...] = ()
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    mad_ms: float | None = None
    init_ms: float | None = None
    peak_memory_mb: float | None = None
    instructions: float | None = None
    cycles: float | None = None
    counters: Mapping[str, float] = field(default_factory=dict)
    output_sha256: str = ""
    gates_before: Gates = field(default_factory=Gates)
    gates_after: Gates = field(default_factory=Gates)
    valid: bool = True
    invalid_reason: str = ""
    note: str = ""
    failure: str = ""
    timestamp: str = ""
    layerfold_version: str = ""

    @classmethod
    def from_samples(cls, samples_ms: Sequence[Sequence[float]], **row: Any) -> Self:
        """Builds a row whose quantiles come from `samples_ms`, one sequence of run times for each process.

        Raises:
            OptionError: If there is no sample, or one that is not a positive finite time.
        """
        flat = [float(value) for process in samples_ms for value in process]
        if not flat or not all(math.isfinite(value) and value > 0 for value in flat):
            raise OptionError(f"run times must be positive and finite, found {flat[:8]}")
        median = statistics.median(flat)
        deciles = statistics.quantiles(flat, n=10, method="inclusive") if len(flat) > 1 else [flat[0]] * 9
        return cls(
            samples_ms=tuple(tuple(float(value) for value in process) for process in samples_ms),
            median_ms=median,
            p10_ms=deciles[0],
            p90_ms=deciles[8],
            mad_ms=statistics.median(abs(value - median) for value in flat),
            timestamp=timestamp(),
            layerfold_version=layerfold_version(),
            **row,
        )

    @classmethod
    def from_failure(cls, error: TargetError, *, target: str, model: str, device: Device, **row: Any) -> Self:
        """Builds the row that says that there is no figure, and why."""
        unknown: dict[str, Any] = {
            "model_sha256": "", "precision": "unknown", "runtime": "", "runtime_version": "",
            "requested_accelerator": "", "actual_accelerator": "", "threads": 0, "pinned_cores": (),
            "warmup": 0, "runs": 0, "restarts": 0,
        }  # fmt: skip
        return cls(
            target=target,
            model=model,
            device=device,
            valid=False,
            # One line, whatever a tool printed: the reason becomes a cell of a table.
            invalid_reason=" ".join((f"{error.what}; fix: {error.hint}" if error.hint else error.what).split()),
            failure=type(error).__name__,
            timestamp=timestamp(),
            layerfold_version=layerfold_version(),
            **{**unknown, **row},
        )

    @property
    def foreign_share(self) -> float | None:
        """Share of the runs' time, 0 to 1, that others had the core; `None` where it cannot be told.

        Only a run of one thread tells: there, all the time that is not this process's own was somebody else's.
        """
        wall_ms = sum(map(sum, self.samples_ms))
        if self.threads != 1 or not self.cpu_samples_ms or wall_ms <= 0:
            return None
        return max(0.0, 1 - sum(map(sum, self.cpu_samples_ms)) / wall_ms)

    def marked_if_disturbed(self) -> Self:
        """Returns the row, marked as invalid if others had the core for a part of the runs, after any gate."""
        share = self.foreign_share
        if share is None or share <= MAX_FOREIGN_SHARE:
            return self
        reason = f"others had the core for {share:.0%} of the runs: trust the ratio, not the milliseconds"
        return replace(self, valid=False, invalid_reason="; ".join(filter(None, (self.invalid_reason, reason))))

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Rebuilds a row from `as_dict`, also after a trip through JSON.

        Raises:
            OptionError: If the row has a field that this version does not know, or lacks a needed one.
        """
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(row) - known):
            raise OptionError(f"a measurement row has unknown fields {unknown}")
        values = dict(row)
        try:
            values["device"] = Device(**values["device"])
            for name in ("gates_before", "gates_after"):
                # Rows of earlier versions have a field more here, which was always empty.
                values[name] = Gates(**{key: item for key, item in values.get(name, {}).items() if key != "notes"})
            values["pinned_cores"] = tuple(values["pinned_cores"])
            for name in ("samples_ms", "cpu_samples_ms"):
                values[name] = tuple(tuple(process) for process in values.get(name, ()))
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise OptionError(f"a measurement row is incomplete: {error}") from error


class Target(Protocol):
    """Anything that can benchmark model files.

    Attributes:
        name: What `targets.get` calls it.
        formats: Formats of model files that it runs, out of ``tflite`` and ``onnx``.

    A target may also have the attributes ``runs_here`` (true means that it keeps this machine's processor busy, so that
    such targets must take turns; without it, it is taken to be a device of its own) and ``precisions`` (those that it
    runs, in the words of `Measurement.precision`; without it, all).
    """

    name: str
    formats: tuple[str, ...]

    def device(self) -> Device:
        """Returns the device, without running anything on it that takes long."""
        ...

    def benchmark(
        self,
        paths: Sequence[Path | str],
        *,
        warmup: int = 5,
        runs: int = 60,
        restarts: int = 3,
        quick: bool = False,
        on_progress: OnProgress | None = None,
    ) -> list[Measurement]:
        """Measures the files, one `Measurement` each, in order, interleaved where the device allows.

        Args:
            paths: Model files; the first is the baseline of a comparison.
            warmup: Untimed inferences of each file in each process.
            runs: Timed inferences of each file in each process.
            restarts: How many processes, one after the other.
            quick: Marks every row as a quick look.
            on_progress: Called with (runs done, runs in all).

        Raises:
            TargetError: One of the tree in `targets.errors`.
        """
        ...


def check_counts(paths: Sequence[Path | str], *, warmup: int, runs: int, restarts: int) -> list[Path]:
    """Returns the paths as `Path`, after checking that there is something to do.

    Raises:
        OptionError: If there is no file, or a count is out of range.
    """
    if not paths:
        raise OptionError("no model file to benchmark")
    for name, value, least in (("warmup", warmup, 0), ("runs", runs, 1), ("restarts", restarts, 1)):
        if value < least:
            raise OptionError(f"{name} is {value}, expected {least} or more")
    return [Path(path) for path in paths]


def timestamp() -> str:
    """Returns now, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def layerfold_version() -> str:
    """Returns the installed version of layerfold, or ``unknown`` when run from a bare source tree."""
    try:
        return metadata.version("layerfold")
    except metadata.PackageNotFoundError:
        return "unknown"
