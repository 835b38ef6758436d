"""The engine's front: prompts in, text out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from fastsft.engine.blocks import BlockAllocator, KVCache
from fastsft.engine.decode import decode
from fastsft.engine.prefill import prefill
from fastsft.engine.request import (
    Detokenizer,
    PromptError,
    RequestOutput,
    SamplingParams,
    Sequence,
    as_prompt,
    draw_seed,
    text_problem,
)
from fastsft.engine.sampling import draw
from fastsft.engine.scheduler import Scheduler
from fastsft.models.decoder import Decoder
from fastsft.models.fim import Fim
from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import load_model
from fastsft.ops.fim_rows import MIDDLE, PREFIX, SUFFIX


class LLM:
    """Batched generation over a paged key-value cache.

    Args:
        model: a Hugging Face folder, or a loaded decoder (then ``tokenizer`` must be given too).
        dtype: of the weights and the cache, for a folder.
        block_size: tokens per cache block.
        kv_cache_bytes: memory of the cache; ``num_blocks`` sets it directly.
        max_num_seqs: sequences running at once.
        max_batched_tokens: prompt tokens computed in one step.

    Raises:
        ValueError: a cache too small for one block, a model that is not on the CPU, or arguments that contradict each
            other.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        block_size: int = 16,
        kv_cache_bytes: int = 256 << 20,
        num_blocks: int | None = None,
        max_num_seqs: int = 64,
        max_batched_tokens: int = 4096,
    ) -> None:
        if isinstance(model, Decoder):
            if tokenizer is None:
                raise ValueError("LLM: tokenizer: needed beside a loaded model")
            self.model, self.tokenizer = model, tokenizer
        else:
            self.model = load_model(Path(model), dtype=dtype)
            self.tokenizer = tokenizer or Tokenizer.from_folder(model)
        config = self.model.config
        weights = self.model.lm_head_weight
        if weights.device.type != "cpu":
            raise ValueError(f"LLM: model: expected on the CPU (the engine has no other path), got {weights.device}")
        if num_blocks is None and block_size >= 1:
            num_blocks = kv_cache_bytes // KVCache.bytes_per_block(config, block_size, weights.dtype)
        if num_blocks is None or min(num_blocks, block_size) < 1 or max_num_seqs < 1 or max_batched_tokens < 1:
            raise ValueError(
                "LLM: expected at least 1 each, got "
                f"{num_blocks=}, {block_size=}, {max_num_seqs=}, {max_batched_tokens=} ({kv_cache_bytes=})"
            )
        self._end_ids = self._find_end_ids()
        self._cache = KVCache(config, num_blocks=num_blocks, block_size=block_size, dtype=weights.dtype)
        self._allocator = BlockAllocator(num_blocks)
        self._capacity = min(num_blocks * block_size, config.max_position_embeddings)
        self._scheduler = Scheduler(
            self._allocator, block_size=block_size, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens
        )

    def _find_end_ids(self) -> tuple[int, ...]:
        """The tokenizer's, which read generation_config.json; without that file, as in transformers, config.json's."""
        found = self.tokenizer.eos_ids
        given = self.model.config.source.get("eos_token_id")
        if given is None or "generation_config.json" in self.tokenizer.files:
            return found
        return tuple(dict.fromkeys([*found, *(given if isinstance(given, list) else [given])]))

    @torch.inference_mode()
    def generate(
        self,
        prompts: str | dict[str, Any] | list[str] | list[dict[str, Any]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        progress: bool | Callable[[int, int], None] = False,
    ) -> list[RequestOutput]:
        """Continue each prompt.

        Args:
            prompts: a text, ``{"prompt_token_ids": [...]}``, or a list of either.
            params: one for all prompts, or one per prompt.
            progress: True shows a bar; a function is called after each step with (finished, all) sequences.

        Returns:
            One output per prompt, in order.

        Raises:
            PromptError: an empty prompt, or one that does not fit the cache or the model's context (with the numbers).
            ValueError: a wrong number or kind of params.
        """
        listed: list[Any] = prompts if isinstance(prompts, list) else [prompts]
        each = params if isinstance(params, list) else [params or SamplingParams()] * len(listed)
        if len(each) != len(listed):
            raise ValueError(f"generate: params: expected {len(listed)}, one per prompt, got {len(each)}")
        for i, p in enumerate(each):
            if not isinstance(p, SamplingParams):
                raise ValueError(f"generate: params[{i}]: expected SamplingParams, got {p!r:.200}")
        requests = [self._request(i, prompt, p) for i, (prompt, p) in enumerate(zip(listed, each, strict=True))]
        sequences = [s for _, group in requests for s in group]
        with _reporter(progress, sequences) as report:
            try:
                for _, group in requests:
                    self._scheduler.add(group[0])
                while self._scheduler.busy:
                    self._step()
                    report()
            finally:
                self._scheduler.waiting.clear()
                for sequence in list(self._scheduler.running):
                    self._scheduler.finish(sequence)
        return [
            RequestOutput(text, tuple(group[0].tokens[: group[0].prompt_len]), tuple(s.output() for s in group))
            for text, group in requests
        ]

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        progress: bool | Callable[[int, int], None] = False,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, written out by the model's chat template.

        Args:
            progress: as in :meth:`generate`.
            template: tools and whatever else the template reads.
        """
        if not messages or not isinstance(messages, list):
            raise ValueError(f"chat: messages: expected a list of at least one message, got {messages!r:.200}")
        several: list[Any] = messages if isinstance(messages[0], list) else [messages]
        template["add_generation_prompt"] = True
        texts = [self.tokenizer.render_chat(m, **template) for m in several]
        for number, text in enumerate(texts):
            if (problem := text_problem(text)) is not None:
                raise PromptError(number, problem)
        # The template writes every special token, as in training: nothing is put before it.
        prompts = [{"prompt_token_ids": self.tokenizer.encode_chat(m, **template)} for m in several]
        outputs = self.generate(prompts, params, progress=progress)
        return [dataclasses.replace(o, prompt=text) for o, text in zip(outputs, texts, strict=True)]

    def infill(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        *,
        order: Literal["psm", "spm"] = "psm",
        format: str = "auto",
        markers: tuple[str, ...] = (),
    ) -> RequestOutput:
        """The text between ``prefix`` and ``suffix``. Any token of the format ends it, besides the model's end tokens.

        Args:
            order: prefix-suffix-middle, or suffix-prefix-middle, in which the answer goes on where the prefix ends: the
                easier one for a small model that was trained in both. A format may have one order alone.
            format: "qwen", "starcoder", ... (``fastsft.models.fim.FORMATS``), or "auto": the one whose tokens the
                vocabulary has.
            markers: instead of a format, the tokens before prefix, suffix and middle.

        Raises:
            ValueError: no format or several fit, a token of it is not one of this model, the text cannot be encoded, or
                another ``order``.
        """
        if order not in ("psm", "spm"):
            raise ValueError(f"infill: order: expected 'psm' or 'spm', got {order!r}")
        try:
            fim = Fim.find(self.tokenizer, format, markers)
        except ValueError as error:
            raise ValueError(f"infill: {error}") from None
        for name, text in (("prefix", prefix), ("suffix", suffix)):
            if (problem := text_problem(text)) is not None:
                raise ValueError(f"infill: {name}: {problem}")
        (before,) = self.tokenizer.encode_text([prefix])
        (after,) = self.tokenizer.encode_text([suffix], continues=True)
        texts = {PREFIX: before, SUFFIX: after, MIDDLE: []}
        layout = fim.layout(order == "spm")
        prompt = [*self.tokenizer.prefix_ids, *(i for item in layout for i in (texts[item] if item < 0 else [item]))]
        params = params or SamplingParams()
        if not params.ignore_eos:
            params = dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *fim.stop_ids))
        return self.generate({"prompt_token_ids": prompt}, params)[0]

    def _request(self, number: int, prompt: Any, params: SamplingParams) -> tuple[str | None, list[Sequence]]:
        text, ids = as_prompt(prompt)
        if ids is None:
            if (problem := text_problem(text or "")) is not None:
                raise PromptError(number, problem)
            ids = [*self.tokenizer.prefix_ids, *self.tokenizer.encode(text or "")]
            if ids[:2] == [self.tokenizer.bos_id] * 2:  # the text, from a chat template, brought its own
                ids = ids[1:]
        if not ids:
            raise PromptError(number, "expected at least one token, got an empty prompt")
        if (problem := self._unknown(ids)) is not None:
            raise PromptError(number, problem)
        if (problem := self._unknown(params.stop_token_ids)) is not None:
            raise ValueError(f"generate: params: stop_token_ids: {problem}")
        if len(ids) >= self._capacity:
            held = self._allocator.num_blocks * self._cache.block_size
            context = self.model.config.max_position_embeddings
            problem = (
                f"{len(ids)} tokens leave no room to generate: the cache holds {held}, the model's context is {context}"
            )
            raise PromptError(number, problem)
        seed = draw_seed() if params.seed is None else params.seed
        limit = min(len(ids) + params.max_tokens, self._capacity)
        group = [
            Sequence(
                number, i, list(ids), len(ids), limit, params, Detokenizer(self.tokenizer, params.skip_special_tokens),
                seed + i,
            )
            for i in range(params.n)
        ]  # fmt: skip
        group[0].siblings = group[1:]
        return text, group

    def _unknown(self, ids: Iterable[int]) -> str | None:
        """What is wrong with the first id that the model does not have."""
        vocabulary = self.model.config.vocab_size
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        return None if wrong is None else f"expected token ids in [0, {vocabulary}), got {wrong}"

    def _step(self) -> None:
        step = self._scheduler.schedule()
        if step.prefill:
            complete, logits = prefill(self.model, self._cache, step.work)
            if logits is None:
                return
            complete, logits = self._fork(complete, logits)
        else:
            complete = [s for s, _ in step.work]
            logits = decode(self.model, self._cache, complete)
        draw(complete, logits, self._end_ids)
        for sequence in complete:
            if sequence.finish_reason is not None:
                self._scheduler.finish(sequence)

    def _fork(self, complete: list[Sequence], logits: torch.Tensor) -> tuple[list[Sequence], torch.Tensor]:
        """Let the siblings of a computed prompt draw from the same logits."""
        rows = list(range(len(complete)))
        for row, parent in enumerate(list(complete)):
            for child in parent.siblings:
                copy = self._scheduler.fork(parent, child)
                if copy is not None:
                    self._cache.copy_block(*copy)
                if child.computed:
                    complete.append(child)
                    rows.append(row)
            parent.siblings = []
        return complete, logits[rows]


@contextlib.contextmanager
def _reporter(progress: bool | Callable[[int, int], None], sequences: list[Sequence]) -> Iterator[Callable[[], None]]:
    """What to call after each step."""
    total = len(sequences)

    def finished() -> int:
        return sum(s.finish_reason is not None for s in sequences)

    if progress is False:
        yield lambda: None
    elif progress is not True:
        function = progress
        yield lambda: function(finished(), total)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total, speed="")

            def show() -> None:
                seconds = bar.tasks[0].elapsed or 0.0
                speed = f"{sum(s.generated for s in sequences) / seconds:,.0f} tokens/s" if seconds else ""
                bar.update(task, completed=finished(), speed=speed)

            yield show
