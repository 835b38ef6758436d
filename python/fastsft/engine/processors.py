"""What a request changes in its logits before the draw: bias, penalties, and which tokens may come at all.

Shape suffixes: K rows of one sequence, V vocabulary.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import numpy as np
import torch

from fastsft.engine.guide import Guide, Guides, StructuredOutputs
from fastsft.engine.request import SamplingParams
from fastsft.models.tokenizer import Tokenizer
from fastsft.ops.penalties import penalise


class Processors:
    """Of one continuation. Row j of a call continues the text and the first j tokens of a draft: what a row gives does
    not depend on whether it stands for a draft or follows tokens that were drawn.

    Bias first, then penalties, then what is barred, as in vLLM. The text is kept as it grows, so that a step costs what
    is new in it; under penalties, also a pass over its tokens.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokens: Sequence[int],
        vocab_size: int,
        end_ids: Sequence[int],
        bad_words: Sequence[Sequence[int]] = (),
        guide: Guide | None = None,
    ) -> None:
        self._params, self._prompt_len = params, len(tokens)
        self._guide, self._guided, self._stuck = guide, len(tokens), False
        self._text = np.array([*tokens, *[0] * 64], dtype=np.int32)
        self._known = len(tokens)
        bias = params.logit_bias or {}
        self._bias_ids = torch.tensor(list(bias), dtype=torch.int64)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        self._penalties = {
            "repetition": params.repetition_penalty,
            "frequency": params.frequency_penalty,
            "presence": params.presence_penalty,
        }
        self._penalised = list(self._penalties.values()) != [1, 0, 0]
        self._barred_V: torch.Tensor | None = None
        single = [w[0] for w in bad_words if len(w) == 1]
        if params.allowed_token_ids is not None or single:
            self._barred_V = torch.full((vocab_size,), params.allowed_token_ids is not None)
            self._barred_V[list(params.allowed_token_ids or ())] = False
            self._barred_V[single] = True
        self._phrases = [list(w) for w in bad_words if len(w) > 1]
        ends = [] if params.ignore_eos else [*end_ids]
        self._ends = sorted({*ends, *params.stop_token_ids}) if params.min_tokens else []

    @property
    def idle(self) -> bool:
        """Whether they change nothing."""
        return not (len(self._bias) or self._penalised or self.bars)

    @property
    def bars(self) -> bool:
        """Whether a row may be left with no token at all."""
        return bool(self._barred_V is not None or self._phrases or self._ends or self._guide)

    def apply(self, logits_KV: torch.Tensor, tokens: Sequence[int], draft: Sequence[int]) -> None:
        """Change the logits of the rows after ``tokens`` (prompt and text) and each token of ``draft``, in place."""
        rows = len(draft) + 1
        if len(self._bias):
            logits_KV[:, self._bias_ids] += self._bias
        if self._penalised:
            text = self._extended(tokens, draft)
            penalise(logits_KV, text, prompt=self._prompt_len, first=len(tokens), **self._penalties)
        if self._barred_V is not None:
            logits_KV.masked_fill_(self._barred_V, -torch.inf)
        generated = len(tokens) - self._prompt_len
        if (held := min(rows, self._params.min_tokens - generated)) > 0 and self._ends:
            logits_KV[:held, self._ends] = -torch.inf
        if self._phrases:
            self._bar_phrases(logits_KV, tokens, draft)
        if self._guide is not None:
            self._follow_guide(self._guide, logits_KV, tokens, draft)

    def _follow_guide(self, guide: Guide, logits_KV: torch.Tensor, tokens: Sequence[int], draft: Sequence[int]) -> None:
        self._stuck = self._stuck or not all(guide.follow(token) for token in tokens[self._guided :])
        self._guided = len(tokens)
        if self._stuck:  # no token is left: this text ends in an error, and no other
            logits_KV.fill_(-torch.inf)
            return
        for row, allowed_V in enumerate(guide.allowed(draft)):
            logits_KV[row].masked_fill_(~allowed_V, -torch.inf)

    def _bar_phrases(self, logits_KV: torch.Tensor, tokens: Sequence[int], draft: Sequence[int]) -> None:
        longest = max(map(len, self._phrases)) - 1
        begin = max(self._prompt_len, len(tokens) - longest)
        text = [*tokens[begin:], *draft]
        for row in range(len(draft) + 1):
            end = len(tokens) - begin + row
            for phrase in self._phrases:
                before = phrase[:-1]
                if end >= len(before) and text[end - len(before) : end] == before:
                    logits_KV[row, phrase[-1]] = -torch.inf

    def _extended(self, tokens: Sequence[int], draft: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        count = len(tokens) + len(draft)
        if count > len(self._text):
            self._text = np.concatenate([self._text, np.zeros(count, dtype=np.int32)])
        if len(tokens) > self._known:
            self._text[self._known : len(tokens)] = tokens[self._known :]
            self._known = len(tokens)
        self._text[len(tokens) : count] = draft
        return self._text[:count]


class ProcessorFactory:
    """Makes the processors of each continuation, for one model.

    Args:
        end_ids: the model's end tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, tuple(end_ids)
        self._guides: Guides | None = None
        self._making_guides = threading.Lock()
        self._tokens_of_words = functools.lru_cache(maxsize=64)(self._words)  # continuations of a request have the same

    def make(self, params: SamplingParams, prompt: Sequence[int]) -> Processors | None:
        """None where the request asks for nothing.

        Raises:
            ValueError: a token id that the model does not have, or something that cannot be compiled.
            ImportError: ``structured_outputs`` without llguidance.
        """
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for i in getattr(params, name) or ():
                if not 0 <= i < self._vocab_size:
                    raise ValueError(f"params: {name}: expected token ids in [0, {self._vocab_size}), got {i}")
        guide = self.guide(params)
        words = self._tokens_of_words(tuple(params.bad_words))
        found = Processors(params, prompt, self._vocab_size, self._end_ids, words, guide)
        return None if found.idle else found

    def guide(self, params: SamplingParams) -> Guide | None:
        """None where no structure is asked for. Raises as :meth:`make`; any thread may call it."""
        if not isinstance(params.structured_outputs, StructuredOutputs):  # SamplingParams leaves no dictionary
            return None
        with self._making_guides:
            if self._guides is None:
                self._guides = Guides(self._tokenizer, self._vocab_size, self._end_ids)
        return self._guides.guide(params.structured_outputs)

    def _words(self, words: Sequence[str]) -> list[list[int]]:
        """A word's tokens at the start of a text and, where a space is a token's part, after one (as in vLLM)."""
        found: list[list[int]] = []
        for word in words:
            inside = self._tokenizer.encode_text([" " + word.lstrip()], continues=True)[0]
            start = self._tokenizer.encode_text([word], continues=True)[0]
            # A space that is a token of its own adds nothing: the word behind it is barred already.
            if inside[1:] == start:
                inside = start
            found += [ids for ids in (start, inside) if ids and ids not in found]
        return found
