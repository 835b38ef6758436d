"""What an engine computes with, its weights and adapters (LoRA), and how that is replaced while it runs."""

from __future__ import annotations

import itertools
import os

from fastsft.engine.handover import Handover
from fastsft.engine.request import RequestError
from fastsft.engine.runner import Runner
from fastsft.engine.scheduler import Scheduler
from fastsft.engine.sequence import Adapter
from fastsft.models.decoder import Decoder


class LiveWeights:
    """A change waits for the job that another process is at, whose blocks are of what there was before.

    Attributes:
        version: of the weights; it begins at 0.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, handover: Handover) -> None:
        self._runner, self._scheduler, self._handover = runner, scheduler, handover
        self.version = 0
        self._adapters: dict[str, Adapter] = {}
        self._numbers = itertools.count(1)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return tuple(self._adapters)

    def adapter(self, name: str | None) -> Adapter | None:
        """Raises RequestError where there is none of this name; None stands for the model as it is."""
        if name is None:
            return None
        if name not in self._adapters:
            known = ", ".join(map(repr, self._adapters)) or "none"
            raise RequestError(f"expected an adapter of the engine ({known}), got {name!r}")
        return self._adapters[name]

    def update(self, model: Decoder) -> int:
        """See :meth:`EngineCore.update_weights`."""
        self._handover.settle()
        self._runner.update(model)
        self._renew()
        self.version += 1
        self._scheduler.renew(self.version)
        return self.version

    def add(self, name: str, adapter: str | os.PathLike[str] | Decoder) -> None:
        """See :meth:`EngineCore.add_adapter`."""
        if not name:
            raise ValueError("add_adapter: name: expected a text, got an empty one")
        self._handover.settle()
        self._adapters[name] = Adapter(name, next(self._numbers), self._runner.pack_adapter(adapter))
        self._renew()

    def remove(self, name: str) -> None:
        """See :meth:`EngineCore.remove_adapter`."""
        if name not in self._adapters:
            raise ValueError(f"remove_adapter: name: expected one of {list(self._adapters)}, got {name!r}")
        self._handover.settle()
        del self._adapters[name]
        self._renew()  # the other process would keep it in memory

    def _renew(self) -> None:
        self._handover.renew(a.weights for a in self._adapters.values())
