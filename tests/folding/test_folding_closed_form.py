"""Least squares: against a direct solver, against units that are linear in truth, and its promises about memory."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import FoldError, UnitError
from pipeline.folding import closed_form_fold, find_units
from pipeline.folding.algebra import AffineConv
from pipeline.folding.geometry import Axis
from pipeline.folding.normal_equations import NormalEquations, Window
from pipeline.folding.walk import Walk, as_batches


def window(channels: int, out: int, kernel: int, stride: int = 1) -> Window:
    axis = Axis.same(kernel, stride=stride)
    return Window(channels, out, axis, axis)


def im2col(x: Tensor, kernel: int) -> Tensor:
    """[pixels, channels · taps] by torch's own unfolding."""
    columns = F.unfold(x, kernel, padding=kernel // 2)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def flat(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])


X = torch.randn(6, 3, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(6, 4, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 2.0


def sums_of(kernel: int, x: Tensor = X, y: Tensor = Y, batch: int = 2) -> NormalEquations:
    sums = NormalEquations(window(3, 4, kernel))
    for start in range(0, x.shape[0], batch):
        sums.add(x[start : start + batch], y[start : start + batch])
    return sums


def test_without_ridge_it_is_the_least_squares_solution() -> None:
    columns = im2col(X, 3)
    ones = torch.ones(columns.shape[0], 1, dtype=torch.float64)
    direct = torch.linalg.lstsq(torch.cat([columns, ones], dim=1), flat(Y)).solution
    conv = sums_of(3).solve(0.0)
    torch.testing.assert_close(conv.weight.reshape(4, -1).T, direct[:-1], rtol=0, atol=1e-9)
    torch.testing.assert_close(conv.bias, direct[-1], rtol=0, atol=1e-9)


def test_the_ridge_solution_minimises_what_it_says() -> None:
    """Gradient of the penalised error, by autograd, is zero at the solution."""
    prior = AffineConv.conv(torch.randn(4, 3, 3, 3), None, Axis.same(3), Axis.same(3))
    ridge = 0.3
    solved = sums_of(3).solve(ridge, prior=prior)
    weight, bias = solved.weight.clone().requires_grad_(), solved.bias.clone().requires_grad_()
    columns = im2col(X, 3)
    error = (F.conv2d(X, weight, bias, padding=1) - Y).square().sum() / columns.shape[0]
    scale = (columns - columns.mean(0)).square().mean()
    (error + ridge * scale * (weight - prior.weight).square().sum()).backward()
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad.abs().max() < 1e-9
    assert bias.grad.abs().max() < 1e-9


def test_batches_and_order_do_not_matter() -> None:
    one, many = sums_of(3, batch=6), sums_of(3, X.flip(0), Y.flip(0), batch=1)
    torch.testing.assert_close(one.gram, many.gram, rtol=1e-13, atol=1e-10)
    torch.testing.assert_close(one.solve(1e-3).weight, many.solve(1e-3).weight, rtol=0, atol=1e-11)


def test_a_smaller_window_is_solved_from_the_same_sums() -> None:
    for kernel in (1, 3):
        inner = sums_of(5).solve(1e-2, window=window(3, 4, kernel))
        outer = sums_of(kernel).solve(1e-2)
        torch.testing.assert_close(inner.weight, outer.weight, rtol=0, atol=1e-11)
        torch.testing.assert_close(inner.bias, outer.bias, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_residual_is_the_error_that_the_convolution_makes(kernel: int) -> None:
    other_x, other_y = X.flip(0) * 1.3 + 0.1, Y.roll(1, 0)
    conv = sums_of(kernel).solve(1e-2)
    control = NormalEquations(window(3, 4, 5))
    control.add(other_x, other_y)
    error = (conv(other_x) - other_y).square().mean(dim=(0, 2, 3)).sum()
    variance = other_y.var(dim=(0, 2, 3), correction=0).sum()
    assert control.residual(conv) == pytest.approx(float(error / variance), rel=1e-10)


def test_importances_are_repeats() -> None:
    repeats = torch.randint(0, 4, (6, 9, 10), generator=torch.Generator().manual_seed(2))
    weighted = NormalEquations(window(3, 4, 1))
    weighted.add(X, Y, repeats)
    times = repeats.reshape(-1)
    columns, targets = im2col(X, 1).repeat_interleave(times, 0), flat(Y).repeat_interleave(times, 0)
    ones = torch.ones(columns.shape[0], 1, dtype=torch.float64)
    direct = torch.linalg.lstsq(torch.cat([columns, ones], dim=1), targets).solution
    torch.testing.assert_close(weighted.solve(0.0).weight.reshape(4, -1).T, direct[:-1], rtol=0, atol=1e-9)


def test_strided_windows_sit_where_the_convolution_has_them() -> None:
    truth = AffineConv.conv(torch.randn(4, 3, 3, 3), torch.randn(4), Axis.same(3, stride=2), Axis.same(3, stride=2))
    for size in ((9, 10), (10, 9)):
        x = torch.randn(8, 3, *size, dtype=torch.float64)
        sums = NormalEquations(window(3, 4, 3, stride=2))
        sums.add(x, truth(x))
        torch.testing.assert_close(sums.solve(0.0).weight, truth.weight, rtol=0, atol=1e-8)


def test_no_data_and_infinite_data_are_refused() -> None:
    with pytest.raises(FoldError, match="finite"):
        NormalEquations(window(3, 4, 1)).solve(1e-3)
    sums = NormalEquations(window(3, 4, 1))
    sums.add(torch.full_like(X, torch.inf), Y)
    with pytest.raises(FoldError, match="overflow"):
        sums.solve(1e-3)


class Block(nn.Module):
    """An inverted residual; named as published code names it, so that `find_units` sees a block."""

    def __init__(self, width: int, slope: float, stride: int = 1, out: int | None = None, dilation: int = 1) -> None:
        super().__init__()
        wide, out = 4 * width, out or width
        self.skip = stride == 1 and out == width
        self.layers = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.LeakyReLU(slope),
            nn.Conv2d(wide, wide, 3, stride, dilation, dilation, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.LeakyReLU(slope),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.skip else self.layers(x)


Block.__name__ = "InvertedResidual"


def network(slope: float, seed: int = 0) -> nn.Sequential:
    """A slope of one makes every activation the identity: then a unit is one convolution in truth."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        Block(8, slope),
        Block(8, slope, stride=2, out=10),
        Block(10, slope),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 5),
    )
    nn.init.normal_(model[6].weight, std=20.0)  # far from uniform, as a trained classifier is
    return model.eval()


IMAGES = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_a_unit_that_is_linear_is_recovered() -> None:
    model = network(1.0).double()
    images = IMAGES.double()
    result = closed_form_fold(model, ["1", "2", "3"], images, ridge=1e-12, batch_size=8)
    assert [fit.unit for fit in result.units] == ["1", "2", "3"]
    assert all(fit.residual < 1e-9 for fit in result.units)
    assert (result.model(images) - model(images)).abs().max() < 1e-4
    convs = [module for module in result.model.modules() if isinstance(module, nn.Conv2d)]
    assert [(conv.kernel_size, conv.stride) for conv in convs] == [((3, 3), (1, 1))] * 2 + [
        ((3, 3), (2, 2)),
        ((3, 3), (1, 1)),
    ]


def test_a_dilated_unit_is_recovered_with_its_dilation() -> None:
    """timm's output_stride=16 and 8 make such blocks."""
    torch.manual_seed(0)
    blocks = Block(8, 1.0, dilation=2), Block(8, 1.0, out=6, dilation=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.Flatten(), nn.Linear(6 * 256, 4)).double().eval()
    images = IMAGES.double()
    result = closed_form_fold(model, ["1", "2"], images, ridge=1e-12, batch_size=8, max_macs_ratio=9.0)
    assert [set(fit.tried) for fit in result.units] == [{1, 3, 5}] * 2
    assert [fit.kernel for fit in result.units] == [(3, 3)] * 2
    assert all(fit.residual < 1e-9 < fit.tried[1] for fit in result.units)
    assert all(result.model.get_submodule(name).dilation == (2, 2) for name in "12")
    assert (result.model(images) - model(images)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [((3, 1), (1, 0)), (4, "same"), ((4, 3), (1, 1))])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_units_of_any_window_are_recovered(shape: tuple[Any, Any]) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, shape[0], 1, shape[1]), nn.Conv2d(4, 4, 1)
            self.act = nn.LeakyReLU(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.act(self.first(x)))

    torch.manual_seed(0)
    model = nn.Sequential(Pair(), nn.AdaptiveAvgPool2d(2), nn.Flatten()).double().eval()
    result = closed_form_fold(model, ["0"], IMAGES.double(), ridge=1e-12, batch_size=8, max_macs_ratio=99.0)
    assert result.units[0].residual < 1e-9
    assert (result.model(IMAGES.double()) - model(IMAGES.double())).abs().max() < 1e-6


def test_few_batches_still_leave_images_to_judge_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of twelve images, of which the fifth and the tenth are kept: the residual is theirs alone."""
    images = IMAGES[:12].double()
    fitted = closed_form_fold(network(0.0).double(), ["1"], images, kernels=(3,), samples=10**6).units[0]
    monkeypatch.setattr(NormalEquations, "merged", lambda sums, _: sums)  # what was judged, before all are fitted to
    model = network(0.0).double()
    result = closed_form_fold(model, ["1"], images, kernels=(3,), samples=10**6)
    with torch.no_grad():
        before, after = (model[0](images[4::5]), model[:2](images[4::5]))
        error = (result.model.get_submodule("1")(before) - after).square().mean(dim=(0, 2, 3)).sum()
    assert fitted.residual == pytest.approx(float(error / after.var(dim=(0, 2, 3), correction=0).sum()), rel=1e-6)


@pytest.mark.parametrize(("images", "batch", "expected"), [(40, 8, 8), (12, 12, 2), (7, 3, 1), (4, 4, 0)])
def test_what_is_held_out_is_a_fifth(images: int, batch: int, expected: int) -> None:
    traced = closed_form_fold(network(0.1), ["1"], IMAGES, batch_size=8).model
    walk = Walk(traced, traced, as_batches(IMAGES[:images], batch), cache_bytes=0)
    walk.advance(0)
    counts = {True: 0, False: 0}
    for of_teacher, of_student, held in walk.parts(5):
        assert of_teacher.shape[0] == of_student.shape[0] > 0
        counts[held] += of_teacher.shape[0]
    assert counts == {True: expected, False: images - expected}


def test_the_model_is_untouched_and_every_weight_finite() -> None:
    model = network(0.1)
    before = copy.deepcopy(model.state_dict())
    result = closed_form_fold(model, ["1", "3"], IMAGES, batch_size=8, refit="all")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.isfinite(parameter).all() for parameter in result.model.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.model.modules())


def test_a_set_too_large_to_keep_gives_the_same_fit() -> None:
    kept = closed_form_fold(network(0.1), ["1", "3"], IMAGES, batch_size=8, refit="all")
    streamed = closed_form_fold(network(0.1), ["1", "3"], IMAGES, batch_size=8, refit="all", cache_mb=0)
    torch.testing.assert_close(kept.model(IMAGES), streamed.model(IMAGES))


def test_nothing_is_kept_beyond_the_cache() -> None:
    model = network(0.1)
    traced = closed_form_fold(model, ["1"], IMAGES, batch_size=8).model
    walk = Walk(traced, traced, as_batches(IMAGES, 8), cache_bytes=1000)
    walk.advance(2)
    assert walk._kept is None
    assert walk.images == 40
    assert sum(value.shape[0] for value, _ in walk.batches()) == 40


def test_images_may_come_as_batches_with_labels_or_from_a_function() -> None:
    loader = [(IMAGES[start : start + 8], torch.zeros(8)) for start in range(0, 40, 8)]
    expected = closed_form_fold(network(0.1), ["1"], IMAGES, batch_size=8).model(IMAGES)
    for images in (loader, lambda: iter(loader)):
        assert torch.equal(closed_form_fold(network(0.1), ["1"], images).model(IMAGES), expected)


def test_later_units_make_up_for_earlier_ones() -> None:
    """Fitted to the student's own inputs, the last unit is nearer the teacher than fitted to the teacher's."""
    model = network(0.0, seed=1)
    student = closed_form_fold(model, ["1", "3"], IMAGES, batch_size=8).model
    alone = closed_form_fold(model, ["3"], IMAGES, batch_size=8).model
    apart = copy.deepcopy(student)
    apart.get_submodule("3").load_state_dict(alone.get_submodule("3").state_dict())

    @torch.no_grad()
    def error(candidate: nn.Module) -> float:
        return float((candidate(IMAGES) - model(IMAGES)).square().mean())

    assert error(student) < error(apart)


def test_kernel_sizes_are_chosen_by_residual_and_macs() -> None:
    model = network(1.0)
    free = closed_form_fold(model, ["1"], IMAGES, batch_size=8, max_macs_ratio=100.0)
    assert set(free.units[0].tried) == {1, 3, 5}
    assert free.units[0].kernel == (3, 3)  # 5×5 fits no better, 1×1 much worse
    (bound,) = closed_form_fold(model, ["1"], IMAGES, batch_size=8, max_macs_ratio=0.9).units
    assert set(bound.tried) == {1, 3}
    assert bound.macs_after == 8 * 8 * 9 * 16 * 16


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(UnitError, match="no module"):
        closed_form_fold(network(0.1), ["9"], IMAGES)
    with pytest.raises(FoldError, match="no image"):
        closed_form_fold(network(0.1), ["1"], IMAGES[:0])
    with pytest.raises(FoldError, match="generator, which can be read only once"):
        closed_form_fold(network(0.1), ["1"], (batch for batch in IMAGES.split(8)))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"refit": "biass"}, "did you mean 'bias'"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"kernels": (3, 2)}, "kernels holds 2, expected odd"),
        ({"kernels": (0,)}, "kernels is 0"),
        ({"held_out": 1}, "held_out is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"samples": 1.5}, "samples is 1.5, expected a whole number"),
        ({"max_macs_ratio": 0}, "max_macs_ratio is 0"),
    ],
)
def test_option_values_that_cannot_be_are_named(option: dict[str, Any], words: str) -> None:
    with pytest.raises(FoldError, match=re.escape(words)):
        closed_form_fold(network(0.1), ["1"], IMAGES, **option)


def test_inputs_that_never_vary_need_a_ridge() -> None:
    still = torch.zeros(40, 3, 16, 16)
    with pytest.raises(FoldError, match="ridge"):
        closed_form_fold(network(0.1), ["1"], still, ridge=0.0)


def test_a_block_with_an_activation_after_its_sum_keeps_it() -> None:
    class BasicBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
            self.act1, self.act2 = nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act2(x + self.conv2(self.act1(self.conv1(x))))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), BasicBlock(), nn.Flatten(), nn.Linear(8 * 256, 3)).eval()
    assert find_units(model)[0].activations == ("1.act1",)
    result = closed_form_fold(model, ["1"], IMAGES, batch_size=8, max_macs_ratio=9.0)
    assert isinstance(result.model.get_submodule("1.act2"), nn.ReLU)
    assert result.units[0].tried[5] < result.units[0].tried[3] * 1.001
