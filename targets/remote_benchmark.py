"""Benchmarks files on a device behind a wire: lock, gates, folder, runner, rows. The same for adb and ssh."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from targets import options
from targets.base import Device, Measurement, OnProgress, check_counts
from targets.errors import DeviceError, OptionError, TimeoutExpiredError
from targets.gates import MAX_BUSY_FRACTION, Gates, load_reason
from targets.locks import device_lock
from targets.model_file import inspect
from targets.remote import Remote, workspace
from targets.remote_gates import QUERY, Facts, parse
from targets.runners import ACCELERATORS, Runner, Workload

__all__ = ["RemoteSettings", "ask", "benchmark", "describe"]

_QUERY_TIMEOUT_S = 30.0
_GATE_PAUSE_S = 5.0


@dataclass(frozen=True)
class RemoteSettings:
    """How to treat the device.

    Attributes:
        threads: Threads of the runtime.
        cores: Cores to pin to; empty leaves it to the device.
        accelerator: ``cpu``, ``gpu`` or ``nnapi``.
        gate_wait_s: Longest wait for the device to be cool and idle before the row is marked, in seconds.
        max_busy: Share of the busiest core that others may use.
        min_battery_percent: Charge under which the row is marked: many devices throttle there.
        cooldown_s: Pause between processes, in seconds.
        timeout_s: Limit for one process on the device, in seconds.
        push_timeout_s: Limit for sending one file, in seconds.
        lock_wait_s: How long to wait for another run on the device, in seconds.
    """

    threads: int = 1
    cores: tuple[int, ...] = ()
    accelerator: str = "cpu"
    gate_wait_s: float = 60.0
    max_busy: float = MAX_BUSY_FRACTION
    min_battery_percent: float = 20.0
    cooldown_s: float = 2.0
    timeout_s: float = 600.0
    push_timeout_s: float = 300.0
    lock_wait_s: float = 0.0

    def __post_init__(self) -> None:
        # Frozen: what is checked here is also what a lone core becomes a list by.
        object.__setattr__(self, "cores", options.cores(self.cores))
        options.whole("threads", self.threads)
        for name in ("gate_wait_s", "max_busy", "min_battery_percent", "cooldown_s", "lock_wait_s"):
            options.number(name, getattr(self, name))
        for name in ("timeout_s", "push_timeout_s"):
            options.number(name, getattr(self, name), above=0)
        if self.accelerator not in ACCELERATORS:
            raise OptionError(f"accelerator is {self.accelerator!r}, expected one of {', '.join(ACCELERATORS)}")


def ask(remote: Remote) -> Facts:
    """Asks the device who it is and in which state; raises `DeviceLostError` or `TimeoutExpiredError`."""
    return parse(remote.shell(["sh", "-c", QUERY], timeout_s=_QUERY_TIMEOUT_S).stdout)


def describe(remote: Remote, facts: Facts) -> Device:
    """Makes the row's device from what it said."""
    kind = "adb-emulated" if remote.kind == "adb" and facts.emulated else remote.kind
    return Device(
        id=remote.id, kind=kind, name=facts.name, arch=facts.arch, os=facts.os, cpu=facts.cpu, cores=facts.cores,
        memory_mb=facts.memory_mb, fingerprint=facts.fingerprint,
    )  # fmt: skip


def state_reason(gates: Gates, settings: RemoteSettings) -> str:
    """Says why a row taken in this state is not to be trusted in absolute terms, or nothing if it is."""
    reasons = []
    if gates.thermal_status:
        reasons.append(f"the device throttles (thermal status {gates.thermal_status})")
    if gates.battery_percent is not None and gates.battery_percent < settings.min_battery_percent:
        reasons.append(f"the battery is at {gates.battery_percent:.0f}%, under {settings.min_battery_percent:.0f}%")
    if gates.screen_on:
        reasons.append("the screen is on and shares processor and memory")
    if gates.governor and "powersave" in gates.governor:
        reasons.append(f"the clock is held down (governor {gates.governor})")
    if busy := load_reason(gates, max_busy=settings.max_busy):
        reasons.append(busy)
    return "; ".join(reasons)


