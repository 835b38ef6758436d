"""The engine: requests in, what each step adds to them out. No threads, no files: LLM and the server are its fronts."""

from __future__ import annotations

import os
import time
from itertools import accumulate

import torch

from fastsft.engine.admission import Admission
from fastsft.engine.blocks import BlockAllocator
from fastsft.engine.handover import Handover, Prefill
from fastsft.engine.host import on_host
from fastsft.engine.live import LiveWeights
from fastsft.engine.request import QueueFull, Request, SamplingParams, Update
from fastsft.engine.runner import Inputs, Runner
from fastsft.engine.sampling import draw, score
from fastsft.engine.scheduler import Scheduler
from fastsft.engine.sequence import Sequence
from fastsft.engine.stats import Stats
from fastsft.engine.step import Drafter, Work
from fastsft.engine.tree import guesses_of, rows_of
from fastsft.models.decoder import Decoder
from fastsft.models.tokenizer import Tokenizer


class EngineCore:
    """Continuous batching over one model and its cache. To be used by one thread at a time.

    Args:
        end_ids: tokens that end every continuation that does not ignore them.
        max_num_seqs: continuations running at once.
        max_batched_tokens: prompt tokens computed in one step.
        max_queued_requests, max_queued_tokens: while so many requests, or tokens of them, wait, :meth:`add` refuses;
            None: never.
        drafter: guesses tokens that steps then check; the results are the same with any and with none
            (see :class:`Drafter` for the exception).
        keep_hidden: sequences carry the hidden state that their last token was drawn from, for the drafter.
        prefill: computes prompts apart, while steps go on; the results are the same with and without.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        end_ids: tuple[int, ...] = (),
        max_num_seqs: int = 64,
        max_batched_tokens: int = 4096,
        max_queued_requests: int | None = None,
        max_queued_tokens: int | None = None,
        drafter: Drafter | None = None,
        keep_hidden: bool = False,
        prefill: Prefill | None = None,
    ) -> None:
        self.tokenizer, self._keep_hidden = tokenizer, keep_hidden
        self._runner, self._end_ids, self._drafter = runner, end_ids, drafter
        self._allocator = BlockAllocator(runner.num_blocks)
        self._scheduler = Scheduler(
            self._allocator,
            block_size=runner.block_size,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            splits=prefill is not None,
        )
        self._handover = Handover(self._scheduler, prefill)
        self._weights = LiveWeights(runner, self._scheduler, self._handover)
        self._admission = Admission(runner, tokenizer, end_ids, self._weights)
        self._max_queued_requests, self._max_queued_tokens = max_queued_requests, max_queued_tokens
        self._live: dict[str, list[Sequence]] = {}  # continuations that have not ended
        self._updates: list[Update] = []  # that no step has returned
        self._steps = self._prompt_tokens = self._generated = self._drafted = self._accepted = 0

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        return bool(self._updates) or self._scheduler.busy

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its continuation can have together."""
        return self._admission.max_model_len

    @on_host
    def add(self, *requests: Request) -> None:
        """Queue requests, all or none of them.

        Raises:
            RequestError: one can never be served; the message says what does not fit. QueueFull: too much is waiting.
            ValueError: an id is that of a request in progress, or of two of these. RuntimeError: as :meth:`step`.
        """
        self._handover.check_process()
        names = [request.request_id for request in requests]
        for i, name in enumerate(names):
            if name in self._live or name in names[:i]:
                raise ValueError(f"add: request_id: expected a new one, got {name!r}, which is in progress")
        groups = [self._admission.group(request) for request in requests]
        self._check_queue()
        for group in groups:
            self._live[group[0].request_id] = group
            self._prompt_tokens += group[0].prompt_len
            self._scheduler.add(group[0])

    def prepare(self, params: SamplingParams) -> None:
        """Compile what guides the text, if anything does: :meth:`add` would take as long, which may be seconds. Another
        thread may call this, alone of all methods, while a step runs.

        Raises:
            RequestError: it cannot be compiled.
        """
        self._admission.prepare(params)

    def _check_queue(self) -> None:
        """What comes does not count: else who has more than may wait would be refused for ever where others wait."""
        waiting = self._scheduler.waiting
        for name, queued, most in (
            ("requests", len({s.request_id for s in waiting}), self._max_queued_requests),
            ("tokens", sum(len(s.tokens) for s in waiting), self._max_queued_tokens),
        ):
            if waiting and most is not None and queued >= most:
                raise QueueFull(f"{queued} {name} are waiting, of at most {most}: send this one later")

    def abort(self, request_id: str) -> bool:
        """Give a request up, whatever its state; False if none in progress has this id. No update reports it."""
        self._updates = [u for u in self._updates if u.request_id != request_id]
        group = self._live.pop(request_id, None)
        for sequence in group or ():
            self._leave(sequence)
        return group is not None

    def put_back(self, updates: list[Update]) -> None:
        """Let the next :meth:`step` return these, which came to who did not ask for them."""
        self._updates += updates

    @on_host
    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Run one step: what it added to each continuation that advanced. Nothing if there is nothing to do.

        With a prefill worker, a step that has nothing else to do waits for it.

        After an error, an interruption too, nothing of the step has happened: the next call computes again what was
        running, and draws the same.

        Raises:
            RuntimeError: with a prefill worker, in a fork of the process that made the engine: they share the cache.
        """
        if self.busy and not self._updates:
            self._handover.check_process()
            try:
                for sequence in self._compute():
                    self._tell(sequence)
            except BaseException:
                self._take_back()
                raise
            self._steps += 1
        updates, self._updates = self._updates, []
        return updates

    def _compute(self) -> list[Sequence]:
        """The sequences that have new tokens."""
        begin = time.perf_counter()
        self._handover.land(wait=False)
        step = self._scheduler.schedule(self._drafter)
        if not step.work:
            self._handover.submit(step.apart)
            self._handover.land(wait=True)
            return []
        self._runner.copy_blocks(step.copies)
        # Those of an adapter beside each other go through it together.
        step.work.sort(key=lambda w: w.sequence.adapter.number if w.sequence.adapter else 0)
        inputs = Inputs.build([(w.sequence, w.count) for w in step.work])
        ends = accumulate(w.count for w in step.work)
        wanted = [range(end - (w.count if w.scores else w.rows), end) for end, w in zip(ends, step.work, strict=True)]
        rows = [row for rows in wanted for row in rows]
        rows_R = torch.tensor(rows, dtype=torch.int64)
        hidden_RD = None
        if self._keep_hidden:
            hidden_RD = self._runner.new_hidden(len(rows))
            logits_RV = self._runner.forward(inputs, rows_R, hidden_RD)
        else:
            logits_RV = self._runner.forward(inputs, rows_R)
        self._handover.submit(step.apart)  # not before: it may have found blocks that are filled in this step
        drawn = list(range(len(rows)))
        if any(w.scores for w in step.work):
            drawn = self._score(step.work, logits_RV)
        for w in step.work:
            w.sequence.computed += w.count
        drawing = [w for w in step.work if w.rows]
        if not drawing:
            return []
        complete, drawn = self._fork(drawing, drawn)
        if drawn != list(range(len(rows))):
            logits_RV = logits_RV[drawn]
            hidden_RD = None if hidden_RD is None else hidden_RD[drawn]
        paths = [s.paths for s in complete]
        held = draw(complete, logits_RV, self._end_ids, paths)
        if hidden_RD is not None:
            self._keep(complete, held, hidden_RD)
        for sequence, mine, (best, right) in zip(complete, paths, held, strict=True):
            self._scheduler.advanced(sequence, best)
            if self._drafter and mine != [[]]:
                self._drafter.observe(sequence, mine, best, right)
                drafted = guesses_of(mine)
                sequence.drafted += drafted
                sequence.accepted += right
                self._drafted += drafted
                self._accepted += right
        if self._drafter:
            self._drafter.measured(len(inputs.ids_T), time.perf_counter() - begin)
        return complete

    def _score(self, work: list[Work], logits_RV: torch.Tensor) -> list[int]:
        """Take the log-probabilities of prompts; what is left are the rows to draw from."""
        kept: list[int] = []
        row = 0
        for w in work:
            rows = w.count if w.scores else w.rows
            if w.scores:
                score(w.sequence, logits_RV[row : row + rows], w.sequence.computed)
            row += rows
            kept += range(row - w.rows, row)
        return kept

    def _fork(self, drawing: list[Work], rows: list[int]) -> tuple[list[Sequence], list[int]]:
        """Let the siblings of a computed prompt draw from the same rows."""
        rows = list(rows)
        complete, children = [w.sequence for w in drawing], []
        for parent, end in zip(complete, accumulate(w.rows for w in drawing), strict=True):
            for child in parent.siblings:
                if self._scheduler.fork(parent, child):
                    children.append(child)
                    rows.append(rows[end - 1])
            parent.siblings = []
        return complete + children, rows

    def _keep(self, complete: list[Sequence], held: list[tuple[int, int]], hidden_RD: torch.Tensor) -> None:
        """The last draw of a sequence, i drafts of whose path held, is from the i-th of the path's rows."""
        begin = 0
        for sequence, (best, right) in zip(complete, held, strict=True):
            sequence.hidden_D = hidden_RD[begin + rows_of(sequence.paths[:best]) + right]
            begin += rows_of(sequence.paths)

    def _tell(self, sequence: Sequence) -> None:
        update = sequence.update(self._weights.version)
        self._updates.append(update)
        sequence.told(update)
        self._generated += len(update.token_ids)
        if update.finish_reason is not None:
            self._leave(sequence)
            group = self._live[sequence.request_id]
            group.remove(sequence)
            if not group:
                del self._live[sequence.request_id]

    def _take_back(self) -> None:
        """Undo a step that failed, at whatever point, as far as no update tells of it.

        Blocks may be published that were not computed, drafters and guides know drafts that are no longer there.
        """
        self._handover.give_up()
        told = {(update.request_id, update.index): update for update in self._updates}
        for name, group in list(self._live.items()):
            for sequence in group:
                if update := told.get((name, sequence.index)):
                    sequence.told(update)
                if self._drafter:
                    self._drafter.forget(sequence)
                if sequence.processors:
                    sequence.processors = self._admission.processors(sequence)
            self._live[name] = [sequence for sequence in group if sequence.take_back()]
            if not self._live[name]:
                del self._live[name]
        self._scheduler.give_up(sequence for group in self._live.values() for sequence in group)

    def _leave(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        if self._drafter:
            self._drafter.forget(sequence)

    @on_host
    def update_weights(self, model: Decoder) -> int:
        """Go on with other weights of the same architecture; returns their version, which travels with each output.

        What runs is computed again from its tokens, under the new weights.

        Raises:
            ValueError: another architecture, dtype or device.
        """
        return self._weights.update(model)

    @on_host
    def check_weights(self, what: str, model: Decoder) -> None:
        """Raise a ValueError, in the name of ``what``, unless the weights are those that the model has now."""
        self._runner.check_has(what, model)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that a request may give."""
        return self._weights.names

    @on_host
    def add_adapter(self, name: str, adapter: str | os.PathLike[str] | Decoder) -> None:
        """Let requests name an adapter (LoRA): their rows of a step go through it, whatever the others' go through.

        Args:
            name: a new one, or that of an adapter which it replaces: requests in progress go on with the old one.
            adapter: a folder as PEFT and ``fastsft train`` write it, or a decoder with the adapter on it, which is
                copied.

        Raises:
            ValueError: an empty name, a folder that cannot be read, or an adapter that does not fit the model.
        """
        self._weights.add(name, adapter)

    def remove_adapter(self, name: str) -> None:
        """Requests can no longer name it; those in progress go on with it.

        Raises:
            ValueError: there is none of this name.
        """
        self._weights.remove(name)

    def check_device(self) -> None:
        """After an error: raise a RuntimeError where the device can no longer be used, so that no step will succeed."""
        self._runner.check_device()

    def stats(self) -> Stats:
        scheduler = self._scheduler
        return Stats(
            steps=self._steps,
            graph_steps=self._runner.graph_steps,
            warm_up_seconds=self._runner.warm_up_seconds,
            waiting=len(scheduler.waiting),
            waiting_tokens=sum(len(s.tokens) for s in scheduler.waiting),
            running=len(scheduler.running),
            preemptions=scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            found_tokens=scheduler.found_tokens,
            generated_tokens=self._generated,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            blocks=self._allocator.num_blocks,
            free_blocks=self._allocator.num_free,
            cached_blocks=self._allocator.num_cached,
            evictions=self._allocator.evictions,
            prefill_failures=self._handover.failures,
            weight_version=self._weights.version,
        )
