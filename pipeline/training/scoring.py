"""Evaluation between epochs: the row of the history, and early stopping."""

__all__ = ["Scorer"]

import torch
from torch import nn

from pipeline.data.sources import ImageSource
from pipeline.errors import TrainingError
from pipeline.training.config import FitConfig
from pipeline.training.evaluate import Evaluation, evaluate
from pipeline.training.state import TrainState


class Scorer:
    """Scores a network in training on a held-out split.

    Args:
        held_out: The split; without one nothing is scored.
        teacher: The network to agree with, if there is one.
        config: Batch size and patience.
        device: Where to run.
    """

    def __init__(
        self, held_out: ImageSource | None, teacher: nn.Module | None, config: FitConfig, device: torch.device
    ) -> None:
        self.held_out, self.teacher, self.config, self.device = held_out, teacher, config, device
        if config.patience is not None and (held_out is None or not (held_out.labelled or teacher)):
            raise TrainingError(
                "early stopping has nothing to score by",
                hint="drop patience, or give an evaluation split with labels or a teacher",
            )

    def score(self, model: nn.Module) -> Evaluation | None:
        """Scores the network as it is."""
        if self.held_out is None:
            return None
        return evaluate(
            model, self.held_out, batch_size=self.config.batch_size, teacher=self.teacher, device=self.device
        )

    def end_of_epoch(self, state: TrainState, *, watch: bool = True) -> Evaluation | None:
        """Scores the moving average where there is one, and stops the fine-tuning when patience ran out.

        Args:
            state: What is trained.
            watch: Whether this epoch may be the best one and counts against patience.
        """
        if self.held_out is None:
            return None
        if state.average is not None:
            state.average.swap(state.model)
        evaluation = self.score(state.model)
        if self.config.patience is not None and evaluation is not None and watch:
            self._watch(state, evaluation, self.config.patience)
        if state.average is not None:
            state.average.swap(state.model)
        return evaluation

    def _watch(self, state: TrainState, evaluation: Evaluation, patience: int) -> None:
        now = evaluation.top1 if evaluation.top1 is not None else evaluation.agreement
        if state.best is None or (now is not None and now > state.best):
            state.best, state.stale = now, 0
            state.best_state = {name: value.detach().cpu().clone() for name, value in state.model.state_dict().items()}
            return
        state.stale += 1
        if state.stale >= patience:
            state.stopped = True
            state.history.append({"event": "early stop", "step": state.step, "best": state.best})
