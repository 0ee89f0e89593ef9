"""The schema of a recipe: the one YAML file that says what to fold, how, and against what to compare it.

Unknown keys are errors that name the nearest known key; values carry their unit in the key's name.
`pipeline.recipe_files` finds, reads and overrides recipes; the section `quick` holds what `--quick` overrides.
"""

__all__ = [
    "BaselineSection",
    "BenchSection",
    "DataSection",
    "DistillSection",
    "ExportSection",
    "FoldSection",
    "ModelSection",
    "PostfoldSection",
    "PrefoldSection",
    "PreprocessSection",
    "QuantizeSection",
    "Recipe",
    "ReportSection",
    "TrainSection",
    "VerifySection",
    "parse",
]

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import RecipeError, nearest

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(_Section):
    """Which network, and where its weights come from."""

    name: str
    num_classes: Count
    in_channels: Literal[3] = 3
    input_px: Annotated[int, Field(ge=8, le=1024)]
    weights: str = "auto"
    """`auto` (packaged, else the hub), `packaged`, `hub`, `none` (random) or a checkpoint's path."""
    args: dict[str, str | int | float | bool] = {}


class PreprocessSection(_Section):
    """From picture to network input: the one spec that training, calibration, verify and metadata read."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    crop_fraction: Annotated[float, Field(gt=0, le=1)] = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class DataSection(_Section):
    """Which images. `train` fits, `calibration` is drawn from train, `eval` is only ever evaluated."""

    name: str
    root: str | None = None
    fallback: str | None = None
    train_images: Count | None = None
    eval_images: Count | None = None
    labelled: str | None = None
    """A second, labelled set that is only evaluated (`imagenet_samples`: 20 labelled ImageNet photos)."""


class DistillSection(_Section):
    """Knowledge distillation from the baseline: loss = (1−weight)·task + weight·KL at the temperature."""

    weight: Fraction
    temperature: Positive = 1.0


class TrainSection(_Section):
    """One fine-tuning: how long, how fast, with what regularisation."""

    epochs: Positive
    batch_size: Count = 128
    lr: Positive
    optimiser: Literal["sgd", "adamw"] = "sgd"
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "step", "onecycle", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Fraction = 0.0
    ema_decay: Fraction | None = None
    grad_clip_norm: Positive | None = None
    freeze_bn: bool = False
    channels_last: bool = True
    """NHWC memory order: nearly twice as fast on CPUs and tensor cores, the same network."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    checkpoint_every_s: Positive = 20.0


class BaselineSection(_Section):
    """The network to beat: its given weights, fine-tuned first where `train` is there."""

    train: TrainSection | None = None


class PrefoldSection(_Section):
    """Which units become linear.

    `alpha` learns it, `fixed` anneals the given units to α=1, `closed_form` fits them by least squares, untrained.
    """

    method: Literal["alpha", "fixed", "closed_form"] = "alpha"
    units: Literal["all"] | tuple[str, ...] = "all"
    exclude: tuple[str, ...] = ()
    max_macs_ratio: Positive = 2.0
    """With units `all`: leave out a unit whose one convolution would need more than so many times its MACs."""
    lambda_c: Annotated[float, Field(ge=0)] = 0.25
    p: Annotated[float, Field(ge=1)] = 2.0
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.9
    alpha_init: Annotated[float, Field(ge=0, lt=1)] = 0.0
    alpha_lr: Positive | None = None
    anneal_fraction: Fraction = 0.5
    """Method `fixed`: the share of the fine-tuning by which the units' α have reached 1."""
    snap_at: Fraction | None = None
    """The share of the fine-tuning after which every α is fixed at 0 or 1, so that the rest trains what will fold."""
    penalty_weights: Literal["uniform", "macs"] = "uniform"
    ridge: Positive = 1e-3
    """Method `closed_form`: λ of the least squares, in units of the inputs' mean variance."""
    refit: Literal["none", "bias", "pointwise", "all"] = "none"
    """Method `closed_form`: which layers behind the first folded unit are fitted anew to the baseline's outputs."""
    distill: DistillSection | None = None
    train: TrainSection | None = None

    @model_validator(mode="after")
    def _methods_have_what_they_need(self) -> "PrefoldSection":
        if self.method != "alpha" and (self.units == "all" or not self.units):
            raise ValueError(f"prefold.method '{self.method}' needs prefold.units: the names of the units to fold")
        if self.method != "closed_form" and self.train is None:
            raise ValueError(f"prefold.method '{self.method}' needs prefold.train: epochs, lr, …")
        return self


