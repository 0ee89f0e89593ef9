"""The schema of `report.json`: what a run found, for people's tables and other programs' checks.

Accuracies and agreements are fractions in 0…1; MACs are multiply-accumulates of one image; latencies are
medians in milliseconds; `ratio` is folded over baseline with its 95 % interval. `schema_version` grows by one when a
field changes meaning or goes away; new fields may come without.
"""

__all__ = [
    "SCHEMA_VERSION",
    "AlphaPoint",
    "CalibrationEntry",
    "CensusRow",
    "FileEntry",
    "FileKind",
    "LatencyRow",
    "ModelResult",
    "NoiseRow",
    "OpinionRow",
    "PaperRow",
    "RunReport",
    "VerifyRow",
    "WorstImageRow",
]

from typing import Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1

FileKind = Literal[
    "tflite_fp32",
    "tflite_int8",
    "onnx_fp32",
    "onnx_int8",
    "tflite_fp16",
    "tflite_dynamic",
    "onnx_fp16",
    "onnx_dynamic",
    "executorch_fp32",
    "executorch_int8",
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Part):
    """A model file; `path` is relative to the report."""

    path: str
    bytes: int
    sha256: str


class ModelResult(_Part):
    """One of the two networks.

    `accuracy` maps `torch` and the file kinds to top-1 on the labelled evaluation images; `agreement` maps the same
    to the share of evaluation images on which top-1 equals that of the baseline in torch.
    """

    params: int
    macs: int
    depth: int
    accuracy: dict[str, float]
    agreement: dict[str, float]
    files: dict[FileKind, FileEntry]


class WorstImageRow(_Part):
    """An image on which a file and its torch model differ most."""

    index: int
    name: str
    max_abs_error: float
    network_class: int
    file_class: int


class VerifyRow(_Part):
    """One exported file against the torch model it came from.

    `relative_error` is the largest logit difference over the torch model's largest logit; `worst` lists the images
    with the largest differences, worst first.
    """

    model: Literal["baseline", "folded"]
    kind: FileKind
    images: int
    accuracy: float | None
    agreement: float
    max_abs_logit_error: float
    mean_abs_logit_error: float
    passed: bool
    reason: str
    top5: float | None = None
    relative_error: float | None = None
    worst: list[WorstImageRow] = []


class OpinionRow(_Part):
    """Two files of one model and precision in two formats, compared with each other on the evaluation images.

    `second` is `tensorflow` where the first file was run by TensorFlow's interpreter too.
    """

    model: Literal["baseline", "folded"]
    first: FileKind
    second: FileKind | Literal["tensorflow"]
    agreement: float
    max_abs_logit_difference: float
    passed: bool
    reason: str


class CensusRow(_Part):
    """What a file holds: operators by type, activations fused into others, and how unevenly its weights spread.

    `widest_spread` is the largest absolute weight of layer `widest_layer` over its median channel's, the largest of all
    layers: what one weight scale for the tensor would waste.
    """

    model: Literal["baseline", "folded"]
    kind: FileKind
    ops: dict[str, int]
    fused_activations: dict[str, int]
    float_tensors: list[str]
    widest_layer: str | None
    widest_spread: float | None
    findings: list[str]


class NoiseRow(_Part):
    """What int8 leaves of one unit's output: signal over noise in decibels, None where nothing changed."""

    model: Literal["baseline", "folded"]
    file: str
    name: str
    folded: bool
    sqnr_db: float | None
    worst_channel_db: float | None


class CalibrationEntry(_Part):
    """The images that int8 was calibrated on; `sha256` is over their normalised pixels in order."""

    source: str
    seed: int
    asked: int
    count: int
    sha256: str
    skipped: dict[str, str]


class LatencyRow(_Part):
    """What one inference costs on a target, baseline and folded; None where the target failed or has no such figure.

    `metric` is what `ratio` compares: ``time`` on the wall, ``processor time`` where others had the core for a part of
    it, executed ``instructions`` or estimated ``cycles``, which are in `baseline_count` and `folded_count`; ``none``
    for a check that only says whether a model compiles.
    """

    target: str
    runtime: str
    precision: str
    threads: int
    baseline_ms: float | None
    folded_ms: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    valid: bool
    note: str
    metric: Literal["time", "processor time", "instructions", "cycles", "none"] = "time"
    baseline_count: float | None = None
    folded_count: float | None = None
    device: str = ""

    @property
    def failed(self) -> bool:
        """Whether there is no figure although there should be one."""
        return self.ratio is None and self.metric != "none"


class PaperRow(_Part):
    """The Layer Folding paper's row of the same network (BMVC 2022, table 2), for comparison."""

    model: str
    accuracy: float
    accuracy_drop_points: float
    latency_reduction_percent: float
    flops_reduction_percent: float


class AlphaPoint(_Part):
    """α of every unit or layer after so many optimiser steps of pre-folding."""

    step: int
    alphas: dict[str, float]


class RunReport(_Part):
    """Everything that a run's report shows."""

    schema_version: int = SCHEMA_VERSION
    recipe: str
    variant: Literal["full", "quick"]
    description: str
    seed: int
    model: str
    input_px: int
    weights: str
    data: str
    eval_images: int
    labelled_images: int
    versions: dict[str, str]
    stage_hashes: dict[str, str]
    stage_seconds: dict[str, float]
    units_folded: list[str]
    units_skipped: dict[str, str]
    alphas: dict[str, float]
    alpha_trace: list[AlphaPoint] = []
    fold_max_abs_error: float
    fold_changed_predictions: int
    baseline: ModelResult
    folded: ModelResult
    verify: list[VerifyRow]
    latency: list[LatencyRow]
    paper: PaperRow | None
    failures: list[str]
    batch: int = 1
    opinions: list[OpinionRow] = []
    census: list[CensusRow] = []
    noise: list[NoiseRow] = []
    calibration: CalibrationEntry | None = None
    quantised: dict[str, str | bool | float | int | list[str]] = {}
    identities_apart: dict[str, float] = {}
    """Folded kernels that int8 rounds without their identity, and how many times finer their scale became."""
