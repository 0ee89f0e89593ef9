"""The host target against real runtimes, and against processes that misbehave."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

import targets
from targets import worker
from targets.errors import ModelFileError, OptionError, RuntimeMissingError, TimeoutExpiredError, WorkerError
from targets.host import HostTarget
from targets.worker_process import WORKER_FILE, run_worker

MakeModel = Callable[..., Path]
PLATFORMS = [("host-litert", "tflite", "cpu-xnnpack"), ("host-ort", "onnx", "cpu")]


def spawn(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(("name", "form", "accelerator"), PLATFORMS)
def test_measures_two_files_in_order(make_model: MakeModel, name: str, form: str, accelerator: str) -> None:
    files = [make_model(form, channels=4), make_model(form, channels=32, layers=3)]
    steps: list[tuple[int, int]] = []
    target = targets.get(name, threads=1, gate_wait_s=0)
    small, large = target.benchmark(
        files, warmup=1, runs=6, restarts=2, quick=True, on_progress=lambda *step: steps.append(step)
    )
    for row, path in ((small, files[0]), (large, files[1])):
        assert row.model == path.name
        assert row.model_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert [len(process) for process in row.samples_ms] == [6, 6]
        assert [len(process) for process in row.cpu_samples_ms] == [6, 6]
        assert row.actual_accelerator == accelerator and row.requested_accelerator == "cpu"
        assert row.precision == "fp32" and row.quick and row.threads == 1
        assert row.init_ms is not None and row.init_ms > 0
        assert row.peak_memory_mb is not None and row.peak_memory_mb > 0
        assert len(row.pinned_cores) == 1 and row.pinned_cores[0] in os.sched_getaffinity(0)
        assert row.instructions is None and row.cycles is None
    assert small.interleaved_with == large.interleaved_with != ""
    # Over a hundred times the multiplications: no noise turns that round.
    assert small.median_ms is not None and large.median_ms is not None and small.median_ms < large.median_ms
    assert steps[-1] == (24, 24) and steps == sorted(steps)


def test_litert_and_onnxruntime_get_the_same_input_on_every_machine() -> None:
    # The Mersenne Twister that Python seeds with 0 starts with the word 3626764237 = 0xD82C07CD, everywhere.
    found = worker.fixed_input([1, 2, 2, 1], np.int8, 0)
    assert found.dtype == np.int8 and found.ravel().tolist() == [0xCD - 256, 0x07, 0x2C, 0xD8 - 256]
    floats = worker.fixed_input([1, 64, 64, 3], np.float32, 1)
    assert floats.dtype == np.float32 and floats.min() == -1 and floats.max() == 1 and abs(floats.mean()) < 0.02


def test_exact_kernels_do_not_saturate(make_model: MakeModel, tmp_path: Path) -> None:
    """Against integer arithmetic in NumPy. On x86 without VNNI the default kernels cut sums of two products."""
    import onnx
    from onnx import numpy_helper

    scale = np.float32(1 / 127)  # the input's -1 to 1 then takes all 256 steps
    proto = onnx.load(str(make_model("onnx", kind="int8", layers=1)))
    for item in proto.graph.initializer:
        if item.name == "scale":
            item.CopyFrom(numpy_helper.from_array(scale, "scale"))
    onnx.save(proto, str(tmp_path / "m.onnx"))
    values = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    image = worker.fixed_input([1, 3, 16, 16], "float32", 0)[0]
    steps = np.clip(np.rint(image / scale), -128, 127).astype(np.int64)
    padded = np.pad(steps, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    sums = np.einsum("cyxuv,ocuv->oyx", windows, values["q0"].astype(np.int64))
    expected = np.clip(np.rint(sums * values["s0"].astype(np.float64)[:, None, None]), -128, 127)
    model = worker.OrtModel(str(tmp_path / "m.onnx"), 1, 0, exact=True)
    model.run()
    found = model.outputs()[0][0] / scale
    # The runtime multiplies in float32, so a value in the middle of two steps may go either way.
    assert np.abs(found - expected).max() < 1.01 and (np.abs(found - expected) < 0.01).mean() > 0.995


def test_a_single_file_has_no_partner(make_model: MakeModel) -> None:
    (row,) = HostTarget("litert", gate_wait_s=0).benchmark([make_model("tflite")], warmup=0, runs=2, restarts=1)
    assert row.interleaved_with == ""


def test_runs_alternate_so_that_drift_falls_on_all_alike() -> None:
    calls: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.run = lambda: calls.append(name)

    marks: list[tuple[int, int]] = []
    worker.time_interleaved([Recorder("a"), Recorder("b")], 1, 4, lambda *mark: marks.append(mark), lambda done: None)
    assert "".join(calls) == "ab" + "abbaabba"
    assert marks[:4] == [(worker.MARK_BEGIN, 0), (worker.MARK_END, 0), (worker.MARK_BEGIN, 1), (worker.MARK_END, 1)]


def test_a_busy_machine_is_said_in_every_row(make_model: MakeModel) -> None:
    core = max(os.sched_getaffinity(0))
    burner = subprocess.Popen(spawn(f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"))
    try:
        target = HostTarget("litert", cores=[core], gate_wait_s=0)
        rows = target.benchmark([make_model("tflite"), make_model("tflite", channels=4)], runs=2, restarts=1)
    finally:
        burner.kill()
        burner.wait()
    for row in rows:
        assert not row.valid and "busy with other work" in row.invalid_reason and row.failure == ""
        assert row.gates_before.busy_fraction is not None and row.gates_before.busy_fraction > 0.5


def test_wrong_files_and_counts_are_refused_before_anything_runs(make_model: MakeModel, tmp_path: Path) -> None:
    target = HostTarget("litert")
    with pytest.raises(ModelFileError, match="host-ort"):
        target.benchmark([make_model("tflite"), make_model("onnx")])
    with pytest.raises(OptionError, match="no model file"):
        target.benchmark([])
    with pytest.raises(OptionError, match="runs is 0"):
        target.benchmark([make_model("tflite")], runs=0)
    with pytest.raises(OptionError, match="threads is 0"):
        HostTarget("litert", threads=0)
    with pytest.raises(OptionError, match=r"cores \[4096\]"):
        HostTarget("litert", cores=[4096])


@pytest.mark.parametrize(("runtime", "form"), [("litert", "tflite"), ("ort", "onnx")])
def test_a_cut_file_is_a_typed_error_whatever_the_runtime_does(
    make_model: MakeModel, tmp_path: Path, runtime: str, form: str
) -> None:
    whole = make_model(form).read_bytes()
    cut = tmp_path / f"cut.{form}"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ModelFileError, WorkerError), match=r"cut|killed by"):
        HostTarget(runtime, gate_wait_s=0).benchmark([cut])  # type: ignore[arg-type]


def test_a_missing_runtime_names_the_extra(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "ai_edge_litert").mkdir()
    (tmp_path / "ai_edge_litert" / "__init__.py").write_text("raise ImportError('not here')\n")
    request = {"runtime": "litert", "models": ["x"], "threads": 1, "warmup": 0, "runs": 1}
    with pytest.raises(RuntimeMissingError, match=r"(?s)ai_edge_litert.*layerfold\[tflite\]"):
        run_worker([sys.executable, "-P", str(WORKER_FILE)], request, timeout_s=60, env={"PYTHONPATH": str(tmp_path)})


def test_a_worker_that_hangs_is_killed_with_its_children() -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        'print(\'{"event": "progress", "done": %d}\' % child.pid, flush=True)\n'
        "child.wait()\n"
    )
    seen: list[int] = []
    started = time.monotonic()
    with pytest.raises(TimeoutExpiredError, match="within 5 s"):
        run_worker(spawn(code), {"runtime": "litert"}, timeout_s=5, on_done=seen.append)
    assert time.monotonic() - started < 120  # its child sleeps for ten minutes
    deadline = time.monotonic() + 60
    while psutil.pid_exists(seen[0]) and psutil.Process(seen[0]).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker's child outlived it"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import sys; sys.stderr.write('out of luck'); sys.exit(7)", "status 7.*out of luck"),
        ("print('hello')", "broke its protocol"),
        ("print('[1, 2]')", "broke its protocol"),
        ('print(\'{"event": "result"\')', "broke its protocol"),
    ],
)
def test_a_worker_that_dies_or_babbles_is_a_typed_error(code: str, says: str) -> None:
    with pytest.raises(WorkerError, match=f"(?s){says}"):
        run_worker(spawn(code), {"runtime": "litert"}, timeout_s=30)


def test_a_worker_does_not_outlive_the_one_who_asked(make_model: MakeModel) -> None:
    request = {"runtime": "litert", "models": [str(make_model("tflite"))], "threads": 1, "warmup": 0, "runs": 10**8}
    process = subprocess.Popen(
        [sys.executable, "-P", str(WORKER_FILE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["event"] == "ready"
    process.stdin.close()
    assert process.wait(timeout=120) == 3  # it would run for days
    process.stdout.close()
    process.stderr.close()


def test_an_interrupt_leaves_no_process_behind(make_model: MakeModel) -> None:
    target = HostTarget("litert", gate_wait_s=0)
    main = threading.get_ident()
    timers: list[threading.Timer] = []

    def interrupt_soon(done: int, total: int) -> None:
        # The worker is at work for sure, and the interrupt comes while this process waits for it.
        if not timers:
            timers.append(threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)))
            timers[0].start()

    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(KeyboardInterrupt):
        target.benchmark([make_model("tflite")], runs=10**8, restarts=1, on_progress=interrupt_soon)
    timers[0].join()
    # A worker left alone would run for days; one that is ending may take a while on a loaded machine.
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    _, alive = psutil.wait_procs(left, timeout=60)
    assert alive == []
