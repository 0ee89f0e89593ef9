"""From any network to its ATen graph with static shapes, or an error that says why not."""

__all__ = ["only_output", "require_finite", "trace"]

import torch
from torch import Tensor, fx, nn

from pipeline.errors import ExportError, LayerfoldError

_STATIC_HINT = "an exported network has static shapes and no choice that depends on the image: replace that part"


def require_finite(model: nn.Module) -> None:
    """Refuses a model with a NaN or an infinity among its parameters and buffers, and names the first.

    Raises:
        ExportError: Such a tensor exists.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ExportError(
                f"'{name}' holds {bad} of {tensor.numel()} values that are NaN or infinite",
                hint="the training diverged: lower the learning rate, or export an earlier checkpoint",
            )


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Captures what a model does to an input of the example's shape.

    Raises:
        ExportError: Something in the model depends on the values of the image.
    """
    try:
        with torch.no_grad():
            traced = torch.export.export(model, (example,)).module(check_guards=False)
    except LayerfoldError:
        raise
    except Exception as error:
        raise ExportError(
            f"the model cannot be traced for export: {type(error).__name__}: {str(error)[:1500]}",
            hint=_STATIC_HINT,
        ) from error
    assert isinstance(traced, fx.GraphModule)
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
            raise ExportError(f"'{node.target}' returns a tensor whose size depends on the image", hint=_STATIC_HINT)
    return traced


def only_output(node: fx.Node) -> fx.Node:
    """The one tensor that an output node returns, out of whatever it is nested in.

    Raises:
        ExportError: It returns several.
    """
    outputs = node.args[0]
    while isinstance(outputs, tuple | list) and len(outputs) == 1:
        outputs = outputs[0]
    if not isinstance(outputs, fx.Node):
        raise ExportError(
            f"the model returns {len(outputs) if isinstance(outputs, tuple | list) else outputs} outputs, expected 1",
            hint="export a classifier that returns one tensor of logits",
        )
    return outputs
