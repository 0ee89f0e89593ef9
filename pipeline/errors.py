"""The exceptions that layerfold raises on purpose.

    LayerfoldError
    ├── RecipeError        a recipe or an override is wrong
    ├── DataError          a data set is missing or unreadable
    ├── ModelError         a model name is unknown or the model cannot be built
    │   └── WeightsError   pretrained weights are missing or do not fit
    ├── UnitError          a fold unit is unknown or cannot fold
    ├── TraceError         the model's graph cannot be traced
    ├── FoldError          folding went wrong
    ├── TrainingError      fine-tuning cannot go on
    ├── ExportError        conversion or quantisation failed
    ├── VerifyError        an exported file does not predict what the model predicts
    ├── ArtifactError      a stage's output is missing or damaged
    └── RunFolderError     the run folder is locked, foreign, read-only or full

Every message says what is wrong and where; `hint` says what to do about it. The command line prints both and
exits with `exit_code`.
"""

__all__ = [
    "ArtifactError",
    "DataError",
    "ExportError",
    "FoldError",
    "LayerfoldError",
    "ModelError",
    "RecipeError",
    "RunFolderError",
    "TraceError",
    "TrainingError",
    "UnitError",
    "VerifyError",
    "WeightsError",
    "nearest",
]

from collections.abc import Iterable
from difflib import get_close_matches


class LayerfoldError(Exception):
    """Base of the tree.

    Args:
        what: What is wrong, naming the file, key, layer or unit and the value found.
        hint: What the user can do about it, in one sentence; may be empty.
    """

    exit_code = 2

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.hint}" if self.hint else self.what


class RecipeError(LayerfoldError):
    """A recipe, or an override of it, is wrong."""


class DataError(LayerfoldError):
    """A data set is missing, unreadable or unfit for the asked use."""


class ModelError(LayerfoldError):
    """A model name is unknown or the model cannot be built."""


class WeightsError(ModelError):
    """Pretrained weights are missing, unreadable or do not fit the model."""


class UnitError(LayerfoldError):
    """A fold unit is unknown or cannot fold."""


class TraceError(LayerfoldError):
    """A model's graph cannot be traced."""


class FoldError(LayerfoldError):
    """Folding went wrong."""


class TrainingError(LayerfoldError):
    """Fine-tuning cannot go on."""


class ExportError(LayerfoldError):
    """Conversion or quantisation failed."""


class VerifyError(LayerfoldError):
    """An exported file does not predict what the model predicts."""

    exit_code = 1


class ArtifactError(LayerfoldError):
    """A stage's output is missing or damaged."""


class RunFolderError(LayerfoldError):
    """The run folder is locked by another run, belongs to another recipe, or cannot be written."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Says ``did you mean 'x'?`` for the nearest known word, or nothing when none is near."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else ""
