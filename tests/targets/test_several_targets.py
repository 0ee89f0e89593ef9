"""Several targets at once: who takes turns, who runs side by side, and what a failure or Ctrl-C leaves."""

import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from targets.base import Device, Measurement, OnProgress
from targets.bench import collect
from targets.errors import DeviceLostError


class Made:
    """A target that notes when it is at work; `act` may raise."""

    def __init__(self, log: list[str], name: str, *, here: bool = False, act: Any = None) -> None:
        self.name, self.formats, self.runs_here = name, ("tflite",), here
        self._log, self._act = log, act

    def device(self) -> Device:
        return Device(self.name, "third-party")

    def benchmark(self, paths: Sequence[Path | str], *, on_progress: OnProgress, **counts: Any) -> list[Measurement]:
        self._log.append(f"+{self.name}")
        try:
            if self._act is not None:
                self._act(on_progress)
            return [
                Measurement.from_samples(
                    [[1.0]], target=self.name, model=Path(path).name, model_sha256="", precision="fp32", runtime="",
                    runtime_version="", requested_accelerator="cpu", actual_accelerator="cpu", device=self.device(),
                    threads=1, pinned_cores=(), **counts,
                )
                for path in paths
            ]  # fmt: skip
        finally:
            self._log.append(f"-{self.name}")


def test_targets_of_this_machine_take_turns_and_devices_do_not() -> None:
    log: list[str] = []
    met = threading.Barrier(2, timeout=20)
    made = {
        "phone1": Made(log, "phone1", act=lambda advance: met.wait()),
        "host1": Made(log, "host1", here=True),
        "phone2": Made(log, "phone2", act=lambda advance: met.wait()),
        "host2": Made(log, "host2", here=True),
    }
    found = collect(made, ["a.tflite", "b.tflite"])
    assert list(found) == list(made) and all(len(rows) == 2 and not rows[0].failure for rows in found.values())
    assert log[:4] == ["+host1", "-host1", "+host2", "-host2"]
    assert set(log[4:6]) == {"+phone1", "+phone2"}, "two devices must be at work at once"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/m.tflite", "b/n.tflite"], ["m.tflite", "n.tflite"]),
        (["a/m.tflite", "b/m.tflite", "b/n.tflite"], ["a/m.tflite", "b/m.tflite", "n.tflite"]),
        (["x/a/m.tflite", "y/a/m.tflite", "y/b/m.tflite"], ["x/a/m.tflite", "y/a/m.tflite", "b/m.tflite"]),
        (["a/m.tflite", "a/../a/m.tflite"], ["m.tflite", "m.tflite"]),
        (["/m.tflite", "/a/m.tflite"], ["/m.tflite", "a/m.tflite"]),
    ],
)
def test_files_of_one_name_are_told_apart_by_their_folders(paths: list[str], names: list[str]) -> None:
    def lost(advance: OnProgress) -> None:
        raise DeviceLostError("gone")

    found = collect({"well": Made([], "well"), "ill": Made([], "ill", act=lost)}, paths)
    assert [row.model for row in found["well"]] == [row.model for row in found["ill"]] == names


def test_a_mistake_in_a_target_is_a_row_that_says_where() -> None:
    def mistake(advance: OnProgress) -> None:
        raise ZeroDivisionError("no such luck")

    log: list[str] = []
    found = collect({"bad": Made(log, "bad", act=mistake), "good": Made(log, "good")}, ["a.tflite"], quick=True)
    (bad,), (good,) = found.values()
    assert bad.failure == "UnexpectedError" and good.failure == "" and bad.quick and good.quick
    assert "ZeroDivisionError: no such luck" in bad.invalid_reason and Path(__file__).name in bad.invalid_reason
    assert bad.median_ms is None


def test_a_failed_row_still_says_which_file_and_device(tmp_path: Path) -> None:
    def lost(advance: OnProgress) -> None:
        raise DeviceLostError("gone")

    (tmp_path / "a.tflite").write_bytes(b"abc")
    found = collect({"android:X1": Made([], "android", act=lost)}, [tmp_path / "a.tflite", tmp_path / "b.tflite"])
    first, second = found["android:X1"]
    assert (first.device.kind, first.device.id, first.target) == ("adb", "X1", "android:X1")
    # SHA-256 of "abc" as in FIPS 180-2, appendix B.1.
    assert first.model_sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert second.model_sha256 == "" and second.failure == "DeviceLostError"


def test_ctrl_c_stops_all_devices_and_lets_them_clean_up() -> None:
    log: list[str] = []

    timer = threading.Timer(0.5, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
    both_at_work = threading.Barrier(2, action=timer.start, timeout=60)

    def forever(advance: OnProgress) -> None:
        both_at_work.wait()
        for done in range(10**9):
            advance(done, 10**9)
            time.sleep(0.01)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        collect({name: Made(log, name, act=forever) for name in ("one", "two")}, ["a.tflite"])
    assert time.monotonic() - started < 120  # left alone they would be at it for months
    assert sorted(log) == ["+one", "+two", "-one", "-two"]
