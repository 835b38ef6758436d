"""Fully sharded data parallelism: of every weight, gradient and moment each process has its part of the rows.

torch's FSDP2 (``fully_shard``, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) gathers a layer
in the model's type when it is about to run and sums its gradients in float32 where they belong. The trained parameters
themselves are float32 here: they are the optimizer's masters, and what is gathered is their rounded copy, as a single
process has it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastsft.config import ConfigError
from fastsft.models.decoder import Decoder
from fastsft.train.checkpoint import sha256
from fastsft.train.distributed import World
from fastsft.train.optim import MasterOptimizer
from fastsft.train.parallel import STATE, Copies, is_sharded
from fastsft.train.trained import WideGradients

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


class Shards(Copies):
    """The model is changed in place; the optimizer is built on :attr:`parameters`, this process's parts.

    All processes run every forward and backward pass together, so that one without a micro-batch left runs another's
    with weights of zero.

    Raises:
        ConfigError: this torch cannot sum gradients where it would average them.
    """

    sharded = True

    def __init__(self, model: Decoder, world: World) -> None:
        super().__init__(model, world)
        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
            raise ConfigError(f'train.parallel: "fsdp" needs a newer torch, got {torch.__version__}')
        # Of a model that has become shards no other is made: what the whole one looks like is kept without its weights.
        blank: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
        self._whole = copy.deepcopy(model, blank)
        mesh = init_device_mesh("cpu", (world.size,))
        # Inputs have the right type as they are, and a copy of a buffer would take what is added to it.
        policy = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        # The loss multiplies with the head after the model's own forward pass: what is not in a layer stays gathered.
        root = fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # each by itself: the root's settings are not those of the layers
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        model._apply(lambda p: p.float() if p.requires_grad else p)  # type: ignore[no-untyped-call]
        # The hidden states are a view of the last norm's output, and nothing writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._root = root
        # Taken now: a gathered parameter stands under the same name, as a plain tensor.
        self._every = cast("dict[str, DTensor]", dict(model.named_parameters()))
        self._trained = {name: p for name, p in self._every.items() if p.requires_grad}
        self._wide: dict[str, torch.Tensor] = {}
        self._parts = _Parts({name: nn.Parameter(p.to_local().detach()) for name, p in self._trained.items()})

    @property
    def parameters(self) -> nn.Module:
        return self._parts

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, cast(nn.Parameter, p)) for name, p in self._trained.items()]

    def turns(self, count: int) -> list[tuple[int, bool]]:
        rank, size = self.world.rank, self.world.size
        return [(min(first + rank, count - 1), first + rank < count) for first in range(0, count, size)]

    @contextmanager
    def inference(self) -> Iterator[None]:
        with torch.no_grad():  # what FSDP gathers under inference_mode could not be trained on afterwards
            yield
        # Without a backward pass the root stays gathered, and would be out of date once its parts are changed.
        self._root.reshard()

    @contextmanager
    def training(self, names: Sequence[str]) -> Iterator[None]:
        yield  # FSDP settles at the first forward pass what it gathers gradients of

    def differentiate(self, loss: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor]:
        loss.backward()  # type: ignore[no-untyped-call]
        found = [cast(DTensor, self._trained[n].grad).full_tensor() for n in names]
        for parameter in self._trained.values():
            parameter.grad = None
        return found

    def wide_gradients(self, optimizer: MasterOptimizer) -> WideGradients:
        for name in self._trained.keys() & {_EMBEDDING, _HEAD}:
            vocab, width = self._trained[name].shape
            if name not in self._wide:  # rows for equal stretches; what is beyond V stays zero
                rows = -(-vocab // self.world.size) * self.world.size
                self._wide[name] = torch.empty(rows, width)
            self._wide[name].zero_()
        views = {name: buffer[: self._trained[name].shape[0]] for name, buffer in self._wide.items()}
        return WideGradients(views.get(_EMBEDDING), views.get(_EMBEDDING if self._whole.lm_head is None else _HEAD))

    def sum_gradients(self, optimizer: MasterOptimizer) -> None:
        """FSDP has summed those that autograd handed it, at each micro-batch; all go to the optimizer's parts."""
        for name, parameter in self._trained.items():
            part = self._parts.named[name]
            part.data = parameter.to_local().detach()  # its first forward pass may have moved them
            if name in self._wide:
                part.grad = self.world.sum_rows(self._wide[name])[: len(part)]
            else:
                part.grad = None if parameter.grad is None else cast(DTensor, parameter.grad).to_local()
            parameter.grad = None

    def grad_norm(self, optimizer: MasterOptimizer) -> torch.Tensor:
        square = optimizer.grad_norm().double().square().reshape(1)
        self.world.sum_([square])
        return square[0].sqrt().float()

    def whole(self) -> Decoder:
        for name, parameter in self._every.items():
            full = parameter.full_tensor()
            if self.world.is_main:
                path, _, leaf = name.rpartition(".")
                blank = self._whole.get_parameter(name)
                filled = nn.Parameter(full.detach().to(blank.dtype), blank.requires_grad)
                self._whole.get_submodule(path).register_parameter(leaf, filled)
        return self._whole

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        state = self._assembled(tensors)
        if not self.world.is_main:  # counts of steps: the first process, which has rows of everything, tells them
            state = {key: value for key, value in state.items() if isinstance(value, DTensor)}
        state_dict_saver.save(state, checkpoint_id=folder / STATE)
        mine = (folder / STATE).glob(f"__{self.world.rank}_*.distcp")
        return {str(path.relative_to(folder)): sha256(path) for path in mine}

    def load(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        if not is_sharded(folder):
            raise ConfigError(
                f'train.parallel: {folder} was written by one process, or by several with "ddp"; '
                'go on with "ddp", or choose another output folder'
            )
        state_dict_loader.load(self._assembled(tensors), checkpoint_id=folder / STATE)
        return tensors

    def _assembled(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of tensors that are this process's parts, the tensors that they are of: the same memory."""
        state = {}
        for key, part in tensors.items():
            like = self._trained[key.partition("/")[2]]
            state[key] = part if part.ndim == 0 else _like(part, like)
        return state


class _Parts(nn.Module):
    """This process's rows under the names of the parameters that they are of, which a module of its own cannot have."""

    def __init__(self, named: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.named = named

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.named.items()


def _like(part: torch.Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
