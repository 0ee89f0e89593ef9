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
    "QatSection",
    "QuantizeSection",
    "Recipe",
    "ReportSection",
    "TrainSection",
    "VerifySection",
    "parse",
]

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from pipeline.errors import RecipeError, nearest
from pipeline.recipe_training import (
    BaselineSection,
    Count,
    DistillSection,
    Fraction,
    Positive,
    PostfoldSection,
    PrefoldSection,
    Section,
    TrainSection,
)


class ModelSection(Section):
    """Which network, and where its weights come from."""

    name: str
    num_classes: Count
    in_channels: Literal[3] = 3
    input_px: Annotated[int, Field(ge=8, le=1024)]
    weights: str = "auto"
    """`auto` (packaged, else the hub), `packaged`, `hub`, `none` (random), a checkpoint's path, or
    `package:NAME/PATH`, a file inside an installed package."""
    args: dict[str, str | int | float | bool] = Field(default_factory=dict)


class PreprocessSection(Section):
    """From picture to network input: the one spec that training, calibration, verify and metadata read."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    crop_fraction: Annotated[float, Field(gt=0, le=1)] = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class DataSection(Section):
    """Which images. `train` fits, `calibration` is drawn from train, `eval` is only ever evaluated."""

    name: str
    root: str | None = None
    fallback: str | None = None
    train_images: Count | None = None
    eval_images: Count | None = None
    adapt: bool = False
    """Take `model.num_classes` from the data set, and no batch larger than what there is to train on: for trials."""
    labelled: str | None = None
    """A second, labelled set that is only evaluated (`imagenet_samples`: 20 labelled ImageNet photos)."""


class FoldSection(Section):
    """How linear neighbours are merged (`pipeline.folding.fold`)."""

    border: Literal["approximate", "exact"] = "approximate"
    policy: Literal["always", "cheapest"] = "always"
    max_abs_error: Positive = 1e-2
    """Largest tolerated difference of logits between the linearised and the folded network."""


class ExportSection(Section):
    """File formats to write, what their input is, and what the census of a file may hold."""

    formats: Annotated[tuple[Literal["tflite", "onnx", "executorch"], ...], Field(min_length=1)] = ("tflite", "onnx")
    """`executorch` writes `.pte` files for the XNNPACK delegate (extra `executorch`)."""
    precisions: tuple[Literal["fp16", "dynamic"], ...] = ()
    """Files beside the float32 ones that need no calibration; static int8 is section `quantize`."""
    input: Literal["float", "uint8"] = "float"
    """`uint8`: the files take camera pixels, and `preprocess.mean` and `std` are folded into the first layer."""
    batch: Count = 1
    """Images of one inference, written into the files' input shape."""
    pads: Literal["keep", "enlarge"] = "keep"
    """`enlarge`: kernels grow by zeros where that makes TFLite's PAD operators needless; XNNPACK is faster with PAD."""
    gate: Literal["fail", "warn"] = "fail"
    """What transposes, float islands and operators outside the target's set do to the stage."""
    allow_operators: tuple[str, ...] = ()
    """Operator types, as `layerfold inspect` prints them, that the target runs beside the usual ones."""

    @model_validator(mode="after")
    def _precisions_are_of_formats(self) -> Self:
        if "executorch" in self.formats and self.precisions:
            raise ValueError(
                f"export.precisions asks for {', '.join(self.precisions)}, in which ExecuTorch files are not written: "
                "leave them out, or leave 'executorch' out of export.formats"
            )
        return self


class QatSection(Section):
    """Quantisation-aware training, distilled from the float network on training images; needs no labels."""

    steps: Count = 100
    batch_size: Count = 16
    lr: Positive = 1e-5


