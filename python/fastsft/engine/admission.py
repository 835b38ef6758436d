"""From a request to the continuations that are scheduled: what can never be served is refused here."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable

from fastsft.engine.detokenize import Detokenizer
from fastsft.engine.live import LiveWeights
from fastsft.engine.processors import ProcessorFactory, Processors
from fastsft.engine.request import Request, RequestError, SamplingParams
from fastsft.engine.runner import Runner
from fastsft.engine.sequence import Sequence
from fastsft.models.tokenizer import Tokenizer


class Admission:
    """What is cheap is checked before anything is made."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, end_ids: tuple[int, ...], weights: LiveWeights) -> None:
        self._runner, self._tokenizer, self._weights = runner, tokenizer, weights
        self._processors = ProcessorFactory(tokenizer, runner.vocab_size, end_ids)
        self._arrivals = itertools.count()

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its continuation can have together."""
        runner = self._runner
        return min(runner.num_blocks * runner.block_size, runner.max_position_embeddings)

    def group(self, request: Request) -> list[Sequence]:
        """A request's continuations; the first one has the others as siblings.

        Raises:
            RequestError: it can never be served; the message says what does not fit.
        """
        ids, params = request.prompt_token_ids, request.params
        self._check_ids(ids)
        limit = self._limit(ids, params.max_tokens)
        adapter = self._weights.adapter(request.adapter)
        seed = int.from_bytes(os.urandom(7), "little") if params.seed is None else params.seed
        arrival = next(self._arrivals)
        continues = ids != self._tokenizer.prefix_ids
        group = [
            Sequence(
                request.request_id, i, list(ids), len(ids), limit, params,
                Detokenizer(self._tokenizer, params.skip_special_tokens, continues=continues), seed + i,
                request.priority, arrival, adapter,
            )
            for i in range(params.n if params.best_of is None else params.best_of)
        ]  # fmt: skip
        for sequence in group:
            try:
                sequence.processors = self.processors(sequence)
            except ValueError as error:
                raise RequestError(str(error)) from None
        group[0].siblings = group[1:]
        return group

    def prepare(self, params: SamplingParams) -> None:
        """Compile the guide that is asked for, if any.

        Raises:
            RequestError: it cannot be compiled.
        """
        try:
            self._processors.guide(params)
        except ValueError as error:
            raise RequestError(str(error)) from None

    def processors(self, sequence: Sequence) -> Processors | None:
        """As they are before its first step; raises as :meth:`ProcessorFactory.make` does."""
        return self._processors.make(sequence.params, sequence.tokens[: sequence.prompt_len])

    def _check_ids(self, ids: Iterable[int]) -> None:
        if not ids:
            raise RequestError("expected at least one token, got an empty prompt")
        vocabulary = self._runner.vocab_size
        if (wrong := next((i for i in ids if not 0 <= i < vocabulary), None)) is not None:
            raise RequestError(f"expected token ids in [0, {vocabulary}), got {wrong}")

    def _limit(self, ids: tuple[int, ...], max_tokens: int) -> int:
        """Tokens that the sequence may reach."""
        runner = self._runner
        if len(ids) >= self.max_model_len:
            blocks = -(-(len(ids) + 1) // runner.block_size)
            raise RequestError(
                f"{len(ids)} tokens leave no room to generate: the cache holds {runner.num_blocks * runner.block_size} "
                f"({runner.num_blocks * runner.bytes_per_block} bytes; needed: {blocks * runner.bytes_per_block}), the "
                f"model's context is {runner.max_position_embeddings}"
            )
        return min(len(ids) + max_tokens, self.max_model_len)
