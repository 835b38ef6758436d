"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) on float32 master weights."""

from __future__ import annotations

import torch
from torch import nn

from fastsft.config import OptimOptions


class MasterAdamW:
    """torch's fused AdamW over float32 masters of a model's parameters.

    A float32 parameter is its own master. A bfloat16 one gets a float32 copy, and its gradient is added into a float32
    buffer after every micro-batch (:meth:`collect`), so that k micro-batches accumulate as exactly as one batch.
    """

    def __init__(self, model: nn.Module, options: OptimOptions) -> None:
        self.options = options
        # A tied head is one parameter under one name.
        self.named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.masters = {
            n: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float().clone()) for n, p in self.named
        }
        decayed = [m for n, m in self.masters.items() if _decays(n, m)]
        plain = [m for n, m in self.masters.items() if not _decays(n, m)]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            fused=True,
        )

    def collect(self) -> None:
        """Move the gradients of low-precision parameters into the masters. Call after every backward pass."""
        for name, parameter in self.named:
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def grad_norm(self) -> torch.Tensor:
        """2-norm over all gradients, float32."""
        grads = [m.grad for m in self.masters.values() if m.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    def step(self, learning_rate: float, norm: torch.Tensor) -> None:
        """Clip by the global norm, update the masters, round them into the parameters, drop the gradients."""
        if self.options.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(list(self.masters.values()), self.options.clip_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._publish()
        self.zero_grad()

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)
        for _, parameter in self.named:
            parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs, by name: moments, step counts, and the masters of low-precision parameters."""
        tensors = {}
        for name, parameter in self.named:
            master = self.masters[name]
            for key, value in self._adamw.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
            if master is not parameter:
                tensors[f"master/{name}"] = master.detach()
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`state`; bit for bit."""
        with torch.no_grad():
            for name, parameter in self.named:
                master = self.masters[name]
                if master is not parameter:
                    master.copy_(tensors[f"master/{name}"])
                state = {k: tensors[f"{k}/{name}"].clone() for k in _MOMENTS if f"{k}/{name}" in tensors}
                if state:
                    self._adamw.state[master] = state
        self._publish()

    def _publish(self) -> None:
        with torch.no_grad():
            for name, parameter in self.named:
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _decays(name: str, parameter: torch.Tensor) -> bool:
    """Matrices decay; norms, biases and the embedding (tied head included) do not."""
    return parameter.ndim >= 2 and "embed" not in name