class FoldSection(_Section):
    """How linear neighbours are merged (`pipeline.folding.fold`)."""

    border: Literal["approximate", "exact"] = "approximate"
    policy: Literal["always", "cheapest"] = "always"
    max_abs_error: Positive = 1e-2
    """Largest tolerated difference of logits between the linearised and the folded network."""


class PostfoldSection(_Section):
    """The fine-tuning after the fold; none where `train` is missing."""

    distill: DistillSection | None = None
    train: TrainSection | None = None


class ExportSection(_Section):
    """File formats to write."""

    formats: tuple[Literal["tflite", "onnx"], ...] = ("tflite", "onnx")


class QuantizeSection(_Section):
    """Static int8 after training; calibration images come from the training split by seed."""

    calibration_images: Count = 200
    equalise: bool = True
    """Cross-layer range equalisation before quantising; the float files stay as they are."""


class VerifySection(_Section):
    """What an exported file must keep; a breach is a red row and a non-zero exit."""

    batch_size: Count = 64
    fp32_min_agreement: Fraction = 0.995
    """Top-1 agreement of a float file with the torch model it came from."""
    int8_min_agreement: Fraction = 0.9
    int8_max_drop_points: Positive = 3.0
    """Largest accuracy loss of an int8 file against its own torch model, in percentage points."""


class BenchSection(_Section):
    """Where and how latency is measured."""

    targets: tuple[str, ...] = ("host-litert", "host-ort")
    precisions: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
    threads: Count = 1
    warmup: Annotated[int, Field(ge=0)] = 5
    runs: Count = 30
    restarts: Count = 3


class ReportSection(_Section):
    """What the table is set beside."""

    paper: str | None = None
    """A row of the Layer Folding paper's ImageNet table, e.g. `mobilenetv2_100`."""


class Recipe(_Section):
    """A whole run, from pretrained network to table."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: str = ""
    variant: Literal["full", "quick"] = "full"
    """Set by `--quick`, so that a short run is never taken for a full one."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelSection
    preprocess: PreprocessSection = PreprocessSection()
    data: DataSection
    baseline: BaselineSection = BaselineSection()
    prefold: PrefoldSection
    fold: FoldSection = FoldSection()
    postfold: PostfoldSection = PostfoldSection()
    export: ExportSection = ExportSection()
    quantize: QuantizeSection = QuantizeSection()
    verify: VerifySection = VerifySection()
    bench: BenchSection = BenchSection()
    report: ReportSection = ReportSection()
    quick: dict[str, Any] = {}
    """Dotted overrides that `--quick` applies before `--set`."""

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain data for YAML, JSON and hashing."""
        return self.model_dump(mode="json", exclude={"quick"})


def parse(raw: Mapping[str, Any], *, origin: str = "recipe") -> Recipe:
    """Checks a raw mapping against the schema; `origin` names the file in errors."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors()]
        raise RecipeError(
            f"{origin}: " + "; ".join(what for what, _ in problems),
            hint="; ".join(dict.fromkeys(hint for _, hint in problems if hint)),
        ) from error


def _explain(detail: Any) -> tuple[str, str]:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        known = _keys_beside(location)
        close = nearest(location[-1], known)
        return f"unknown key '{key}'" + (f", {close}" if close else ""), f"keys there: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"key '{key}' is missing", f"add '{key}'"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"]), ""
    return f"'{key}' is {detail['input']!r}: {detail['msg'][:1].lower()}{detail['msg'][1:]}", f"mend '{key}'"


def _keys_beside(location: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not inner:
            return []
        section = inner[0]
    return list(section.model_fields)
