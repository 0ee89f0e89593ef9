"""The android target against Debian's real adbd, alive and in every kind of trouble."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import targets
from targets.adb import STORAGE, AdbRemote, attached, choose
from targets.android import AndroidTarget
from targets.bench import collect
from targets.errors import (
    DeviceAmbiguousError,
    DeviceBusyError,
    DeviceFullError,
    DeviceLostError,
    DeviceNotFoundError,
    RuntimeMissingError,
    TimeoutExpiredError,
    TransferError,
)
from targets.locks import device_lock
from targets.remote import workspace

MakeModel = Callable[..., Path]
TOOL = Path(__file__).parents[2] / "tools/adb_device.py"
ABSENT_EXIT_CODE = 77
FAST = {"runner": "python", "python": sys.executable, "gate_wait_s": 0, "cooldown_s": 0, "timeout_s": 60}


@dataclass
class Lab:
    """Two devices, and the means to trouble them."""

    state: Path
    serials: list[str]
    troubled: dict[str, str] = field(default_factory=dict)

    def do(self, verb: str, serial: str) -> None:
        self.troubled[serial] = verb
        subprocess.run([sys.executable, str(TOOL), "--state", str(self.state), verb, serial], check=True, timeout=90)

    def files(self, serial: str) -> list[str]:
        return AdbRemote(serial).shell(["ls", STORAGE], timeout_s=20).stdout.split()


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    state = tmp_path_factory.mktemp("adb")
    base = [sys.executable, str(TOOL), "--state", str(state)]
    done = subprocess.run([*base, "up", "--count", "2", "--disk-mb", "64"], capture_output=True, text=True)
    if done.returncode == ABSENT_EXIT_CODE:
        pytest.skip(f"no adb device can be raised here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADB_SERVER_SOCKET", report["adb_server_socket"])
        patch.setenv("LAYERFOLD_LOCK_FOLDER", str(state / "locks"))
        yield Lab(state, report["serials"])
    subprocess.run([*base, "down"], check=True, timeout=60)
    assert not state.exists()


@pytest.fixture
def lab(raised: Lab) -> Iterator[Lab]:
    """Both devices well before each test, and clean after it."""
    yield raised
    for serial in raised.serials:
        cure = {"kill": "start", "stop": "cont"}.get(raised.troubled.pop(serial, ""))
        if cure:
            raised.do(cure, serial)
        AdbRemote(serial).shell(["sh", "-c", f"rm -rf {STORAGE}/*"], timeout_s=20)


def test_the_device_has_no_way_out_and_none_in(lab: Lab) -> None:
    port = int(lab.serials[0].rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    tries = (
        "import socket\nfor family in (socket.AF_VSOCK, socket.AF_PACKET):\n"
        " try: socket.socket(family, 1)\n except OSError: print('no')"
    )
    assert AdbRemote(lab.serials[0]).shell([sys.executable, "-c", tries], timeout_s=20).stdout.split() == ["no", "no"]
    links = AdbRemote(lab.serials[0]).shell(["cat", "/proc/net/dev"], timeout_s=20).stdout
    assert [line.split(":")[0].strip() for line in links.splitlines()[2:] if ":" in line] == ["lo"]
    assert AdbRemote(lab.serials[0]).shell(["touch", "/usr/mark"], timeout_s=20).code != 0


def test_commands_keep_their_words_their_status_and_their_streams(lab: Lab) -> None:
    remote = AdbRemote(lab.serials[0])
    words = ["a b", "$(id)", "`id`", ";", "'", '"', "*", "\\", "é"]
    reply = remote.shell(["printf", "%s\n", *words], timeout_s=20)
    assert reply.stdout.splitlines() == words and reply.code == 0
    reply = remote.shell(["sh", "-c", "echo out; echo err >&2; exit 7"], timeout_s=20)
    assert (reply.stdout, reply.stderr, reply.code) == ("out\n", "err\n", 7)
    assert remote.shell(["cat"], timeout_s=20).stdout == "", "a command must not wait for input"


def test_files_arrive_whole_in_both_directions(lab: Lab, tmp_path: Path) -> None:
    remote = AdbRemote(lab.serials[0])
    sent = tmp_path / "data.bin"
    sent.write_bytes(os.urandom(3 << 20))
    with workspace(remote) as space:
        path = space.put(sent, "x.bin")
        remote.pull(path, tmp_path / "back.bin", timeout_s=60)
    assert (tmp_path / "back.bin").read_bytes() == sent.read_bytes()
    assert lab.files(lab.serials[0]) == []


def test_a_benchmark_gives_rows_and_leaves_nothing(lab: Lab, make_model: MakeModel, tmp_path: Path) -> None:
    odd = tmp_path / "a b;$(touch pwned)'.tflite"
    odd.write_bytes(make_model("tflite", channels=4).read_bytes())
    target = targets.get(f"android:{lab.serials[0]}", cores=[0], **FAST)
    steps: list[tuple[int, int]] = []
    small, large = target.benchmark(
        [odd, make_model("tflite", channels=32, layers=3)], warmup=1, runs=4, restarts=2,
        on_progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert small.model == odd.name and small.device.id == lab.serials[0] and small.device.kind == "adb"
    assert [len(process) for process in small.samples_ms] == [4, 4]
    assert small.median_ms is not None and large.median_ms is not None and small.median_ms < large.median_ms
    assert (small.actual_accelerator, small.pinned_cores, small.runtime) == ("cpu-xnnpack", (0,), "litert")
    assert small.interleaved_with == large.interleaved_with != ""
    assert small.device.arch == os.uname().machine and small.device.cores >= 1 and small.device.memory_mb > 0
    assert small.gates_before.load1 is not None and steps[-1] == (16, 16)
    assert lab.files(lab.serials[0]) == []
    # The same bytes come out behind adb as on the host.
    (host,) = targets.get("host-litert", gate_wait_s=0).benchmark([odd], runs=1, restarts=1)
    assert host.output_sha256 == small.output_sha256


def test_onnx_runs_too(lab: Lab, make_model: MakeModel) -> None:
    (row,) = AndroidTarget(device=lab.serials[1], **FAST).benchmark([make_model("onnx")], runs=2, restarts=1)  # type: ignore[arg-type]
    assert row.runtime == "ort" and row.median_ms is not None


def test_the_users_tool_is_sent_run_in_turn_and_read(lab: Lab, make_model: MakeModel, tmp_path: Path) -> None:
    # A stand-in for the binary that only the user has: it prints what benchmark_model prints, at a known pace.
    tool = tmp_path / "tool"
    tool.write_text(
        "#!/bin/sh\n"
        'for a in "$@"; do case "$a" in --graph=*/0.tflite) t=1000;; --graph=*) t=800;; esac; done\n'
        'echo "count=9 first=$t curr=$t min=$t max=$((t+9)) avg=$((t+4)) std=1 p5=$t median=$((t+2)) p95=$((t+8))"\n'
        'echo "INFO: Inference timings in us: Init: 50, First inference: $t, '
        'Warmup (avg): $t, Inference (avg): $((t+4))" >&2\n'
    )
    files = [make_model("tflite"), make_model("tflite", channels=4)]
    options = {**FAST, "runner": "tool", "binary": tool, "cores": [0]}
    first, second = AndroidTarget(device=lab.serials[0], **options).benchmark(files, restarts=3)  # type: ignore[arg-type]
    assert first.samples_ms == ((1.002,), (1.002,), (1.002,)) and second.median_ms == 0.802
    assert first.runtime == "benchmark_model" and first.init_ms == 0.05
    gpu = AndroidTarget(device=lab.serials[0], **{**options, "accelerator": "gpu"})  # type: ignore[arg-type]
    row = gpu.benchmark(files, restarts=1)[0]
    assert not row.valid and "asked for gpu, but cpu" in row.invalid_reason
    assert lab.files(lab.serials[0]) == []


def test_a_tool_that_hangs_is_ended_on_the_device_too(lab: Lab, make_model: MakeModel, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    # A program, not a script: it ignores what it is given to do, and hangs up on nobody.
    source = "#include <signal.h>\n#include <unistd.h>\nint main(void) { signal(SIGHUP, SIG_IGN); sleep(600); }"
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc to run this")
    subprocess.run([compiler, "-x", "c", "-o", tool, "-"], input=source, text=True, check=True)
    options = {**FAST, "runner": "tool", "binary": tool, "timeout_s": 3}
    with pytest.raises(TimeoutExpiredError, match="over 3 s"):
        AndroidTarget(device=lab.serials[0], **options).benchmark([make_model("tflite")], restarts=1)  # type: ignore[arg-type]
    listing = AdbRemote(lab.serials[0]).shell(["sh", "-c", "ls -l /proc/[0-9]*/exe"], timeout_s=20).stdout
    assert "/exe -> " in listing and "benchmark_model" not in listing
    assert lab.files(lab.serials[0]) == []


def test_adbd_is_not_started_outside_namespaces(tmp_path: Path) -> None:
    outside = os.readlink("/proc/self/ns/net")
    mark = tmp_path / "started"
    settings = {
        "serials": ["localhost:7001"],
        "network_outside": outside,
        "adbd": ["/bin/touch", str(mark)],
        "qemu": "",
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "views").mkdir()
    (tmp_path / "views/7001").symlink_to("/")
    for verb in (["_adbd", "localhost:7001"], ["_hold"]):
        done = subprocess.run(
            [sys.executable, str(TOOL), "--state", str(tmp_path), *verb], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1 and "not started outside a network namespace" in done.stderr
    # The harmless program that stands for adbd here would have left its mark at once.
    time.sleep(0.5)
    assert not mark.exists()


def test_the_tool_touches_no_folder_but_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for verb in ("down", "up"):
        done = subprocess.run(
            [sys.executable, str(TOOL), "--state", str(tmp_path), verb], capture_output=True, text=True, timeout=120
        )
        if verb == "down" or done.returncode != ABSENT_EXIT_CODE:
            assert done.returncode == 1 and "not a folder of this tool" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    gone = tmp_path / "never"
    subprocess.run([sys.executable, str(TOOL), "--state", str(gone), "down"], check=True, timeout=120)


def test_a_missing_tool_or_interpreter_is_said_so(lab: Lab, make_model: MakeModel) -> None:
    with pytest.raises(RuntimeMissingError, match="LAYERFOLD_BENCHMARK_MODEL"):
        AndroidTarget(device=lab.serials[0]).benchmark([make_model("tflite")])
    with pytest.raises(RuntimeMissingError, match="option python"):
        AndroidTarget(device=lab.serials[0], **{**FAST, "python": "python9"}).benchmark([make_model("tflite")])  # type: ignore[arg-type]
    assert lab.files(lab.serials[0]) == []


def test_devices_are_told_apart(lab: Lab) -> None:
    assert [item.serial for item in attached()] == lab.serials
    assert {device.id for device in targets.devices()} >= set(lab.serials)
    with pytest.raises(DeviceAmbiguousError, match=f"{lab.serials[0]}, {lab.serials[1]}"):
        choose(None)
    with pytest.raises(DeviceNotFoundError, match=f"'no such serial'; attached: {lab.serials[0]}"):
        choose("no such serial")


def test_adbd_killed_in_the_middle_of_a_command(lab: Lab) -> None:
    threading.Timer(1.0, lab.do, ("kill", lab.serials[0])).start()
    started = time.monotonic()
    with pytest.raises(DeviceLostError, match="middle of a command"):
        AdbRemote(lab.serials[0]).shell(["sh", "-c", "echo begun; sleep 300; echo done"], timeout_s=360)
    assert time.monotonic() - started < 200  # long before the command, or its limit, would have ended
    with pytest.raises((DeviceNotFoundError, DeviceLostError, targets.TargetError)):
        choose(lab.serials[0])


def test_a_stopped_adbd_hangs_nothing_longer_than_its_limit(lab: Lab, make_model: MakeModel) -> None:
    lab.do("stop", lab.serials[0])
    started = time.monotonic()
    with pytest.raises(TimeoutExpiredError, match="over 2 s"):
        AdbRemote(lab.serials[0]).shell(["true"], timeout_s=2)
    assert time.monotonic() - started < 60  # it stays stopped until the end of the test


def test_a_device_stopped_during_the_run_and_swept_by_the_next(lab: Lab, make_model: MakeModel) -> None:
    serial = lab.serials[0]

    def stop_once(done: int, total: int) -> None:
        if not stopped:
            stopped.append(done)
            lab.do("stop", serial)

    stopped: list[int] = []
    target = AndroidTarget(device=serial, **{**FAST, "timeout_s": 12})  # type: ignore[arg-type]
    with pytest.raises(DeviceLostError, match="stopped answering") as caught:
        target.benchmark([make_model("tflite")], runs=10**6, restarts=1, on_progress=stop_once)
    assert any("is left on" in note for note in caught.value.__notes__)
    lab.do("cont", serial)
    # The device may yet carry out the removal that was waiting in its queue; the next run sees to it either way.
    (row,) = AndroidTarget(device=serial, **FAST).benchmark([make_model("tflite")], runs=2, restarts=1)  # type: ignore[arg-type]
    assert row.failure == "" and lab.files(serial) == []


def test_a_device_that_vanishes_costs_the_other_nothing(lab: Lab, make_model: MakeModel) -> None:
    """It goes between warm-up and run: the first sign of progress is the sign to pull the plug."""
    gone, stays = lab.serials
    pulled = threading.Event()

    def pull(done: int, total: int) -> None:
        if not pulled.is_set():
            pulled.set()
            lab.do("kill", gone)

    rows = collect(
        {f"android:{serial}": AndroidTarget(device=serial, **FAST) for serial in lab.serials},  # type: ignore[arg-type]
        [make_model("tflite"), make_model("tflite", channels=4)], warmup=1, runs=3000, restarts=2,
        on_progress={f"android:{gone}": pull},
    )  # fmt: skip
    assert [row.failure for row in rows[f"android:{gone}"]] == ["DeviceLostError"] * 2
    assert all(row.median_ms is None and gone in row.invalid_reason for row in rows[f"android:{gone}"])
    assert [row.failure for row in rows[f"android:{stays}"]] == ["", ""]
    assert all(row.median_ms is not None for row in rows[f"android:{stays}"])
    assert lab.files(stays) == []


def test_a_full_device(lab: Lab, tmp_path: Path) -> None:
    remote = AdbRemote(lab.serials[0])
    big = tmp_path / "big.bin"
    big.write_bytes(os.urandom(80 << 20))
    with pytest.raises(DeviceFullError, match="has no room"), workspace(remote) as space:
        space.put(big, "big.bin")
    assert lab.files(lab.serials[0]) == []


def test_a_push_that_is_cut_by_the_devices_end(lab: Lab, tmp_path: Path) -> None:
    serial = lab.serials[0]
    big = tmp_path / "big.bin"
    big.write_bytes(os.urandom(40 << 20))

    with pytest.raises(DeviceLostError) as caught, workspace(AdbRemote(serial)) as space:
        lab.do("stop", serial)
        cutter = threading.Timer(1.0, lab.do, ("kill", serial))
        cutter.start()
        space.put(big, "big.bin")
    cutter.join()
    assert "big.bin" in str(caught.value)


class Careless(AdbRemote):
    """Loses the last byte of the first `losses` files, as a bad cable might."""

    def __init__(self, serial: str, losses: int) -> None:
        super().__init__(serial)
        self.losses = losses

    def push(self, local: Path, remote: str, *, timeout_s: float) -> None:
        super().push(local, remote, timeout_s=timeout_s)
        if self.losses:
            self.losses -= 1
            self.shell(["truncate", "-s", "-1", remote], timeout_s=20)


def test_a_file_that_arrives_changed_is_sent_again_once(lab: Lab, make_model: MakeModel) -> None:
    with workspace(Careless(lab.serials[0], 1)) as space:
        space.put(make_model("tflite"), "m.tflite")
    with pytest.raises(TransferError, match="SHA-256"), workspace(Careless(lab.serials[0], 2)) as space:
        space.put(make_model("tflite"), "m.tflite")
    assert lab.files(lab.serials[0]) == []


def test_two_runs_never_share_a_device(lab: Lab, make_model: MakeModel) -> None:
    code = (
        "import sys, time\nfrom targets.locks import device_lock\n"
        f"with device_lock({lab.serials[0]!r}):\n print('held', flush=True)\n time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    target = AndroidTarget(device=lab.serials[0], **FAST)  # type: ignore[arg-type]
    with pytest.raises(DeviceBusyError, match="another run holds"):
        target.benchmark([make_model("tflite")])
    other.kill()
    other.wait()
    other.stdout.close()
    with device_lock(lab.serials[0]):
        pass


def test_a_run_that_is_killed_leaves_no_process_and_the_next_sweeps_its_files(lab: Lab, make_model: MakeModel) -> None:
    serial = lab.serials[0]
    code = (
        "import sys\nfrom targets.android import AndroidTarget\n"
        f"AndroidTarget(device={serial!r}, **{FAST!r}).benchmark([sys.argv[1]], runs=10**8, restarts=1,"
        " on_progress=lambda *step: print('running', flush=True))\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(make_model("tflite"))], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "running\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    # adb goes with its parent's pipe, adbd closes the worker's input, and the worker ends with it.
    listing = ["sh", "-c", "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done | grep -c '[w]orker.py'"]
    deadline = time.monotonic() + 20
    while AdbRemote(serial).shell(listing, timeout_s=20).stdout.strip() != "0":
        assert time.monotonic() < deadline, "a worker is left on the device"
        time.sleep(0.2)
    assert len(lab.files(serial)) == 1
    AndroidTarget(device=serial, **FAST).benchmark([make_model("tflite")], runs=1, restarts=1)  # type: ignore[arg-type]
    assert lab.files(serial) == []


def test_a_bench_that_is_told_to_end_cleans_the_device(lab: Lab, make_model: MakeModel) -> None:
    serial = lab.serials[0]
    options = [f"{name}={value}" for name, value in FAST.items()]
    command = [
        sys.executable, "-c", "from pipeline.cli import main; main()", "bench", str(make_model("tflite")),
        "--target", f"android:{serial}", "--runs", str(10**8), *(w for o in options for w in ("--option", o)),
    ]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while "worker.py" not in "".join(AdbRemote(serial).shell(["sh", "-c", f"ls {STORAGE}/*"], timeout_s=20).stdout):
        assert time.monotonic() < deadline and run.poll() is None, "the benchmark did not begin"
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    _, says = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in says
    assert lab.files(serial) == []


@pytest.mark.slow
def test_a_whole_emulated_arm_device_goes_the_same_way(
    make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """arm64 adbd, shell, Python and the real aarch64 wheels: everything of a phone but the silicon."""
    state = tmp_path_factory.mktemp("arm")
    base = [sys.executable, str(TOOL), "--state", str(state)]
    done = subprocess.run([*base, "up", "--arch", "arm64"], capture_output=True, text=True)
    if done.returncode == ABSENT_EXIT_CODE:
        pytest.skip(f"no emulated device can be raised here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ADB_SERVER_SOCKET", json.loads(done.stdout)["adb_server_socket"])
            patch.setenv("LAYERFOLD_LOCK_FOLDER", str(state / "locks"))
            files = [make_model("tflite", kind="int8"), make_model("tflite", kind="int8", channels=4)]
            target = AndroidTarget(runner="python", gate_wait_s=0, cooldown_s=0, timeout_s=300)
            rows = target.benchmark(files, warmup=0, runs=2, restarts=1)
            left = AdbRemote(choose(None)).shell(["ls", STORAGE], timeout_s=60).stdout
    finally:
        subprocess.run([*base, "down"], check=True, timeout=60)
    assert [row.device.kind for row in rows] == ["adb-emulated"] * 2
    assert all(row.device.arch == "aarch64" and not row.valid and "emulated" in row.invalid_reason for row in rows)
    assert left == ""
    hosts = targets.get("host-litert", gate_wait_s=0).benchmark(files, runs=1, restarts=1)
    assert [row.output_sha256 for row in rows] == [row.output_sha256 for row in hosts]
