"""The promise of α-training: what was trained is what the fold ships, border included, with no repair."""

import copy
from typing import Literal

import pytest
import torch
from alpha_networks import calm, season
from torch import nn

from pipeline import alpha
from pipeline.folding import fold
from pipeline.models import zoo

slow = pytest.mark.slow
NETWORKS = [
    ("cifar_resnet20", 32),
    ("mobilenetv2_050", 64),
    ("tf_efficientnet_lite0", 49),
    ("mlp_5", 8),
    pytest.param("mobilenetv2_100", 224, marks=slow),
    pytest.param("mobilenetv2_100", 193, marks=slow),
    pytest.param("tf_efficientnet_lite0", 224, marks=slow),
    pytest.param("tf_efficientnet_lite0", 201, marks=slow),
    pytest.param("cifar_vgg16", 32, marks=slow),
]


def network(name: str, px: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, px, px, dtype=torch.float64)
    return season(zoo.create(name, num_classes=10, input_px=px)), x


def frozen_train_mode(model: nn.Module) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    return model


def spread(y: torch.Tensor) -> float:
    """Largest difference between images: near 0 would mean saturated outputs that prove nothing."""
    return (y - y[:1]).abs().max().item()


@pytest.mark.parametrize(("name", "px"), NETWORKS)
def test_at_zero_it_is_the_original_in_both_modes(name: str, px: int) -> None:
    model, x = network(name, px)
    calm(model, x)
    student = alpha.attach(model, "all")
    for mode in (nn.Module.eval, frozen_train_mode):
        y = mode(model)(x)
        assert spread(y) > 1e-2
        torch.testing.assert_close(mode(student)(x), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "px", "which"),
    [
        ("cifar_resnet20", 32, "all"),
        ("cifar_resnet20", 32, "every other"),
        ("mobilenetv2_050", 64, "all"),
        ("tf_efficientnet_lite0", 49, "every other"),
        ("mlp_5", 8, "all"),
        *(
            pytest.param(name, px, which, marks=slow)
            for name, px in (
                ("mobilenetv2_100", 224),
                ("mobilenetv2_100", 193),
                ("tf_efficientnet_lite0", 224),
                ("tf_efficientnet_lite0", 201),
                ("cifar_vgg16", 32),
            )
            for which in ("all", "every other")
        ),
    ],
)
def test_at_one_it_is_the_folded_network_in_both_modes(name: str, px: int, which: str) -> None:
    model, x = network(name, px)
    student = alpha.attach(model, "all")
    units = list(alpha.values(student))
    chosen = units if which == "all" else units[::2]
    alpha.set_values(student, dict.fromkeys(chosen, 1.0))
    calm(student, x)
    settled = alpha.settle(student)
    folded = fold(settled, x[:1], units=chosen)
    assert folded.skipped == [] or all("border" not in skip.reason for skip in folded.skipped)
    assert not any(isinstance(module, alpha.RingConv2d) for module in folded.model.modules())
    for mode in (nn.Module.eval, frozen_train_mode):
        y = mode(student)(x)
        assert spread(y) > 1e-2
        torch.testing.assert_close(mode(settled)(x), y, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(folded.model(x), y, rtol=1e-9, atol=1e-9)


def test_without_rings_the_fold_changes_the_network() -> None:
    model, x = network("mobilenetv2_050", 64)
    student = alpha.set_values(alpha.attach(model, "all", ring=False), 1.0)
    calm(student, x)
    settled = alpha.settle(student)
    folded = fold(settled, x[:1], units=list(alpha.values(student)))
    assert (folded.model(x) - student(x)).abs().max() > 1e-2


def test_two_blocks_and_the_activation_between_them_become_one_convolution() -> None:
    model, x = network("cifar_resnet20", 32)
    names = ["layer1.0.act1", "layer1.0.act2", "layer1.1.act1"]
    student = alpha.set_values(alpha.attach(model, names), 1.0)
    calm(student, x)
    folded = fold(alpha.settle(student), x[:1])
    assert any(segment.kernel == (9, 9) for segment in folded.segments)
    torch.testing.assert_close(folded.model(x), student(x), rtol=1e-9, atol=1e-9)


def test_trained_alpha_student_folds_in_single_precision() -> None:
    model, x = network("mobilenetv2_050", 64)
    student = alpha.set_values(alpha.attach(model, "all"), 1.0)
    calm(student, x)
    single = copy.deepcopy(student).float()
    settled = alpha.settle(single)
    folded = fold(settled, x[:1].float(), units=list(alpha.values(student)))
    y = student(x)
    assert ((folded.model(x.float()).double() - y).abs().max() / y.abs().max()).item() < 1e-4


@pytest.mark.parametrize("border", ["approximate", "exact"])
@pytest.mark.parametrize("units", [["blocks.3.2", "blocks.1.1"], ["blocks.3.1", "blocks.3.2"]])
def test_the_fold_of_the_whole_network_keeps_to_the_rings(
    units: list[str], border: Literal["approximate", "exact"]
) -> None:
    """No unit is named to the fold: the layers before a unit, whose biases its ring knows nothing of, stay apart."""
    model, x = network("mobilenetv2_050", 64)
    student = alpha.set_values(alpha.attach(model, units), 1.0)
    calm(student, x)
    expected = student(x)
    result = fold(alpha.settle(student), x[:1], border=border)
    assert spread(expected) > 1e-2
    torch.testing.assert_close(result.model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", [4, 6])
def test_many_activations_in_a_row_can_go(depth: int) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, padding=1)]
    for _ in range(depth):
        layers += [nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
    model = nn.Sequential(*layers).double().eval()
    x = torch.randn(2, 3, 16, 15, dtype=torch.float64)
    student = alpha.set_values(alpha.attach(model, [str(index) for index in range(1, 2 * depth, 2)]), 1.0)
    expected = student(x)
    settled = alpha.settle(student)
    torch.testing.assert_close(settled(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fold(settled, x[:1]).model(x), expected, rtol=1e-10, atol=1e-10)