class QuantizeSection(Section):
    """Static int8; calibration images come from the training split by seed."""

    method: Literal["ptq", "qat"] = "ptq"
    """`qat`: the network is trained with int8 rounding in its forward pass before it is quantised."""
    calibration_images: Count = 200
    calibration_split: str = "calibration"
    """`calibration` (drawn from train) or `train`; the splits that judge the result are refused."""
    split_identity: bool = True
    """Folded residual kernels are rounded without their identity, which is added by an ADD operator: 4 bits finer."""
    equalise: bool = False
    """Cross-layer range equalisation before quantising; helps `per_channel=false`. The float files stay as they are."""
    bias_correction: bool = True
    """Takes the mean error of weight rounding out of every bias (empirical, layer by layer)."""
    per_channel: bool = True
    """One weight scale per output channel; one per tensor otherwise."""
    ranges: Literal["minmax", "percentile", "mse"] = "minmax"
    """How activation ranges are taken from what the calibration images show."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """With ranges `percentile`: the share of values kept, in per cent."""
    float_units: tuple[str, ...] = ()
    """Layers or units that stay float32, such as `blocks.3.2`."""
    qat: QatSection = QatSection()
    noise_images: Annotated[int, Field(ge=0)] = 8
    """Calibration images for the report's table of each unit's signal-to-noise ratio; 0 leaves the table out."""

    @model_validator(mode="after")
    def _calibration_never_judges(self) -> "QuantizeSection":
        if self.calibration_split not in ("calibration", "train"):
            raise ValueError(
                f"quantize.calibration_split is '{self.calibration_split}', expected 'calibration' or 'train': "
                "images that judge the result must not shape it"
            )
        return self


class VerifySection(Section):
    """What an exported file must keep; a breach is a red row and a non-zero exit."""

    batch_size: Count = 64
    fp32_min_agreement: Fraction = 0.995
    """Top-1 agreement of a float file with the torch model it came from."""
    fp32_max_relative_error: Positive = 1e-4
    """Largest logit difference of a float32 file over the largest logit of its torch model."""
    fp16_min_agreement: Fraction = 0.98
    int8_min_agreement: Fraction = 0.9
    """For static int8 and `dynamic` files."""
    int8_max_drop_points: Positive = 3.0
    """Largest accuracy loss of an int8 file against its own torch model, in percentage points."""
    second_opinion_min_agreement: Fraction = 0.8
    """Least top-1 agreement of the TFLite and the ONNX file of one model and precision with each other."""
    tensorflow: bool = False
    """Run every TFLite file by TensorFlow's own interpreter too (extra `tensorflow`), as a second opinion."""
    worst_images: Annotated[int, Field(ge=0)] = 5
    """How many images with the largest logit errors are listed for each file."""


class BenchSection(Section):
    """Where and how latency is measured."""

    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("host-litert", "host-ort")
    """Names that `layerfold targets list` shows, such as `emulated-arm64`, `android:SERIAL` or `ssh:user@board`."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of a target by its name in `targets`, such as `{"android:SERIAL": {accelerator: gpu, cores: [6, 7]}}`."""
    formats: tuple[Literal["tflite", "onnx"], ...] = ()
    """Formats to measure; empty takes every exported one that a target runs."""
    precisions: Annotated[tuple[Literal["fp32", "int8"], ...], Field(min_length=1)] = ("fp32", "int8")
    threads: Count = 1
    warmup: Annotated[int, Field(ge=0)] = 5
    runs: Count = 30
    restarts: Count = 3

    @model_validator(mode="after")
    def _options_are_of_targets(self) -> Self:
        for name in self.options:
            if name not in self.targets:
                raise ValueError(
                    f"bench.options names '{name}', which is not in bench.targets ({', '.join(self.targets)})"
                )
        return self


class ReportSection(Section):
    """What the table is set beside."""

    paper: str | None = None
    """A row of the Layer Folding paper's ImageNet table, e.g. `mobilenetv2_100`."""


class Recipe(Section):
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
    quick: dict[str, Any] = Field(default_factory=dict)
    """Dotted overrides that `--quick` applies before `--set`."""

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain data for YAML, JSON and hashing."""
        return self.model_dump(mode="json", exclude={"quick"})


def parse(raw: Mapping[str, Any], *, origin: str = "recipe") -> Recipe:
    """Checks a raw mapping against the schema; `origin` names the file in errors."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = list(dict.fromkeys(_explain(detail) for detail in error.errors()))
        raise RecipeError(
            f"{origin}: " + "; ".join(what for what, _ in problems),
            hint="; ".join(dict.fromkeys(hint for _, hint in problems if hint)),
        ) from error


# What pydantic puts into a key's path beside keys: which of several types it tried, and that it means the key itself.
_NO_KEY = re.compile(r"\[key\]|(literal|tuple|dict|constrained-\w+|function-\w+)\[.*|str|int|float|bool|none")


def _explain(detail: Any) -> tuple[str, str]:
    location = [str(part) for part in detail["loc"] if not _NO_KEY.fullmatch(str(part))]
    key, value = ".".join(location), detail.get("input")
    if detail["type"] == "extra_forbidden":
        known = _keys_beside(location)
        close = nearest(location[-1], known)
        return f"unknown key '{key}'" + (f", {close}" if close else ""), f"keys there: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"key '{key}' is missing", f"add '{key}'"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"]), ""
    if detail["type"] == "too_short":
        return f"'{key}' is empty", f"name at least {detail['ctx']['min_length']}, or leave '{key}' out for its default"
    if detail["type"] == "tuple_type":
        return f"'{key}' is {value!r}, expected a list", f"write {key}=[{'…' if value is None else value}]"
    return f"'{key}' is {value!r}: {detail['msg'][:1].lower()}{detail['msg'][1:]}", f"mend '{key}'"


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
