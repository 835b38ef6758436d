"""A stage that chooses its mixture while it trains: more of the sources on which the model is learning.

Distribution-level curriculum by upper confidence bounds (DUMP, arXiv 2504.09710, there for reinforcement learning with
the advantage's size as the signal). Here the signal is the fall of a source's loss. The stage is a sequence of rounds;
before each, source d gets the share ``softmax(score / temperature)`` of the round's tokens with

    score_d = progress_d / max progress + sqrt(2 ln(rounds + 1) / (rounds_d + 1)),

progress_d the fall, at least 0, of its mean loss between the last two rounds that had it, and rounds_d the sum of its
shares so far: a source that was hardly seen is worth a look whatever its progress was.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.config import Config
from fastsft.data.batch import VarlenBatch
from fastsft.data.mixture import Mixture
from fastsft.data.store import SampleStore
from fastsft.train.stages import passes_of, stages_of

_TEMPERATURE = 0.5


class CurriculumStage:
    """The steps of a stage with ``curriculum = "ucb"``. What stands in its :meth:`state` and the configuration
    determine everything; the sources are those that the stage's weights have.

    Args:
        number: among the run's stages.
    """

    def __init__(self, config: Config, number: int, store: SampleStore) -> None:
        self.options = stages_of(config)[number]
        self.number = number
        self.rate = self.options.lr or config.optim.lr
        self._store, self._train, self._seed = store, config.train, config.seed
        weights = passes_of(config.data, self.options, store)
        self._mixture = Mixture(store.origins, weights, seed=config.seed + 1 + number)
        sizes = np.bincount(store.origins, minlength=len(weights))
        self._sources = [i for i, weight in enumerate(weights) if weight > 0 and sizes[i]]
        tokens = np.bincount(store.origins, store.lengths, minlength=len(weights))
        self._mean_length = {i: float(tokens[i] / sizes[i]) for i in self._sources}
        self._begin, self._round = 0, 0
        self._cursors = dict.fromkeys(self._sources, 0)  # samples drawn of each source, before this round
        self._shown = dict.fromkeys(self._sources, 0.0)  # summed shares
        self._losses: dict[int, list[float]] = {i: [] for i in self._sources}  # of the last two rounds that had it
        self._sums = {i: [0.0, 0.0] for i in self._sources}  # of this round: loss times weight, weight
        self._plan = self._make_plan() if self._sources else []
        self.steps = (self.options.max_steps or 0) if self._plan else 0

    def epoch(self, step: int) -> int:
        """The round, where other stages have an epoch."""
        return self._round

    def members(self, step: int) -> list[npt.NDArray[np.int64]]:
        """The numbers of the samples of each micro-batch of a step of the present round."""
        first = (step - self._begin) * self._train.accumulation
        return self._plan[first : first + self._train.accumulation]

    def batches(self, step: int) -> list[VarlenBatch]:
        """The micro-batches of a step of the present round."""
        return [self._store.batch(members) for members in self.members(step)]

    def observe(self, step: int, origins: dict[int, tuple[float, float]]) -> None:
        """Of the step just made: each source's weighted sum of losses, and of weights. Ends the round with its last."""
        for origin, (loss, weight) in origins.items():
            self._sums[origin][0] += loss
            self._sums[origin][1] += weight
        if (step + 1 - self._begin) * self._train.accumulation >= len(self._plan):
            self._next_round(step + 1)

    def shares(self) -> dict[int, float]:
        """Of each source, of the present round's tokens."""
        progress = {}
        for i in self._sources:
            before, after = ([math.nan] * 2 + self._losses[i])[-2:]
            progress[i] = max(0.0, before - after) if not math.isnan(before) else 0.0
        most = max(progress.values()) or 1.0
        bonus = 2 * math.log(self._round + 1)
        scores = {i: progress[i] / most + math.sqrt(bonus / (self._shown[i] + 1)) for i in self._sources}
        top = max(scores.values())
        odds = {i: math.exp((score - top) / _TEMPERATURE) for i, score in scores.items()}
        total = sum(odds.values())
        return {i: odd / total for i, odd in odds.items()}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON has it; a copy, as it may be written beside the next steps."""
        return {
            "begin": self._begin, "round": self._round, "cursors": list(self._cursors.values()),
            "shown": list(self._shown.values()), "losses": [list(pair) for pair in self._losses.values()],
            "sums": [list(pair) for pair in self._sums.values()],
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        self._begin, self._round = state["begin"], state["round"]
        self._cursors, self._shown, self._losses, self._sums = (
            dict(zip(self._sources, state[key], strict=True)) for key in ("cursors", "shown", "losses", "sums")
        )
        self._plan = self._make_plan()

    def _next_round(self, begin: int) -> None:
        for i, share in self.shares().items():
            self._shown[i] += share
            self._cursors[i] += self._count(i, share)
            loss, weight = self._sums[i]
            if weight > 0:
                self._losses[i] = [*self._losses[i][-1:], loss / weight]
        self._sums = {i: [0.0, 0.0] for i in self._sources}
        self._begin, self._round = begin, self._round + 1
        self._plan = self._make_plan()

    def _count(self, source: int, share: float) -> int:
        """Samples of a source in a round in which it has this share."""
        tokens = self.options.curriculum_steps * self._train.accumulation * self._train.tokens_per_batch
        return max(1, round(share * tokens / self._mean_length[source]))

    def _make_plan(self) -> list[npt.NDArray[np.int64]]:
        """The numbers of the samples of each micro-batch of the present round."""
        drawn = [
            self._mixture.take(i, self._cursors[i], self._cursors[i] + self._count(i, share))
            for i, share in self.shares().items()
        ]
        rng = np.random.Generator(np.random.Philox(key=[self._seed, self._round], counter=[0, 0, 1 + self.number, 0]))
        order = np.concatenate(drawn)
        order = order[rng.permutation(len(order))]
        packs = list(ops.pack_sequences(self._store.lengths[order], capacity=self._train.tokens_per_batch))
        return [order[packs[i]] for i in rng.permutation(len(packs))]
