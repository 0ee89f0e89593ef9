"""What may become one convolution, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from pipeline.folding.geometry import Axis
from pipeline.folding.graph import Element, Parallel, Single, Tangle
from pipeline.folding.layers import Layer
from pipeline.folding.spec import ConvSpec
from pipeline.folding.trace import module_path, shape_of

__all__ = ["Border", "Cost", "LatencyModel", "Policy", "Rules"]

Policy = Literal["always", "cheapest"]
Border = Literal["approximate", "exact"]
LatencyModel = Callable[[ConvSpec, int, int], float]
# (what the policy counts first, what it counts next, pieces), compared in this order
Cost = tuple[float, float, int]
_LARGEST_KERNEL = 2**26  # weights; half a gigabyte in float64


@dataclass(frozen=True)
class Rules:
    """What may be merged and what it costs.

    Args:
        policy: "always" makes as few layers as possible, "cheapest" spends as few MACs (or as little time).
        border: "exact" forbids merges that differ at the border beyond repair by a bias map.
        layers: The graph's affine nodes.
        units: Names of units and activations; windowed layers that follow each other are merged only inside
            one of them or across one of these activations, while norms and parallel branches are merged
            everywhere. None: no limit.
        latency: Time of a convolution on an input of (height, width); MACs where None.
        ring_entries: For every ring-padded convolution the values at which its padding ends.
    """

    policy: Policy
    border: Border
    layers: Mapping[fx.Node, Layer]
    units: Collection[str] | None = None
    latency: LatencyModel | None = None
    ring_entries: Mapping[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    _specs: dict[tuple[int, int], ConvSpec] = field(default_factory=dict, repr=False, compare=False)

    def spec(self, elements: tuple[Element, ...]) -> ConvSpec:
        """The convolution that a chain of elements would become.

        Raises:
            FoldError: There is none.
        """
        key = id(elements[0]), id(elements[-1])  # a chain is known by its ends
        if key not in self._specs:
            own = self._element_spec(elements[-1])
            self._specs[key] = self.spec(elements[:-1]).then(own) if len(elements) > 1 else own
        return self._specs[key]

    def _element_spec(self, element: Element) -> ConvSpec:
        if isinstance(element, Single):
            assert element.layer.conv is not None
            return element.layer.conv.spec
        if isinstance(element, Parallel):
            channels = _channels(element.join)
            specs = [self.spec(branch) if branch else _identity(channels) for branch in element.branches]
            return ConvSpec.union(specs)
        known: dict[fx.Node, ConvSpec] = {}
        for layer in element.layers:
            inputs = [known.get(node, _identity(_channels(layer))) for node in layer.inputs]
            if layer.conv is None:
                known[layer.node] = ConvSpec.union(inputs)
            elif layer.inputs[0] in known:
                known[layer.node] = inputs[0].then(layer.conv.spec)
            else:
                known[layer.node] = layer.conv.spec
        return known[element.nodes[-1]]

    def size(self, value: fx.Node) -> tuple[int, int]:
        """Height and width of a value; 1 × 1 for a vector."""
        shape = shape_of(value)
        return (shape[2], shape[3]) if shape is not None and len(shape) == 4 else (1, 1)

    def conv_cost(self, spec: ConvSpec, value: fx.Node) -> Cost:
        """Cost of running `spec` as one layer on `value`."""
        height, width = self.size(value)
        count = 2.0 if self.border == "exact" and spec.mapped else 1.0  # the bias map is one addition more
        if self.latency is None:
            return self.ordered(float(spec.macs(height, width)), count)
        # A table has no row for a lone norm. At no time it still counts as a layer, so it is merged where it can be.
        return self.ordered(0.0 if spec.is_diagonal else self.latency(spec, height, width), count)

    def ordered(self, spent: float, count: float) -> Cost:
        """MACs or time, and a number of layers, in the order in which the policy minimises them."""
        return (count, spent, 1) if self.policy == "always" else (spent, count, 1)

    def objection(self, elements: tuple[Element, ...], spec: ConvSpec) -> str:
        """Why a chain of elements may not become one convolution; empty if it may."""
        if spec.parameters > _LARGEST_KERNEL:
            rows, cols = spec.kernel
            return f"its {rows}×{cols} kernel would hold {spec.parameters / 1e6:.0f} M weights"
        if self._passes_a_ring_entry(elements):
            return "ring padding ends at its unit's input, so no layer before that may join"
        chosen = self._chosen(elements)
        if self.units is not None and not chosen:
            return "it is not inside a named unit"
        if spec.inexact and (self.border == "exact" or (self.units is not None and chosen == "norms")):
            return spec.inexact
        if self.units is not None and chosen == "norms":
            if spec.mapped:
                return "a norm before a padded layer differs from one convolution at the border"
            if self._windows_macs(elements) < spec.macs(*self.size(_entry(elements))):
                return "one convolution would cost more than its parts"
        return ""

    def _passes_a_ring_entry(self, elements: tuple[Element, ...]) -> bool:
        """Whether layers that change a value come before the end of some ring padding among the elements."""
        nodes = [node for element in elements for node in element.nodes]
        inside = set(nodes)
        for ring in inside & self.ring_entries.keys():
            for entry in self.ring_entries[ring] & inside:
                before = nodes[: nodes.index(entry) + 1]
                if not all(self.layers[node].is_identity for node in before):
                    return True
        return False

    def _windows_macs(self, elements: tuple[Element, ...]) -> int:
        layers = [self.layers[node] for element in elements for node in element.nodes]
        return sum(
            layer.conv.spec.macs(*self.size(layer.inputs[0])) for layer in layers if layer.conv and layer.is_window
        )

    def _chosen(self, elements: tuple[Element, ...]) -> str:
        """Whether the windowed layers that follow each other in the chain may be merged.

        Returns:
            "unit" where each such pair lies in one named unit, or has a named activation or ring padding
            between the two; "norms" where there is no such pair; "" otherwise.
        """
        units = self.units or ()
        ahead: dict[fx.Node, frozenset[tuple[fx.Node, bool]]] = {}
        found = "norms"
        for node in (node for element in elements for node in element.nodes):
            layer = self.layers[node]
            reaching = frozenset[tuple[fx.Node, bool]]().union(
                *(ahead.get(source, frozenset()) for source in layer.inputs)
            )
            if layer.is_window:
                for earlier, opened in reaching:
                    if not (opened or self._ring(layer) or _together(earlier, node, units)):
                        return ""
                    found = "unit"
                reaching = frozenset({(node, False)})
            elif layer.is_identity and module_path(node) in units:
                reaching = frozenset((earlier, True) for earlier, _ in reaching)
            ahead[node] = reaching
        return found

    @staticmethod
    def _ring(layer: Layer) -> bool:
        return layer.conv is not None and layer.conv.spec.ring


def _together(first: fx.Node, second: fx.Node, units: Collection[str]) -> bool:
    paths = module_path(first), module_path(second)
    return any(all(f"{path}.".startswith(f"{unit}.") for path in paths) for unit in units)


def _identity(channels: int) -> ConvSpec:
    point = Axis.fixed(1)
    return ConvSpec(channels, channels, channels, point, point, constant=False)


def _channels(layer: Layer) -> int:
    shape = shape_of(layer.node)
    assert shape is not None
    return shape[1] if layer.kind == "map" else shape[-1]


def _entry(elements: tuple[Element, ...]) -> fx.Node:
    """The value that a chain of elements reads."""
    first = elements[0]
    if isinstance(first, Single):
        return first.layer.inputs[0]
    if isinstance(first, Tangle):
        return first.entry
    return next((_entry(branch) for branch in first.branches if branch), first.join.inputs[0])
