"""Recipes: unknown keys, wrong values and overrides are caught, and the message says what to do."""

import pytest
import yaml

from pipeline import recipe_files
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe


def test_every_default_is_written_out_and_read_back_the_same() -> None:
    recipe = recipe_files.load("quickstart")
    assert Recipe.model_validate(recipe.resolved()).resolved() == recipe.resolved()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("baseline.train.epocs=2", ["baseline.train.epocs", "epochs"]),
        ("modell=2", ["modell", "model"]),
        ("seed=hello", ["seed", "hello"]),
        ("prefold.lambda_c=-1", ["prefold.lambda_c", "-1"]),
        ("prefold.lambda_c=.nan", ["prefold.lambda_c", "finite"]),
        ("prefold.method=fixed", ["prefold.units"]),
        ("name.x=1", ["'name' holds a value"]),
        ("novalue", ["novalue", "key.subkey=value"]),
        ("bench.precisions=[fp32, int7]", ["bench.precisions.1", "int7"]),
        ("export.formats=[]", ["'export.formats' is empty", "at least 1"]),
        ("bench.targets=[]", ["'bench.targets' is empty"]),
        ("bench.precisions=[]", ["'bench.precisions' is empty"]),
        ("export.formats=tflite", ["'export.formats' is 'tflite', expected a list", "export.formats=[tflite]"]),
        ("prefold.units=3", ["'prefold.units' is 3", "expected a list", "'all'"]),
    ],
)
def test_a_wrong_override_is_named_with_its_fix(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_files.load("quickstart", overrides=[override])
    for word in words:
        assert word in str(caught.value)


def test_overrides_read_yaml_values_and_the_last_one_wins() -> None:
    recipe = recipe_files.load("quickstart", overrides=["seed=1", "prefold.units=[blocks.1.1]", "seed=7"])
    assert (recipe.seed, recipe.prefold.units) == (7, ("blocks.1.1",))


@pytest.mark.parametrize(
    ("text", "units"),
    [("all", "all"), ("blocks.1.1", ("blocks.1.1",)), ("'blocks.1.1, blocks.2.1'", ("blocks.1.1", "blocks.2.1"))],
)
def test_one_unit_needs_no_brackets(text: str, units: str | tuple[str, ...]) -> None:
    assert recipe_files.load("quickstart", overrides=[f"prefold.units={text}"]).prefold.units == units


def test_set_beats_quick_and_quick_marks_the_recipe() -> None:
    recipe = recipe_files.load("quickstart", quick=True, overrides=["bench.runs=3"])
    assert recipe.variant == "quick"
    assert recipe.bench.runs == 3
    assert recipe.data.train_images != recipe_files.load("quickstart").data.train_images


def test_an_override_does_not_leak_through_a_yaml_anchor() -> None:
    name = "mobilenet_v2/imagenet_100"
    recipe = recipe_files.load(name, overrides=["prefold.train.epochs=2"])
    assert recipe.prefold.train.epochs == 2
    assert recipe.postfold.train is not None
    assert recipe.postfold.train.epochs == recipe_files.load(name).prefold.train.epochs != 2


def test_a_recipe_is_found_by_path_and_by_shipped_name(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**recipe_files.load("quickstart").resolved(), "name": "mine"}))
    assert recipe_files.load(str(path)).name == "mine"
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        recipe_files.load("quikstart")


def test_a_recipe_with_a_base_holds_only_its_changes(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "base: quickstart\nname: mine\nprefold: {lambda_c: 2, train: {epochs: 9}}\nquick: {bench.runs: 3}\n"
    )
    mine = recipe_files.load(str(tmp_path / "mine.yaml")).resolved()
    theirs = recipe_files.load("quickstart").resolved()
    assert mine["prefold"]["lambda_c"] == 2 and mine["prefold"]["train"]["epochs"] == 9
    theirs["name"], theirs["prefold"]["lambda_c"], theirs["prefold"]["train"]["epochs"] = "mine", 2, 9
    assert mine == theirs
    quick = recipe_files.load(str(tmp_path / "mine.yaml"), quick=True)
    assert (quick.bench.runs, quick.data.train_images) == (
        3,
        recipe_files.load("quickstart", quick=True).data.train_images,
    )


def test_a_base_that_leads_back_to_itself_is_refused(tmp_path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"base: {two}\nname: one\n")
    two.write_text(f"base: {one}\nname: two\n")
    with pytest.raises(RecipeError, match="leads back to itself"):
        recipe_files.load(str(one))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        recipe_files.load(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quick: [a]", ["quick", "['a']", "dotted keys"]),
        ("quick: {1: 2}", ["quick", "key 1"]),
        ("quick: 7", ["quick", "7"]),
    ],
)
def test_a_quick_section_that_is_none_is_refused(tmp_path, text: str, words: list[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: quickstart\n{text}\n")
    with pytest.raises(RecipeError) as caught:
        recipe_files.load(str(path), quick=True)
    for word in (str(path), *words):
        assert word in str(caught.value)
