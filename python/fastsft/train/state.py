"""What training changes, and how it is kept: the model, the optimizer's state and the averaged weights."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from fastsft.models.adapter import load_adapter, save_adapter
from fastsft.models.decoder import Decoder
from fastsft.models.lora import lora_layers, merge_lora
from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import load_model, save_model
from fastsft.train.checkpoint import replace_folder
from fastsft.train.draft import DraftTraining
from fastsft.train.ema import Ema
from fastsft.train.optim import MasterOptimizer
from fastsft.train.parallel import Copies, is_sharded


class TrainingState:
    """A model, perhaps spread over processes, with what an optimizer needs to go on.

    Args:
        average: of the weights, or None.
        draft: heads trained beside the model, or None.
        tokenizer: stands beside the model in every folder.
        base: path of the model that adapters belong to, for their folders.
    """

    def __init__(
        self,
        model: Decoder,
        parallel: Copies,
        optimizer: MasterOptimizer,
        average: Ema | None,
        draft: DraftTraining | None = None,
        *,
        tokenizer: Tokenizer,
        base: str | None,
    ) -> None:
        self.model, self.parallel, self.optimizer, self.average = model, parallel, optimizer, average
        self._draft, self._tokenizer, self._base = draft, tokenizer, base
        self._adapted = next(lora_layers(model), None) is not None

    def averaged(self) -> AbstractContextManager[None]:
        """What is evaluated and exported: the averaged weights, where there are any."""
        return self.average.applied() if self.average else nullcontext()

    def writer(self, *, background: bool) -> Callable[[Path], dict[str, str]]:
        """What writes the present state into a checkpoint's folder; see :func:`fastsft.train.checkpoint.write`.

        Args:
            background: it is called while training goes on, so it gets copies of what the next step changes in place.
        """
        model, tensors = self.model, self._tensors()
        if background:
            model, tensors = copied(model), {name: tensor.clone() for name, tensor in tensors.items()}

        def fill(folder: Path) -> dict[str, str]:
            if self.parallel.sharded:
                return self.parallel.save(folder, self._masters() | tensors)
            if self._adapted:
                save_adapter(model, folder / "adapter", base=self._base)
            else:
                self._write_model(model, folder / "model")
            return self.parallel.save(folder, tensors)

        return fill

    def restore(self, folder: Path) -> None:
        """Put a checkpoint's state in place, bit for bit."""
        if self.parallel.sharded or is_sharded(folder):
            tensors = self.parallel.load(folder, self._masters() | self._tensors())
        else:
            if self._adapted:
                load_adapter(self.model, folder / "adapter")
            else:
                saved = load_model(folder / "model", dtype=self.parallel.dtype)
                self.model.load_state_dict(saved.state_dict())
            tensors = self.parallel.load(folder, self._tensors())
        self.optimizer.load_state(tensors)
        if self.average:
            self.average.load_state(tensors)
        if self._draft:
            self._draft.load_state(tensors)

    def export(self, output: Path) -> Path:
        """Write the tuned model to ``output/model``; of adapters both themselves, to ``output/adapter``, and the model
        that they are folded into; draft heads to ``output/heads``. Nothing can be trained afterwards."""
        with self.averaged():
            model = self.parallel.whole()
            return self.parallel.world.from_main(lambda: self._export(model, output))

    def _export(self, model: Decoder, output: Path) -> Path:
        if self._draft:
            self._draft.export(output)
        target = output / "model"
        stage = output / f".model.tmp-{os.getpid()}"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()  # so that everything temporary lies inside it
        if self._adapted:
            save_adapter(model, output / "adapter", base=self._base)
            merge_lora(model)
        self._write_model(model, stage)
        replace_folder(stage, target)
        return target

    def _write_model(self, model: Decoder, folder: Path) -> None:
        save_model(model, folder)
        self._tokenizer.save(folder)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state, the averaged weights and the draft heads, by name."""
        average = self.average.state() if self.average else {}
        return self.optimizer.state() | average | (self._draft.state() if self._draft else {})

    def _masters(self) -> dict[str, torch.Tensor]:
        """The float32 weights of what is trained, by name."""
        return {f"master/{name}": master.detach() for name, master in self.optimizer.masters.items()}


def copied(model: Decoder) -> Decoder:
    """A model that training does not change: what is frozen is shared."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
