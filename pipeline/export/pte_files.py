"""Reads and writes `.pte` files (ExecuTorch programs), and the texts that they carry.

A text is a method of the program that takes nothing and returns a constant string, so an app reads it by the runtime it
has anyway: ``module.execute("layerfold")``.
"""

__all__ = ["FORWARD", "LAYERS", "load_executorch", "load_pte", "read_text", "text_of", "write_text"]

from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import ExportError
from pipeline.export.extras import require
from pipeline.export.quiet import quietly
from pipeline.export.writing import replacing

FORWARD = "forward"
"""The method that runs the network."""
LAYERS = "layerfold_layers"
"""The text that names the weighted layers in the order in which the file computes them: XNNPACK keeps no names."""
_HINT = "the file is damaged or was not written to its end: export it again"
# "ET" and a schema version stand behind the four bytes of the flatbuffer's root offset.
_MARK = slice(4, 6)


def load_executorch(module: str) -> ModuleType:
    """Imports a module of ExecuTorch, or of torchao behind it, without what they print while being imported.

    Raises:
        ExportError: The `executorch` extra is not installed.
    """
    with quietly(f"import {module}"):
        return require(module, extra="executorch")


def load_pte(path: Path | str) -> Any:
    """Parses a `.pte` file into ExecuTorch's `PTEFile`: the program and its weights.

    Raises:
        ExportError: The `executorch` extra is missing, or the file is missing, is no ExecuTorch program, or is cut off.
    """
    file = Path(path)
    tools = load_executorch("executorch.exir._serialize")
    if not file.is_file():
        raise ExportError(f"no such file: {file}", hint="export it first")
    content = file.read_bytes()
    if content[_MARK] != b"ET":
        raise ExportError(f"{file.name} ({len(content)} bytes) is no ExecuTorch program", hint=_HINT)
    with quietly(f"read {file.name}", hint=_HINT):
        loaded = tools._deserialize_pte_binary(content)
        plans = {plan.name for plan in loaded.program.execution_plan}
    if FORWARD not in plans:
        raise ExportError(f"{file.name} has no method '{FORWARD}'", hint="export it with layerfold")
    return loaded


def read_text(file: Path, name: str) -> str | None:
    """The text of that name, or None; raises ExportError where the file is missing or damaged."""
    return text_of(load_pte(file), name)


def text_of(loaded: Any, name: str) -> str | None:
    """The text of that name in a parsed file, or None."""
    for plan in loaded.program.execution_plan:
        if plan.name == name:
            return str(plan.values[plan.outputs[0]].val.string_val)
    return None


def write_text(file: Path, name: str, text: str) -> None:
    """Writes a text in place of an older one of that name; raises ExportError where the file is missing or damaged."""
    loaded = load_pte(file)
    schema = load_executorch("executorch.exir.schema")
    tools = load_executorch("executorch.exir._serialize")
    layout = load_executorch("executorch.extension.pytree").tree_flatten(text)[1].to_str()
    method = schema.ExecutionPlan(
        name=name,
        container_meta_type=schema.ContainerMetadata("", layout),
        values=[schema.EValue(schema.String(text))],
        inputs=[],
        outputs=[0],
        chains=[schema.Chain(inputs=[], outputs=[], instructions=[], stacktrace=None)],
        operators=[],
        delegates=[],
        non_const_buffer_sizes=[0],
    )
    program = loaded.program
    program.execution_plan = [*(plan for plan in program.execution_plan if plan.name != name), method]
    with replacing(file) as temporary, quietly(f"write {file.name}"):
        # As `to_executorch` writes it: weights in segments of their own, which the runtime maps.
        temporary.write_bytes(bytes(tools._serialize_pte_binary(loaded, extract_delegate_segments=True)))
