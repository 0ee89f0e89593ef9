"""Equalisation keeps the function and evens the ranges; bias correction centres the rounding error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import images, tiny_net
from torch import fx, nn

from pipeline.export.bias_correction import correct_biases, rounded_weight
from pipeline.export.equalise import equalise
from pipeline.export.layers import weighted_layers
from pipeline.export.lowering import lower

EXAMPLE = torch.from_numpy(images(1))


def uneven_pair(seed: int, activation: nn.Module, depthwise: bool) -> fx.GraphModule:
    """Two layers whose channel ranges differ by up to a million; lowered."""
    torch.manual_seed(seed)
    second = nn.Conv2d(6, 6, 3, padding=1, groups=6) if depthwise else nn.Conv2d(6, 4, 1)
    first = nn.Conv2d(3, 6, 3)
    with torch.no_grad():
        scale = 10 ** torch.empty(6).uniform_(-3, 3)
        first.weight.mul_(scale.reshape(-1, 1, 1, 1))
        first.bias.mul_(scale)
        inputs = scale.reshape(-1, 1, 1, 1) if depthwise else scale.reshape(1, -1, 1, 1)
        second.weight.div_(inputs)
    return lower(nn.Sequential(first, activation, second, nn.AdaptiveAvgPool2d(1), nn.Flatten()), EXAMPLE)


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_a_relu_pair_is_evened_without_changing_the_function(seed: int, depthwise: bool, relu: bool) -> None:
    network = uneven_pair(seed, nn.ReLU() if relu else nn.Identity(), depthwise)
    evened, records = equalise(network, [images(2)])
    batch = torch.from_numpy(images(4, seed=3)).double()
    with torch.no_grad():
        expected, found = network.double()(batch), evened.double()(batch)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
    [record] = records
    assert record.scaled == 6
    assert record.spread_after < 6
    assert record.spread_after < record.spread_before


def test_relu6_channels_stay_below_the_clip() -> None:
    model = tiny_net()
    with torch.no_grad():
        model.blocks["first"].expand[1].bias[:8] += 6.0
    network = lower(model, EXAMPLE)
    calibration = images(64, seed=1)
    evened, records = equalise(network, [calibration])
    expanded = next(record for record in records if record.first == "blocks.first.expand.0")
    assert 0 < expanded.scaled <= 24, "the channels that clip must not move"
    with torch.no_grad():
        before, after = network(torch.from_numpy(calibration)), evened(torch.from_numpy(calibration))
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()


def test_equalisation_rescues_per_tensor_rounding() -> None:
    network = uneven_pair(7, nn.ReLU(), depthwise=False)
    evened, _ = equalise(network, [images(2)])
    batch = torch.from_numpy(images(8, seed=4))

    def noise(candidate: fx.GraphModule) -> float:
        with torch.no_grad():
            expected = candidate(batch)
            for layer in weighted_layers(candidate).values():
                layer.weight.copy_(rounded_weight(layer, per_channel=False))
            return float(((candidate(batch) - expected) ** 2).mean() / expected.var())

    assert noise(evened) < 0.01 * noise(network)


def test_layers_with_another_reader_are_left_alone() -> None:
    _, records = equalise(lower(tiny_net(), EXAMPLE), [images(2)])
    assert ("blocks.first.project.0", "blocks.folded") not in {(item.first, item.second) for item in records}
    assert ("blocks.first.expand.0", "blocks.first.depthwise.0") in {(item.first, item.second) for item in records}


@pytest.mark.parametrize("per_channel", [True, False])
def test_rounded_weights_are_on_the_grid_of_int8(per_channel: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3)
    rounded = rounded_weight(layer, per_channel=per_channel)
    weight = layer.weight.detach()
    channels = weight.flatten(1).abs().amax(1) if per_channel else weight.abs().max().expand(5)
    steps = rounded / (channels / 127).reshape(-1, 1, 1, 1)
    assert (steps - steps.round()).abs().max() < 1e-3
    assert (rounded - weight).abs().max() <= channels.max() / 254 * 1.001


def test_corrected_biases_centre_every_layers_output() -> None:
    network = lower(tiny_net(), EXAMPLE)
    calibration = images(48, seed=1)
    corrected, shifts = correct_biases(network, [calibration[:20], calibration[20:]], per_channel=False)
    assert set(shifts) == set(weighted_layers(network))
    for layer in weighted_layers(corrected).values():
        layer.weight.data.copy_(rounded_weight(layer, per_channel=False))
    plain = lower(tiny_net(), EXAMPLE)
    for layer in weighted_layers(plain).values():
        layer.weight.data.copy_(rounded_weight(layer, per_channel=False))
    batch = torch.from_numpy(calibration)
    with torch.no_grad():
        expected = network(batch).mean(0)
        error, uncorrected = corrected(batch).mean(0) - expected, plain(batch).mean(0) - expected
    assert error.abs().max() < 1e-4 < 0.1 * uncorrected.abs().max()


def test_surgery_does_not_change_its_argument() -> None:
    network = lower(tiny_net(), EXAMPLE)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    equalise(network, [images(2)])
    correct_biases(network, [images(2)])
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
