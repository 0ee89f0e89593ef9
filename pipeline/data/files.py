"""The source that decodes image files as it goes."""

__all__ = ["FileSource", "Sample"]

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.data import chance
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.sources import CROP, ORDER, check_batch_size, steps_of
from pipeline.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

# Below this many images the start of worker processes costs more than it saves.
_FEW = 2000
_MAX_WORKERS = 8
_UNREADABLE_FRACTION, _UNREADABLE_COUNT = 0.01, 10


@dataclass(frozen=True)
class Sample:
    """An image file and its class (−1 where there is none)."""

    path: Path
    label: int


class FileSource:
    """Images in files, decoded by as many processes as pay.

    A file that cannot be decoded is named in the log and in `unreadable`. In training the next readable sample takes
    its place, so that batches keep their size; in evaluation it is left out. Beyond one file in a hundred (and ten)
    the source gives up.
    """

    def __init__(
        self,
        name: str,
        samples: Sequence[Sample],
        preprocessing: Preprocessing,
        *,
        num_classes: int | None,
        class_names: Sequence[str] = (),
        workers: int | None = None,
    ) -> None:
        """Takes the list of files; opens none.

        Args:
            name: Names set and split in reports.
            samples: The files, in the order of evaluation.
            preprocessing: From picture to network input.
            num_classes: How many classes; None where there are no labels.
            class_names: Their names in index order.
            workers: Processes that decode; by the size of the set unless given. Images never depend on it.
        """
        self.name = name
        self.labelled = num_classes is not None
        self.num_classes = num_classes
        self.class_names = tuple(class_names)
        self.preprocessing = preprocessing
        self.unreadable: dict[str, str] = {}
        """Reason by path, of the files that could not be decoded so far."""
        self._samples = tuple(samples)
        spare = min(_MAX_WORKERS, os.cpu_count() or 1)
        self._workers = workers if workers is not None else (0 if len(self._samples) < _FEW else spare)

    def __len__(self) -> int:
        return len(self._samples)

    def steps(self, batch_size: int, train: bool = False) -> int:
        return steps_of(len(self), batch_size, train)

    def paths(self, i: int) -> str | None:
        return str(self._samples[i].path)

    def describe(self, i: int) -> str:
        return f"{self.name}: {self._samples[i].path}"

    def batches(
        self, batch_size: int, *, train: bool = False, seed: int = 0, epoch: int = 0, start_step: int = 0
    ) -> "Iterator[tuple[Tensor, Tensor]]":
        import torch
        from torch.utils.data import DataLoader

        check_batch_size(self, batch_size, train)
        count = len(self)
        indices = chance.order(count, seed, epoch, ORDER) if train else np.arange(count, dtype=np.int64)
        chosen = [
            indices[step * batch_size : (step + 1) * batch_size].tolist()
            for step in range(start_step, self.steps(batch_size, train))
        ]
        loader: Any = DataLoader(
            _Decoder(self._samples, self.preprocessing, (seed, epoch) if train else None),  # type: ignore[arg-type]
            batch_sampler=chosen,
            num_workers=self._workers,
            collate_fn=_as_list,
            # Without a generator of its own the loader would draw from torch's global one and so change training.
            generator=torch.Generator(),
        )
        for batch in loader:
            for _, _, path, reason in batch:
                if reason:
                    self._note(path, reason)
            images = [image for image, _, _, _ in batch if image is not None]
            if not images:
                continue
            labels = [label for image, label, _, _ in batch if image is not None]
            yield torch.stack(images), torch.tensor(labels, dtype=torch.int64)

    def _note(self, path: str, reason: str) -> None:
        if path not in self.unreadable:
            self.unreadable[path] = reason
            _log.warning("%s: cannot decode %s: %s", self.name, path, reason)
        allowed = max(_UNREADABLE_COUNT, round(_UNREADABLE_FRACTION * len(self)))
        if len(self.unreadable) > allowed:
            named = "; ".join(f"{at} ({why})" for at, why in list(self.unreadable.items())[:3])
            raise DataError(
                f"{self.name}: more than {allowed} of {len(self)} image files cannot be decoded, e.g. {named}",
                hint="mend or remove the files",
            )


def _as_list(items: list[Any]) -> list[Any]:
    return items


class _Decoder:
    """Index → (image or None, label, path of an unreadable file, reason); runs in the worker processes."""

    def __init__(
        self, samples: tuple[Sample, ...], preprocessing: Preprocessing, augment: tuple[int, int] | None
    ) -> None:
        self._samples = samples
        self._preprocessing = preprocessing
        self._augment = augment

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> "tuple[Tensor | None, int, str, str]":
        trouble = ("", "")
        for step in range(len(self._samples) if self._augment else 1):
            sample = self._samples[(index + step) % len(self._samples)]
            try:
                with Image.open(sample.path) as picture:
                    picture.load()
                    return self._input(picture, index), sample.label, *trouble
            # Pillow's decoders raise these for damaged, cut, foreign and absurdly large files.
            except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
                trouble = (str(sample.path), f"{type(error).__name__}: {error}")
        return None, -1, *trouble

    def _input(self, picture: Image.Image, index: int) -> "Tensor":
        import torch

        if self._augment is None:
            return self._preprocessing.eval_image(picture)
        generator = torch.Generator().manual_seed(chance.sample_seed(index, *self._augment, CROP))
        return self._preprocessing.train_image(picture, generator)
