"""Prompts that another process computes: handed over, and taken back when they are done."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol

from fastsft.engine.runner import Inputs
from fastsft.engine.scheduler import Scheduler
from fastsft.engine.step import Work
from fastsft.ops.decoder import DecoderAdapter


class Prefill(Protocol):
    """Computes prompts beside the core's steps, one job at a time (engine/prefill.py)."""

    failures: int
    """Jobs that had to be begun again."""

    def submit(self, inputs: Inputs) -> None:
        """Begin a job: nobody else touches the blocks that it writes until it is done."""

    def done(self, *, wait: bool) -> bool:
        """Whether it is done; with ``wait``, not before it is. Raises an error of the model."""

    def renew(self, adapters: Iterable[DecoderAdapter] = ()) -> None:
        """Give up the job under way, if any, at once; the next one sees the weights as they are then."""


class Handover:
    """Between the scheduler, which says what is computed apart, and who does it; None: nobody, and nothing is."""

    def __init__(self, scheduler: Scheduler, prefill: Prefill | None) -> None:
        self._scheduler, self.prefill, self._owner = scheduler, prefill, os.getpid()

    @property
    def failures(self) -> int:
        """See :class:`Prefill`."""
        return self.prefill.failures if self.prefill else 0

    def check_process(self) -> None:
        """Where prompts are computed apart, the cache is shared: a fork of this process would write into it.

        Raises:
            RuntimeError: this is not the process that made the engine.
        """
        if self.prefill and (here := os.getpid()) != self._owner:
            raise RuntimeError(
                f"engine with prefill_threads: expected to be used by the process that made it ({self._owner}), whose "
                f"cache and prefill process it is, got process {here}, forked from it: make an engine of its own there"
            )

    def submit(self, apart: list[Work]) -> None:
        """Begin the job of a step, if it has one."""
        if self.prefill and apart:
            self.prefill.submit(Inputs.build([(w.sequence, w.count) for w in apart]))

    def land(self, *, wait: bool) -> None:
        """Take over what is done; with ``wait``, all that was submitted. Raises an error of the model."""
        if self.prefill and self._scheduler.apart is not None and self.prefill.done(wait=wait):
            self._scheduler.landed()

    def settle(self) -> None:
        """Let the job under way finish; what it loses by failing is computed again. Raises as check_process does."""
        self.check_process()
        try:
            self.land(wait=True)
        except RuntimeError:
            self._scheduler.give_up()

    def renew(self, adapters: Iterable[DecoderAdapter]) -> None:
        """After :meth:`settle`: the next job sees the weights as they are then, and these adapters."""
        if self.prefill:
            self.prefill.renew(adapters)

    def give_up(self) -> None:
        """Stop the job under way, at once: blocks that it may be writing are let go."""
        if self.prefill:
            self.prefill.renew()
