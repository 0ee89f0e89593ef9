"""Programs on a device that time a model: Python with a runtime, TFLite's and ONNX Runtime's own tools."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from targets import parsers
from targets.errors import DeviceLostError, OptionError, RuntimeMissingError, TimeoutExpiredError, WorkerError
from targets.remote import Workspace
from targets.worker_process import WORKER_FILE, run_worker

__all__ = ["ACCELERATORS", "BenchmarkModelRunner", "PerfTestRunner", "PythonRunner", "Runner", "RunnerRow", "Workload"]

ACCELERATORS = ("cpu", "gpu", "nnapi")
_PROBE_RUNS = 3


@dataclass(frozen=True)
class Workload:
    """What to run: counts as in `targets.base.Target.benchmark`, and where."""

    warmup: int
    runs: int
    restarts: int
    threads: int
    cores: tuple[int, ...]
    accelerator: str
    cooldown_s: float
    timeout_s: float
    on_done: Callable[[int], None]


@dataclass
class RunnerRow:
    """What a runner found for one file; the fields are those of `targets.base.Measurement`."""

    samples_ms: list[list[float]] = field(default_factory=list)
    cpu_samples_ms: list[list[float]] = field(default_factory=list)
    init_ms: float | None = None
    peak_memory_mb: float | None = None
    actual_accelerator: str = "cpu"
    runtime_version: str = ""
    pinned_cores: tuple[int, ...] = ()
    output_sha256: str = ""
    counters: dict[str, float] = field(default_factory=dict)


class Runner(Protocol):
    """One program that times models on a device.

    Attributes:
        runtime: Name of the runtime, for the row.
        format: Format of the files that it runs.
    """

    runtime: str
    format: str

    def prepare(self, space: Workspace) -> None:
        """Sends what the runner needs."""
        ...

    def run(self, space: Workspace, files: Sequence[str], work: Workload) -> list[RunnerRow]:
        """Times the files (paths on the device), interleaved, and returns a row for each."""
        ...


class PythonRunner:
    """Python on the device, with ai-edge-litert or onnxruntime: Linux boards and Linux behind adb.

    Args:
        runtime: ``litert`` or ``ort``.
        python: The interpreter on the device.
    """

    def __init__(self, runtime: str, *, python: str = "python3") -> None:
        self.runtime = runtime
        self.format = {"litert": "tflite", "ort": "onnx"}[runtime]
        self._python = python
        self._worker = ""

    def prepare(self, space: Workspace) -> None:
        """Sends the worker, one file that needs nothing else of this package."""
        self._worker = space.put(WORKER_FILE, "worker.py")

    def run(self, space: Workspace, files: Sequence[str], work: Workload) -> list[RunnerRow]:
        """Finds load time, memory and output in a process for each file, then times all of them together."""
        if work.accelerator != "cpu":
            raise OptionError(f"the python runner has no {work.accelerator}", hint="use benchmark_model for that")
        rows = []
        for file in files:
            reply = self._ask(space, [file], work, warmup=1, runs=_PROBE_RUNS, probe=True)
            found = reply["models"][0]
            rows.append(
                RunnerRow(
                    init_ms=found["init_ms"],
                    peak_memory_mb=found["peak_memory_mb"],
                    actual_accelerator=found["accelerator"],
                    runtime_version=reply["runtime_version"],
                    pinned_cores=tuple(reply["cores"]),
                    output_sha256=found["output_sha256"],
                )
            )
        for restart in range(work.restarts):
            time.sleep(work.cooldown_s if restart else 0.0)
            begun = restart * work.runs * len(files)

            def advance(done: int, begun: int = begun) -> None:
                work.on_done(begun + done)

            reply = self._ask(space, files, work, warmup=work.warmup, runs=work.runs, on_done=advance)
            for row, found in zip(rows, reply["models"], strict=True):
                row.samples_ms.append(found["samples_ms"])
                row.cpu_samples_ms.append(found["cpu_samples_ms"])
            advance(work.runs * len(files))
        return rows

    def _ask(
        self, space: Workspace, files: Sequence[str], work: Workload, *, warmup: int, runs: int,
        probe: bool = False, on_done: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        request = {
            "runtime": self.runtime, "models": list(files), "threads": work.threads, "warmup": warmup, "runs": runs,
            "cores": list(work.cores) or None, "probe": probe,
        }  # fmt: skip
        remote = space.remote
        try:
            return run_worker(
                remote.stream([self._python, self._worker]), request, timeout_s=work.timeout_s,
                env=remote.env(), where=remote.id, on_done=on_done,
            )  # fmt: skip
        except WorkerError as error:
            if not remote.is_alive():
                raise DeviceLostError(f"{remote.id} went away during the run: {error.what}") from error
            if "not found" in error.what and self._python in error.what:
                hint = "name the device's interpreter with the option python"
                raise RuntimeMissingError(f"{remote.id} has no {self._python}", hint=hint) from error
            raise
        except TimeoutExpiredError as error:
            if not remote.is_alive():
                hint = "see whether it hangs, then plug it in again"
                raise DeviceLostError(f"{remote.id} stopped answering: {error.what}", hint=hint) from error
            raise


class _ToolRunner:
    """What the two command-line tools share: one process for each file and restart, in A B B A order."""

    runtime: str
    format: str

    def __init__(
        self, *, binary: str | Path | None, variable: str, tool: str, libraries: Sequence[str | Path] = ()
    ) -> None:
        found = binary or os.environ.get(variable)
        if not found:
            raise RuntimeMissingError(
                f"no {tool} for the device was given", hint=f"set {variable} to the file, or give the option binary"
            )
        if not Path(found).is_file():
            raise RuntimeMissingError(f"no {tool} at {found}", hint=f"check {variable} or the option binary")
        self._tool = tool
        self._binary = Path(found)
        self._libraries = [Path(library) for library in libraries]
        self._program = ""

    def prepare(self, space: Workspace) -> None:
        """Sends the tool and its shared libraries."""
        self._program = space.put(self._binary, self._tool, executable=True)
        for library in self._libraries:
            space.put(library, library.name)

    def command(self, file: str, folder: str, work: Workload) -> list[str]:
        """Returns the tool's own part of the command."""
        raise NotImplementedError

    def read(self, output: str, row: RunnerRow) -> None:
        """Adds one process's figures to the row."""
        raise NotImplementedError

    def run(self, space: Workspace, files: Sequence[str], work: Workload) -> list[RunnerRow]:
        """Runs the tool once for each file and restart; each process gives one sample."""
        rows = [RunnerRow(pinned_cores=work.cores) for _ in files]
        done = 0
        for restart in range(work.restarts):
            order = list(range(len(files)))
            for index in order if restart % 2 == 0 else reversed(order):
                time.sleep(work.cooldown_s if done else 0.0)
                argv = ["env", f"LD_LIBRARY_PATH={space.folder}", *self.command(files[index], space.folder, work)]
                if work.cores:
                    argv = ["taskset", f"{sum(1 << core for core in set(work.cores)):x}", *argv]
                reply = space.remote.shell(argv, timeout_s=work.timeout_s)
                if reply.code != 0:
                    says = (reply.stderr or reply.stdout).strip()[-300:]
                    raise WorkerError(f"{self._tool} on {space.remote.id} ended with status {reply.code}: {says}")
                # The tools write to either stream, by version; a line end keeps the two apart.
                self.read(f"{reply.stdout}\n{reply.stderr}\n", rows[index])
                done += work.runs
                work.on_done(done)
        return rows


