"""An exponential moving average of a network's weights and statistics."""

__all__ = ["MovingAverage"]

import torch
from torch import Tensor, nn


class MovingAverage:
    """Averages every floating-point entry of a network's state dict.

    Args:
        model: The network; its present state is the start.
        decay: Share of the old average that a step keeps. Early steps keep less, (1+t)/(10+t), so that the
            random start does not linger.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.state = {name: value.detach().clone() for name, value in _floating(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes one optimiser step's result in."""
        self.steps += 1
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        now = _floating(model)
        torch._foreach_lerp_(list(self.state.values()), [now[name] for name in self.state], 1 - keep)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the network's state and the average; a second call puts both back."""
        for name, value in _floating(model).items():
            kept = value.clone()
            value.copy_(self.state[name])
            self.state[name].copy_(kept)

    def state_dict(self) -> dict[str, object]:
        """For a checkpoint."""
        return {"steps": self.steps, "state": self.state}

    def load_state_dict(self, saved: dict[str, object]) -> None:
        """From a checkpoint of the same network."""
        state = saved["state"]
        assert isinstance(state, dict) and isinstance(saved["steps"], int)
        self.steps = saved["steps"]
        for name, value in self.state.items():
            value.copy_(state[name])


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """State-dict entries that can be averaged; an α shared by several activations counts once."""
    seen: set[int] = set()
    found = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            found[name] = value
    return found
