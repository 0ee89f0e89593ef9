"""The row that everything else reads."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from targets.base import Device, Measurement
from targets.errors import DeviceLostError, OptionError
from targets.gates import Gates

ROW = {
    "target": "host-litert", "model": "a.tflite", "model_sha256": "00", "precision": "fp32", "runtime": "litert",
    "runtime_version": "2", "requested_accelerator": "cpu", "actual_accelerator": "cpu-xnnpack",
    "device": Device("host", "host"), "threads": 1, "pinned_cores": (1,), "warmup": 1, "runs": 2, "restarts": 1,
}  # fmt: skip
TIMES = st.floats(1e-3, 1e5)


@given(st.lists(st.lists(TIMES, min_size=1, max_size=12), min_size=1, max_size=4))
def test_quantiles_agree_with_numpy_and_survive_json(samples: list[list[float]]) -> None:
    row = Measurement.from_samples(samples, **ROW, gates_before=Gates(load1=0.5))
    flat = np.concatenate([np.asarray(process) for process in samples])
    expected = np.percentile(flat, [10, 50, 90])
    np.testing.assert_allclose([row.p10_ms, row.median_ms, row.p90_ms], expected, rtol=1e-9)
    np.testing.assert_allclose(row.mad_ms, np.median(np.abs(flat - np.median(flat))), rtol=1e-6, atol=1e-9)
    assert Measurement.from_dict(json.loads(json.dumps(row.as_dict(), allow_nan=False))) == row


@pytest.mark.parametrize("bad", [[], [[]], [[1.0, float("nan")]], [[0.0]], [[-1.0]], [[float("inf")]]])
def test_a_time_that_is_none_never_becomes_a_row(bad: list[list[float]]) -> None:
    with pytest.raises(OptionError, match="positive and finite"):
        Measurement.from_samples(bad, **ROW)


def test_a_failure_row_has_a_type_and_a_reason_but_no_figure() -> None:
    error = DeviceLostError("the phone is gone", hint="plug it in")
    row = Measurement.from_failure(error, target="android", model="a.tflite", device=Device("S1", "adb"))
    assert row.failure == "DeviceLostError"
    assert "the phone is gone" in row.invalid_reason and "plug it in" in row.invalid_reason
    assert not row.valid
    assert row.median_ms is None and row.instructions is None and row.samples_ms == ()
    assert row.timestamp.endswith("+00:00")


def test_a_row_of_another_version_is_refused_by_name() -> None:
    row = Measurement.from_samples([[1.0]], **ROW).as_dict()
    with pytest.raises(OptionError, match=r"unknown fields.*'colour'"):
        Measurement.from_dict({**row, "colour": "red"})
    row.pop("device")
    with pytest.raises(OptionError, match="incomplete"):
        Measurement.from_dict(row)


@pytest.mark.parametrize(("own_ms", "valid"), [(1.0, True), (0.985, True), (0.97, False), (0.5, False)])
def test_a_neighbour_who_comes_after_the_gate_is_marked(own_ms: float, valid: bool) -> None:
    row = Measurement.from_samples([[1.0] * 9], cpu_samples_ms=((own_ms,) * 9,), **ROW).marked_if_disturbed()
    assert row.valid == valid and ("others had the core" in row.invalid_reason) == (not valid)
    # Threads that wait for each other cannot tell.
    assert replace(row, threads=2, valid=True, invalid_reason="").marked_if_disturbed().valid
