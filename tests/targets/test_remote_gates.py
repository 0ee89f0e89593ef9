"""What a device answers about itself, phone or board, whole or cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from targets.gates import Gates
from targets.remote_benchmark import RemoteSettings, describe, state_reason
from targets.remote_gates import Facts, parse

PHONE = """
=== stat
cpu  0 0 0 0 0 0 0 0 0 0
cpu0 100 0 0 900 0 0 0 0 0 0
cpu1 100 0 0 900 0 0 0 0 0 0

=== loadavg
3.10 2.80 2.50 2/1100 4242

=== uname
Linux localhost 5.10.149-android13 #1 SMP PREEMPT aarch64
aarch64

=== cpuinfo
Processor\t: AArch64 Processor rev 0 (aarch64)
Hardware\t: Vendor Technologies, Inc SM8450

=== meminfo
MemTotal:        7654321 kB

=== getprop
[ro.build.fingerprint]: [maker/model/device:13/TQ3A.230805.001/1:user/release-keys]
[ro.product.manufacturer]: [Maker]
[ro.product.model]: [Model 7]
[ro.build.version.release]: [13]
[ro.build.version.sdk]: [33]
[ro.soc.manufacturer]: [QTI]
[ro.soc.model]: [SM8450]

=== battery
Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  level: 83
  temperature: 291

=== thermal
IsStatusOverride: false
Thermal Status: 2
Cached temperatures:

=== power
POWER MANAGER (dumpsys power)
  mWakefulness=Asleep
  mWakefulnessChanging=false

=== governors
schedutil
schedutil
walt

=== zones
41000
-274000
0
38500

=== stat2
cpu  0 0 0 0 0 0 0 0 0 0
cpu0 110 0 0 990 0 0 0 0 0 0
cpu1 150 0 0 950 0 0 0 0 0 0

=== end
"""

BOARD = """
=== uname
Linux board 6.1.21-v8+ #1642 SMP PREEMPT aarch64 GNU/Linux
aarch64

=== cpuinfo
processor\t: 0
CPU part\t: 0xd08

=== device-tree
Raspberry Pi 4 Model B Rev 1.4

=== os-release
PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"

=== end
"""


def test_a_phone_is_recognised_with_its_state() -> None:
    found = parse(PHONE)
    assert (found.name, found.arch, found.os, found.cpu) == (
        "Maker Model 7",
        "aarch64",
        "Android 13 (API 33)",
        "QTI SM8450",
    )
    assert (found.cores, found.memory_mb, found.emulated) == (2, 7474, False)
    assert found.fingerprint.startswith("maker/model/device:13")
    assert found.gates == Gates(
        load1=3.1, busy_fraction=0.5, temperature_c=41.0, thermal_status=2, governor="schedutil,walt",
        battery_percent=83.0, charging=True, screen_on=False,
    )  # fmt: skip
    assert parse(PHONE.replace("\n", "\r\n")) == found


def test_a_board_without_android_is_recognised_too() -> None:
    found = parse(BOARD)
    assert found.name == "Raspberry Pi 4 Model B Rev 1.4" and found.os == "Debian GNU/Linux 12 (bookworm)"
    assert found.cpu == "ARM part 0xd08" and found.fingerprint.startswith("Linux board 6.1.21")
    assert found.gates == Gates()


@pytest.mark.parametrize(
    "answer",
    ["=== getprop\n[ro.kernel.qemu]: [1]\n", "=== getprop\n[ro.hardware]: [ranchu]\n", "=== emulated\ncortex-a76\n"],
)
def test_an_emulated_device_never_passes_for_a_real_one(answer: str) -> None:
    class Wire:
        id, kind = "emulator-5554", "adb"

    facts = parse(answer)
    assert facts.emulated
    assert describe(Wire(), facts).kind == "adb-emulated"  # type: ignore[arg-type]
    assert describe(Wire(), Facts()).kind == "adb"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gates", "says"),
    [
        (Gates(), ""),
        (Gates(thermal_status=0, battery_percent=80, screen_on=False, governor="schedutil", busy_fraction=0.01), ""),
        (Gates(thermal_status=1), "throttles"),
        (Gates(battery_percent=19), "battery is at 19%"),
        (Gates(screen_on=True), "screen is on"),
        (Gates(governor="schedutil,powersave"), "held down"),
        (Gates(busy_fraction=0.5), "50% busy"),
    ],
)
def test_a_state_that_spoils_milliseconds_is_named(gates: Gates, says: str) -> None:
    reason = state_reason(gates, RemoteSettings())
    assert says in reason and bool(reason) == bool(says)


@given(st.text(max_size=300) | st.integers(0, len(PHONE)).map(lambda end: PHONE[:end]))
def test_garbage_and_cut_answers_leave_things_unknown(text: str) -> None:
    found = parse(text)
    whole = parse(PHONE)
    for name in ("battery_percent", "thermal_status", "temperature_c"):
        # A number may be cut to its first digits, but nothing is made up out of garbage.
        value = getattr(found.gates, name)
        assert value is None or value <= getattr(whole.gates, name) or "===" in text
    assert found.gates.busy_fraction is None or 0 <= found.gates.busy_fraction <= 1
