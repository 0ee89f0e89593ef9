"""σ_α against its formula, its gradients against finite differences, and the bookkeeping around it."""

import copy

import pytest
import torch
from torch import nn

from pipeline import alpha
from pipeline.alpha import AlphaActivation
from pipeline.errors import UnitError

ACTIVATIONS = [
    nn.ReLU(inplace=True),
    nn.ReLU6(inplace=True),
    nn.PReLU(3),
    nn.PReLU(),
    nn.LeakyReLU(0.1, inplace=True),
    nn.SiLU(inplace=True),
    nn.Hardswish(inplace=True),
    nn.GELU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.ELU(),
]


def blend(sigma: nn.Module, value: float) -> AlphaActivation:
    parameter = nn.Parameter(torch.tensor(value, dtype=torch.float64))
    return AlphaActivation(copy.deepcopy(sigma).double(), parameter, "unit")


@pytest.mark.parametrize("sigma", ACTIVATIONS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_blend_is_the_formula(sigma: nn.Module, value: float) -> None:
    x = 4 * torch.randn(2, 3, 5, 4, dtype=torch.float64)
    plain = copy.deepcopy(sigma).double()
    expected = value * x + (1 - value) * plain(x.clone())
    torch.testing.assert_close(blend(sigma, value)(x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("sigma", ACTIVATIONS, ids=lambda s: type(s).__name__)
def test_gradients_in_input_and_alpha_match_finite_differences(sigma: nn.Module) -> None:
    # Points stay clear of the kinks at 0 and 6, where a finite difference means nothing.
    x = torch.tensor([-7.0, -2.5, -0.3, 0.4, 2.9, 5.5, 6.4, 9.0], dtype=torch.float64)
    x = x.reshape(1, 1, 2, 4).repeat(1, 3, 1, 1).requires_grad_()
    module = blend(sigma, 0.37)

    def run(given: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"alpha": value}, (given,))

    value = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, value))


def test_input_survives_an_in_place_activation() -> None:
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    before = x.clone()
    for sigma in (nn.ReLU(inplace=True), nn.ReLU6(inplace=True), nn.SiLU(inplace=True)):
        blend(sigma, 0.5)(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("sigma", [nn.ReLU6(), nn.ReLU(), nn.SiLU(), nn.PReLU(3)], ids=lambda s: type(s).__name__)
def test_lower_precision_keeps_its_type(sigma: nn.Module) -> None:
    module = AlphaActivation(copy.deepcopy(sigma), nn.Parameter(torch.tensor(0.25)), "unit")
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    out = module(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert module.alpha.grad is not None and module.alpha.grad.dtype == torch.float32


def test_frozen_ends_are_the_plain_functions() -> None:
    module = blend(nn.ReLU6(), 0.4)
    x = 5 * torch.randn(1, 3, 4, 4, dtype=torch.float64)
    module.freeze(1.0)
    assert module(x) is x
    module.freeze(0.0)
    torch.testing.assert_close(module(x), x.clamp(0, 6), rtol=0, atol=0)
    assert not module.alpha.requires_grad
    module.freeze(None)
    assert module.alpha.requires_grad


def test_prelu_slope_keeps_its_name_and_trains() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 4, 1))
    student = alpha.attach(network, ["1"])
    assert set(student.state_dict()) == set(network.state_dict()) | {"1.alpha"}
    student(torch.randn(2, 3, 4, 4)).sum().backward()
    assert student.get_parameter("1.weight").grad.abs().sum() > 0


def test_penalty_is_the_papers_sum() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    student = alpha.attach(network, ["1", "3"])
    alpha.set_values(student, {"1": 0.5, "3": 0.9})
    expected = (1 - 0.5**3) + 4.0 * (1 - 0.9**3)
    loss = alpha.penalty(student, p=3, weights={"3": 4.0})
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert [p.grad.item() for p in alpha.parameters(student)] == pytest.approx([-3 * 0.25, -12 * 0.81], rel=1e-5)


def test_penalty_leaves_fixed_alphas_out() -> None:
    student = alpha.attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()), ["1", "3"])
    alpha.freeze_(student, {"1": 0.0})
    assert alpha.penalty(student).item() == pytest.approx(1.0)
    alpha.freeze_(student, {"3": 1.0})
    assert alpha.penalty(student).item() == 0.0


def test_penalty_weights_follow_savings() -> None:
    weights = alpha.weights_from_savings({"a": 30.0, "b": 10.0, "c": -5.0})
    assert weights == {"a": 1.5, "b": 0.5, "c": 0.0}
    with pytest.raises(UnitError, match="saves nothing"):
        alpha.weights_from_savings({"a": -1.0})


def test_unknown_penalty_weight_is_named() -> None:
    student = alpha.attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), ["1"])
    with pytest.raises(UnitError, match="unknown α 'layer9'"):
        alpha.penalty(student, weights={"layer9": 1.0})


def test_slopes_train_only_where_they_run() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.PReLU(3), nn.Conv2d(3, 3, 1), nn.PReLU(), nn.Conv2d(3, 3, 1))
    network[3].requires_grad_(False)
    student = alpha.attach(network, ["1", "3"], ring=False)
    for value in (1.0, 0.0, 0.5, None):
        alpha.freeze_(student, {"1": value, "3": value})
        student.zero_grad(set_to_none=True)
        student(torch.randn(1, 3, 4, 4)).sum().backward()
        # Data-parallel training waits for every parameter that wants a gradient.
        assert all((p.grad is not None) == p.requires_grad for p in student.parameters())
        assert student[1].weight.requires_grad == (value != 1.0) and not student[3].weight.requires_grad
    assert student[1].alpha.requires_grad
    alpha.freeze_(student, {"1": 1.0})
    kept = alpha.settle(student, threshold=1.0)  # nothing is above it: the original comes back, to train on
    assert kept[1].weight.requires_grad and not kept[3].weight.requires_grad
