"""Pre-folding as a recipe asks for it: every option arrives, every method folds, curves and plot are written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline import facts, plan, recipe_files, runner
from pipeline.artifacts import StageOutput
from pipeline.errors import RecipeError, UnitError
from pipeline.models import store
from pipeline.recipe import parse
from pipeline.stages import fitting, postfold
from pipeline.stages.prefold import thinned

FILES = (("baseline", "baseline"), ("postfold", "folded"))
BLOCKS = ["blocks.1.1", "blocks.2.1"]


class Quiet:
    def stage_started(self, stage: plan.PlannedStage, *, resumed: bool) -> "Quiet":
        return self

    def stage_finished(self, stage: plan.PlannedStage, output: StageOutput, *, cached: bool) -> None: ...
    def progress(self, done: float, total: float, text: str = "") -> None: ...
    def say(self, text: str) -> None: ...


Run = Callable[..., dict[str, StageOutput]]


@pytest.fixture
def raw(image_folder: Path) -> dict[str, Any]:
    train = {"epochs": 2, "lr": 0.01, "batch_size": 8}
    return {
        "name": "tiny",
        "model": {"name": "mobilenetv2_cifar_035", "num_classes": 4, "input_px": 16, "weights": "none"},
        "data": {"name": "imagefolder", "root": str(image_folder)},
        "prefold": {"method": "fixed", "units": BLOCKS, "train": train},
        "postfold": {"train": dict(train)},
    }


@pytest.fixture
def run(raw: dict[str, Any], tmp_path: Path) -> Run:
    """Runs the recipe, with changes, as far as a stage; gives the stages' outputs."""

    def go(changes: dict[str, Any], last: str = "postfold") -> dict[str, StageOutput]:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(recipe_files.apply_overrides(raw, changes, origin="test")))
        planned = plan.build(recipe_files.load(str(path)), facts.gather(recipe_files.load(str(path)), say=print))
        stages = planned.stages[: planned.stage(last).index + 1]
        return dict(runner.execute(replace(planned, stages=stages), tmp_path / "run", Quiet()).outputs)

    return go


def test_every_training_option_reaches_the_loop(raw: dict[str, Any]) -> None:
    options: dict[str, Any] = {
        "epochs": 3, "batch_size": 12, "accumulate": 3, "lr": 0.5, "optimiser": "adamw", "momentum": 0.8,
        "weight_decay": 0.01, "schedule": "step", "warmup_epochs": 0.5, "label_smoothing": 0.1, "mixup": 0.2,
        "cutmix": 0.3, "ema_decay": 0.9, "patience": 4, "freeze_bn": True, "channels_last": False, "amp": "bf16",
        "compile": True, "checkpoint_every_s": 7.0,
    }  # fmt: skip
    distill = {"weight": 0.4, "temperature": 2.0, "features": "units", "feature_weight": 0.7}
    raw["prefold"] |= {"train": options | {"grad_clip_norm": 2.5, "randaugment": "rand-m5-n1"}, "distill": distill}
    recipe = parse(raw | {"seed": 5})
    assert recipe.prefold.train is not None
    config = fitting._config(recipe, recipe.prefold.train, recipe.prefold.distill, BLOCKS)
    for name, value in options.items():
        assert getattr(config, name) == value, name
    assert (config.grad_clip, config.distill_weight, config.distill_temperature) == (2.5, 0.4, 2.0)
    assert (config.feature_units, config.feature_weight, config.seed) == (tuple(BLOCKS), 0.7, 5)


def test_a_small_data_set_is_gone_through_until_the_least_steps_are_made(run: Run) -> None:
    # 40 images in batches of 8 are 5 steps an epoch: two epochs, unless 13 steps are asked for.
    small = {"epochs": 2, "lr": 0.01, "batch_size": 8}
    steps = {
        least: run({"prefold.train": small | {"min_steps": least}}, "prefold")["prefold"].metrics["details"]["history"]
        for least in (4, 13)
    }
    assert [rows[-1]["step"] for rows in steps.values()] == [10, 13]


