"""The text drawn with drafts equals the text drawn without them, whatever the drafts and whatever is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import VOCAB, tokenizer

from fastsft.engine.detokenize import Detokenizer
from fastsft.engine.processors import ProcessorFactory
from fastsft.engine.request import SamplingParams
from fastsft.engine.sampling import draw
from fastsft.engine.sequence import Sequence

ENDS = (0, 2)
PROMPT = [30, 31, 32, 30, 31]
Guess = Callable[[list[int], int], list[int]]


def logits_after(text: list[int]) -> torch.Tensor:
    """A model that looks at the last three tokens, so that phrases come back."""
    generator = torch.Generator().manual_seed(hash(tuple(text[-3:])) % 2**31)
    row: torch.Tensor = 3 * torch.randn(VOCAB, generator=generator)
    row[list(ENDS)] -= 4
    return row


def run(params: SamplingParams, guess: Guess, seed: int = 7, other: Guess | None = None) -> tuple[Sequence, int, int]:
    """The sequence, and how many drafts were made and were right; ``other`` guesses too."""
    factory = ProcessorFactory(tokenizer(), VOCAB, ENDS)
    sequence = Sequence(
        "0", 0, list(PROMPT), len(PROMPT), len(PROMPT) + params.max_tokens, params,
        Detokenizer(tokenizer(), True), seed, processors=factory.make(params, PROMPT),
    )  # fmt: skip
    drafted = accepted = 0
    while sequence.finish_reason is None:
        limit = sequence.limit - len(sequence.tokens) - 1
        paths = [each(sequence.tokens, limit) for each in (guess, other) if each]
        rows = torch.stack([logits_after(sequence.tokens + p[:j]) for p in paths for j in range(len(p) + 1)])
        before = sequence.generated
        ((best, right),) = draw([sequence], rows, ENDS, [paths])
        new = sequence.tokens[len(PROMPT) + before :]
        lengths = [next((j for j, (a, b) in enumerate(zip(p, new, strict=False)) if a != b), len(p)) for p in paths]
        if sequence.finish_reason is None:
            assert (best, right) == (lengths.index(max(lengths)), max(lengths))
            assert len(new) == right + 1
        drafted += len(paths[0])
        accepted += right
    return sequence, drafted, accepted


PARAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": 3},
    "top": {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4, "logprobs": 1},
    "penalties on few tokens": {"allowed_token_ids": list(range(40, 46)), "frequency_penalty": 2.0},
    "phrases of few tokens": {"allowed_token_ids": [70, 71, 72, 73], "bad_words": ["ab", "ba", "cc", "dab"]},
    "bias": {"logit_bias": {40: 9.0, 41: 9.0, 42: -50.0}, "logprobs": 0},
    "allowed": {"allowed_token_ids": [40, 41, 42, 43, 2], "min_tokens": 9},
    "bad words": {"bad_words": ["ab", "c", "the cat"], "allowed_token_ids": list(range(60, 110))},
    "guide": {"structured_outputs": {"regex": "([ab]|the cat ){5,9}"}, "logprobs": 1},
    "min tokens": {"min_tokens": 25, "logit_bias": {0: 50.0}},
    "stop string": {"stop": ["a", "b", "zq"]},
    "stop token": {"stop_token_ids": [90, 91, 92, 93, 94], "min_tokens": 4},
}


def drafters(truth: list[int], seed: int) -> dict[str, Guess]:
    rng = random.Random(seed)

    def perfect(text: list[int], limit: int) -> list[int]:
        return truth[len(text) - len(PROMPT) :][: min(limit, 5)]

    def wrong(text: list[int], limit: int) -> list[int]:
        return [(t + 1) % VOCAB for t in perfect(text, limit)]

    def late(text: list[int], limit: int) -> list[int]:
        right = perfect(text, limit)
        return [*right[:2], *((t + 1) % VOCAB for t in right[2:])]

    def chance(text: list[int], limit: int) -> list[int]:
        right = perfect(text, min(limit, rng.randrange(7)))
        return [t if rng.random() < 0.7 else rng.randrange(VOCAB) for t in right]

    return {"all right": perfect, "all wrong": wrong, "right at first": late, "by chance": chance}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("case", PARAMS)
def test_text_and_logprobs_are_those_of_plain_decoding(case: str, temperature: float) -> None:
    if case == "guide":
        pytest.importorskip("llguidance")
    params = SamplingParams(temperature=temperature, max_tokens=40, **PARAMS[case])
    plain, none, _ = run(params, lambda text, limit: [])
    assert none == 0
    truth = plain.tokens[len(PROMPT) :]
    for name, guess in drafters(truth, 3).items():
        found, drafted, accepted = run(params, guess)
        assert found.tokens == plain.tokens, name
        assert found.detokenizer.text == plain.detokenizer.text, name
        assert (found.finish_reason, found.stop_reason) == (plain.finish_reason, plain.stop_reason), name
        assert found.logprobs == plain.logprobs, name  # to the bit
        assert found.cumulative_logprob == plain.cumulative_logprob, name
        if name == "all right":
            assert accepted == drafted or found.finish_reason == "stop"
        if name == "all wrong":
            assert accepted == 0 < drafted or len(truth) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("case", PARAMS)
def test_the_path_that_holds_the_longest_is_taken(case: str, temperature: float) -> None:
    if case == "guide":
        pytest.importorskip("llguidance")
    params = SamplingParams(temperature=temperature, max_tokens=40, **PARAMS[case])
    plain, _, _ = run(params, lambda text, limit: [])
    guesses = drafters(plain.tokens[len(PROMPT) :], 5)
    for first, second in (("all wrong", "all right"), ("right at first", "by chance"), ("by chance", "all wrong")):
        found, drafted, accepted = run(params, guesses[first], other=guesses[second])
        assert found.tokens == plain.tokens, first
        assert found.detokenizer.text == plain.detokenizer.text, first
        assert (found.finish_reason, found.stop_reason) == (plain.finish_reason, plain.stop_reason), first
        assert found.logprobs == plain.logprobs, first
        assert found.cumulative_logprob == plain.cumulative_logprob, first
        if second == "all right":
            assert accepted == drafted or found.finish_reason == "stop"


def test_acceptance_is_counted_exactly() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)
    truth = run(params, lambda text, limit: [])[0].tokens[len(PROMPT) :]
    guesses = drafters(truth, 0)
    assert run(params, guesses["all right"])[1:] == (20, 20)  # 4 steps of 5 drafts and a draw
    assert run(params, guesses["all wrong"])[2] == 0
    # Of five drafts two hold, so that a step brings three tokens; near the end there is room for fewer drafts.
    assert run(params, guesses["right at first"])[1:] == (5 * 7 + 2, 16)


def test_rows_of_several_sequences_do_not_mix() -> None:
    factory = ProcessorFactory(tokenizer(), VOCAB, ENDS)
    cases = [
        SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True, **PARAMS[c])
        for c in ("bias", "penalties", "top")
    ]
    alone = [run(p, lambda text, limit: [])[0] for p in cases]
    together = [
        Sequence("0", i, list(PROMPT), len(PROMPT), len(PROMPT) + 30, p, Detokenizer(tokenizer(), True), 7,
                 processors=factory.make(p, PROMPT))
        for i, p in enumerate(cases)
    ]  # fmt: skip
    rng = random.Random(1)
    while live := [s for s in together if s.finish_reason is None]:
        drafts = []
        for s in live:
            truth = alone[s.index].tokens[len(s.tokens) :]
            drafts.append(truth[: min(rng.randrange(4), s.limit - len(s.tokens) - 1)])
        rows = [logits_after(s.tokens + d[:j]) for s, d in zip(live, drafts, strict=True) for j in range(len(d) + 1)]
        draw(live, torch.stack(rows), ENDS, [[d] for d in drafts])
    assert [s.tokens for s in together] == [s.tokens for s in alone]
    assert [s.logprobs for s in together] == [s.logprobs for s in alone]
