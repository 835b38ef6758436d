"""Muon: momentum, orthogonalised by Newton-Schulz iterations (Jordan et al., https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fastsft.config import ConfigError, OptimOptions
from fastsft.train.trained import Trained, WholeGradients, restore


class Muon:
    """torch's Muon with Nesterov momentum, matrix by matrix.

    A step is lr * 0.2 * sqrt(max(rows, columns)) times the orthogonalised momentum, whose root mean square is then that
    of a step of AdamW; decay is AdamW's (arXiv 2502.16982, section 2.2). All parameters decay.
    """

    def __init__(self, parameters: Iterable[Trained], options: OptimOptions, *, momentum: float) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(f"optim: Muon needs torch 2.9 or newer, got {torch.__version__}")
        self._parameters = list(parameters)
        self._muon = torch.optim.Muon(
            [one.master for one in self._parameters],
            weight_decay=options.weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        (self._group,) = self._muon.param_groups
        for one in self._parameters:
            self._muon.state[one.master]["momentum_buffer"] = torch.zeros_like(one.master, requires_grad=False)
        self._whole = WholeGradients(self._parameters)

    def update(self, learning_rate: float, divisor: float) -> None:
        self._group["lr"] = learning_rate
        for one in self._whole.each(divisor):
            self._muon.step()  # type: ignore[no-untyped-call]
            one.publish()

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"momentum_buffer/{one.name}": self._muon.state[one.master]["momentum_buffer"] for one in self._parameters
        }

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for key, tensor in self.state().items():
            restore(tensor, key, tensors)
