#!/usr/bin/env python3
"""Raises a real adb device without a phone: Debian's adbd in namespaces of its own.

    tools/adb_device.py up [--count 2] [--disk-mb 300]     prints JSON: the adb server's socket and the serials
    tools/adb_device.py up --arch arm64                    a whole emulated ARM device, with the runtimes in it
    tools/adb_device.py start|kill|stop|cont SERIAL        acts on one device's adbd, to inject faults
    tools/adb_device.py down                               ends everything

Exit code 77 where the machine cannot have such a device (tools, namespaces or packages missing), 1 where it failed.

adbd is a root shell that asks nobody for a password and listens on every interface. It is therefore started only
inside its own user, network, mount and process namespaces, and under a filter that leaves it no socket that a network
namespace does not confine (it would listen on vsock too): nothing outside can reach it, and it sees this machine's
files read-only. The adb server runs inside too and is reached through a socket in the state folder:

    export ADB_SERVER_SOCKET=localfilesystem:STATE/adb.sock
    adb devices

Needs Linux with namespaces, Debian's `apt-get` and `dpkg-deb` (to fetch adbd, nothing is installed), and `adb`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from targets import adbd_root
from targets.confine import allow_confined_sockets_only
from targets.errors import SetupError, TargetError

DEFAULT_STATE = Path(tempfile.gettempdir()) / f"layerfold-adb-device-{os.getuid()}"
FIRST_PORT = 7001
WAIT_S = 60.0
ABSENT_EXIT_CODE = 77
FAILED_EXIT_CODE = 1
# Only a folder with this file in it is this tool's, to write into and to remove.
MARK = "layerfold-adb-device"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "cont": signal.SIGCONT}
NOT_BOUND = {"proc", "sys", "dev", "tmp", "data", "run", "lost+found"}


class AbsentError(SetupError):
    """This machine cannot have an adb device at all: what it takes is missing or not permitted."""


def register_qemu(qemu: Path) -> None:
    """Makes this namespace's kernel run aarch64 programs through QEMU; other namespaces know nothing of it."""
    place = Path("/proc/sys/fs/binfmt_misc")
    subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(place)], check=True)
    magic = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    mask = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
    (place / "register").write_text(f":layerfold-aarch64:M::{magic}:{mask}:{qemu}:F")


