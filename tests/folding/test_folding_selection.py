"""The sensitivity scan and the greedy choice, against folding by hand."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_folding_closed_form import IMAGES, network
from torch import nn

from pipeline.errors import FoldError, UnitError
from pipeline.folding import closed_form_fold, closeness, count, linearise, scan, select_units
from pipeline.folding.sensitivity import plot, table

CONTROL = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def test_the_scan_is_what_folding_each_unit_alone_gives() -> None:
    model = network(0.1)
    rows = scan(model, IMAGES, CONTROL, batch_size=8)
    assert [row.unit for row in rows] == ["1", "2", "3"]
    for row in rows:
        linear = closeness(model, linearise(model, [row.unit]), CONTROL)
        fitted = closeness(model, closed_form_fold(model, [row.unit], IMAGES, batch_size=8).model, CONTROL)
        for got, expected in ((row.linear, linear), (row.closed_form, fitted)):
            assert got.agreement == expected.agreement
            assert got.count == expected.count == 24
            assert got.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-7)


def test_the_scan_shows_as_table_and_picture(tmp_path: Path) -> None:
    rows = scan(network(0.1), IMAGES, CONTROL, units=["1", "3"], batch_size=8)
    lines = table(rows).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    plot(rows, tmp_path / "scan.png")
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")


def test_closeness_is_its_definition() -> None:
    model = network(0.1)
    other = closed_form_fold(model, ["1"], IMAGES, batch_size=8).model
    with torch.no_grad():
        p, q = model(CONTROL).softmax(1), other(CONTROL).softmax(1)
    measured = closeness(model, other, CONTROL, batch_size=7)
    assert measured.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    assert measured.agreement == float((p.argmax(1) == q.argmax(1)).float().mean())


def test_the_choice_keeps_the_agreement_and_says_what_it_tried() -> None:
    model = network(0.1)
    chosen = select_units(model, IMAGES, CONTROL, keep_agreement=0.8, batch_size=8)
    assert chosen.trials
    if chosen.result is not None:
        assert closeness(model, chosen.result.model, CONTROL).agreement >= 0.8
        assert tuple(fit.unit for fit in chosen.result.units) == chosen.units
    accepted = {trial.unit for trial in chosen.trials if trial.accepted}
    assert accepted == set(chosen.units)
    assert all(trial.closeness.agreement < 0.8 for trial in chosen.trials if not trial.accepted)


def test_a_teacher_in_training_mode_is_compared_in_evaluation_and_left_in_its_mode() -> None:
    model, reference = network(0.1), network(0.1)
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    chosen = select_units(model, IMAGES, CONTROL, keep_agreement=0.5, batch_size=8, units=["1", "3"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model[2].training and not model[1].training
    expected = select_units(reference, IMAGES, CONTROL, keep_agreement=0.5, batch_size=8, units=["1", "3"])
    assert chosen.trials == expected.trials


def test_linear_units_are_all_taken() -> None:
    """With activations that are the identity, nothing is lost, so everything that saves is folded."""
    chosen = select_units(network(1.0), IMAGES, CONTROL, keep_agreement=1.0, batch_size=8, ridge=1e-9)
    savers = {row.unit for row in chosen.scan if row.macs_after < row.macs_before}
    assert set(chosen.units) == savers
    assert savers


def test_given_savings_decide_what_is_tried_first() -> None:
    savings = {"1": 0.5, "3": 80.0}
    chosen = select_units(network(1.0), IMAGES, CONTROL, keep_agreement=0.5, savings=savings, ridge=1e-9)
    assert [trial.unit for trial in chosen.trials] == ["3", "1"]
    assert [trial.saving for trial in chosen.trials] == [80.0, 0.5]


class Chain(nn.Sequential):
    """Convolutions and activations in turn, as in a VGG: a unit is one activation, and neighbours share a layer."""

    def __init__(self, slope: float) -> None:
        torch.manual_seed(0)
        widths = [3, 4, 8, 8, 4]
        layers = [
            part
            for entering, leaving in pairwise(widths)
            for part in (nn.Conv2d(entering, leaving, 1), nn.LeakyReLU(slope))
        ]
        super().__init__(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def test_neighbours_that_share_a_layer_are_scanned_one_by_one_and_chosen_together() -> None:
    model = Chain(0.3).eval()
    rows = scan(model, IMAGES, CONTROL, batch_size=8)
    assert [row.unit for row in rows] == ["1", "3", "5"]
    for row in rows:
        fitted = closed_form_fold(model, [row.unit], IMAGES, batch_size=8)
        assert row.macs_after == fitted.units[0].macs_after
        measured = closeness(model, fitted.model, CONTROL)
        assert row.closed_form.kl == pytest.approx(measured.kl, rel=1e-3, abs=1e-7)
    line = Chain(1.0).eval()
    chosen = select_units(line, IMAGES, CONTROL, keep_agreement=1.0, batch_size=8, ridge=1e-9, kernels=(1,))
    assert chosen.units == ("1", "3", "5")
    assert chosen.result is not None
    assert [fit.unit for fit in chosen.result.units] == ["1 + 3 + 5"]


def test_a_unit_that_makes_the_whole_dearer_is_left() -> None:
    """16 → 8 → 8 → 16 channels by 3×3, 1×1 and 3×3: each pair saves an eighth, one 5×5 of 16 to 16 costs thrice."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.LeakyReLU(1.0),
        nn.Conv2d(8, 8, 1),
        nn.LeakyReLU(1.0),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    chosen = select_units(
        model, IMAGES, CONTROL, keep_agreement=0.01, batch_size=8, max_macs_ratio=9.0, tolerance=0.0, ridge=1e-9
    )
    assert [trial.accepted for trial in chosen.trials] == [True, False]
    assert chosen.units == (chosen.trials[0].unit,)
    assert chosen.result is not None
    assert count(chosen.result.model, IMAGES[:1]).macs < count(model, IMAGES[:1]).macs


def test_nonsense_is_refused() -> None:
    with pytest.raises(FoldError, match="keep_agreement is 95"):
        select_units(network(0.1), IMAGES, CONTROL, keep_agreement=95)
    for nothing in ((CONTROL[:0], CONTROL), (IMAGES, [])):
        with pytest.raises(FoldError, match="no image was given"):
            scan(network(0.1), *nothing)
    with pytest.raises(FoldError, match="to compare on"):
        closeness(network(0.1), network(0.1), [])
    with pytest.raises(UnitError, match="'33' is no unit"):
        scan(network(0.1), IMAGES, CONTROL, units=["1", "33"])
    with pytest.raises(UnitError, match="saves nothing"):
        select_units(network(0.1), IMAGES, CONTROL, keep_agreement=0.9, savings={"1": -1.0})
