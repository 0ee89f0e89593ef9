"""What the device was like before and after a measurement, and waiting until it is fit for one.

A gate never hides a figure. It waits for a bounded time, and then the row says in which state it was taken.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Gates", "busy_between", "busy_fractions", "load_reason", "read_host_gates", "wait_until_idle"]

# A neighbour that takes a tenth of a core moves a median by about as much as a folded block does.
MAX_BUSY_FRACTION = 0.10
# Beyond this share of foreign time the wall clock says more about the neighbours than about the models.
MAX_FOREIGN_SHARE = 0.02
SAMPLE_S = 0.5


@dataclass(frozen=True)
class Gates:
    """The state of a device at one moment; `None` where the device does not say.

    Attributes:
        load1: One-minute load average.
        busy_fraction: Share of the pinned cores' time that others used over half a second, 0 to 1.
        temperature_c: Hottest thermal zone, degrees Celsius.
        thermal_status: Android's thermal status, 0 (none) to 6 (shutdown).
        governor: cpufreq governors of the pinned cores, comma-separated if they differ.
        battery_percent: Charge, 0 to 100.
        charging: Whether external power is attached.
        screen_on: Whether the display is on.
        waited_s: Seconds waited for the device to become fit.
    """

    load1: float | None = None
    busy_fraction: float | None = None
    temperature_c: float | None = None
    thermal_status: int | None = None
    governor: str | None = None
    battery_percent: float | None = None
    charging: bool | None = None
    screen_on: bool | None = None
    waited_s: float = 0.0


def _cpu_ticks(stat: str) -> dict[int, tuple[int, int]]:
    """Reads (busy, total) ticks of every core from ``/proc/stat``; time stolen by a hypervisor counts as busy."""
    ticks: dict[int, tuple[int, int]] = {}
    for line in stat.splitlines():
        label, *rest = line.split() or [""]
        if label.startswith("cpu") and label[3:].isdigit() and len(rest) >= 5 and all(w.isdigit() for w in rest[:8]):
            counts = [int(word) for word in rest[:8]]
            ticks[int(label[3:])] = (sum(counts) - counts[3] - counts[4], sum(counts))
    return ticks


def busy_between(stat_before: str, stat_after: str) -> dict[int, float]:
    """Computes each core's busy share, 0 to 1, from two readings of ``/proc/stat``."""
    before = _cpu_ticks(stat_before)
    fractions = {}
    for core, (busy, total) in _cpu_ticks(stat_after).items():
        if core in before and total > before[core][1]:
            share = (busy - before[core][0]) / (total - before[core][1])
            fractions[core] = min(max(share, 0.0), 1.0)
    return fractions


def busy_fractions(sample_s: float = SAMPLE_S, *, proc: Path = Path("/proc")) -> dict[int, float]:
    """Measures how busy each core is.

    Args:
        sample_s: Length of the measurement, in seconds.
        proc: Where the proc file system is mounted.

    Returns:
        Core number to busy share, 0 to 1; empty where the system has no ``/proc/stat``.
    """
    if not (proc / "stat").exists():
        return {}
    before = (proc / "stat").read_text(encoding="ascii")
    time.sleep(sample_s)
    return busy_between(before, (proc / "stat").read_text(encoding="ascii"))


def _read_text(path: Path) -> str | None:
    # A sysfs file may exist and still refuse to be read (a zone without a sensor): that is "not known".
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None


def _governors(cores: Sequence[int], sys_root: Path) -> str | None:
    found = []
    for core in cores:
        text = _read_text(sys_root / f"devices/system/cpu/cpu{core}/cpufreq/scaling_governor")
        if text and text not in found:
            found.append(text)
    return ",".join(found) or None


def _temperature_c(sys_root: Path) -> float | None:
    zones = []
    for path in sorted(sys_root.glob("class/thermal/thermal_zone*/temp")):
        text = _read_text(path)
        if text and text.lstrip("-").isdigit():
            zones.append(int(text) / 1000.0)
    return max(zones) if zones else None


def _battery(sys_root: Path) -> tuple[float | None, bool | None]:
    for supply in sorted(sys_root.glob("class/power_supply/*")):
        if _read_text(supply / "type") == "Battery":
            capacity = _read_text(supply / "capacity")
            status = _read_text(supply / "status")
            percent = float(capacity) if capacity and capacity.isdigit() else None
            return percent, status in {"Charging", "Full", "Not charging"} if status else None
    return None, None


def read_host_gates(
    cores: Sequence[int], *, busy: float | None = None, waited_s: float = 0.0, sys_root: Path = Path("/sys")
) -> Gates:
    """Reads the state of this machine for the cores in `cores`; `busy` and `waited_s` are handed through."""
    load = _read_text(Path("/proc/loadavg"))
    percent, charging = _battery(sys_root)
    return Gates(
        load1=float(load.split()[0]) if load else None,
        busy_fraction=busy,
        temperature_c=_temperature_c(sys_root),
        governor=_governors(cores, sys_root),
        battery_percent=percent,
        charging=charging,
        waited_s=waited_s,
    )


def wait_until_idle(
    cores: Sequence[int],
    *,
    limit_s: float,
    max_busy: float = MAX_BUSY_FRACTION,
    sample: Callable[[], Mapping[int, float]] = busy_fractions,
    clock: Callable[[], float] = time.monotonic,
) -> Gates:
    """Waits until others leave `cores` alone, for `limit_s` seconds at most.

    Args:
        cores: Cores that the measurement will be pinned to; empty means any core.
        limit_s: Longest wait, in seconds; 0 samples once and does not wait.
        max_busy: Share of the busiest core's time that others may use.
        sample: Measures the busy shares; it takes its own time.
        clock: Monotonic clock, in seconds.

    Returns:
        The state when the wait ended, with `busy_fraction` of the busiest of `cores`.
    """
    started = clock()
    while True:
        fractions = sample()
        chosen = [fractions[core] for core in cores if core in fractions] or list(fractions.values())
        busy = max(chosen) if chosen else None
        waited_s = clock() - started
        if busy is None or busy <= max_busy or waited_s >= limit_s:
            return read_host_gates(cores, busy=busy, waited_s=round(waited_s, 1))


def load_reason(gates: Gates, *, max_busy: float = MAX_BUSY_FRACTION) -> str:
    """Says why a row taken in this state is not to be trusted in absolute terms, or nothing if it is."""
    if gates.busy_fraction is not None and gates.busy_fraction > max_busy:
        return (
            f"the cores were {gates.busy_fraction:.0%} busy with other work after waiting {gates.waited_s:.0f} s "
            f"(limit {max_busy:.0%}): trust the ratio, not the milliseconds"
        )
    return ""
