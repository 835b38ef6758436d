"""Guesses against their definitions, and an engine with and without drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_cases import VOCAB, as_prompts, engine, prompts_of, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.engine.draft.ngram import NgramGuess
from fastsft.engine.draft.suffix import SuffixGuess, corpus_automaton
from fastsft.engine.llm import LLM
from fastsft.engine.request import RequestOutput, SamplingParams
from fastsft.models.tokenizer import Tokenizer

# --- guesses --------------------------------------------------------------------------------------------------------


def look_up(text: list[int], longest: int, shortest: int, limit: int) -> list[int]:
    for n in range(longest, shortest - 1, -1):
        for place in range(len(text) - 1, n - 1, -1):
            if text[place - n : place] == text[len(text) - n :]:
                return text[place : place + limit]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 2), st.integers(1, 5))
def test_prompt_look_up(text: list[int], shortest: int, more: int, step: int) -> None:
    guess = NgramGuess(shortest + more, shortest)
    for end in [*range(1, len(text), step), len(text)]:
        assert guess.propose(text[:end], 4) == look_up(text[:end], shortest + more, shortest, 4)


def test_the_corpus_is_asked_where_it_matches_more() -> None:
    corpus = corpus_automaton([[1, 2, 3, 4, 5], [7, 8, 9]])
    assert SuffixGuess(corpus, 2).propose([2, 3], 3) == [4, 5]
    assert SuffixGuess(corpus, 3).propose([2, 3], 3) == []
    assert SuffixGuess(corpus, 2).propose([3, 4, 6, 3, 4], 2) == [6, 3]  # as long in the text itself
    assert SuffixGuess(corpus, 2).propose([7, 8, 9], 2) == []
    assert SuffixGuess(None, 2).propose([3, 4, 6, 3, 4], 2) == [6, 3]
    grown = SuffixGuess(corpus, 2)
    assert grown.propose([2], 3) == []
    assert grown.propose([2, 3, 4], 3) == [5]


# --- the engine -----------------------------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "prompt_lookup_min": 1, "adaptive": False},
    "suffix": {"method": "suffix", "min_match": 1, "adaptive": False, "num_speculative_tokens": 5},
    "corpus": {"method": "suffix", "min_match": 1, "corpus": ["the cat sat on the mat", "abc"], "adaptive": False},
    "adaptive": {"method": "ngram", "prompt_lookup_min": 1},
}
LENGTHS = [1, 16, 33, 5]
PARAMS = [
    SamplingParams(max_tokens=40, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=30, temperature=0.7, seed=4, n=3, logprobs=0),
    SamplingParams(
        max_tokens=35, temperature=1.0, seed=9, repetition_penalty=1.2, logit_bias={70: 3.0}, min_tokens=20, logprobs=1
    ),
    SamplingParams(max_tokens=45, allowed_token_ids=[60, 61, 62], temperature=1, seed=2, stop=["<=<=<", "===="]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture(scope="module")
def plain(folder: Any) -> list[RequestOutput]:
    return engine(folder).generate(as_prompts(prompts_of(LENGTHS)), PARAMS)


@pytest.mark.parametrize("options", [{}, {"num_blocks": 8, "block_size": 16}, {"max_num_seqs": 2}])
@pytest.mark.parametrize("config", CONFIGS)
def test_results_are_those_of_plain_decoding_to_the_bit(
    config: str, options: dict[str, int], folder: Any, plain: list[RequestOutput]
) -> None:
    llm: LLM = engine(folder, speculative_config=CONFIGS[config], **options)
    found = llm.generate(as_prompts(prompts_of(LENGTHS)), PARAMS)
    assert found == plain  # texts, ids, reasons and log-probabilities
    stats = llm.core.stats()
    each = [o for request in found for o in request.outputs]
    assert stats.drafted_tokens == sum(o.drafted_tokens for o in each)
    assert stats.accepted_tokens == sum(o.accepted_tokens for o in each)
    if not CONFIGS[config].get("adaptive", True):
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
        assert stats.steps < engine_steps(folder, options)


def engine_steps(folder: Any, options: dict[str, int]) -> int:
    llm: LLM = engine(folder, **options)
    llm.generate(as_prompts(prompts_of(LENGTHS)), PARAMS)
    return llm.core.stats().steps


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Another model of the same tokenizer."""
    return write_model(tmp_path_factory.mktemp("small"), "qwen3")


@pytest.mark.parametrize("paths", [1, 3])
@pytest.mark.parametrize("which", ["small", "same"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_draft_model(
    which: str, adaptive: bool, paths: int, small: Any, folder: Any, plain: list[RequestOutput]
) -> None:
    config = {"method": "draft_model", "model": small if which == "small" else folder, "adaptive": adaptive}
    config["num_speculative_paths"] = paths
    llm: LLM = engine(folder, speculative_config=config | {"num_speculative_tokens": 4})
    found = llm.generate(as_prompts(prompts_of(LENGTHS)), PARAMS)
    assert found == plain
    if which == "same" and not adaptive and paths == 1:  # in bfloat16; bias and penalties do not reach its draws
        each = [o for request in found[:2] for o in request.outputs]
        assert sum(o.accepted_tokens for o in each) > 0.7 * sum(o.drafted_tokens for o in each)
    draft = llm.core._drafter._make.__closure__[0].cell_contents  # type: ignore[union-attr]
    assert draft.allocator.num_free == draft.allocator.num_blocks


def test_a_draft_model_whose_cache_is_full(folder: Any, plain: list[RequestOutput]) -> None:
    config = {"method": "draft_model", "model": folder, "adaptive": False, "kv_cache_bytes": 60_000}
    llm: LLM = engine(folder, speculative_config=config)
    assert llm.generate(as_prompts(prompts_of(LENGTHS)), PARAMS) == plain


def test_a_draft_model_with_another_tokenizer(folder: Any, tmp_path: Any) -> None:
    write_model(tmp_path, "llama")
    Tokenizer.train(["another text altogether"], VOCAB).save(tmp_path)
    with pytest.raises(ValueError, match="same tokenizer, but token 3 is"):
        engine(folder, speculative_config={"method": "draft_model", "model": tmp_path})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"method": "magic"}, "method"),
        ({"method": "ngram", "min_match": 2}, "min_match"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"method": "ngram", "prompt_lookup_max": 1}, "prompt_lookup_max"),
        ({"method": "suffix", "corpus": "text"}, "corpus"),
        ({"method": "suffix", "adaptive": 1}, "adaptive"),
        ({"method": "suffix", "corpus": 3}, "corpus"),
        ({"method": "suffix", "min_match": None}, "min_match"),
        ({"method": "draft_model"}, "model"),
        ({"method": "heads", "model": "no such folder"}, "model"),
        ({"method": "draft_model", "model": ".", "kv_cache_bytes": 0}, "kv_cache_bytes"),
        ({"method": "heads", "model": ".", "num_speculative_paths": 0}, "num_speculative_paths: expected an integer"),
        ({"method": "ngram", "num_speculative_paths": 2}, "num_speculative_paths: unknown to ngram"),
        (
            {"method": "draft_model", "model": ".", "num_speculative_paths": 2, "acceptance": "rejection"},
            "num_speculative_paths: expected 1 with rejection, got 2",
        ),
        (["ngram"], "expected a mapping"),
    ],
)
def test_wrong_configurations_are_told_before_anything_is_loaded(config: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"speculative_config: {named}"):
        engine(tmp_path / "no model here", speculative_config=config)
