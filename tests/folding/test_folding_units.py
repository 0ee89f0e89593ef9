"""Units, linearisation, counters."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import TraceError, UnitError
from pipeline.folding import count, find_activations, find_units, fold, linearise

INPUT = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "kinds", "activations"),
    [
        ("mobilenetv2_100", {"depthwise_separable": 1, "inverted_residual": 16}, 33),
        ("resnet18", {"basic_block": 8}, 8),
        ("vgg11", {"activation": 8}, 8),
    ],
)
def test_units_in_network_order(name: str, kinds: dict[str, int], activations: int) -> None:
    model = timm.create_model(name)
    units = find_units(model)
    assert {kind: sum(unit.kind == kind for unit in units) for kind in kinds} == kinds
    assert len(units) == sum(kinds.values())
    named = [activation for unit in units for activation in unit.activations]
    assert len(named) == activations
    order = find_activations(model)
    assert sorted(named, key=order.index) == named


def test_the_units_of_mobilenetv2_are_its_17_blocks() -> None:
    units = find_units(timm.create_model("mobilenetv2_100"))
    assert [unit.name for unit in units][:4] == ["blocks.0.0", "blocks.1.0", "blocks.1.1", "blocks.2.0"]
    assert units[2].activations == ("blocks.1.1.bn1.act", "blocks.1.1.bn2.act")
    assert all(unit.foldable for unit in units)


def test_an_activation_after_the_sum_stays() -> None:
    units = {unit.name: unit for unit in find_units(timm.create_model("resnet18"))}
    assert units["layer1.0"].activations == ("layer1.0.act1",)


def test_gates_keep_a_block_from_folding() -> None:
    units = find_units(timm.create_model("mobilenetv3_small_100"))
    gated = next(unit for unit in units if unit.name == "blocks.0.0")
    assert not gated.foldable
    assert "SqueezeExcite" in gated.reason
    with pytest.raises(UnitError, match="SqueezeExcite"):
        linearise(timm.create_model("mobilenetv3_small_100"), ["blocks.0.0"])


def test_pooling_keeps_an_activation_from_folding() -> None:
    units = {unit.name: unit for unit in find_units(timm.create_model("vgg16"))}
    assert units["features.1"].foldable
    assert "MaxPool2d" in units["features.3"].reason


def test_a_shared_activation_is_no_unit() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.relu(self.b(self.relu(self.a(x)))))

    units = find_units(Shared())
    assert units and not any(unit.foldable for unit in units)
    assert "several places" in units[0].reason


def test_one_activation_registered_at_several_places_has_a_name_at_each() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Conv2d(4, 2, 3))
    assert find_activations(model) == ["1", "3"]
    assert [(unit.name, unit.foldable) for unit in find_units(model)] == [("1", True), ("3", True)]
    for name, kept in (("1", "3"), ("3", "1")):
        linear = linearise(model, [name])
        assert isinstance(linear.get_submodule(name), nn.Identity)
        assert isinstance(linear.get_submodule(kept), nn.ReLU)
        folded = fold(linear, INPUT, units=[name]).model
        assert [m.kernel_size for m in folded.modules() if isinstance(m, nn.Conv2d)].count((5, 5)) == 1
    assert model[1] is model[3] is relu


def test_linearise_copies_and_takes_units_modules_and_activations() -> None:
    model = timm.create_model("mobilenetv2_035").eval()
    depth = count(model, INPUT).depth
    assert count(linearise(model, ["blocks.1.1"]), INPUT).depth == depth - 2
    assert count(linearise(model, ["blocks.1.1.bn1.act"]), INPUT).depth == depth - 1
    assert count(linearise(model, ["blocks.1"]), INPUT).depth == depth - 4
    assert count(model, INPUT).depth == depth == 35


@pytest.mark.parametrize(("name", "hint"), [("blocks.9.9", "did you mean"), ("blocks.1.1.conv_pw", "unit or an act")])
def test_linearise_refuses_what_is_no_activation(name: str, hint: str) -> None:
    with pytest.raises(UnitError, match=hint):
        linearise(timm.create_model("mobilenetv2_035"), [name])


@pytest.mark.parametrize(
    "name", ["mobilenetv2_100", "tf_efficientnet_lite0", "mobilenetv3_small_100", "resnet18", "vgg11", "repvgg_a0"]
)
def test_macs_agree_with_the_flop_counter(name: str) -> None:
    model = timm.create_model(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(INPUT)
    assert count(model, INPUT).macs == counter.get_total_flops() // 2


def test_known_sizes() -> None:
    """MobileNetV2-1.0 and EfficientNet-lite0 as published (300.8 M and 385 M multiply-accumulates)."""
    counted = count(timm.create_model("mobilenetv2_100"), INPUT.expand(2, -1, -1, -1))
    assert (counted.params, round(counted.macs / 1e6, 2)) == (3504872, 300.77)
    assert round(count(timm.create_model("tf_efficientnet_lite0"), INPUT).macs / 1e6, 2) == 385.19


# Layer Folding (BMVC 2022): folded inverted residuals, 0-based of 17, and the MACs that this saves.
PUBLISHED = [
    ("mobilenetv2_100", [2, 4, 8, 9, 10], 7.08),
    ("mobilenetv2_140", [2, 4], 3.9),
    ("mobilenetv2_075", [2, 4], 5.7),
]


@pytest.mark.parametrize(("name", "indices", "percent"), PUBLISHED)
def test_the_published_fold_sets_save_what_was_published(name: str, indices: list[int], percent: float) -> None:
    if name == "mobilenetv2_075":  # timm has the architecture, not the name
        model = timm.models.efficientnet._gen_mobilenet_v2("mobilenetv2_100", 0.75)
    else:
        model = timm.create_model(name)
    model = model.eval()
    units = [find_units(model)[index].name for index in indices]
    result = fold(linearise(model, units), INPUT, units=units)
    before, after = count(model, INPUT), count(result.model, INPUT)
    digits = 2 if percent == 7.08 else 1
    assert round(100 * (1 - after.macs / before.macs), digits) == percent
    assert after.depth == before.depth - 2 * len(units)
    merged = {segment.name: segment for segment in result.segments if segment.windows > 1}
    assert list(merged) == units
    if percent == 7.08:
        assert count(fold(linearise(model, units), INPUT).model, INPUT) == after  # without naming them again
    assert all(segment.kernel == (3, 3) and segment.groups == 1 for segment in merged.values())


def test_an_example_that_fails_names_the_layer_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(5, 4, 1)))
    with pytest.raises(TraceError, match=r"\(1, 3, 8, 8\) and torch.float32 in 1\.0: .*expected input.* to have 5"):
        count(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(TraceError, match=r"torch\.uint8 in 0: "):
        count(model, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert capfd.readouterr() == ("", "")
