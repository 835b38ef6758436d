"""The engine's front: prompts in, text out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fastsft.engine.assemble import Assembly
from fastsft.engine.load import load_core
from fastsft.engine.log_probs import PackedBatch, log_probs
from fastsft.engine.options import EngineOptions
from fastsft.engine.prompts import encode_chat, encode_infill, encode_prompt, ending_with
from fastsft.engine.request import PromptError, Request, RequestError, RequestOutput, SamplingParams, Update
from fastsft.models.decoder import Decoder
from fastsft.models.tokenizer import Tokenizer


class LLM:
    """Batched generation over a paged key-value cache.

    Args:
        model: a Hugging Face folder, or a loaded decoder (then ``tokenizer`` must be given too).
        options: the fields of :class:`~fastsft.engine.options.EngineOptions`: ``dtype``, ``quantization``,
            ``group_size``, ``kv_cache_dtype``, ``block_size``, ``kv_cache_bytes``, ``num_blocks``, ``max_num_seqs``,
            ``max_batched_tokens``, ``speculative_config`` (methods "ngram", "suffix", "draft_model" and "heads"),
            ``adapters`` (see :meth:`generate`), ``prefill_threads``, ``device``,
            ``enforce_eager``.

    Raises:
        ValueError: a value out of range, a cache too small for one block, or arguments that contradict each other or
            the device. (TypeError: an unknown option.)
    """

    def __init__(
        self, model: str | os.PathLike[str] | Decoder, tokenizer: Tokenizer | None = None, **options: Any
    ) -> None:
        self.core = load_core(model, tokenizer, EngineOptions(**options))
        self.tokenizer = self.core.tokenizer
        # request_id -> what its call waits for. One call may come out of another's ``progress``.
        self._pending: dict[str, _Call] = {}

    def generate(
        self,
        prompts: str | dict[str, Any] | list[str] | list[dict[str, Any]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        adapter: str | list[str | None] | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> list[RequestOutput]:
        """Continue each prompt.

        Args:
            prompts: a text, ``{"prompt_token_ids": [...]}``, or a list of either.
            params: one for all prompts, or one per prompt.
            adapter: the name of one for all prompts, or one per prompt; None: the model as it is.
            progress: True shows a bar; a function is called after each step with (finished, all) sequences, of which
                ``best_of`` asks for more than are returned.

        Returns:
            One output per prompt, in order.

        Raises:
            PromptError: an empty prompt, or one that does not fit the cache or the model's context (with the numbers).
            ValueError: a wrong number or kind of params, or of adapters.
        """
        listed: list[Any] = prompts if isinstance(prompts, list) else [prompts]
        each = params if isinstance(params, list) else [params or SamplingParams()] * len(listed)
        if len(each) != len(listed):
            raise ValueError(f"generate: params: expected {len(listed)}, one per prompt, got {len(each)}")
        names = adapter if isinstance(adapter, list) else [adapter] * len(listed)
        if len(names) != len(listed):
            raise ValueError(f"generate: adapter: expected {len(listed)}, one per prompt, got {len(names)}")
        for i, p in enumerate(each):
            if not isinstance(p, SamplingParams):
                raise ValueError(f"generate: params[{i}]: expected SamplingParams, got {p!r:.200}")
        asked: list[Assembly] = []
        for number, (prompt, p, name) in enumerate(zip(listed, each, names, strict=True)):
            text, ids = encode_prompt(self.tokenizer, prompt, number)
            asked.append(Assembly(Request(uuid.uuid4().hex, tuple(ids), p, adapter=name), text))
        call = _Call({one.request.request_id: one for one in asked}, sum(one.count for one in asked))
        with _reporter(progress, call) as report:
            self._complete(call, report)
        return [one.output() for one in asked]

    def _complete(self, call: _Call, report: Callable[[], None]) -> None:
        """Step until these have ended. What that adds to requests of the core's other callers stays theirs."""
        others: list[Update] = []
        self._pending.update(dict.fromkeys(call.pending, call))
        try:
            for number, one in enumerate(call.pending.values()):
                try:
                    self.core.add(one.request)
                except RequestError as error:
                    raise PromptError(number, str(error)) from None
            while call.pending:
                for update in self.core.step():
                    if not self._take(update):
                        others.append(update)
                report()
        finally:
            self.core.put_back(others)
            for request_id in call.pending:
                self.core.abort(request_id)
                del self._pending[request_id]

    def _take(self, update: Update) -> bool:
        """False: no call of this object asked for it."""
        request_id = update.request_id
        call = self._pending.get(request_id)
        if call is None:
            return False
        call.take(update)
        if request_id not in call.pending:
            del self._pending[request_id]
        return True

    def score(
        self,
        prompts: str | dict[str, Any] | list[str] | list[dict[str, Any]],
        *,
        adapter: str | list[str | None] | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> list[list[float]]:
        """Log-probabilities of given texts, under the whole softmax: to the bit those that drawing the tokens reports.

        Args:
            prompts, adapter, progress: as in :meth:`generate`; a text may fill the model's context.

        Returns:
            For each text one number per token but the first: entry t is of token t + 1 after tokens 0 to t.

        Raises:
            PromptError, ValueError: as :meth:`generate` does.
        """
        listed: list[Any] = prompts if isinstance(prompts, list) else [prompts]
        texts = [encode_prompt(self.tokenizer, prompt, number)[1] for number, prompt in enumerate(listed)]
        # The last token is what a draw is left with: nothing has to be computed after it, so it needs no place.
        params = [
            SamplingParams(
                max_tokens=1, ignore_eos=True, logprobs=0, prompt_logprobs=0, allowed_token_ids=ids[-1:] or None
            )
            for ids in texts
        ]
        begun: list[Any] = [{"prompt_token_ids": ids[:-1] if len(ids) > 1 else ids} for ids in texts]
        outputs = self.generate(begun, params, adapter=adapter, progress=progress)
        scored = []
        for ids, output in zip(texts, outputs, strict=True):
            each = [*(output.prompt_logprobs or ())[1:], *(output.outputs[0].logprobs or ())]
            scored.append([shown[i] for i, shown in zip(ids[1:], each, strict=False) if shown])
        return scored

    def log_probs(self, model: Decoder, batch: PackedBatch) -> Tensor:
        """Log-probabilities of a packed batch's targets: their values are the engine's, to the bit those that drawing
        the tokens reports, and their gradients those of the kernels that train the model.

        Args:
            model: the decoder in training, whose weights of now the engine has: see :meth:`update_weights`.
            batch: each target is the token after its own in the same document, or -100.

        Returns:
            float32 [T], 0 at targets of -100; differentiable, unless autograd is off.

        Raises:
            PromptError: a document does not fit the cache or the model's context.
            ValueError: the engine's weights are not the model's, or another batch.
        """
        self.core.check_weights("log_probs", model)
        return log_probs(self.score, model, batch)

    def update_weights(self, model: Decoder) -> int:
        """Go on with the weights of another decoder, or with those that this one has now; nothing is loaded.

        Args:
            model: of the same architecture.

        Returns:
            Their version, which each output carries (``weight_versions``). It begins at 0.

        Raises:
            ValueError: another architecture.
        """
        return self.core.update_weights(model)

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        adapter: str | list[str | None] | None = None,
        progress: bool | Callable[[int, int], None] = False,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, written out by the model's chat template.

        Args:
            messages: of one conversation, as ``{"role": ..., "content": ...}``, or a list of conversations.
            params, adapter, progress: as in :meth:`generate`.
            template: tools and whatever else the template reads.

        Returns:
            One output per conversation, in order; ``prompt`` is what the template wrote.

        Raises:
            TemplateError: a conversation that the template refuses. PromptError: one that does not fit.
            ValueError: no message; otherwise as :meth:`generate`.
        """
        if not messages or not isinstance(messages, list):
            raise ValueError(f"chat: messages: expected a list of at least one message, got {messages!r:.200}")
        several: list[Any] = messages if isinstance(messages[0], list) else [messages]
        encoded = [encode_chat(self.tokenizer, m, number, **template) for number, m in enumerate(several)]
        prompts = [{"prompt_token_ids": ids} for _, ids in encoded]
        outputs = self.generate(prompts, params, adapter=adapter, progress=progress)
        return [dataclasses.replace(o, prompt=text) for o, (text, _) in zip(outputs, encoded, strict=True)]

    def infill(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        *,
        order: Literal["psm", "spm"] = "psm",
        format: str = "auto",
        markers: tuple[str, ...] = (),
        adapter: str | None = None,
    ) -> RequestOutput:
        """The text between ``prefix`` and ``suffix``. Any token of the format ends it, besides the model's end tokens.

        Args:
            order: prefix-suffix-middle, or suffix-prefix-middle, in which the answer goes on where the prefix ends: the
                easier one for a small model that was trained in both. A format may have one order alone.
            format: "qwen", "starcoder", ... (``fastsft.models.fim.FORMATS``), or "auto": the one whose tokens the
                vocabulary has.
            markers: instead of a format, the tokens before prefix, suffix and middle.
            params, adapter: as in :meth:`generate`.

        Raises:
            ValueError: no format or several fit, a token of it is not one of this model, the text cannot be encoded, or
                another ``order``.
        """
        prompt, ends = encode_infill(self.tokenizer, prefix, suffix, order=order, format=format, markers=markers)
        params = ending_with(params or SamplingParams(), ends)
        return self.generate({"prompt_token_ids": prompt}, params, adapter=adapter)[0]


@dataclass
class _Call:
    """What one call waits for, of ``total`` continuations, and how far it has come."""

    pending: dict[str, Assembly]
    total: int
    finished: int = 0
    generated: int = 0

    def take(self, update: Update) -> None:
        one = self.pending[update.request_id]
        one.take(update)
        self.generated += len(update.token_ids)
        self.finished += update.finish_reason is not None
        if one.ended:
            del self.pending[update.request_id]


@contextlib.contextmanager
def _reporter(progress: bool | Callable[[int, int], None], call: _Call) -> Iterator[Callable[[], None]]:
    """What to call after each step."""
    if progress is False:
        yield lambda: None
    elif progress is not True:
        function = progress
        yield lambda: function(call.finished, call.total)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=call.total, speed="")

            def show() -> None:
                seconds = bar.tasks[0].elapsed or 0.0
                speed = f"{call.generated / seconds:,.0f} tokens/s" if seconds else ""
                bar.update(task, completed=call.finished, speed=speed)

            yield show
