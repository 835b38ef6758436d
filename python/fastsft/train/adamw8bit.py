"""AdamW with blockwise 8-bit moments (Dettmers et al., arXiv 2110.02861), the authors' own: bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fastsft.config import ConfigError, OptimOptions
from fastsft.train.trained import Trained, WholeGradients, restore

_STATE = ("state1", "state2", "absmax1", "absmax2")  # codes and the scale of each block; the first two alone if small


class AdamW8bit:
    """A byte per moment and element, and a float32 scale for each 256; below 4,096 elements the moments are float32.

    All parameters decay: give it matrices.
    """

    def __init__(self, parameters: Iterable[Trained], options: OptimOptions) -> None:
        try:
            from bitsandbytes.optim import AdamW8bit as Bitsandbytes
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"optim: 8-bit moments need bitsandbytes (pip install 'fastsft[optim8bit]'): {error}"
            ) from None
        self._parameters = list(parameters)
        self._adamw = Bitsandbytes(
            [one.master for one in self._parameters],
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
        (self._group,) = self._adamw.param_groups
        for i, one in enumerate(self._parameters):
            self._adamw.init_state(self._group, one.master, 0, i)
        self._whole = WholeGradients(self._parameters)

    def update(self, learning_rate: float, divisor: float) -> None:
        self._group["lr"] = learning_rate
        for one in self._whole.each(divisor):
            self._adamw.step()
            one.publish()

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for one in self._parameters:
            state = self._adamw.state[one.master]
            tensors[f"step/{one.name}"] = torch.tensor(float(state["step"]))
            tensors |= {f"{key}/{one.name}": state[key] for key in _STATE if key in state}
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for key, tensor in self.state().items():
            restore(tensor, key, tensors)
        for one in self._parameters:
            self._adamw.state[one.master]["step"] = int(tensors[f"step/{one.name}"])
