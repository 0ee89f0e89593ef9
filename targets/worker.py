"""Runs models in a process of its own and reports each run's time. Self-contained: it is also pushed to devices.

It needs nothing but Python 3.8, NumPy and the runtime, so that a Raspberry Pi or an emulated phone can run it. The
request is one JSON object: the first line of standard input, or the file given as the only argument. Replies are JSON
objects, one a line, on what was standard output at the start; whatever the runtime prints goes to standard error.
The process ends when standard input closes, so that a worker never outlives the one who asked.

Request: ``runtime`` ("litert" or "ort"), ``models`` (paths), ``threads``, ``cores`` (list or null), ``warmup``,
``runs``, ``seed``, ``probe`` (also measure the memory of the one model), ``exact`` (ONNX Runtime's 8-bit kernels must
not saturate), ``marker`` (number of a system call that brackets each timed run for an instruction counter, or null),
``output`` (also return the output itself), ``watch`` (false starts no thread that waits for standard input to close).
Replies: ``ready``, ``progress``, ``result``, or ``error``, which names a class of `targets.errors`.
"""

from __future__ import annotations

import base64
import ctypes
import gc
import hashlib
import importlib
import json
import math
import os
import random
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Sequence  # noqa: UP035 - Python 3.8

MARK_BEGIN, MARK_END = 1, 2
PROGRESS_INTERVAL_S = 0.2
_ORT_TYPES = {"float": "float32", "double": "float64"}


