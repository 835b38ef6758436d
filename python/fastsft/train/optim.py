"""Optimizers on float32 master weights, behind one interface: AdamW, Muon, and AdamW with 8-bit moments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from fastsft.config import OptimOptions
from fastsft.train.adamw import AdamW
from fastsft.train.adamw8bit import AdamW8bit
from fastsft.train.muon import Muon
from fastsft.train.trained import Batches, Trained


class Rule(Protocol):
    """How some of the parameters are updated."""

    def update(self, learning_rate: float, divisor: float) -> None:
        """One step with the gradients divided by ``divisor``; parameters without one stay. Publishes the masters."""

    def state(self) -> dict[str, torch.Tensor]:
        """What the next step depends on, as kind/name -> tensor."""

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`state`, bit for bit. ValueError: a tensor is missing or of another shape or type."""


class MasterOptimizer(ABC):
    """Collects gradients, clips by their norm, and steps a float32 master of every trained parameter.

    Parameters that require no gradient when it is built have no master and cost nothing.

    Args:
        model: its parameters are contiguous and on one device. A tied head is one parameter under one name.
        options: ``clip_norm`` and what the rules read.
    """

    def __init__(self, model: nn.Module, options: OptimOptions) -> None:
        self.options = options
        self.trained = [Trained(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._all = Batches(self.trained)
        self._rules = self._make_rules()

    @abstractmethod
    def _make_rules(self) -> list[Rule]:
        """Each of ``self.trained`` under one rule."""

    @property
    def masters(self) -> dict[str, torch.Tensor]:
        """Parameter name -> float32 weights; a float32 parameter itself."""
        return {one.name: one.master for one in self.trained}

    @torch.no_grad()
    def collect(self) -> None:
        """Take the gradients of low-precision parameters. Call after every backward pass."""
        for one in self.trained:
            one.collect()

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """2-norm over all gradients, float32; a norm of norms of pieces, since one float32 sum over a whole embedding
        loses digits."""
        norms = [norm for _, found in self._all.gradients() for norm in torch._foreach_norm(found)]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    @torch.no_grad()
    def step(self, learning_rate: float, norm: torch.Tensor) -> None:
        """Clip by the global norm, update the masters, round them into the parameters, drop the gradients."""
        limit = self.options.clip_norm
        divisor = max(1.0, float(norm) / limit) if limit > 0 else 1.0
        for rule in self._rules:
            rule.update(learning_rate, divisor)
        self.zero_grad()

    def zero_grad(self) -> None:
        for one in self.trained:
            one.drop_gradient()

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs, by name: the rules' state, and the masters of low-precision parameters."""
        tensors = {f"master/{one.name}": one.master.detach() for one in self.trained if not one.is_own_master}
        for rule in self._rules:
            tensors |= rule.state()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`state`, bit for bit.

        Raises:
            ValueError: a tensor is missing, or of another shape or type.
        """
        for one in self.trained:
            one.restore_master(tensors)
        for rule in self._rules:
            rule.load_state(tensors)


class MasterAdamW(MasterOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    def _make_rules(self) -> list[Rule]:
        return [AdamW(self.trained, self.options)]


class MasterAdamW8bit(MasterOptimizer):
    """AdamW with 8-bit moments on the matrices of the blocks, float32 ones on embedding, head, norms and biases.

    For GPUs, whose memory it saves; on a CPU its steps take tens of times as long as AdamW's.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """

    def _make_rules(self) -> list[Rule]:
        hidden, rest = _split(self.trained)
        return [AdamW8bit(hidden, self.options), AdamW(rest, self.options)]


class MasterMuon(MasterOptimizer):
    """Muon (Jordan et al., 2024) on the matrices of the blocks, AdamW on embedding, head, norms and biases.

    Steps are scaled to the root mean square of AdamW's (Moonshot, arXiv 2502.16982), so that its learning rate and
    decay carry over.

    Raises:
        ConfigError: this torch has no Muon.
    """

    def _make_rules(self) -> list[Rule]:
        hidden, rest = _split(self.trained)
        return [Muon(hidden, self.options, momentum=self.options.momentum), AdamW(rest, self.options)]


def make_optimizer(model: nn.Module, options: OptimOptions) -> MasterOptimizer:
    """Of the kind that the options name.

    Raises:
        ConfigError: what it needs is not installed.
    """
    if options.kind == "muon":
        return MasterMuon(model, options)
    return MasterAdamW8bit(model, options) if options.kind == "adamw8bit" else MasterAdamW(model, options)


def _split(parameters: Sequence[Trained]) -> tuple[list[Trained], list[Trained]]:
    """The matrices of the blocks, and the rest."""

    def is_hidden(one: Trained) -> bool:
        return one.master.ndim == 2 and "embed" not in one.name and not one.name.startswith("lm_head")

    return [one for one in parameters if is_hidden(one)], [one for one in parameters if not is_hidden(one)]
