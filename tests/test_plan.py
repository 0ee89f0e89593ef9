"""Plans: what changes a hash, what does not, and which stages a change reaches."""

import pytest

from pipeline import plan, recipe_files

FACTS = {"data": "fashion_mnist", "weights": "none", "host": "a processor"}


def _hashes(*overrides: str, **facts: str) -> dict[str, str]:
    built = plan.build(recipe_files.load("quickstart", overrides=overrides), FACTS | facts)
    return {stage.name: stage.hash for stage in built.stages}


@pytest.mark.parametrize(
    ("override", "first_changed"),
    [
        ("seed=1", "baseline"),
        ("data.train_images=100", "baseline"),
        ("prefold.lambda_c=1.0", "prefold"),
        ("fold.border=exact", "fold"),
        ("postfold.train.lr=0.5", "postfold"),
        ("quantize.calibration_images=8", "quantize"),
        ("verify.batch_size=8", "verify"),
        ("bench.runs=7", "bench"),
        ("description=other", "report"),
    ],
)
def test_a_change_reaches_its_stage_and_those_that_read_it(override: str, first_changed: str) -> None:
    before, after = _hashes(), _hashes(override)
    changed = {name for name in before if before[name] != after[name]}
    built = plan.build(recipe_files.load("quickstart"), FACTS)
    expected = {first_changed}
    for stage in built.stages:
        if expected & set(stage.parents):
            expected.add(stage.name)
    assert changed == expected


def test_another_data_set_changes_everything_and_another_host_only_the_bench() -> None:
    assert all(a != b for a, b in zip(_hashes().values(), _hashes(data="mnist").values(), strict=True))
    other = _hashes(host="another processor")
    assert {name for name, value in _hashes().items() if value != other[name]} == {"bench", "report"}


def test_hashes_are_the_same_in_every_process() -> None:
    # Written down once: a change of this value throws away every user's cache, so it must be meant.
    import subprocess
    import sys

    code = (
        "from pipeline import plan, recipe_files;"
        f"print(plan.build(recipe_files.load('quickstart'), {FACTS!r}).stage('report').hash)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == _hashes()["report"]


def test_the_run_folder_is_named_by_recipe_and_content() -> None:
    base, other = (recipe_files.load("quickstart", overrides=o) for o in ([], ["bench.runs=7"]))
    assert plan.run_folder_name(base).startswith("quickstart-")
    assert plan.run_folder_name(base) != plan.run_folder_name(other)
