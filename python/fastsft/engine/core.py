"""The engine: requests in, what each step adds to them out. No threads, no files: LLM and the server are its fronts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastsft.engine.blocks import BlockAllocator
from fastsft.engine.detokenize import Detokenizer
from fastsft.engine.request import QueueFull, Request, RequestError, Update
from fastsft.engine.runner import Inputs, Runner
from fastsft.engine.sampling import draw
from fastsft.engine.scheduler import Scheduler
from fastsft.engine.sequence import Sequence
from fastsft.models.decoder import Decoder
from fastsft.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Stats:
    """Counts since the start, and what is there now."""

    steps: int
    waiting: int
    """Continuations that hold no blocks; ``waiting_tokens`` are theirs."""
    waiting_tokens: int
    running: int
    preemptions: int
    prompt_tokens: int
    """Of all requests accepted."""
    generated_tokens: int
    blocks: int
    free_blocks: int
    weight_version: int


class EngineCore:
    """Continuous batching over one model and its cache. To be used by one thread at a time.

    Args:
        end_ids: tokens that end every continuation that does not ignore them.
        max_num_seqs: continuations running at once.
        max_batched_tokens: prompt tokens computed in one step.
        max_queued_requests, max_queued_tokens: how many requests may wait, and tokens of them; None: any number.
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
    ) -> None:
        self.tokenizer = tokenizer
        self._runner, self._end_ids = runner, end_ids
        self._allocator = BlockAllocator(runner.num_blocks)
        self._scheduler = Scheduler(
            self._allocator,
            block_size=runner.block_size,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
        )
        self._max_queued_requests, self._max_queued_tokens = max_queued_requests, max_queued_tokens
        self._live: dict[str, list[Sequence]] = {}  # continuations that have not ended
        self._version = 0
        self._steps = self._prompt_tokens = self._generated = 0

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        return self._scheduler.busy

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never be served; the message says what does not fit. QueueFull: too much is waiting.
            ValueError: its id is that of a request in progress.
        """
        ids, params = request.prompt_token_ids, request.params
        if request.request_id in self._live:
            raise ValueError(f"add: request_id: expected a new one, got {request.request_id!r}, which is in progress")
        if not ids:
            raise RequestError("expected at least one token, got an empty prompt")
        if (problem := self._unknown(ids)) is not None:
            raise RequestError(problem)
        if (problem := self._unknown(params.stop_token_ids)) is not None:
            raise RequestError(f"params: stop_token_ids: {problem}")
        limit = self._limit(ids, params.max_tokens)
        self._check_queue(len(ids))
        seed = _random_seed() if params.seed is None else params.seed
        group = [
            Sequence(
                request.request_id, i, list(ids), len(ids), limit, params,
                Detokenizer(self.tokenizer, params.skip_special_tokens), seed + i, request.priority,
            )
            for i in range(params.n)
        ]  # fmt: skip
        group[0].siblings = group[1:]
        self._live[request.request_id] = group
        self._prompt_tokens += len(ids)
        self._scheduler.add(group[0])

    def _unknown(self, ids: Iterable[int]) -> str | None:
        """What is wrong with the first id that the model does not have."""
        vocabulary = self._runner.vocab_size
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        return None if wrong is None else f"expected token ids in [0, {vocabulary}), got {wrong}"

    def _limit(self, ids: tuple[int, ...], max_tokens: int) -> int:
        """Tokens that the sequence may reach."""
        runner = self._runner
        held, context = runner.num_blocks * runner.block_size, runner.max_position_embeddings
        if len(ids) >= min(held, context):
            blocks = -(-(len(ids) + 1) // runner.block_size)
            raise RequestError(
                f"{len(ids)} tokens leave no room to generate: the cache holds {held} "
                f"({runner.num_blocks * runner.bytes_per_block} bytes; needed: {blocks * runner.bytes_per_block}), the "
                f"model's context is {context}"
            )
        return min(len(ids) + max_tokens, held, context)

    def _check_queue(self, tokens: int) -> None:
        """An empty queue takes any request."""
        waiting = self._scheduler.waiting
        queued = sum(len(s.tokens) for s in waiting)
        requests, most = self._max_queued_requests, self._max_queued_tokens
        if not waiting:
            return
        if requests is not None and len(waiting) >= requests:
            raise QueueFull(f"{len(waiting)} requests are waiting, of at most {requests}")
        if most is not None and queued + tokens > most:
            raise QueueFull(f"{queued} tokens are waiting, of at most {most}; {tokens} more do not fit")

    def abort(self, request_id: str) -> bool:
        """Give a request up, whatever its state; False if none in progress has this id. No update reports it."""
        group = self._live.pop(request_id, None)
        for sequence in group or ():
            self._scheduler.remove(sequence)
        return group is not None

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Run one step: what it added to each continuation that advanced. None of them if there is nothing to do."""
        if not self.busy:
            return []
        work = self._scheduler.schedule().work
        inputs = Inputs.build(work, self._runner.block_size)
        complete, rows = [], []
        for i, (sequence, count) in enumerate(work):
            if sequence.computed + count == len(sequence.tokens):
                complete.append(sequence)
                rows.append(int(inputs.cu_seqlens[i + 1]) - 1)
        logits_RV = self._runner.forward(inputs, torch.tensor(rows, dtype=torch.int64))
        self._steps += 1
        for sequence, count in work:
            sequence.computed += count
        if not complete:
            return []
        complete, logits_RV = self._fork(complete, logits_RV)
        draw(complete, logits_RV, self._end_ids)
        return [self._advanced(sequence) for sequence in complete]

    def _advanced(self, sequence: Sequence) -> Update:
        update = sequence.update(self._version)
        self._generated += len(update.token_ids)
        if update.finish_reason is not None:
            self._scheduler.remove(sequence)
            group = self._live[sequence.request_id]
            group.remove(sequence)
            if not group:
                del self._live[sequence.request_id]
        return update

    def _fork(self, complete: list[Sequence], logits_RV: torch.Tensor) -> tuple[list[Sequence], torch.Tensor]:
        """Let the siblings of a computed prompt draw from the same logits."""
        rows = list(range(len(complete)))
        for row, parent in enumerate(list(complete)):
            for child in parent.siblings:
                copy = self._scheduler.fork(parent, child)
                if copy is not None:
                    self._runner.copy_block(*copy)
                if child.computed:
                    complete.append(child)
                    rows.append(row)
            parent.siblings = []
        return complete, logits_RV[rows]

    def update_weights(self, model: Decoder) -> int:
        """Go on with other weights of the same architecture; returns their version, which travels with each output.

        What runs is computed again from its tokens, under the new weights.

        Raises:
            ValueError: another architecture, dtype or device.
        """
        self._runner.update(model)
        self._scheduler.preempt_all()
        self._version += 1
        return self._version

    def stats(self) -> Stats:
        scheduler = self._scheduler
        return Stats(
            steps=self._steps,
            waiting=len(scheduler.waiting),
            waiting_tokens=sum(len(s.tokens) for s in scheduler.waiting),
            running=len(scheduler.running),
            preemptions=scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            blocks=self._allocator.num_blocks,
            free_blocks=self._allocator.num_free,
            weight_version=self._version,
        )


def _random_seed() -> int:
    return int.from_bytes(os.urandom(7), "little")