def test_augmentation_early_stop_and_feature_distillation_run_and_leave_curves_and_plot(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train = {"epochs": 4, "lr": 0.01, "batch_size": 8, "accumulate": 2, "randaugment": "rand-m5-n1", "mixup": 0.3}
    train |= {"ema_decay": 0.9, "patience": 2, "holdout": 0.25, "label_smoothing": 0.1}
    outputs = run(
        {
            "prefold.train": train,
            "prefold.distill": {"weight": 0.5, "features": "units"},
            "prefold.anneal_order": "sequential",
            "prefold.units": BLOCKS[::-1],
            "postfold.distill": {"weight": 1.0, "features": "units"},
        }
    )
    stage = outputs["prefold"]
    assert stage.metrics["linear_units"] == BLOCKS
    rows = [row for row in stage.metrics["details"]["history"] if "epoch" in row]
    # 40 images less a quarter of the distinct ones: what is scored is not trained on.
    assert rows[0]["step"] <= 4 and all("evaluation" in row for row in rows)
    assert stage.file("alpha.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(stage.folder / "tensorboard")).Reload()
    curve = [event.value for event in events.Scalars(f"alpha/{BLOCKS[0]}")]
    assert curve[-1] == 1.0 and "evaluation/top1" in events.Tags()["scalars"]
    assert EventAccumulator(str(outputs["postfold"].folder / "tensorboard")).Reload().Scalars("train/loss")
    assert outputs["postfold"].metrics["units_folded"] == BLOCKS


@pytest.mark.parametrize("method", ["fixed", "alpha"])
def test_alpha_can_start_from_the_closed_form(run: Run, method: str) -> None:
    changes = {"prefold.init": "closed_form", "prefold.fit_images": 24, "prefold.method": method}
    learned = {"prefold.alpha_init": 0.5, "prefold.alpha_lr": 0.5, "prefold.lambda_c": 50.0}
    outputs = run(changes | (learned if method == "alpha" else {}))
    metrics = outputs["prefold"].metrics
    assert set(metrics["details"]["fits"]) == set(BLOCKS)
    assert metrics["linear_units"] == BLOCKS == outputs["fold"].metrics["units_folded"]
    assert outputs["fold"].metrics["changed_predictions"] == 0
    settled = torch.load(outputs["prefold"].file("settled.pt"), weights_only=False)
    assert settled is not None
    counts = outputs["postfold"].metrics["counts"]
    assert counts["depth"] == outputs["baseline"].metrics["counts"]["depth"] - 4


def test_a_closed_form_may_use_crops_and_windows(run: Run) -> None:
    changes = {"prefold.method": "closed_form", "prefold.train": None, "prefold.fit_crops": 2}
    plain = run(changes, last="prefold")["prefold"].metrics["details"]
    tuned = run(changes | {"prefold.window_steps": 4}, last="prefold")["prefold"].metrics["details"]
    assert plain["windows"] == []
    assert sorted(unit for window in tuned["windows"] for unit in window["units"]) == BLOCKS
    assert all(window["after"] <= window["before"] and len(window["layers"]) > 1 for window in tuned["windows"])


def test_a_closed_form_may_train_on(run: Run) -> None:
    outputs = run({"prefold.method": "closed_form", "prefold.distill": {"weight": 1.0}}, last="fold")
    assert outputs["prefold"].metrics["details"]["history"]
    assert outputs["fold"].metrics["units_folded"] == BLOCKS


def test_an_alpha_for_each_layer_folds_whole_units_only(run: Run) -> None:
    names = ["layer1.0.act1", "layer1.0.act2", "layer2.0.act1"]
    outputs = run(
        {"model.name": "cifar_resnet20", "prefold.per": "layer", "prefold.units": names, "prefold.ring": True},
        last="prefold",
    )
    assert list(outputs["prefold"].metrics["alphas"]) == names
    assert outputs["prefold"].metrics["linear_units"] == ["layer1.0", "layer2.0"]
    assert outputs["prefold"].metrics["counts"]["depth"] == 19 - 3


def test_a_block_that_keeps_its_last_activation_counts_as_folded(run: Run) -> None:
    changes = {"model.name": "cifar_resnet20", "prefold.units": ["layer1.1", "layer2.0"]}
    outputs = run(changes | {"postfold.distill": {"weight": 0.5, "features": "units"}})
    assert outputs["fold"].metrics["units_folded"] == ["layer1.1", "layer2.0"]
    baseline, folded = (store.load(outputs[s].file(f"models/{n}.pt")).module for s, n in FILES)
    assert postfold._outputs(folded, baseline, ["layer1.1", "layer2.0"]) == ["layer1.1.act2", "layer2.0.act2"]
    assert outputs["fold"].metrics["units_skipped"] == {} and outputs["fold"].metrics["max_abs_error"] < 1e-4


def test_all_layers_of_a_network_with_blocks_are_candidates(raw: dict[str, Any]) -> None:
    from pipeline.models import zoo
    from pipeline.stages.prefold import candidates

    raw["prefold"] = {"per": "layer", "train": {"epochs": 1, "lr": 0.1}}
    for name, count in (("cifar_resnet20", 19), ("cifar_vgg16", 8), ("mlp_5", 4)):
        model = zoo.create(name, num_classes=4, input_px=32)
        assert len(candidates(parse(raw), model)) == count


@pytest.mark.parametrize(("name", "px"), [("mlp_4", 16), ("cifar_vgg16", 32)])
def test_savings_weigh_units_that_are_activations(raw: dict[str, Any], name: str, px: int) -> None:
    from pipeline.models import zoo
    from pipeline.stages.prefold import candidates, penalty_weights

    raw["model"] |= {"name": name, "input_px": px}
    raw["prefold"] = {"penalty_weights": "macs", "train": {"epochs": 1, "lr": 0.1}}
    recipe, model = parse(raw), zoo.create(name, num_classes=4, input_px=px)
    units = candidates(recipe, model)
    weights = penalty_weights(recipe, model, units)
    assert weights is not None and list(weights) == [unit.name for unit in units]
    if name == "mlp_4":  # 3·16·16 → 256 → 256 → 256 → 4: an activation that goes merges the layers beside it
        widths = [3 * 16 * 16, 256, 256, 256, 4]
        saved = [a * b + b * c - a * c for a, b, c in zip(widths, widths[1:], widths[2:], strict=False)]
        mean = sum(saved) / len(saved)
        assert list(weights.values()) == pytest.approx([one / mean for one in saved])


def test_penalty_weights_that_cannot_be_are_found_before_the_run(raw: dict[str, Any]) -> None:
    from pipeline import preflight

    raw["prefold"] |= {"penalty_weights": "latency", "latency_saved_ms": {"blocks.1.1": 1.0}}
    with pytest.raises(UnitError, match=r"no entry for unit 'blocks\.2\.1'"):
        preflight.check(parse(raw), load_weights=False)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prefold.train.accumulate": 3}, RecipeError, "accumulate is 3"),
        ({"prefold.train.mixup": 0.1, "prefold.train.accumulate": 8}, RecipeError, "pair images"),
        ({"prefold.penalty_weights": "latency"}, RecipeError, "latency_saved_ms"),
        (
            {"model.name": "mlp_3", "prefold.units": ["act1"], "prefold.distill": {"weight": 1, "features": "units"}},
            RecipeError,
            "prefold.distill.features is 'units', but unit 'act1' is an activation",
        ),
        (
            {"model.name": "mlp_3", "prefold.units": ["act1"], "postfold.distill": {"weight": 1, "features": "units"}},
            RecipeError,
            "postfold.distill.features is 'units', but unit 'act1'",
        ),
        (
            {"postfold.distill": {"weight": 1, "features": ["blocks.1.9"]}},
            RecipeError,
            r"postfold.distill.features: .* no module 'blocks\.1\.9'",
        ),
        ({"prefold.method": "alpha", "prefold.train.patience": 2}, RecipeError, "needs prefold.snap_at below 1"),
        (
            {"prefold.anneal_fraction": 1.0, "prefold.train.patience": 2},
            RecipeError,
            "needs prefold.anneal_fraction below 1",
        ),
        ({"prefold.per": "layer", "prefold.init": "closed_form"}, RecipeError, "whole units"),
        ({"prefold.train.randaugment": "cutout"}, Exception, "RandAugment policy"),
        (
            {"model.name": "cifar_resnet20", "prefold.units": ["layer1.1"], "prefold.init": "closed_form"},
            UnitError,
            "layer1.1",
        ),
        (
            {"prefold.penalty_weights": "latency", "prefold.latency_saved_ms": {"blocks.1.1": 1.0}},
            UnitError,
            "no entry for unit 'blocks.2.1'",
        ),
    ],
)
def test_what_does_not_fit_is_named(run: Run, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(changes, last="prefold")


def test_a_thinned_trace_ends_where_the_trace_ends() -> None:
    trace = [{"step": step, "alphas": {"a": step / 997}} for step in range(1, 998)]
    short = thinned(trace, 50)
    assert len(short) <= 50 and short[-1] == {"step": 997, "alphas": {"a": 1.0}}
    assert thinned([]) == []
