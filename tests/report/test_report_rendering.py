"""The report says what was found, escapes what it is given, and marks failures and quick runs."""

import re
from html.parser import HTMLParser

import pytest

from pipeline.errors import ArtifactError
from pipeline.report import html, table
from pipeline.results.collect import load_report
from pipeline.results.paper import IMAGENET_ROWS
from pipeline.results.schema import (
    CalibrationEntry,
    CensusRow,
    FileEntry,
    LatencyRow,
    ModelResult,
    NoiseRow,
    OpinionRow,
    RunReport,
    VerifyRow,
    WorstImageRow,
)

_KINDS = ("tflite_fp32", "tflite_int8", "onnx_fp32", "onnx_int8")


def _model(which: str, macs: int, accuracy: float) -> ModelResult:
    files = {kind: FileEntry(path=f"models/{which}.{kind}", bytes=1000, sha256="0" * 64) for kind in _KINDS}
    shares = dict.fromkeys(("torch", *_KINDS), accuracy)
    return ModelResult(params=10, macs=macs, depth=7, accuracy=shares, agreement=shares, files=files)


def _latency(**change: object) -> LatencyRow:
    row: dict[str, object] = {
        "target": "host-litert", "runtime": "litert 2", "precision": "int8", "threads": 1, "baseline_ms": 2.0,
        "folded_ms": 1.5, "ratio": 0.75, "ratio_low": 0.7, "ratio_high": 0.8, "valid": True, "note": "",
    }  # fmt: skip
    return LatencyRow.model_validate(row | change)


def _report(**change: object) -> RunReport:
    fields: dict[str, object] = {
        "recipe": "quickstart",
        "variant": "full",
        "description": "a <b>bold</b> claim",
        "seed": 3,
        "model": "mobilenetv2_100",
        "input_px": 32,
        "weights": "packaged",
        "data": "fashion_mnist",
        "eval_images": 10000,
        "labelled_images": 10000,
        "versions": {"torch": "2"},
        "stage_hashes": {"baseline": "abc"},
        "stage_seconds": {"baseline": 1.5},
        "units_folded": ["blocks.3.2"],
        "units_skipped": {},
        "alphas": {"blocks.3.2": 1.0},
        "fold_max_abs_error": 3e-6,
        "fold_changed_predictions": 0,
        "baseline": _model("baseline", 300_000_000, 0.9),
        "folded": _model("folded", 279_000_000, 0.88),
        "verify": [],
        "latency": [_latency()],
        "paper": None,
        "failures": [],
    }
    return RunReport.model_validate(fields | change)


def test_the_figures_are_in_the_markdown() -> None:
    text = table.markdown(_report())
    for figure in (
        "300.00 M",
        "279.00 M",
        "-7.00%",
        "90.00%",
        "88.00%",
        "+2.00",
        "-25.0%",
        "0.700 to 0.800",
        "blocks.3.2",
    ):
        assert figure in text, figure


def test_markdown_tables_are_well_formed() -> None:
    for block in re.findall(r"(?:^\|.*\|\n)+", table.markdown(_report()), flags=re.M):
        assert len({line.count(" | ") for line in block.splitlines()}) == 1


def test_no_difference_is_said_and_a_failed_target_is_red_not_nan() -> None:
    unsure = _latency(ratio=0.99, ratio_low=0.95, ratio_high=1.03)
    failed = _latency(ratio=None, ratio_low=None, ratio_high=None, baseline_ms=None, folded_ms=None, note="no runtime")
    rows = {t.title: t for t in table.reduction_tables(_report(latency=[unsure, failed]))}[
        "Latency of one image (median)"
    ].rows
    assert "no difference shown" in rows[0].cells[-1] and not rows[0].failed
    assert rows[1].failed and rows[1].cells[-1] == "no runtime"
    assert "nan" not in table.markdown(_report(latency=[failed])).lower()


def test_a_file_that_failed_verification_is_a_red_row() -> None:
    row = VerifyRow(
        model="folded", kind="tflite_int8", images=10, accuracy=0.1, agreement=0.1, max_abs_logit_error=9.0,
        mean_abs_logit_error=3.0, passed=False, reason="agrees on 10%",
    )  # fmt: skip
    report = _report(verify=[row], failures=["folded tflite_int8: agrees on 10%"])
    accuracy = next(t for t in table.reduction_tables(report) if t.title == "Accuracy")
    assert [r.cells[0] for r in accuracy.rows if r.failed] == ["TFLite int8"]
    assert "Failed: folded tflite_int8" in html.render(report)


def test_the_html_is_whole_self_contained_and_escaped() -> None:
    page = html.render(_report())
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold" in page
    assert not re.findall(r"(?:src|href)=[\"']?https?:", page)
    open_tags: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Balance().feed(page)
    assert open_tags == [] and page.count("<svg") == 2


def test_a_quick_run_says_so_everywhere() -> None:
    report = _report(variant="quick")
    assert "QUICK" in table.markdown(report) and "Quick variant" in html.render(report)


def test_few_labelled_images_are_called_a_sanity_check() -> None:
    assert "sanity check" in table.markdown(_report(labelled_images=20))
    assert "sanity check" not in table.markdown(_report())


def test_the_papers_row_stands_beside_ours() -> None:
    text = table.markdown(_report(paper=IMAGENET_ROWS["mobilenetv2_100"]))
    assert "MNV2-1.0" in text and "71.00%" in text and "25%" in text


