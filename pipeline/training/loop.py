"""The one training loop: pre-folding with α, post-folding, and training a baseline all run here."""

__all__ = ["FitConfig", "FitResult", "Progress", "fit"]

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import alpha as alphas
from pipeline.alpha import AlphaSchedule
from pipeline.data.sources import ImageSource
from pipeline.errors import TrainingError
from pipeline.training import checkpoint
from pipeline.training.average import MovingAverage
from pipeline.training.config import FitConfig, FitResult, Progress
from pipeline.training.distributed import World
from pipeline.training.interrupt import Interruptions
from pipeline.training.memory import kept_pages
from pipeline.training.objective import Objective
from pipeline.training.optimiser import build
from pipeline.training.scoring import Scorer
from pipeline.training.state import TrainState
from pipeline.training.step import Stepper

_PROGRESS_EVERY_S = 0.1
# Reading a loss back from a GPU stalls it, so there they are read in groups.
_LOSSES_PER_READ = {"cpu": 1}
_LOSSES_PER_READ_ELSEWHERE = 20


class _NonFinite(Exception):
    """A loss or a weight is no number any more."""


def fit(
    model: nn.Module,
    train: ImageSource,
    config: FitConfig,
    *,
    evaluate: ImageSource | None = None,
    teacher: nn.Module | None = None,
    checkpoint_dir: Path,
    on_progress: Callable[[Progress], None] | None = None,
    alpha: AlphaSchedule | None = None,
    device: torch.device | str = "cpu",
) -> FitResult:
    """Fine-tunes a network in place; goes on from `checkpoint_dir` where there is a checkpoint.

    A run that was stopped at any step and called again ends with the same weights, bit for bit on a CPU, as one
    that was not stopped. A loss that is not finite sends the run back to its last checkpoint at half the rate.

    Args:
        model: Maps Tensor[N, 3, H, W] to logits Tensor[N, classes]; an α student where `alpha` is given.
        train: Training images.
        config: How.
        evaluate: A split to score after each epoch.
        teacher: The network to distil from, if the configuration gives that a weight.
        checkpoint_dir: Where checkpoints are kept; one folder for one fine-tuning.
        on_progress: Called several times a second, and at the end.
        alpha: How α is driven.
        device: Where to train.

    Returns:
        The network in evaluation mode, with its moving average where one was asked for, and the history.

    Raises:
        TrainingError: Loss is not finite again and again; checkpoints do not fit or cannot be written; the
            configuration asks for what is not there, or for an early stop while α still learns.
        KeyboardInterrupt: Passed on, after a checkpoint was written.
    """
    return _Fit(model, train, config, evaluate, teacher, checkpoint_dir, on_progress, alpha, device).run()


