"""Progress on the terminal: one bar for the stage at work, a line for each stage done."""

__all__ = ["TerminalEvents", "bars", "steps"]

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.artifacts import StageOutput
from pipeline.plan import PlannedStage

_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.percentage:>3.0f}%"),
    TimeElapsedColumn(),
    TextColumn("ETA"),
    TimeRemainingColumn(),
    TextColumn("{task.fields[text]}"),
)


class _StageBar:
    """A stage's bar; where the output is no terminal, a line now and then instead."""

    _PLAIN_EVERY_S = 15.0

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._plain_at = time.monotonic()

    def progress(self, done: float, total: float, text: str = "") -> None:
        self._progress.update(self._task, completed=done, total=total, text=text)
        console = self._progress.console
        if not console.is_terminal and time.monotonic() - self._plain_at > self._PLAIN_EVERY_S:
            self._plain_at = time.monotonic()
            share = f"{100 * done / total:3.0f}%" if total else ""
            console.print(f"    {share} {text}", highlight=False, markup=False)

    def say(self, text: str) -> None:
        self._progress.console.print(f"    {text}", highlight=False, markup=False)


@contextmanager
def bars(titles: Sequence[str]) -> Iterator[list[Callable[[int, int], None]]]:
    """One bar on stderr for each title; the given functions take (done, total), also from other threads."""
    with Progress(*_COLUMNS, console=Console(stderr=True), transient=True) as progress:

        def mover(task: TaskID) -> Callable[[int, int], None]:
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield [mover(progress.add_task(title, total=None, text="")) for title in titles]


@contextmanager
def steps(title: str) -> Iterator[Callable[[float, float, str], None]]:
    """A bar on stderr for a command's steps; the given function takes (done, total, what comes now)."""
    with Progress(*_COLUMNS, console=Console(stderr=True), transient=True) as progress:
        yield _StageBar(progress, progress.add_task(title, total=None, text="")).progress


class TerminalEvents:
    """Shows a run on stderr, so that stdout holds only the table."""

    def __init__(self, stage_count: int) -> None:
        self._count = stage_count
        self._progress = Progress(
            *_COLUMNS,
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None
        self._started = 0.0

    def __enter__(self) -> "TerminalEvents":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage_started(self, stage: PlannedStage, *, resumed: bool) -> _StageBar:
        self._started = time.monotonic()
        title = self._title(stage)
        if resumed:
            self._line(f"{title} resumes")
        self._task = self._progress.add_task(title, total=None, text="")
        return _StageBar(self._progress, self._task)

    def stage_finished(self, stage: PlannedStage, output: StageOutput, *, cached: bool) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        took = "cached" if cached else f"{time.monotonic() - self._started:.1f} s"
        summary = output.metrics.get("summary", "")
        self._line(f"{self._title(stage)} {took:>8}  {summary}")

    def _title(self, stage: PlannedStage) -> str:
        return f"[{stage.index + 1}/{self._count}] {stage.name:<9}"

    def _line(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)
