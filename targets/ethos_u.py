"""Target ``ethos-u``: Arm's own estimate of what a model costs on an Ethos-U NPU, without one.

`ethos-u-vela` compiles the model as for the device and adds up the cycles of a performance model. Named ``ethos-u`` or
``ethos-u:CONFIGURATION``. Cycles are an estimate: good for comparing two models, not for promising milliseconds.
"""

import csv
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from targets import options
from targets.base import Device, Measurement, OnProgress, check_counts, layerfold_version, timestamp
from targets.errors import ModelFileError, OptionError, ParseError, RuntimeMissingError, TimeoutExpiredError
from targets.model_file import ModelFile, inspect

__all__ = ["CONFIGURATIONS", "EthosUTarget", "read_operators", "read_summary"]

CONFIGURATIONS = (
    "ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u65-512",
    "ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024", "ethos-u85-2048",
)  # fmt: skip
_DEFAULT = "ethos-u55-256"
_COUNTERS = {
    "cycles_npu": "cycles_npu",
    "cycles_sram_access": "cycles_sram_access",
    "cycles_off_chip_flash_access": "cycles_off_chip_flash_access",
    "sram_memory_used": "sram_used_kib",
    "nn_macs": "macs",
}


class EthosUTarget:
    """Estimates models on an Ethos-U.

    Args:
        device: Configuration of the NPU, one of `CONFIGURATIONS`: family and MACs a cycle;
            ``ethos-u55-256`` if `None`.
        threads: Taken for the sake of callers that give it to every target; an NPU has none.
        timeout_s: Limit for one model, in seconds.

    Raises:
        OptionError: If the configuration is unknown.
    """

    def __init__(self, *, device: str | None = None, threads: int = 1, timeout_s: float = 600.0) -> None:
        configuration = _DEFAULT if device is None else device
        options.whole("threads", threads)
        if configuration not in CONFIGURATIONS:
            raise OptionError(f"{device!r} is no Ethos-U", hint=f"use one of {', '.join(CONFIGURATIONS)}")
        self.name = f"ethos-u:{device}" if device else "ethos-u"
        self.formats: tuple[str, ...] = ("tflite",)
        self.precisions = ("int8", "int16x8")
        self.runs_here = True
        self._configuration = configuration
        self._timeout_s = options.number("timeout_s", timeout_s, above=0)

    def device(self) -> Device:
        """Describes the NPU."""
        return Device(self._configuration, "estimator", name=f"Arm {self._configuration} (estimate)", cpu="Ethos-U")

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
        """Estimates the files, each once, whatever counts were asked for.

        Raises:
            RuntimeMissingError: If `ethos-u-vela` is not installed.
            ModelFileError: If a file is missing, damaged, or not int8: the NPU computes nothing else.
            ParseError: If the estimate cannot be read.
            TimeoutExpiredError: If it takes longer than the limit.
        """
        if importlib.util.find_spec("ethosu") is None:
            raise RuntimeMissingError("ethos-u-vela is not installed", hint="pip install 'layerfold[npu]'")
        files = [
            inspect(path, expected="tflite", runtime="Ethos-U")
            for path in check_counts(paths, warmup=warmup, runs=runs, restarts=restarts)
        ]
        for file in files:
            if file.precision not in {"int8", "int16x8"}:
                raise ModelFileError(f"Ethos-U runs int8 models; {file.path.name} is {file.precision}")
        rows = []
        for index, file in enumerate(files, start=1):
            rows.append(self._estimate(file, quick=quick))
            if on_progress is not None:
                on_progress(index, len(files))
        return rows

    def _estimate(self, file: ModelFile, *, quick: bool) -> Measurement:
        with tempfile.TemporaryDirectory(prefix="layerfold-") as folder:
            argv = [
                sys.executable, "-m", "ethosu.vela", str(file.path.resolve()), "--accelerator-config",
                self._configuration, "--output-dir", folder, "--show-cpu-operations",
            ]  # fmt: skip
            try:
                done = subprocess.run(
                    argv,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    encoding="utf-8",
                    errors="replace",
                    timeout=self._timeout_s,
                )
            except subprocess.TimeoutExpired as error:
                raise TimeoutExpiredError(f"vela took over {self._timeout_s:.0f} s on {file.path.name}") from error
            if done.returncode != 0:
                says = (done.stderr or done.stdout).strip()[-300:]
                raise ModelFileError(f"vela cannot compile {file.path.name}: {says}")
            tables = list(Path(folder).glob("*_summary_*.csv"))
            if len(tables) != 1:
                raise ParseError(f"vela wrote {len(tables)} summaries for {file.path.name}, expected one")
            cycles, counters = read_summary(tables[0].read_text(encoding="utf-8"))
        left, taken = read_operators(done.stdout)
        accelerator = self._configuration + ("-partial" if left else "")
        reason = (
            f"{left} of {left + taken} operators stay on the processor, whose cycles are not counted" if left else ""
        )
        return Measurement(
            target=self.name, model=file.path.name, model_sha256=file.sha256, precision=file.precision,
            runtime="ethos-u-vela", runtime_version=metadata.version("ethos-u-vela"), requested_accelerator="npu",
            actual_accelerator=accelerator, device=self.device(), threads=1, pinned_cores=(), warmup=0, runs=1,
            restarts=1, quick=quick, cycles=cycles,
            counters={**counters, "operators_left_on_cpu": left}, valid=not reason, invalid_reason=reason,
            timestamp=timestamp(), layerfold_version=layerfold_version(),
        )  # fmt: skip


def read_operators(text: str) -> tuple[int, int]:
    """Reads from vela's report how many operators stay on the processor, and how many the NPU takes.

    Raises:
        ParseError: If the report does not say both, once.
    """
    counts = []
    for kind in ("CPU", "NPU"):
        found = re.findall(rf"^{kind} operators = (\d+) \(", text, flags=re.MULTILINE)
        if len(found) != 1:
            raise ParseError(
                f"vela's report says {len(found)} times how many operators are on the {kind}, expected once"
            )
        counts.append(int(found[0]))
    return counts[0], counts[1]


def read_summary(text: str) -> tuple[float, dict[str, float]]:
    """Reads vela's one-line table; returns the total cycles and further counters.

    Raises:
        ParseError: If the total is missing or not a positive number.
    """
    rows = list(csv.DictReader(text.splitlines()))
    try:
        (row,) = rows
        cycles = float(row["cycles_total"])
        counters = {name: float(row[column]) for column, name in _COUNTERS.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ParseError(f"vela's summary cannot be read: {error!r}") from error
    if not 0 < cycles < float("inf"):
        raise ParseError(f"vela's summary says {cycles} cycles")
    return cycles, counters
