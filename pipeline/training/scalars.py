"""TensorBoard scalars of a fine-tuning, and the picture of how α progressed."""

__all__ = ["TensorBoardLog", "plot_alphas"]

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.training.config import FitResult, Progress

# More points a curve than a screen is wide only make the files large.
_POINTS = 1000


class TensorBoardLog:
    """A progress callback for `fit` that writes loss, rate, throughput and every α for TensorBoard.

        with TensorBoardLog(folder) as log:
            log.finish(fit(..., on_progress=log))

    Args:
        folder: Event files go here; `tensorboard --logdir FOLDER` shows them. A resumed run continues its curves.
        then: Another callback to call with the same progress.
    """

    def __init__(self, folder: Path, then: Callable[[Progress], None] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.then = Path(folder), then
        self._writer: Any = SummaryWriter(str(folder))
        self._next = 0

    def __enter__(self) -> "TensorBoardLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.close()

    def __call__(self, progress: Progress) -> None:
        """Writes one point of each curve, unless the last one is too near to tell apart."""
        if self.then is not None:
            self.then(progress)
        step = progress.step
        if progress.note:
            self._writer.add_text("note", progress.note, step)
        if step < self._next and step != progress.total_steps:
            return
        self._next = step + max(progress.total_steps // _POINTS, 1)
        if progress.loss == progress.loss:  # NaN before the first step
            self._writer.add_scalar("train/loss", progress.loss, step)
        self._writer.add_scalar("train/lr", progress.lr, step)
        self._writer.add_scalar("train/images_per_s", progress.images_per_s, step)
        for name, value in progress.alphas.items():
            self._writer.add_scalar(f"alpha/{name}", value, step)

    def finish(self, result: FitResult) -> FitResult:
        """Writes the evaluations that the history holds; returns the result."""
        for row in result.history:
            for name, value in (row.get("evaluation") or {}).items():
                if value is not None:
                    self._writer.add_scalar(f"evaluation/{name}", value, row["step"])
        self._writer.flush()
        return result


def plot_alphas(trace: Sequence[dict[str, Any]], path: Path, *, threshold: float = 0.9) -> None:
    """Draws α over optimiser steps, one line a unit or layer, the removed ones in colour.

    Args:
        trace: `FitResult.alpha_trace`.
        path: A .png, .svg or .pdf file.
        threshold: τ, drawn dashed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 4.0), layout="constrained")
    names = list(trace[-1]["alphas"]) if trace else []
    steps = [point["step"] for point in trace]
    removed = [name for name in names if trace[-1]["alphas"][name] > threshold]
    colours = pyplot.get_cmap("viridis")
    for name in names:
        line = [point["alphas"][name] for point in trace]
        if name in removed:
            shade = colours(removed.index(name) / max(len(removed) - 1, 1))
            axes.plot(steps, line, color=shade, label=name, zorder=2)
        else:
            axes.plot(steps, line, color="0.75", linewidth=0.8, zorder=1)
    axes.axhline(threshold, color="0.3", linestyle="--", linewidth=0.8)
    axes.set(xlabel="optimiser step", ylabel="α", ylim=(-0.02, 1.02))
    axes.set_title(f"{len(removed)} of {len(names)} activations removed (α > {threshold:g})")
    if removed:
        axes.legend(fontsize="x-small", ncols=2 if len(removed) > 8 else 1, loc="best")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
