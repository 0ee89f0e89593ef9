"""The README's commands work as they stand there."""

import re
import shlex
import subprocess
from pathlib import Path

import command_line
import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def _commands() -> list[str]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S) for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.split("#")[0].strip()]


MAKE = [command for command in _commands() if command.startswith("make ")]
LAYERFOLD = [command for command in _commands() if command.startswith("layerfold ")]


def test_the_first_lines_are_the_two_commands_of_a_fresh_clone() -> None:
    assert [command.split("#")[0].strip() for command in _commands()[:2]] == ["make quickstart", "make test"]
    assert set(MAKE) | set(LAYERFOLD) == set(_commands())


@pytest.mark.parametrize("command", MAKE)
def test_a_make_command_names_a_real_target(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


QUICK = next(command for command in LAYERFOLD if command.startswith("layerfold run quickstart --quick"))
OTHERS = [command for command in LAYERFOLD if command != QUICK]


def test_the_quick_command_makes_a_report(quick_run: Path) -> None:
    assert shlex.split(QUICK) == ["layerfold", "run", *command_line.QUICK]
    assert (quick_run / "report.html").is_file()


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.slow] if c.startswith("layerfold run") else []) for c in OTHERS],
)
def test_a_layerfold_command_does_what_it_says(command: str, image_folder: Path, tmp_path: Path) -> None:
    words = [word.replace("/path/to/imagenet", str(image_folder)) for word in shlex.split(command)]
    if str(image_folder) in " ".join(words):
        words.append("--quick")  # the generated folder is not ImageNet
    done = command_line.from_shell(words, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    if words[1] == "run":
        assert "MACs" in done.stdout and "report.html" in done.stdout
        assert len(list(tmp_path.glob("runs/*/report.html"))) == 1


def test_every_recipe_of_the_readme_is_shipped_and_every_shipped_one_is_named() -> None:
    from pipeline import recipe_files

    table = README[README.index("## Recipes") : README.index("An ImageNet folder")]
    for name in recipe_files.shipped():
        folder, _, leaf = name.rpartition("/")
        assert (f"`{name}`" in table) or (folder in table and f"`_{leaf.split('_')[-1]}`" in table), name


def test_the_readme_answers_for_the_packages_people_ask_for() -> None:
    asked = ("torch", "torchvision", "timm", "onnx", "onnx-simplifier", "tensorflow", "tflite-runtime", "ai-edge-torch")
    for package in asked:
        assert f"| {package} |" in README
