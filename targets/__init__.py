"""Turns a model file into numbers one can trust, on whatever device is there.

    import targets
    from targets.stats import ratio_interval

    target = targets.get("host-litert", threads=1)
    baseline, folded = target.benchmark(["baseline.tflite", "folded.tflite"], warmup=5, runs=60, restarts=3)
    print(ratio_interval(baseline, folded))

This package knows nothing of `pipeline`: it measures files, whoever made them.
"""

from targets.base import Device, Measurement, Target
from targets.errors import TargetError
from targets.registry import devices, get, names

__all__ = ["Device", "Measurement", "Target", "TargetError", "devices", "get", "names"]
