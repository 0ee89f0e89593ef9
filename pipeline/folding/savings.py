"""What folding a unit saves: its multiply-accumulates as it is and as one convolution, without composing a kernel."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx, nn

from pipeline.folding.algebra import AffineConv
from pipeline.folding.graph import find_regions
from pipeline.folding.layers import Layer, read_layers, ring_entries
from pipeline.folding.partition import partition
from pipeline.folding.rules import Rules
from pipeline.folding.trace import shape_of, trace
from pipeline.folding.units import Unit

__all__ = ["unit_macs"]


def unit_macs(model: nn.Module, units: Iterable[Unit], example_input: Tensor) -> dict[str, tuple[int, int]]:
    """MACs of one image in the layers that each unit alone would merge, and of the convolution they become.

    A unit that is one activation merges the layers on both sides of it, and one that stands between two others
    shares its layers with theirs: what several of them save together is not the sum.

    Args:
        model: A traceable model, activations in place; not changed.
        units: Some of what `find_units` finds in it.
        example_input: Tensor[1, C, H, W]; its size sets the MACs.

    Returns:
        (before, after) by name of the unit; (0, 0) where nothing would be merged.

    Raises:
        TraceError: The model cannot be traced.
    """
    traced = trace(model, example_input)
    layers = read_layers(traced)
    entries = ring_entries(traced)
    found = {}
    for unit in units:
        gone = [n for n in traced.graph.nodes if n.op == "call_module" and str(n.target) in unit.activations]
        linear = {**layers, **{node: _identity(node) for node in gone}}
        rules = Rules("always", "approximate", linear, [unit.name], None, entries)
        before = after = 0
        for region in find_regions(traced.graph, linear):
            if not any(node in gone for node in region.nodes):
                continue
            for piece in partition(region, rules).pieces:
                windows = [linear[node] for node in piece.nodes if linear[node].is_window]
                if len(windows) > 1 and any(node in gone for node in piece.nodes):
                    before += sum(w.conv.spec.macs(*rules.size(w.inputs[0])) for w in windows if w.conv)
                    after += piece.spec.macs(*rules.size(piece.entry))
        found[unit.name] = before, after
    return found


def _identity(node: fx.Node) -> Layer:
    """What is left of an activation that goes."""
    shape = shape_of(node)
    assert shape is not None  # an activation gives a tensor
    is_map = len(shape) == 4
    conv = AffineConv.identity(shape[1] if is_map else shape[-1])
    return Layer(node, tuple(node.all_input_nodes), conv, (1,), "map" if is_map else "vector")
