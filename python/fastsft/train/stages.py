"""What each optimizer step of a run trains on: stages one after the other, epochs within a stage, packed batches."""

from __future__ import annotations

import bisect
import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsft.config import Config, DataOptions, StageOptions
from fastsft.data.batch import VarlenBatch
from fastsft.data.loader import PackedLoader
from fastsft.data.mixture import passes, sources_of
from fastsft.data.store import SampleStore
from fastsft.train.light import packed


def stages_of(config: Config) -> list[StageOptions]:
    """The stages of a run; ``train.epochs`` and ``train.max_steps`` are short for a single one."""
    if config.stages:
        return list(config.stages)
    return [StageOptions(name="train", epochs=config.train.epochs, max_steps=config.train.max_steps)]


class Stage:
    """The steps of one stage: a function of the configuration, the stage's number and the samples kept.

    Args:
        number: among the run's stages.
        kept: bool [samples], those that are trained on; None: all.
    """

    def __init__(
        self, config: Config, number: int, store: SampleStore, kept: npt.NDArray[np.bool_] | None = None
    ) -> None:
        stages = stages_of(config)
        self.options = stages[number]
        self.number = number
        self._kept = kept
        self.rate = self.options.lr or config.optim.lr
        weights = passes_of(config.data, self.options, store)
        self._sources = np.flatnonzero([weight > 0 for weight in weights])
        self.loader = PackedLoader(
            store,
            capacity=config.train.tokens_per_batch,
            seed=config.seed,
            weights=weights,
            kept=kept,
        )
        self._accumulation = config.train.accumulation
        # Epochs are counted through the whole run, so that every stage has another order.
        self._first_epoch = sum(stage.epochs for stage in stages[:number])
        self._firsts = self._plan_epochs()
        self.steps = min(self._firsts[-1], self.options.max_steps or self._firsts[-1])

    def epoch(self, step: int) -> int:
        """The epoch of the stage's step ``step``, counted through the run."""
        return self._first_epoch + bisect.bisect_right(self._firsts, step) - 1

    def members(self, step: int) -> list[npt.NDArray[np.int64]]:
        """The numbers of the samples of each micro-batch of a step; an epoch's last may have fewer than
        ``train.accumulation`` of them."""
        epoch = self.epoch(step)
        first = (step - self._firsts[epoch - self._first_epoch]) * self._accumulation
        end = min(first + self._accumulation, self.loader.num_batches(epoch))
        return [self.loader.members(epoch, i) for i in range(first, end)]

    def samples(self) -> npt.NDArray[np.int64]:
        """The numbers of the samples of all sources that the stage's weights and ratios have."""
        return np.flatnonzero(np.isin(self.loader.store.origins, self._sources))

    def batches(self, step: int) -> list[VarlenBatch]:
        """The micro-batches of a step."""
        return [self.loader.store.batch(members) for members in self.members(step)]

    def observe(self, step: int, origins: dict[int, tuple[float, float]]) -> None:
        """Called after each step; what comes does not depend on it."""

    def state(self) -> dict[str, Any]:
        return {} if self._kept is None else {"kept": packed(self._kept)}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def _plan_epochs(self) -> list[int]:
        """The first step of each epoch that will be entered, and the step after the last."""
        firsts = [0]
        for epoch in range(self.options.epochs):
            batches = self.loader.num_batches(self._first_epoch + epoch)
            firsts.append(firsts[-1] + math.ceil(batches / self._accumulation))
            if self.options.max_steps is not None and firsts[-1] >= self.options.max_steps:
                break
        return firsts


def passes_of(data: DataOptions, stage: StageOptions, store: SampleStore) -> list[Fraction]:
    """How often an epoch of the stage goes through each source."""
    sources = sources_of(data)
    if stage.weights:
        sources = [dataclasses.replace(s, weight=stage.weights.get(s.name, 0.0)) for s in sources]
    ratios, table = (data.ratios, "data.ratios in") if stage.ratios is None else (stage.ratios, "ratios of")
    mixed = dataclasses.replace(data, train=[], sources=sources, ratios=ratios)
    counts = np.bincount(store.origins, minlength=len(sources)).tolist()
    return passes(mixed, counts, table=f"{table} the stage {stage.name!r}")
