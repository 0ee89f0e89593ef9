"""The bench stage with targets made by hand: which files go where, and what becomes of figures and failures."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import recipe_files
from pipeline.errors import LayerfoldError
from pipeline.results.schema import LatencyRow
from pipeline.stages import bench
from targets import registry
from targets.base import Device, Measurement
from targets.errors import DeviceLostError, OptionError, TargetError

HALF = {"baseline": 8.0, "folded": 4.0}


class Made:
    """A target whose files cost what `HALF` says, in `metric`; it notes what it was given."""

    def __init__(self, name: str, metric: str, asked: list[str], **options: Any) -> None:
        self.name, self.metric, self.asked, self.options = name, metric, asked, options
        if name == "npu":
            self.formats, self.precisions = ("tflite",), ("int8",)
        if name == "compiler":
            self.formats = ("onnx",)

    def device(self) -> Device:
        return Device("d", "third-party", name="a made device")

    def benchmark(self, paths: Sequence[Path], *, on_progress: Any, **counts: Any) -> list[Measurement]:
        self.asked.append(f"{self.name} {' '.join(path.name for path in paths)}")
        on_progress(counts["runs"], counts["runs"])
        if self.name == "phone":
            raise DeviceLostError("the phone went away", hint="check the cable")
        rows = []
        for path in paths:
            cost = HALF[path.name.partition(".")[0]]
            row: dict[str, Any] = {
                "target": self.name, "model": path.name, "model_sha256": "", "precision": "int8", "runtime": "made",
                "runtime_version": "1", "requested_accelerator": "cpu", "actual_accelerator": "cpu",
                "device": self.device(), "threads": 1, "pinned_cores": (), **counts,
            }  # fmt: skip
            if self.metric == "time":
                rows.append(Measurement.from_samples([[cost, cost * 1.01]] * 3, **row))
            else:
                rows.append(Measurement(**row, **({self.metric: cost * 1e6} if self.metric else {})))
        return rows


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    metrics = {"clock": "time", "counter": "instructions", "npu": "cycles", "compiler": "", "phone": "time"}
    monkeypatch.setattr(
        registry, "_factory",
        lambda name: lambda threads=1, speed=1: Made(name, metrics[name], calls, threads=threads, speed=speed),
    )  # fmt: skip
    return calls


def run(work: Path, *overrides: str, quick: bool = False) -> tuple[dict[str, Any], list[Any]]:
    recipe = recipe_files.load("quickstart", overrides=overrides, quick=quick)
    moves: list[Any] = []
    stage = {name: SimpleNamespace(file=lambda name: work / name) for name in ("export", "quantize")}
    report = SimpleNamespace(progress=lambda *step: moves.append(step), say=lambda text: moves.append(text))
    metrics = bench.run(SimpleNamespace(recipe=recipe, work=work, inputs=stage, report=report))  # type: ignore[arg-type]
    return metrics, moves


def test_every_target_gets_the_files_that_it_runs_and_keeps_its_metric(asked: list[str], tmp_path: Path) -> None:
    metrics, moves = run(tmp_path, "bench.targets=[clock,counter,npu,compiler]", "bench.precisions=[int8]", quick=True)
    assert sorted(asked) == [
        "clock baseline.int8.onnx folded.int8.onnx", "clock baseline.int8.tflite folded.int8.tflite",
        "compiler baseline.int8.onnx folded.int8.onnx",
        "counter baseline.int8.onnx folded.int8.onnx", "counter baseline.int8.tflite folded.int8.tflite",
        "npu baseline.int8.tflite folded.int8.tflite",
    ]  # fmt: skip
    rows = [LatencyRow.model_validate(row) for row in metrics["latency"]]
    assert [row.target for row in rows] == ["clock"] * 2 + ["counter"] * 2 + ["npu", "compiler"]
    clock, _, counter, _, npu, compiler = rows
    assert (clock.metric, clock.ratio, clock.baseline_ms) == ("time", pytest.approx(0.5), pytest.approx(8.04))
    assert (counter.metric, counter.baseline_count, counter.folded_count) == ("instructions", 8e6, 4e6)
    assert counter.baseline_ms is None and counter.ratio == counter.ratio_low == 0.5
    assert (npu.metric, npu.ratio, npu.device) == ("cycles", 0.5, "a made device")
    assert (compiler.metric, compiler.ratio, compiler.failed, compiler.note) == ("none", None, False, "ran: cpu")
    measured = [Measurement.from_dict(row) for row in json.loads((tmp_path / "measurements.json").read_text())]
    assert len(measured) == 12 and all(row.quick for row in measured)
    steps = [move[0] for move in moves]
    assert steps == sorted(steps) and moves[-1][:2] == (6, 6)


def test_a_lost_device_is_a_failed_row_beside_the_others(asked: list[str], tmp_path: Path) -> None:
    metrics, moves = run(tmp_path, "bench.targets=[phone,counter]", "bench.precisions=[fp32]", "bench.formats=[onnx]")
    phone, counter = (LatencyRow.model_validate(row) for row in metrics["latency"])
    assert phone.failed and phone.baseline_ms is None and not phone.valid
    assert phone.note == "the phone went away; fix: check the cable" and counter.ratio == 0.5
    assert any("the phone went away" in move for move in moves if isinstance(move, str))


def test_a_target_without_files_is_said_and_is_no_failure(asked: list[str], tmp_path: Path) -> None:
    metrics, moves = run(tmp_path, "bench.targets=[npu,clock]", "bench.precisions=[fp32]")
    assert {row["target"] for row in metrics["latency"]} == {"clock"}
    assert "npu runs none of the files: nothing to measure" in moves


def test_files_that_no_target_runs_are_said_and_skipped(asked: list[str], tmp_path: Path) -> None:
    only = ("bench.targets=[clock]", "bench.precisions=[fp32]")
    metrics, moves = run(tmp_path, *only, "export.formats=[onnx,executorch]")
    assert asked == ["clock baseline.onnx folded.onnx"] and len(metrics["latency"]) == 1
    assert "no target runs .pte files: executorch is not measured" in moves
    metrics, moves = run(tmp_path, *only, "export.formats=[executorch]")
    assert metrics == {"latency": [], "summary": "nothing to measure"} and len(asked) == 1


def test_options_reach_their_target_and_strangers_are_refused(asked: list[str]) -> None:
    load = recipe_files.load
    recipe = load("quickstart", overrides=["bench.targets=[clock,npu]", "bench.options={npu: {speed: 7, threads: 3}}"])
    made: Any = bench.make_targets(recipe)
    assert made["npu"].options == {"speed": 7, "threads": 3} and made["clock"].options == {"speed": 1, "threads": 1}
    with pytest.raises(LayerfoldError, match=r"bench.options names 'npu'.*not in bench.targets"):
        load("quickstart", overrides=["bench.options={npu: {speed: 7}}"])
    with pytest.raises(OptionError, match="sped"):
        bench.make_targets(load("quickstart", overrides=["bench.targets=[npu]", "bench.options={npu: {sped: 7}}"]))


def test_a_recipe_can_name_every_target() -> None:
    names = ["host-litert", "host-ort", "emulated-arm64", "android:emulator-5554", "ssh:pi@board", "ethos-u", "qnn-htp"]
    recipe = recipe_files.load("quickstart", overrides=[f"bench.targets={json.dumps(names)}"])
    assert list(bench.make_targets(recipe)) == names
    with pytest.raises(TargetError, match="did you mean 'android'"):
        bench.make_targets(recipe_files.load("quickstart", overrides=["bench.targets=[androd]"]))
