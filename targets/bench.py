"""Runs several targets at once and turns what fails into rows."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from targets.base import Device, Measurement, OnProgress, Target
from targets.errors import TargetError

__all__ = ["collect"]


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

    Targets on different devices run at the same time. Give targets of one device (``host-litert`` and ``host-ort``)
    to separate calls: side by side they would disturb each other.

    Args:
        targets: Name for the result to target; names are free, such as ``android:SERIAL``.
        paths: Model files; the first is the baseline of a comparison.
        warmup, runs, restarts, quick: As in `targets.base.Target.benchmark`.
        on_progress: For each name, the function to call with (runs done, runs in all).

    Returns:
        For each name one row a file, in order; a failed target has rows with `failure` set and no figure, so a caller
        exits with an error if any row has one.
    """

    def one(name: str) -> list[Measurement]:
        try:
            return targets[name].benchmark(
                paths, warmup=warmup, runs=runs, restarts=restarts, quick=quick,
                on_progress=(on_progress or {}).get(name),
            )  # fmt: skip
        except TargetError as error:
            for note in getattr(error, "__notes__", ()):
                error.what = f"{error.what} ({note})"
            unknown = Device(id=name, kind="third-party", state="unknown")
            return [
                Measurement.from_failure(
                    error, target=name, model=Path(path).name, device=unknown, warmup=warmup, runs=runs,
                    restarts=restarts, quick=quick,
                )
                for path in paths
            ]  # fmt: skip

    with ThreadPoolExecutor(max_workers=max(len(targets), 1)) as pool:
        return dict(zip(targets, pool.map(one, targets), strict=True))