def check_namespaces() -> None:
    """Raises `AbsentError` with the reason where this machine cannot give adbd a network of its own."""
    for tool in ("unshare", "nsenter", "ip", "adb"):
        if shutil.which(tool) is None:
            raise AbsentError(f"{tool} is not on this machine", hint="install util-linux, iproute2 and adb")
    done = subprocess.run([*unshare(), "true"], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        raise AbsentError(f"namespaces are not permitted here: {done.stderr.strip()}", hint="allow user namespaces")


def unshare() -> list[str]:
    """Returns the prefix of a command that is to run as the first process of its own namespaces."""
    return ["unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]


def require_own_network(state: Path) -> None:
    """Raises `SetupError` unless this process is in a network of its own, which nothing but loopback leads into."""
    outside = json.loads((state / "settings.json").read_text())["network_outside"]
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    links = {line.partition(":")[0].strip() for line in lines if ":" in line}
    if str(Path("/proc/self/ns/net").readlink()) == outside or links != {"lo"}:
        raise SetupError("adbd is not started outside a network namespace of its own", hint=f"run {sys.argv[0]} up")


def hold(state: Path) -> None:
    """Is the first process inside: builds the device's view of the files, starts everything, reaps what ends."""
    require_own_network(state)
    allow_confined_sockets_only()
    settings = json.loads((state / "settings.json").read_text())
    mount = ["mount"]
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if settings["qemu"]:
        register_qemu(Path(settings["qemu"]))
    for serial in settings["serials"]:
        view = state / "views" / serial.rpartition(":")[2]
        view.mkdir(parents=True)
        subprocess.run([*mount, "-t", "tmpfs", "none", str(view)], check=True)
        tops = sorted(Path(settings["root"] or "/").iterdir())
        for top in tops:
            place = view / top.name
            if top.name in NOT_BOUND:
                continue
            if top.is_symlink():
                place.symlink_to(top.readlink())
            elif top.is_dir():
                place.mkdir()
                bind(top, place)
        for name in ("proc", "sys", "dev", "tmp", "run"):
            (view / name).mkdir()
        subprocess.run([*mount, "-t", "proc", "proc", str(view / "proc")], check=True)
        subprocess.run([*mount, "--rbind", "/dev", str(view / "dev")], check=True)
        own = Path(settings["root"]) if settings["root"] else None
        # An emulated device must describe its own processor, or the runtimes believe in this machine's.
        subprocess.run([*mount, "--rbind", str(own / "sys") if own else "/sys", str(view / "sys")], check=True)
        if own:
            subprocess.run([*mount, "--bind", str(own / "proc/cpuinfo"), str(view / "proc/cpuinfo")], check=True)
        for needed in settings["needed"]:
            # A checkout or an interpreter below a folder that the view leaves out is brought back alone.
            if Path(needed).parts[1] in NOT_BOUND and not (view / needed.lstrip("/")).exists():
                (view / needed.lstrip("/")).mkdir(parents=True)
                bind(Path(needed), view / needed.lstrip("/"))
        storage = view / "data/local/tmp"
        storage.mkdir(parents=True)
        size = f"size={settings['disk_mb']}m"
        subprocess.run([*mount, "-t", "tmpfs", "-o", size, "none", str(storage)], check=True)
        start_adbd(state, serial)
    # The port scan for local emulators would find each device a second time under another name.
    env = {**os.environ, "ADB_LOCAL_TRANSPORT_MAX_PORT": "5553", "HOME": str(state)}
    log = (state / "adb-server.log").open("wb")
    subprocess.Popen(
        ["adb", "-L", f"localfilesystem:{state / 'adb.sock'}", "server", "nodaemon"], env=env, stdout=log, stderr=log
    )
    while True:
        # The first process of a namespace inherits every orphan.
        os.wait()


def bind(source: Path, place: Path) -> None:
    """Shows `source` at `place`, read-only."""
    subprocess.run(["mount", "--rbind", str(source), str(place)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True, capture_output=True)


def start_adbd(state: Path, serial: str) -> None:
    """Starts the adbd of `serial`; must be called inside the namespaces, with the socket filter on."""
    require_own_network(state)
    settings = json.loads((state / "settings.json").read_text())
    port = serial.rpartition(":")[2]
    log = (state / f"adbd-{port}.log").open("ab")
    path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    env = {"ADBD_PORT": port, "PATH": path, "HOME": "/", "TMPDIR": "/tmp", "QEMU_CPU": "cortex-a76"}
    argv = ["chroot", str(state / "views" / port), *settings["adbd"]]
    subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def adbd_process(state: Path, serial: str) -> psutil.Process:
    """Finds the running adbd of `serial`, as seen from outside."""
    port = serial.rpartition(":")[2]
    for child in holder(state).children(recursive=True):
        try:
            if child.environ().get("ADBD_PORT") == port and any(a.endswith("/adbd") for a in child.cmdline()):
                return child
        except psutil.NoSuchProcess:
            # It ended between being listed and being asked.
            continue
    raise SetupError(f"no adbd runs for {serial}", hint=f"start it: {sys.argv[0]} start {serial}")


def holder(state: Path) -> psutil.Process:
    """Returns the process that keeps the namespaces."""
    try:
        process = psutil.Process(int((state / "pid").read_text()))
    except (OSError, ValueError, psutil.NoSuchProcess) as error:
        raise SetupError(f"no adb device is up in {state}", hint=f"run {sys.argv[0]} up") from error
    if "unshare" not in process.name():
        raise SetupError(f"the process of {state} is gone", hint=f"run {sys.argv[0]} down, then up")
    return process


def up(state: Path, *, count: int, disk_mb: int, arch: str) -> dict[str, object]:
    """Raises `count` devices and waits until adb sees them all."""
    check_namespaces()
    if state.exists() and any(state.iterdir()):
        down(state)
    root, qemu, needed = "", "", []
    if arch == "arm64":
        built, static = fetched_emulated()
        root, qemu = str(built), str(static)
        # The device's root is the root of its view, so adbd is found below /opt there.
        command = [word.replace(str(built), "") for word in adbd_root.command(built / "opt/adbd")]
    else:
        fetched = fetched_host()
        command = adbd_root.command(fetched)
        needed = [str(fetched), sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[1])]
    state.mkdir(parents=True, mode=0o700, exist_ok=True)
    (state / MARK).touch()
    serials = [f"localhost:{FIRST_PORT + index}" for index in range(count)]
    settings = {
        "serials": serials,
        "disk_mb": disk_mb,
        "root": root,
        "qemu": qemu,
        "adbd": command,
        "needed": needed,
        "network_outside": str(Path("/proc/self/ns/net").readlink()),
    }
    (state / "settings.json").write_text(json.dumps(settings))
    with (state / "hold.log").open("wb") as log:
        process = subprocess.Popen(
            [*unshare(), sys.executable, str(Path(__file__).resolve()), "--state", str(state), "_hold"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    (state / "pid").write_text(str(process.pid))
    try:
        wait_until_up(state, process, serials)
    except BaseException:
        # Whatever went wrong, or Ctrl-C: no half of a device stays behind.
        down(state)
        raise
    return {"adb_server_socket": f"localfilesystem:{state / 'adb.sock'}", "serials": serials, "state": str(state)}


def fetched_host() -> Path:
    """Fetches adbd for this machine; raises `AbsentError` where its packages cannot be had."""
    try:
        return adbd_root.host()
    except SetupError as error:
        raise AbsentError(error.what, hint=error.hint) from error


def fetched_emulated() -> tuple[Path, Path]:
    """Builds the emulated root; raises `AbsentError` where its packages cannot be had."""
    try:
        return adbd_root.emulated(lambda share, what: print(f"root {share:.0%}: {what}", file=sys.stderr))
    except SetupError as error:
        raise AbsentError(error.what, hint=error.hint) from error


def wait_until_up(state: Path, process: subprocess.Popen[bytes], serials: Sequence[str]) -> None:
    """Waits for the adb server and every device."""
    deadline = time.monotonic() + WAIT_S
    while not (state / "adb.sock").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            says = (state / "hold.log").read_text(errors="replace").strip()[-800:]
            raise SetupError(f"the device did not come up: {says}")
        time.sleep(0.1)
    for serial in serials:
        connect(state, serial, deadline)


def connect(state: Path, serial: str, deadline: float) -> None:
    """Makes the adb server know the device, until it answers."""
    env = {**os.environ, "ADB_SERVER_SOCKET": f"localfilesystem:{state / 'adb.sock'}"}
    while True:
        try:
            subprocess.run(["adb", "connect", serial], env=env, capture_output=True, timeout=30)
            seen = subprocess.run(["adb", "-s", serial, "get-state"], env=env, capture_output=True, timeout=30)
            says = seen.stderr.decode(errors="replace").strip()
        except subprocess.TimeoutExpired as error:
            seen, says = None, str(error)
        if seen is not None and seen.stdout.strip() == b"device":
            return
        if time.monotonic() > deadline:
            raise SetupError(f"adb does not see {serial}: {says}")
        time.sleep(0.2)


def down(state: Path) -> None:
    """Ends the devices and removes the state folder; one that this tool has not made is left as it is.

    Raises:
        SetupError: If the folder holds something else.
    """
    if not state.exists():
        return
    if not (state / MARK).is_file():
        raise SetupError(f"{state} is not a folder of this tool: it has no {MARK}", hint="name an empty or a new one")
    try:
        process = holder(state)
    except SetupError:
        process = None
    if process is not None:
        # Everything inside dies with the first process of the namespace.
        for child in process.children():
            child.kill()
        process.kill()
        process.wait(timeout=30)
    shutil.rmtree(state, ignore_errors=True)


def inside(state: Path, serial: str) -> None:
    """Starts adbd for `serial` again, inside the namespaces that are there."""
    first = holder(state).children()[0]
    enter = ["nsenter", "--target", str(first.pid), "--user", "--net", "--mount", "--pid", "--preserve-credentials"]
    subprocess.run(
        [*enter, sys.executable, str(Path(__file__).resolve()), "--state", str(state), "_adbd", serial], check=True
    )
    # The server backs off from a device that went away; told to forget it, it connects at once.
    env = {**os.environ, "ADB_SERVER_SOCKET": f"localfilesystem:{state / 'adb.sock'}"}
    subprocess.run(["adb", "disconnect", serial], env=env, capture_output=True, timeout=30)
    connect(state, serial, time.monotonic() + WAIT_S)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and acts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE, help="folder of the device's state")
    verbs = parser.add_subparsers(dest="verb", required=True)
    raising = verbs.add_parser("up", help="raise the devices")
    raising.add_argument("--count", type=int, default=1, help="how many (1)")
    raising.add_argument("--disk-mb", type=int, default=300, help="room on each device's storage in MiB (300)")
    raising.add_argument("--arch", choices=("host", "arm64"), default="host", help="arm64 emulates a whole device")
    verbs.add_parser("down", help="end everything")
    for verb in ("start", *SIGNALS, "_adbd"):
        verbs.add_parser(verb).add_argument("serial")
    verbs.add_parser("_hold")
    chosen = parser.parse_args(argv)
    state = chosen.state.resolve()
    try:
        if chosen.verb == "up":
            print(json.dumps(up(state, count=chosen.count, disk_mb=chosen.disk_mb, arch=chosen.arch)))
        elif chosen.verb == "down":
            down(state)
        elif chosen.verb == "_hold":
            hold(state)
        elif chosen.verb == "_adbd":
            allow_confined_sockets_only()
            start_adbd(state, chosen.serial)
        elif chosen.verb == "start":
            inside(state, chosen.serial)
        else:
            adbd_process(state, chosen.serial).send_signal(SIGNALS[chosen.verb])
    except TargetError as error:
        print(f"adb_device: {error}", file=sys.stderr)
        return ABSENT_EXIT_CODE if isinstance(error, AbsentError) else FAILED_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
