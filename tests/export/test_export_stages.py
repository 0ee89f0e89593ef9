"""The stages from two networks to verified, described files, run one by one on MNIST without any training before."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import artifacts, plan, preflight, recipe_files
from pipeline.artifacts import StageOutput
from pipeline.errors import DataError, ExportError, RecipeError, UnitError
from pipeline.export import inspect, metadata, runtimes
from pipeline.export.conversion import Checked
from pipeline.folding import fold, linearise
from pipeline.models import zoo
from pipeline.recipe import Recipe
from pipeline.results.collect import load_report
from pipeline.stages import StageContext, load_stage, workbench
from pipeline.stages import export as export_stage

FACTS = {"data": "mnist", "weights": "none", "host": "a processor"}
UNIT = "blocks.2.1"
ORIGIN = {"source": "file", "detail": "test", "sha256": None, "licence": "CC-BY-4.0"}
BASE = (
    "data.name=mnist", "data.fallback=null", "data.train_images=96", "data.eval_images=64", "verify.batch_size=24",
    "export.formats=[tflite]", "quantize.calibration_images=40", "quantize.noise_images=4", "verify.worst_images=2",
    "verify.int8_min_agreement=0.5", "verify.int8_max_drop_points=50",
)  # fmt: skip


class Words:
    """Keeps what a stage says."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.shares: list[float] = []

    def progress(self, done: float, total: float, text: str = "") -> None:
        self.shares.append(done / total)

    def say(self, text: str) -> None:
        self.said.append(text)


class Run:
    """A run folder whose first stages were written by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs: dict[str, StageOutput] = {}
        self.words = Words()

    def recipe(self, *overrides: str) -> Recipe:
        return recipe_files.load("quickstart", overrides=[*BASE, *overrides])

    def context(self, name: str, recipe: Recipe, work: Path) -> StageContext:
        stage = plan.build(recipe, FACTS).stage(name)
        inputs = {parent: self.outputs[parent] for parent in stage.parents if parent in self.outputs}
        return StageContext(recipe, stage, work, inputs, self.words)

    def stage(self, name: str, *overrides: str) -> StageOutput:
        """Runs one stage as the runner would."""
        recipe = self.recipe(*overrides)
        work = self.folder / f"{name}-{len(list(self.folder.iterdir()))}.partial"
        work.mkdir()
        context = self.context(name, recipe, work)
        metrics = load_stage(name)(context)
        return self.commit(context, metrics)

    def commit(self, context: StageContext, metrics: dict[str, object]) -> StageOutput:
        final = context.work.with_suffix("")
        return artifacts.commit(
            context.work, final, context.stage, metrics=metrics, versions={}, seed=0, duration_s=0.0
        )

    def write(self, name: str, metrics: dict[str, object], model: tuple[str, torch.nn.Module] | None = None) -> None:
        work = self.folder / f"{name}.partial"
        work.mkdir()
        context = self.context(name, self.recipe(), work)
        if model is not None:
            workbench.save_model(context, *model)
        self.outputs[name] = self.commit(context, metrics)


@pytest.fixture(scope="module", autouse=True)
def _one_thread_a_module() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Baseline with BatchNorm statistics of real images, and the same with one unit folded; both exported."""
    run = Run(tmp_path_factory.mktemp("run"))
    recipe = run.recipe()
    torch.manual_seed(0)
    model = zoo.create(recipe.model.name, num_classes=10, in_chans=3, input_px=32).train()
    with torch.no_grad():
        for images, _ in workbench.split(recipe, "train").batches(24):
            model(images)
        model.classifier.weight.mul_(20)  # far apart enough that the classes differ by more than int8's noise
    model.eval()
    folded = fold(linearise(model, [UNIT]), workbench.example(recipe), units=[UNIT]).model
    counts = {"params": 1, "macs": 1, "depth": 1}
    run.write("baseline", {"weights_origin": ORIGIN, "weights": "test", "data": "mnist", "counts": counts},
              ("models/baseline.pt", model))  # fmt: skip
    run.write("prefold", {"alphas": {UNIT: 1.0}, "details": {}})
    run.write("fold", {"units_folded": [UNIT], "units_skipped": {}, "max_abs_error": 0.0, "changed_predictions": 0})
    run.write("postfold", {"units_folded": [UNIT], "counts": counts}, ("models/folded.pt", folded))
    run.write("bench", {"latency": []})
    run.outputs["export"] = run.stage("export")
    run.outputs["quantize"] = run.stage("quantize")
    return run


