"""Target ``android``: a phone, or a Linux device, behind adb. Named ``android`` or ``android:SERIAL``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from targets import options
from targets.adb import HINTS, STORAGE, AdbRemote, attached, choose
from targets.base import Device, Measurement, OnProgress
from targets.errors import DeviceError, OptionError, RuntimeMissingError, TimeoutExpiredError
from targets.remote_benchmark import RemoteSettings, ask, benchmark, describe
from targets.runners import BENCHMARK_MODEL, PERF_TEST, PythonRunner, Runner, ToolRunner

__all__ = ["AndroidTarget", "devices"]

_QUERY_TIMEOUT_S = 30.0
RunnerName = Literal["tool", "python"]


def devices() -> list[Device]:
    """Lists what adb sees, usable or not; where adb itself is missing or broken, one row says so."""
    try:
        found = attached()
    except (RuntimeMissingError, DeviceError, TimeoutExpiredError) as error:
        says = " ".join(error.what.split())
        return [Device("android", "adb", state=f"not ready: {says}" + (f"; {error.hint}" if error.hint else ""))]
    return [Device(item.serial, "adb", name=item.model, state=_state(item.state)) for item in found]


def _state(state: str) -> str:
    if state == "device":
        return "ready"
    return f"{state}: {HINTS[state]}" if state in HINTS else state


class AndroidTarget:
    """Runs models on a device behind adb.

    Args:
        device: Serial; `None` takes the only device attached.
        runner: ``tool`` runs TFLite's `benchmark_model` or ONNX Runtime's `onnxruntime_perf_test`, which the user
            gives; ``python`` runs Python with the runtime, on a Linux device behind adb.
        binary: The tool for the device; else ``LAYERFOLD_BENCHMARK_MODEL`` or ``LAYERFOLD_ORT_PERF_TEST`` names it.
        libraries: Shared libraries that the tool needs beside it.
        python: The device's interpreter, for the runner ``python``.
        storage: Folder on the device for files; `None` takes ``/data/local/tmp``, or ``/tmp`` where there is none.
        settings: Fields of `targets.remote_benchmark.RemoteSettings`, such as ``threads`` and ``cores``.

    Raises:
        OptionError: If an option has a value that makes no sense.
    """

    further_options: ClassVar = tuple(RemoteSettings.__dataclass_fields__)

    def __init__(
        self,
        *,
        device: str | None = None,
        runner: RunnerName = "tool",
        binary: str | Path | None = None,
        libraries: Sequence[str] = (),
        python: str = "python3",
        storage: str | None = None,
        **settings: Any,
    ) -> None:
        if runner not in ("tool", "python"):
            raise OptionError(f"runner is {runner!r}, expected tool or python")
        self.name = f"android:{device}" if device else "android"
        self.formats: tuple[str, ...] = ("tflite", "onnx")
        self._serial = device
        self._runner = runner
        self._binary = binary if binary is None else Path(options.text("binary", str(binary)))
        self._libraries = options.texts("libraries", libraries)
        self._python = options.place("python", python)
        self._storage = None if storage is None else options.place("storage", storage)
        try:
            self.settings = RemoteSettings(**settings)
        except TypeError as error:
            raise OptionError(f"target android: {error}", hint=f"it takes {', '.join(self.further_options)}") from error
        if runner == "python" and self.settings.accelerator != "cpu":
            hint = "use runner=tool, with benchmark_model"
            raise OptionError(f"the python runner has no {self.settings.accelerator}", hint=hint)

    def device(self) -> Device:
        """Asks the device who it is."""
        remote = AdbRemote(choose(self._serial))
        return describe(remote, ask(remote))

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
        """Measures the files; see `targets.remote_benchmark.benchmark` for the errors."""
        remote = AdbRemote(choose(self._serial), storage=self._storage or STORAGE)
        runner = make_runner(paths, self._runner, binary=self._binary, libraries=self._libraries, python=self._python)
        if runner.runtime == PERF_TEST.name and self.settings.accelerator == "gpu":
            raise OptionError("onnxruntime_perf_test has no GPU on phones", hint="use nnapi or cpu")
        # Linux behind adb need not have Android's folders.
        if self._storage is None and remote.shell(["test", "-d", STORAGE], timeout_s=_QUERY_TIMEOUT_S).code != 0:
            remote.storage = "/tmp"
        return benchmark(
            remote, runner, self.settings, paths, name=self.name, warmup=warmup, runs=runs, restarts=restarts,
            quick=quick, on_progress=on_progress,
        )  # fmt: skip


def make_runner(
    paths: Sequence[Path | str],
    runner: RunnerName,
    *,
    binary: str | Path | None,
    libraries: Sequence[str | Path],
    python: str,
) -> Runner:
    """Picks the runner for the files' format, which must be one and the same.

    Raises:
        OptionError: If the files are of several formats, so that no one runtime could compare them.
    """
    formats = {Path(path).suffix.lower() for path in paths}
    if len(formats) > 1:
        raise OptionError(f"the files have several formats, {', '.join(sorted(formats))}: compare like with like")
    onnx = formats == {".onnx"}
    if runner == "python":
        return PythonRunner("ort" if onnx else "litert", python=python)
    return ToolRunner(PERF_TEST if onnx else BENCHMARK_MODEL, binary=binary, libraries=libraries)
