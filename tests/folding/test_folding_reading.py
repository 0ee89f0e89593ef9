"""Operations between two convolutions: each folds to equal the layers in float64, or stays because it must."""

import operator
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import LayerScale2d
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.folding import count, find_units, fold, linearise

Operation = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A 1×1 convolution, an operation, and a 3×3 convolution without padding."""

    def __init__(self, operation: Operation | nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3)
        self.operation = operation
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x)))


class Scaled(Between):
    """A parameter rearranged to a scale for each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.gain[None, :, None, None] - self.gain.view(4, 1, 1).unsqueeze(0))


class Dropped(nn.Module):
    """Dropout as most code writes it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout2d(F.feature_alpha_dropout(F.dropout(x, 0.3, self.training)), 0.5, training=self.training)


def random_scale() -> nn.Module:
    scale = LayerScale2d(4)
    nn.init.normal_(scale.gamma)
    return scale


def assert_equal(model: nn.Module, convolutions: int) -> None:
    model = model.double().eval()
    torch.manual_seed(1)
    images = [torch.randn(2, 3, *size, dtype=torch.float64) for size in ((16, 17), (13, 12))]
    folded = fold(model, images[0], border="exact").model
    assert sum(isinstance(module, nn.Conv2d) for module in folded.modules()) == convolutions
    with torch.no_grad():
        for x in images:
            torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(lambda pads: len(pads) != 3), st.booleans())
def test_padding_with_zeros_by_call_or_module_folds(pads: list[int], module: bool) -> None:
    four = (*pads, 0, 0)[:4]
    padding = nn.ConstantPad2d(four, 0.0) if module else lambda x: F.pad(x, pads)
    assert_equal(Between(padding), 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([None, 1, 2]), st.integers(0, 1))
def test_average_pooling_by_call_folds(rows: int, cols: int, stride: int | None, padding: int) -> None:
    padding = min(padding, rows // 2, cols // 2)
    assert_equal(Between(lambda x: F.avg_pool2d(x, (rows, cols), stride, padding=padding)), 1)


@settings(max_examples=15, deadline=None)
@given(st.floats(-3, 3), st.sampled_from([torch.add, torch.sub]), st.booleans())
def test_sums_with_a_factor_fold(alpha: float, call: Callable[..., Tensor], branch: bool) -> None:
    other: Operation = (lambda x: 2 * x) if branch else (lambda x: 1.5)  # type: ignore[assignment,return-value]
    assert_equal(Between(lambda x: call(x, other(x), alpha=alpha)), 1)


@pytest.mark.parametrize(
    "operation",
    [
        operator.neg,
        torch.neg,
        lambda x: x.neg() + x.add(other=x),
        lambda x: x.sub(x, alpha=0.5),
        Dropped(),
        nn.FeatureAlphaDropout(),
        random_scale(),
        lambda x: F.pad(x, (1, 0, 2, 1), "constant", 0),
    ],
    ids=str,
)
def test_operations_that_are_linear_fold(operation: Operation) -> None:
    assert_equal(Between(operation), 1)


def test_parameters_that_are_rearranged_are_constants() -> None:
    assert_equal(Scaled(nn.Identity()), 1)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
        lambda x: F.pad(x, (1, 1), value=1.0),
        lambda x: F.pad(x, (-1, -1)),
        lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        nn.ConstantPad2d(1, 0.5),
        lambda x: x.div(0.3, rounding_mode="floor"),
        lambda x: x * x,
        lambda x: x.sum(1, keepdim=True) - x,
    ],
    ids=str,
)
def test_operations_that_are_not_linear_stay(operation: Operation) -> None:
    assert_equal(Between(operation), 2)


def test_dropout_that_is_always_on_stays() -> None:
    """torch's default of `training` is true: such a layer drops values in evaluation too."""
    folded = fold(Between(lambda x: F.dropout(x, 0.5)).eval(), torch.randn(1, 3, 8, 8)).model
    assert sum(isinstance(module, nn.Conv2d) for module in folded.modules()) == 2


class InvertedResidual(nn.Module):
    """A block with a layer scale, as newer networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.act, self.project = nn.Conv2d(4, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 3)
        self.scale = random_scale()

    def forward(self, x: Tensor) -> Tensor:
        return -self.scale(self.project(F.pad(self.act(self.expand(x)), (1, 1, 1, 1)))) + x


def test_a_parameter_that_is_read_elsewhere_keeps_its_place() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Scaled(nn.Identity())

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.block(x)) * self.block.gain.view(4, 1, 1).mean()

    model = Reader().double().eval()
    x = torch.randn(1, 3, 9, 8, dtype=torch.float64)
    folded = fold(model, x, units=["block"]).model
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    assert {name for name, _ in folded.named_parameters()} == {"block.folded.weight", "block.folded.bias", "block.gain"}


def test_a_block_with_such_operations_is_a_unit() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), InvertedResidual()).double().eval()
    (unit,) = find_units(model)
    assert (unit.name, unit.foldable, unit.activations) == ("2", True, ("2.act",))
    x = torch.randn(1, 3, 9, 8, dtype=torch.float64)
    linear = linearise(model, ["2"])
    folded = fold(linear, x, border="exact", units=["2"])
    torch.testing.assert_close(folded.model(x), linear(x), rtol=0, atol=1e-12)
    assert count(folded.model, x).macs == (3 * 4 + 4 * 4 * 9) * 72
