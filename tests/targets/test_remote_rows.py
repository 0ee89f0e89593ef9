"""Rows that were measured survive what goes wrong afterwards, and say what is not known of them."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from targets.base import Measurement
from targets.errors import DeviceFullError, DeviceLostError, TimeoutExpiredError
from targets.remote import Reply, workspace
from targets.remote_benchmark import RemoteSettings, benchmark
from targets.runners import RunnerRow

MakeModel = Callable[..., Path]


class Wire:
    """A device that takes everything, and after the run fails in `trouble`: the question or the clean-up."""

    id, kind, storage = "S1", "adb", "/data/local/tmp"

    def __init__(self, model: Path, trouble: str) -> None:
        self.sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
        self.trouble, self.ran = trouble, False

    def shell(self, argv: Sequence[str], *, timeout_s: float) -> Reply:
        if argv[0] == "sha256sum":
            return Reply(f"{self.sha256}  x\n", "", 0)
        asked = "clean-up" if "rm -rf" in " ".join(argv) else "question"
        if self.ran and argv[0] == "sh" and asked == self.trouble:
            raise TimeoutExpiredError("sh on S1 took over 8 s")
        return Reply("", "", 0)

    def push(self, *args: object, **options: object) -> None:
        pass

    def is_alive(self) -> bool:
        return True


class Ran:
    """A runner whose run always goes well."""

    runtime, format = "perf", "tflite"

    def __init__(self, accelerator: str) -> None:
        self.accelerator = accelerator

    def prepare(self, space: object) -> None:
        pass

    def run(self, space: object, files: object, work: object) -> list[RunnerRow]:
        space.remote.ran = True  # type: ignore[attr-defined]
        return [RunnerRow(samples_ms=[[1.0] * 5], actual_accelerator=self.accelerator)]


def measured(model: Path, trouble: str, *, asked: str = "cpu", ran: str = "cpu") -> Measurement:
    settings = RemoteSettings(accelerator=asked)
    (row,) = benchmark(
        Wire(model, trouble), Ran(ran), settings, [model], name="android:S1", warmup=1, runs=5, restarts=1,  # type: ignore[arg-type]
        quick=False, on_progress=None,
    )  # fmt: skip
    return row


@pytest.fixture
def model(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LAYERFOLD_LOCK_FOLDER", str(tmp_path / "locks"))
    return make_model("tflite")


def test_a_clean_up_that_fails_costs_no_rows(model: Path) -> None:
    row = measured(model, "clean-up")
    assert row.median_ms == 1.0 and row.valid
    assert "is left on S1 until the next run" in row.note
    assert measured(model, "").note == ""


def test_a_device_that_does_not_say_its_state_afterwards_costs_no_rows(model: Path) -> None:
    row = measured(model, "question")
    assert row.median_ms == 1.0 and not row.valid and "did not say its state after the run" in row.invalid_reason


def test_a_tool_that_does_not_say_what_ran_is_not_believed(model: Path) -> None:
    row = measured(model, "", asked="nnapi", ran="unknown")
    assert not row.valid and row.invalid_reason == "asked for nnapi, and perf does not say what ran the model"


def test_a_device_without_room_for_a_folder_is_a_full_device(model: Path) -> None:
    class Full(Wire):
        def shell(self, argv: Sequence[str], *, timeout_s: float) -> Reply:
            if argv[0] == "mkdir":
                return Reply("", f"mkdir: '{argv[-1]}': No space left on device\n", 1)
            return super().shell(argv, timeout_s=timeout_s)

    with pytest.raises(DeviceFullError, match="S1 has no room: mkdir"), workspace(Full(model, "")):  # type: ignore[arg-type]
        pass


def test_a_device_lost_in_the_run_is_still_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*args: object) -> list[RunnerRow]:
        raise DeviceLostError("gone")

    monkeypatch.setattr(Ran, "run", lost)
    with pytest.raises(DeviceLostError, match="gone"):
        measured(model, "")
