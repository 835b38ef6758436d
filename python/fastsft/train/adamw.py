"""AdamW (arXiv 1711.05101) as torch's fused kernel over pieces of the masters.

Memory traffic per element of a bfloat16 parameter: 2 bytes of gradient and 12 of master and moments in, 12 and the 2 of
the rounded parameter out. The gradient in float32 and the master on its way to the parameter stay in the cache, and
clipping divides inside the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fastsft.config import OptimOptions
from fastsft.train.trained import Batches, Piece, Trained, restore


class AdamW:
    """One moment pair and one step count per parameter."""

    def __init__(self, parameters: Iterable[Trained], options: OptimOptions) -> None:
        self._options = options
        self._parameters = list(parameters)
        self._moments = {one.name: (_zeros(one), _zeros(one)) for one in self._parameters}
        self._steps = {one.name: torch.zeros((), device=one.master.device) for one in self._parameters}
        decayed = Batches(one for one in self._parameters if _decays(one))
        plain = Batches(one for one in self._parameters if not _decays(one))
        self._groups = ((decayed, options.weight_decay), (plain, 0.0))

    def update(self, learning_rate: float, divisor: float) -> None:
        for one in self._parameters:
            if one.gradient is not None:
                self._steps[one.name] += 1
        for batches, weight_decay in self._groups:
            for pieces, gradients in batches.gradients():
                masters = [piece.within(piece.of.master) for piece in pieces]
                # what torch.optim.AdamW(fused=True) calls; its own bookkeeping costs a tenth of a batch
                torch._fused_adamw_(
                    masters,
                    gradients,
                    [piece.within(self._moments[piece.of.name][0]) for piece in pieces],
                    [piece.within(self._moments[piece.of.name][1]) for piece in pieces],
                    [],
                    [self._steps[piece.of.name] for piece in pieces],
                    lr=learning_rate,
                    beta1=self._options.beta1,
                    beta2=self._options.beta2,
                    weight_decay=weight_decay,
                    eps=self._options.eps,
                    amsgrad=False,
                    maximize=False,
                    grad_scale=gradients[0].new_tensor(divisor) if divisor != 1 else None,
                )
                self._publish(pieces, masters)

    @staticmethod
    def _publish(pieces: list[Piece], masters: list[torch.Tensor]) -> None:
        for piece, master in zip(pieces, masters, strict=True):
            if not piece.of.is_own_master:
                piece.within(piece.of.parameter).copy_(master)

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {f"step/{name}": step for name, step in self._steps.items()}
        for name, (mean, square) in self._moments.items():
            tensors |= {f"exp_avg/{name}": mean, f"exp_avg_sq/{name}": square}
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for key, tensor in self.state().items():
            restore(tensor, key, tensors)


def _decays(one: Trained) -> bool:
    """Matrices decay; norms, biases and the embedding (tied head included) do not."""
    return one.master.ndim >= 2 and "embed" not in one.name


def _zeros(one: Trained) -> torch.Tensor:
    return torch.zeros_like(one.master, requires_grad=False)
