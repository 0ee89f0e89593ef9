"""Runs one model with the runtime's own profiler on, in a process of its own, and reports the time of each operator.

ONNX Runtime writes a trace. LiteRT's Python interface has no profiler, so its C interface is called; a wrong guess
about it would crash, and the crash stays in this process.
"""

import ctypes
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from targets import worker

_SUMMARY_LINE = re.compile(
    r"^\s*(?P<type>\S.*?)\s+[\d.]+\s+[\d.]+\s+(?P<ms>[\d.]+)\s+[\d.]+%\s+[\d.]+%\s+[\d.]+\s+(?P<times>\d+)\s+(?P<name>\S.*)$"
)
_CPU = 1
# A type descriptor is about 90 bytes; it is only handed from one call to the next.
_TYPE_BYTES = 512


class _LiteRt:
    """LiteRT's C interface, with every status checked."""

    def __init__(self) -> None:
        module = worker.load_runtime("litert")
        self.version = module.__version__
        self._library = ctypes.CDLL(str(Path(module.__file__).parent / "libLiteRt.so"))

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function; raises `worker.Refused` if it is missing or fails."""
        try:
            function = getattr(self._library, f"LiteRt{name}")
        except AttributeError as error:
            raise worker.Refused("RuntimeMissingError", f"this LiteRT has no LiteRt{name}") from error
        status = function(*arguments)
        if status != 0:
            raise worker.Refused("WorkerError", f"LiteRt{name} failed with status {status}")

    def handle(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Calls a function whose last argument receives a handle, and returns the handle."""
        made = ctypes.c_void_p()
        self.call(name, *arguments, ctypes.byref(made))
        return made

    def drop(self, kind: str, handle: ctypes.c_void_p) -> None:
        """Destroys what a call made."""
        getattr(self._library, f"LiteRtDestroy{kind}")(handle)


def litert_operators(path: str, threads: int, warmup: int, runs: int) -> tuple[str, list[dict[str, Any]]]:
    """Profiles a .tflite file; returns LiteRT's version and the operators in the order in which they run."""
    library = _LiteRt()
    # The profiler knows only means, which one run would spoil in which a neighbour had the core, and cannot forget the
    # runs before. So the model is made anew for each run, and the median taken.
    return library.version, median_of_runs([_one_litert_run(library, path, threads, warmup) for _ in range(runs)])


def _one_litert_run(library: _LiteRt, path: str, threads: int, warmup: int) -> list[dict[str, Any]]:
    c_library = ctypes.CDLL(None)
    c_library.strdup.restype = ctypes.c_void_p
    environment = library.handle("CreateEnvironment", ctypes.c_int(0), None)
    model = library.handle("CreateModelFromFile", environment, path.encode())
    options = library.handle("CreateOptions")
    library.call("SetOptionsHardwareAccelerators", options, ctypes.c_int(_CPU))
    release = ctypes.cast(c_library.free, ctypes.c_void_p)
    for identifier, text in (
        (b"runtime_options_string", b"enable_profiling = true\n"),
        (b"xnnpack", b"num_threads = %d\n" % threads),
    ):
        payload = ctypes.c_void_p(c_library.strdup(text))
        library.call("AddOpaqueOptions", options, library.handle("CreateOpaqueOptions", identifier, payload, release))
    compiled = library.handle("CreateCompiledModel", environment, model, options)
    graph = library.handle("GetModelSubgraph", model, ctypes.c_size_t(0))
    inputs, outputs = (_buffers(library, environment, compiled, graph, kind) for kind in ("Input", "Output"))
    profiler = library.handle("CompiledModelGetProfiler", compiled)

    def run() -> None:
        library.call(
            "RunCompiledModel", compiled, ctypes.c_size_t(0), ctypes.c_size_t(len(inputs)), inputs,
            ctypes.c_size_t(len(outputs)), outputs,
        )  # fmt: skip

    for _ in range(warmup):
        run()
    library.call("StartProfiler", profiler)
    run()
    library.call("StopProfiler", profiler)
    summary = ctypes.c_void_p()
    library.call("GetProfileSummary", profiler, compiled, ctypes.byref(summary))
    report = ctypes.string_at(summary.value).decode(errors="replace") if summary.value else ""
    c_library.free(summary)
    for buffer in (*inputs, *outputs):
        library.drop("TensorBuffer", ctypes.c_void_p(buffer))
    for kind, handle in (("CompiledModel", compiled), ("Options", options), ("Model", model)):
        library.drop(kind, handle)
    library.drop("Environment", environment)
    return read_litert_summary(report)


