"""`layerfold bench` and `layerfold targets`: rows, ratios, profiles, and what is left when one target fails."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import targets
from pipeline.cli.bench import command as bench
from pipeline.cli.targets import command as targets_verb
from targets import registry
from targets.base import Device, Measurement
from targets.errors import DeviceLostError, ModelFileError, OptionError, SetupError, UnknownTargetError

MakeModel = Callable[..., Path]
QUIET = ["--runs", "12", "--restarts", "1", "--warmup", "0", "--option", "gate_wait_s=0"]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(bench, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


class Made:
    """A target with figures made by hand; `factor` is what every further file costs of the first one's."""

    def __init__(self, name: str, metric: str, factor: float, lost: bool = False) -> None:
        self.name, self.metric, self.factor, self.lost = name, metric, factor, lost
        self.formats = ("tflite", "onnx")

    def device(self) -> Device:
        return Device(self.name, "third-party")

    def benchmark(self, paths: Sequence[Path], *, on_progress: Any = None, **counts: Any) -> list[Measurement]:
        if self.lost:
            raise DeviceLostError(f"{self.name} went away\nin two lines", hint="plug it in")
        rows = []
        for index, path in enumerate(paths):
            cost = 100.0 * (self.factor if index else 1.0)
            row: dict[str, Any] = {
                "target": self.name, "model": path.name, "model_sha256": "0" * 64, "precision": "fp32",
                "runtime": "made", "runtime_version": "1", "requested_accelerator": "cpu",
                "actual_accelerator": "cpu", "device": self.device(), "threads": 1, "pinned_cores": (), **counts,
            }  # fmt: skip
            if self.metric == "time":
                samples = [[cost * (1 + 0.01 * run) for run in range(8)] for _ in range(3)]
                rows.append(Measurement.from_samples(samples, **row))
            else:
                rows.append(Measurement(**row, **{self.metric: cost * 1e6}))
        return rows


@pytest.fixture
def made_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, tuple[str, float]] = {
        "clock": ("time", 0.5), "same": ("time", 1.0), "counter": ("instructions", 0.8), "npu": ("cycles", 1.5),
        "lost": ("time", 1.0),
    }  # fmt: skip

    def factory(name: str) -> Any:
        metric, factor = kinds[name]
        return lambda threads=1, slowness=1: Made(name, metric, factor * slowness, name == "lost")

    monkeypatch.setattr(registry, "_factory", factory)


def test_two_real_files_on_this_machine(make_model: MakeModel) -> None:
    result = run(make_model("onnx", channels=4), "--baseline", make_model("onnx", channels=32, layers=3), *QUIET)
    assert result.exit_code == 0
    assert "host-ort" in result.stdout and "fp32-4x2.onnx" in result.stdout and " ms " in result.stdout
    # 3 layers of 32 channels against 2 of 4: well under half, whatever the noise.
    found = re.search(r"fp32-4x2.onnx / fp32-32x3.onnx = 0\.(\d+) in (?:processor )?time \(95% ", result.stdout)
    assert found and int(found[1][0]) < 5


@pytest.mark.usefixtures("made_targets")
def test_each_ratio_names_what_it_compares(make_model: MakeModel) -> None:
    names = [word for name in ("clock", "same", "counter", "npu") for word in ("--target", name)]
    result = run(make_model("onnx"), "--baseline", make_model("onnx", channels=4), *names)
    assert result.exit_code == 0
    text = result.stdout
    assert re.search(r"clock: .* = 0\.500 in time \(95% 0\.4\d\d to 0\.5\d\d\): 50\.0% less time\n", text)
    assert re.search(r"1\.000 in time \(95% [\d.]+ to [\d.]+\): no difference shown", text)
    assert "80.000 M instructions" in text and "0.800 in instructions (counted, not timed): 20.0% fewer" in text
    assert "150.000 M cycles" in text and "1.500 in cycles (counted, not timed): 50.0% more cycles" in text


