"""Targets ``host-litert`` and ``host-ort``: this machine, in pinned child processes."""

import os
import platform
import sys
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from targets import options
from targets.base import Device, Measurement, OnProgress, check_counts
from targets.errors import OptionError
from targets.gates import MAX_BUSY_FRACTION, busy_fractions, load_reason, read_host_gates, wait_until_idle
from targets.model_file import ModelFile, inspect
from targets.worker_process import WORKER_FILE, run_worker

__all__ = ["HostTarget", "devices", "host_device", "litert", "ort"]

Runtime = Literal["litert", "ort"]
_FORMATS: Mapping[Runtime, str] = {"litert": "tflite", "ort": "onnx"}
_TITLES: Mapping[Runtime, str] = {"litert": "LiteRT", "ort": "ONNX Runtime"}
_PROBE_RUNS = 3


def devices() -> list[Device]:
    """Lists this machine."""
    return [host_device()]


def host_device() -> Device:
    """Describes this machine."""
    import psutil

    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Hardware"}:
                cpu = value.strip()
                break
    return Device(
        id="host",
        kind="host",
        name=platform.node(),
        arch=platform.machine(),
        os=f"{platform.system()} {platform.release()}",
        cpu=cpu,
        cores=len(_usable_cores()),
        memory_mb=psutil.virtual_memory().total >> 20,
        fingerprint=platform.version(),
    )


