"""Counting on the emulated ARM core: the arithmetic, the plugin against a known program, and real runtimes."""

import base64
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import targets
from targets import emulated
from targets.base import Measurement
from targets.emulated import EmulatedTarget, net_counts, plugin_option, read_counts, steps_apart
from targets.emulated_setup import EmulatedRoot, default_folder, find, setup
from targets.errors import ModelFileError, OptionError, SetupError, TargetError, WorkerError
from targets.host import HostTarget
from targets.model_file import inspect
from targets.stats import ratio_interval

MakeModel = Callable[..., Path]
LINE = "integer=10 branch=2 system=0 memory=3 memory_simd=4 fp=0 simd=5 simd_dot=1 other=0"


@pytest.fixture(scope="session")
def root() -> EmulatedRoot:
    """The root in the user's cache; built here (half a minute, 300 MB) where the packages can be had."""
    try:
        return find()
    except SetupError:
        pass
    try:
        return setup()
    except TargetError as error:
        pytest.skip(f"the emulated root cannot be built here: {error}")


def test_counts_are_of_the_cheapest_run_and_cleared_of_the_brackets() -> None:
    runs = [LINE.replace("simd=5", "simd=9"), LINE, LINE.replace("simd=5", "simd=8").replace("branch=2", "branch=1")]
    empty = [LINE.replace("integer=10", "integer=4"), LINE, LINE]
    text = "".join(f"model=0 {line}\n" for line in runs) + "".join(f"model=1 {line}\n" for line in empty)
    net = net_counts(*read_counts(text, models=1, runs=3))
    # 10 - 4 and 5 - 5: the second run and the first bracket, never one run's class beside another's.
    assert net["instructions_integer"] == 6 and net["instructions_simd"] == 0 and net["instructions_branch"] == 0
    assert "l1d_miss" not in net, "a run without the cache model has no cache figures"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"\[0, 0\] runs, expected 1"),
        (f"model=0 {LINE}\n", r"\[1, 0\]"),
        (f"model=0 {LINE}\nmodel=1 {LINE}\nmodel=1 {LINE}\n", r"\[1, 2\]"),
        (f"model=7 {LINE}\n", "cannot be read"),
        ("model=0 integer=x\n", "cannot be read"),
        ("integer=1\n", "cannot be read"),
    ],
)
def test_counts_that_are_not_whole_are_refused(text: str, says: str) -> None:
    with pytest.raises(WorkerError, match=says):
        read_counts(text, models=1, runs=1)


def test_more_than_one_thread_is_refused() -> None:
    with pytest.raises(OptionError, match="threads is 2"):
        targets.get("emulated-arm64", threads=2)


def test_a_root_that_is_not_built_says_how_to(tmp_path: Path, make_model: MakeModel) -> None:
    with pytest.raises(SetupError, match="layerfold targets setup emulated-arm64"):
        EmulatedTarget(folder=tmp_path).benchmark([make_model("tflite")])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(SetupError, match="damaged"):
        find(tmp_path)
    whole = {"plugin_source": "", "qemu": "", "versions": {}, "files": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({"revision": 0, **whole}))
    with pytest.raises(SetupError, match="is of another version"):
        find(tmp_path)


# mov x8, #27750; mov x0, #1; svc #0; then the body; then the same with x0 = 2; then exit(0).
PROGRAM = """
.global _start
_start:
  mov x1, #0
  mov x8, #27750
  mov x0, #1
  svc #0
  mov x2, #1000
loop:
  add x3, x3, #1
  fadd d0, d0, d1
  sub x2, x2, #1
  cbnz x2, loop
  adr x4, data
  ldr x5, [x4]
  ldr x5, [x4, #64]
  ldr x5, [x4]
  ldr q2, [x4, #128]
  add v3.4s, v3.4s, v2.4s
  .inst 0x4e829483
  mov x8, #27750
  mov x0, #2
  svc #0
  mov x8, #93
  mov x0, #0
  svc #0
.balign 64
data:
  .skip 256
"""