def median_of_runs(seen: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Takes each operator's median time over runs that must all list the same operators."""
    names = {tuple(operator["name"] for operator in operators) for operators in seen}
    if len(names) != 1:
        raise worker.Refused("ParseError", f"LiteRT's profile lists {len(names)} different sets of operators")
    return [
        {**column[0], "ms": statistics.median(operator["ms"] for operator in column)}
        for column in zip(*seen, strict=True)
    ]


def _buffers(
    library: _LiteRt, environment: ctypes.c_void_p, compiled: ctypes.c_void_p, graph: ctypes.c_void_p, kind: str
) -> Any:
    count = ctypes.c_size_t()
    library.call(f"GetNumSubgraph{kind}s", graph, ctypes.byref(count))
    made = (ctypes.c_void_p * count.value)()
    for index in range(count.value):
        tensor = library.handle(f"GetSubgraph{kind}", graph, ctypes.c_size_t(index))
        described = ctypes.create_string_buffer(_TYPE_BYTES)
        library.call("GetRankedTensorType", tensor, described)
        needs = library.handle(
            f"GetCompiledModel{kind}BufferRequirements", compiled, ctypes.c_size_t(0), ctypes.c_size_t(index)
        )
        made[index] = library.handle("CreateManagedTensorBufferFromRequirements", environment, described, needs).value
    return made


def read_litert_summary(text: str) -> list[dict[str, Any]]:
    """Reads the run-order table of LiteRT's profile of one run; raises `worker.Refused` if there is none."""
    _, found, rest = text.partition(" Run Order ")
    table = rest.partition(" Top by Computation Time ")[0]
    operators = []
    for line in table.splitlines():
        match = _SUMMARY_LINE.match(line)
        if match and int(match["times"]) == 1:
            # What a delegate ran is listed under its kernel's name, in front of which it puts its own.
            kind = match["type"].removeprefix("Delegate/")
            operators.append({"name": match["name"], "type": kind, "ms": float(match["ms"])})
    if not found or not operators:
        raise worker.Refused("ParseError", f"LiteRT's profile has no run-order table: {text[:200]!r}")
    return operators


def ort_operators(path: str, threads: int, warmup: int, runs: int) -> tuple[str, list[dict[str, Any]]]:
    """Profiles an .onnx file; returns ONNX Runtime's version and the operators in the order in which they run."""
    with tempfile.TemporaryDirectory() as folder:
        model = worker.OrtModel(path, threads, 0, profile_prefix=os.path.join(folder, "trace"))  # noqa: PTH118
        for _ in range(warmup + runs):
            model.run()
        events = json.loads(Path(model.session.end_profiling()).read_text())
    return model.version, read_ort_trace(events, runs)


def read_ort_trace(events: Sequence[Mapping[str, Any]], runs: int) -> list[dict[str, Any]]:
    """Takes the median time of each node over the last `runs` runs out of a trace."""
    times: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            name = str(event["name"]).removesuffix("_kernel_time")
            times.setdefault(name, []).append(float(event["dur"]) / 1e3)
            kinds[name] = str(event["args"]["op_name"])
    if not times:
        raise worker.Refused("ParseError", "ONNX Runtime's trace has no kernel times")
    return [{"name": name, "type": kinds[name], "ms": statistics.median(rows[-runs:])} for name, rows in times.items()]


def main() -> int:
    """Reads one request from standard input and answers it, by the protocol of `targets.worker`."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(message: Mapping[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    makers: Mapping[str, Callable[..., Any]] = {"litert": litert_operators, "ort": ort_operators}
    try:
        request = json.loads(sys.stdin.readline())
        cores = worker.pin(request.get("cores"))
        version, operators = makers[request["runtime"]](
            request["models"][0], request["threads"], request["warmup"], request["runs"]
        )
        reply({"event": "result", "runtime_version": version, "cores": cores, "operators": operators})
    except worker.Refused as error:
        reply({"event": "error", "kind": error.kind, "message": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
