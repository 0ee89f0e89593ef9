"""Target ``emulated-arm64``: what an inference costs on an ARM core, counted instead of timed.

The runtimes' real aarch64 wheels run under QEMU's user emulation of a Cortex-A76, and a plugin counts the instructions
between two marks around each inference, by class, and the misses of an LRU cache model. The count does not depend on
what else the machine is doing: it repeats where milliseconds do not. Emulated time means nothing and is not reported.
"""

import base64
import math
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from targets import options
from targets.base import Device, Measurement, OnProgress, check_counts, layerfold_version, timestamp
from targets.emulated_setup import EmulatedRoot, find, setup
from targets.errors import OptionError, RuntimeMissingError, SetupError, TimeoutExpiredError, WorkerError
from targets.model_file import ModelFile, inspect
from targets.worker_process import WORKER_FILE, run_worker

__all__ = ["EmulatedTarget", "devices", "plugin_option", "setup"]

MARKER = 27750
_CPU = "cortex-a76"
_RUNTIMES = {".tflite": ("litert", "tflite", "LiteRT"), ".onnx": ("ort", "onnx", "ONNX Runtime")}
_INSTRUCTION_CLASSES = (
    "integer", "branch", "system", "memory", "memory_simd", "fp", "simd", "simd_dot", "other",
)  # fmt: skip
_CACHE_COUNTERS = ("l1d_access", "l1d_miss", "l2_miss")
_MOST_RUNS = 3
_MOST_WARMUPS = 2
_ATTEMPTS = 2
_ROUNDING_STEPS = 2
_PROBE_TIMEOUT_S = 10.0
_RANDOMISED = "addresses are randomised (setarch -R is not permitted here), so counts of the cache model move a little"


def devices() -> list[Device]:
    """Lists the emulated device, ready or not."""
    try:
        root = find()
    except SetupError as error:
        return [Device("emulated-arm64", "emulated", arch="aarch64", state=f"not ready: {error.hint or error.what}")]
    return [_device(root)]


def _device(root: EmulatedRoot) -> Device:
    return Device(
        id="emulated-arm64",
        kind="emulated",
        name="QEMU user emulation",
        arch="aarch64",
        os=f"Linux user space on {platform.system()} {platform.machine()}",
        cpu=_CPU,
        cores=1,
        fingerprint=f"qemu {root.qemu}; " + ", ".join(f"{name} {value}" for name, value in root.versions.items()),
    )