def test_the_plugin_counts_a_known_program_exactly(root: EmulatedRoot, tmp_path: Path) -> None:
    assembler, linker = (shutil.which(f"aarch64-linux-gnu-{tool}") for tool in ("as", "ld"))
    if assembler is None or linker is None:
        pytest.skip("no aarch64 assembler: install binutils-aarch64-linux-gnu to run this")
    (tmp_path / "p.s").write_text(PROGRAM)
    subprocess.run([assembler, "-march=armv8.2-a+dotprod", "-o", tmp_path / "p.o", tmp_path / "p.s"], check=True)
    subprocess.run([linker, "-o", tmp_path / "p", tmp_path / "p.o"], check=True)
    # Folders may have any name, those that mean something to QEMU too.
    odd = tmp_path / "a,b=c,,d"
    odd.mkdir()
    shutil.copyfile(root.plugin, odd / root.plugin.name)
    out = odd / "counts"
    plugin = plugin_option(replace(root, folder=odd), out, cache=True)
    subprocess.run([*root.command(), "-cpu", "cortex-a76", "-plugin", plugin, str(tmp_path / "p")], check=True)
    found = {name: int(value) for name, _, value in (pair.partition("=") for pair in out.read_text().split())}
    # By hand, from the opening mark's svc (not counted) to the closing one's (counted): 1 + 1000 * 2 + adr + 2 mov.
    assert found == {
        "model": 0, "integer": 1 + 2000 + 1 + 2, "branch": 1000, "system": 1, "memory": 3, "memory_simd": 1,
        "fp": 1000, "simd": 1, "simd_dot": 1, "other": 0,
        # Three lines are touched: two by the loads, one by the vector, which QEMU reads in two halves.
        "l1d_access": 5, "l1d_miss": 3, "l2_miss": 3,
    }  # fmt: skip


def test_counts_repeat_follow_the_work_and_give_the_hosts_bytes(root: EmulatedRoot, make_model: MakeModel) -> None:
    small, large = make_model("tflite", kind="int8"), make_model("tflite", kind="int8", layers=4)
    target = EmulatedTarget()
    (first, more), (again,) = target.benchmark([small, large]), target.benchmark([small])
    assert first.instructions is not None and again.instructions is not None and more.instructions is not None
    # A tiny model is mostly interpreter, whose hash tables and free lists move a little from process to process.
    assert abs(first.instructions - again.instructions) / first.instructions < 1e-3
    assert first.counters["instructions_simd_dot"] > 0, "int8 must take the dot-product kernels of the Cortex-A76"
    # Layers after the first cost as much as each other: 3 channels in, then 8 and 8 and 8.
    assert 2.0 < more.counters["instructions_simd_dot"] / first.counters["instructions_simd_dot"] < 4.0
    assert first.valid, first.invalid_reason
    (host,) = HostTarget("litert", gate_wait_s=0).benchmark([small], runs=1, restarts=1)
    assert first.output_sha256 == host.output_sha256
    assert first.samples_ms == () and first.median_ms is None and first.init_ms is None, "emulated time is no time"
    assert first.device.kind == "emulated" and first.device.arch == "aarch64"
    assert Measurement.from_dict(json.loads(json.dumps(first.as_dict()))) == first
    found = ratio_interval(first, more)
    assert found.metric == "instructions" and found.ratio > 1.2 and found.difference_shown