def test_an_exported_file_says_what_it_is(run: Run) -> None:
    content = metadata.read(run.outputs["export"].file("models/folded.tflite"))
    assert content["units_folded"] == [UNIT] and content["model"] == "folded"
    assert content["labels"] == [str(digit) for digit in range(10)]
    assert content["licence"] == "CC-BY-4.0" and content["precision"] == "fp32"
    assert content["preprocess"]["input_px"] == 32
    assert content["recipe_hash"] == run.outputs["export"].manifest["hash"]
    assert metadata.read(run.outputs["export"].file("models/baseline.tflite"))["units_folded"] == []


def test_the_manifest_records_calibration_and_noise(run: Run) -> None:
    found = run.outputs["quantize"].metrics
    taken = found["calibration"]
    assert (taken["asked"], taken["count"], taken["seed"]) == (40, 40, 0)
    assert taken["source"] == "mnist/calibration" and len(taken["sha256"]) == 64
    assert metadata.read(run.outputs["quantize"].file("models/folded.int8.tflite"))["calibration"] == taken
    assert found["networks"]["folded"]["bias_shifts"][UNIT] > 0
    noise = {(row["model"], row["name"]): row for row in found["noise"]}
    assert noise["folded", UNIT]["folded"] and not noise["baseline", UNIT]["folded"]
    assert 3 < noise["folded", UNIT]["sqnr_db"] < 60
    # A residual unit's row is that of its sum, also in the network where it is one convolution.
    assert not any(name.endswith(".add") for _, name in noise)
    assert set(found["census"]) == {"baseline.int8.tflite", "folded.int8.tflite"}
    assert found["census"]["folded.int8.tflite"]["float_tensors"] == []


def test_another_seed_calibrates_on_other_images(run: Run) -> None:
    from pipeline.export.calibration import collect

    digests = set()
    for seed in (0, 0, 1):
        source = workbench.split(run.recipe(f"seed={seed}"), "calibration", limit=40)
        digests.add(collect(source, asked=40, seed=seed).sha256)
    assert len(digests) == 2
    with pytest.raises(DataError, match="'mnist/eval' is refused"):
        collect(workbench.split(run.recipe(), "eval"), asked=40, seed=0)
    with pytest.raises(RecipeError, match=r"quantize\.calibration_split is 'eval'"):
        run.recipe("quantize.calibration_split=eval")


def test_training_with_rounding_and_float_units_by_recipe(run: Run) -> None:
    options = ("quantize.method=qat", "quantize.qat.steps=3", "quantize.qat.batch_size=8", "quantize.noise_images=0",
               f"quantize.float_units=[{UNIT}]", "quantize.bias_correction=false")  # fmt: skip
    done = run.stage("quantize", *options)
    assert done.metrics["networks"]["folded"]["qat"]["steps"] == 3
    assert done.metrics["options"]["method"] == "qat" and "trained with rounding" not in str(run.words.said)
    path = done.file("models/folded.int8.tflite")
    assert inspect.census(path).float_tensors == (UNIT,)
    assert metadata.read(path)["quantised"]["float_units"] == [UNIT]
    images = np.concatenate([b.numpy() for b, _ in workbench.split(run.recipe(), "eval").batches(32)])
    found, plain = (
        runtimes.open_model(output.file("models/folded.int8.tflite")).predict(images)
        for output in (done, run.outputs["quantize"])
    )
    assert not np.array_equal(found, plain)
    assert (found.argmax(1) == plain.argmax(1)).mean() > 0.5


