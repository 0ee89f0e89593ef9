"""The sections of a recipe that say how networks are trained: baseline, pre-folding, post-folding."""

__all__ = [
    "BaselineSection",
    "Count",
    "DistillSection",
    "Fraction",
    "Positive",
    "PostfoldSection",
    "PrefoldSection",
    "Section",
    "TrainSection",
]

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, and nothing changes after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DistillSection(Section):
    """Knowledge distillation from the baseline: (1−weight)·task + weight·KL + feature_weight·feature distance."""

    weight: Fraction
    """Without labels it must be 1."""
    temperature: Positive = 1.0
    features: Literal["none", "units"] | tuple[str, ...] = "none"
    """Modules whose outputs follow the baseline's: `units` are the blocks in question, else names of any modules."""
    feature_weight: Positive = 1.0


class TrainSection(Section):
    """One fine-tuning: how long, how fast, with what regularisation."""

    epochs: Positive
    min_steps: Count | None = None
    """Optimiser steps to make at least: a small data set is gone through more often than `epochs` says."""
    batch_size: Count = 128
    accumulate: Count = 1
    """Parts in which a batch goes through the network, to save memory; a divisor of `batch_size`."""
    lr: Positive
    optimiser: Literal["sgd", "adamw"] = "sgd"
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "step", "onecycle", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Fraction = 0.0
    randaugment: str | None = None
    """timm's notation, such as `rand-m9-mstd0.5-inc1`."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """α of mixup's beta distribution; 0 is off."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """α of CutMix's beta distribution; 0 is off."""
    ema_decay: Fraction | None = None
    """Decay of the moving average of weights that is kept instead of the last weights."""
    grad_clip_norm: Positive | None = None
    patience: Count | None = None
    """Stop when so many epochs in a row were no better on the held-out images; the best epoch is kept.

    In `prefold` only epochs after α came to rest count: learned α need `snap_at`.
    """
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """With `patience`: the share of the training images that is scored on instead of trained on."""
    freeze_bn: bool = False
    channels_last: bool = True
    """NHWC memory order: nearly twice as fast on CPUs and tensor cores, the same network."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    compile: bool = False
    """Runs the network through torch.compile."""
    checkpoint_every_s: Positive = 20.0

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainSection":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.accumulate is {self.accumulate}, expected a divisor of batch_size {self.batch_size}"
            )
        if (self.mixup or self.cutmix) and (self.batch_size // self.accumulate) % 2:
            raise ValueError("train.mixup and train.cutmix pair images: they need an even batch_size / accumulate")
        return self


class BaselineSection(Section):
    """The network to beat: its given weights, fine-tuned first where `train` is there."""

    train: TrainSection | None = None


class PrefoldSection(Section):
    """Which units become linear.

    `alpha` learns it, `fixed` anneals the given units to α=1, `closed_form` fits them by least squares, untrained.
    """

    method: Literal["alpha", "fixed", "closed_form"] = "alpha"
    init: Literal["network", "closed_form"] = "network"
    """What α fades a unit into: its own layers without activations, or the one convolution that least squares fits."""
    units: Literal["all"] | tuple[str, ...] = "all"
    per: Literal["unit", "layer"] = "unit"
    """`layer`: an α for each activation; with units `all`, each of the whole network, as in the paper's ResNets."""
    ring: bool = True
    """Zero padding inside a unit follows α, so that what is trained is what folds; false is the published method."""
    exclude: tuple[str, ...] = ()
    max_macs_ratio: Positive = 2.0
    """With units `all`: leave out a unit whose one convolution would need more than so many times its MACs."""
    lambda_c: Annotated[float, Field(ge=0)] = 0.25
    lambda_warmup: Fraction = 0.0
    """The share of the fine-tuning over which λ_c rises from 0."""
    p: Annotated[float, Field(ge=1)] = 2.0
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.9
    alpha_init: Annotated[float, Field(ge=0, lt=1)] = 0.0
    alpha_lr: Positive | None = None
    anneal_fraction: Fraction = 0.5
    """Method `fixed`: the share of the fine-tuning by which the units' α have reached 1."""
    anneal_order: Literal["together", "sequential"] = "together"
    """Method `fixed`: `sequential` brings one unit after another to 1, in the order of `units`."""
    snap_at: Fraction | None = None
    """The share of the fine-tuning after which every α is fixed at 0 or 1, so that the rest trains what will fold."""
    penalty_weights: Literal["uniform", "macs", "latency"] = "uniform"
    """c_l of the penalty: 1 (the paper), or by what folding the unit saves."""
    latency_saved_ms: dict[str, float] = {}
    """With penalty_weights `latency`: milliseconds that folding saves on the target, by unit."""
    ridge: Positive = 1e-3
    """Method or init `closed_form`: λ of the least squares, in units of the inputs' mean variance."""
    fit_images: Count | None = None
    """Method or init `closed_form`: how many training images the least squares see; all of them unless given."""
    refit: Literal["none", "bias", "pointwise", "all"] = "none"
    """Method `closed_form`: which layers behind the first folded unit are fitted anew to the baseline's outputs."""
    fit_crops: Count = 1
    """Method or init `closed_form`: random crops of each image."""
    window_steps: Annotated[int, Field(ge=0)] = 0
    """Method `closed_form`: steps of fine-tuning of each unit with the block behind it, on the baseline's values there;
    300 is a good start, 0 is off."""
    distill: DistillSection | None = None
    train: TrainSection | None = None

    @field_validator("units", "exclude", mode="before")
    @classmethod
    def _one_name_is_a_list_of_one(cls, value: object) -> object:
        """`--set prefold.units=blocks.1.1`, or several with commas; whether the model has them is checked with it."""
        if not isinstance(value, str) or value == "all":
            return value
        return [name.strip() for name in value.split(",") if name.strip()]

    @model_validator(mode="after")
    def _methods_have_what_they_need(self) -> "PrefoldSection":
        if self.method != "alpha" and (self.units == "all" or not self.units):
            raise ValueError(f"prefold.method '{self.method}' needs prefold.units: the names of the units to fold")
        if self.method != "closed_form" and self.train is None:
            raise ValueError(f"prefold.method '{self.method}' needs prefold.train: epochs, lr, …")
        rests_at = self.snap_at if self.method == "alpha" else max(self.anneal_fraction, self.snap_at or 0.0)
        stops_early = self.method != "closed_form" and self.train is not None and self.train.patience is not None
        if stops_early and (rests_at is None or rests_at >= 1.0):
            below = "prefold.snap_at" if self.method == "alpha" else "prefold.anneal_fraction"
            raise ValueError(
                f"prefold.train.patience compares epochs after α came to rest: it needs {below} below 1, such as 0.5"
            )
        if self.penalty_weights == "latency" and not self.latency_saved_ms:
            raise ValueError("prefold.penalty_weights 'latency' needs prefold.latency_saved_ms: ms by unit")
        if self.per == "layer" and (self.method == "closed_form" or self.init == "closed_form"):
            raise ValueError("a closed form fits whole units, so it cannot go with prefold.per 'layer'")
        if self.per == "layer" and self.penalty_weights != "uniform":
            raise ValueError("savings belong to units, so prefold.per 'layer' needs prefold.penalty_weights 'uniform'")
        return self


class PostfoldSection(Section):
    """The fine-tuning after the fold; none where `train` is missing."""

    distill: DistillSection | None = None
    train: TrainSection | None = None