class EmulatedTarget:
    """Counts what models cost on an emulated ARM core.

    Args:
        threads: Must be 1: threads that wait for each other spin, and spinning is counted.
        cache: Whether to run the cache model; it makes a run about twice as long.
        folder: Where the root is; the user's cache if `None`.
        timeout_s: Limit for one process, in seconds.
        check_output: Whether the output of an int8 model must be the host's: to the byte for LiteRT, within a rounding
            for ONNX Runtime.

    Raises:
        OptionError: If `threads` is not 1.
    """

    def __init__(
        self,
        *,
        threads: int = 1,
        cache: bool = True,
        folder: Path | str | None = None,
        timeout_s: float = 600.0,
        check_output: bool = True,
    ) -> None:
        if options.whole("threads", threads) != 1:
            raise OptionError(f"threads is {threads}, but emulated-arm64 counts one thread", hint="use threads=1")
        self.name = "emulated-arm64"
        self.formats: tuple[str, ...] = ("tflite", "onnx")
        self.runs_here = True
        self._cache = options.flag("cache", cache)
        self._folder = folder if folder is None or isinstance(folder, Path) else Path(options.text("folder", folder))
        self._timeout_s = options.number("timeout_s", timeout_s, above=0)
        self._check_output = options.flag("check_output", check_output)

    def device(self) -> Device:
        """Describes the emulated device; raises `SetupError` if it is not built."""
        return _device(find(self._folder))

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
        """Counts the files; see `targets.base.Target.benchmark`.

        A count needs no statistics, so at most 2 warm-ups, 3 runs and 1 process are made, whatever was asked for; each
        file runs in a process of its own, so that no count depends on the company. The row says what was made.

        Raises:
            SetupError: If the root is not built.
            ModelFileError: If a file is missing or damaged.
            WorkerError: If the emulated process dies, or counted nothing.
            TimeoutExpiredError: If it takes longer than the limit.
        """
        root = find(self._folder)
        files: list[tuple[ModelFile, str]] = []
        for path in check_counts(paths, warmup=warmup, runs=runs, restarts=restarts):
            runtime, form, title = _RUNTIMES.get(path.suffix.lower(), _RUNTIMES[".tflite"])
            files.append((inspect(path, expected=form, runtime=title), runtime))
        warmup, runs = min(warmup, _MOST_WARMUPS), min(runs, _MOST_RUNS)
        rows = []
        for index, (file, runtime) in enumerate(files):
            rows.append(self._measure(root, file, runtime, warmup=warmup, runs=runs, quick=quick))
            if on_progress is not None:
                on_progress((index + 1) * runs, len(files) * runs)
        return rows

    def _measure(
        self, root: EmulatedRoot, file: ModelFile, runtime: str, *, warmup: int, runs: int, quick: bool
    ) -> Measurement:
        with tempfile.TemporaryDirectory(prefix="layerfold-") as scratch:
            # One path for all models: the length of a path is copied about, and would be counted.
            model = Path(scratch) / f"m.{file.format}"
            shutil.copyfile(file.path, model)
            counts_file = Path(scratch) / "counts.txt"
            request = {
                "runtime": runtime, "models": [str(model)], "threads": 1, "warmup": warmup, "runs": runs,
                "marker": MARKER, "watch": False, "output": True,
            }  # fmt: skip
            command = _command(root, counts_file, cache=self._cache)
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    reply = run_worker(
                        command, request, timeout_s=self._timeout_s, env=_environment(root), where="emulated-arm64"
                    )
                    break
                except TimeoutExpiredError:
                    # Counting again changes nothing, and user emulation has been seen to hang once in a long while.
                    if attempt == _ATTEMPTS:
                        raise
            text = counts_file.read_text(encoding="ascii") if counts_file.exists() else ""
            counts = read_counts(text, models=1, runs=runs)
        found = reply["models"][0]
        net = net_counts(counts[0], counts[1])
        totals = [_instructions(row) for row in counts[0]]
        net["instructions_spread"] = (max(totals) - min(totals)) / min(totals)
        reason = ""
        if self._check_output and file.precision == "int8":
            steps, reason = self._compare_with_host(file, runtime, found["output"])
            if math.isfinite(steps):
                net["output_steps_off_the_host"] = steps
        return Measurement(
            target=self.name, model=file.path.name, model_sha256=file.sha256, precision=file.precision,
            runtime=runtime, runtime_version=reply["runtime_version"], requested_accelerator="cpu",
            actual_accelerator=found["accelerator"], device=_device(root), threads=1, pinned_cores=(), warmup=warmup,
            runs=runs, restarts=1, quick=quick,
            instructions=sum(net[f"instructions_{name}"] for name in _INSTRUCTION_CLASSES),
            counters=net, output_sha256=found["output_sha256"], valid=not reason, invalid_reason=reason,
            note="" if _fixed_addresses() else _RANDOMISED,
            timestamp=timestamp(), layerfold_version=layerfold_version(),
        )  # fmt: skip

    def _compare_with_host(self, file: ModelFile, runtime: str, output: Mapping[str, str]) -> tuple[float, str]:
        """Says how many steps of the output's quantisation the host is away, and what is wrong with that.

        LiteRT computes int8 in integers, which come out the same on every processor. ONNX Runtime adds quantised
        tensors in float32, on ARM with fused multiply-adds: a sum in the middle between two steps may go the other way
        there, and what follows is off by a step. More than that has another cause.
        """
        request = {
            "runtime": runtime, "models": [str(file.path.resolve())], "threads": 1, "warmup": 0, "runs": 1,
            "exact": True, "output": True,
        }  # fmt: skip
        try:
            reply = run_worker([sys.executable, "-P", str(WORKER_FILE)], request, timeout_s=self._timeout_s)
        except RuntimeMissingError as error:
            return math.inf, f"the output could not be compared with the host's: {error.what}"
        steps = steps_apart(output, reply["models"][0]["output"])
        allowed = _ROUNDING_STEPS if runtime == "ort" else 0
        if steps > allowed:
            return steps, f"the int8 output differs from the host's for the same input, by up to {steps:.3g} steps"
        return steps, ""


