"""One optimiser step."""

__all__ = ["Stepper"]

import torch
from torch import Tensor, nn

from pipeline import alpha as alphas
from pipeline.alpha import AlphaSchedule
from pipeline.training import rate
from pipeline.training.config import FitConfig
from pipeline.training.distributed import World
from pipeline.training.objective import Objective
from pipeline.training.optimiser import set_rate
from pipeline.training.state import TrainState

_TRACE_POINTS = 200


class Stepper:
    """Takes a network through one batch: schedule, loss, penalty, update, clamp, average.

    Args:
        state: What is trained.
        objective: The loss of a batch.
        config: How.
        alpha: How α is driven; None without α.
        total_steps: Of the whole fine-tuning.
        warmup_steps: Steps of rising rate.
        world: The processes.
    """

    def __init__(
        self,
        state: TrainState,
        objective: Objective,
        config: FitConfig,
        alpha: AlphaSchedule | None,
        total_steps: int,
        warmup_steps: int,
        world: World,
    ) -> None:
        self.state, self.objective, self.config, self.alpha = state, objective, config, alpha
        self.total_steps, self.warmup_steps, self.world = total_steps, warmup_steps, world
        self._trace_every = -(-total_steps // _TRACE_POINTS)
        self._plain = objective.student
        self._training: tuple[bool, ...] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Trains on a whole batch.

        Args:
            images: Tensor[N, 3, H, W], the same on every process.
            labels: Tensor[N].

        Returns:
            This process's loss, penalty included, shape (), without gradient.
        """
        state, config = self.state, self.config
        position = state.step / self.total_steps
        # Dropout and the like depend on the step and the process alone, so a resumed run repeats them.
        torch.manual_seed((config.seed * 1_000_003 + state.step) * 4099 + self.world.rank)
        if self.alpha is not None:
            alphas.apply_(state.model, self.alpha, position)
        self._wrap_anew()
        share = rate.factor(config.schedule, state.step, self.total_steps, self.warmup_steps)
        set_rate(state.optimiser, share * state.rate_scale)
        state.optimiser.zero_grad(set_to_none=True)
        total = self._backward(images, labels)
        if self.alpha is not None and (strength := self.alpha.lambda_at(position)) > 0:
            penalty = strength * alphas.penalty(state.model, self.alpha.p, self.alpha.weights)
            if penalty.requires_grad:
                state.scaler.scale(penalty).backward()  # type: ignore[no-untyped-call]
            total += penalty.detach()
        if config.grad_clip is not None:
            state.scaler.unscale_(state.optimiser)
            nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
        state.scaler.step(state.optimiser)
        state.scaler.update()
        if self.alpha is not None:
            alphas.clamp_(state.model)
        if state.average is not None:
            state.average.update(state.model)
        state.step += 1
        if self.alpha is not None and state.step % self._trace_every == 0:
            state.alpha_trace.append({"step": state.step, "alphas": alphas.values(state.model)})
        return total

    def _wrap_anew(self) -> None:
        """Tells the averaging over processes which parameters train, when the schedule has frozen some."""
        training = tuple(parameter.requires_grad for parameter in self.state.model.parameters())
        if training != self._training:
            self._training = training
            self.objective.student = self.world.wrap(self._plain)

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Gradients of the batch's mean loss, part by part; returns this process's mean."""
        parts = self.config.accumulate
        total = torch.zeros((), device=self.objective.device)
        pairs = zip(self.world.share(images, parts), self.world.share(labels, parts), strict=True)
        for index, (part, part_labels) in enumerate(pairs):
            with self.world.unsynchronised(self.objective.student, index < parts - 1):
                loss = self.objective(part, part_labels, self.state.step) / parts
                self.state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total
