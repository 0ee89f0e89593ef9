"""What `fold` merges, leaves, names, records and refuses."""

import copy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pipeline import alpha
from pipeline.errors import FoldError, TraceError, UnitError
from pipeline.folding import fold, linearise
from pipeline.folding.spec import ConvSpec
from pipeline.models import zoo


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives norms statistics unlike those at birth, so that biases are not zero by accident."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(0.2 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            module.bias.data.copy_(0.3 * torch.randn(module.num_features, generator=generator))
    return model.eval()


def inverted_residual(width: int = 8, expansion: int = 6, *, act: bool = True) -> nn.Sequential:
    wide = width * expansion
    relu = nn.ReLU6 if act else nn.Identity
    return nn.Sequential(
        nn.Conv2d(width, wide, 1, bias=False),
        nn.BatchNorm2d(wide),
        relu(),
        nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
        nn.BatchNorm2d(wide),
        relu(),
        nn.Conv2d(wide, width, 1, bias=False),
        nn.BatchNorm2d(width),
    )


class Skip(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


X = torch.randn(1, 8, 14, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_given_model_is_untouched_and_stays_in_its_mode() -> None:
    model = with_statistics(Skip(inverted_residual(act=False))).double().train()
    before = copy.deepcopy(model.state_dict())
    fold(model, X)
    assert model.training
    assert [type(m) for m in model.body] == [type(m) for m in inverted_residual(act=False)]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_linear_inverted_residual_is_one_dense_convolution() -> None:
    model = with_statistics(Skip(inverted_residual(act=False))).double()
    result = fold(model, X, border="exact")
    ((_, conv),) = convs(result.model).items()
    assert conv.kernel_size == (3, 3) and conv.groups == 1
    (segment,) = result.segments
    pixels = 14 * 15
    assert segment.macs_before == (8 * 48 * 2 + 48 * 9) * pixels
    assert segment.macs_after == 8 * 8 * 9 * pixels
    assert (segment.windows, segment.border, result.skipped) == (3, "bias map", ())
    assert result.max_abs_error < 1e-12


def test_the_approximate_border_differs_at_the_border_only() -> None:
    model = with_statistics(inverted_residual(act=False)).double()
    result = fold(model, X)
    difference = (result.model(X) - model(X)).abs().amax(dim=(0, 1))
    assert difference[1:-1, 1:-1].max() < 1e-12
    assert difference.max() > 1e-3
    assert result.max_abs_error == pytest.approx(difference.max().item())
    assert result.segments[0].border == "approximate"


def test_the_dtype_of_the_model_comes_out_rounded_once() -> None:
    double = with_statistics(inverted_residual(act=False)).double()
    result = fold(double.float(), X.float())
    exact = fold(copy.deepcopy(double).double(), X)  # the same float32 weights, multiplied out and kept in float64
    (single,), (reference,) = convs(result.model).values(), convs(exact.model).values()
    assert single.weight.dtype == torch.float32
    assert torch.equal(single.weight, reference.weight.float())


def test_activations_that_stay_bound_the_regions() -> None:
    result = fold(with_statistics(Skip(inverted_residual())).double(), X)
    assert [(conv.kernel_size, conv.groups) for conv in convs(result.model).values()] == [
        ((1, 1), 1),
        ((3, 3), 48),
        ((1, 1), 1),
    ]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.model.modules())
    assert result.max_abs_error < 1e-12
    assert all(segment.windows == 1 and segment.border == "exact" for segment in result.segments)


def test_a_3x3_after_a_3x3_stays_when_the_border_is_exact() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)).double()
    result = fold(model, X, border="exact")
    assert len(convs(result.model)) == 2
    (skip,) = result.skipped
    assert skip.names == ("0", "1")
    assert "zero padding between them" in skip.reason
    assert len(convs(fold(model, X).model)) == 1


def test_the_bias_map_follows_weights_that_change() -> None:
    """Trained, loaded or cast after the fold, the kept map is never stale."""
    model = with_statistics(inverted_residual(act=False)).double()
    folded = fold(model, X, border="exact").model
    other = fold(with_statistics(inverted_residual(act=False), seed=5).double(), X, border="exact").model
    folded.load_state_dict(other.state_dict())
    assert torch.equal(folded(X), other(X))
    folded.train()
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(folded.eval()(X), 1.5 * other(X))


