"""A study: its file, its cells, its run, its resumption."""

import base64
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import plan, recipe_files
from pipeline.artifacts import StageOutput
from pipeline.errors import RecipeError, RunFolderError
from pipeline.study import execute
from pipeline.study.results import StudyResult
from pipeline.study.schema import cells, is_study, load, study_folder_name

FACTS = {"data": "some data", "weights": "some weights", "host": "a processor"}


class Watch:
    """Counts the stages that really run; stops the study where told."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.titles: list[str] = []
        self.ran: list[str] = []
        self.stop_after = stop_after

    def __call__(self, planned: plan.Plan, title: str) -> "Watch":
        self.titles.append(title)
        return self

    def stage_started(self, stage: plan.PlannedStage, *, resumed: bool) -> "Watch":
        if self.stop_after is not None and len(self.ran) >= self.stop_after:
            raise KeyboardInterrupt
        return self

    def stage_finished(self, stage: plan.PlannedStage, output: StageOutput, *, cached: bool) -> None:
        if not cached:
            self.ran.append(stage.name)

    def progress(self, done: float, total: float, text: str = "") -> None: ...
    def say(self, text: str) -> None: ...


def quiet(text: str) -> None: ...


@pytest.fixture
def study_file(image_folder: Path, tmp_path: Path) -> Path:
    raw: dict[str, Any] = {
        "study": "ednl",
        "name": "tiny",
        "reduced": "a test",
        "lambda_c": [30.0, 0],
        "recipe": {
            "model": {"num_classes": 4, "input_px": 8, "weights": "none", "args": {"width": 8}},
            "data": {"name": "imagefolder", "root": str(image_folder)},
            "baseline": {"train": {"epochs": 1, "lr": 0.05, "batch_size": 8}},
            "prefold": {
                "per": "layer",
                "alpha_init": 0.2,
                "alpha_lr": 0.01,
                "train": {"epochs": 6, "lr": 0.01, "batch_size": 8},
            },
        },
        "networks": {"two": {"model.name": "mlp_2"}, "four": {"model": {"name": "mlp_4"}}},
        "quick": {"lambda_c": [0], "recipe.prefold.train.epochs": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def test_a_study_is_a_grid_of_recipes(study_file: Path) -> None:
    assert is_study(str(study_file)) and not is_study("quickstart")
    grid = cells(load(str(study_file)))
    assert [(c.network, c.lambda_c) for c in grid] == [("two", 0), ("two", 30), ("four", 0), ("four", 30)]
    assert [c.recipe.model.name for c in grid] == ["mlp_2", "mlp_2", "mlp_4", "mlp_4"]
    assert [c.recipe.prefold.lambda_c for c in grid] == [0, 30, 0, 30]
    assert len({c.folder for c in grid}) == 4
    hashes = [plan.build(c.recipe, FACTS).stage("baseline").hash for c in grid]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
    own = cells(load(str(study_file), overrides=["networks.four.lambda_c=[2, 1, 2]"]))
    assert [(c.network, c.lambda_c) for c in own] == [("two", 0), ("two", 30), ("four", 1), ("four", 2)]
    seeds = cells(load(str(study_file), overrides=["seeds=[0, 1]"]))
    assert [c.recipe.seed for c in seeds] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_overrides_reach_the_shared_recipe_and_quick_marks_every_run(study_file: Path) -> None:
    plain, quick = load(str(study_file)), load(str(study_file), quick=True)
    assert {c.recipe.variant for c in cells(quick)} == {"quick"}
    assert [c.recipe.prefold.train.epochs for c in cells(quick) if c.recipe.prefold.train] == [1, 1]
    assert study_folder_name(plain) != study_folder_name(quick)
    more = load(str(study_file), overrides=["networks.three.model.name=mlp_3", "recipe.prefold.p=1.5"])
    assert {c.recipe.model.name for c in cells(more)} == {"mlp_2", "mlp_3", "mlp_4"}
    assert {c.recipe.prefold.p for c in cells(more)} == {1.5}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lamda_c=[1]", ["lamda_c", "did you mean 'lambda_c'"]),
        ("lambda_c=[]", ["lambda_c"]),
        ("recipe.prefold.treshold=0.5", ["network 'two'", "prefold.treshold", "threshold"]),
        ("networks.two.model.nam=x", ["network 'two'", "model.nam"]),
        ("seeds=[-1]", ["seeds"]),
        ("networks.two.lambda_c=[-1]", ["network 'two'", "lambda_c", "-1"]),
        ("networks.two.lambda_c=[]", ["network 'two'", "lambda_c"]),
        ("recipe.seed=3", ["recipe: 'seed'", "'seeds'"]),
        ("recipe.prefold.lambda_c=0.5", ["recipe: 'prefold.lambda_c'", "'lambda_c'"]),
        ("networks.two={model.name: mlp_2, prefold: {lambda_c: 1}}", ["network 'two'", "'prefold.lambda_c'"]),
        ("recipe.quick={prefold.p: 1}", ["recipe: 'quick", "`--quick`"]),
    ],
)
def test_a_wrong_key_names_the_network_and_the_key(study_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(str(study_file), overrides=[override])
    for word in words:
        assert word in str(caught.value)


def test_a_study_is_no_recipe(study_file: Path) -> None:
    with pytest.raises(RecipeError, match="is a study"):
        recipe_files.load(str(study_file))


def test_a_run_is_cached_resumable_and_reported(study_file: Path, tmp_path: Path) -> None:
    study, folder = load(str(study_file)), tmp_path / "out"
    stopped = Watch(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        execute.execute(study, folder, stopped, quiet)
    assert stopped.ran == ["baseline", "prefold", "prefold"]
    assert len(json.loads((folder / "results.json").read_text())["cells"]) == 2
    again = Watch()
    result = execute.execute(study, folder, again, quiet)
    assert again.ran == ["baseline", "prefold", "prefold"]
    assert again.titles[3] == "[4/4] four, λ_c 30"
    third = Watch()
    assert execute.execute(study, folder, third, quiet) == result
    assert third.ran == []

    by_name = {(cell.network, cell.lambda_c): cell for cell in result.cells}
    assert by_name["four", 0].depth == by_name["four", 0].depth_before == 3
    for cell in result.cells:
        assert cell.depth == cell.depth_before - sum(cell.removed.values())
        assert 0 <= cell.accuracy <= 1
    assert list(by_name["four", 30].removed) == ["act1", "act2", "act3"]
    assert by_name["four", 30].depth == 0 and by_name["two", 30].depth == 0

    assert StudyResult.model_validate_json((folder / "results.json").read_bytes()) == result
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [row["depth"] for row in rows] == [str(cell.depth) for cell in result.cells]
    page = (folder / "report.html").read_text()
    for name in ("depth_accuracy.png", "layers.png"):
        assert base64.b64encode((folder / name).read_bytes()).decode() in page
    assert "a test" in page and "http://" not in page and "https://" not in page


def test_a_foreign_folder_is_left_alone(study_file: Path, tmp_path: Path) -> None:
    study, folder = load(str(study_file)), tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(RunFolderError, match="holds no study"):
        execute.execute(study, folder, Watch(), quiet)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "study.yaml").write_text("name: other\n")
    with pytest.raises(RunFolderError, match="another study"):
        execute.execute(study, folder, Watch(), quiet)
    for damaged in (b"name: [", b"\xff\xfe\x00name"):
        (folder / "study.yaml").write_bytes(damaged)
        with pytest.raises(RunFolderError, match=r"study\.yaml is damaged.*\n  fix: delete it"):
            execute.execute(study, folder, Watch(), quiet)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="give another folder with --out"):
        execute.execute(study, tmp_path / "file" / "out", Watch(), quiet)
    with pytest.raises(RunFolderError, match="--out"):
        execute.execute(study, Path("/proc/no_folder"), Watch(), quiet)


def test_folded_networks_can_be_measured(study_file: Path, tmp_path: Path) -> None:
    study = load(str(study_file), overrides=["measure=folded", "networks={four: {model.name: mlp_4}}", "lambda_c=[30]"])
    watch = Watch()
    result = execute.execute(study, tmp_path / "out", watch, quiet)
    assert watch.ran == ["baseline", "prefold", "fold", "postfold"]
    assert result.cells[0].depth == 0


def test_the_command_line_plans_and_runs_a_study(study_file: Path, layerfold: Any, tmp_path: Path) -> None:
    planned = layerfold("plan", str(study_file), "--quick", "--out", "out", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count("to run") == 4 and "to do: about" in planned.stdout
    assert not (tmp_path / "out").exists()
    done = layerfold("run", str(study_file), "--quick", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "QUICK" in done.stdout and "report.html" in done.stdout
    planned = layerfold("plan", str(study_file), "--quick", "--out", "out", "--no-estimate", cwd=tmp_path)
    assert planned.stdout.count("cached") == 4


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", sorted(recipe_files.shipped_studies()))
def test_shipped_studies_plan_and_carry_their_command(name: str, quick: bool) -> None:
    from pipeline.models import zoo
    from pipeline.stages.prefold import candidates

    study = load(name, quick=quick)
    assert study.name == Path(name).name
    assert recipe_files.find(name).read_text().startswith(f"# layerfold run {name}\n")
    for cell in {cell.network: cell for cell in cells(study)}.values():
        section = cell.recipe.model
        model = zoo.create(section.name, num_classes=section.num_classes, input_px=section.input_px, args=section.args)
        assert candidates(cell.recipe, model)
