"""The runner: caching, resuming, locking, and a run folder that is never left half written."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline import plan, recipe_files, runner
from pipeline.errors import RunFolderError

FACTS = {"data": "fashion_mnist", "weights": "none", "host": "a processor"}


class _Events:
    def __init__(self) -> None:
        self.started: list[str] = []
        self.resumed: list[str] = []
        self.cached: list[str] = []

    def stage_started(self, stage, *, resumed):
        self.started.append(stage.name)
        if resumed:
            self.resumed.append(stage.name)
        return self

    def stage_finished(self, stage, output, *, cached):
        if cached:
            self.cached.append(stage.name)

    def progress(self, done, total, text=""):
        pass

    def say(self, text):
        pass


def _write_stage(context):
    """A stage that writes what it read: so a wrong order or input shows in the bytes."""
    text = context.stage.name + "".join(f"<{(o.folder / 'out.txt').read_text()}>" for o in context.inputs.values())
    (context.work / "out.txt").write_text(text)
    if context.stage.name in ("export", "quantize"):
        (context.work / "models").mkdir(exist_ok=True)
        (context.work / "models" / f"{context.stage.name}.bin").write_bytes(b"model")
    if context.stage.name == "report":
        (context.work / "report.md").write_text(text)
    return {"length": len(text)}


@pytest.fixture
def plain_stages(monkeypatch):
    monkeypatch.setattr(runner, "load_stage", lambda name: _write_stage)


def _plan(*overrides: str):
    return plan.build(recipe_files.load("quickstart", overrides=overrides), FACTS)


@pytest.mark.usefixtures("plain_stages")
def test_a_finished_run_is_not_run_again_and_publishes_models_and_report(tmp_path: Path) -> None:
    first, second = _Events(), _Events()
    outcome = runner.execute(_plan(), tmp_path / "run", first)
    runner.execute(_plan(), tmp_path / "run", second)
    names = [stage.name for stage in _plan().stages]
    assert first.started == names and first.cached == []
    assert second.started == [] and second.cached == names
    assert (outcome.folder / "models" / "export.bin").read_bytes() == b"model"
    assert (outcome.folder / "report.md").is_file()
    assert json.loads((outcome.folder / "manifest.json").read_text())["recipe"] == "quickstart"


@pytest.mark.usefixtures("plain_stages")
def test_a_change_runs_only_what_it_reaches_and_a_sibling_run_lends_the_rest(tmp_path: Path) -> None:
    runner.execute(_plan(), tmp_path / "one", _Events())
    events = _Events()
    runner.execute(_plan("bench.runs=7"), tmp_path / "two", events)
    assert events.started == ["bench", "report"]


@pytest.mark.usefixtures("plain_stages")
def test_what_a_killed_try_left_half_written_is_not_published(tmp_path: Path) -> None:
    run = tmp_path / "run"
    work = run / "stages" / (_plan().stage("export").folder + ".partial")
    for name in (
        ".manifest.json.77.tmp",
        "models/.a.1b2c.partial.tflite",
        "models/a.bin.part",
        ".cache/deep/x",
        "y.tmp",
    ):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(b"half")
    (run / "manifest.json").write_text('{"recipe": "quickstart"}')
    events = _Events()
    outcome = runner.execute(_plan(), run, events)
    assert events.resumed == ["export"]
    done = outcome.outputs["export"]
    assert sorted(done.manifest["files"]) == ["models/export.bin", "out.txt"]
    left = {path.relative_to(done.folder).as_posix() for path in done.folder.rglob("*") if path.is_file()}
    assert left == {"manifest.json", "models/export.bin", "out.txt"}
    assert sorted(path.name for path in (run / "models").iterdir()) == ["export.bin", "quantize.bin"]


@pytest.mark.usefixtures("plain_stages")
def test_a_damaged_stage_is_set_aside_and_run_anew(tmp_path: Path) -> None:
    outcome = runner.execute(_plan(), tmp_path / "run", _Events())
    damaged = outcome.outputs["fold"].folder
    good = (damaged / "out.txt").read_text()
    (damaged / "out.txt").write_text("x")
    events = _Events()
    again = runner.execute(_plan(), tmp_path / "run", events)
    assert events.started == ["fold"]
    assert (again.outputs["fold"].folder / "out.txt").read_text() == good
    assert list((tmp_path / "run" / "stages").glob("*.damaged-*"))


def test_what_stages_say_is_in_the_log_and_on_the_terminal(tmp_path: Path, monkeypatch) -> None:
    heard: list[str] = []

    class Listening(_Events):
        def say(self, text):
            heard.append(text)

    def speaks(context):
        context.report.say(f"a word from {context.stage.name}")
        return _write_stage(context) | {"summary": "ten of ten"}

    monkeypatch.setattr(runner, "load_stage", lambda name: speaks)
    runner.execute(_plan(), tmp_path / "run", Listening())
    log = (tmp_path / "run" / "run.log").read_text()
    for stage in _plan().stages:
        assert f"a word from {stage.name}" in heard and f"stage {stage.name}: a word from {stage.name}" in log
    assert "ten of ten" in log


def test_a_failing_stage_leaves_no_finished_folder_and_resumes_in_its_own(tmp_path: Path, monkeypatch) -> None:
    def fails_once(context):
        marker = context.checkpoints / "step"
        if context.stage.name == "prefold" and not marker.exists():
            marker.write_text("5")
            raise KeyboardInterrupt
        return _write_stage(context)

    monkeypatch.setattr(runner, "load_stage", lambda name: fails_once)
    with pytest.raises(KeyboardInterrupt):
        runner.execute(_plan(), tmp_path / "run", _Events())
    assert runner.stage_states(_plan(), tmp_path / "run")["prefold"] == "resumable"
    assert not [p for p in (tmp_path / "run" / "stages").glob("1-*") if not p.name.endswith(".partial")]
    events = _Events()
    outcome = runner.execute(_plan(), tmp_path / "run", events)
    assert events.resumed == ["prefold"] and events.cached == ["baseline"]
    assert not (outcome.outputs["prefold"].folder / "checkpoints").exists()


@pytest.mark.usefixtures("plain_stages")
def test_foreign_folders_are_refused_and_left_untouched(tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="no run folder"):
        runner.execute(_plan(), tmp_path / "papers", _Events())
    assert [p.name for p in (tmp_path / "papers").iterdir()] == ["thesis.txt"]
    runner.execute(_plan(), tmp_path / "run", _Events())
    other = plan.build(recipe_files.load("efficientnet_lite/lite0_photos"), FACTS)
    with pytest.raises(RunFolderError, match="run folder of recipe 'quickstart', not of 'lite0_photos'"):
        runner.execute(other, tmp_path / "run", _Events())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        runner.execute(_plan(), tmp_path / "file", _Events())


@pytest.mark.usefixtures("plain_stages")
def test_two_runs_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
    runner.execute(_plan(), tmp_path / "run", _Events())
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(RunFolderError, match="another run"):
        runner.execute(_plan(), tmp_path / "run", _Events())


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")]
)
def test_disk_errors_name_the_fix(tmp_path: Path, monkeypatch, code: int, words: str) -> None:
    def fails(context):
        raise OSError(code, os.strerror(code), str(context.work / "big.bin"))

    monkeypatch.setattr(runner, "load_stage", lambda name: fails)
    with pytest.raises(RunFolderError, match=words) as caught:
        runner.execute(_plan(), tmp_path / "run", _Events())
    assert caught.value.hint
    assert runner.stage_states(_plan(), tmp_path / "run")["baseline"] == "resumable"


@pytest.mark.usefixtures("plain_stages")
def test_a_disk_that_fills_while_a_stage_is_shared_is_named(tmp_path: Path, monkeypatch) -> None:
    runner.execute(_plan(), tmp_path / "one", _Events())

    def full(source, target, **_):
        Path(target).write_bytes(b"ha")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(runner.shutil, "copy2", full)
        with pytest.raises(RunFolderError, match=r"two/stages/0-baseline.*the disk is full"):
            runner.execute(_plan(), tmp_path / "two", _Events())
    assert list((tmp_path / "two" / "stages").iterdir()) == []
    events = _Events()
    outcome = runner.execute(_plan(), tmp_path / "two", events)
    assert events.started == [] and (outcome.folder / "models" / "export.bin").read_bytes() == b"model"


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    """A run folder on a file system of 256 kB: the stage's file does not fit, and the next run, with room, resumes."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        code = textwrap.dedent(f"""
            from pathlib import Path
            from pipeline import artifacts, errors, plan, recipe_files, runner
            def stage(context):
                artifacts.write_atomic(context.work / "big.bin", bytes(1_000_000))
            runner.load_stage = lambda name: stage
            class Events:
                def stage_started(self, stage, *, resumed): return self
                def stage_finished(self, *a, **k): pass
            planned = plan.build(recipe_files.load("quickstart"), {FACTS!r})
            try:
                runner.execute(planned, Path({str(small / "run")!r}), Events())
            except errors.RunFolderError as error:
                print(error)
        """)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert "the disk is full" in done.stdout, done.stderr
        assert not list(small.rglob("*.tmp")) and not list(small.rglob("big.bin"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_kill_9_at_any_moment_then_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    """Kills a run at several moments; every restart goes on, and the end equals an unkilled run's."""
    script = tmp_path / "slow_run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from pipeline import plan, recipe_files, runner
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_runner import _Events, _write_stage
        def slow(context):
            time.sleep(0.12)
            metrics = _write_stage(context)
            time.sleep(0.12)
            return metrics
        runner.load_stage = lambda name: slow
        runner.execute(plan.build(recipe_files.load("quickstart"), {FACTS!r}), Path(sys.argv[1]), _Events())
        """)
    )
    killed = 0
    for wait_s in (0.9, 1.3, 1.7, 60.0):
        process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "killed")])
        try:
            process.wait(timeout=wait_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed >= 1 and process.returncode == 0
    subprocess.run([sys.executable, str(script), str(tmp_path / "whole" / "run")], check=True)

    def content(folder: Path) -> dict[str, bytes]:
        return {
            str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*"))
            if p.suffix in (".txt", ".bin", ".md")
        }

    assert content(tmp_path / "killed") == content(tmp_path / "whole" / "run")
