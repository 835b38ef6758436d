"""The stages of a run in their order, and the steps that are left of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastsft.config import Config, ConfigError
from fastsft.data.store import SampleStore
from fastsft.train import light
from fastsft.train.curriculum import CurriculumStage
from fastsft.train.metrics import Display
from fastsft.train.parallel import Copies
from fastsft.train.result import Progress
from fastsft.train.stages import Stage, stages_of


class StageList:
    """The stages of a run. ``total_steps`` is final once the last of them begins: how many steps a stage has that
    leaves easy samples out is not known earlier.

    Args:
        parallel: the model, which tells what is easy for it when such a stage begins.

    Raises:
        ConfigError: a stage without samples.
    """

    def __init__(self, config: Config, store: SampleStore, parallel: Copies) -> None:
        self._config, self._store, self._parallel = config, store, parallel
        self._stages = [
            (Stage if options.curriculum == "none" else CurriculumStage)(config, number, store)
            for number, options in enumerate(stages_of(config))
        ]
        for stage in self._stages:
            if stage.steps == 0:
                raise ConfigError(
                    f"data: the weights and ratios of the sources leave no sample for the stage {stage.options.name!r}"
                )
        self.total_steps = sum(stage.steps for stage in self._stages)

    def __iter__(self) -> Iterator[Stage | CurriculumStage]:
        return iter(self._stages)

    def __getitem__(self, number: int) -> Stage | CurriculumStage:
        return self._stages[number]

    def remaining(self, progress: Progress, display: Display) -> Iterator[tuple[Stage | CurriculumStage, int]]:
        """(stage, step within it) of every step that is left; ``progress`` learns which stages have begun."""
        first, begin = progress.step, 0
        for number, stage in enumerate(self._stages):
            if number < len(progress.begun) and first >= begin + progress.begun[number]:
                begin += progress.begun[number]
                continue
            if isinstance(stage, Stage) and stage.options.drop_easy:
                stage = self._stages[number] = self._choose(stage, progress.stage if first > begin else None)
            self.total_steps = begin + sum(s.steps for s in self._stages[number:])
            display.expect(self.total_steps)
            if len(self._stages) > 1:
                display.note(f"stage {stage.options.name}: {stage.steps:,} steps")
            if first > begin:
                stage.load_state(progress.stage)
            progress.begun = [*progress.begun[:number], stage.steps]
            for within in range(max(first - begin, 0), stage.steps):
                yield stage, within
            begin += stage.steps
        self.total_steps = begin  # also of a run that was resumed after its last step

    def _choose(self, stage: Stage, saved: dict[str, Any] | None) -> Stage:
        """The stage without the samples that are easy for the model, or were so when it began: then ``saved`` tells."""
        if saved is not None:
            kept = light.unpacked(saved["kept"], len(self._store))
        else:
            kept = light.choose(
                self._parallel, self._store, share=stage.options.drop_easy,
                capacity=self._config.train.tokens_per_batch, among=stage.samples(),
            )  # fmt: skip
        return Stage(self._config, stage.number, self._store, kept)
