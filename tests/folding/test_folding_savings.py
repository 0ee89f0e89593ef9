"""What folding a unit saves is what the fold of that unit alone reports."""

import pytest
import torch

from pipeline.folding import find_units, fold, linearise
from pipeline.folding.savings import unit_macs
from pipeline.models import zoo


@pytest.mark.parametrize("name", ["mlp_3", "cifar_vgg16", "cifar_resnet20", "mobilenetv2_cifar_035"])
def test_savings_are_those_of_the_fold(name: str) -> None:
    model = zoo.create(name, num_classes=4, input_px=32, args={"width": 0.125} if "vgg" in name else {})
    example = torch.zeros(1, 3, 32, 32)
    units = [unit for unit in find_units(model) if unit.foldable]
    found = unit_macs(model, units, example)
    assert list(found) == [unit.name for unit in units]
    for unit in units[:3] + units[-1:]:
        segments = fold(linearise(model, [unit.name]), example, units=[unit.name]).segments
        merged = [segment for segment in segments if unit.name in segment.units]
        assert found[unit.name] == (merged[0].macs_before, merged[0].macs_after) and len(merged) == 1
