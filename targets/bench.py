"""Runs several targets and turns what fails into rows, so that one failing device never costs the others' rows."""

import threading
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from targets.base import Device, DeviceKind, Measurement, OnProgress, Target
from targets.errors import ModelFileError, TargetError, UnexpectedError
from targets.model_file import sha256_of, telling_names

__all__ = ["collect"]


# What a target's device is when it could not be asked.
_KINDS: Mapping[str, DeviceKind] = {
    "host-litert": "host", "host-ort": "host", "emulated-arm64": "emulated", "android": "adb", "ssh": "ssh",
    "ethos-u": "estimator", "qnn-htp": "estimator",
}  # fmt: skip


class _Stopped(BaseException):
    """Unwinds a benchmark in another thread, so that it cleans up as it would after Ctrl-C in the main one."""


def collect(
    targets: Mapping[str, Target],
    paths: Sequence[Path | str],
    *,
    warmup: int = 5,
    runs: int = 60,
    restarts: int = 3,
    quick: bool = False,
    on_progress: Mapping[str, OnProgress] | None = None,
) -> dict[str, list[Measurement]]:
    """Benchmarks the files on every target; one that fails costs no other its rows.

    Targets that compute on this machine (``runs_here``) take turns, since side by side they would disturb each other.
    After them the devices run all at the same time.

    Args:
        targets: Name for the result to target; names are free, such as ``android:SERIAL``.
        paths: Model files; the first is the baseline of a comparison.
        warmup, runs, restarts, quick: As in `targets.base.Target.benchmark`.
        on_progress: For each name, the function to call with (runs done, runs in all); it may be called from another
            thread.

    Returns:
        For each name one row a file, in order; a failed target has rows with `failure` set and no figure, so a caller
        exits with an error if any row has one. Ctrl-C stops all targets, lets them clean up, and is raised then.
    """
    stopping = threading.Event()
    models = telling_names(paths)

    def one(name: str) -> list[Measurement]:
        report = (on_progress or {}).get(name)

        def advance(done: int, total: int) -> None:
            if stopping.is_set():
                raise _Stopped
            if report is not None:
                report(done, total)

        try:
            rows = targets[name].benchmark(
                paths, warmup=warmup, runs=runs, restarts=restarts, quick=quick, on_progress=advance
            )
            if len(rows) != len(paths):
                raise UnexpectedError(f"target {name} gave {len(rows)} rows for {len(paths)} files")
            # A name may say more than the target does of itself, and rows are joined to ratios by it; files of one
            # name in several folders are told apart.
            return [replace(row, target=name, model=model) for row, model in zip(rows, models, strict=True)]
        except TargetError as error:
            failure = error
            for note in getattr(error, "__notes__", ()):
                failure.what = f"{failure.what} ({note})"
        except Exception as error:  # noqa: BLE001 - the mistake of one target must not cost the others their rows
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            failure = UnexpectedError(f"target {name} failed with {type(error).__name__}: {error} ({where})")
        base, _, instance = name.partition(":")
        device = Device(id=instance or name, kind=_KINDS.get(base, "third-party"), state="unknown")
        return [
            Measurement.from_failure(
                failure, target=name, model=model, model_sha256=_sha256(path), device=device, warmup=warmup,
                runs=runs, restarts=restarts, quick=quick,
            )
            for path, model in zip(paths, models, strict=True)
        ]  # fmt: skip

    here = [name for name, target in targets.items() if getattr(target, "runs_here", False)]
    away = [name for name in targets if name not in here]
    found = {name: one(name) for name in here}
    if len(away) < 2:
        found |= {name: one(name) for name in away}
    else:
        with ThreadPoolExecutor(max_workers=len(away)) as pool:
            futures = {name: pool.submit(one, name) for name in away}
            try:
                found |= {name: future.result() for name, future in futures.items()}
            except BaseException:
                # The pool waits for its threads; at their next sign of progress they end and clean their devices.
                stopping.set()
                raise
    return {name: found[name] for name in targets}


def _sha256(path: Path | str) -> str:
    try:
        return sha256_of(Path(path))
    except ModelFileError:
        # The row is about a failure already, and that may well be it.
        return ""
