"""`layerfold inspect` on what is no model and no run folder."""

import json
from pathlib import Path

import pytest

from pipeline.cli.inspect import command
from pipeline.errors import ArtifactError


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"stage": "prefold", "hash": "abc", "files": {}}, "the folder of one stage, 'prefold'"),
        ({"some": "thing"}, "not a run folder's"),
        ([1, 2], "not a run folder's"),
    ],
)
def test_other_folders_are_named(tmp_path: Path, content: object, what: str) -> None:
    folder = tmp_path / "run" / "stages" / "1-prefold-abc"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=what) as caught:
        command.callback(str(folder), False, False, False)  # type: ignore[misc]
    assert "stage" not in what or caught.value.hint.endswith(str(tmp_path / "run"))
