"""An exponential moving average of the weights during training (Polyak and Juditsky, 1992), in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from fastsft.train.optim import MasterOptimizer
from fastsft.train.trained import restore


class Ema:
    """The average ``decay * average + (1 - decay) * master`` of every trained parameter, from the weights at the start.

    Args:
        optimizer: whose masters are averaged. Call :meth:`update` after each of its steps.
        decay: in [0, 1); 1 / (1 - decay) steps is the average's memory.

    Raises:
        ValueError: decay out of range.
    """

    def __init__(self, optimizer: MasterOptimizer, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.decay = decay
        self._trained = optimizer.trained
        self.averages = {one.name: one.master.detach().clone() for one in self._trained}
        """Parameter name -> float32 average."""

    @torch.no_grad()
    def update(self) -> None:
        averages = list(self.averages.values())
        torch._foreach_lerp_(averages, [one.master for one in self._trained], 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in the model's parameters, rounded to their type, for an evaluation or an export; what was there
        comes back. Masters are not touched, except that a float32 parameter is its own."""
        kept = [one.parameter.detach().clone() for one in self._trained]
        self._set(self.averages.values())
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Iterable[torch.Tensor]) -> None:
        for one, value in zip(self._trained, values, strict=True):
            one.parameter.copy_(value)

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs, by name."""
        return {f"ema/{name}": average for name, average in self.averages.items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`state`, bit for bit.

        Raises:
            ValueError: a tensor is missing, or of another shape or type.
        """
        for key, average in self.state().items():
            restore(average, key, tensors)
