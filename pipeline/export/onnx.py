"""PyTorch to ONNX, float32, NCHW."""

__all__ = ["export_fp32"]

import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.errors import ExportError
from pipeline.export import metadata
from pipeline.export.extras import require
from pipeline.export.input_format import ENTRY, PixelInput, with_pixel_input
from pipeline.export.lowering import lower
from pipeline.export.naming import name_values
from pipeline.export.probe import require_same
from pipeline.export.quiet import quietly
from pipeline.export.tflite import ExportInfo
from pipeline.export.writing import replacing

INPUT_NAME = "image"
OUTPUT_NAME = "logits"
# Opset 18 is what the exporter emits natively; ONNX Runtime's mobile builds and QNN read it.
OPSET = 18


def export_fp32(
    model: nn.Module,
    example: Tensor,
    path: Path | str,
    *,
    pixels: PixelInput | None = None,
    channels_last: bool = False,
) -> ExportInfo:
    """Converts a model to a float32 `.onnx` file with input ``image`` and output ``logits``.

    Args:
        model: Any network that `pipeline.export.lowering.lower` accepts, or one that it returned.
        example: Normalised input of shape [N, C, H, W]; the file's input shape.
        path: Where to write; an existing file is replaced only by a whole one.
        pixels: The file takes uint8 pixels and normalises them so; without it, normalised float32 images.
        channels_last: The input is [N, H, W, C], at the cost of one Transpose; [N, C, H, W] otherwise.

    Returns:
        The record; its notes say which simplifier ran.

    Raises:
        ExportError: The `onnx` extra is missing, the model cannot be converted, or the file computes something else;
            no file is left.
    """
    target = Path(path)
    started = time.perf_counter()
    lowered = lower(model, example)
    network, image = lowered, example.detach().cpu().float()
    if pixels is not None:
        network, image = with_pixel_input(lowered, pixels), image.to(torch.uint8)
    if channels_last:
        network, image = _with_channels_last(network), image.permute(0, 2, 3, 1).contiguous()
    onnx = require("onnx", extra="onnx")
    require("onnxscript", extra="onnx")
    doing = f"convert the model to ONNX ({target.name})"
    hint = "an operation has no ONNX counterpart: replace it in the model, or leave 'onnx' out of the targets"
    with quietly(doing, hint=hint), torch.no_grad():
        program = torch.onnx.export(
            network,
            (image,),
            dynamo=True,
            external_data=False,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        proto = program.model_proto
    proto, note = simplify(proto)
    _drop_build_paths(proto)
    name_values(proto)
    with replacing(target) as temporary:
        with quietly(f"write {target.name}"):
            onnx.checker.check_model(proto, full_check=True)
            onnx.save_model(proto, str(temporary))
        if pixels is not None or channels_last:
            spec = pixels.as_dict() if pixels is not None else {"values": "normalised", "dtype": "float32"}
            metadata.write_entry(temporary, ENTRY, {**spec, "layout": "NHWC" if channels_last else "NCHW"})
        require_same(temporary, lowered, example, name=target.name, pixels=pixels)
    return ExportInfo.of(
        target, converter=f"torch.onnx {torch.__version__.split('+')[0]}", since=started, notes=(note,)
    )


def _with_channels_last(network: fx.GraphModule) -> fx.GraphModule:
    """A lowered network over [N, H, W, C]; as a wrapper around it it would hide shapes."""
    result = copy.deepcopy(network)
    image = next(node for node in result.graph.nodes if node.op == "placeholder")
    readers = list(image.users)
    with result.graph.inserting_after(image):
        permuted = result.graph.call_function(torch.ops.aten.permute.default, (image, [0, 3, 1, 2]))
    with result.graph.inserting_after(permuted):
        # Without it the strides stay channels-last, and the exporter spells the pooling out as a gather.
        contiguous = result.graph.call_function(torch.ops.aten.contiguous.default, (permuted,))
    for reader in readers:
        reader.replace_input_with(image, contiguous)
    result.recompile()
    return result


def simplify(proto: Any) -> tuple[Any, str]:
    """Simplifies a graph with onnxsim, or with onnxslim where onnxsim is missing or fails.

    Returns:
        The simplified `onnx.ModelProto` and a sentence that says which tool ran, and why the other did not.

    Raises:
        ExportError: Neither tool is installed, or both failed.
    """
    try:
        onnxsim = require("onnxsim", extra="onnx")
        with quietly("simplify the ONNX graph with onnxsim"):
            simplified, matches = onnxsim.simplify(proto, check_n=1)
            if not matches:
                raise ExportError("the simplified graph computes something else")
        return simplified, f"simplified by onnxsim {onnxsim.__version__}"
    except ExportError as error:
        reason = error.what.splitlines()[0]
    onnxslim = require("onnxslim", extra="onnx")
    with quietly("simplify the ONNX graph with onnxslim"):
        simplified = onnxslim.slim(proto)
    return simplified, f"simplified by onnxslim {onnxslim.__version__}, since onnxsim failed: {reason}"


def _drop_build_paths(proto: Any) -> None:
    """Removes the tools' own records: stack traces with the builder's file paths, the simplifier's log."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        del value.metadata_props[:]
        value.doc_string = ""
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
