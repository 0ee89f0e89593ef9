"""Checkpoints: everything that a fine-tuning needs to go on as if it had never stopped.

Two are kept, `last.pt` and `previous.pt`: a power cut while one is written, or a damaged disk block, leaves the other.
"""

__all__ = ["clear", "load", "save"]

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import write_atomic
from pipeline.errors import TrainingError

_FORMAT = "layerfold-checkpoint-1"
_LAST, _PREVIOUS = "last.pt", "previous.pt"
_DAMAGED = (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError)


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint; the one before becomes `previous.pt`.

    Args:
        folder: Made if missing.
        state: Tensors, numbers, strings, and lists and dicts of them: nothing that would run code when read.

    Raises:
        TrainingError: The folder cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "state": dict(state)}, buffer)
    last = folder / _LAST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if last.exists():
            last.replace(folder / _PREVIOUS)
        write_atomic(last, buffer.getvalue())
    except OSError as error:
        raise TrainingError(
            f"cannot write a checkpoint to {folder}: {error}", hint="free disk space or choose another run folder"
        ) from error


def load(folder: Path) -> dict[str, Any] | None:
    """Reads the newest readable checkpoint; None where there is none at all.

    Raises:
        TrainingError: There are checkpoints, but none can be read.
    """
    problems = []
    for name in (_LAST, _PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        if not zipfile.is_zipfile(path):
            problems.append(f"{name}: cut short or overwritten")
            continue
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True)
        except _DAMAGED as error:
            problems.append(f"{name}: {error}")
            continue
        if isinstance(payload, dict) and payload.get("format") == _FORMAT:
            state: dict[str, Any] = payload["state"]
            return state
        problems.append(f"{name}: not a checkpoint of this version")
    if problems:
        raise TrainingError(
            f"no checkpoint in {folder} can be read ({'; '.join(problems)})",
            hint="delete the folder to start this fine-tuning over",
        )
    return None


def clear(folder: Path) -> None:
    """Deletes the checkpoints of a folder, if there are any."""
    for name in (_LAST, _PREVIOUS):
        (folder / name).unlink(missing_ok=True)
