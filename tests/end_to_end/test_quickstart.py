"""The main job on real images: the whole pipeline in its quick variant, through the command line."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import QUICK

import pipeline
from pipeline import plan, recipe_files
from pipeline.artifacts import sha256_of
from pipeline.results.collect import load_report

KINDS = {"tflite_fp32", "tflite_int8", "onnx_fp32", "onnx_int8"}


@pytest.fixture(scope="module")
def finished(quick_run: Path) -> Path:
    return quick_run


def test_the_report_keeps_its_contract(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["schema_version"] == 1
    assert report["recipe"] == "quickstart" and report["seed"] == 0 and report["variant"] == "quick"
    assert report["versions"]["layerfold"] == pipeline.__version__
    assert len(report["units_folded"]) >= 2
    assert 0 <= report["fold_max_abs_error"] < 1e-3 and report["fold_changed_predictions"] == 0
    for which in ("baseline", "folded"):
        model = report[which]
        assert set(model["accuracy"]) == {"torch", *KINDS} and set(model["files"]) == KINDS
        assert all(0.5 < value <= 1 for value in model["accuracy"].values())
        for entry in model["files"].values():
            path = finished / entry["path"]
            assert path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]
    for figure in ("macs", "depth"):
        assert report["folded"][figure] < report["baseline"][figure]
    rows = {(row["target"], row["precision"]): row for row in report["latency"]}
    assert set(rows) == {(t, p) for t in ("host-litert", "host-ort") for p in ("fp32", "int8")}
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows.values())


def test_every_file_predicts_as_its_torch_model(finished: Path) -> None:
    for row in load_report(finished / "report.json").verify:
        assert row.passed, row
        if row.kind.endswith("fp32"):
            assert row.agreement >= 0.999 and row.max_abs_logit_error < 1e-3


def test_a_file_that_fails_verification_ends_with_1_and_stays(finished: Path, layerfold) -> None:
    strict = ("--set", "verify.fp32_max_relative_error=1e-12", "--out", "runs/strict")
    done = layerfold("run", *QUICK, *strict, cwd=finished.parent.parent)
    assert done.returncode == 1, done.stderr
    assert "folded tflite_fp32: logits differ" in done.stderr and "kept for inspection" in done.stderr
    folder = finished.parent / "strict"
    assert '<tr class="failed">' in (folder / "report.html").read_text()
    assert "failed: logits differ" in (folder / "models" / "MODEL_CARD.md").read_text()
    for which in ("baseline", "folded"):
        assert sha256_of(folder / "models" / f"{which}.tflite") == sha256_of(finished / "models" / f"{which}.tflite")


def test_the_exported_files_tell_what_they_are(finished: Path) -> None:
    from pipeline.export import metadata

    for suffix in (".tflite", ".int8.tflite", ".onnx", ".int8.onnx"):
        content = metadata.read(finished / "models" / f"folded{suffix}")
        assert content["units_folded"] == ["blocks.1.1", "blocks.2.1", "blocks.2.2"]
        assert content["preprocess"]["input_px"] == 32
        # The run may have fallen back to MNIST, whose classes are called by their digits.
        assert content["labels"][9] == ("Ankle boot" if _facts(finished)["data"] == "fashion_mnist" else "9")
        assert content["licence"]
    assert "| `folded.int8.tflite` |" in (finished / "models" / "MODEL_CARD.md").read_text()


def test_running_it_again_runs_nothing(finished: Path, layerfold) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "stages").rglob("*") if path.is_file()}
    done = layerfold("run", *QUICK, cwd=finished.parent.parent)
    assert done.returncode == 0
    assert len(re.findall(r"\bcached\b", done.stderr)) == 9
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "stages").rglob("*") if path.is_file()}


def test_report_plan_and_inspect_read_the_finished_run(finished: Path, layerfold) -> None:
    cwd, run = finished.parent.parent, f"runs/{finished.name}"
    assert "MACs" in layerfold("report", run, cwd=cwd).stdout
    assert "## Cost" in layerfold("report", run, "--format", "markdown", cwd=cwd).stdout
    planned = layerfold("plan", *QUICK, cwd=cwd)
    assert planned.stdout.count("cached") == 9
    assert "CONV_2D" in layerfold("inspect", f"{run}/models/folded.tflite", cwd=cwd).stdout
    assert "prefold" in layerfold("inspect", run, cwd=cwd).stdout
    assert "blocks.2.1" in layerfold("inspect", f"{run}/models/baseline.pt", "--units", cwd=cwd).stdout


def test_fold_and_export_work_without_a_recipe(finished: Path, layerfold, tmp_path: Path) -> None:
    baseline = str(finished / "models" / "baseline.pt")
    done = layerfold("fold", baseline, "--units", "blocks.2.1", "--out", "folded.pt", cwd=tmp_path)
    assert done.returncode == 0 and "blocks.2.1: 3 layers became one" in done.stdout, done.stderr
    done = layerfold("export", "folded.pt", "--to", "onnx", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "folded.onnx").is_file(), done.stderr
    wrong = layerfold("fold", baseline, "--units", "blocks.7.7", "--out", "x.pt", cwd=tmp_path)
    assert wrong.returncode == 2 and "blocks.7.7" in wrong.stderr and not (tmp_path / "x.pt").exists()


def _start(cwd: Path, overrides: tuple[str, ...]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "layerfold", "run", *QUICK, "--out", "runs/killed"]
    return subprocess.Popen(
        [*command, *(word for override in overrides for word in ("--set", override))],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A background job of a shell ignores SIGINT and its children inherit that; a terminal's do not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _until(process: "subprocess.Popen[str]", stage: Path, marker: str) -> Iterator[None]:
    """Waits until the stage has begun, or for training until it has a checkpoint."""
    while process.poll() is None and not list(stage.parent.glob(f"{stage.name}.partial/{marker}")):
        time.sleep(0.05)
        yield


_CHEAP_BENCH = ("bench.targets=[host-ort]", "bench.runs=2")


@pytest.mark.parametrize(
    ("formats", "stages"),
    [
        # TFLite's converter is most of the time of such a run; the slow case has it.
        ("onnx", "baseline prefold postfold export"),
        pytest.param("tflite, onnx", "baseline prefold fold postfold export quantize verify", marks=pytest.mark.slow),
    ],
)
def test_kill_9_in_a_stage_then_the_same_command_gives_the_same_numbers(
    formats: str, stages: str, finished: Path, tmp_path: Path
) -> None:
    chance = random.Random(os.getpid())
    folder = tmp_path / "runs" / "killed" / "stages"
    overrides = (f"export.formats=[{formats}]", *_CHEAP_BENCH)
    recipe = recipe_files.load("quickstart", quick=True, overrides=[QUICK[-1], *overrides])
    planned = plan.build(recipe, _facts(finished) | {"host": ""})
    for name in stages.split():
        process = _start(tmp_path, overrides)
        marker = "checkpoints/*" if name in ("baseline", "prefold") else "."
        for _ in _until(process, folder / planned.stage(name).folder, marker):
            pass
        time.sleep(chance.uniform(0, 2))
        process.kill()
        process.communicate()
    process = _start(tmp_path, overrides)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    whole, resumed = (load_report(folder / "report.json") for folder in (finished, tmp_path / "runs" / "killed"))
    for field in ("units_folded", "alphas", "fold_max_abs_error"):
        assert getattr(whole, field) == getattr(resumed, field)
    assert {kind.split("_")[0] for kind in resumed.folded.accuracy} == {"torch", *formats.split(", ")}
    for before, after in ((whole.baseline, resumed.baseline), (whole.folded, resumed.folded)):
        assert after.accuracy == {kind: before.accuracy[kind] for kind in after.accuracy}


def test_ctrl_c_leaves_a_resumable_run_and_exits_with_130(tmp_path: Path) -> None:
    process = _start(tmp_path, _CHEAP_BENCH)
    folder = tmp_path / "runs" / "killed"
    while process.poll() is None and not list(folder.glob("stages/0-baseline-*.partial")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "resumes" in output and "Traceback" not in output
    assert list(folder.glob("stages/0-baseline-*.partial"))


def _facts(run: Path) -> dict[str, str]:
    facts: dict[str, str] = json.loads((run / "stages" / _folder(run, "baseline") / "manifest.json").read_text())[
        "facts"
    ]
    return facts


def _folder(run: Path, stage: str) -> str:
    name: str = json.loads((run / "manifest.json").read_text())["stages"][stage]
    return name
