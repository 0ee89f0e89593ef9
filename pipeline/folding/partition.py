"""Which parts of a linear region become one convolution each.

A region is a chain of elements. Dynamic programming over its cut points finds the cheapest way to cut it, where a
piece either becomes one convolution or, if it is a single element, stays (its branches are then cut in turn).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from pipeline.errors import FoldError
from pipeline.folding.graph import Element, Parallel, Region, Single
from pipeline.folding.rules import Cost, Rules
from pipeline.folding.spec import ConvSpec
from pipeline.folding.trace import module_path

__all__ = ["Partition", "Piece", "partition"]

_FREE: Cost = (0.0, 0.0, 0)
_NEVER: Cost = (float("inf"), float("inf"), 0)


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
