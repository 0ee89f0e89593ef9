"""One question to a device about who it is and in which state, and the reading of its answer.

The script is fixed text; each part may be missing (no `getprop` on a Linux board, no `dumpsys` without Android) and
then the figure is not known.
"""

import re
from dataclasses import dataclass, field

from targets.gates import Gates, busy_between

__all__ = ["Facts", "QUERY", "parse"]

QUERY = r"""
part() { echo; echo "=== $1"; }
part stat; cat /proc/stat
part loadavg; cat /proc/loadavg
part uname; uname -a; uname -m
part cpuinfo; cat /proc/cpuinfo
part meminfo; cat /proc/meminfo
part os-release; cat /etc/os-release
part device-tree; tr '\0' '\n' < /proc/device-tree/model
part getprop; getprop
part battery; dumpsys battery
part thermal; dumpsys thermalservice
part power; dumpsys power
part governors; cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor
part zones; cat /sys/class/thermal/thermal_zone*/temp
part emulated; cat /etc/layerfold-emulated
part online; cat /sys/devices/system/cpu/online
sleep 0.5
part stat2; cat /proc/stat
part end
"""


@dataclass(frozen=True)
class Facts:
    """Who the device is and in which state: what `targets.base.Device` and `targets.gates.Gates` are made of."""

    name: str = ""
    arch: str = ""
    os: str = ""
    cpu: str = ""
    cores: int = 0
    memory_mb: int = 0
    fingerprint: str = ""
    emulated: bool = False
    gates: Gates = field(default_factory=Gates)


def parse(text: str) -> Facts:
    """Reads the answer to `QUERY`; what is missing or unreadable is simply not known."""
    parts: dict[str, str] = {}
    for block in re.split(r"^=== ", text.replace("\r\n", "\n"), flags=re.MULTILINE)[1:]:
        title, _, body = block.partition("\n")
        parts[title.strip()] = body.strip()
    props = dict(re.findall(r"^\[([^\]\n]+)\]: \[([^\]\n]*)\]$", parts.get("getprop", ""), flags=re.MULTILINE))
    uname = parts.get("uname", "").splitlines()
    memory = _search(r"^MemTotal:\s+(\d+) kB", parts.get("meminfo", ""))
    return Facts(
        name=_name(props, parts),
        arch=uname[-1].strip() if uname else "",
        os=_os(props, parts),
        cpu=_cpu(props, parts.get("cpuinfo", "")),
        cores=len(re.findall(r"^cpu\d+ ", parts.get("stat", ""), flags=re.MULTILINE)),
        memory_mb=int(memory) // 1024 if memory else 0,
        fingerprint=props.get("ro.build.fingerprint", "") or (uname[0].strip() if uname else ""),
        # Android's own emulator says so in its properties; the emulated root of this package in a file.
        emulated=bool(parts.get("emulated"))
        or props.get("ro.kernel.qemu", props.get("ro.boot.qemu", "0")) == "1"
        or props.get("ro.hardware") in {"ranchu", "goldfish"},
        gates=_gates(parts),
    )


def _name(props: dict[str, str], parts: dict[str, str]) -> str:
    maker, model = props.get("ro.product.manufacturer", ""), props.get("ro.product.model", "")
    if model:
        return f"{maker} {model}".strip()
    return parts.get("device-tree", "").splitlines()[0] if parts.get("device-tree") else ""


def _os(props: dict[str, str], parts: dict[str, str]) -> str:
    if release := props.get("ro.build.version.release"):
        return f"Android {release} (API {props.get('ro.build.version.sdk', '?')})"
    return _search(r'^PRETTY_NAME="?([^"\n]*)"?$', parts.get("os-release", "")) or ""


def _cpu(props: dict[str, str], cpuinfo: str) -> str:
    if soc := props.get("ro.soc.model"):
        return f"{props.get('ro.soc.manufacturer', '')} {soc}".strip()
    for key in ("Hardware", "model name", "Model"):
        if found := _search(rf"^{key}\s*:\s*(.+)$", cpuinfo):
            return found
    part = _search(r"^CPU part\s*:\s*(\S+)$", cpuinfo)
    return props.get("ro.board.platform", "") or (f"ARM part {part}" if part else "")


def _gates(parts: dict[str, str]) -> Gates:
    load = _search(r"^(\d+\.\d+) ", parts.get("loadavg", ""))
    battery = parts.get("battery", "")
    level = _search(r"^\s*level: (\d+)$", battery)
    powered = re.findall(r"^\s*(?:AC|USB|Wireless|Dock) powered: (true|false)$", battery, flags=re.MULTILINE)
    status = _search(r"^\s*Thermal Status: (\d+)$", parts.get("thermal", ""))
    awake = _search(r"^\s*(?:mWakefulness=|Display Power: state=)(\w+)$", parts.get("power", ""))
    governors = list(dict.fromkeys(parts.get("governors", "").split()))
    # Zones without a sensor report 0 or a sentinel; a phone is neither frozen nor above the boiling point.
    zones = [int(word) / 1000.0 for word in re.findall(r"^\d+$", parts.get("zones", ""), flags=re.MULTILINE)]
    plausible = [zone for zone in zones if 0 < zone < 130]
    busy = busy_between(parts.get("stat", ""), parts.get("stat2", ""))
    return Gates(
        load1=float(load) if load else None,
        busy_fraction=max(busy.values()) if busy else None,
        temperature_c=max(plausible) if plausible else None,
        thermal_status=int(status) if status else None,
        governor=",".join(governors) or None,
        battery_percent=float(level) if level else None,
        charging="true" in powered if powered else None,
        screen_on=awake in {"Awake", "ON"} if awake else None,
    )


def _search(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, flags=re.MULTILINE)
    return found[1].strip() if found else None
