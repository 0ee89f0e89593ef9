"""Random chains and residual blocks: folded equals linear, inside always and everywhere if asked."""

from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.folding import fold
from pipeline.folding.rules import Policy


class Residual(nn.Module):
    """x + body(x), or shortcut(x) + body(x)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + (x if self.shortcut is None else self.shortcut(x))


def randomise(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.double().eval()


@st.composite
def layers(
    draw: st.DrawFn, in_channels: int, room: int, *, out_channels: int | None = None, stride: int | None = None
) -> list[nn.Module]:
    """A convolution with its padding, perhaps a norm and a dropped activation after it.

    Its taps lie at most `room` pixels apart. With a given stride it is padded such that n pixels become ⌈n / stride⌉.
    """
    fits = stride is not None
    dilation = draw(st.integers(1, 2))
    kernel = draw(st.sampled_from([k for k in ([1, 3, 5] if fits else range(1, 6)) if dilation * (k - 1) <= room]))
    stride = stride or draw(st.integers(1, 2))
    groups = draw(
        st.sampled_from([g for g in (1, 2, in_channels) if not in_channels % g and not (out_channels or g) % g])
    )
    out = out_channels or groups * draw(st.integers(1, 2))
    bias = draw(st.booleans())
    style = draw(st.sampled_from(["symmetric", "same", "asymmetric"]))
    reach = dilation * (kernel - 1)
    if style == "same":
        conv: nn.Module = Conv2dSame(in_channels, out, kernel, stride, 0, dilation, groups=groups, bias=bias)
        made: list[nn.Module] = [conv]
    elif style == "symmetric":
        padding = reach // 2 if fits else draw(st.integers(0, reach // 2 + 1))
        made = [nn.Conv2d(in_channels, out, kernel, stride, padding, dilation, groups, bias)]
    else:
        low = draw(st.integers(0, reach if fits else 2))
        pads = (low, reach - low if fits else draw(st.integers(0, 2)))
        made = [
            nn.ZeroPad2d((*pads, *pads)),
            nn.Conv2d(in_channels, out, kernel, stride, 0, dilation, groups, bias),
        ]
    if draw(st.booleans()):
        made.append(nn.BatchNorm2d(out))
    if draw(st.booleans()):
        made.append(nn.Identity())
    return made


def convolution(made: list[nn.Module]) -> nn.Conv2d:
    return next(module for module in made if isinstance(module, nn.Conv2d))


def span(made: list[nn.Module]) -> int:
    """Pixels between the first and the last tap."""
    conv = convolution(made)
    return conv.dilation[0] * (conv.kernel_size[0] - 1)


@st.composite
def residuals(draw: st.DrawFn, width: int, room: int, count: int) -> tuple[nn.Module, int, int]:
    """A residual block of `count` convolutions beside its shortcut; returns its stride and its room as well."""
    strided = draw(st.sampled_from([None, *range(count)]))
    body: list[nn.Module] = []
    inner, stride, used = width, 1, 0
    for index in range(count):
        step = 2 if index == strided else 1
        out = width if index == count - 1 else None
        made = draw(layers(inner, (room - used) // stride, out_channels=out, stride=step))
        used, stride, inner = used + stride * span(made), stride * step, convolution(made).out_channels
        body += made
    shortcut = draw(layers(width, room, out_channels=width, stride=stride))
    plain = stride == 1 and draw(st.booleans())
    return (
        Residual(nn.Sequential(*body), None if plain else nn.Sequential(*shortcut)),
        stride,
        max(used, span(shortcut)),
    )


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """One to five convolutions, in a chain, in residual blocks (shortcuts not counted), or both."""
    channels = draw(st.sampled_from([2, 4]))
    parts: list[nn.Module] = []
    width, left, stride, room = channels, draw(st.integers(1, 5)), 1, 42  # what lies further apart has no inside
    while left:
        if draw(st.booleans()):
            count = draw(st.integers(1, left))
            block, step, used = draw(residuals(width, room // stride, count))
            parts.append(block)
        else:
            count, made = 1, draw(layers(width, room // stride))
            step, used, width = convolution(made).stride[0], span(made), convolution(made).out_channels
            parts += made
        left, room, stride = left - count, room - used * stride, stride * step
    model = randomise(nn.Sequential(*parts), draw(st.integers(0, 2**31)))
    height, across = 48 + draw(st.integers(0, 3)), 48 + draw(st.integers(0, 3))
    return model, torch.randn(1, channels, height, across, dtype=torch.float64)


def interior(module: nn.Module, valid: Tensor) -> Tensor:
    """Marks with 1 the outputs that no zero padding reaches, by pushing a mask through the layers one at a time."""
    if isinstance(module, nn.Sequential):
        for part in module:
            valid = interior(part, valid)
        return valid
    if isinstance(module, Residual):
        other = valid if module.shortcut is None else interior(module.shortcut, valid)
        return interior(module.body, valid) * other
    if isinstance(module, nn.ZeroPad2d):
        return F.pad(valid, module.padding)
    if isinstance(module, nn.Conv2d):
        if isinstance(module, Conv2dSame):
            valid = pad_same(valid, module.kernel_size, module.stride, module.dilation)
        ones = valid.new_ones(1, 1, *module.kernel_size)
        assert isinstance(module.padding, tuple)
        hits = F.conv2d(valid, ones, None, module.stride, module.padding, module.dilation)
        return (hits == ones.numel()).to(valid.dtype)
    return valid


def check_inside(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    result = fold(model, x)
    expected, got = model(x), result.model(x)
    assert got.shape == expected.shape
    inside = interior(model, torch.ones_like(x[:, :1]))
    assert ((got - expected) * inside).abs().max() < 1e-10
    convs = [module for module in result.model.modules() if isinstance(module, nn.Conv2d)]
    if not result.skipped:
        assert len(convs) == 1


def check_exact(case: tuple[nn.Module, Tensor], policy: Policy) -> None:
    model, x = case
    result = fold(model, x, border="exact", policy=policy)
    assert result.max_abs_error < 1e-10
    assert all(segment.border != "approximate" for segment in result.segments)
    for height, width in ((43, 50), (50, 44)):
        other = torch.randn(2, x.shape[1], height, width, dtype=torch.float64)
        assert (result.model(other) - model(other)).abs().max() < 1e-10


def examples(count: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, suppress_health_check=slow)


POLICIES = st.sampled_from(get_args(Policy))


@examples(25)
@given(networks())
def test_plain_composition_is_exact_inside(case: tuple[nn.Module, Tensor]) -> None:
    check_inside(case)


@examples(20)
@given(networks(), POLICIES)
def test_an_exact_border_is_exact_everywhere_at_every_size(case: tuple[nn.Module, Tensor], policy: Policy) -> None:
    check_exact(case, policy)


@pytest.mark.slow
@examples(400)
@given(networks(), POLICIES)
def test_many_networks_inside_and_at_the_border(case: tuple[nn.Module, Tensor], policy: Policy) -> None:
    check_inside(case)
    check_exact(case, policy)
