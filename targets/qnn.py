"""Target ``qnn-htp``: does a model compile for Qualcomm's Hexagon NPU, and what of it stays on the processor?

`onnxruntime-qnn` brings the compiler, which runs here; the NPU does not. So there is no time and no cycle count, only
an answer that spares a surprise on the phone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from targets import options
from targets.base import Device, Measurement, OnProgress, check_counts, layerfold_version, timestamp
from targets.errors import OptionError, RuntimeMissingError
from targets.model_file import inspect
from targets.worker_process import run_worker

__all__ = ["QnnTarget"]

# Hexagon generations by the number that the compiler takes, and a phone chip of each.
ARCHITECTURES = {"68": "Snapdragon 888", "69": "Snapdragon 8 Gen 1", "73": "Snapdragon 8 Gen 2",
                 "75": "Snapdragon 8 Gen 3", "79": "Snapdragon 8 Elite"}  # fmt: skip
_DEFAULT = "75"


class QnnTarget:
    """Compiles ONNX models for HTP.

    Args:
        device: Hexagon generation, one of `ARCHITECTURES`; 75 if `None`.
        threads: Taken for the sake of callers that give it to every target; an NPU has none.
        timeout_s: Limit for one model, in seconds.

    Raises:
        OptionError: If the generation is unknown.
    """

    def __init__(self, *, device: str | None = None, threads: int = 1, timeout_s: float = 600.0) -> None:
        arch = _DEFAULT if device is None else str(device)
        options.whole("threads", threads)
        if arch not in ARCHITECTURES:
            raise OptionError(f"{device!r} is no Hexagon generation", hint=f"use one of {', '.join(ARCHITECTURES)}")
        self.name = f"qnn-htp:{device}" if device else "qnn-htp"
        self.formats: tuple[str, ...] = ("onnx",)
        self.runs_here = True
        self._arch = arch
        self._timeout_s = options.number("timeout_s", timeout_s, above=0)

    def device(self) -> Device:
        """Describes the NPU."""
        name = f"Qualcomm HTP v{self._arch}, as in {ARCHITECTURES[self._arch]} (compile check)"
        return Device(f"htp-v{self._arch}", "estimator", name=name, cpu="Hexagon")

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
        """Compiles the files, each once, whatever counts were asked for.

        Returns:
            Rows without a time; `counters` has ``npu_partitions``, ``operators_left_on_cpu`` and ``compiled_mb``.

        Raises:
            RuntimeMissingError: If `onnxruntime-qnn` is not installed.
            ModelFileError: If a file is missing or damaged, or the compiler refuses it.
            WorkerError: If the compiler crashes.
            TimeoutExpiredError: If it takes longer than the limit.
        """
        checked = check_counts(paths, warmup=warmup, runs=runs, restarts=restarts)
        files = [inspect(path, expected="onnx", runtime="Qualcomm HTP") for path in checked]
        home = str(Path(__file__).resolve().parents[1])
        start = f"import sys; sys.path.append({home!r}); from targets.qnn_worker import main; sys.exit(main())"
        rows = []
        for index, file in enumerate(files, start=1):
            request = {"runtime": "qnn", "models": [str(file.path.resolve())], "htp_arch": self._arch}
            try:
                reply = run_worker([sys.executable, "-P", "-c", start], request, timeout_s=self._timeout_s)
            except RuntimeMissingError as error:
                raise RuntimeMissingError(error.what, hint="pip install 'layerfold[npu,onnx]'") from error
            operators = dict(reply["operators"])
            partitions = operators.pop("EPContext", 0)
            # A float model's border stays outside: one node each to quantise the input and to widen the output.
            left = sum(count for kind, count in operators.items() if kind not in {"QuantizeLinear", "DequantizeLinear"})
            accelerator = "htp" if partitions == 1 and not left else "htp-partial" if partitions else "cpu"
            reason = "" if accelerator == "htp" else f"asked for htp, but {left} operators stay on the processor"
            rows.append(
                Measurement(
                    target=self.name, model=file.path.name, model_sha256=file.sha256, precision=file.precision,
                    runtime="onnxruntime-qnn", runtime_version=reply["version"], requested_accelerator="htp",
                    actual_accelerator=accelerator, device=self.device(), threads=1, pinned_cores=(), warmup=0, runs=1,
                    restarts=1, quick=quick, timestamp=timestamp(), layerfold_version=layerfold_version(),
                    counters={"npu_partitions": partitions, "operators_left_on_cpu": left,
                              "compiled_mb": reply["bytes"] / 2**20},
                    valid=not reason, invalid_reason=reason,
                )
            )  # fmt: skip
            if on_progress is not None:
                on_progress(index, len(files))
        return rows
