"""Affine convolutions against a brute force that loops over pixels, and against running the layers in float64."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import FoldError
from pipeline.folding.algebra import AffineConv
from pipeline.folding.geometry import Axis
from pipeline.folding.reading import conv_of


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    kernel, stride, dilation = (draw(st.integers(1, high)) for high in (4, 3, 2))
    if draw(st.booleans()):
        return Axis.same(kernel, stride=stride, dilation=dilation)
    low, high = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return Axis.fixed(kernel, stride=stride, dilation=dilation, low=low, high=high)


@st.composite
def convs(draw: st.DrawFn, in_channels: int) -> AffineConv:
    groups = draw(st.sampled_from([g for g in (1, 2, in_channels) if in_channels % g == 0]))
    out = groups * draw(st.integers(1, 2))
    rows, cols = draw(axes()), draw(axes())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(out, in_channels // groups, rows.kernel, cols.kernel, generator=generator)
    bias = torch.randn(out, generator=generator) if draw(st.booleans()) else None
    return AffineConv.conv(weight, bias, rows, cols, groups=groups)


def brute_force(conv: AffineConv, x: np.ndarray) -> np.ndarray:
    """The definition, one multiplication at a time, on [in, H, W]; SAME padding straight from TensorFlow's rule."""
    spec, weight = conv.spec, conv.weight.numpy()
    out, block, kernel_rows, kernel_cols = weight.shape
    first_row, first_col = spec.rows.pads(x.shape[1])[0], spec.cols.pads(x.shape[2])[0]
    shape = (spec.rows.output(x.shape[1]), spec.cols.output(x.shape[2]))
    result = np.zeros((out, *shape))
    for o, row, col in product(range(out), range(shape[0]), range(shape[1])):
        value = float(conv.bias[o])
        base = o // (out // spec.groups) * block
        for i, u, v in product(range(block), range(kernel_rows), range(kernel_cols)):
            r = row * spec.rows.stride + u * spec.rows.dilation - first_row
            c = col * spec.cols.stride + v * spec.cols.dilation - first_col
            if 0 <= r < x.shape[1] and 0 <= c < x.shape[2]:
                value += weight[o, i, u, v] * x[base + i, r, c]
        result[o, row, col] = value
    return result


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_affine_convolution_is_its_definition(data: st.DataObject) -> None:
    conv = data.draw(convs(data.draw(st.sampled_from([2, 4]))))
    height, width = conv.spec.rows.reach + data.draw(st.integers(0, 3)), conv.spec.cols.reach + 1
    x = np.random.default_rng(0).normal(size=(conv.spec.in_channels, height, width))
    got = conv(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(got, brute_force(conv, x), atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_composite_equals_its_parts(data: st.DataObject) -> None:
    """Everywhere where no reason is given against it, and away from the border always."""
    first = data.draw(convs(data.draw(st.sampled_from([1, 2, 4]))))
    second = data.draw(convs(first.spec.out_channels))
    composite = first.then(second)
    size = (90 + data.draw(st.integers(0, 3)), 90 + data.draw(st.integers(0, 3)))
    x = torch.randn(1, first.spec.in_channels, *size, dtype=torch.float64)
    expected, got = second(first(x)), composite(x)
    assert got.shape == expected.shape
    difference = (got - expected).abs()
    if not composite.spec.inexact:
        assert difference.max() < 1e-10
    middle = [slice(length // 2 - 1, length // 2 + 1) for length in got.shape[2:]]
    assert difference[:, :, middle[0], middle[1]].max() < 1e-10


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_composition_is_associative(data: st.DataObject) -> None:
    first = data.draw(convs(2))
    second = data.draw(convs(first.spec.out_channels))
    third = data.draw(convs(second.spec.out_channels))
    left, right = first.then(second).then(third), first.then(second.then(third))
    assert left.spec.kernel == right.spec.kernel
    assert left.spec.groups == right.spec.groups
    torch.testing.assert_close(left.weight, right.weight, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(left.total_bias, right.total_bias, rtol=1e-12, atol=1e-10)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_sum_of_branches_equals_the_branches(data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from([2, 4]))
    kernels = data.draw(st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=3))
    same = data.draw(st.booleans())
    branches = [AffineConv.identity(channels)]
    for kernel in kernels:
        axis = Axis.same(kernel) if same else Axis.fixed(kernel, low=kernel // 2, high=kernel // 2)
        groups = data.draw(st.sampled_from([1, 2, channels]))
        branches.append(
            AffineConv.conv(
                torch.randn(channels, channels // groups, kernel, kernel),
                torch.randn(channels),
                axis,
                axis,
                groups=groups,
            )
        )
    x = torch.randn(2, channels, 9, 8, dtype=torch.float64)
    expected = torch.stack([branch(x) for branch in branches]).sum(0)
    torch.testing.assert_close(AffineConv.add(branches)(x), expected, rtol=0, atol=1e-12)


def test_branches_of_different_stride_are_refused() -> None:
    strided = AffineConv.average(2, Axis.fixed(2, stride=2), Axis.fixed(2, stride=2))
    with pytest.raises(FoldError, match="strides"):
        AffineConv.add([AffineConv.identity(2), strided])


def test_same_padding_with_a_stride_does_not_hide_a_moving_shortcut() -> None:
    """A 1×1 shortcut and a SAME 3×3, both with stride 2, meet at other taps for odd sizes than for even ones."""
    window, point = Axis.same(3, stride=2), Axis.fixed(1, stride=2)
    main = AffineConv.conv(torch.randn(2, 2, 3, 3), None, window, window)
    shortcut = AffineConv.conv(torch.randn(2, 2, 1, 1), None, point, point)
    with pytest.raises(FoldError, match="odd and even"):
        AffineConv.add([main, shortcut])


@pytest.mark.parametrize("size", [7, 8, 9, 10, 31, 32])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, 3), (2, 2), (4, 1)])
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int) -> None:
    axis = Axis.same(kernel, stride=stride)
    low, high = axis.pads(size)
    assert axis.output(size) == -(-size // stride)
    assert high - low in (0, 1)


def test_depthwise_after_depthwise_stays_depthwise() -> None:
    axis = Axis.fixed(3, low=1, high=1)
    depthwise = AffineConv.conv(torch.randn(8, 1, 3, 3), None, axis, axis, groups=8)
    composite = depthwise.then(depthwise)
    assert composite.spec.groups == 8
    assert tuple(composite.weight.shape) == (8, 1, 5, 5)


def test_block_diagonal_kernels_keep_the_blocks_they_share() -> None:
    point = Axis.fixed(1)
    four = AffineConv.conv(torch.randn(12, 3, 1, 1), None, point, point, groups=4)
    six = AffineConv.conv(torch.randn(12, 2, 1, 1), None, point, point, groups=6)
    assert four.then(six).spec.groups == 2


def test_a_dilation_survives_where_it_can() -> None:
    wide = Axis.fixed(3, dilation=3, low=3, high=3)
    weight = torch.randn(2, 2, 3, 3)
    dilated = AffineConv.conv(weight, None, wide, wide)
    assert AffineConv.identity(2).then(dilated).spec.rows.dilation == 3
    assert dilated.then(dilated).spec.kernel == (5, 5)
    assert dilated.then(dilated).spec.rows.dilation == 3


@pytest.mark.parametrize(
    ("module", "channels"),
    [
        (nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), (1, 2), 2), 4),
        (nn.Conv2d(4, 4, 4, padding="same"), 4),
        (nn.Conv2d(4, 4, 3, padding="valid", bias=False), 4),
        (nn.BatchNorm2d(4, eps=0.1), 4),
        (nn.BatchNorm2d(4, affine=False), 4),
        (nn.AvgPool2d((2, 3), 2, (1, 1)), 4),
        (nn.ZeroPad2d((1, 2, 3, 0)), 4),
        (nn.Identity(), 4),
        (nn.Dropout(0.5), 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch says it pads a copy
def test_modules_are_read_as_they_run(module: nn.Module, channels: int) -> None:
    module = module.double().eval()
    if isinstance(module, nn.BatchNorm2d):
        assert module.running_mean is not None and module.running_var is not None
        module.running_mean.normal_()
        module.running_var.uniform_(0.1, 2)
    conv = conv_of(module, channels)
    assert conv is not None
    x = torch.randn(2, channels, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(conv(x), module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ConvTranspose2d(4, 4, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_convolution_is_not_read_as_one(module: nn.Module) -> None:
    assert conv_of(module.eval(), 4) is None


def test_modules_compose_as_they_run_one_after_the_other() -> None:
    layers = [nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Identity(), nn.AvgPool2d(2), nn.Conv2d(6, 2, 1)]
    model = nn.Sequential(*layers).double().eval()
    composite = AffineConv.compose(
        *(AffineConv.from_module(layer, 6 if index else 4) for index, layer in enumerate(layers))
    )
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(composite(x), model(x), rtol=0, atol=1e-12)
    assert AffineConv.from_module(nn.BatchNorm2d(6)).spec.in_channels == 6


def test_what_is_not_affine_is_no_convolution() -> None:
    for module, words in ((nn.ReLU(), "ReLU does not say"), (nn.LSTM(2, 2), "LSTM does not say")):
        with pytest.raises(FoldError, match=words):
            AffineConv.from_module(module)
    with pytest.raises(FoldError, match="MaxPool2d is no affine"):
        AffineConv.from_module(nn.MaxPool2d(2), 4)
    with pytest.raises(FoldError, match="nothing to compose"):
        AffineConv.compose()