class BenchmarkModelRunner(_ToolRunner):
    """TFLite's `benchmark_model`, built for the device and given by the user.

    It prints statistics, not single runs, so each process gives one sample: its median, or its mean where the version
    prints no median.

    Args:
        binary: The tool; else ``LAYERFOLD_BENCHMARK_MODEL`` names it.
        libraries: Shared libraries that it needs beside it.
    """

    runtime, format = "benchmark_model", "tflite"

    def __init__(self, *, binary: str | Path | None = None, libraries: Sequence[str | Path] = ()) -> None:
        super().__init__(
            binary=binary, variable="LAYERFOLD_BENCHMARK_MODEL", tool="benchmark_model", libraries=libraries
        )

    def command(self, file: str, folder: str, work: Workload) -> list[str]:
        """Returns the command for one process."""
        chosen: Mapping[str, str] = {"cpu": "--use_xnnpack=true", "gpu": "--use_gpu=true", "nnapi": "--use_nnapi=true"}
        return [
            self._program, f"--graph={file}", f"--num_threads={work.threads}", f"--num_runs={work.runs}",
            f"--warmup_runs={max(work.warmup, 1)}", "--min_secs=0", "--warmup_min_secs=0",
            f"--max_secs={work.timeout_s:.0f}", chosen[work.accelerator],
        ]  # fmt: skip

    def read(self, output: str, row: RunnerRow) -> None:
        """Adds one process's figures to the row."""
        found = parsers.benchmark_model(output)
        row.samples_ms.append([found.median_ms or found.avg_ms])
        row.init_ms = found.init_ms if row.init_ms is None else min(row.init_ms, found.init_ms)
        row.actual_accelerator = found.accelerator
        row.peak_memory_mb = max(filter(None, (row.peak_memory_mb, found.peak_memory_mb)), default=None)
        for name in ("min_ms", "max_ms", "std_ms"):
            if (value := getattr(found, name)) is not None:
                row.counters[f"last_process_{name}"] = value


class PerfTestRunner(_ToolRunner):
    """ONNX Runtime's `onnxruntime_perf_test`, built for the device and given by the user.

    Args:
        binary: The tool; else ``LAYERFOLD_ORT_PERF_TEST`` names it.
        libraries: Shared libraries that it needs beside it, such as libonnxruntime.so.
    """

    runtime, format = "onnxruntime_perf_test", "onnx"

    def __init__(self, *, binary: str | Path | None = None, libraries: Sequence[str | Path] = ()) -> None:
        super().__init__(
            binary=binary, variable="LAYERFOLD_ORT_PERF_TEST", tool="onnxruntime_perf_test", libraries=libraries
        )

    def command(self, file: str, folder: str, work: Workload) -> list[str]:
        """Returns the command for one process."""
        if work.accelerator == "gpu":
            raise OptionError("onnxruntime_perf_test has no GPU on phones", hint="use nnapi or cpu")
        return [
            self._program, "-e", work.accelerator, "-m", "times", "-r", str(work.runs), "-x", str(work.threads),
            "-y", "1", "-I", "-s", file, f"{folder}/result.csv",
        ]  # fmt: skip

    def read(self, output: str, row: RunnerRow) -> None:
        """Adds one process's figures to the row."""
        found = parsers.perf_test(output)
        row.samples_ms.append([found.p50_ms or found.avg_ms])
        if found.init_ms is not None:
            row.init_ms = found.init_ms if row.init_ms is None else min(row.init_ms, found.init_ms)
        row.peak_memory_mb = max(filter(None, (row.peak_memory_mb, found.peak_memory_mb)), default=None)
