"""Reads state dicts from the files that people have: PyTorch, safetensors, Keras, and layerfold's own models.

PyTorch files are read with `weights_only`, which runs no code of the file. Layerfold's own model files hold a pickled
module and are read as such: open only those that you or layerfold wrote.
"""

__all__ = ["missing", "read", "rename_by_order", "tensors_sha256"]

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import ModelError, WeightsError
from pipeline.models import keras_files

_NESTED = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "model_state_dict", "module")
_PREFIXES = ("module.", "model.", "_orig_mod.")
_SUFFIXES = (".pt", ".pth", ".tar", ".bin", ".safetensors", ".h5")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Nested checkpoints (`state_dict`, `model`, an EMA first) are opened, and prefixes that wrappers add (`module.`,
    `_orig_mod.`) are taken off.

    Args:
        path: A `.pt`, `.pth` or `.safetensors` file, or a `.h5` file of Keras's MobileNetV2.

    Raises:
        WeightsError: The file is missing, damaged, of another kind, or holds no tensors.
    """
    if not path.is_file():
        raise missing(path)
    if path.suffix not in _SUFFIXES:
        raise WeightsError(
            f"{path} ends in '{path.suffix}', expected one of {', '.join(_SUFFIXES)}",
            hint="convert the weights to a PyTorch state dict or safetensors",
        )
    if path.suffix == ".h5":
        return keras_files.read_mobilenetv2(path)
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = _unnest(raw)
    if not state:
        raise WeightsError(f"{path} holds no state dict", hint="save it with torch.save(model.state_dict(), path)")
    return _without_prefix(state)


def missing(path: Path) -> WeightsError:
    """The error for a weights file that is not there."""
    what = "is a folder" if path.is_dir() else "does not exist"
    return WeightsError(f"the weights file {path} {what}", hint="give the path of a .pt, .pth or .safetensors file")


def rename_by_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, origin: str) -> dict[str, Tensor]:
    """Gives tensors the model's names by position, for files whose order is known to be the model's.

    Args:
        state: Tensors in the file's order.
        own: The model's state dict.
        origin: Names the file in errors.

    Raises:
        WeightsError: Their numbers differ, or a shape differs (the classifier's first size excepted).
    """
    if len(state) != len(own):
        raise WeightsError(f"{origin} has {len(state)} tensors, the model has {len(own)}")
    for (given, value), (name, expected) in zip(state.items(), own.items(), strict=True):
        if value.shape[1:] != expected.shape[1:]:
            raise WeightsError(
                f"{origin}: '{given}' is {list(value.shape)}, but '{name}' in its place is {list(expected.shape)}"
            )
    return dict(zip(own, state.values(), strict=True))


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """sha256 over names and values of the tensors, in order."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path):
            raise _damaged(path, error) from error
        if _is_own_model(path):
            return _read_own_model(path)
        raise WeightsError(
            f"{path} holds Python objects besides tensors and is not opened: {str(error).splitlines()[0]}",
            hint="save only the tensors: torch.save(model.state_dict(), path)",
        ) from error
    # A damaged file leads the unpickler anywhere: IndexError, struct.error, AssertionError, TypeError, …
    except Exception as error:
        raise _damaged(path, error) from error


def _is_own_model(path: Path) -> bool:
    """Whether the file bears layerfold's mark, found without unpickling anything."""
    from pipeline.models import store

    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return any(store.FORMAT.encode() in archive.read(name) for name in pickles)
    # Of what a damaged archive makes the standard library raise, only some is BadZipFile.
    except Exception as error:
        raise _damaged(path, error) from error


def _read_own_model(path: Path) -> object:
    from pipeline.models import store

    try:
        return store.load(path).module.state_dict()
    except ModelError as error:
        raise WeightsError(error.what, hint=error.hint) from error


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> WeightsError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return WeightsError(f"{path} cannot be read as weights: {lines[0]}", hint="fetch it again; it may be cut short")


def _unnest(raw: object) -> dict[str, Tensor]:
    if not isinstance(raw, Mapping):
        return {}
    for key in _NESTED:
        if isinstance(raw.get(key), Mapping):
            inner = _unnest(raw[key])
            if inner:
                return inner
    return {str(key): value for key, value in raw.items() if isinstance(value, Tensor)}


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return _without_prefix({key.removeprefix(prefix): value for key, value in state.items()})
    return state
