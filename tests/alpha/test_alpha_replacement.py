"""Units that fade into a given layer: both ends, the penalty, settling, freezing, and resuming."""

from pathlib import Path

import pytest
import torch
from alpha_networks import season
from torch import nn

from pipeline import alpha
from pipeline.errors import UnitError
from pipeline.folding import fold
from pipeline.models import zoo

UNITS = ("blocks.1.1", "blocks.2.2")


def parts() -> tuple[nn.Module, dict[str, nn.Module], torch.Tensor]:
    torch.manual_seed(0)
    model = season(zoo.create("mobilenetv2_cifar_035", num_classes=4, input_px=16)).eval()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    layers: dict[str, nn.Module] = {}
    for name in UNITS:
        last = [m for m in model.get_submodule(name).modules() if isinstance(m, nn.Conv2d)][-1]
        layers[name] = nn.Conv2d(last.out_channels, last.out_channels, 3, padding=1, dtype=torch.float64)
    return model, layers, x


def replaced(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    import copy

    network = copy.deepcopy(model)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, layer)
    return network


def test_both_ends_are_exact_and_between_them_each_unit_is_blended() -> None:
    model, layers, x = parts()
    student = alpha.attach_replacements(model, layers).eval()
    torch.testing.assert_close(student(x), model(x), rtol=0, atol=0)
    alpha.set_values(student, 1.0)
    torch.testing.assert_close(student(x), replaced(model, layers)(x), rtol=1e-12, atol=1e-12)
    block, inside = student.get_submodule(UNITS[0]), torch.randn(2, layers[UNITS[0]].in_channels, 8, 8).double()
    alpha.set_values(student, {UNITS[0]: 0.3})
    expected = 0.3 * layers[UNITS[0]](inside) + 0.7 * model.get_submodule(UNITS[0])(inside)
    torch.testing.assert_close(block(inside), expected)


def test_settled_and_folded_it_is_the_network_that_was_trained() -> None:
    model, layers, x = parts()
    student = alpha.set_values(alpha.attach_replacements(model, layers), {UNITS[0]: 0.95, UNITS[1]: 0.2}).eval()
    settled = alpha.settle(student, threshold=0.9)
    torch.testing.assert_close(settled(x), replaced(model, {UNITS[0]: layers[UNITS[0]]})(x))
    folded = fold(settled, x[:1], units=[UNITS[0]]).model
    torch.testing.assert_close(folded(x), settled(x), rtol=1e-9, atol=1e-9)


def test_penalty_and_clamping_reach_the_units() -> None:
    model, layers, _ = parts()
    student = alpha.set_values(alpha.attach_replacements(model, layers), 0.5)
    assert alpha.penalty(student, 2.0, {UNITS[1]: 3.0}).item() == pytest.approx(0.75 + 3 * 0.75)
    with torch.no_grad():
        alpha.alphas(student)[UNITS[0]].fill_(1.7)
    alpha.clamp_(student)
    assert alpha.values(student)[UNITS[0]] == 1.0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_frozen_at_an_end_the_other_path_neither_runs_nor_trains(value: float) -> None:
    model, layers, x = parts()
    student = alpha.attach_replacements(model, layers).train()
    alpha.freeze_(student, dict.fromkeys(UNITS, value))
    student(x).sum().backward()
    for name in UNITS:
        blend = student.get_submodule(name)
        idle, busy = (blend.replacement, blend.unit) if value == 0.0 else (blend.unit, blend.replacement)
        assert all(p.grad is None and not p.requires_grad for p in idle.parameters())
        assert all(p.grad is not None for p in busy.parameters())
    alpha.freeze_(student, dict.fromkeys(UNITS, None))
    assert all(p.requires_grad for p in student.parameters())


def test_annealed_one_after_another_and_resumed_to_the_bit(tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
    from tiny_source import TinySource

    from pipeline.training.loop import FitConfig, Progress, fit

    config = FitConfig(epochs=2, lr=0.02, batch_size=16, checkpoint_every_s=0.0)
    schedule = alpha.AlphaSchedule(anneal=UNITS[::-1], anneal_order="sequential", anneal_fraction=0.8)

    def student() -> nn.Module:
        model, layers, _ = parts()
        return alpha.attach_replacements(model, layers).float()

    def stop(progress: Progress) -> None:
        if progress.step >= 3:
            raise KeyboardInterrupt

    whole = fit(student(), TinySource(), config, checkpoint_dir=tmp_path / "a", alpha=schedule)
    seen = {point["step"]: point["alphas"] for point in whole.alpha_trace}
    assert seen[4][UNITS[1]] == pytest.approx(0.9375) and seen[4][UNITS[0]] == 0.0
    assert seen[8] == {UNITS[0]: pytest.approx(1.0), UNITS[1]: 1.0} or seen[8][UNITS[0]] > 0.9
    with pytest.raises(KeyboardInterrupt):
        fit(student(), TinySource(), config, checkpoint_dir=tmp_path / "b", alpha=schedule, on_progress=stop)
    resumed = fit(student(), TinySource(), config, checkpoint_dir=tmp_path / "b", alpha=schedule)
    assert resumed.resumed_at is not None and 0 < resumed.resumed_at < 8
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_what_cannot_be_replaced_is_named() -> None:
    model, layers, _ = parts()
    layer = layers[UNITS[0]]
    with pytest.raises(UnitError, match=r"no module 'blocks\.1\.9'"):
        alpha.attach_replacements(model, {"blocks.1.9": layer})
    mlp = zoo.create("mlp_3", num_classes=4, input_px=8)
    with pytest.raises(UnitError, match="'act1' is an activation"):
        alpha.attach_replacements(mlp, {"act1": layer})
    with pytest.raises(UnitError, match="α already"):
        alpha.attach_replacements(alpha.attach(model, "all"), layers)
