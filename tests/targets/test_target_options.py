"""A wrong value of an option is refused by its name, before anything runs."""

from typing import Any

import pytest

import targets
from targets.errors import OptionError

REMOTES = ("android", "ssh:board")
WRONG: dict[str, list[dict[str, Any]]] = {
    "host-ort": [
        {"threads": "two"}, {"threads": True}, {"timeout_s": "x"}, {"timeout_s": 0}, {"gate_wait_s": "soon"},
        {"cores": "0"}, {"cores": [-1]}, {"cores": [0.5]}, {"pin": "no"}, {"max_busy": float("nan")}, {"exact": 1},
    ],
    "emulated-arm64": [{"folder": 5}, {"cache": "yes"}, {"timeout_s": -1}, {"threads": "1"}],
    "android": [{"python": 3}, {"libraries": "lib.so"}, {"runner": "python", "accelerator": "gpu"}],
    "ssh:board": [{"options": "-F x"}, {"storage": 5}, {"accelerator": "nnapi"}],
    "ethos-u": [{"timeout_s": "x"}],
    "qnn-htp": [{"timeout_s": None}],
}  # fmt: skip
for remote in REMOTES:
    WRONG[remote] += [
        {"threads": 1.5}, {"cores": [-1]}, {"cooldown_s": -1}, {"timeout_s": "x"}, {"gate_wait_s": "soon"},
        {"push_timeout_s": 0}, {"lock_wait_s": None}, {"min_battery_percent": "full"}, {"python": "~/venv/bin/python"},
        {"storage": "~"},
    ]  # fmt: skip
CASES = [(name, wrong) for name, those in WRONG.items() for wrong in those]


@pytest.mark.parametrize(("name", "wrong"), CASES, ids=[f"{name}-{wrong}" for name, wrong in CASES])
def test_a_wrong_value_is_refused_by_name(name: str, wrong: dict[str, Any]) -> None:
    *_, key = wrong
    with pytest.raises(OptionError, match=wrong[key] if key == "accelerator" else key):
        targets.get(name, **wrong)


def test_one_core_needs_no_list() -> None:
    for name in REMOTES:
        assert targets.get(name, cores=1).settings.cores == (1,)  # type: ignore[attr-defined]
    assert targets.get("host-ort", cores=0)._cores == [0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["android:S1", "ssh:pi@board", "ethos-u:ethos-u55-128", "qnn-htp:75", "host-ort"])
def test_a_target_goes_by_the_whole_name(name: str) -> None:
    assert targets.get(name).name == name