def test_a_failed_file_is_a_red_row_and_stays(run: Run) -> None:
    run.outputs["verify"] = run.stage("verify", "verify.int8_min_agreement=1.0", "verify.fp32_max_relative_error=1e-12")
    rows = {(row["model"], row["kind"]): row for row in run.outputs["verify"].metrics["files"]}
    assert not rows["folded", "tflite_fp32"]["passed"]
    assert "of the largest, 1e-12 allowed" in rows["folded", "tflite_fp32"]["reason"]
    assert rows["folded", "tflite_fp32"]["relative_error"] < 1e-5 and rows["folded", "tflite_fp32"]["agreement"] == 1.0
    assert rows["folded", "tflite_fp32"]["top5"] >= rows["folded", "tflite_fp32"]["accuracy"]
    worst = rows["folded", "tflite_int8"]["worst"]
    assert len(worst) == 2 and worst[0]["max_abs_error"] >= worst[1]["max_abs_error"]
    assert worst[0]["name"].startswith("mnist/eval[")
    shares = run.words.shares
    assert max(shares) <= 1.0 and len(shares) > 6 * 3
    done = run.stage("report")
    report = load_report(done.file("report.json"))
    assert any("folded tflite_fp32: logits differ" in failure for failure in report.failures)
    page = done.file("report.html").read_text()
    assert page.count('<tr class="failed">') >= 2
    assert "What int8 leaves of each unit" in page and f"{UNIT} (folded)" in page
    text = done.file("report.md").read_text()
    assert "What the TFLite files hold" in text and "| RELU6, fused |" in text
    assert "calibrated on 40 images of mnist/calibration" in text and "Worst images" in text
    card = done.file("models/MODEL_CARD.md").read_text()
    assert "Licence of the weights: CC-BY-4.0" in card and "failed: logits differ" in card
    assert "| `folded.int8.tflite` |" in card and "no accuracy is claimed" in card
    for name in ("baseline", "folded"):
        assert run.outputs["quantize"].file(f"models/{name}.int8.tflite").stat().st_size > 10_000


def test_tensorflow_is_asked_too(run: Run) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("needs the extra 'tensorflow'")
    opinions = run.stage("verify", "verify.tensorflow=true").metrics["opinions"]
    assert {(row["model"], row["first"], row["second"]) for row in opinions} == {
        (model, kind, "tensorflow") for model in ("baseline", "folded") for kind in ("tflite_fp32", "tflite_int8")
    }
    assert all(row["passed"] and row["agreement"] >= 0.95 for row in opinions)


def test_executorch_files_go_through_every_stage(run: Run) -> None:
    if importlib.util.find_spec("executorch") is None:
        pytest.skip("needs the extra 'executorch'")
    before = dict(run.outputs)
    try:
        for name in ("export", "quantize", "verify", "bench", "report"):
            run.outputs[name] = run.stage(name, "export.formats=[executorch]")
        done = run.outputs
    finally:
        run.outputs = before
    assert any("no table of each unit's noise" in text for text in run.words.said)
    report = load_report(done["report"].file("report.json"))
    assert report.failures == [] and report.latency == [] and report.noise == []
    for model in (report.baseline, report.folded):
        assert set(model.accuracy) == {"torch", "executorch_fp32", "executorch_int8"} == {"torch", *model.files}
    assert {(row.kind, row.passed) for row in report.verify} == {("executorch_fp32", True), ("executorch_int8", True)}
    assert all(row.agreement > 0.8 for row in report.verify)
    assert metadata.read(done["quantize"].file("models/folded.int8.pte"))["units_folded"] == [UNIT]
    text = done["report"].file("report.md").read_text()
    assert "What the ExecuTorch files hold" in text and "ExecuTorch int8" in text
    assert "| `folded.int8.pte` |" in done["report"].file("models/MODEL_CARD.md").read_text()


