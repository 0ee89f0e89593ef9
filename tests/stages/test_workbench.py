"""What the stages set up alike."""

import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import recipe_files
from pipeline.data import datasets
from pipeline.data.datasets import Resolved
from pipeline.stages import workbench


@pytest.mark.parametrize(
    ("there", "label"), [("mnist", "9"), ("fashion_mnist", "Ankle boot")], ids=["fallback", "as asked"]
)
def test_a_model_carries_the_labels_and_name_of_the_data_that_were_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: str, label: str
) -> None:
    for part in ("train", "t10k"):
        images = struct.pack(">4i", 0x803, 20, 28, 28) + bytes(20 * 28 * 28)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 20) + bytes(range(10)) * 2)
    monkeypatch.setattr(datasets, "resolve_once", lambda *_, **__: Resolved(there, str(tmp_path), ""))
    recipe = recipe_files.load("quickstart")
    context = SimpleNamespace(recipe=recipe, stage=SimpleNamespace(hash="abc"))
    kept = workbench.provenance(context, {"source": "none", "licence": None})  # type: ignore[arg-type]
    assert kept["labels"][9] == label and len(kept["labels"]) == 10
    # `layerfold export` calibrates on the set of that name, and on no other in its place.
    assert kept["data"] == {"name": there, "root": None, "fallback": None}
