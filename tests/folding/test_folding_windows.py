"""Windows: where they begin and end, that training them helps on unseen images, and that it never does harm."""

import copy
from typing import Any

import pytest
import torch
from test_folding_closed_form import IMAGES, network
from torch import nn

from pipeline.errors import FoldError
from pipeline.folding import WindowOptions, closed_form_fold, closeness

UNSEEN = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(4))
MANY = torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(3))
OPTIONS = WindowOptions(steps=120, rate=1e-3, batch=8)


def error(student: nn.Module, teacher: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float((student(images) - teacher(images)).square().mean())


def test_a_window_brings_unseen_images_nearer_than_least_squares() -> None:
    model = network(0.0, seed=1)
    plain = closed_form_fold(model, ["1"], MANY, batch_size=8)
    tuned = closed_form_fold(model, ["1"], MANY, batch_size=8, windows=OPTIONS)
    (window,) = tuned.windows
    assert plain.windows == ()
    assert window.units == ("1",)
    # The folded unit and the three convolutions of the block behind it, nothing before or after.
    assert window.layers == ("1", "2.layers.0", "2.layers.3", "2.layers.6")
    assert window.after < 0.98 * window.before
    assert error(tuned.model, model, UNSEEN) < 0.9 * error(plain.model, model, UNSEEN)
    assert closeness(model, tuned.model, UNSEEN).kl < closeness(model, plain.model, UNSEEN).kl
    frozen = dict(plain.model.named_parameters())
    moved = {
        name.rpartition(".")[0]
        for name, tensor in tuned.model.named_parameters()
        if not torch.equal(tensor, frozen[name])
    }
    assert moved == set(window.layers)


def test_neighbouring_units_share_a_window_and_distant_ones_do_not() -> None:
    model = network(0.0, seed=1)
    few = WindowOptions(steps=2, batch=4, reach=1)
    together = closed_form_fold(model, ["1", "2"], IMAGES, batch_size=8, windows=few)
    assert [window.units for window in together.windows] == [("1", "2")]
    apart = closed_form_fold(model, ["1", "3"], IMAGES, batch_size=8, windows=few)
    assert [window.units for window in apart.windows] == [("1",), ("3",)]
    # The last unit has no convolution behind it: the window is the unit.
    assert apart.windows[1].layers == ("3",)


def test_a_window_that_would_do_harm_is_left_as_it_was() -> None:
    model = network(0.0, seed=1)
    wild = WindowOptions(steps=3, rate=1e4, batch=4)
    plain = closed_form_fold(model, ["1"], IMAGES, batch_size=8)
    left = closed_form_fold(model, ["1"], IMAGES, batch_size=8, windows=wild)
    assert left.windows[0].after == left.windows[0].before
    assert torch.equal(left.model(UNSEEN), plain.model(UNSEEN))


@pytest.mark.parametrize("options", [{"steps": 0}, {"rate": 0.0}, {"batch": 0}, {"reach": -1}, {"steps": 2.5}])
def test_windows_without_steps_or_images_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(FoldError, match=rf"windows\.{name} is {value}"):
        WindowOptions(**options)


@pytest.mark.parametrize("cache_mb", [1024, 0])
def test_windows_repeat_and_leave_the_teacher_alone(cache_mb: int) -> None:
    model = network(0.1)
    before = copy.deepcopy(model.state_dict())
    seen: list[tuple[str, int, int]] = []
    options = WindowOptions(steps=6, batch=4, seed=5)
    one, two = (
        closed_form_fold(
            model,
            ["1", "3"],
            IMAGES,
            batch_size=8,
            windows=options,
            cache_mb=cache_mb,
            on_step=lambda *step: seen.append(step),
        )
        for _ in range(2)
    )
    assert torch.equal(one.model(UNSEEN), two.model(UNSEEN))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in one.model.parameters())
    assert seen[:6] == [("1", step, 6) for step in range(1, 7)]
    assert len(seen) == 24
