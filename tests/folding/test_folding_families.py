"""Published architectures with random weights, every unit linear: what folds is equal, what does not is listed."""

import pytest
import timm
import torch
from torch import nn

from pipeline import alpha
from pipeline.folding import FoldResult, find_units, fold, linearise
from pipeline.folding.units import Unit

X = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ODD = torch.randn(1, 3, 75, 69, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

INVERTED = [
    *(f"mobilenetv2_{size}" for size in ("035", "050", "075", "100", "110d", "120d", "140")),
    *(f"tf_efficientnet_lite{index}" for index in range(5)),
    *("efficientnet_lite0", "mnasnet_100", "mnasnet_140", "mnasnet_small", "fbnetc_100"),
    *("mobilenetv1_100", "mobilenetv1_125"),
]
FAST = {"mobilenetv2_050", "tf_efficientnet_lite0", "mobilenetv1_100"}


def marked(names: list[str]) -> list[object]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def double(name: str) -> nn.Module:
    """A network with statistics unlike those at birth, so that no bias is zero by accident."""
    torch.manual_seed(0)
    model = timm.create_model(name).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.7, 1.3)
            module.bias.data.normal_(0, 0.2)
    return model


def convs(model: nn.Module, unit: str) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and f"{name}.".startswith(f"{unit}.")
    ]


@torch.no_grad()
def assert_equal_everywhere(result: FoldResult, linear: nn.Module, sizes: tuple[torch.Tensor, ...] = (X, ODD)) -> None:
    for x in sizes:
        expected = linear(x)
        assert torch.isfinite(expected).all()
        assert (result.model(x) - expected).abs().max() <= 1e-8 * expected.abs().max()


@pytest.mark.parametrize("name", marked(INVERTED))
def test_every_linear_unit_of_a_mobile_network_is_one_convolution(name: str) -> None:
    model = double(name)
    units = find_units(model)
    foldable = [unit.name for unit in units if unit.foldable]
    assert foldable
    assert all(unit.reason for unit in units if not unit.foldable)
    linear = linearise(model, foldable)
    result = fold(linear, X, border="exact", units=foldable)
    assert_equal_everywhere(result, linear)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.model.modules())
    for unit in foldable:
        assert convs(result.model, unit) in ([unit], [f"{unit}.folded"])
    # Blocks end without an activation, so neighbouring units form one region, too large for one kernel: it is listed.
    for skip in result.skipped:
        assert skip.reason and not any(all(f"{n}.".startswith(f"{unit}.") for n in skip.names) for unit in foldable)


def test_units_need_not_be_named_again() -> None:
    """What `linearise` took apart is what `fold` puts together, by unit or by activation: a convolution for each."""
    model = double("mobilenetv2_035")
    units = find_units(model)
    chosen = [unit.name for unit in units[3:6]]
    activations = [name for unit in units[3:6] for name in unit.activations]
    for names in (chosen, activations):
        linear = linearise(model, names)
        result = fold(linear, X, border="exact")
        assert_equal_everywhere(result, linear, (X,))
        assert [unit.name for unit in units if len(convs(result.model, unit.name)) == 1] == chosen
    # Blocks end without an activation: what one unit leaves to the next stays apart unless the two are named as one.
    stage = linearise(model, [unit.name for unit in units if unit.name.startswith("blocks.1.")])
    assert len(convs(fold(stage, X).model, "blocks.1")) == 2
    assert len(convs(fold(stage, X, units=["blocks.1"]).model, "blocks.1")) == 1


@pytest.mark.parametrize("name", [pytest.param("resnet18"), pytest.param("resnet34", marks=pytest.mark.slow)])
def test_basic_blocks_fold_as_composed_and_are_listed_where_the_border_must_be_exact(name: str) -> None:
    model = double(name)
    blocks = [unit.name for unit in find_units(model)]
    linear = linearise(model, blocks)
    exact = fold(linear, X, border="exact", units=blocks)
    assert_equal_everywhere(exact, linear)
    listed = {skip.names[0].rpartition(".")[0] for skip in exact.skipped}
    assert listed == set(blocks)
    assert all("zero padding between them" in skip.reason for skip in exact.skipped)
    composed = fold(linear, X, units=blocks)
    merged = {segment.units[0]: segment for segment in composed.segments if segment.units}
    assert sorted(merged) == sorted(blocks)
    strided = {unit for unit in blocks if unit.endswith(".0") and unit != "layer1.0"}
    assert all(merged[unit].kernel == ((7, 7) if unit in strided else (5, 5)) for unit in blocks)


def test_vgg_folds_between_its_poolings() -> None:
    model = double("vgg11")
    units = {unit.name: unit for unit in find_units(model)}
    foldable = [name for name, unit in units.items() if unit.foldable]
    assert all("MaxPool2d" in unit.reason for unit in units.values() if not unit.foldable)
    composed = fold(linearise(model, foldable), X, units=foldable)
    assert [segment.kernel for segment in composed.segments if segment.units] == [(5, 5)] * 3


@pytest.mark.slow
def test_vgg16_folds_to_one_convolution_a_stage() -> None:
    model = double("vgg16")
    foldable = [unit.name for unit in find_units(model) if unit.foldable]
    composed = fold(linearise(model, foldable), X, units=foldable)
    kernels = [segment.kernel for segment in composed.segments if segment.units]
    assert kernels == [(5, 5), (5, 5), (7, 7), (7, 7), (7, 7)]
    assert len(convs(composed.model, "features.0")) == 1


@pytest.mark.parametrize(
    ("name", "blocks"), [("repvgg_a0", 22), pytest.param("mobileone_s0", 43, marks=pytest.mark.slow)]
)
def test_reparameterised_branches_fold_unasked(name: str, blocks: int) -> None:
    """Without any unit named, each block of parallel branches becomes one convolution, exact to the border."""
    model = double(name)
    result = fold(model, X, border="exact", units=[])
    assert_equal_everywhere(result, model)
    assert sum(isinstance(module, nn.Conv2d) for module in result.model.modules()) == blocks
    assert result.skipped == ()


def settled(model: nn.Module, units: list[Unit]) -> nn.Module:
    student = alpha.attach(model, units=[unit.name for unit in units])
    alpha.set_values(student, 1.0)
    return alpha.settle(student)


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv2_050",
        "resnet18",
        pytest.param("tf_efficientnet_lite0", marks=pytest.mark.slow),
        pytest.param("fbnetc_100", marks=pytest.mark.slow),
        pytest.param("resnet34", marks=pytest.mark.slow),
    ],
)
def test_ring_padding_makes_plain_composition_exact(name: str) -> None:
    """Networks prepared by `pipeline.alpha` need no repair: every unit folds, even 3×3 after 3×3, and equals."""
    model = double(name)
    units = [unit for unit in find_units(model) if unit.foldable]
    linear = settled(model, units)
    result = fold(linear, X, units=[unit.name for unit in units])
    assert_equal_everywhere(result, linear)
    merged = [segment for segment in result.segments if segment.units]
    assert [segment.units for segment in merged] == [(unit.name,) for unit in units]
    assert {segment.border for segment in merged} == {"exact"}
