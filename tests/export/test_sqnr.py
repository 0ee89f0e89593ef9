"""The noise table: its arithmetic, and two runtimes that must tell the same story."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TinyNet, images

from pipeline.errors import ExportError
from pipeline.export import onnx, quantize, sqnr, tflite
from pipeline.export.observe import observe_tflite

Files = dict[str, Path]
BATCH = [images(12, seed=2)]


def test_the_ratio_is_signal_over_noise_in_decibels(files: Files) -> None:
    table = {row.name: row for row in sqnr.layer_noise(files["tflite"], files["tflite_int8"], BATCH)}
    exact, rounded = observe_tflite(files["tflite"]), observe_tflite(files["tflite_int8"])
    truth = np.concatenate([exact.watch(image[None])["blocks.folded"] for image in BATCH[0]]).astype(np.float64)
    found = np.concatenate([rounded.watch(image[None])["blocks.folded"] for image in BATCH[0]]).astype(np.float64)
    expected = 10 * math.log10((truth**2).sum() / ((truth - found) ** 2).sum())
    assert table["blocks.folded"].sqnr_db == pytest.approx(expected, abs=1e-6)
    channels = 10 * np.log10((truth**2).sum((0, 1, 2)) / ((truth - found) ** 2).sum((0, 1, 2)))
    assert table["blocks.folded"].worst_channel_db == pytest.approx(channels.min(), abs=1e-6)


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_a_file_of_three_images_has_the_noise_of_a_file_of_one(
    files: Files, form: str, network: TinyNet, tmp_path: Path
) -> None:
    """Seven images fill two batches and a third of the last: those that pad it must not count."""
    exporter, quantise = {
        "tflite": (tflite.export_fp32, quantize.tflite_int8),
        "onnx": (onnx.export_fp32, quantize.onnx_int8),
    }[form]
    whole, small = tmp_path / f"three.{form}", tmp_path / f"three.int8.{form}"
    exporter(network, torch.zeros(3, 3, 32, 32), whole)
    quantise(whole, small, [images(64, seed=1)])
    seven = [images(5, seed=2), images(2, seed=3)]
    single = {row.name: row.sqnr_db for row in sqnr.layer_noise(files[form], files[f"{form}_int8"], seven)}
    found = {row.name: row.sqnr_db for row in sqnr.layer_noise(whole, small, seven)}
    assert found.keys() == single.keys()
    for name, ratio in found.items():
        assert ratio == pytest.approx(single[name], abs=0.05), name


def test_both_runtimes_tell_the_same_story(files: Files) -> None:
    tables = [
        {row.name: row.sqnr_db for row in sqnr.layer_noise(files[form], files[f"{form}_int8"], BATCH)}
        for form in ("tflite", "onnx")
    ]
    shared = tables[0].keys() & tables[1].keys()
    assert len(shared) >= 8
    for name in shared:
        assert tables[0][name] == pytest.approx(tables[1][name], abs=0.5), name


def test_a_file_has_no_noise_against_itself(files: Files) -> None:
    for row in sqnr.layer_noise(files["onnx"], files["onnx"], BATCH):
        assert row.sqnr_db == math.inf
        assert row.as_dict()["sqnr_db"] is None


def test_rows_are_in_the_order_of_the_network_and_group_by_unit(files: Files) -> None:
    layers = sqnr.layer_noise(files["tflite"], files["tflite_int8"], BATCH)
    units = sqnr.unit_noise(layers, ["blocks.first", "blocks.folded"])
    names = [row.name for row in units]
    assert names.index("stem.0") < names.index("blocks.first") < names.index("blocks.folded") < names.index("logits")
    inside = [row for row in layers if row.name.startswith("blocks.first.")]
    first = next(row for row in units if row.name == "blocks.first")
    assert [row.name.removeprefix("blocks.first.") for row in inside][-2:] == ["project.0", "project.add"]
    assert len(inside) == 4
    assert first.sqnr_db == inside[-1].sqnr_db
    assert first.worst_channel_db == min(row.worst_channel_db for row in inside)


def test_files_of_two_formats_are_refused(files: Files) -> None:
    with pytest.raises(ExportError, match="of different formats"):
        sqnr.layer_noise(files["tflite"], files["onnx_int8"], BATCH)
