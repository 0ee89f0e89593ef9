"""Reading a device's state from files laid out as the kernel lays them out, and waiting with a limit."""

from pathlib import Path

import pytest

from targets.gates import Gates, busy_fractions, load_reason, read_host_gates, wait_until_idle


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_reads_what_sysfs_says(tmp_path: Path) -> None:
    root = lay(
        tmp_path,
        {
            "devices/system/cpu/cpu2/cpufreq/scaling_governor": "performance\n",
            "devices/system/cpu/cpu3/cpufreq/scaling_governor": "schedutil\n",
            "class/thermal/thermal_zone0/temp": "41500\n",
            "class/thermal/thermal_zone1/temp": "48250\n",
            "class/thermal/thermal_zone2/temp": "nonsense\n",
            "class/power_supply/AC/type": "Mains\n",
            "class/power_supply/BAT0/type": "Battery\n",
            "class/power_supply/BAT0/capacity": "77\n",
            "class/power_supply/BAT0/status": "Discharging\n",
        },
    )
    gates = read_host_gates([2, 3], sys_root=root)
    assert gates.governor == "performance,schedutil"
    assert gates.temperature_c == 48.25
    assert (gates.battery_percent, gates.charging) == (77.0, False)
    assert gates.load1 is not None and gates.load1 >= 0


def test_a_machine_without_sensors_says_not_known(tmp_path: Path) -> None:
    gates = read_host_gates([0], sys_root=tmp_path)
    assert (gates.governor, gates.temperature_c, gates.battery_percent, gates.charging) == (None, None, None, None)


def test_busy_share_counts_stolen_time_and_not_idle_or_iowait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # user nice system idle iowait irq softirq steal: 30 of 100 ticks busy on cpu1, 10 of them stolen.
    before = "cpu 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0\ncpu1 5 0 0 7 0 0 0 0 0 0\n"
    after = "cpu 0 0 0 0 0 0 0 0\ncpu0 0 0 0 50 0 0 0 0\ncpu1 20 0 5 57 20 0 0 10 0 0\n"
    lay(tmp_path, {"stat": before})
    monkeypatch.setattr("time.sleep", lambda _: lay(tmp_path, {"stat": after}))
    assert busy_fractions(proc=tmp_path) == {0: 0.0, 1: pytest.approx(0.3)}


def test_waits_until_the_pinned_cores_are_idle_and_ignores_the_others() -> None:
    readings = iter([{0: 0.9, 1: 0.9}, {0: 0.9, 1: 0.5}, {0: 0.9, 1: 0.01}])
    ticks = iter(range(100))
    gates = wait_until_idle([1], limit_s=50, sample=lambda: next(readings), clock=lambda: float(next(ticks)))
    assert gates.busy_fraction == 0.01
    assert gates.waited_s == 3.0
    assert load_reason(gates) == ""


def test_the_wait_is_bounded_and_then_the_row_is_marked() -> None:
    ticks = iter(range(100))
    gates = wait_until_idle([0], limit_s=5, sample=lambda: {0: 0.8}, clock=lambda: float(next(ticks)))
    assert gates.waited_s == 5.0
    assert "80% busy" in load_reason(gates) and "5 s" in load_reason(gates)


def test_an_unknown_load_is_not_held_against_the_row() -> None:
    assert load_reason(wait_until_idle([0], limit_s=5, sample=dict)) == ""
    assert load_reason(Gates()) == ""
