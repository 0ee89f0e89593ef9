"""What a stage wrote: a folder with a manifest, made whole by one rename.

A stage works in `<n>-<name>-<hash>.partial/`, which survives a kill so that training can resume from its
checkpoints. When it is done the manifest (config, parents, facts, versions, seed, metrics, and size and sha256 of every
file) is written and the folder is renamed to its final name. A folder without `.partial` is therefore complete.
"""

__all__ = ["CHECKPOINTS", "StageOutput", "commit", "read", "sha256_of", "write_atomic"]

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError
from pipeline.plan import PlannedStage

CHECKPOINTS = "checkpoints"
"""Sub-folder of a stage at work that holds what a killed stage resumes from; dropped when the stage is done."""
_MANIFEST = "manifest.json"
_FORMAT = 1
_TEMPORARY = (".tmp", ".part", ".partial")


@dataclass(frozen=True)
class StageOutput:
    """A finished stage.

    Attributes:
        folder: Where its files are.
        manifest: The manifest as read: `metrics`, `files`, `versions`, `duration_s`, …
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the stage found, as plain data."""
        metrics: Mapping[str, Any] = self.manifest["metrics"]
        return metrics

    def file(self, name: str) -> Path:
        """Path of one of the stage's files.

        Raises:
            ArtifactError: The stage wrote no such file.
        """
        if name not in self.manifest["files"]:
            raise ArtifactError(
                f"stage folder {self.folder} has no file '{name}' (it has {', '.join(self.manifest['files'])})",
                hint="delete that stage folder and run again",
            )
        return self.folder / name


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def commit(
    work: Path,
    final: Path,
    stage: PlannedStage,
    *,
    metrics: Mapping[str, Any],
    versions: Mapping[str, str],
    seed: int,
    duration_s: float,
) -> StageOutput:
    """Turns a stage's working folder into its finished one.

    Args:
        work: The `.partial` folder the stage wrote to.
        final: The folder's final path, which must not exist.
        stage: The planned stage, for the manifest.
        metrics: What the stage found; plain data.
        versions: Versions of the software that ran.
        seed: The recipe's seed.
        duration_s: Wall time of the stage's last session, in seconds.
    """
    shutil.rmtree(work / CHECKPOINTS, ignore_errors=True)
    _drop_leftovers(work)
    files = {
        path.relative_to(work).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(work.rglob("*"))
        if path.is_file() and path.name != _MANIFEST
    }
    manifest = {
        "format": _FORMAT,
        "stage": stage.name,
        "hash": stage.hash,
        "config": dict(stage.config),
        "facts": dict(stage.facts),
        "parents": list(stage.parents),
        "seed": seed,
        "versions": dict(versions),
        "duration_s": round(duration_s, 3),
        "files": files,
        "metrics": dict(metrics),
    }
    write_atomic(work / _MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))
    work.rename(final)
    return StageOutput(final, manifest)


def _drop_leftovers(work: Path) -> None:
    """Deletes what a killed try was writing under a temporary name, so that it is never taken for output."""
    for path in sorted(work.rglob("*"), reverse=True):  # what is in a folder before the folder
        if not path.name.startswith(".") and path.suffix not in _TEMPORARY:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def read(folder: Path) -> StageOutput:
    """Reads a finished stage and checks every file's size and SHA-256 against the manifest.

    Raises:
        ArtifactError: The manifest or a file is missing, cut short or changed.
    """
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text())
        recorded = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is missing or damaged: {error}", hint="delete that stage folder and run again"
        ) from error
    for name, entry in recorded:
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256_of(file) != entry["sha256"]:
            raise ArtifactError(
                f"{file} is missing or differs from its manifest",
                hint="delete that stage folder and run again",
            )
    return StageOutput(folder, manifest)