def steps_apart(first: Mapping[str, str], second: Mapping[str, str]) -> float:
    """Computes the largest difference of two outputs in steps of their quantisation; 0 if the bytes are equal.

    The step is the least distance between any two values that occur, so outputs that are not quantised at all lie many
    steps apart as soon as they differ. Outputs of different size or type are infinitely far apart.
    """
    import numpy as np

    if first == second:
        return 0.0
    a, b = (np.frombuffer(base64.b64decode(item["base64"]), np.dtype(item["dtype"])) for item in (first, second))
    if a.shape != b.shape or a.dtype != b.dtype or not np.isfinite(a).all() or not np.isfinite(b).all():
        return math.inf
    a, b = a.astype(np.float64), b.astype(np.float64)
    gaps = np.diff(np.unique(np.concatenate([a, b])))
    return float(np.abs(a - b).max() / gaps.min()) if gaps.size else 0.0


@cache
def _fixed_addresses() -> tuple[str, ...]:
    """The prefix that switches address randomisation off; empty where that is not permitted, as in many containers."""
    prefix = ("setarch", "-R")
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, timeout=_PROBE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return prefix if done.returncode == 0 else ()


def plugin_option(root: EmulatedRoot, counts_file: Path, *, cache: bool) -> str:
    """The value of QEMU's option `-plugin`: what to load, and what to tell it.

    Args:
        root: Where the plugin is.
        counts_file: What it writes.
        cache: Whether it models a cache.
    """
    # To QEMU a comma ends a value; two stand for one. And without a name, a path with = would be taken for one.
    plugin, out = (str(path).replace(",", ",,") for path in (root.plugin, counts_file))
    return f"file={plugin},out={out},marker={MARKER}" + (",cache=on" if cache else "")


def _command(root: EmulatedRoot, counts_file: Path, *, cache: bool) -> list[str]:
    # The worker there has no thread that watches for the end of the one who asked: the kernel has to.
    tie = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    # Without address randomisation the cache model sees the same addresses every time.
    return [
        *tie, *_fixed_addresses(), *root.command(), "-cpu", _CPU, "-L", str(root.sysroot),
        "-plugin", plugin_option(root, counts_file, cache=cache), str(root.sysroot / "usr/bin/python3.11"),
        "-B", str(WORKER_FILE),
    ]  # fmt: skip


def _environment(root: EmulatedRoot) -> Mapping[str, str]:
    """A fixed environment: the guest's stack begins with it, and hashing follows the seed."""
    return {
        "PYTHONHOME": str(root.sysroot / "usr"),
        "PYTHONPATH": str(root.site),
        "PYTHONHASHSEED": "0",
        "PATH": "/usr/bin:/bin",
        "HOME": "/",
        "LC_ALL": "C.UTF-8",
    }


def read_counts(text: str, *, models: int, runs: int) -> list[list[dict[str, int]]]:
    """Reads the plugin's lines.

    Args:
        text: The plugin's output file.
        models: Number of models; the number after the last one's stands for the empty bracket.
        runs: Bracketed runs of each.

    Returns:
        For each model, then for the empty bracket, one dict of counters for each run.

    Raises:
        WorkerError: If lines are missing or damaged.
    """
    counts: list[list[dict[str, int]]] = [[] for _ in range(models + 1)]
    try:
        for line in text.splitlines():
            values = {name: int(word) for name, _, word in (pair.partition("=") for pair in line.split())}
            counts[values.pop("model")].append(values)
    except (ValueError, KeyError, IndexError) as error:
        raise WorkerError(f"the counting plugin wrote a line that cannot be read: {error!r}") from error
    if any(len(rows) != runs for rows in counts):
        found = [len(rows) for rows in counts]
        raise WorkerError(f"the counting plugin marked {found} runs, expected {runs} of each")
    return counts


def net_counts(rows: Sequence[Mapping[str, int]], empty: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Takes the run with the fewest instructions, less the cheapest empty bracket; counters get a speaking name.

    What happens now and then (an allocator that tidies up, a table that grows) only ever adds: in ONNX Runtime one run
    in four has been seen to take 0.24% more. The cheapest run repeats, a median of few may not.
    """
    run, bracket = (min(those, key=_instructions) for those in (rows, empty))
    net: dict[str, Any] = {}
    for name in (*_INSTRUCTION_CLASSES, *_CACHE_COUNTERS):
        if name in run:
            net[f"instructions_{name}" if name in _INSTRUCTION_CLASSES else name] = max(run[name] - bracket[name], 0)
    return net


def _instructions(row: Mapping[str, int]) -> int:
    return sum(row[name] for name in _INSTRUCTION_CLASSES)
