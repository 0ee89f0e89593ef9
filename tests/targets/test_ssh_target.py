"""The ssh target against a real sshd of this user's own, on loopback, with keys of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import targets
from targets.errors import DeviceLostError, DeviceNotFoundError, OptionError, RuntimeMissingError, TimeoutExpiredError
from targets.ssh import SshRemote, SshTarget

MakeModel = Callable[..., Path]
FAST = {"python": sys.executable, "gate_wait_s": 0, "cooldown_s": 0, "timeout_s": 60}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Board:
    """An sshd on loopback; `storage` is the folder that files go to."""

    def __init__(self, folder: Path, sshd: str) -> None:
        self.port = free_port()
        self.storage = folder / "storage"
        self.storage.mkdir()
        self.config = folder / "ssh_config"
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        (folder / "authorized").write_text((folder / "user.pub").read_text())
        known = (folder / "host.pub").read_text()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {known}")
        self.config.write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {self.port}\n  IdentityFile {folder / 'user'}\n"
            f"  UserKnownHostsFile {folder / 'known_hosts'}\n  IdentitiesOnly yes\n"
        )
        self.sshd_config = folder / "sshd_config"
        self.sshd_config.write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {folder / 'host'}\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder / 'authorized'}\nStrictModes no\nPasswordAuthentication no\n"
            "Subsystem sftp internal-sftp\n"
        )
        self.sshd = sshd
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> list[str]:
        return ["-F", str(self.config)]

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self.sshd, "-D", "-e", "-f", str(self.sshd_config)], stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 20
        while not SshRemote("board", options=self.options).is_alive():
            assert time.monotonic() < deadline and self.process.poll() is None, "sshd did not come up"
            time.sleep(0.2)

    def stop(self) -> None:
        assert self.process is not None
        for child in subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True
        ).stdout.split():
            os.kill(int(child), signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("no sshd on this machine: install openssh-server to run these")
    if os.getuid() == 0:
        # As root, sshd insists on its privilege separation folder.
        Path("/run/sshd").mkdir(exist_ok=True)
    folder = tmp_path_factory.mktemp("ssh")
    made = Board(folder, sshd)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERFOLD_LOCK_FOLDER", str(folder / "locks"))
        made.start()
        yield made
        made.stop()


def target_of(board: Board, **more: object) -> SshTarget:
    options = {**FAST, "storage": str(board.storage), "options": board.options, **more}
    made = targets.get("ssh:board", **options)
    assert isinstance(made, SshTarget)
    return made


def test_a_benchmark_over_ssh(board: Board, make_model: MakeModel) -> None:
    files = [make_model("tflite", channels=4), make_model("tflite", channels=32, layers=3)]
    small, large = target_of(board, cores=[0]).benchmark(files, warmup=1, runs=4, restarts=2)
    assert small.device.kind == "ssh" and small.device.id == "board" and small.device.arch == os.uname().machine
    assert small.median_ms is not None and large.median_ms is not None and small.median_ms < large.median_ms
    assert small.pinned_cores == (0,) and small.interleaved_with == large.interleaved_with != ""
    assert list(board.storage.iterdir()) == []


def test_words_status_and_files_survive_the_way(board: Board, tmp_path: Path) -> None:
    remote = SshRemote("board", options=board.options, storage=str(board.storage))
    words = ["a b", "$(id)", ";", "'", '"', "*"]
    assert remote.shell(["printf", "%s\n", *words], timeout_s=20).stdout.splitlines() == words
    assert remote.shell(["sh", "-c", "exit 9"], timeout_s=20).code == 9
    sent = tmp_path / "sent"
    sent.write_bytes(os.urandom(100_000))
    remote.push(sent, f"{board.storage}/there", timeout_s=20)
    remote.pull(f"{board.storage}/there", tmp_path / "back", timeout_s=20)
    assert (tmp_path / "back").read_bytes() == sent.read_bytes()
    (board.storage / "there").unlink()


def test_a_command_that_hangs_is_ended(board: Board) -> None:
    with pytest.raises(TimeoutExpiredError, match="over 2 s"):
        SshRemote("board", options=board.options).shell(["sleep", "60"], timeout_s=2)


def test_a_board_that_dies_during_the_run(board: Board, make_model: MakeModel) -> None:
    died: list[int] = []

    def pull_the_plug(done: int, total: int) -> None:
        if not died:
            died.append(done)
            board.stop()

    with pytest.raises(DeviceLostError, match="went away"):
        target_of(board).benchmark([make_model("tflite")], runs=10**6, restarts=1, on_progress=pull_the_plug)
    board.start()
    (row,) = target_of(board).benchmark([make_model("tflite")], runs=1, restarts=1)
    assert row.median_ms is not None
    assert list(board.storage.iterdir()) == [], "what the dead run left is swept"


def test_wrong_addresses_and_interpreters_are_said_so(board: Board, make_model: MakeModel) -> None:
    with pytest.raises(OptionError, match="no address"):
        targets.get("ssh:-oProxyCommand=id")
    with pytest.raises(OptionError, match="no address"):
        targets.get("ssh")
    with pytest.raises(DeviceNotFoundError, match="cannot reach"):
        SshRemote(f"127.0.0.1:{free_port()}").shell(["true"], timeout_s=20)
    with pytest.raises(RuntimeMissingError, match="option python"):
        target_of(board, python="python9").benchmark([make_model("tflite")])
