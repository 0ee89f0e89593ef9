"""The reason for rounding a folded kernel without its identity: a folded network must not pay more for int8."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import datasets
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import DataError, WeightsError
from pipeline.export import onnx, runtimes
from pipeline.export.calibration import collect
from pipeline.export.int8 import Int8Options, operate, quantise
from pipeline.export.lowering import lower
from pipeline.folding import closed_form_fold
from pipeline.models import weights, zoo

NAME, UNITS = "tf_efficientnet_lite0", ("blocks.1.1", "blocks.3.1", "blocks.3.2")
# Smaller than the 224 px of the weights, and half of the photos: minutes instead of a quarter of an hour.
PX, FITTED, CALIBRATED = 160, 160, 64


@pytest.mark.slow
def test_int8_of_the_folded_network_keeps_what_it_keeps_of_the_baseline(tmp_path: Path) -> None:
    """At least 0.95 of the baseline's agreement between its int8 and its float file, on held-out photos."""
    model = zoo.create(NAME, num_classes=1000, input_px=PX)
    try:
        weights.load(model, NAME, "packaged", num_classes=1000)
        photos = datasets.resolve("photos")
    except (WeightsError, DataError) as error:
        pytest.skip(f"needs the packaged weights and photos: {error.what}")
    spec = Preprocessing(input_px=PX, mean=(0.5,) * 3, std=(0.5,) * 3)
    train = datasets.open_split(photos, "train", spec, limit=FITTED)
    fitted = [batch for batch, _ in train.batches(32, train=True, seed=0)]
    held_out = np.concatenate([b.numpy() for b, _ in datasets.open_split(photos, "eval", spec).batches(32)])
    calibration = datasets.open_split(photos, "calibration", spec, limit=CALIBRATED)
    images = collect(calibration, asked=CALIBRATED, seed=0).batches
    example, agreement = torch.zeros(1, 3, PX, PX), {}
    folded = closed_form_fold(model.eval(), UNITS, fitted).model
    for name, network in (("baseline", model), ("folded", folded)):
        plain = lower(network, example)
        ready = operate(plain, images, Int8Options())
        assert set(ready.identities) == (set() if name == "baseline" else set(UNITS))
        files = [tmp_path / f"{name}{infix}.onnx" for infix in ("", ".operated", ".int8")]
        onnx.export_fp32(plain, example, files[0])
        onnx.export_fp32(ready.network, example, files[1])
        quantise(files[1], files[2], images, Int8Options())
        exact, rounded = (runtimes.open_model(files[i]).predict(held_out).argmax(1) for i in (0, 2))
        agreement[name] = float((exact == rounded).mean())
    assert agreement["baseline"] > 0.8
    assert agreement["folded"] >= 0.95 * agreement["baseline"], agreement
