"""RandAugment repeats, TensorBoard files hold what happened, the α plot is drawn."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_source import TinySource, tiny_network

from pipeline import alpha
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import TrainingError
from pipeline.training.augment import RandAugmented
from pipeline.training.loop import FitConfig, fit
from pipeline.training.scalars import TensorBoardLog, plot_alphas

PREP = Preprocessing(input_px=8, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), crop_fraction=1.0)


def bounded_source() -> TinySource:
    """Images that a picture can hold: inside [0, 1] before normalisation, noise included."""
    source = TinySource(32)
    source.images = source.images.clamp(-0.02, 0.5)
    return source


def test_augmentation_repeats_and_resumes() -> None:
    source = RandAugmented(bounded_source(), PREP)
    one = list(source.batches(8, train=True, seed=1, epoch=2))
    two = list(source.batches(8, train=True, seed=1, epoch=2))
    late = list(source.batches(8, train=True, seed=1, epoch=2, start_step=2))
    assert len(one) == 4 and len(late) == 2
    for (a, la), (b, lb) in zip(one, two, strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb)
    for (a, _), (b, _) in zip(one[2:], late, strict=True):
        assert torch.equal(a, b)
    other = next(iter(source.batches(8, train=True, seed=2, epoch=2)))[0]
    assert not torch.equal(one[0][0], other)


def test_augmentation_changes_training_images_only() -> None:
    plain = bounded_source()
    source = RandAugmented(plain, PREP, "rand-m9-mstd0.5")
    before = next(iter(plain.batches(8, train=True)))[0]
    after = next(iter(source.batches(8, train=True)))[0]
    assert after.shape == before.shape and after.dtype == torch.float32
    assert sum((a - b).abs().max() > 0.1 for a, b in zip(before, after, strict=True)) >= 4
    for (a, _), (b, _) in zip(plain.batches(8), source.batches(8), strict=True):
        assert torch.equal(a, b)
    assert (source.steps(8, True), len(source), source.describe(3)) == (4, 32, "tiny/32[3]")


def test_zero_operations_give_the_pixels_back(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bounded_source()
    source = RandAugmented(plain, PREP)
    monkeypatch.setattr(source, "_augment", lambda image: image)
    before = next(iter(plain.batches(8, train=True)))[0]
    after = next(iter(source.batches(8, train=True)))[0]
    # Half a grey level is lost on the way through 8 bits.
    assert (after - before).abs().max() <= 0.5 / 255 / min(PREP.std) + 1e-6


def test_augmentation_leaves_global_randomness_alone() -> None:
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    next(iter(RandAugmented(bounded_source(), PREP).batches(8, train=True)))
    assert (random.random(), np.random.rand()) == expected


def test_strongest_policy_runs() -> None:
    source = RandAugmented(bounded_source(), PREP, "rand-m10-n6-mstd2-inc1")
    for epoch in range(4):
        for images, _ in source.batches(8, train=True, epoch=epoch):
            assert torch.isfinite(images).all()


def test_unknown_policy_is_named() -> None:
    with pytest.raises(TrainingError, match="'augmix-m3'"):
        RandAugmented(bounded_source(), PREP, "augmix-m3")


def test_tensorboard_files_hold_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("pipeline.training.loop._PROGRESS_EVERY_S", 0.0)
    student = alpha.set_values(alpha.attach(tiny_network(), ["2", "5"]), 0.4)
    steps: list[int] = []
    with TensorBoardLog(tmp_path / "events", then=lambda p: steps.append(p.step)) as log:
        result = log.finish(
            fit(
                student,
                TinySource(),
                FitConfig(epochs=2, lr=0.05, batch_size=16),
                evaluate=TinySource(20),
                checkpoint_dir=tmp_path / "c",
                alpha=alpha.AlphaSchedule(alpha_lr=0.3),
                on_progress=log,
            )
        )
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    curve = {event.step: event.value for event in events.Scalars("alpha/2")}
    assert set(curve) == set(steps) and curve[8] == pytest.approx(alpha.values(student)["2"])
    assert {p["step"]: p["alphas"]["2"] for p in result.alpha_trace} == pytest.approx(
        {step: value for step, value in curve.items() if step > 0}
    )
    assert len(events.Scalars("train/loss")) >= 8
    assert [event.step for event in events.Scalars("evaluation/top1")] == [4, 8]


def test_plot_shows_removed_activations_in_colour(tmp_path: Path) -> None:
    steps = range(1, 50)
    trace = [{"step": s, "alphas": {"gone": s / 49, "kept": 0.2}} for s in steps]
    plot_alphas(trace, tmp_path / "one.png")
    plot_alphas([{"step": s, "alphas": {"gone": 0.5, "kept": 0.2}} for s in steps], tmp_path / "none.png")

    def coloured(name: str) -> int:
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        return int((pixels.max(2) - pixels.min(2) > 60).sum())

    assert coloured("one.png") > 300 and coloured("none.png") == 0
