"""Fixtures of the targets' tests, and a line at the end that says which of them had the devices they need."""

from collections import Counter

import pytest
from model_files import make_model

__all__ = ["make_model"]

NEEDY = {
    "test_adb_device.py": "a real adbd in namespaces of its own",
    "test_ssh_target.py": "a real sshd",
    "test_emulated_target.py": "the emulated arm64 root",
    "test_estimators.py": "the NPU estimators",
}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lets a log show that the tests ran that skip where their device cannot be had."""
    for name, device in NEEDY.items():
        found = Counter(
            outcome
            for outcome in ("passed", "failed", "skipped")
            for report in terminalreporter.stats.get(outcome, [])
            if report.nodeid.partition("::")[0].endswith(name) and (outcome == "skipped" or report.when == "call")
        )
        if found:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in found.items())
            terminalreporter.write_line(f"tests against {device}: {counts}")
