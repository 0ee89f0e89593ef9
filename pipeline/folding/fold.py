"""Folding: merge the linear neighbours of a model into single convolutions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from pipeline.errors import UnitError, nearest
from pipeline.folding.checks import check_one_of
from pipeline.folding.emit import Segment, emit
from pipeline.folding.graph import Region, find_regions
from pipeline.folding.layers import Layer, read_layers, ring_entries
from pipeline.folding.partition import Partition, partition
from pipeline.folding.rules import Border, LatencyModel, Policy, Rules
from pipeline.folding.trace import module_path, trace
from pipeline.folding.units import linearised

__all__ = ["FoldResult", "Segment", "Skipped", "fold"]


@dataclass(frozen=True)
class Skipped:
    """A linear region, or a named unit, that is not one convolution; `names` are its layers."""

    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class FoldResult:
    """What `fold` returns.

    Args:
        model: The folded model in evaluation mode: a `torch.fx.GraphModule` of plain layers. It can be copied,
            pickled, trained, exported.
        max_abs_error: Largest difference to the given model on the example input, in the model's dtype.
        segments: What was merged, in network order.
        skipped: Linear regions left as several layers, and named units that are not one, each with its reason.
    """

    model: fx.GraphModule
    max_abs_error: float
    segments: tuple[Segment, ...]
    skipped: tuple[Skipped, ...]


def fold(
    model: nn.Module,
    example_input: Tensor,
    *,
    border: Border = "approximate",
    policy: Policy = "always",
    latency: LatencyModel | None = None,
    units: Collection[str] | None = None,
    norms: str = "fuse",
) -> FoldResult:
    """Merges the linear neighbours of a model.

    Every maximal region of affine layers with one entry and one exit is cut into pieces, and each piece becomes
    one convolution. Sums are done in float64 and rounded once to the model's dtype.

    Args:
        model: A traceable model; not changed. Activations meant to go must be gone (`linearise`,
            `pipeline.alpha.settle`).
        example_input: Tensor[1, C, H, W] of the model's dtype and device. Its size sets the MACs, not what the
            folded model accepts.
        border: "approximate" composes kernels as the papers do, which changes values near the image's border
            where a padded layer follows one with a bias. "exact" keeps every value at every input size: a
            bias map is added where that suffices, and what no single convolution can do is left unmerged and
            listed in `skipped`. Ring padding (`pipeline.alpha`) makes plain composition exact.
        policy: "always" makes as few layers as possible; "cheapest" as few MACs, or as little time.
        latency: Time of a convolution, called with its spec and its input's height and width; used by
            "cheapest" in place of MACs. Any unit.
        units: Names of units or activations. Convolutions that follow each other are then merged only inside
            one of these units or across one of these activations; everywhere else norms and reparameterised
            branches are fused and nothing more. None means the units that `linearise` took the activations from where
            the network is made of published blocks (`Unit.kind`), and no limit otherwise. (Without a limit the linear
            bottleneck of a MobileNetV2 makes one dense region of a projection and the next block's expansion; name
            the module around the blocks to have that.)
        norms: "fuse", or "keep" to leave each BatchNorm outside the named units in place, for training after
            the fold.

    Returns:
        The folded model and a record of what was done.

    Raises:
        TraceError: The model cannot be traced.
        UnitError: A name in `units` is no module of the model.
        FoldError: An option has no such value, ring padding is left without the layers that supply it, or `latency`
            has no entry.
    """
    check_one_of("border", border, get_args(Border))
    check_one_of("policy", policy, get_args(Policy))
    check_one_of("norms", norms, ("fuse", "keep"))
    units = [units] if isinstance(units, str) else units
    if units is None:
        units = linearised(model) or None
    known = dict(model.named_modules(remove_duplicate=False))
    for unit in units or ():
        if unit not in known:
            raise UnitError(f"unit {unit!r} is no module of {type(model).__name__}", hint=nearest(unit, known))
    traced = trace(model, example_input)
    layers = read_layers(traced)
    if norms == "keep":
        kept = _kept_norms(layers, traced, units or ())
        layers = {node: layer for node, layer in layers.items() if node not in kept}
    rules = Rules(policy, border, layers, units, latency, ring_entries(traced))
    cuts = [(region, partition(region, rules)) for region in find_regions(traced.graph, layers)]
    skipped = [skip for region, cut in cuts if (skip := _split_region(region, cut, layers)) is not None]
    skipped += [Skipped((name,), reason) for name, reason in traced.meta["opaque"].items()]
    skipped += _split_units(units or (), traced, layers, [cut for _, cut in cuts])
    with torch.no_grad():
        expected = tree_leaves(traced(example_input))
        segments = emit([piece for _, cut in cuts for piece in cut.pieces], traced, rules)
        got = tree_leaves(traced(example_input))
    errors = [
        float((after - before).abs().max())
        for before, after in zip(expected, got, strict=True)
        if isinstance(before, Tensor) and before.numel()
    ]
    return FoldResult(traced, max(errors, default=0.0), tuple(segments), tuple(skipped))


def _split_region(region: Region, cut: Partition, layers: Mapping[fx.Node, Layer]) -> Skipped | None:
    """A region that holds several windowed layers and did not become one."""
    windows = [node for node in region.nodes if layers[node].is_window]
    parts = sum(any(layers[node].is_window for node in piece.nodes) for piece in cut.pieces)
    if not cut.reason or len(windows) < 2:
        return None
    return Skipped(tuple(module_path(node) for node in windows), f"stays {parts} layers: {cut.reason}")


def _split_units(
    units: Collection[str], traced: fx.GraphModule, layers: Mapping[fx.Node, Layer], cuts: list[Partition]
) -> list[Skipped]:
    """Named units whose layers are not all in one piece, for a reason that no region tells: they are not linear."""
    found = []
    for unit in units:
        inside = [
            node for node in traced.graph.nodes if node.op == "call_module" and str(node.target).startswith(f"{unit}.")
        ]
        windows = {node for node in inside if node in layers and layers[node].is_window}
        # What follows the last window, as the activation after a residual sum does, parts no two of them.
        last = max((place for place, node in enumerate(inside) if node in windows), default=0)
        foreign = [str(node.target) for node in inside[:last] if node not in layers]
        in_one = any(windows <= set(piece.nodes) for cut in cuts for piece in cut.pieces)
        if foreign and len(windows) > 1 and not in_one:
            found.append(Skipped((unit,), f"{', '.join(foreign)} inside it is not linear"))
    return found


def _kept_norms(layers: Mapping[fx.Node, Layer], traced: fx.GraphModule, units: Collection[str]) -> set[fx.Node]:
    """Norms outside the named units; one between a named activation and the convolutions beside it is inside."""
    norms = {node for node in layers if node.op == "call_module" and _is_norm(node, traced)}
    norms = {node for node in norms if not any(str(node.target).startswith(f"{unit}.") for unit in units)}
    inside: set[fx.Node] = set()
    for node in layers:
        if module_path(node) not in units:
            continue
        for towards in (lambda one: one.all_input_nodes, lambda one: list(one.users)):
            here: list[fx.Node] = towards(node)
            while len(here) == 1 and here[0] in layers and not layers[here[0]].is_window:
                inside.add(here[0])
                here = towards(here[0])
    return norms - inside


def _is_norm(node: fx.Node, traced: fx.GraphModule) -> bool:
    return isinstance(traced.get_submodule(str(node.target)), nn.modules.batchnorm._BatchNorm)
