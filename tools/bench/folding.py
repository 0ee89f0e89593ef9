"""Time to fold MobileNetV2-1.0's five published units, against probing each unit with impulses.

    python tools/bench/folding.py --rounds 7 --out tools/bench/results/folding.json

Ways to the same five convolutions, interleaved:

- `fold`: `pipeline.folding.fold` of the whole network as users call it: trace, find all regions, fuse every norm, fold
  the units, and compare the folded network with the given one on a 224-px example.
- `fold_blocks`: `fold` of the five blocks alone, which is what the two ways below do (they check nothing).
- `impulses`: each linearised unit is run on one unit impulse per input channel, its response read off. (Needs no
  gradients; one forward pass of C_in images.)
- `probing`: the kernel as the gradient of the centre of the unit's response to a zero input, one backward pass per
  output channel, the bias as that response; what public code for this method does.

Times are processor time of one thread: wall time on a shared machine measures the neighbours. All ways are checked
against each other in float64 before anything is timed.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.folding import find_units, fold, linearise
from pipeline.models import zoo

PUBLISHED = (2, 4, 8, 9, 10)
KERNEL = 3


def impulses(block: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Weight [out, in, 3, 3] and bias [out] of a linear block of stride 1, from its response to unit impulses."""
    size = 2 * KERNEL + 1
    like = next(block.parameters())
    still = torch.zeros(1, channels, size, size, dtype=like.dtype)
    images = torch.zeros(channels, channels, size, size, dtype=like.dtype)
    images[range(channels), range(channels), KERNEL, KERNEL] = 1
    with torch.no_grad():
        base = block(still)
        response = block(images) - base
    low, high = KERNEL - KERNEL // 2, KERNEL + KERNEL // 2 + 1
    return response[:, :, low:high, low:high].flip(2, 3).transpose(0, 1), base[0, :, KERNEL, KERNEL]


def probing(block: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """The same by one backward pass per output channel."""
    size = 2 * KERNEL + 1
    like = next(block.parameters())
    image = torch.zeros(1, channels, size, size, dtype=like.dtype, requires_grad=True)
    centre = block(image)[0, :, KERNEL, KERNEL]
    rows = [torch.autograd.grad(value, image, retain_graph=True)[0][0] for value in centre]
    low, high = KERNEL - KERNEL // 2, KERNEL + KERNEL // 2 + 1
    return torch.stack(rows)[:, :, low:high, low:high], centre.detach()


def strided(block: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) and part.stride != (1, 1) for part in block.modules())


def check(model: nn.Module, names: list[str], blocks: dict[str, tuple[nn.Module, int]]) -> float:
    """Largest difference between the three ways in float64."""
    double = model.double()
    folded = fold(linearise(double, names), torch.randn(1, 3, 64, 64, dtype=torch.float64), units=names).model
    worst = 0.0
    for name, (_, channels) in blocks.items():
        block = linearise(double, names).get_submodule(name)
        conv = folded.get_submodule(name)
        for way in (impulses, probing):
            weight, bias = way(block, channels)
            worst = max(
                worst, *(float((a - b).detach().abs().max()) for a, b in ((weight, conv.weight), (bias, conv.bias)))
            )
    model.float()
    return worst


def measure(rounds: int) -> dict[str, object]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = zoo.create("mobilenetv2_100", num_classes=1000).eval()
    names = [find_units(model)[index].name for index in PUBLISHED]
    linear = linearise(model, names)
    # Probing as the papers' code has it reads the response to zeros at stride 1; units with a stride are left out of
    # it, which is in its favour.
    blocks = {}
    for name in names:
        block = linear.get_submodule(name)
        if not strided(block):
            first = next(part for part in block.modules() if isinstance(part, nn.Conv2d))
            blocks[name] = (block, first.in_channels)
    difference = check(model, names, blocks)
    example = torch.randn(1, 3, 224, 224)
    maps = {name: torch.randn(1, channels, 7, 7) for name, (_, channels) in blocks.items()}
    ways: dict[str, Callable[[], object]] = {
        "fold": lambda: fold(linear, example, units=names),
        "fold_blocks": lambda: [fold(blocks[name][0], maps[name]) for name in blocks],
        "impulses": lambda: [impulses(*blocks[name]) for name in blocks],
        "probing": lambda: [probing(*blocks[name]) for name in blocks],
    }
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in order:
            start = time.thread_time()
            ways[name]()
            seconds[name].append(time.thread_time() - start)
    ratios = [a / b for a, b in zip(seconds["fold_blocks"], seconds["probing"], strict=True)]
    return {
        "command": f"python tools/bench/folding.py --rounds {rounds} --out tools/bench/results/folding.json",
        "units": names,
        "units_probed": list(blocks),
        "rounds": rounds,
        "median_cpu_s": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "fold_blocks_over_probing": round(statistics.median(ratios), 3),
        "largest_difference_float64": difference,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.rounds)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
