"""Data-parallel training under `torchrun`: every process takes its share of each batch.

torchrun --nproc-per-node 2 my_script_that_calls_fit.py
"""

__all__ = ["World"]

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import TrainingError

_DRAIN_S = 0.5


def _leave() -> None:
    """Takes the processes apart at exit."""
    if dist.is_initialized():
        # The destructor of a gloo group joins its threads with the GIL held, while one of them may still want the GIL
        # to drop its last task; on a loaded machine that was seen to hang. Sleeping leaves the GIL to it.
        time.sleep(_DRAIN_S)
        dist.destroy_process_group()


class World:
    """The processes that train one network together; a world of one where `torchrun` did not start this one.

    Attributes:
        rank: This process, from 0; only rank 0 writes checkpoints and reports progress.
        size: How many there are.
    """

    def __init__(self) -> None:
        started = dist.is_available() and ("WORLD_SIZE" in os.environ or dist.is_initialized())
        self.size = int(os.environ.get("WORLD_SIZE", "1")) if started else 1
        self.rank = int(os.environ.get("RANK", "0")) if started else 0
        if started and dist.is_initialized():
            self.size, self.rank = dist.get_world_size(), dist.get_rank()

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Connects the processes, by NCCL on GPUs and gloo elsewhere, unless the caller or an earlier fit has done so.

        They stay connected until the process ends: a second meeting under the same `torchrun` reads the addresses of
        the first one and fails.
        """
        if self.size == 1 or dist.is_initialized():
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
        yield

    def device(self, wanted: torch.device) -> torch.device:
        """This process's own GPU, where GPUs were asked for without a number."""
        if str(wanted) == "cuda" and self.size > 1:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))
        return wanted

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network with gradients averaged over processes during backward.

        It must be wrapped anew when a parameter stops or begins to train, for the averaging counts on the others.
        """
        return model if self.size == 1 else DistributedDataParallel(model)

    def share(self, batch: Tensor, parts: int) -> tuple[Tensor, ...]:
        """This process's share of a batch, in `parts` equal pieces.

        Raises:
            TrainingError: The batch cannot be divided so.
        """
        if len(batch) % (self.size * parts):
            raise TrainingError(
                f"a batch of {len(batch)} cannot be shared by {self.size} processes in {parts} parts each",
                hint="make batch_size a multiple of processes times accumulate",
            )
        return batch.chunk(self.size)[self.rank].chunk(parts)

    def mean(self, values: Tensor) -> Tensor:
        """Averages a tensor over the processes, so that all of them decide alike."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            dist.barrier()

    @staticmethod
    def unsynchronised(network: Any, yes: bool) -> AbstractContextManager[Any]:
        """A context in which gradients are not averaged yet, for all but the last part of a batch."""
        if yes and isinstance(network, DistributedDataParallel):
            return network.no_sync()
        return nullcontext()
