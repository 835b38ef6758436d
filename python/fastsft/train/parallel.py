"""How the processes of a run hold its model: here each has a copy; ``shards`` is the other way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import nn

from fastsft.data.batch import VarlenBatch
from fastsft.models.decoder import Decoder
from fastsft.train.distributed import World
from fastsft.train.optim import MasterOptimizer
from fastsft.train.trained import WideGradients

_OPTIMIZER = "optimizer.safetensors"
STATE = "state"  # of a checkpoint in parts, the folder that torch.distributed.checkpoint writes


class Copies:
    """Every process has the whole model and the optimizer's whole state; gradients are summed over them.

    They are summed in float32 and once for each step, after its last micro-batch: the result is then that of one
    process but for the order of additions, the same bits in every process, and processes with fewer micro-batches
    than others, or none, do not matter. torch's DistributedDataParallel would average, round to the parameters' type,
    and want a backward pass of everyone.
    """

    sharded = False

    def __init__(self, model: Decoder, world: World | None = None) -> None:
        self.model = model
        self.world = world or World()
        self.dtype = model.embed_tokens.weight.dtype
        """Of the arithmetic."""

    @property
    def parameters(self) -> nn.Module:
        """What an optimizer of this process is built on."""
        return self.model

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained, in their full sizes."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def turns(self, count: int) -> list[tuple[int, bool]]:
        """Which of ``count`` batches this process has to run, and for each whether its result counts."""
        return [(number, True) for number in range(self.world.rank, count, self.world.size)]

    def inference(self) -> AbstractContextManager[object]:
        """For forward passes that nothing is differentiated through."""
        return torch.inference_mode()

    @contextmanager
    def training(self, names: Sequence[str]) -> Iterator[None]:
        """For forward passes after which :meth:`differentiate` is asked for the gradients of these parameters alone:
        those of the matrices, the head's above all, would take more memory than a step does."""
        others = [p for name, p in self.named() if name not in names]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def differentiate(self, loss: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor]:
        """Gradients of some parameters, left nowhere else; in several processes perhaps summed over them."""
        parameters = dict(self.named())
        found = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True, materialize_grads=True)
        return list(found)

    def wide_gradients(self, optimizer: MasterOptimizer) -> WideGradients:
        """Where a step's micro-batches add the gradients of embedding and head, which can be most of the model: float32
        buffers that live from step to step, with no further [V, D] beside them."""
        embedding, head = self.model.embed_tokens.weight, self.model.lm_head_weight  # one, where the two are tied
        found = {one.parameter: one.float_gradient() for one in optimizer.trained if one.parameter in {embedding, head}}
        return WideGradients(*(found.get(cast(nn.Parameter, weight)) for weight in (embedding, head)))

    def sum_gradients(self, optimizer: MasterOptimizer) -> None:
        """Over all processes, after a step's last micro-batch."""
        if self.world.size > 1:
            self.world.sum_([one.float_gradient() for one in optimizer.trained])

    def grad_norm(self, optimizer: MasterOptimizer) -> torch.Tensor:
        """Of the summed gradient: the same number everywhere."""
        return optimizer.grad_norm()

    def whole(self) -> Decoder:
        """The model in one piece and in its own type; in the first process. Every process has to call this."""
        return self.model

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Write this process's parts of tensors called kind/parameter; here that is all of them.

        Returns:
            Of the files that need not be read again for it, their names and SHA-256.
        """
        safetensors.torch.save_file(dict(tensors), folder / _OPTIMIZER)
        return {}

    def load(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What :meth:`save` wrote of these tensors. Where it was written in parts, by any number of processes, the
        tensors themselves are filled."""
        if not is_sharded(folder):
            return safetensors.torch.load_file(folder / _OPTIMIZER)
        # imported here: it takes a second
        from torch.distributed.checkpoint import state_dict_loader

        state_dict_loader.load(dict(tensors), checkpoint_id=folder / STATE, no_dist=True)
        return tensors


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint was written by several processes together."""
    return (folder / STATE).is_dir()


def idle(batch: VarlenBatch) -> VarlenBatch:
    """A batch that gives no loss and gradients of zero."""
    return dataclasses.replace(batch, weights=torch.zeros_like(batch.weights))
