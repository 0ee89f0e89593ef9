"""Maximal linear regions of a graph, and the tree of chains and parallel branches inside each.

A region has one entry value and one exit value, everything between them is affine, and nothing between them is
read from outside. Residual additions and parallel branches are inside a region when all their operands are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from pipeline.folding.layers import Layer

__all__ = ["Element", "Parallel", "Region", "Single", "Tangle", "find_regions"]


@dataclass(frozen=True)
class Single:
    """One affine node in a chain."""

    layer: Layer

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Nodes of the element, in graph order."""
        return (self.layer.node,)


@dataclass(frozen=True)
class Parallel:
    """Branches from one value to one sum; a branch without elements hands the value on."""

    branches: tuple[tuple[Element, ...], ...]
    join: Layer

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Nodes of the element, branch by branch, the sum last."""
        inner = tuple(node for branch in self.branches for element in branch for node in element.nodes)
        return (*inner, self.join.node)


@dataclass(frozen=True)
class Tangle:
    """Branches that share nodes in a way that is not nested; folded as a whole or not at all."""

    layers: tuple[Layer, ...]
    entry: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Nodes of the element, in graph order."""
        return tuple(layer.node for layer in self.layers)


Element = Single | Parallel | Tangle


@dataclass(frozen=True)
class Region:
    """A maximal linear region.

    Args:
        entry: The value that it reads.
        exit: The node whose value leaves it.
        elements: Its parts from entry to exit, in a chain.
    """

    entry: fx.Node
    exit: fx.Node
    elements: tuple[Element, ...]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All its nodes."""
        return tuple(node for element in self.elements for node in element.nodes)


def find_regions(graph: fx.Graph, layers: Mapping[fx.Node, Layer]) -> list[Region]:
    """Finds the maximal linear regions, in graph order.

    Args:
        graph: A traced graph.
        layers: Its affine nodes.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    taken: set[fx.Node] = set()
    regions: list[Region] = []
    for node in reversed(graph.nodes):
        if node in taken or node not in layers:
            continue
        grown = _grow(node, layers, order, taken)
        if grown is None:
            continue
        entry, members = grown
        taken |= members
        ordered = sorted(members, key=order.__getitem__)
        regions.append(Region(entry, node, _chain(ordered, entry, layers, order)))
    return regions[::-1]


def _grow(
    end: fx.Node, layers: Mapping[fx.Node, Layer], order: Mapping[fx.Node, int], taken: set[fx.Node]
) -> tuple[fx.Node, set[fx.Node]] | None:
    """The largest single-entry set of affine nodes that ends at `end`, with its entry.

    Nodes are added latest first, so that the frontier shrinks to one value exactly at each value through which
    everything that reaches `end` passes. The latest frontier node can leave the frontier only by being added;
    where it cannot be added, no larger set has one entry.
    """
    members = {end}
    frontier = set(layers[end].inputs)
    best: tuple[fx.Node, set[fx.Node]] | None = None
    kind = layers[end].kind
    while frontier:
        latest = max(frontier, key=order.__getitem__)
        if len(frontier) == 1:
            best = (latest, set(members))
        layer = layers.get(latest)
        if layer is None or latest in taken or layer.kind != kind or not members.issuperset(latest.users):
            break
        members.add(latest)
        frontier.remove(latest)
        frontier.update(layer.inputs)
    return best


def _chain(
    ordered: Iterable[fx.Node], entry: fx.Node, layers: Mapping[fx.Node, Layer], order: Mapping[fx.Node, int]
) -> tuple[Element, ...]:
    """Cuts a single-entry single-exit set of nodes at every value through which everything passes."""
    nodes = list(ordered)
    inside = set(nodes)
    elements: list[Element] = []
    block: list[fx.Node] = []
    start = entry
    left = {entry: sum(user in inside for user in entry.users)}
    for node in nodes:
        block.append(node)
        for source in set(layers[node].inputs):
            left[source] -= 1
            if not left[source]:
                del left[source]
        left[node] = sum(user in inside for user in node.users)
        if len(left) == 1 and node in left:
            elements.append(_element(block, start, layers, order))
            block, start = [], node
    return tuple(elements)


def _element(
    block: list[fx.Node], start: fx.Node, layers: Mapping[fx.Node, Layer], order: Mapping[fx.Node, int]
) -> Element:
    """One link of a chain: a single node, or what lies between a value and the sum where its branches meet."""
    join = layers[block[-1]]
    if not join.is_join:
        return Single(join)
    inside, seen = set(block), set[fx.Node]()
    branches: list[tuple[Element, ...]] = []
    for operand in join.inputs:
        members = _reaching(operand, start, layers, inside)
        if members & seen or any(not members | {join.node} >= set(node.users) for node in members):
            return Tangle(tuple(layers[node] for node in block), start)
        seen |= members
        branches.append(_chain(sorted(members, key=order.__getitem__), start, layers, order))
    return Parallel(tuple(branches), join)


def _reaching(operand: fx.Node, start: fx.Node, layers: Mapping[fx.Node, Layer], inside: set[fx.Node]) -> set[fx.Node]:
    members: set[fx.Node] = set()
    pending = [operand]
    while pending:
        node = pending.pop()
        if node is start or node in members:
            continue
        if node in inside:
            members.add(node)
            pending.extend(layers[node].inputs)
    return members
