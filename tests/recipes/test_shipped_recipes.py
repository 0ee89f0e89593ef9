"""Every shipped recipe validates, plans, names real units, and carries the command that runs it."""

import json
from pathlib import Path

import pytest

from pipeline import plan, recipe_files
from pipeline.results.collect import paper_row

NAMES = sorted(recipe_files.shipped())
FACTS = {"data": "some data", "weights": "some weights", "host": "a processor"}
IMAGENET = [name for name in NAMES if "/imagenet_" in name]


def test_the_recipes_of_the_readme_are_there() -> None:
    expected = {"quickstart", "efficientnet_lite/lite0_photos"}
    expected |= {f"mobilenet_v2/imagenet_{width}" for width in ("075", "100", "140")}
    expected |= {f"efficientnet_lite/imagenet_lite{size}" for size in (0, 1)}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_validates_and_plans(name: str, quick: bool) -> None:
    recipe = recipe_files.load(name, quick=quick)
    assert recipe.name == Path(name).name
    assert plan.build(recipe, FACTS).stages[0].name == "baseline"
    paper_row(recipe.report.paper)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_carries_the_command_that_runs_it(name: str) -> None:
    assert recipe_files.find(name).read_text().startswith(f"# layerfold run {name}")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_named_units_exist_and_can_fold(name: str, quick: bool) -> None:
    from pipeline.models import zoo
    from pipeline.stages.prefold import candidates

    recipe = recipe_files.load(name, quick=quick)
    section = recipe.model
    model = zoo.create(section.name, num_classes=section.num_classes, input_px=section.input_px, args=section.args)
    units = candidates(recipe, model)
    assert units
    if recipe.prefold.units != "all":
        assert [unit.name for unit in units] == list(recipe.prefold.units)


@pytest.mark.parametrize("name", IMAGENET)
def test_an_imagenet_recipe_plans_on_a_folder_and_asks_for_one(name: str, layerfold, image_folder, tmp_path) -> None:
    done = layerfold("plan", name, "--quick", "--no-estimate", "--set", f"data.root={image_folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "to run" in done.stdout and "imagefolder" in done.stdout
    missing = layerfold("plan", name, "--no-estimate", cwd=tmp_path)
    assert missing.returncode == 2 and "data.root" in missing.stderr
    assert list(tmp_path.iterdir()) == []


# TFLite's converter is most of the time of such a run: the slow cases have it.
@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("mobilenet_v2/imagenet_075", ["onnx"]),
        *(pytest.param(name, ["tflite", "onnx"], marks=pytest.mark.slow) for name in IMAGENET),
    ],
)
def test_an_imagenet_recipe_runs_quickly_on_a_generated_folder(
    name: str, formats: list[str], layerfold, image_folder, tmp_path
) -> None:
    words = ["--quick", "--set", f"data.root={image_folder}", "--set", f"export.formats=[{','.join(formats)}]"]
    done = layerfold("run", name, *words, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["variant"] == "quick"
    assert report["units_folded"] == list(recipe_files.load(name, quick=True).prefold.units)
    assert report["fold_max_abs_error"] < 1e-3
    assert len(report["verify"]) == 4 * len(formats) and len(report["latency"]) == 2 * len(formats)
    assert report["folded"]["depth"] < report["baseline"]["depth"]