class _Fit:
    """One call of `fit`."""

    def __init__(
        self,
        model: nn.Module,
        train: ImageSource,
        config: FitConfig,
        evaluate: ImageSource | None,
        teacher: nn.Module | None,
        checkpoint_dir: Path,
        on_progress: Callable[[Progress], None] | None,
        alpha: AlphaSchedule | None,
        device: torch.device | str,
    ) -> None:
        self.config, self.train, self.alpha = config, train, alpha
        self.folder, self.on_progress = Path(checkpoint_dir), on_progress
        self.world = World()
        self.device = self.world.device(torch.device(device))
        model.to(self.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.epoch_steps = train.steps(config.batch_size, train=True)
        total = round(config.epochs * self.epoch_steps)
        self.total_steps = total if config.max_steps is None else min(total, config.max_steps)
        if self.total_steps < 1:
            raise TrainingError(
                f"{len(train)} images in batches of {config.batch_size} for {config.epochs} epochs are not one step",
                hint="lower batch_size or raise epochs",
            )
        self.state = TrainState(
            model=model,
            optimiser=build(model, config, None if alpha is None else alpha.alpha_lr),
            scaler=torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16"),
            average=None if config.ema_decay is None else MovingAverage(model, config.ema_decay),
            fingerprint={
                **config.fingerprint(),
                "alpha": repr(alpha),
                "images": f"{train.name}, {len(train)}",
                "parameters": str(sum(p.numel() for p in model.parameters())),
            },
        )
        self.scorer = Scorer(evaluate, teacher, config, self.device)
        self.objective = Objective(model, teacher, train, config, self.device)
        warmup = min(round(config.warmup_epochs * self.epoch_steps), self.total_steps)
        self.take_step = Stepper(self.state, self.objective, config, alpha, self.total_steps, warmup, self.world)
        self.rests_at = self._rests_at()
        self.interruptions = Interruptions()
        self.unread: list[Tensor] = []
        self.last_loss = math.nan
        self.failures = 0
        self.between_steps = True
        self.began = self.saved_at = self.told_at = time.monotonic()
        self.steps_here = 0

    def run(self) -> FitResult:
        model = self.state.model
        cuda = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=cuda),
            kept_pages(self.device.type),
            self.world.joined(self.device),
            self.objective,
            self.interruptions,
        ):
            resumed_at = self._begin()
            while self.state.step < self.total_steps and not self.state.stopped:
                try:
                    self._epoch()
                except _NonFinite as error:
                    self._go_back(str(error))
                except KeyboardInterrupt:
                    if self.between_steps:  # amid a step, the last checkpoint stays the one to go on from
                        if self.world.size == 1:  # others may be amid a step and would not answer
                            self._read_losses()
                        self._save()
                    raise
        if self.state.average is not None:
            self.state.average.swap(model)
        if self.state.best_state is not None:
            model.load_state_dict(self.state.best_state)
        if self.alpha is not None:
            alphas.hold_(model)
            alphas.apply_(model, self.alpha, 1.0)
        model.zero_grad(set_to_none=True)
        final = self.scorer.score(model)
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self._tell("", force=True)
        return FitResult(model.eval(), self.state.history, self.state.alpha_trace, final, self.state.step, resumed_at)

    def _rests_at(self) -> float:
        """Position from which α rests.

        Raises:
            TrainingError: Early stopping would compare epochs of networks that α still tells apart.
        """
        if self.alpha is None:
            return 0.0
        free = [name for name, parameter in alphas.alphas(self.state.model).items() if parameter.requires_grad]
        rests_at = self.alpha.rests_at(free)
        if self.config.patience is not None and rests_at >= 1.0:
            raise TrainingError(
                "patience compares epochs, but α moves to the last step: the best epoch would be the one with the "
                "least α",
                hint="let α come to rest before (AlphaSchedule.snap_at or anneal_fraction below 1), or drop patience",
            )
        return rests_at

    def _begin(self) -> int | None:
        """Loads the last checkpoint, or writes the first one; returns the step to go on from, if any."""
        saved = checkpoint.load(self.folder)
        self.world.wait()  # nobody writes before everybody has looked
        if saved is not None:
            self.state.restore(saved)
        else:
            self._save()
        return None if saved is None else int(saved["step"])

    def _epoch(self) -> None:
        """Trains to the end of the running epoch."""
        epoch, start = divmod(self.state.step, self.epoch_steps)
        self._train_mode()
        batches = self.train.batches(
            self.config.batch_size, train=True, seed=self.config.seed, epoch=epoch, start_step=start
        )
        last = min((epoch + 1) * self.epoch_steps, self.total_steps)
        for images, labels in batches:
            self.between_steps = False
            self.unread.append(self.take_step(images, labels))
            self.steps_here += 1
            if len(self.unread) >= _LOSSES_PER_READ.get(self.device.type, _LOSSES_PER_READ_ELSEWHERE):
                self._read_losses()
            if self.state.step == last:
                break
            self.between_steps = True
            if not self.unread and time.monotonic() - self.saved_at >= self.config.checkpoint_every_s:
                self._save()
            self._tell("")
            self.interruptions.check()
        self._read_losses()
        if not self.state.is_finite():
            raise _NonFinite(f"a weight was not finite at step {self.state.step}")
        self._end_of_epoch(epoch)
        self._save()
        self.between_steps = True
        self._tell("")
        self.interruptions.check()

    def _train_mode(self) -> None:
        self.state.model.train()
        if self.config.freeze_bn:
            for module in self.state.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _read_losses(self) -> None:
        if not self.unread:
            return
        losses = self.world.mean(torch.stack(self.unread)).tolist()
        self.unread.clear()
        for back, loss in enumerate(reversed(losses)):
            if not math.isfinite(loss):
                raise _NonFinite(f"the loss was {loss} at step {self.state.step - back}")
        self.state.loss_sum += sum(losses)
        self.last_loss = losses[-1]

    def _end_of_epoch(self, epoch: int) -> None:
        state = self.state
        steps = state.step - epoch * self.epoch_steps
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": state.step,
            "loss": state.loss_sum / steps,
            "lr": state.optimiser.param_groups[0]["lr"],
            "alphas": alphas.values(state.model),
        }
        state.loss_sum = 0.0
        state.history.append(row)
        # The best epoch must not be one from before α came to rest: its weights belong to another network.
        # α is set before each step, so it rests once the last step began after that.
        evaluation = self.scorer.end_of_epoch(state, watch=(state.step - 1) / self.total_steps >= self.rests_at)
        if evaluation is not None:
            row["evaluation"] = evaluation.as_dict()

    def _save(self) -> None:
        """Writes a checkpoint, unless a weight is not finite: the next loss will tell every process so."""
        self.saved_at = time.monotonic()
        if self.world.rank == 0 and self.state.is_finite():
            checkpoint.save(self.folder, self.state.as_dict())

    def _go_back(self, reason: str) -> None:
        """Returns to the last checkpoint at half the rate.

        Raises:
            TrainingError: It happened too often.
        """
        self.failures += 1
        self.unread.clear()
        if self.failures > self.config.retries:
            raise TrainingError(
                f"{reason}, for the {self.failures}th time at ever lower rates",
                hint="lower lr, clip gradients (grad_clip), or look for broken images",
            )
        scale = self.state.rate_scale / 2
        self.world.wait()  # rank 0 may still be writing
        saved = checkpoint.load(self.folder)
        assert saved is not None  # one is written before the first step
        self.state.restore(saved)
        self.state.rate_scale = scale
        event = {"event": "non-finite loss", "step": self.state.step, "reason": reason, "rate_scale": scale}
        self.state.history.append(event)
        self.world.wait()  # others may still be reading
        self._save()  # with the event and the rate: the next return, and a run that goes on from here, know of them
        self._tell(f"{reason}; back to step {self.state.step} with the rate times {scale:g}", force=True)

    def _tell(self, note: str, *, force: bool = False) -> None:
        now = time.monotonic()
        if self.on_progress is None or self.world.rank > 0 or (not force and now - self.told_at < _PROGRESS_EVERY_S):
            return
        self.told_at = now
        self.on_progress(
            Progress(
                epoch=min(self.state.step, self.total_steps - 1) // self.epoch_steps,
                step=self.state.step,
                total_steps=self.total_steps,
                loss=self.last_loss,
                lr=self.state.optimiser.param_groups[0]["lr"],
                alphas=alphas.values(self.state.model),
                images_per_s=self.steps_here * self.config.batch_size / max(now - self.began, 1e-9),
                note=note,
            )
        )