def test_cheapest_finds_the_cut_that_an_exhaustive_search_finds() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        widths = torch.randint(1, 40, (6,), generator=generator).tolist()
        kernels = (2 * torch.randint(0, 3, (5,), generator=generator) + 1).tolist()
        chain = nn.Sequential(
            *(
                nn.Conv2d(a, b, k, padding=k // 2, bias=False)
                for (a, b), k in zip(pairwise(widths), kernels, strict=True)
            )
        )
        x = torch.randn(1, widths[0], 12, 12)

        def best(start: int, widths: list[int] = widths, kernels: list[int] = kernels) -> int:
            """MACs a pixel of the best way to compute layers start… as merged runs, by trying all of them."""
            if start == 5:
                return 0
            options = []
            for stop in range(start + 1, 6):
                kernel = sum(k - 1 for k in kernels[start:stop]) + 1
                options.append(widths[start] * widths[stop] * kernel**2 + best(stop))
            return min(options)

        result = fold(chain, x, policy="cheapest")
        spent = sum(c.weight.numel() for c in convs(result.model).values())
        assert spent == best(0)


def test_a_latency_model_replaces_macs() -> None:
    model = with_statistics(inverted_residual(act=False)).double()

    def flat(spec: ConvSpec, height: int, width: int) -> float:
        assert (height, width) == (14, 15)
        return 1.0

    def dense_is_dear(spec: ConvSpec, height: int, width: int) -> float:
        return 100.0 if spec.kernel != (1, 1) and spec.groups == 1 else 1.0

    assert len(convs(fold(model, X, policy="cheapest", latency=flat).model)) == 1
    assert len(convs(fold(model, X, policy="cheapest", latency=dense_is_dear).model)) == 3


def test_always_merges_across_units_and_named_units_do_not() -> None:
    """MobileNetV2's blocks end without an activation, so a projection and the next expansion are neighbours."""
    model = nn.Sequential(inverted_residual(act=False), inverted_residual())
    model = with_statistics(model).double()
    everywhere = fold(model, X)
    assert everywhere.segments[0].out_channels == 48
    limited = fold(model, X, units=["0"])
    names = list(convs(limited.model))
    assert names == ["0", "1.0", "1.3", "1.6"]
    (skip,) = limited.skipped
    assert "not inside a named unit" in skip.reason


def test_an_activation_can_be_named_in_place_of_a_unit() -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).double()
    linear = linearise(model, ["1", "3"])
    assert [conv.kernel_size for conv in convs(fold(linear, X, units=["3"]).model).values()] == [(3, 3), (5, 5)]
    assert [conv.kernel_size for conv in convs(fold(linear, X, units=["1", "3"]).model).values()] == [(7, 7)]


def test_norms_can_be_kept_for_training_after_the_fold() -> None:
    model = with_statistics(nn.Sequential(inverted_residual(act=False), inverted_residual())).double()
    result = fold(model, X, units=["0"], norms="keep")
    assert sum(isinstance(module, nn.BatchNorm2d) for module in result.model.modules()) == 3
    assert len(convs(result.model)) == 4


def test_a_named_unit_that_is_not_linear_is_reported() -> None:
    model = with_statistics(nn.Sequential(inverted_residual(), nn.ReLU())).double()
    result = fold(model, X, units=["0"])
    assert any(skip.names == ("0",) and "0.2, 0.5" in skip.reason for skip in result.skipped)


def test_an_unknown_unit_names_the_nearest() -> None:
    with pytest.raises(UnitError, match=r"blocks\.3\.1"):
        fold(timm.create_model("mobilenetv2_035"), torch.randn(1, 3, 64, 64), units=["block.3.1"])


@pytest.mark.parametrize(
    ("option", "near"), [({"policy": "cheap"}, "cheapest"), ({"border": "exakt"}, "exact"), ({"norms": "kep"}, "keep")]
)
def test_option_values_that_cannot_be_are_named(option: dict[str, Any], near: str) -> None:
    with pytest.raises(FoldError, match=f"{next(iter(option))} is .*did you mean '{near}'"):
        fold(nn.Conv2d(8, 8, 3).double(), X, **option)


class Branching(nn.Module):
    def __init__(self, *, small: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3)))
        self.switch = Switch() if small else None

    def forward(self, x: Tensor) -> Tensor:
        if self.switch is None and x.sum() > 0:  # the line that the message must name
            x = -x
        return self.body(x if self.switch is None else self.switch(x))


