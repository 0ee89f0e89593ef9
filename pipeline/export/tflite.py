"""PyTorch to TFLite (LiteRT), float32, NHWC."""

__all__ = ["ExportInfo", "export_fp32", "file_sha256"]

import hashlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import ExportError
from pipeline.export import metadata
from pipeline.export.extras import require
from pipeline.export.flattening import flatten_channels_last
from pipeline.export.input_format import ENTRY, PixelInput, with_pixel_input
from pipeline.export.lowering import lower
from pipeline.export.naming import name_tensors
from pipeline.export.probe import require_same
from pipeline.export.quiet import quietly
from pipeline.export.writing import replacing


@dataclass(frozen=True)
class ExportInfo:
    """What one conversion wrote.

    Attributes:
        path: The file.
        bytes: Its size.
        sha256: Its digest, in hex.
        converter: The tool that wrote it, with its version.
        seconds: Wall time of the conversion.
        notes: What the user should know: which simplifier ran, what was changed.
    """

    path: Path
    bytes: int
    sha256: str
    converter: str
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, path: Path, *, converter: str, since: float, notes: tuple[str, ...] = ()) -> "ExportInfo":
        """Describes the finished file `path`; `since` is the `time.perf_counter()` of the start."""
        return cls(path, path.stat().st_size, file_sha256(path), converter, time.perf_counter() - since, notes)

    def as_dict(self) -> dict[str, object]:
        """The record as JSON-ready values; `path` is the file's name alone."""
        return {**asdict(self), "path": self.path.name, "notes": list(self.notes)}


def file_sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export_fp32(model: nn.Module, example: Tensor, path: Path | str, *, pixels: PixelInput | None = None) -> ExportInfo:
    """Converts a model to a float32 `.tflite` file with NHWC input.

    The input is declared channels-last, so that the converter cancels every layout transpose instead of leaving one
    at each convolution; fully connected layers over a feature map read it in that order.

    Args:
        model: Any network that `pipeline.export.lowering.lower` accepts, or one that it returned.
        example: Normalised input of shape [N, C, H, W]; the file's input is [N, H, W, C] of that size.
        path: Where to write; an existing file is replaced only by a whole one.
        pixels: The file takes uint8 pixels and normalises them so; without it, normalised float32 images.

    Raises:
        ExportError: The `tflite` extra is missing, the model cannot be converted, or the file computes something
            else; no file is left.
    """
    target = Path(path)
    started = time.perf_counter()
    image = example.detach().cpu().float()
    lowered = lower(model, example)
    network, _ = flatten_channels_last(lowered, image)
    if pixels is not None:
        network, image = with_pixel_input(network, pixels), image.to(torch.uint8)
    doing = f"convert the model to TFLite ({target.name})"
    with quietly(doing):
        litert_torch = require("litert_torch", extra="tflite")
        version = str(require("litert_torch.version", extra="tflite").__version__)
    hint = "an operation has no TFLite counterpart: replace it in the model, or leave 'tflite' out of the targets"
    with replacing(target) as temporary:
        with quietly(doing, hint=hint), torch.no_grad():
            channels_last = image.permute(0, 2, 3, 1).contiguous()
            wrapped = litert_torch.to_channel_last_io(network, args=[0]).eval()
            litert_torch.convert(wrapped, (channels_last,)).export(str(temporary))
        if not temporary.is_file() or temporary.read_bytes()[4:8] != b"TFL3":
            raise ExportError(f"the converter wrote no TFLite file for {target.name}", hint=hint)
        name_tensors(temporary, network)
        if pixels is not None:
            metadata.write_entry(temporary, ENTRY, {**pixels.as_dict(), "layout": "NHWC"})
        require_same(temporary, lowered, example, name=target.name, pixels=pixels)
    return ExportInfo.of(target, converter=f"litert-torch {version}", since=started)