def test_a_file_that_cannot_be_opened_or_run_is_a_red_row(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = runtimes.open_model

    class Raising:
        def predict(self, batch: np.ndarray) -> np.ndarray:
            raise ExportError("folded.tflite fails while it runs: RuntimeError: node 3")

    def open_model(path: Path, **options: bool) -> runtimes.Predictor:
        if path.name == "baseline.int8.tflite":
            path = tmp_path / "cut.tflite"
            path.write_bytes(b"\x1c\0\0\0TFL3 and nothing more")
        return Raising() if path.name == "folded.tflite" else opened(path, **options)

    monkeypatch.setattr(runtimes, "open_model", open_model)
    run.words.shares.clear()
    done = run.stage("verify")
    rows = {(row["model"], row["kind"]): row for row in done.metrics["files"]}
    broken = [rows["baseline", "tflite_int8"], rows["folded", "tflite_fp32"]]
    assert all(not row["passed"] and row["agreement"] == 0.0 for row in broken)
    assert "cut.tflite" in broken[0]["reason"] and "node 3" in broken[1]["reason"]
    assert rows["baseline", "tflite_fp32"]["passed"] and rows["folded", "tflite_int8"]["images"] == 64
    assert max(run.words.shares) <= 1.0 and "2 checks failed" in done.metrics["summary"]
    before, run.outputs["verify"] = run.outputs.get("verify"), done
    page = run.stage("report").file("report.html").read_text()
    assert "cannot be run" in page and '<tr class="failed">' in page
    if before is not None:
        run.outputs["verify"] = before


def test_the_gate_fails_the_stage_or_warns(run: Run, tmp_path: Path) -> None:
    found = inspect.census(run.outputs["export"].file("models/folded.tflite"))
    broken, advice = "folded.tflite: 3 layout transposes, expected none", "folded.tflite: 2 padding operators"
    bad = Checked(found, (broken,), (advice,))
    with pytest.raises(ExportError, match="3 layout transposes") as caught:
        export_stage.judge(run.context("export", run.recipe(), tmp_path), [bad])
    assert str(tmp_path / "models") in caught.value.hint and "export.gate=warn" in caught.value.hint
    run.words.said.clear()
    export_stage.judge(run.context("export", run.recipe("export.gate=warn"), tmp_path), [bad])
    assert run.words.said == [advice, f"export.gate: {broken}"]


def test_an_operator_that_the_target_lacks_fails_the_stage(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {form: names - {"DEPTHWISE_CONV_2D"} for form, names in inspect.MOBILE_OPERATORS.items()}
    monkeypatch.setattr(inspect, "MOBILE_OPERATORS", known)
    with pytest.raises(ExportError, match="operators outside the target's set: DEPTHWISE_CONV_2D"):
        run.stage("export")


def test_a_misspelt_float_unit_is_found_before_training() -> None:
    recipe = recipe_files.load("quickstart", overrides=[*BASE, "quantize.float_units=[blocks.2.1,blocks.2.l]"])
    with pytest.raises(UnitError, match=r"has no layer or unit 'blocks\.2\.l'; did you mean 'blocks\.2\.\d'"):
        preflight.check(recipe, load_weights=False)


def test_what_a_killed_run_left_is_not_published(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages empty their folder before they do anything, so an early failure shows it."""
    for name in ("export", "quantize"):
        work = tmp_path / name
        (work / "models").mkdir(parents=True)
        (work / "models" / ".folded.deadbeef.partial.tflite").write_bytes(b"half")

        def stop(*_arguments: object, **_named: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(f"pipeline.stages.{name}.prepared", stop)
        with pytest.raises(KeyboardInterrupt):
            load_stage(name)(run.context(name, run.recipe(), work))
        assert list((work / "models").iterdir()) == []