def _usable_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class HostTarget:
    """Runs models on this machine.

    Each restart is a new process, confined to the same cores, that holds all files and alternates between them. One
    more process for each file finds its load time, memory and output, undisturbed by the others.

    Args:
        runtime: ``litert`` or ``ort``.
        threads: Threads of the runtime.
        cores: Cores to pin to; `None` picks the `threads` least busy ones.
        pin: Whether to pin at all; without it the scheduler moves the process about.
        exact: Makes ONNX Runtime add 8-bit products without saturation on x86 processors without VNNI, as ARM does;
            it takes about a third longer there. LiteRT never saturates.
        gate_wait_s: Longest wait for the cores to become idle, in seconds; after it the row is marked.
        max_busy: Share of a core that others may use before the row is marked.
        timeout_s: Limit for one process, in seconds.

    Raises:
        OptionError: If a count is out of range, or `cores` has one that this process may not use.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        threads: int = 1,
        cores: Sequence[int] | int | None = None,
        pin: bool = True,
        exact: bool = False,
        gate_wait_s: float = 20.0,
        max_busy: float = MAX_BUSY_FRACTION,
        timeout_s: float = 600.0,
    ) -> None:
        options.whole("threads", threads)
        usable = _usable_cores()
        chosen = options.cores(cores)
        if not set(chosen) <= set(usable):
            raise OptionError(f"cores {sorted(set(chosen) - set(usable))} are not among the usable ones {usable}")
        self.name = f"host-{runtime}"
        self.runtime: Runtime = runtime
        self.formats: tuple[str, ...] = (_FORMATS[runtime],)
        self.runs_here = True
        self.threads = threads
        self._cores = list(chosen) or None
        self._exact = options.flag("exact", exact)
        self._pin = options.flag("pin", pin) and hasattr(os, "sched_setaffinity")
        self._gate_wait_s = options.number("gate_wait_s", gate_wait_s)
        self._max_busy = options.number("max_busy", max_busy)
        self._timeout_s = options.number("timeout_s", timeout_s, above=0)

    def device(self) -> Device:
        """Describes this machine."""
        return host_device()

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
        """Measures the files; see `targets.base.Target.benchmark`.

        Raises:
            ModelFileError: If a file is missing, damaged, or not for this runtime.
            RuntimeMissingError: If the runtime is not installed.
            WorkerError: If a process dies.
            TimeoutExpiredError: If a process takes longer than the limit.
        """
        files = [
            inspect(path, expected=_FORMATS[self.runtime], runtime=_TITLES[self.runtime])
            for path in check_counts(paths, warmup=warmup, runs=runs, restarts=restarts)
        ]
        cores = self._choose_cores()
        probes = [self._run([file], cores, 1, _PROBE_RUNS, probe=True)["models"][0] for file in files]
        gates_before = wait_until_idle(cores, limit_s=self._gate_wait_s, max_busy=self._max_busy)
        samples: list[list[list[float]]] = [[] for _ in files]
        cpu_samples: list[list[list[float]]] = [[] for _ in files]
        reply: dict[str, Any] = {}
        unstable: set[int] = set()
        total = runs * restarts * len(files)
        for restart in range(restarts):
            begun = restart * runs * len(files)

            def advance(done: int, begun: int = begun) -> None:
                if on_progress is not None:
                    on_progress(begun + done, total)

            reply = self._run(files, cores, warmup, runs, on_done=advance)
            advance(runs * len(files))
            for index, row in enumerate(reply["models"]):
                samples[index].append(row["samples_ms"])
                cpu_samples[index].append(row["cpu_samples_ms"])
                if row["output_sha256"] != probes[index]["output_sha256"]:
                    unstable.add(index)
        # Measured after the last process has ended: what is still busy now was not ours.
        busy_after = busy_fractions()
        gates_after = read_host_gates(
            cores, busy=max((busy_after[core] for core in cores if core in busy_after), default=None)
        )
        device = self.device()
        group = uuid.uuid4().hex if len(files) > 1 else ""
        rows = []
        for index, file in enumerate(files):
            reason = load_reason(gates_before, max_busy=self._max_busy)
            if not reason and (late := load_reason(gates_after, max_busy=self._max_busy)):
                reason = f"after the runs {late}"
            if index in unstable:
                reason = "the same input gave different output bytes in different processes"
            rows.append(
                Measurement.from_samples(
                    samples[index],
                    cpu_samples_ms=tuple(tuple(process) for process in cpu_samples[index]),
                    target=self.name,
                    model=file.path.name,
                    model_sha256=file.sha256,
                    precision=file.precision,
                    runtime=self.runtime,
                    runtime_version=reply["runtime_version"],
                    requested_accelerator="cpu",
                    actual_accelerator=probes[index]["accelerator"],
                    device=device,
                    threads=self.threads,
                    pinned_cores=tuple(reply["cores"]),
                    warmup=warmup,
                    runs=runs,
                    restarts=restarts,
                    quick=quick,
                    interleaved_with=group,
                    init_ms=probes[index]["init_ms"],
                    peak_memory_mb=probes[index]["peak_memory_mb"],
                    output_sha256=probes[index]["output_sha256"],
                    gates_before=gates_before,
                    gates_after=gates_after,
                    valid=not reason,
                    invalid_reason=reason,
                ).marked_if_disturbed()
            )
        return rows

    def _choose_cores(self) -> list[int]:
        """Picks the least busy cores, high numbers first on a tie: core 0 serves most interrupts."""
        if not self._pin:
            return []
        if self._cores is not None:
            return self._cores
        busy = busy_fractions()
        usable = _usable_cores()
        return sorted(sorted(usable, key=lambda core: (round(busy.get(core, 0.0), 1), -core))[: self.threads])

    def _run(
        self,
        files: Sequence[ModelFile],
        cores: Sequence[int],
        warmup: int,
        runs: int,
        *,
        probe: bool = False,
        on_done: Any = None,
    ) -> dict[str, Any]:
        request = {
            "runtime": self.runtime,
            "models": [str(file.path.resolve()) for file in files],
            "threads": self.threads,
            "cores": list(cores) or None,
            "warmup": warmup,
            "runs": runs,
            "probe": probe,
            "exact": self._exact,
        }
        # -P keeps this package's own file names (stats, errors) off the child's import path.
        argv = [sys.executable, "-P", str(WORKER_FILE)]
        return run_worker(argv, request, timeout_s=self._timeout_s, on_done=on_done)


# Partial objects keep the signature, so that the registry can check options before it makes a target.
litert = partial(HostTarget, "litert")
ort = partial(HostTarget, "ort")
