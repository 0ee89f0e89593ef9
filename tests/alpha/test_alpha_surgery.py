"""Attaching, naming, setting, copying, saving and settling."""

import copy
import io

import pytest
import torch
from alpha_networks import BasicBlock, chain, season
from torch import nn

import pipeline.models.zoo  # noqa: F401  repairs torchvision before timm
from pipeline import alpha
from pipeline.errors import TraceError, UnitError

CONV = "conv"


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return season(nn.Sequential(BasicBlock(3, 6, 2), BasicBlock(6, 6, 1)))


def test_attach_copies(network: nn.Module) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    student = alpha.attach(network, ["0.act1"])
    assert isinstance(network[0].act1, nn.ReLU) and network[0].act1.inplace
    student[0].conv1.weight.data.zero_()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_units_share_one_alpha_and_layers_do_not() -> None:
    import timm

    model = timm.create_model("mobilenetv2_050", num_classes=3)
    student = alpha.attach(model, ["blocks.1.1", "blocks.2.1"])
    assert alpha.activations(student) == {
        "blocks.1.1": ["blocks.1.1.bn1.act", "blocks.1.1.bn2.act"],
        "blocks.2.1": ["blocks.2.1.bn1.act", "blocks.2.1.bn2.act"],
    }
    assert len(alpha.parameters(student)) == 2
    alpha.set_values(student, {"blocks.1.1": 0.5})
    assert alpha.values(student) == {"blocks.1.1": 0.5, "blocks.2.1": 0.0}
    layers = alpha.attach(model, ["blocks.1.1"], per="layer")
    assert list(alpha.values(layers)) == ["blocks.1.1.bn1.act", "blocks.1.1.bn2.act"]


def test_state_dict_keys_are_the_originals_plus_alpha(network: nn.Module) -> None:
    student = alpha.attach(network, ["0", "1"])
    extra = set(student.state_dict()) - set(network.state_dict())
    assert set(network.state_dict()) <= set(student.state_dict())
    assert all(name.endswith(".alpha") for name in extra)
    missing = student.load_state_dict(network.state_dict(), strict=False)
    assert all(name.endswith(".alpha") for name in missing.missing_keys) and not missing.unexpected_keys
    settled = alpha.settle(alpha.set_values(student, 1.0))
    assert set(settled.state_dict()) == set(network.state_dict())
    network.load_state_dict(settled.state_dict())


def test_loading_reaches_the_convolution_behind_a_ring(network: nn.Module) -> None:
    student = alpha.set_values(alpha.attach(network, ["0.act1"]), 0.5)
    other = alpha.attach(season(copy.deepcopy(network), seed=5), ["0.act1"])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    other.load_state_dict(student.state_dict(), assign=True)
    torch.testing.assert_close(other(x), student(x), rtol=0, atol=0)


