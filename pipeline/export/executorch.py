"""PyTorch to ExecuTorch (`.pte`), float32, computed by the XNNPACK delegate."""

__all__ = ["HINT", "converter", "describe", "export_fp32", "traceable", "write_program"]

import copy
import json
import time
from importlib import metadata as distributions
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from pipeline.export import metadata
from pipeline.export.input_format import ENTRY, PixelInput, with_pixel_input
from pipeline.export.layers import weighted_layers
from pipeline.export.lowering import lower
from pipeline.export.probe import require_same
from pipeline.export.pte_files import LAYERS, load_executorch, write_text
from pipeline.export.quiet import quietly
from pipeline.export.tflite import ExportInfo
from pipeline.export.writing import replacing

HINT = "an operation has no ExecuTorch counterpart: replace it in the model, or leave 'executorch' out of the formats"


def export_fp32(model: nn.Module, example: Tensor, path: Path | str, *, pixels: PixelInput | None = None) -> ExportInfo:
    """Converts a model to a float32 `.pte` file with input [N, C, H, W], as ExecuTorch's bindings hand images over.

    Args:
        model: Any network that `pipeline.export.lowering.lower` accepts, or one that it returned.
        example: Normalised input of shape [N, C, H, W]; the file's input shape.
        path: Where to write; an existing file is replaced only by a whole one.
        pixels: The file takes uint8 pixels and normalises them so; without it, normalised float32 images.

    Raises:
        ExportError: The `executorch` extra is missing, the model cannot be converted, or the file computes something
            else; no file is left.
    """
    target = Path(path)
    started = time.perf_counter()
    lowered = lower(model, example)
    network, image = traceable(lowered, example, pixels)
    load_executorch("executorch.exir")
    doing = f"convert the model to ExecuTorch ({target.name})"
    with replacing(target) as temporary:
        with quietly(doing, hint=HINT), torch.no_grad():
            program = torch.export.export(network, (image,))
        write_program(program, temporary, doing)
        describe(temporary, lowered, pixels)
        require_same(temporary, lowered, example, name=target.name, pixels=pixels)
    return ExportInfo.of(target, converter=converter(), since=started)


def traceable(network: fx.GraphModule, example: Tensor, pixels: PixelInput | None) -> tuple[fx.GraphModule, Tensor]:
    """A lowered network as the delegate fuses it best, and an input of its kind.

    ReLU6 becomes the clamp that it is, which XNNPACK takes into the convolution before it.
    """
    image = example.detach().cpu().float()
    result = copy.deepcopy(network)
    if pixels is not None:
        result, image = with_pixel_input(result, pixels), image.to(torch.uint8)
    for name, layer in list(result.named_modules()):
        if isinstance(layer, nn.ReLU6):
            result.set_submodule(name, nn.Hardtanh(0.0, 6.0))
    return result, image


def write_program(program: ExportedProgram, path: Path, doing: str) -> None:
    """Hands all that XNNPACK computes over to it and writes the program.

    Raises:
        ExportError: The program cannot be lowered; `doing` says what was tried.
    """
    exir = load_executorch("executorch.exir")
    xnnpack = load_executorch("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    with quietly(doing, hint=HINT), torch.no_grad():
        edge = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
        path.write_bytes(edge.to_executorch().buffer)


def describe(path: Path, network: fx.GraphModule, pixels: PixelInput | None) -> None:
    """Writes the layers' names and the form of the input into a fresh file."""
    write_text(path, LAYERS, json.dumps(list(weighted_layers(network))))
    if pixels is not None:
        metadata.write_entry(path, ENTRY, {**pixels.as_dict(), "layout": "NCHW"})


def converter() -> str:
    """The tool that writes these files, with its version."""
    return f"executorch {distributions.version('executorch')} XNNPACK"