class Switch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x if x.sum() > 0 else x


def test_control_flow_on_values_names_its_line() -> None:
    with pytest.raises(TraceError, match=r"test_folding_fold\.py:\d+ \(if self\.switch is None and x\.sum\(\) > 0"):
        fold(Branching(small=False).double(), X)


def test_a_small_module_with_control_flow_is_left_whole_and_listed() -> None:
    result = fold(Branching(small=True).double(), X)
    assert result.skipped[0].names == ("switch",)
    assert "test_folding_fold.py" in result.skipped[0].reason
    assert [conv.kernel_size for conv in convs(result.model).values()] == [(7, 7)]


def test_a_wrong_example_is_named() -> None:
    with pytest.raises(TraceError, match=r"\(1, 5, 8, 8\)"):
        fold(nn.Conv2d(8, 8, 3).double(), torch.randn(1, 5, 8, 8, dtype=torch.float64))


def test_fully_connected_layers_fold_too() -> None:
    model = (
        nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Identity(), nn.Linear(20, 3), nn.ReLU()).double().eval()
    )
    x = torch.randn(4, 6, dtype=torch.float64)
    result = fold(model, x)
    layers = [module for module in result.model.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(6, 3)]
    assert result.max_abs_error < 1e-12


class Sums(nn.Module):
    """Differences, numbers and per-channel constants on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.gain = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.a(x) - self.b(x)
        return (1.5 - inner * self.gain) / 2 + (0 + x) - 3 * x


def test_sums_with_numbers_and_constants_fold() -> None:
    model = Sums().double()
    result = fold(model, X, border="exact")
    assert len(convs(result.model)) == 1
    assert result.max_abs_error < 1e-12


class Dense(nn.Module):
    """Branches that share a layer: not nested, yet one region."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shared = self.a(x)
        return (shared + self.b(x)) + self.c(shared)


def test_branches_that_are_not_nested_fold_as_a_whole() -> None:
    result = fold(Dense().double(), X)
    assert len(convs(result.model)) == 1
    assert result.max_abs_error < 1e-12


def test_a_folded_model_loads_in_a_fresh_process_and_exports(tmp_path: Path) -> None:
    model = with_statistics(timm.create_model("tf_efficientnet_lite0", num_classes=7))
    units = ["blocks.1.1", "blocks.2.0"]  # one dense 3×3, one dense 5×5 with SAME padding and a stride
    x = torch.randn(1, 3, 64, 64)
    folded = fold(linearise(model, units), x, units=units).model
    copied = copy.deepcopy(folded)
    torch.save((folded, x, folded(x)), tmp_path / "folded.pt")
    script = (
        "import sys, torch\ntorch.set_num_threads(1)\n"
        f"model, x, y = torch.load({str(tmp_path / 'folded.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-3)\n"
        "assert 'timm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert torch.equal(copied(x), folded(x))
    exported = torch.export.export(folded, (x,))
    torch.testing.assert_close(exported.module()(x), folded(x))
    assert isinstance(folded.get_submodule("blocks.1.1"), nn.Conv2d)
    assert isinstance(folded.get_submodule("blocks.2.0"), nn.Conv2d)


def test_kept_norms_between_a_named_activation_and_its_convolutions_fold_with_them() -> None:
    """A unit that is one activation has its norm beside it, not below its name."""
    torch.manual_seed(0)
    model = zoo.create("cifar_vgg16", num_classes=10, input_px=32, args={"width": 0.125}).double().eval()
    units = ["stages.0.act0", "stages.2.act0", "stages.2.act1"]
    settled = alpha.settle(alpha.set_values(alpha.attach(model, units=units), 1.0))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    result = fold(settled, x[:1], units=units, norms="keep")
    assert (result.model(x) - settled(x)).abs().max() < 1e-10
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [m for m in result.model.modules() if isinstance(m, nn.BatchNorm2d)]
    convs = [m for m in result.model.modules() if isinstance(m, nn.Conv2d)]
    # Two stages of which one lost one convolution and the other two; each merged convolution takes all its norms along.
    assert len(convs) == 13 - 3
    assert len(norms) == 13 and 13 - 5 <= len(kept) <= 13 - 3
