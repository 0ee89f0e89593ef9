"""The census of a `.pte` file: what the XNNPACK delegate computes, and what is left to portable kernels."""

__all__ = ["read_executorch"]

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.export.census_types import Census, Port, WeightRange
from pipeline.export.pte_files import FORWARD, LAYERS, load_pte, text_of
from pipeline.export.xnnpack_graph import XnnpackGraph, payload_of

_BACKEND = "XnnpackBackend"
# The numbers of PyTorch's scalar types.
_TYPES = {0: "uint8", 1: "int8", 6: "float32"}


def read_executorch(file: Path) -> Census:
    """Counts what a `.pte` file holds; raises ExportError where the file is missing or damaged.

    Operators inside the delegate have XNNPACK's names (``Conv2d``), those left to ExecuTorch's portable kernels the
    names of PyTorch's dialect (``aten::atan.out``).
    """
    loaded = load_pte(file)
    plan = next(plan for plan in loaded.program.execution_plan if plan.name == FORWARD)
    operators: Counter[str] = Counter()
    graphs: list[XnnpackGraph] = []
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if hasattr(call, "delegate_index"):
            delegate = plan.delegates[call.delegate_index]
            if delegate.id == _BACKEND:
                payload = payload_of(loaded, delegate)
                graphs.append(XnnpackGraph.of(payload, loaded.named_data, file.name, first=not graphs))
            else:
                operators[f"delegate::{delegate.id}"] += 1
        elif hasattr(call, "op_index"):
            kernel = plan.operators[call.op_index]
            operators[f"{kernel.name}.{kernel.overload}".removesuffix(".")] += 1
    fused: Counter[str] = Counter()
    for graph in graphs:
        operators.update(node.kind for node in graph.nodes)
        fused.update(node.activation for node in graph.nodes if node.activation)
    quantized = any(graph.holds_integers for graph in graphs)
    weights, islands = _layers(graphs, json.loads(text_of(loaded, LAYERS) or "[]"))
    return Census(
        file.name,
        "executorch",
        file.stat().st_size,
        dict(sorted(operators.items())),
        dict(fused),
        (_port("image", plan, plan.inputs[0]),),
        (_port("logits", plan, plan.outputs[0]),),
        quantized,
        islands if quantized else (),
        weights,
        json.loads(text_of(loaded, "layerfold") or "{}"),
    )


def _layers(graphs: list[XnnpackGraph], names: list[str]) -> tuple[tuple[WeightRange, ...], tuple[str, ...]]:
    """The weight range of every layer, and the operators that compute in float.

    XNNPACK keeps no names, but the order in which a file computes its layers is that of the list inside the file.
    """
    weighted = [node for graph in graphs for node in graph.nodes if node.is_weighted]
    labels = names if len(names) == len(weighted) else [f"layer_{number}" for number in range(len(weighted))]
    queue = iter(labels)
    weights, islands = [], []
    latest = ""
    for graph in graphs:
        for node in graph.nodes:
            label = f"{latest}.{node.kind.lower()}"
            if node.is_weighted:
                label = latest = next(queue)
                weight = graph.weight(node)
                weights.append(WeightRange.of(label, weight, node.channel_axis))
            # Before the first layer only the mean is taken from pixels, which is no island: it has no integers around.
            if weights and graph.computes_in_float(node):
                islands.append(label)
    return tuple(weights), tuple(islands)


def _port(name: str, plan: Any, index: int) -> Port:
    tensor = plan.values[index].val
    return Port(name, tuple(int(size) for size in tensor.sizes), _TYPES.get(int(tensor.scalar_type), "other"))
