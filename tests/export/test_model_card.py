"""The model card says what the files are, and does not hide a failure."""

from pathlib import Path

from tiny_models import TinyNet

from pipeline.export import inspect
from pipeline.export.model_card import ModelCard, write_card
from pipeline.export.verify import FileReport


def test_a_card_lists_files_origin_and_failures(files: dict[str, Path], network: TinyNet, tmp_path: Path) -> None:
    failed = FileReport(
        "tiny.int8.tflite", 20, 0.5, None, 0.75, 0.6, 1.0, 0.1, 0.2, (), ("loses 25.00 points | of top-1",)
    )
    card = ModelCard(
        name="tiny, folded",
        summary="Names one of ten classes.",
        licence="Apache-2.0",
        weights="trained here, seed 0",
        data={"Training data": "generated", "Calibration": "64 images, seed 1"},
        preprocessing={"input_px": 32, "mean": (0.5, 0.5, 0.5)},
        units_folded=["blocks.folded"],
        files=[inspect.census(path) for path in files.values()],
        reports=[failed],
        made_with={"layerfold": "0.1.0"},
        limits=["Not for medical use."],
    )
    text = write_card(card, tmp_path / "MODEL_CARD.md").read_text()
    assert text.startswith("# tiny, folded\n")
    assert "- Licence of the weights: Apache-2.0" in text
    assert "`blocks.folded`" in text
    assert "| `tiny.int8.tflite` | 0.0" in text
    assert "| int8 1×32×32×3 | 10 | 50.00% | 60.00% of 20 | failed: loses 25.00 points \\| of top-1 |" in text
    assert text.count("not verified") == 3
    assert "- mean: 0.5, 0.5, 0.5" in text
    assert "Not for medical use." in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 4
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}