def test_a_report_survives_json_and_a_damaged_one_is_named(tmp_path) -> None:
    path = tmp_path / "report.json"
    path.write_text(_report().model_dump_json())
    assert load_report(path) == _report()
    path.write_text('{"recipe": 3}')
    with pytest.raises(ArtifactError, match=r"report\.json does not fit"):
        load_report(path)
    with pytest.raises(ArtifactError, match="cannot read"):
        load_report(tmp_path / "none.json")


def test_the_progress_of_alpha_is_drawn_where_there_was_any() -> None:
    trace = [{"step": step, "alphas": {"blocks.3.2": step / 10, "blocks.1.1": 0.1}} for step in range(1, 11)]
    page = html.render(_report(alpha_trace=trace))
    assert "α during pre-folding" in page and page.count("<figure>") == html.render(_report()).count("<figure>") + 1
    assert "α during pre-folding" not in html.render(_report())


def _checked(**change: object) -> RunReport:
    verify = VerifyRow(
        model="folded", kind="tflite_int8", images=50, accuracy=0.8, agreement=0.7, max_abs_logit_error=1.5,
        mean_abs_logit_error=0.1, passed=False, reason="agrees too rarely", top5=0.95, relative_error=0.125,
        worst=[WorstImageRow(index=3, name="photos/eval: <cat>.png", max_abs_error=1.5, network_class=4,
                             file_class=281)],
    )  # fmt: skip
    opinion = OpinionRow(
        model="folded", first="tflite_int8", second="onnx_int8", agreement=0.5, max_abs_logit_difference=2.0,
        passed=False, reason="they agree on 50.00% of the images, 80.00% asked",
    )  # fmt: skip
    census = [
        CensusRow(model=model, kind="tflite_fp32", ops={"CONV_2D": count, "PAD": 5}, fused_activations={"RELU6": count},
                  float_tensors=[], widest_layer="conv_stem", widest_spread=12.5, findings=[])
        for model, count in (("baseline", 35), ("folded", 32))
    ]  # fmt: skip
    noise = [
        NoiseRow(model=model, file=f"{model}.int8.tflite", name="blocks.3.2", folded=model == "folded", sqnr_db=level,
                 worst_channel_db=None)
        for model, level in (("baseline", 16.4), ("folded", 22.1))
    ]  # fmt: skip
    taken = CalibrationEntry(
        source="photos/calibration", seed=3, asked=12, count=11, sha256="ab" * 32, skipped={"x/broken.jpg": "OSError"}
    )
    fields = {"verify": [verify], "opinions": [opinion], "census": census, "noise": noise, "calibration": taken,
              "quantised": {"method": "ptq", "per_channel": True, "float_units": []},
              "identities_apart": {"blocks.3.2": 14.0}}  # fmt: skip
    return _report(**(fields | change))


def test_every_check_of_a_file_is_shown() -> None:
    text = table.markdown(_checked())
    for words in (
        "| **folded TFLite int8** | **80.00%** | **95.00%** | **70.00%** |",
        "**failed: agrees too rarely**",
        "**TFLite int8 and ONNX int8**",
        "they agree on 50.00% of the images",
        "| folded TFLite int8 | photos/eval: <cat>.png | 1.5 | 4 | 281 |",
        "| CONV_2D | 35 | 32 |",
        "| RELU6, fused | 35 | 32 |",
        "| widest weights | 12.5× conv_stem | 12.5× conv_stem |",
        "| blocks.3.2 (folded) | 16.4 | 22.1 | exact | exact |",
        "calibrated on 11 images of photos/calibration (seed 3, sha256 abababababab)",
        "method ptq, per_channel yes; calibrated",
        "1 damaged calibration images left out: x/broken.jpg (OSError)",
        "without their identity, which an ADD brings back: blocks.3.2 (14.0 times finer)",
    ):
        assert words in text, words
    page = html.render(_checked())
    assert "&lt;cat&gt;.png" in page and page.count('<tr class="failed">') >= 2
    terminal = [item.title for item in table.reduction_tables(_checked())]
    assert "Verification" not in terminal and "Verification" in [item.title for item in table.all_tables(_checked())]


def test_the_terminal_says_what_ran_below_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    hashes = {"baseline": "abc123", "report": "fed987"}
    report = _report(versions={"torch": "2.13.0", "timm": "1.0.31"}, stage_hashes=hashes, units_skipped={"b.1": "why"})
    table.terminal_table(report)
    end = capsys.readouterr().out.rpartition("Files")[2]
    for words in (
        "blocks.3.2",
        "b.1: why",
        "3.00e-06",
        "fashion_mnist",
        "seed 3",
        "torch 2.13.0, timm 1.0.31",
        "baseline abc123, report fed987",
    ):
        assert words in end, words


def test_an_older_report_without_the_checks_is_still_read(tmp_path) -> None:
    import json

    raw = json.loads(_report().model_dump_json())
    for name in ("batch", "opinions", "census", "noise", "calibration", "quantised", "identities_apart"):
        del raw[name]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(raw))
    assert load_report(path) == _report()
    assert "What int8 leaves" not in table.markdown(_report())


def test_a_batch_is_named_where_latency_is_of_several_images() -> None:
    assert "Latency of 4 images" in table.markdown(_report(batch=4))
