"""Losses, rates, averages, checkpoints and evaluation against formulas written out by hand."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_source import TinySource, tiny_network
from torch import nn

from pipeline.errors import TrainingError
from pipeline.training import checkpoint, losses, rate
from pipeline.training.average import MovingAverage
from pipeline.training.config import FitConfig
from pipeline.training.evaluate import evaluate
from pipeline.training.memory import kept_pages
from pipeline.training.mixing import Mixing


def test_task_loss_skips_images_without_label() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.5, -1.0]])
    p = math.exp(2) / (math.exp(2) + 1 + math.exp(1))
    assert losses.task(logits, torch.tensor([0, -1])).item() == pytest.approx(-math.log(p), rel=1e-6)
    assert losses.task(logits, torch.tensor([-1, -1])).item() == 0.0


def test_smoothing_mixes_in_the_uniform_distribution() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0])
    targets = 0.9 * nn.functional.one_hot(labels, 4) + 0.1 / 4
    expected = -(targets * logits.softmax(1).log()).sum(1).mean()
    assert losses.task(logits, labels, 0.1).item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.mixed_task(logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_distillation_is_hintons_divergence() -> None:
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    assert losses.distillation(student, teacher, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.distillation(teacher, teacher, 2.0).item() == pytest.approx(0.0, abs=1e-6)


def test_feature_distance_is_in_units_of_the_teachers_variance() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(50, 4)
    with losses.FeatureMatch(student, teacher, ["0"]) as match:
        a, b = student(x), teacher(x)
        value = match.loss()
    assert value.item() == pytest.approx(((a - b).square().mean() / b.var()).item(), rel=1e-5)
    assert not student[0]._forward_hooks
    with pytest.raises(TrainingError, match="no module '00'"):
        losses.FeatureMatch(student, teacher, ["00"])


def test_rates() -> None:
    assert [rate.factor("constant", s, 10, 4) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    cosine = [rate.factor("cosine", s, 10, 0) for s in range(10)]
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(10)])
    assert [rate.factor("step", s, 8, 0) for s in range(8)] == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    onecycle = [rate.factor("onecycle", s, 101, 0) for s in range(101)]
    reference = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 1.0, 101, div_factor=25, final_div_factor=400
    )
    expected = []
    for _ in range(101):
        expected.append(reference.get_last_lr()[0])
        reference.optimizer.step()
        if len(expected) < 101:
            reference.step()
    # torch puts the peak on a whole step; ours may lie between two.
    assert onecycle == pytest.approx(expected, abs=0.03)


def test_moving_average_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = MovingAverage(model, 0.5)
    expected = 1.0
    for step, value in enumerate([3.0, 5.0, 7.0], start=1):
        model.weight.data.fill_(value)
        average.update(model)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * value
    average.swap(model)
    assert model.weight.item() == pytest.approx(expected, rel=1e-6)
    average.swap(model)
    assert model.weight.item() == 7.0


def test_mixing_repeats_by_step_and_keeps_mass() -> None:
    mixing = Mixing(FitConfig(epochs=1, lr=0.1, mixup=0.5, cutmix=1.0, label_smoothing=0.1), 4)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    one, targets = mixing(images, labels, 5)
    two, again = mixing(images, labels, 5)
    assert torch.equal(one, two) and torch.equal(targets, again)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert not torch.equal(one, mixing(images, labels, 6)[0])
    with pytest.raises(TrainingError, match="even batch_size"):
        mixing(images[:7], labels[:7], 0)
    with pytest.raises(TrainingError, match="have none"):
        mixing(images, labels - 1, 0)


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    checkpoint.save(tmp_path, {"step": 1, "w": torch.ones(2)})
    checkpoint.save(tmp_path, {"step": 2, "w": torch.ones(2)})
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None and loaded["step"] == 2
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:100])
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None and loaded["step"] == 1
    last.unlink()  # killed between the two renames
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None and loaded["step"] == 1
    (tmp_path / "previous.pt").write_bytes(b"rubbish")
    with pytest.raises(TrainingError, match=r"previous\.pt"):
        checkpoint.load(tmp_path)


def test_checkpoint_runs_no_code_when_read(tmp_path: Path) -> None:
    torch.save({"format": "layerfold-checkpoint-1", "state": {"step": Path("/")}}, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match="no checkpoint"):
        checkpoint.load(tmp_path)


class Fixed(nn.Module):
    """Answers each batch with the next rows of a table."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table, self.at = table, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.table[self.at : self.at + len(x)]
        self.at += len(x)
        return rows


def test_evaluation_counts_by_hand() -> None:
    torch.manual_seed(0)
    source = TinySource(50)
    table, other = torch.randn(50, 7), torch.randn(50, 7)
    result = evaluate(Fixed(table), source, batch_size=16, teacher=Fixed(other))
    order = table.argsort(1, descending=True)
    assert result.top1 == pytest.approx((order[:, 0] == source.labels).float().mean().item())
    assert result.top5 == pytest.approx((order[:, :5] == source.labels[:, None]).any(1).float().mean().item())
    assert result.agreement == pytest.approx((table.argmax(1) == other.argmax(1)).float().mean().item())
    p, q = other.double().softmax(1), table.double().softmax(1)
    assert result.kl == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    assert result.count == 50 and result.labelled == 50


def test_evaluation_without_labels_or_with_broken_logits() -> None:
    result = evaluate(tiny_network(), TinySource(20, labelled=False))
    assert (result.top1, result.top5, result.agreement, result.kl) == (None, None, None, None)
    broken = evaluate(Fixed(torch.full((20, 7), torch.nan)), TinySource(20))
    assert broken.top1 == 0.0 and broken.top5 == 0.0


def test_evaluation_gives_the_training_mode_back() -> None:
    network = tiny_network().train()
    network[1].eval()
    evaluate(network, TinySource(20))
    assert network.training and not network[1].training


# In a process of its own: what a whole test run did to the arenas before (a failed huge allocation, say) decides where
# glibc puts the next block.
_COUNT_FAULTS = """
import resource
import torch
from pipeline.training.memory import kept_pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(16 << 20)  # 64 MB, which glibc maps anew by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = [faults() for _ in range(3)][-1]
with kept_pages("cpu") as active:
    # Small blocks settle between the large ones at first, each of which then takes fresh pages; as in training, a few
    # rounds later there is a hole for every block.
    kept = max([faults() for _ in range(40)][-5:])
print(plain, int(active), kept, faults())  # the pages were given back, so the next block takes fresh ones
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_kept_pages_are_not_faulted_in_again() -> None:
    done = subprocess.run([sys.executable, "-c", _COUNT_FAULTS], capture_output=True, text=True, check=True)
    plain, active, kept, after = map(int, done.stdout.split())
    if not active:
        pytest.skip("another allocator is in place")
    assert plain > 100 and kept < plain / 10
    assert after > 10 * max(kept, 1)


def test_pages_are_not_kept_for_other_devices() -> None:
    with kept_pages("cuda") as active:
        assert not active
