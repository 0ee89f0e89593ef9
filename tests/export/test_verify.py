"""The verdict on files: its arithmetic against NumPy, its thresholds, its words."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TinyNet, images, tiny_net
from torch import Tensor, nn

from pipeline.errors import VerifyError
from pipeline.export import runtimes
from pipeline.export.verify import Labelled, Thresholds, judge, verify

Files = dict[str, Path]


class Pictures:
    """An evaluation split in memory, with one file that could not be decoded."""

    name = "pictures/eval"
    labelled = True
    num_classes = 10
    class_names = ()
    unreadable = {"2.jpg": "truncated"}  # noqa: RUF012

    def __init__(self, labels: bool = True, count: int = 40) -> None:
        self.images = images(count, seed=11)
        with torch.no_grad():
            truth = tiny_net()(torch.from_numpy(self.images)).argmax(1).numpy()
        truth[::4] = (truth[::4] + 1) % 10
        self.labels = truth if labels else np.full(count, -1)

    def __len__(self) -> int:
        return len(self.images) + 1

    def describe(self, i: int) -> str:
        return f"picture {i}"

    def paths(self, i: int) -> str | None:
        return f"{i}.jpg"

    def batches(self, batch_size: int, **_: object) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.images), batch_size):
            part = slice(start, start + batch_size)
            yield torch.from_numpy(self.images[part]), torch.from_numpy(self.labels[part])


def test_good_files_pass_with_the_right_figures(files: Files, network: TinyNet) -> None:
    source = Pictures()
    verdict = verify(list(files.values()), network, source, batch_size=7)
    assert verdict.passed
    verdict.require()
    by_name = {report.file: report for report in verdict.reports}
    for kind in ("tflite", "onnx_int8"):
        report = by_name[files[kind].name]
        logits = runtimes.open_model(files[kind]).predict(source.images)
        with torch.no_grad():
            wanted = network(torch.from_numpy(source.images)).numpy()
        assert report.images == 40
        assert report.top1 == (logits.argmax(1) == source.labels).mean()
        assert report.network_top1 == 0.75
        best5 = np.argsort(-logits, axis=1)[:, :5]
        assert report.top5 == np.mean([label in row for label, row in zip(source.labels, best5, strict=True)])
        assert report.agreement == (logits.argmax(1) == wanted.argmax(1)).mean()
        assert report.max_abs_error == pytest.approx(np.abs(logits - wanted).max(), rel=1e-4, abs=1e-7)
        assert report.mean_abs_error == pytest.approx(np.abs(logits - wanted).mean(), rel=1e-3, abs=1e-8)


def test_the_worst_images_are_named_past_the_unreadable_one(files: Files, network: TinyNet) -> None:
    source = Pictures()
    [report] = verify([files["tflite_int8"]], network, source, worst=3).reports
    logits = runtimes.open_model(files["tflite_int8"]).predict(source.images)
    with torch.no_grad():
        error = np.abs(logits - network(torch.from_numpy(source.images)).numpy()).max(axis=1)
    order = np.argsort(-error)[:3]
    assert [item.index for item in report.worst] == list(order)
    # Picture 2 was left out, so the third prediction is of picture 3.
    assert [item.name for item in report.worst] == [f"picture {i if i < 2 else i + 1}" for i in order]


def test_two_formats_give_a_second_opinion(files: Files, network: TinyNet) -> None:
    verdict = verify(list(files.values()), network, Pictures())
    pairs = {(opinion.first, opinion.second) for opinion in verdict.opinions}
    assert pairs == {("tiny.tflite", "tiny.onnx"), ("tiny.int8.tflite", "tiny.int8.onnx")}
    assert all(opinion.agreement >= 0.95 for opinion in verdict.opinions)


def test_a_file_of_another_network_fails_with_reasons(files: Files) -> None:
    other = tiny_net(seed=5)
    limits = Thresholds(min_agreement=0.99, max_drop_points=1.0, max_relative_error=1e-4)
    verdict = verify([files["tflite"]], other, Pictures(), thresholds={"tiny.tflite": limits})
    assert not verdict.passed
    text = " ".join(verdict.reports[0].reasons)
    assert "names the network's class on" in text and "99.00% asked" in text
    assert "logits differ by" in text
    with pytest.raises(VerifyError, match=r"tiny\.tflite: names") as caught:
        verdict.require()
    assert caught.value.exit_code == 1
    assert json.loads(json.dumps(verdict.as_dict(), allow_nan=False))["passed"] is False


def test_a_loss_of_accuracy_is_judged_where_there_are_labels(files: Files, network: TinyNet) -> None:
    class Liar(nn.Module):
        """Right where the labels are wrong: more accurate than the file could be."""

        def forward(self, batch: Tensor) -> Tensor:
            return network(batch).roll(1, dims=1)

    limits = {"tiny.onnx": Thresholds(min_agreement=0.0, max_drop_points=-60.0)}
    [report] = verify([files["onnx"]], Liar(), Pictures(), thresholds=limits).reports
    assert any("points of top-1" in reason for reason in report.reasons)
    [report] = verify([files["onnx"]], Liar(), Pictures(labels=False), thresholds=limits).reports
    assert (report.top1, report.top5, report.network_top1, report.reasons) == (None, None, None, ())


def test_progress_is_told(files: Files, network: TinyNet) -> None:
    said: list[tuple[int, int, str]] = []
    verify([files["onnx"]], network, Pictures(), batch_size=16, say=lambda *words: said.append(words))
    assert said == [(16, 41, "pictures/eval"), (32, 41, "pictures/eval"), (40, 41, "pictures/eval")]


def test_a_network_that_predicts_nan_is_refused(files: Files) -> None:
    class Broken(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return batch.mean((2, 3)).repeat(1, 4)[:, :10] * float("nan")

    with pytest.raises(VerifyError, match="predicts NaN"):
        verify([files["onnx"]], Broken(), Pictures())


def test_no_images_are_refused(files: Files, network: TinyNet) -> None:
    with pytest.raises(VerifyError, match="holds no images"):
        verify([files["onnx"]], network, Pictures(count=0))


def test_the_first_of_tied_classes_is_the_one_that_is_named() -> None:
    """Int8 logits tie often; accuracy and agreement must name the same class then."""
    logits = np.tile(np.array([0, 2, 2, 2, 2, 2, 2, 1], dtype=np.float32), (8, 1))
    for label, top1, top5 in ((1, 1.0, 1.0), (5, 0.0, 1.0), (6, 0.0, 0.0)):
        labelled = Labelled(logits, logits, np.full(8, label))
        report = judge("x", logits, logits, labelled, names=list("abcdefgh"), limits=Thresholds())
        assert (report.top1, report.network_top1, report.top5) == (top1, top1, top5), label