def test_copies_and_pickles_are_independent(network: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    student = alpha.set_values(alpha.attach(network, ["0.act1", "0.act2", "1.act1"]), 0.7)
    student(x).sum().backward()
    expected = student(x)
    twin = copy.deepcopy(student)
    buffer = io.BytesIO()
    torch.save(student, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
    assert (student(x) - expected).abs().max() > 1e-3


def test_precision_change_moves_every_reference(network: nn.Module) -> None:
    student = alpha.set_values(alpha.attach(network, ["0.act1", "1.act1"]), 0.5)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    double = student(x)
    single = student.float()(x.float())
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_settle_removes_above_the_threshold_and_restores_below(network: nn.Module) -> None:
    student = alpha.attach(network, ["0.act1", "1.act1"])
    alpha.set_values(student, {"0.act1": 0.95, "1.act1": 0.85})
    ready = alpha.settle(student, threshold=0.9)
    assert isinstance(ready[0].act1, nn.Identity)
    assert isinstance(ready[1].act1, nn.ReLU) and ready[1].act1.inplace
    assert type(ready[1].conv2) is nn.Conv2d and isinstance(ready[0].conv2, alpha.RingConv2d)
    assert alpha.values(ready) == {} and alpha.values(student)["0.act1"] == pytest.approx(0.95)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    back = alpha.settle(student, threshold=1.0)
    torch.testing.assert_close(back(x), network(x), rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in back.modules())


def test_settled_network_can_be_attached_again(network: nn.Module) -> None:
    first = alpha.settle(alpha.set_values(alpha.attach(network, ["0.act1"]), 1.0))
    second = alpha.set_values(alpha.attach(first, ["1.act1"]), 1.0)
    both = alpha.settle(second)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    at_once = alpha.settle(alpha.set_values(alpha.attach(network, ["0.act1", "1.act1"]), 1.0))
    torch.testing.assert_close(both(x), at_once(x), rtol=0, atol=1e-12)


def test_snap_fixes_every_alpha(network: nn.Module) -> None:
    student = alpha.set_values(alpha.attach(network, ["0.act1", "1.act1"]), 0.5)
    alpha.set_values(student, {"1.act1": 0.97})
    assert alpha.snap_(student, 0.9) == pytest.approx({"0.act1": 0.5, "1.act1": 0.97})
    assert alpha.values(student) == {"0.act1": 0.0, "1.act1": 1.0}
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(student(x), alpha.settle(student)(x), rtol=0, atol=1e-12)


def test_clamp_brings_alpha_back(network: nn.Module) -> None:
    student = alpha.attach(network, ["0.act1", "1.act1"])
    for parameter, value in zip(alpha.parameters(student), (-0.3, 1.2), strict=True):
        parameter.data.fill_(value)
    alpha.clamp_(student)
    assert alpha.values(student) == {"0.act1": 0.0, "1.act1": 1.0}


def test_one_module_in_two_places_gets_one_alpha() -> None:
    shared = nn.ReLU()
    network = season(chain((CONV, 4, 3, 1, 1, 1), shared, (CONV, 4, 3, 1, 1, 1), shared, (CONV, 4, 3, 1, 1, 1)))
    student = alpha.set_values(alpha.attach(network, ["1"]), 1.0)
    ready = alpha.settle(student)
    assert [type(layer).__name__ for layer in ready] == ["Conv2d", "Identity", "RingConv2d", "Identity", "RingConv2d"]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (["0.act9"], r"no unit, module or activation '0\.act9'(.|\n)*did you mean '0\.act"),
        (["0.conv1"], "holds no activation"),
        (["0", "0.act1"], "claimed by both"),
    ],
)
def test_wrong_names_are_explained(network: nn.Module, units: list[str], message: str) -> None:
    with pytest.raises(UnitError, match=message):
        alpha.attach(network, units)


def test_values_outside_the_range_are_refused(network: nn.Module) -> None:
    student = alpha.attach(network, ["0.act1"])
    with pytest.raises(UnitError, match=r"cannot be 1\.5"):
        alpha.set_values(student, 1.5)
    with pytest.raises(UnitError, match="no α is called '9'"):
        alpha.set_values(student, {"9": 1.0})
    with pytest.raises(UnitError, match="has an α already"):
        alpha.attach(student, ["0.act1"])


def test_blended_network_trains_alpha_by_the_loss() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.LazyLinear(2)
    )
    network(torch.zeros(1, 3, 6, 6))
    student = alpha.set_values(alpha.attach(network, ["1"]), 0.5)
    optimiser = torch.optim.SGD(alpha.parameters(student), lr=0.1)
    x = torch.randn(8, 3, 6, 6)
    (student(x).square().mean() * 0 + alpha.penalty(student)).backward()
    optimiser.step()
    # d/dα (1 − α²) = −2α, so one step of 0.1 moves 0.5 by 0.1.
    assert alpha.values(student)["1"] == pytest.approx(0.6)


def test_without_rings_a_network_need_not_be_traced() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = chain((CONV, 4, 3, 1, 1, 1), nn.ReLU(), (CONV, 4, 3, 1, 1, 1), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x + 1 if x.sum() > 0 else x)

    network = Forked()
    with pytest.raises(TraceError, match=r"x\.sum"):
        alpha.attach(network)
    student = alpha.attach(network, ring=False)
    names = [name for name, module in network.named_modules() if isinstance(module, nn.ReLU)]
    assert list(alpha.values(student)) == names and len(names) == 2
    settled = alpha.settle(alpha.set_values(student, {names[0]: 1.0}))
    assert isinstance(settled.get_submodule(names[0]), nn.Identity)
    assert isinstance(settled.get_submodule(names[1]), nn.ReLU)


@pytest.mark.parametrize("threshold", [1.5, -0.1, float("nan")])
def test_a_threshold_that_no_alpha_can_pass_is_refused(network: nn.Module, threshold: float) -> None:
    student = alpha.attach(network, ["0.act1"], ring=False)
    for act in (alpha.settle, alpha.snap_):
        with pytest.raises(UnitError, match="threshold is"):
            act(student, threshold=threshold)