@pytest.mark.usefixtures("made_targets")
def test_a_lost_device_costs_the_others_nothing_and_the_exit_code_says_so(make_model: MakeModel) -> None:
    arguments = [make_model("onnx"), "--baseline", make_model("onnx", channels=4), "--target", "lost", "--target"]
    result = run(*arguments, "counter", "--quick", "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    rows = [Measurement.from_dict(row) for row in content["rows"]]
    assert [(row.target, row.failure) for row in rows] == [
        ("lost", "DeviceLostError"), ("lost", "DeviceLostError"), ("counter", ""), ("counter", ""),
    ]  # fmt: skip
    assert all(row.quick and row.restarts == 1 for row in rows)
    assert rows[0].invalid_reason == "lost went away in two lines; fix: plug it in"
    (ratio,) = content["ratios"]
    assert (ratio["target"], ratio["metric"], ratio["ratio"]) == ("counter", "instructions", 0.8)
    shown = re.sub(r"[│\s]+", " ", run(*arguments, "counter").stdout)
    assert "DeviceLostError: lost went away" in shown and "20.0% fewer instructions" in shown


def test_operators_stand_side_by_side(make_model: MakeModel) -> None:
    files = [make_model("onnx", channels=32, layers=3), "--baseline", make_model("onnx", channels=32, layers=5)]
    result = run(*files, *QUIET, "--profile", "--json")
    profiles = json.loads(result.stdout)["profiles"]
    convolutions = [[item for item in found["operators"] if "Conv" in item["kind"]] for found in profiles]
    assert [len(found) for found in convolutions] == [5, 3]
    shown = run(*files, *QUIET, "--profile").stdout
    line = next(line for line in shown.splitlines() if re.match(r"│ \S*Conv\S* ", line))
    assert [cell.strip() for cell in line.split("│")[2:5:2]] == ["5", "3"]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["missing.onnx"], ModelFileError, "missing.onnx"),
        (["MODEL", "--target", "host-litert"], ModelFileError, "host-litert runs .tflite files"),
        (["MODEL", "--target", "host-otr"], UnknownTargetError, "host-otr"),
        (["MODEL", "--runs", "0"], OptionError, "runs is 0"),
        (["MODEL", "--option", "cors=1"], OptionError, "cors"),
        (["MODEL", "--option", "cores"], OptionError, "NAME=VALUE"),
        (["MODEL", "--option", "cores=[1"], OptionError, "no YAML"),
        (["MODEL", "--option", "android.cores=[1]"], OptionError, "'android'"),
        (["MODEL", "--option", "host-ort.cores=[4096]"], OptionError, "4096"),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(
    arguments: list[str], error: type[targets.TargetError], says: str, make_model: MakeModel
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        run(*(make_model("onnx") if word == "MODEL" else word for word in arguments))
    assert error.exit_code == 2


@pytest.mark.usefixtures("made_targets")
def test_an_option_may_be_meant_for_one_target_only(make_model: MakeModel) -> None:
    names = ["--target", "npu", "--target", "counter", "--option", "counter.slowness=2", "--json"]
    result = run(make_model("onnx"), "--baseline", make_model("onnx", channels=4), *names)
    assert [round(found["ratio"], 9) for found in json.loads(result.stdout)["ratios"]] == [1.5, 1.6]


def test_targets_are_listed_with_what_they_give_and_take() -> None:
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(targets_verb, ["list", "--json"]).stdout)}
    assert list(rows) == targets.names()
    assert "instructions" in rows["emulated-arm64"]["gives"] and "cycles" in rows["ethos-u"]["gives"]
    assert {"runner", "accelerator", "cores"} <= set(rows["android"]["options"].split(", "))
    assert all("another package" not in rows[name]["gives"] for name in rows)


def test_setup_says_how_far_it_is_and_what_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from targets import emulated_setup

    def build(progress: Callable[[float, str], None], *, folder: Path) -> emulated_setup.EmulatedRoot:
        progress(0.25, "fetch")
        progress(1.0, "done")
        return emulated_setup.EmulatedRoot(folder, {"onnxruntime": "1.2"}, "7.2")

    monkeypatch.setattr(emulated_setup, "setup", build)
    result = CliRunner().invoke(targets_verb, ["setup", "emulated-arm64", "--folder", str(tmp_path)])
    assert result.exit_code == 0
    assert re.search(r" 25% after \d+ s, about \d+ s left: fetch", result.stderr)
    assert f"ready in {tmp_path}: onnxruntime 1.2, QEMU 7.2" in result.stdout
    wrong = CliRunner().invoke(targets_verb, ["setup", "emulated-riscv"])
    assert wrong.exit_code == 2 and "emulated-arm64" in wrong.stderr
    assert "setup emulated-arm64" in CliRunner().invoke(targets_verb, ["setup", "--help"]).stdout


def test_a_folder_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    from targets.emulated_setup import setup

    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot build in"):
        setup(folder=tmp_path / "file" / "root")
