"""Counts the instructions of a baseline and a folded model on the emulated ARM core, twice, in one root or two.

    python tools/bench/published_mobilenet.py FOLDER
    python tools/bench/instructions.py FOLDER --out tools/bench/results/instructions.json [--second-root FOLDER]

The second count shows how well the first repeats; with --second-root it is taken in a root built apart from the first.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import targets
from targets.base import layerfold_version
from targets.emulated_setup import setup

PRECISIONS = {"fp32": "", "int8": ".int8"}
FORMS = ("tflite", "onnx")


def main() -> None:
    """Counts every pair of files that is there and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--second-root", type=Path)
    parser.add_argument("--form", choices=FORMS, action="append", help="only this format; other rows of --out are kept")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="only this precision, likewise")
    chosen = parser.parse_args()
    setup(lambda share, what: print(f"root {share:.0%}: {what}"))
    first = targets.get("emulated-arm64")
    second = first
    if chosen.second_root:
        setup(folder=chosen.second_root)
        second = targets.get("emulated-arm64", folder=chosen.second_root)
    wanted = [(form, precision) for form in chosen.form or FORMS for precision in chosen.precision or PRECISIONS]
    rows: list[dict[str, Any]] = []
    if chosen.out.exists():
        forms = {"litert": "tflite", "ort": "onnx"}
        old = json.loads(chosen.out.read_text())["rows"]
        rows = [row for row in old if (forms[row["runtime"].split()[0]], row["precision"]) not in wanted]
    for form, precision in wanted:
        infix = PRECISIONS[precision]
        files = [chosen.folder / f"{name}{infix}.{form}" for name in ("baseline", "folded")]
        baseline, folded = first.benchmark(files)
        again = second.benchmark(files)
        assert baseline.instructions and folded.instructions
        row = {
            "runtime": f"{baseline.runtime} {baseline.runtime_version}",
            "precision": baseline.precision,
            "baseline_minstructions": round(baseline.instructions / 1e6, 3),
            "folded_minstructions": round(folded.instructions / 1e6, 3),
            "ratio": round(folded.instructions / baseline.instructions, 4),
            "largest_relative_change_when_repeated": max(
                abs(a.instructions - b.instructions) / a.instructions
                for a, b in zip((baseline, folded), again, strict=True)
                if a.instructions and b.instructions
            ),
            "l1d_miss_ratio": round(folded.counters["l1d_miss"] / baseline.counters["l1d_miss"], 4),
            "l2_miss_ratio": round(folded.counters["l2_miss"] / baseline.counters["l2_miss"], 4),
            "output_checked_against_host": baseline.precision == "int8",
            "valid": baseline.valid and folded.valid,
            "invalid_reason": baseline.invalid_reason or folded.invalid_reason,
            "baseline_counters": dict(baseline.counters),
            "folded_counters": dict(folded.counters),
        }
        rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if not key.endswith("counters")}))
    result = {
        "command": "python tools/bench/instructions.py FOLDER --out tools/bench/results/instructions.json"
        + (" --second-root SECOND" if chosen.second_root else ""),
        "layerfold": layerfold_version(),
        "device": first.device().as_dict(),
        "repeated_in_a_root_built_apart": bool(chosen.second_root),
        "rows": rows,
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
