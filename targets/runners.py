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

__all__ = [
    "ACCELERATORS",
    "BENCHMARK_MODEL",
    "PERF_TEST",
    "PythonRunner",
    "Runner",
    "RunnerRow",
    "Tool",
    "ToolRunner",
    "Workload",
]

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
                where=remote.id, on_done=on_done,
            )  # fmt: skip
        except WorkerError as error:
            if not remote.is_alive():
                raise DeviceLostError(f"{remote.id} went away during the run: {error.what}") from error
            if "ended with status 127 " in error.what:
                hint = "name the device's interpreter with the option python"
                raise RuntimeMissingError(f"{remote.id} has no {self._python}", hint=hint) from error
            raise
        except TimeoutExpiredError as error:
            if not remote.is_alive():
                hint = "see whether it hangs, then plug it in again"
                raise DeviceLostError(f"{remote.id} stopped answering: {error.what}", hint=hint) from error
            raise


@dataclass(frozen=True)
class Tool:
    """A command-line tool that the user has built for the device.

    Attributes:
        name: Its name, also that of the runtime in the row.
        format: Format of the files that it runs.
        variable: Environment variable that names the file.
        command: Makes the command out of the program, the model and a folder on the device, and the workload.
        read: Adds the figures of one process's output to a row; raises `ParseError`.
        says_accelerator: Whether its output tells what ran the model.
    """

    name: str
    format: str
    variable: str
    command: Callable[[str, str, str, Workload], list[str]]
    read: Callable[[str, RunnerRow], None]
    says_accelerator: bool = True


class ToolRunner:
    """Runs a tool once for each file and restart, in A B B A order.

    The tools print statistics, not single runs, so each process gives one sample: its median, or its mean where the
    version prints no median.

    Args:
        tool: `BENCHMARK_MODEL` or `PERF_TEST`.
        binary: The file; else the tool's environment variable names it.
        libraries: Shared libraries that it needs beside it.

    Raises:
        RuntimeMissingError: If there is no such file.
    """

    def __init__(self, tool: Tool, *, binary: str | Path | None = None, libraries: Sequence[str | Path] = ()) -> None:
        found = binary or os.environ.get(tool.variable)
        if not found:
            hint = f"set {tool.variable} to the file, or give the option binary"
            raise RuntimeMissingError(f"no {tool.name} for the device was given", hint=hint)
        if not Path(found).is_file():
            hint = f"check {tool.variable} or the option binary"
            raise RuntimeMissingError(f"no {tool.name} at {found}", hint=hint)
        self.runtime = tool.name
        self.format = tool.format
        self._tool = tool
        self._binary = Path(found)
        self._libraries = [Path(library) for library in libraries]
        self._program = ""

    def prepare(self, space: Workspace) -> None:
        """Sends the tool and its shared libraries."""
        self._program = space.put(self._binary, self._tool.name, executable=True)
        for library in self._libraries:
            space.put(library, library.name)

    def run(self, space: Workspace, files: Sequence[str], work: Workload) -> list[RunnerRow]:
        """Times the files; see `Runner.run`."""
        rows = [RunnerRow(pinned_cores=work.cores) for _ in files]
        done = 0
        for restart in range(work.restarts):
            order = list(range(len(files)))
            for index in order if restart % 2 == 0 else reversed(order):
                time.sleep(work.cooldown_s if done else 0.0)
                command = self._tool.command(self._program, files[index], space.folder, work)
                argv = ["env", f"LD_LIBRARY_PATH={space.folder}", *command]
                if work.cores:
                    argv = ["taskset", f"{sum(1 << core for core in set(work.cores)):x}", *argv]
                reply = space.remote.shell(argv, timeout_s=work.timeout_s)
                if reply.code != 0:
                    says = (reply.stderr or reply.stdout).strip()[-300:]
                    raise WorkerError(f"{self._tool.name} on {space.remote.id} ended with status {reply.code}: {says}")
                # The tools write to either stream, by version; a line end keeps the two apart.
                self._tool.read(f"{reply.stdout}\n{reply.stderr}\n", rows[index])
                if not self._tool.says_accelerator and work.accelerator != "cpu":
                    rows[index].actual_accelerator = "unknown"
                done += work.runs
                work.on_done(done)
        return rows


def _benchmark_model_command(program: str, file: str, folder: str, work: Workload) -> list[str]:
    chosen: Mapping[str, str] = {"cpu": "--use_xnnpack=true", "gpu": "--use_gpu=true", "nnapi": "--use_nnapi=true"}
    return [
        program, f"--graph={file}", f"--num_threads={work.threads}", f"--num_runs={work.runs}",
        f"--warmup_runs={max(work.warmup, 1)}", "--min_secs=0", "--warmup_min_secs=0",
        f"--max_secs={work.timeout_s:.0f}", chosen[work.accelerator],
    ]  # fmt: skip


def _read_benchmark_model(output: str, row: RunnerRow) -> None:
    found = parsers.benchmark_model(output)
    row.samples_ms.append([found.median_ms or found.avg_ms])
    row.init_ms = found.init_ms if row.init_ms is None else min(row.init_ms, found.init_ms)
    row.actual_accelerator = found.accelerator
    row.peak_memory_mb = max(filter(None, (row.peak_memory_mb, found.peak_memory_mb)), default=None)
    for name in ("min_ms", "max_ms", "std_ms"):
        if (value := getattr(found, name)) is not None:
            row.counters[f"last_process_{name}"] = value


def _perf_test_command(program: str, file: str, folder: str, work: Workload) -> list[str]:
    if work.accelerator == "gpu":
        raise OptionError("onnxruntime_perf_test has no GPU on phones", hint="use nnapi or cpu")
    return [
        program, "-e", work.accelerator, "-m", "times", "-r", str(work.runs), "-x", str(work.threads), "-y", "1",
        "-I", "-s", file, f"{folder}/result.csv",
    ]  # fmt: skip


def _read_perf_test(output: str, row: RunnerRow) -> None:
    found = parsers.perf_test(output)
    row.samples_ms.append([found.p50_ms or found.avg_ms])
    if found.init_ms is not None:
        row.init_ms = found.init_ms if row.init_ms is None else min(row.init_ms, found.init_ms)
    row.peak_memory_mb = max(filter(None, (row.peak_memory_mb, found.peak_memory_mb)), default=None)


BENCHMARK_MODEL = Tool(
    "benchmark_model", "tflite", "LAYERFOLD_BENCHMARK_MODEL", _benchmark_model_command, _read_benchmark_model
)
PERF_TEST = Tool(
    "onnxruntime_perf_test", "onnx", "LAYERFOLD_ORT_PERF_TEST", _perf_test_command, _read_perf_test,
    says_accelerator=False,
)  # fmt: skip
