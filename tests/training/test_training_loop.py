"""The loop learns, resumes to the bit, survives bad numbers, and drives α as told."""

import copy
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_source import TinySource, tiny_network
from torch import nn

from pipeline import alpha
from pipeline.errors import TrainingError
from pipeline.training import checkpoint
from pipeline.training.loop import FitConfig, Progress, fit

BASE = FitConfig(epochs=2, lr=0.1, batch_size=16, checkpoint_every_s=0.0)


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def stop_at(step: int) -> Any:
    """A progress callback that presses Ctrl-C once `step` steps are done."""

    def on_progress(progress: Progress) -> None:
        if progress.step >= step:
            raise KeyboardInterrupt

    return on_progress


@pytest.fixture(autouse=True)
def progress_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.loop._PROGRESS_EVERY_S", 0.0)


def test_it_learns(tmp_path: Path) -> None:
    result = fit(
        tiny_network(), TinySource(128), FitConfig(epochs=6, lr=0.05, batch_size=16), evaluate=TinySource(60),
        checkpoint_dir=tmp_path,
    )  # fmt: skip
    assert result.final is not None and result.final.top1 is not None and result.final.top1 > 0.95
    losses = [row["loss"] for row in result.history]
    assert len(losses) == 6 and losses[-1] < 0.3 * losses[0]
    assert result.steps == 48 and result.resumed_at is None and not result.model.training


VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimiser": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "average": {"ema_decay": 0.9},
    "onecycle": {"schedule": "onecycle", "grad_clip": 0.5, "label_smoothing": 0.1},
    "mixed": {"mixup": 0.4, "cutmix": 1.0, "warmup_epochs": 0.5},
    "parts": {"accumulate": 2, "freeze_bn": True, "schedule": "step"},
    "bf16": {"amp": "bf16", "channels_last": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stops", [(1,), (4,), (3, 6)])
def test_stopped_and_resumed_equals_unstopped_to_the_bit(variant: str, stops: tuple[int, ...], tmp_path: Path) -> None:
    config = FitConfig(**{**BASE.__dict__, **VARIANTS[variant]})
    schedule = alpha.AlphaSchedule(lambda_c=0.5, alpha_lr=0.5, snap_at=0.7)

    def student() -> nn.Module:
        return alpha.set_values(alpha.attach(tiny_network(dropout=0.2), ["2", "5"]), 0.4)

    whole = fit(student(), TinySource(), config, checkpoint_dir=tmp_path / "whole", alpha=schedule)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            fit(
                student(), TinySource(), config, checkpoint_dir=tmp_path / "cut", alpha=schedule,
                on_progress=stop_at(stop),
            )  # fmt: skip
    resumed = fit(student(), TinySource(), config, checkpoint_dir=tmp_path / "cut", alpha=schedule)
    assert resumed.resumed_at == stops[-1]
    assert same(whole.model, resumed.model)
    assert whole.history == resumed.history
    assert whole.alpha_trace == resumed.alpha_trace and [p["step"] for p in whole.alpha_trace] == list(range(1, 9))


def test_a_finished_fit_is_not_run_again(tmp_path: Path) -> None:
    source = TinySource()
    first = fit(tiny_network(), source, BASE, checkpoint_dir=tmp_path, evaluate=TinySource(32))
    served = source.served
    again = fit(tiny_network(3), source, BASE, checkpoint_dir=tmp_path, evaluate=TinySource(32))
    assert source.served == served and same(first.model, again.model) and first.final == again.final


def test_global_randomness_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(tiny_network_without_reseeding(), TinySource(), BASE, checkpoint_dir=tmp_path)
    assert torch.equal(torch.rand(3), expected)


def tiny_network_without_reseeding() -> nn.Module:
    with torch.random.fork_rng():
        return tiny_network(dropout=0.3)


def test_ctrl_c_waits_for_the_step_and_saves(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    class Pressing(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            os.kill(os.getpid(), signal.SIGINT)
            return out

    config = FitConfig(epochs=2, lr=0.1, batch_size=16, checkpoint_every_s=1e9)
    with pytest.raises(KeyboardInterrupt):
        fit(Pressing(*tiny_network()), TinySource(), config, checkpoint_dir=tmp_path)
    saved = checkpoint.load(tmp_path)
    assert saved is not None and saved["step"] == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoint_of_another_fine_tuning_is_refused(tmp_path: Path) -> None:
    fit(tiny_network(), TinySource(), BASE, checkpoint_dir=tmp_path)
    other = FitConfig(epochs=2, lr=0.2, batch_size=16)
    with pytest.raises(TrainingError, match=r"another fine-tuning: lr was 0\.1, is 0\.2"):
        fit(tiny_network(), TinySource(), other, checkpoint_dir=tmp_path)


def test_non_finite_loss_goes_back_and_halves_the_rate(tmp_path: Path) -> None:
    notes: list[str] = []
    result = fit(
        tiny_network(), TinySource(poison_at=6), BASE, checkpoint_dir=tmp_path,
        on_progress=lambda p: notes.append(p.note) if p.note else None,
    )  # fmt: skip
    assert [row["event"] for row in result.history if "event" in row] == ["non-finite loss"]
    event = next(row for row in result.history if "event" in row)
    assert event["step"] == 5 and event["rate_scale"] == 0.5 and "step 6" in event["reason"]
    assert len(notes) == 1 and "back to step 5" in notes[0]
    assert result.steps == 8 and all(torch.isfinite(p).all() for p in result.model.parameters())
    constant = FitConfig(epochs=2, lr=0.1, batch_size=16, checkpoint_every_s=0.0, schedule="constant")
    halved = fit(tiny_network(), TinySource(poison_at=6), constant, checkpoint_dir=tmp_path / "constant")
    assert halved.history[-1]["lr"] == pytest.approx(0.05)


def test_every_return_leaves_its_row_and_its_rate(tmp_path: Path) -> None:
    class Twice(TinySource):
        def batches(self, *args: Any, **options: Any) -> Any:
            for images, labels in super().batches(*args, **options):
                images[0, 0, 0, 0] = torch.nan if self.served in (3, 6) else images[0, 0, 0, 0]
                yield images, labels

    config = FitConfig(epochs=2, lr=0.1, batch_size=16, checkpoint_every_s=1e9, schedule="constant")

    def die(progress: Progress) -> None:
        assert progress.lr == 0.1, "killed"

    with pytest.raises(AssertionError, match="killed"):  # without a checkpoint, at the first step after the return
        fit(tiny_network(), TinySource(poison_at=3), config, checkpoint_dir=tmp_path / "cut", on_progress=die)
    saved = checkpoint.load(tmp_path / "cut")
    assert saved is not None and saved["rate_scale"] == 0.5
    result = fit(tiny_network(), Twice(), config, checkpoint_dir=tmp_path / "whole")
    assert [row["rate_scale"] for row in result.history if "event" in row] == [0.5, 0.25]


def test_hopeless_divergence_ends_in_an_error(tmp_path: Path) -> None:
    source = TinySource()
    source.images[3] = torch.inf
    with pytest.raises(TrainingError, match="4th time"):
        fit(tiny_network(), source, BASE, checkpoint_dir=tmp_path)


def test_accumulated_parts_equal_the_whole_batch(tmp_path: Path) -> None:
    # Frozen norms, so that nothing depends on how the batch is cut.
    results = []
    for accumulate in (1, 4):
        config = FitConfig(epochs=1, lr=0.1, batch_size=16, accumulate=accumulate, freeze_bn=True)
        network = tiny_network().double()
        source = TinySource()
        source.images = source.images.double()
        fit(network, source, config, checkpoint_dir=tmp_path / str(accumulate))
        results.append(network)
    for one, other in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_frozen_norms_keep_their_statistics(tmp_path: Path) -> None:
    network = tiny_network()
    before = copy.deepcopy(network)
    config = FitConfig(epochs=1, lr=0.1, batch_size=16, freeze_bn=True)
    fit(network, TinySource(), config, checkpoint_dir=tmp_path)
    assert torch.equal(network[1].running_mean, before[1].running_mean)
    assert not torch.equal(network[1].weight, before[1].weight)


def test_weight_decay_spares_alpha_norms_and_biases(tmp_path: Path) -> None:
    student = alpha.set_values(alpha.attach(tiny_network(), ["2"]), 0.5)
    before = copy.deepcopy(student)
    # Nothing but decay moves anything: the images are zero and have no label gradient into the kernels.
    source = TinySource()
    source.images.zero_()
    from pipeline.training.optimiser import build

    optimiser = build(student, FitConfig(epochs=1, lr=0.1, momentum=0.0, weight_decay=0.5), None)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    torch.testing.assert_close(student.get_parameter("0.weight"), before.get_parameter("0.weight") * (1 - 0.1 * 0.5))
    for name in ("1.weight", "1.bias", "2.alpha", "8.bias"):
        assert torch.equal(student.get_parameter(name), before.get_parameter(name)), name


def test_alpha_has_its_own_rate_and_is_clamped(tmp_path: Path) -> None:
    student = alpha.set_values(alpha.attach(tiny_network(), ["2", "5"]), 0.5)
    schedule = alpha.AlphaSchedule(lambda_c=10.0, alpha_lr=5.0)
    result = fit(student, TinySource(), BASE, checkpoint_dir=tmp_path, alpha=schedule)
    assert alpha.values(result.model) == {"2": 1.0, "5": 1.0}
    still = alpha.set_values(alpha.attach(tiny_network(), ["2", "5"]), 0.5)
    none = alpha.AlphaSchedule(lambda_c=10.0, alpha_lr=0.0)
    fit(still, TinySource(), BASE, checkpoint_dir=tmp_path / "none", alpha=none)
    assert alpha.values(still) == {"2": 0.5, "5": 0.5}


def test_annealing_reaches_exactly_one_in_turn(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    schedule = alpha.AlphaSchedule(lambda_c=0.0, anneal=("5", "2"), anneal_order="sequential", anneal_fraction=1.0)
    student = alpha.attach(tiny_network(), ["2", "5"])
    fit(
        student, TinySource(), BASE, checkpoint_dir=tmp_path, alpha=schedule,
        on_progress=lambda p: seen.append(dict(p.alphas)),
    )  # fmt: skip
    assert seen[1] == {"2": 0.0, "5": pytest.approx(0.25)}
    assert seen[5] == {"2": pytest.approx(0.25), "5": 1.0}
    assert alpha.values(student) == {"2": 1.0, "5": 1.0}


def test_snap_trains_the_network_that_settles(tmp_path: Path) -> None:
    student = alpha.set_values(alpha.attach(tiny_network(), ["2", "5"]), {"2": 0.99, "5": 0.1})
    schedule = alpha.AlphaSchedule(lambda_c=0.0, alpha_lr=0.0, snap_at=0.5)
    fit(student, TinySource(), BASE, checkpoint_dir=tmp_path, alpha=schedule)
    assert alpha.values(student) == {"2": 1.0, "5": 0.0}
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(student(x), alpha.settle(student).eval()(x))


def test_early_stop_gives_the_best_network_back(tmp_path: Path) -> None:
    # A rate that ruins the network after the first epoch: accuracy can only fall.
    config = FitConfig(epochs=30, lr=0.05, batch_size=16, schedule="constant", patience=2)
    held_out = TinySource(60)
    result = fit(tiny_network(), TinySource(), config, evaluate=held_out, checkpoint_dir=tmp_path)
    scores = [row["evaluation"]["top1"] for row in result.history if "epoch" in row]
    assert result.history[-1]["event"] == "early stop" and len(scores) < 30
    assert result.final is not None and result.final.top1 == max(scores)


def test_average_and_best_epoch_leave_forced_alphas_at_their_ends(tmp_path: Path) -> None:
    student = alpha.attach(tiny_network(), ["2", "5"])
    schedule = alpha.AlphaSchedule(anneal=("2", "5"), anneal_fraction=0.6)
    config = FitConfig(epochs=5, lr=1e-6, batch_size=16, ema_decay=0.99, patience=10)
    result = fit(student, TinySource(), config, evaluate=TinySource(20), checkpoint_dir=tmp_path, alpha=schedule)
    # At such a rate accuracy stands still, so the first epoch that counts stays the best: one after the annealing.
    assert alpha.values(result.model) == {"2": 1.0, "5": 1.0}
    assert result.final is not None
    settled = alpha.settle(result.model)
    x = TinySource(20).images
    torch.testing.assert_close(settled(x), result.model(x))


def test_early_stop_waits_until_alpha_rests(tmp_path: Path) -> None:
    def student() -> nn.Module:
        return alpha.set_values(alpha.attach(tiny_network(), ["2", "5"]), 1e-4)

    config = {"epochs": 2, "lr": 1e-6, "batch_size": 16}
    learned = alpha.AlphaSchedule(lambda_c=0.0, alpha_lr=0.0)
    for moving in (learned, alpha.AlphaSchedule(anneal=("2", "5"), anneal_fraction=1.0)):
        with pytest.raises(TrainingError, match=r"(?s)patience compares epochs.*snap_at"):
            fit(
                student(), TinySource(), FitConfig(**config, patience=3), evaluate=TinySource(20),
                checkpoint_dir=tmp_path / "refused", alpha=moving,
            )  # fmt: skip
    # At such a rate accuracy stands still. The first epoch ends just before the snap, so it is not the best one.
    snapped = alpha.AlphaSchedule(lambda_c=0.0, alpha_lr=0.0, snap_at=0.5)
    best, last = (
        fit(
            student(), TinySource(), FitConfig(**config, patience=patience), evaluate=TinySource(20),
            checkpoint_dir=tmp_path / str(patience), alpha=snapped,
        )
        for patience in (3, None)
    )  # fmt: skip
    assert [row["step"] for row in best.history] == [4, 8] and same(best.model, last.model)


def test_distillation_without_labels_follows_the_teacher(tmp_path: Path) -> None:
    teacher = tiny_network()
    fit(teacher, TinySource(128), FitConfig(epochs=4, lr=0.05, batch_size=16), checkpoint_dir=tmp_path / "teacher")
    config = FitConfig(
        epochs=8, lr=0.05, batch_size=16, distill_weight=1.0, distill_temperature=2.0, feature_units=("4",)
    )
    result = fit(
        tiny_network(9), TinySource(128, labelled=False), config, teacher=teacher, checkpoint_dir=tmp_path / "student",
        evaluate=TinySource(60, labelled=False),
    )  # fmt: skip
    assert result.final is not None and result.final.top1 is None
    assert result.final.agreement is not None and result.final.agreement > 0.9
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"distill_weight": 0.5}, "no teacher"),
        ({"epochs": 0.01}, "are not one step"),
        ({"feature_units": ("9",)}, "no teacher"),
        ({"patience": 1}, "nothing to score by"),
    ],
)
def test_what_is_missing_is_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        fit(tiny_network(), TinySource(), FitConfig(**{**BASE.__dict__, **config}), checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": 0.0}, {"schedule": "linear"}, {"ema_decay": 1.5}, {"accumulate": 5}, {"lr": math.nan},
        {"grad_clip": 0.0}, {"patience": 0}, {"max_steps": 0}, {"batch_size": 16.5}, {"retries": -1},
    ],
)  # fmt: skip
def test_bad_configuration_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=next(iter(bad))):
        FitConfig(**{**BASE.__dict__, **bad})