class Refused(Exception):
    """Carries the name of the error class for the reply."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def load_runtime(runtime: str) -> Any:
    """Imports a runtime, NumPy with it, and returns its top module, which has `__version__`."""
    package, inner = {"litert": ("ai_edge_litert", "interpreter"), "ort": ("onnxruntime", "capi")}[runtime]
    try:
        importlib.import_module("numpy")
        importlib.import_module(f"{package}.{inner}")
        return importlib.import_module(package)
    except ImportError as error:
        raise Refused("RuntimeMissingError", f"{package} cannot be imported: {error}") from error


class LiteRtModel:
    """One model in LiteRT's interpreter, with a fixed input."""

    def __init__(self, path: str, threads: int, seed: int, *, exact: bool = False) -> None:
        self.version = load_runtime("litert").__version__
        from ai_edge_litert.interpreter import Interpreter

        started = time.perf_counter_ns()
        try:
            self._interpreter = Interpreter(model_path=path, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise Refused("ModelFileError", f"LiteRT cannot load {path}: {error}") from error
        self.init_ms = (time.perf_counter_ns() - started) / 1e6
        for item in self._interpreter.get_input_details():
            self._interpreter.set_tensor(item["index"], fixed_input(item["shape"].tolist(), item["dtype"], seed))
        ops = [op["op_name"] for op in self._interpreter._get_ops_details()]
        # A delegate leaves the replaced ops in the list and appends one DELEGATE op for each part that it took.
        self.accelerator = "cpu-xnnpack" if "DELEGATE" in ops else "cpu"

    def run(self) -> None:
        """Runs one inference."""
        self._interpreter.invoke()

    def outputs(self) -> list[Any]:
        """Returns all outputs of the last run, in order."""
        return [self._interpreter.get_tensor(item["index"]) for item in self._interpreter.get_output_details()]


class OrtModel:
    """One model in an ONNX Runtime session on the CPU, with a fixed input and bound outputs."""

    def __init__(
        self, path: str, threads: int, seed: int, *, exact: bool = False, profile_prefix: str | None = None
    ) -> None:
        ort = load_runtime("ort")
        self.version = ort.__version__
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        started = time.perf_counter_ns()
        try:
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no public base class
            raise Refused("ModelFileError", f"ONNX Runtime cannot load {path}: {error}") from error
        self.init_ms = (time.perf_counter_ns() - started) / 1e6
        self.accelerator = "cpu"
        # Binding the buffers once keeps Python's conversions out of the timed call.
        self._binding = self.session.io_binding()
        for item in self.session.get_inputs():
            kind = item.type[len("tensor(") : -1]
            shape = [size if isinstance(size, int) and size > 0 else 1 for size in item.shape]
            try:
                value = fixed_input(shape, _ORT_TYPES.get(kind, kind), seed)
            except TypeError as error:
                raise Refused("ModelFileError", f"{path}: input {item.name} has type {item.type}") from error
            self._binding.bind_cpu_input(item.name, value)
        for item in self.session.get_outputs():
            self._binding.bind_output(item.name, "cpu")

    def run(self) -> None:
        """Runs one inference."""
        self.session.run_with_iobinding(self._binding)

    def outputs(self) -> list[Any]:
        """Returns all outputs of the last run, in order."""
        return list(self._binding.copy_outputs_to_cpu())


def fixed_input(shape: Sequence[int], dtype: Any, seed: int) -> Any:
    """Makes the same input for a (shape, type, seed) on every machine and NumPy version.

    Floats lie in [-1, 1], integers cover all values of a byte.
    """
    import numpy as np

    count = max(math.prod(shape), 1)
    # random.Random's stream is fixed by the language; NumPy's generators may change between versions.
    raw = np.frombuffer(random.Random(seed).getrandbits(8 * count).to_bytes(count, "little"), "uint8")
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return ((raw.astype("float32") - 127.5) / 127.5).astype(kind).reshape(shape)
    if kind == np.int8:
        return raw.view("int8").reshape(shape)
    return raw.astype(kind).reshape(shape)


def memory_kb(field: str) -> int | None:
    """Reads one figure of ``/proc/self/status`` in KiB; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def reset_peak_memory() -> bool:
    """Makes the kernel forget the peak so far; without it the peak of the imports would hide the model's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def pin(cores: Sequence[int] | None) -> list[int]:
    """Confines the process to `cores` and returns those it really has."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        return []
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise Refused("OptionError", f"cannot pin to cores {cores}: {error}") from error
    return sorted(os.sched_getaffinity(0))


def marker_call(number: int | None) -> Callable[[int, int], None]:
    """Returns a function that makes the system call `number`, which no kernel knows, as a mark for the counter."""
    if number is None:
        return lambda phase, model: None
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long

    def mark(phase: int, model: int) -> None:
        syscall(ctypes.c_long(number), ctypes.c_long(phase), ctypes.c_long(model))

    return mark


def time_interleaved(
    models: Sequence[Any], warmup: int, runs: int, mark: Callable[[int, int], None], on_done: Callable[[int], None]
) -> tuple[list[list[float]], list[list[float]]]:
    """Times `runs` inferences of each model in the order A B B A, so that a drift falls on all alike.

    Returns:
        For each model a list of run times in milliseconds, by the clock on the wall; and the same in processor time
        of this process, which leaves out what other processes took.
    """
    samples: list[list[float]] = [[] for _ in models]
    cpu_samples: list[list[float]] = [[] for _ in models]
    for _ in range(warmup):
        for model in models:
            model.run()
    order = list(range(len(models)))
    clock, cpu_clock = time.perf_counter_ns, time.process_time_ns
    gc.collect()
    gc.disable()
    for index in range(runs):
        for which in order if index % 2 == 0 else reversed(order):
            run = models[which].run
            mark(MARK_BEGIN, which)
            cpu_started = cpu_clock()
            started = clock()
            run()
            ended = clock()
            cpu_ended = cpu_clock()
            mark(MARK_END, which)
            samples[which].append((ended - started) / 1e6)
            cpu_samples[which].append((cpu_ended - cpu_started) / 1e6)
        on_done((index + 1) * len(models))
    gc.enable()
    return samples, cpu_samples


def serve(request: dict[str, Any], reply: Callable[[dict[str, Any]], None]) -> None:
    """Carries out one request."""
    cores = pin(request.get("cores"))
    maker: Any = {"litert": LiteRtModel, "ort": OrtModel}[request["runtime"]]
    before_kb = None
    if request.get("probe"):
        # Load the libraries first: their memory is the runtime's, not the model's.
        load_runtime(request["runtime"])
        if reset_peak_memory():
            before_kb = memory_kb("VmRSS")
    settings = {"exact": bool(request.get("exact"))}
    models = [maker(path, request["threads"], request.get("seed", 0), **settings) for path in request["models"]]
    reply({"event": "ready", "runtime_version": models[0].version, "cores": cores})
    last = [0.0]

    def on_done(done: int) -> None:
        now = time.monotonic()
        if now - last[0] >= PROGRESS_INTERVAL_S:
            last[0] = now
            reply({"event": "progress", "done": done})

    mark = marker_call(request.get("marker"))
    samples, cpu_samples = time_interleaved(models, request["warmup"], request["runs"], mark, on_done)
    if request.get("marker") is not None:
        # What the brackets themselves cost, counted under the number after the last model's.
        nothing = SimpleNamespace(run=lambda: None)
        time_interleaved([nothing], 1, request["runs"], lambda phase, _: mark(phase, len(models)), lambda done: None)
    peak_kb = memory_kb("VmHWM")
    rows = []
    for index, model in enumerate(models):
        outputs = model.outputs()
        output = b"".join(array.tobytes() for array in outputs)
        values = {"dtype": str(outputs[0].dtype), "base64": base64.b64encode(output).decode()}
        rows.append(
            {
                "output": values if request.get("output") else None,
                "init_ms": model.init_ms,
                "accelerator": model.accelerator,
                "samples_ms": samples[index],
                "cpu_samples_ms": cpu_samples[index],
                "output_sha256": hashlib.sha256(output).hexdigest(),
                "peak_memory_mb": (peak_kb - before_kb) / 1024.0 if before_kb and peak_kb else None,
            }
        )
    reply({"event": "result", "models": rows})


def exit_with_stdin() -> None:
    """Ends the process when standard input closes: nobody waits for it any more."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: Sequence[str]) -> int:
    """Reads the request, serves it, and returns the exit status."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        if argv:
            request = json.loads(Path(argv[0]).read_text())
        else:
            request = json.loads(sys.stdin.readline())
            if request.get("watch", True):
                exit_with_stdin()
        serve(request, reply)
    except Refused as error:
        reply({"event": "error", "kind": error.kind, "message": str(error)})
        return 1
    except Exception as error:  # noqa: BLE001 - the parent must learn of any failure, by name, before this ends
        reply({"event": "error", "kind": "WorkerError", "message": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
