"""Which parts of a linear region become one convolution each.

A region is a chain of elements. Dynamic programming over its cut points finds the cheapest way to cut it, where a
piece either becomes one convolution or, if it is a single element, stays (its branches are then cut in turn).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import fx

from pipeline.errors import FoldError
from pipeline.folding.geometry import Axis
from pipeline.folding.graph import Element, Parallel, Region, Single, Tangle
from pipeline.folding.layers import Layer
from pipeline.folding.spec import ConvSpec
from pipeline.folding.trace import module_path, shape_of

__all__ = ["Cost", "LatencyModel", "Partition", "Piece", "Rules", "partition"]

Policy = Literal["always", "cheapest"]
Border = Literal["approximate", "exact"]
LatencyModel = Callable[[ConvSpec, int, int], float]
# (what the policy counts first, what it counts next, pieces), compared in this order
Cost = tuple[float, float, int]
_FREE: Cost = (0.0, 0.0, 0)
_NEVER: Cost = (float("inf"), float("inf"), 0)
_LARGEST_KERNEL = 2**26  # weights; half a gigabyte in float64


@dataclass(frozen=True)
class Piece:
    """Neighbouring elements that become one convolution.

    Args:
        entry: The value that it reads.
        elements: The elements, in a chain.
        spec: The convolution, without its weights.
    """

    entry: fx.Node
    elements: tuple[Element, ...]
    spec: ConvSpec

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All its nodes; the last one gives its value."""
        return tuple(node for element in self.elements for node in element.nodes)


@dataclass(frozen=True)
class Partition:
    """How a region is cut: the pieces to merge, its cost, and why it is more than one piece."""

    pieces: tuple[Piece, ...]
    cost: Cost
    reason: str


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
    """

    policy: Policy
    border: Border
    layers: Mapping[fx.Node, Layer]
    units: Collection[str] | None = None
    latency: LatencyModel | None = None
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


def partition(region: Region, rules: Rules) -> Partition:
    """Cuts a region into pieces of least cost.

    Args:
        region: A maximal linear region.
        rules: What may be merged and what it costs.

    Raises:
        FoldError: The region holds ring padding that cannot be merged with the layers that supply it.
    """
    best = _cut(region.elements, region.entry, rules)
    if best.cost == _NEVER:
        raise FoldError(
            f"{module_path(region.exit) or region.exit.name}: ring padding is left without the layers that "
            f"supply it ({best.reason})",
            hint="fold with policy='always' and name the settled units",
        )
    return best


def _cut(elements: tuple[Element, ...], entry: fx.Node, rules: Rules) -> Partition:
    """Dynamic programming over cut points: best[j] is the cheapest way to compute the value after j elements."""
    values = [entry, *(element.nodes[-1] for element in elements)]
    best: list[Partition] = [Partition((), _FREE, "")]
    for stop in range(1, len(elements) + 1):
        reason, chosen = "", Partition((), _NEVER, "")
        for start in range(stop):
            part, objection = _price(elements[start:stop], values[start], rules)
            if start == 0:
                reason = objection
            cost = _sum(best[start].cost, part.cost)
            # Of equal cuts the one with the shortest last piece: a norm goes to the layer before it.
            if cost <= chosen.cost and cost != _NEVER:
                chosen = Partition((*best[start].pieces, *part.pieces), cost, "")
        whole = len(chosen.pieces) == 1 and len(chosen.pieces[0].elements) == stop
        if not whole and not reason and stop > 1:
            reason = "one convolution would cost more than its parts"
        best.append(replace(chosen, reason="" if whole else reason))
    return best[-1]


def _price(elements: tuple[Element, ...], entry: fx.Node, rules: Rules) -> tuple[Partition, str]:
    """The cheaper of merging the elements and, where there is one only, leaving it; why not merged."""
    merged, objection = _merge(elements, entry, rules)
    if len(elements) > 1:
        return merged, objection
    kept = _keep(elements[0], entry, rules)
    if merged.cost <= kept.cost and merged.cost != _NEVER:
        return merged, ""
    return kept, objection or "one convolution would cost more than its parts"


def _merge(elements: tuple[Element, ...], entry: fx.Node, rules: Rules) -> tuple[Partition, str]:
    refused = Partition((), _NEVER, "")
    try:
        spec = rules.spec(elements)
    except FoldError as error:
        return refused, error.what
    if spec.ring and _starts_with_ring(elements):
        return refused, "ring padding needs the layers before it"
    if len(elements) == 1 and isinstance(elements[0], Single):
        cost = (0.0, 0.0, 1) if elements[0].layer.is_identity else rules.conv_cost(spec, entry)
        return Partition((Piece(entry, elements, spec),), cost, ""), ""
    objection = rules.objection(elements, spec)
    if objection:
        return refused, objection
    return Partition((Piece(entry, elements, spec),), rules.conv_cost(spec, entry), ""), ""


def _starts_with_ring(elements: tuple[Element, ...]) -> bool:
    """Whether ring padding comes first on some branch, so that no layer of the piece supplies its values."""
    for element in elements:
        if isinstance(element, Parallel):
            if any(branch and _starts_with_ring(branch) for branch in element.branches):
                return True
        elif isinstance(element, Single) and element.layer.conv is not None:
            if element.layer.conv.spec.ring:
                return True
            if element.layer.is_window:
                return False
    return False


def _keep(element: Element, entry: fx.Node, rules: Rules) -> Partition:
    """Leaves one element as it is, its branches cut in turn."""
    if isinstance(element, Single):
        return Partition((), _NEVER, "")  # a single layer is a piece of its own
    if isinstance(element, Parallel):
        parts = [_cut(branch, entry, rules) for branch in element.branches if branch]
        cost = _sum(rules.ordered(0.0, 1.0), *(part.cost for part in parts))
        return Partition(tuple(piece for part in parts for piece in part.pieces), cost, "")
    costs = [
        rules.ordered(0.0, 1.0) if layer.conv is None else rules.conv_cost(layer.conv.spec, layer.inputs[0])
        for layer in element.layers
    ]
    return Partition((), _sum(*costs), "")


def _sum(*costs: Cost) -> Cost:
    if any(cost == _NEVER for cost in costs):
        return _NEVER
    return sum(cost[0] for cost in costs), sum(cost[1] for cost in costs), sum(cost[2] for cost in costs)


def _entry(elements: tuple[Element, ...]) -> fx.Node:
    """The value that a chain of elements reads."""
    first = elements[0]
    if isinstance(first, Single):
        return first.layer.inputs[0]
    if isinstance(first, Tangle):
        return first.entry
    return next((_entry(branch) for branch in first.branches if branch), first.join.inputs[0])
