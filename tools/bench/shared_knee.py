"""Whether groups of networks of a study share a knee.

    python tools/bench/shared_knee.py tools/bench/results/ednl/results.json \\
        --group resnet --group mlp_6,mlp_7,mlp_8,mlp_9,mlp_10 \\
        --group resnet,mlp_6,mlp_7,mlp_8,mlp_9,mlp_10

A group is a list of networks' names or beginnings of names, separated by commas.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from pipeline.study.knee import fit_hinge, shared_knee


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of a study")
    parser.add_argument("--group", action="append", required=True, metavar="NAMES")
    arguments = parser.parse_args()
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for cell in json.loads(arguments.results.read_text())["cells"]:
        curves[cell["network"]].append((cell["depth"], cell["accuracy"]))
    for group in arguments.group:
        starts = tuple(group.split(","))
        chosen = {
            name: points
            for name, points in curves.items()
            if name in starts or any(name.startswith(start) and not start[-1].isdigit() for start in starts)
        }
        knees = {name: hinge.knee for name, points in chosen.items() if (hinge := fit_hinge(points)) is not None}
        common = shared_knee(chosen)
        if common is None:
            parser.error(f"--group {group}: fewer than two networks with enough points; there are {', '.join(curves)}")
        print(f"{group}: knees {knees}; common {common.knee} ({common.low} to {common.high}), p = {common.p_value:.2g}")


if __name__ == "__main__":
    main()
