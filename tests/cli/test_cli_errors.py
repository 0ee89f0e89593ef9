"""Wrong input: a message that names the key, file or unit and the fix, exit code 2, and nothing written."""

from pathlib import Path

import pytest

from pipeline import recipe_files


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], ["no verb 'rnu'", "run"]),
        (["run"], ["RECIPE"]),
        (["run", "quikstart"], ["did you mean 'quickstart'"]),
        (["run", "quickstart", "--set", "model.nam=x"], ["model.nam", "did you mean 'name'"]),
        (
            ["run", "quickstart", "--set", "model.name=mobilenetv2_10O"],
            ["mobilenetv2_10O", "did you mean 'mobilenetv2_1"],
        ),
        (["run", "quickstart", "--set", "model.weights=no_such.pt"], ["no_such.pt"]),
        (["run", "mobilenet_v2/imagenet_100"], ["data.root"]),
        (["run", "mobilenet_v2/imagenet_100", "--set", "data.root=no_such_folder"], ["no_such_folder"]),
        (["plan", "quickstart", "--set", "bench.threads=0"], ["bench.threads", "0"]),
        (["report", "no_such_run"], ["no_such_run", "report.json"]),
        (["run", "quickstart", "--frob"], ["--frob"]),
    ],
)
def test_wrong_input_is_named_and_nothing_is_written(arguments, words, layerfold, tmp_path: Path) -> None:
    done = layerfold(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_under_torchrun_is_refused(layerfold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = layerfold("run", "quickstart", "--quick", cwd=tmp_path)
    assert done.returncode == 2 and "one of 2 processes" in done.stderr and "training.loop.fit" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_unit_that_does_not_exist_is_named_before_anything_is_written(layerfold, tmp_path: Path) -> None:
    overrides = ["--set", "prefold.method=fixed", "--set", "prefold.units=[blocks.9.9]"]
    done = layerfold("run", "quickstart", "--quick", *overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert "blocks.9.9" in done.stderr and "its units are" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_unit_that_cannot_fold_says_why(layerfold, tmp_path: Path) -> None:
    # mobilenetv3's inverted residuals have squeeze-and-excitation inside: not linear, so they cannot fold.
    overrides = ["model.name=mobilenetv3_large_100", "prefold.method=fixed", "prefold.units=[blocks.2.0]"]
    done = layerfold("run", "quickstart", *(x for o in overrides for x in ("--set", o)), cwd=tmp_path)
    assert done.returncode == 2
    assert "blocks.2.0" in done.stderr and "cannot fold" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_an_unreadable_checkpoint_is_named(content: bytes, layerfold, tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(content)
    done = layerfold("run", "quickstart", "--set", "model.weights=bad.pt", cwd=tmp_path)
    assert done.returncode == 2
    assert "bad.pt" in done.stderr and "Traceback" not in done.stderr


def test_output_that_cannot_be_written_is_named(layerfold, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = layerfold("run", "quickstart", "--out", "file/run", cwd=tmp_path)
    assert done.returncode == 2
    assert "--out" in done.stderr
    # The kernel's own read-only file system: holds for root too.
    done = layerfold("run", "quickstart", "--out", "/proc/layerfold", cwd=tmp_path)
    assert done.returncode == 2
    assert "/proc/layerfold" in done.stderr and "Traceback" not in done.stderr


def test_a_recipe_whose_data_have_another_number_of_classes_is_refused(layerfold, image_folder, tmp_path: Path) -> None:
    name = "mobilenet_v2/imagenet_100"
    done = layerfold("run", name, "--set", f"data.root={image_folder}", "--set", "model.weights=none", cwd=tmp_path)
    assert done.returncode == 2
    assert "num_classes" in done.stderr and "1000" in done.stderr and "4" in done.stderr


def test_every_verb_answers_help_with_examples(layerfold) -> None:
    from pipeline.cli import _VERBS

    for verb in _VERBS:
        done = layerfold(verb, "--help")
        assert done.returncode == 0, done.stderr
        assert "Example" in done.stdout, verb


def test_version_and_shipped_recipes_agree_with_the_package(layerfold) -> None:
    import pipeline

    assert pipeline.__version__ in layerfold("--version").stdout
    assert "quickstart" in recipe_files.shipped()


@pytest.mark.parametrize("name", ["pipeline", "targets"])
def test_a_foreign_package_of_our_names_is_named(name: str, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('never imported')")
    import layerfold

    ours = Path(layerfold.__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ours}"}
    command = [sys.executable, "-m", "layerfold", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert str(tmp_path / name) in done.stderr and "not layerfold's" in done.stderr
