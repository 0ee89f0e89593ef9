"""How long a recipe's stages will take here, from a few timed steps of its own model on this machine."""

__all__ = ["estimate_seconds"]

import time

import torch
from torch import nn

from pipeline.models import zoo
from pipeline.recipe import Recipe, TrainSection
from pipeline.stages import fitting, workbench

# Seconds that conversion and quantisation of one model took on two cores, little dependent on the model's size.
_CONVERT_S = {"tflite": 20.0, "onnx": 11.0, "executorch": 20.0}
_QUANTISE_S = 5.0
_SECONDS_PER_TIMING = 1.5
_PROBE_IMAGES = 16


def estimate_seconds(recipe: Recipe) -> dict[str, float]:
    """Estimated wall time of every stage, in seconds; rough, since other work on the machine counts too."""
    section = recipe.model
    model = zoo.create(
        section.name,
        num_classes=section.num_classes,
        in_chans=section.in_channels,
        input_px=section.input_px,
        args=section.args,
    )
    on = workbench.device(recipe)
    model.to(on)
    images = torch.randn(_PROBE_IMAGES, section.in_channels, section.input_px, section.input_px, device=on)
    forward_s = _per_image(model, images, backward=False)
    step_s = _per_image(model, images, backward=True)
    source = workbench.split(recipe, "train")
    eval_images = len(workbench.split(recipe, "eval"))

    def fitting_s(train: TrainSection | None, distilled: bool) -> float:
        if train is None:
            return 0.0
        return fitting.epochs(train, source) * len(source) * (step_s + (forward_s if distilled else 0.0))

    evaluation_s = eval_images * forward_s
    formats = recipe.export.formats
    timed_runs = recipe.bench.restarts * (recipe.bench.runs + recipe.bench.warmup) * 2 * len(recipe.bench.precisions)
    return {
        "baseline": fitting_s(recipe.baseline.train, False) + evaluation_s,
        "prefold": fitting_s(recipe.prefold.train, recipe.prefold.distill is not None) + evaluation_s,
        "fold": 2 * evaluation_s + 2,
        "postfold": fitting_s(recipe.postfold.train, recipe.postfold.distill is not None) + evaluation_s,
        "export": 2 * sum(_CONVERT_S[name] for name in formats),
        "quantize": 2 * len(formats) * (_QUANTISE_S + recipe.quantize.calibration_images * forward_s),
        "verify": 2 * (1 + 2 * len(formats)) * evaluation_s,
        "bench": len(recipe.bench.targets) * (timed_runs * forward_s + 3 * recipe.bench.restarts),
        "report": 1.0,
    }


def _per_image(model: nn.Module, images: torch.Tensor, *, backward: bool) -> float:
    model.train(backward)

    def step() -> None:
        if backward:
            model(images).square().mean().backward()
        else:
            with torch.no_grad():
                model(images)

    step()
    started = time.perf_counter()
    count = 0
    while count == 0 or time.perf_counter() - started < _SECONDS_PER_TIMING:
        step()
        count += 1
    return (time.perf_counter() - started) / (count * len(images))