def _wait_until_fit(
    remote: Remote, settings: RemoteSettings, clock: Callable[[], float] = time.monotonic
) -> tuple[Facts, Gates]:
    """Waits for heat and load, which pass by themselves; a flat battery or a lit screen is not waited for."""
    started = clock()
    while True:
        facts = ask(remote)
        waited_s = clock() - started
        hot = bool(facts.gates.thermal_status)
        busy = facts.gates.busy_fraction is not None and facts.gates.busy_fraction > settings.max_busy
        if not (hot or busy) or waited_s >= settings.gate_wait_s:
            return facts, replace(facts.gates, waited_s=round(waited_s, 1))
        time.sleep(min(_GATE_PAUSE_S, max(settings.gate_wait_s - waited_s, 0.0)))


def benchmark(
    remote: Remote,
    runner: Runner,
    settings: RemoteSettings,
    paths: Sequence[Path | str],
    *,
    name: str,
    warmup: int,
    runs: int,
    restarts: int,
    quick: bool,
    on_progress: OnProgress | None,
) -> list[Measurement]:
    """Measures files on the device; see `targets.base.Target.benchmark`.

    Raises:
        DeviceBusyError: If another run holds the device.
        DeviceLostError: If it goes away; what was sent is then removed by the next run there.
        DeviceFullError: If the files do not fit.
        TransferError: If a file does not arrive whole.
        TimeoutExpiredError: If something takes longer than its limit.
        TargetError: Others of the tree, from the runner.
    """
    files = [
        inspect(path, expected=runner.format, runtime=runner.runtime)
        for path in check_counts(paths, warmup=warmup, runs=runs, restarts=restarts)
    ]
    total = runs * restarts * len(files)

    def advance(done: int) -> None:
        if on_progress is not None:
            on_progress(done, total)

    work = Workload(
        warmup=warmup, runs=runs, restarts=restarts, threads=settings.threads, cores=settings.cores,
        accelerator=settings.accelerator, cooldown_s=settings.cooldown_s, timeout_s=settings.timeout_s,
        on_done=advance,
    )  # fmt: skip
    with (
        device_lock(remote.id, wait_s=settings.lock_wait_s),
        workspace(remote, push_timeout_s=settings.push_timeout_s) as space,
    ):
        # Names on the device are made here: a user's file name never reaches its shell.
        sent = [space.put(file.path, f"{index}.{file.format}") for index, file in enumerate(files)]
        runner.prepare(space)
        facts, before = _wait_until_fit(remote, settings)
        found = runner.run(space, sent, work)
        try:
            after, lost = ask(remote).gates, ""
        except (DeviceError, TimeoutExpiredError) as error:
            # The figures are there; only what the device was like afterwards is not.
            after, lost = Gates(), f"the device did not say its state after the run: {error.what}"
    device = describe(remote, facts)
    group = uuid.uuid4().hex if len(files) > 1 else ""
    rows = []
    for file, row in zip(files, found, strict=True):
        reasons = [state_reason(before, settings)]
        if lost:
            reasons.append(lost)
        elif busy := load_reason(after, max_busy=settings.max_busy):
            reasons.append(f"after the run {busy}")
        if (after.thermal_status or 0) > (before.thermal_status or 0):
            reasons.append(f"the device began to throttle during the run (thermal status {after.thermal_status})")
        if row.actual_accelerator == "unknown":
            reasons.append(f"asked for {settings.accelerator}, and {runner.runtime} does not say what ran the model")
        elif not row.actual_accelerator.startswith(settings.accelerator):
            reasons.append(f"asked for {settings.accelerator}, but {row.actual_accelerator} ran the model")
        if device.kind == "adb-emulated":
            reasons = ["the device is emulated: neither its milliseconds nor their ratio say anything of a real one"]
        reason = "; ".join(filter(None, reasons))
        rows.append(
            Measurement.from_samples(
                row.samples_ms, cpu_samples_ms=tuple(map(tuple, row.cpu_samples_ms)),
                target=name, model=file.path.name, model_sha256=file.sha256, precision=file.precision,
                runtime=runner.runtime, runtime_version=row.runtime_version,
                requested_accelerator=settings.accelerator, actual_accelerator=row.actual_accelerator, device=device,
                threads=settings.threads, pinned_cores=row.pinned_cores, warmup=warmup, runs=runs, restarts=restarts,
                quick=quick, interleaved_with=group, init_ms=row.init_ms, peak_memory_mb=row.peak_memory_mb,
                counters=row.counters, output_sha256=row.output_sha256, gates_before=before, gates_after=after,
                valid=not reason, invalid_reason=reason,
                note=space.left_behind,
            ).marked_if_disturbed()
        )  # fmt: skip
    return rows