def test_onnx_runtime_runs_there_too_where_addresses_cannot_be_fixed(
    root: EmulatedRoot, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a container whose rules forbid personality().
    (tmp_path / "setarch").write_text("#!/bin/sh\necho 'failed to set personality' >&2\nexit 1\n")
    (tmp_path / "setarch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(emulated, "_fixed_addresses", cache(emulated._fixed_addresses.__wrapped__))
    (row,) = EmulatedTarget(cache=False).benchmark([make_model("onnx", kind="int8")])
    assert row.runtime == "ort" and row.instructions is not None and row.instructions > 1e4
    assert row.precision == "int8" and row.valid, row.invalid_reason
    assert row.counters["output_steps_off_the_host"] == 0 and "setarch -R is not permitted" in row.note
    assert "l1d_miss" not in row.counters


def output(*values: float, dtype: str = "float32") -> dict[str, str]:
    return {"dtype": dtype, "base64": base64.b64encode(np.array(values, dtype).tobytes()).decode()}


def test_outputs_are_compared_in_steps_of_their_quantisation() -> None:
    reference = output(0.5, 1.0, 1.5, -3.0)
    assert steps_apart(reference, output(0.5, 1.0, 1.5, -3.0)) == 0
    assert steps_apart(reference, output(0.5, 1.5, 1.5, -3.0)) == 1
    assert steps_apart(reference, output(0.5, 1.0, 1.5, -0.5)) == 5
    assert steps_apart(output(7, -128, dtype="int8"), output(9, -128, dtype="int8")) == 1
    assert steps_apart(output(7, 8, -128, dtype="int8"), output(9, 8, 127, dtype="int8")) == 255
    # Values that are not quantised differ by little, and yet by many of the least gaps between any two.
    assert steps_apart(output(0.1, 0.2, 0.9), output(0.1, 0.2, 0.90001)) == pytest.approx(1)
    assert steps_apart(output(0.1, 0.1 + 1e-6, 0.9), output(0.1, 0.1 + 1e-6, 0.90001)) > 5
    for other in (output(0.5), output(0.5, 1.0, 1.5, math.nan), output(1, 2, 3, 4, dtype="int8")):
        assert steps_apart(reference, other) == math.inf


@pytest.mark.parametrize(
    ("form", "steps", "valid"), [("tflite", 1, False), ("onnx", 1, True), ("onnx", 2, True), ("onnx", 3, False)]
)
def test_an_int8_output_that_differs_from_the_hosts_is_said_so(
    form: str, steps: int, valid: bool, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, away = output(0.0, 0.25, 1.0), output(0.0, 0.25, 1.0 + 0.25 * steps)
    monkeypatch.setattr("targets.emulated.run_worker", lambda *words, **options: {"models": [{"output": host}]})
    file = inspect(make_model(form, kind="int8"), expected=form, runtime="any")
    runtime = {"tflite": "litert", "onnx": "ort"}[form]
    found, reason = EmulatedTarget()._compare_with_host(file, runtime, away)
    assert found == steps and (reason == "") == valid
    assert valid or f"differs from the host's for the same input, by up to {steps} steps" in reason


def test_a_damaged_model_is_a_typed_error_there_too(root: EmulatedRoot, make_model: MakeModel, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tflite"
    whole = make_model("tflite").read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ModelFileError, WorkerError)):
        EmulatedTarget().benchmark([cut])


@pytest.mark.slow
def test_setup_resumes_and_repairs_what_is_damaged(root: EmulatedRoot, tmp_path: Path) -> None:
    """On a copy of the root, so that the one in the cache stays whole."""
    copy = tmp_path / "root"
    shutil.copytree(default_folder(), copy, symlinks=True)
    setup(folder=copy)  # the one in the cache may have a manifest that an earlier version wrote
    original = json.loads((copy / "manifest.json").read_text())
    steps: list[str] = []
    library = next((copy / "site").rglob("_interpreter*.so"), None) or next((copy / "site").rglob("*.so"))
    library.write_bytes(b"damaged")
    (copy / "count.so").unlink()
    built = setup(lambda share, what: steps.append(what), folder=copy)
    assert [words for words in steps if "wheels" in words or "plugin" in words] == steps[:2] and steps[2:] == ["done"]
    assert library.stat().st_size > 1000 and built.plugin.exists()
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["files"].keys() == original["files"].keys()
    assert {n: h for n, h in manifest["files"].items() if n != "count.so"} == {
        n: h for n, h in original["files"].items() if n != "count.so"
    }
    assert not [name for name in os.listdir(copy) if name.startswith("apt-") or name.endswith(".part")]
