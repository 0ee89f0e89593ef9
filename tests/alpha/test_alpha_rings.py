"""Ring padding: at α=0 the original network, at α=1 what plain composition of the kernels computes.

The reference for composition never composes a kernel (see `composed`), and the one for intermediate α pads by hand.
"""

import copy

import pytest
import torch
from alpha_networks import BasicBlock, chain, composed, season
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pipeline.models.zoo  # noqa: F401  repairs torchvision before timm
from pipeline import alpha
from pipeline.alpha import RingConv2d

CONV = "conv"


def rings(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, RingConv2d)]


def agree_at_both_ends(network: nn.Module, activations: list[str], x: torch.Tensor, stride: int) -> nn.Module:
    student = alpha.attach(network, activations, per="layer", reach=None)
    torch.testing.assert_close(student(x), network(x), rtol=0, atol=1e-12)
    alpha.set_values(student, 1.0)
    ready = alpha.settle(student)
    torch.testing.assert_close(ready(x), student(x), rtol=0, atol=1e-10)
    linear = copy.deepcopy(network)
    for name in activations:
        parent, _, leaf = name.rpartition(".")
        setattr(linear.get_submodule(parent), leaf, nn.Identity())
    torch.testing.assert_close(ready(x), composed(linear, x, stride), rtol=0, atol=1e-10)
    return ready


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 12), (8, 7)])
def test_expand_then_depthwise_then_project(stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = season(
        chain(
            (CONV, 12, 1, 1, 0, 1),
            "bn",
            nn.ReLU6(),
            (CONV, 12, 3, stride, 1, 12),
            "bn",
            nn.ReLU6(),
            (CONV, 5, 1, 1, 0, 1),
        )
    )
    ready = agree_at_both_ends(network, ["2", "5"], torch.randn(2, 3, *size, dtype=torch.float64), stride)
    assert rings(ready) == ["3"] and ready.get_submodule("3").ring_exact


def test_zero_padding_differs_from_composition_without_a_ring() -> None:
    torch.manual_seed(0)
    network = season(chain((CONV, 6, 1, 1, 0, 1), nn.ReLU(), (CONV, 6, 3, 1, 1, 1)))
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    bare = alpha.set_values(alpha.attach(network, ["1"], ring=False), 1.0)
    ready = alpha.settle(bare)
    assert rings(ready) == []
    linear = nn.Sequential(network[0], network[2])
    error = (ready(x) - composed(linear, x, 1)).abs()
    assert error[:, :, 1:-1, 1:-1].max() < 1e-12 and error.max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(
    kernels=st.lists(st.sampled_from([1, 3, 5]), min_size=2, max_size=3),
    strides=st.lists(st.sampled_from([1, 2]), min_size=3, max_size=3),
    norms=st.booleans(),
    size=st.tuples(st.integers(7, 14), st.integers(7, 14)),
    seed=st.integers(0, 99),
)
def test_any_chain_of_convolutions(
    kernels: list[int], strides: list[int], norms: bool, size: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    layers: list[object] = []
    activations = []
    total = 1
    for index, kernel in enumerate(kernels):
        stride = strides[index] if index < 2 else 1
        total *= stride
        layers.append((CONV, 4, kernel, stride, kernel // 2, 1))
        if norms:
            layers.append("bn")
        if index < len(kernels) - 1:
            activations.append(str(len(layers)))
            layers.append(nn.ReLU())
    network = season(chain(*layers), seed)
    agree_at_both_ends(network, activations, torch.randn(2, 3, *size, dtype=torch.float64), total)


@pytest.mark.parametrize(("padding", "kernel"), [("same", (3, 5)), ((2, 0), (3, 2)), (2, (3, 2))])
def test_unusual_padding_and_dilation(padding: object, kernel: tuple[int, int]) -> None:
    torch.manual_seed(1)
    network = season(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, kernel, 1, padding, (2, 1), groups=2),
        )
    )
    agree_at_both_ends(network, ["1"], torch.randn(1, 3, 9, 10, dtype=torch.float64), 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_residual_block_inside(stride: int) -> None:
    torch.manual_seed(2)
    network = season(nn.Sequential(BasicBlock(4, 6, stride)))
    network[0].act2 = nn.Identity()
    x = torch.randn(2, 4, 10, 9, dtype=torch.float64)
    ready = agree_at_both_ends(network, ["0.act1"], x, stride)
    assert rings(ready) == ["0.conv2"]


def test_residual_blocks_joined_through_the_activation_after_the_add() -> None:
    torch.manual_seed(3)
    network = season(nn.Sequential(BasicBlock(4, 6, 2), BasicBlock(6, 6, 1)))
    network[1].act2 = nn.Identity()
    x = torch.randn(2, 4, 12, 11, dtype=torch.float64)
    ready = agree_at_both_ends(network, ["0.act1", "0.act2", "1.act1"], x, 2)
    assert rings(ready) == ["0.conv2", "1.conv1", "1.conv2"]


def test_shortened_reach_keeps_the_original_at_zero() -> None:
    torch.manual_seed(4)
    layers = [(CONV, 4, 3, 1, 1, 1), nn.ReLU()] * 4 + [(CONV, 4, 3, 1, 1, 1)]
    network = season(chain(*[copy.deepcopy(layer) for layer in layers]))
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    student = alpha.attach(network, ["1", "3", "5", "7"], reach=1)
    torch.testing.assert_close(student(x), network(x), rtol=0, atol=1e-12)
    # Two neighbours within reach of each other settle exactly even with the shortest reach.
    alpha.set_values(student, {"1": 1.0, "5": 1.0})
    torch.testing.assert_close(alpha.settle(student)(x), student(x), rtol=0, atol=1e-10)


def test_between_the_ends_the_padding_is_alpha_times_the_blended_outside() -> None:
    torch.manual_seed(5)
    network = season(chain((CONV, 6, 1, 1, 0, 1), "bn", nn.ReLU6(), (CONV, 6, 3, 2, 1, 6)))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    student = alpha.set_values(alpha.attach(network, ["2"]), 0.6)
    wide = network[1](network[0](nn.functional.pad(x, (1, 1, 1, 1))))
    wide = 0.6 * wide + 0.4 * wide.clamp(0, 6)
    inside = torch.zeros_like(wide)
    inside[:, :, 1:-1, 1:-1] = 1
    expected = nn.functional.conv2d(
        wide * (inside + 0.6 * (1 - inside)), network[3].weight, network[3].bias, 2, 0, 1, 6
    )
    torch.testing.assert_close(student(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("first_kernel", [1, 3])
def test_ring_carries_gradients_to_alpha_and_norm(first_kernel: int) -> None:
    torch.manual_seed(6)
    network = season(chain((CONV, 4, first_kernel, 1, first_kernel // 2, 1), "bn", nn.SiLU(), (CONV, 4, 3, 1, 1, 1)))
    student = alpha.set_values(alpha.attach(network, ["2"]), 0.4)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "2.alpha", "3.weight"]
    given_values = tuple(student.get_parameter(name).detach().clone().requires_grad_() for name in names)

    def run(*values: torch.Tensor) -> torch.Tensor:
        for name, value in zip(names, values, strict=True):
            parent, _, leaf = name.rpartition(".")
            student.get_submodule(parent)._parameters[leaf] = value
        return student(x)

    assert torch.autograd.gradcheck(run, given_values)


@pytest.mark.parametrize(
    ("name", "px"), [("mobilenetv2_050", 64), ("mobilenetv2_050", 49), ("tf_efficientnet_lite0", 50)]
)
def test_mobile_networks_at_both_ends_and_any_resolution(name: str, px: int) -> None:
    import timm

    torch.manual_seed(7)
    network = season(timm.create_model(name, num_classes=7))
    x = torch.randn(2, 3, px, px + 6, dtype=torch.float64)
    student = alpha.attach(network, "all")
    torch.testing.assert_close(student(x), network(x), rtol=1e-12, atol=1e-12)
    alpha.set_values(student, 1.0)
    ready = alpha.settle(student)
    torch.testing.assert_close(ready(x), student(x), rtol=1e-12, atol=1e-12)
    # One unit against the wide canvas: what its single folded kernel will compute.
    unit = ready.get_submodule("blocks.1.1")
    assert alpha.ring_report(student) == {}
    taps: list[torch.Tensor] = []
    handle = unit.register_forward_hook(lambda _m, inputs, out: taps.extend([inputs[0], out]))
    ready(x)
    handle.remove()
    bare = copy.deepcopy(network.get_submodule("blocks.1.1"))
    bare.bn1.act = bare.bn2.act = nn.Identity()
    torch.testing.assert_close(taps[1], composed(bare, taps[0], 1), rtol=0, atol=1e-9 * taps[1].abs().max().item())


@pytest.mark.parametrize("name", ["mobilenetv2_050", "tf_efficientnet_lite0"])
def test_frozen_norm_train_mode_equals_at_zero(name: str) -> None:
    import timm

    torch.manual_seed(8)
    network = season(timm.create_model(name, num_classes=7))
    student = alpha.attach(network, "all")
    for model in (network, student):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(student(x), network(x), rtol=1e-12, atol=1e-12)
    alpha.set_values(student, 1.0)
    ready = alpha.settle(student)
    torch.testing.assert_close(ready(x), student(x), rtol=1e-12, atol=1e-12)


def test_statistics_come_from_interior_pixels_only() -> None:
    torch.manual_seed(9)
    network = season(chain((CONV, 4, 3, 1, 1, 1), "bn", nn.ReLU(), (CONV, 4, 3, 1, 1, 1))).train()
    student = alpha.set_values(alpha.attach(network, ["2"]), 0.8)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    student(x)
    network(x)
    torch.testing.assert_close(student.get_buffer("1.running_mean"), network.get_buffer("1.running_mean"))
    torch.testing.assert_close(student.get_buffer("1.running_var"), network.get_buffer("1.running_var"))


def test_convolution_without_a_traceable_input_is_reported() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(2, 4, 3, padding=1)
            self.act = nn.ReLU()
            self.two = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.act(self.one(x)))

    student = alpha.attach(Split(), ["act"])
    assert rings(student) == []
    assert "reflect" in alpha.ring_report(student)["two"]
