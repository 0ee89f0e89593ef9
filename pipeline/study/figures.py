"""The paper's two pictures: accuracy over depth with the knees, and which activation of each network is gone."""

__all__ = ["depth_accuracy", "layers"]

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from pipeline.study.results import StudyResult

_GONE, _KEPT = "#e8e4dc", "#2a6fbb"
_MARKERS = "osD^vPX*hd<>"


def depth_accuracy(result: StudyResult, path: Path) -> None:
    """Draws accuracy over the number of non-linear layers, a line a network, a ring at its knee; writes a PNG."""
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.subplots()
    names = result.networks
    shades = matplotlib.colormaps["viridis"]
    knees = {row.network: row for row in result.knees}
    for index, name in enumerate(names):
        points = result.curve(name)
        colour = shades(0.92 * index / max(len(names) - 1, 1))
        best = {depth: max(a for d, a in points if d == depth) for depth, _ in points}
        axes.plot(list(best), [100 * a for a in best.values()], color=colour, linewidth=1.2, zorder=2)
        axes.scatter(
            [d for d, _ in points],
            [100 * a for _, a in points],
            color=colour,
            marker=_MARKERS[index % len(_MARKERS)],
            s=22,
            label=name,
            zorder=3,
        )
        at = knees[name].within_tolerance
        axes.scatter([at], [100 * best[at]], s=130, facecolors="none", edgecolors=colour, linewidths=1.5, zorder=4)
    if result.task_knee is not None and result.task_knee_low is not None and result.task_knee_high is not None:
        axes.axvline(result.task_knee, color="0.35", linestyle="--", linewidth=1, label="one knee for all")
        axes.axvspan(result.task_knee_low, result.task_knee_high, color="0.5", alpha=0.15, linewidth=0)
    axes.set_xlabel("non-linear layers left")
    axes.set_ylabel(f"top-1 accuracy on {result.eval_images} images, %")
    axes.set_title(f"{result.data}: accuracy and depth" + (" (reduced)" if result.reduced else ""))
    axes.grid(color="0.9", zorder=0)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def layers(result: StudyResult, path: Path) -> None:
    """Draws a strip a run, network by network and λ_c rising: one cell an activation, pale where it is gone."""
    groups = {name: [cell for cell in result.cells if cell.network == name] for name in result.networks}
    heights = [0.9 + 0.22 * len(cells) for cells in groups.values()]
    figure = Figure(figsize=(9.0, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)
    for axes, (name, cells) in zip(panels[:, 0], groups.items(), strict=True):
        strips = [[0.0 if gone else 1.0 for gone in cell.removed.values()] for cell in cells]
        axes.pcolormesh(strips, cmap=ListedColormap([_GONE, _KEPT]), vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
        axes.set_yticks(
            [row + 0.5 for row in range(len(cells))],
            [f"λ {cell.lambda_c:g}: {cell.depth} left, {100 * cell.accuracy:.1f}%" for cell in cells],
            fontsize="x-small",
        )
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.set_title(f"{name}: activations from input to output", fontsize="small", loc="left")
        axes.tick_params(length=0)
    figure.suptitle("kept (blue) and removed (pale) activations", fontsize="medium")
    figure.savefig(path, dpi=130, metadata={"Software": None})
