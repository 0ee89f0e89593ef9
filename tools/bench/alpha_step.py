"""Time of one α-training step against one plain fine-tuning step, ring padding on and off.

    python tools/bench/alpha_step.py --out tools/bench/results/alpha_step.json

Steps of all variants are interleaved, in an order that turns round by round, so that load from outside falls on
all alike. Times are processor time of one thread: wall time on a shared machine measures the neighbours. The
figures are medians of each round's ratio to its own plain step.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pipeline import alpha
from pipeline.models import zoo
from pipeline.training.config import FitConfig
from pipeline.training.memory import kept_pages
from pipeline.training.optimiser import build

PUBLISHED = ["blocks.1.1", "blocks.2.1", "blocks.3.2", "blocks.3.3", "blocks.4.0"]


def stepper(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, schedule: alpha.AlphaSchedule | None
) -> Callable[[], None]:
    """One whole optimiser step as `fit` does it: schedule, forward, backward, penalty, update, clamp."""
    model.train()
    optimiser = build(model, FitConfig(epochs=1, lr=1e-3, weight_decay=1e-5), None)

    def step() -> None:
        if schedule is not None:
            alpha.apply_(model, schedule, 0.5)
        optimiser.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        if schedule is not None:
            (schedule.lambda_at(0.5) * alpha.penalty(model)).backward()
        optimiser.step()
        if schedule is not None:
            alpha.clamp_(model)

    return step


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = zoo.create(arguments.model, num_classes=1000, input_px=arguments.px)
    images = torch.randn(arguments.batch, 3, arguments.px, arguments.px)
    labels = torch.randint(0, 1000, (arguments.batch,))
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    model, images = model.to(memory_format=layout), images.contiguous(memory_format=layout)
    schedule = alpha.AlphaSchedule()
    every = list(alpha.values(alpha.attach(model, "all")))
    half = dict.fromkeys(every, 0.5)
    variants = {
        "plain": (alpha.settle(alpha.attach(model, "all")), None),
        "all units, no ring": (alpha.set_values(alpha.attach(model, "all", ring=False), half), schedule),
        "all units, ring": (alpha.set_values(alpha.attach(model, "all"), half), schedule),
        "five units, ring": (alpha.set_values(alpha.attach(model, PUBLISHED), 0.5), schedule),
    }
    steps = {name: stepper(network, images, labels, plan) for name, (network, plan) in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(arguments.warmup + arguments.rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            steps[name]()
            if turn >= arguments.warmup:
                times[name].append(1e3 * (time.process_time() - start))
    rows = {}
    for name, taken in times.items():
        ratios = [own / plain for own, plain in zip(taken, times["plain"], strict=True)]
        rows[name] = {
            "step_cpu_ms_median": round(statistics.median(taken), 1),
            "ratio_median": round(statistics.median(ratios), 4),
            "ratio_p10": round(statistics.quantiles(ratios, n=10)[0], 4),
            "ratio_p90": round(statistics.quantiles(ratios, n=10)[-1], 4),
        }
    return {
        "model": arguments.model,
        "input_px": arguments.px,
        "batch": arguments.batch,
        "threads": 1,
        "channels_last": arguments.channels_last,
        "keep_pages": arguments.keep_pages,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "load_average": round(os.getloadavg()[0], 2),
        "units": len(every),
        "variants": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--keep-pages", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with kept_pages("cpu" if arguments.keep_pages else "none"):
        result = measure(arguments)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
