"""Guesses against their definitions, lengths against simulated machines, and an engine with and without drafts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_cases import VOCAB, as_prompts, engine, prompts_of, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.engine.draft.length import DraftLength, Shares
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


# --- lengths --------------------------------------------------------------------------------------------------------


def simulate(
    cost: Callable[[int], float],
    share: Callable[[int], float],
    steps: int = 4000,
    *,
    most: int = 8,
    proposal: Callable[[int], float] = lambda count: 0.0,
    choosing: float = 0.0,
    paths: int = 1,
    other: Callable[[int], float] = lambda step: 0.0,
    branching: Callable[[int], float] = lambda count: 0.0,
    batch: int = 1,
) -> tuple[float, float, float]:
    """(time for each token over that of plain steps, mean drafts of a continuation and step, mean further paths of one
    with drafts); ``other``: the share of other guesses that hold where the draft does not."""
    rng = random.Random(1)
    length = DraftLength(most)
    each = [(Shares(most, length.shares), Shares(most, length.others)) for _ in range(batch)]
    time = plain = 0.0
    tokens = drafts = forks = speculating = 0
    for step in range(steps):
        drafting = length.begin(batch)
        rows, making, advanced = batch, 0.0, batch
        proposed = []
        for shares, others in each:
            count = length.choose(shares, most) if drafting else 0
            deciding = choosing if drafting else 0.0
            length.chose(deciding)
            making += deciding
            if not count:
                continue
            length.proposed(shares, count, proposal(count))
            branches = length.branches(shares, others, min(paths - 1, count))
            apart = branching(branches)
            length.branched(shares, others, branches, apart)
            making += proposal(count) + apart
            mine = count + sum(2 + place for place in range(branches))
            proposed.append((shares, others, count, branches, mine))
            rows += mine
        for shares, others, count, branches, mine in proposed:
            accepted = 0
            while accepted < count and rng.random() < share(step):
                accepted += 1
            length.observe(shares, count, accepted, mine)
            if accepted < branches:
                held = rng.random() < other(step)
                length.observe_other(others, accepted, held)
                accepted += held
            advanced += accepted
            drafts += count
            forks += branches
        seconds = cost(rows) * rng.lognormvariate(0, 0.03) + making
        length.measured(rows, seconds)
        time += seconds
        tokens += advanced
        speculating += len(proposed)
        plain = tokens * cost(batch) / batch
    return time / plain, drafts / steps / batch, forks / max(speculating, 1)


@pytest.mark.parametrize("paths", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("slope", [0.0, 0.02, 0.3, 1.0])
def test_never_slower_than_plain_steps_by_two_percent(slope: float, share: float, paths: int) -> None:
    ratio, _, _ = simulate(lambda rows: 1 + slope * (rows - 1), lambda step: share, paths=paths)
    assert ratio <= 1.02


def test_other_guesses_are_made_where_they_pay() -> None:
    shares: dict[str, Any] = {
        "share": lambda step: 0.6,
        "most": 4,
        "proposal": lambda count: 0.2,
        "other": lambda step: 0.4,
    }
    single, _, _ = simulate(lambda rows: 1 + 0.002 * rows, **shares)
    tree, _, forks = simulate(lambda rows: 1 + 0.002 * rows, paths=4, **shares)
    assert tree < 0.95 * single
    assert forks > 2
    single, _, _ = simulate(lambda rows: 1 + 0.15 * rows, **shares)
    tree, _, forks = simulate(lambda rows: 1 + 0.15 * rows, paths=4, **shares)
    assert tree < 1.01 * single
    assert forks < 0.1
    _, _, forks = simulate(lambda rows: 1 + 0.03 * rows, **(shares | {"paths": 4, "other": lambda step: 0.02}))
    assert forks < 0.3
    late: dict[str, Any] = shares | {"paths": 4, "other": lambda step: 0.0 if step < 1000 else 0.9}
    _, _, forks = simulate(lambda rows: 1 + 0.02 * rows, **late)
    assert forks > 0.5


def test_never_slower_where_other_guesses_take_long_now_and_then() -> None:
    """The median tells nothing of it: what was lost does."""
    calls = itertools.count(1)
    ratio, _, forks = simulate(
        lambda rows: 1 + 0.001 * rows, lambda step: 0.3, most=4, paths=4, other=lambda step: 0.3, batch=4,
        branching=lambda branches: 5.0 if branches and next(calls) % 5 == 0 else 0.0,
    )  # fmt: skip
    assert ratio <= 1.02
    assert forks > 1


def test_what_other_guesses_cost_counts() -> None:
    shares: dict[str, Any] = {"share": lambda step: 0.6, "most": 4, "other": lambda step: 0.4, "paths": 4}
    single, _, _ = simulate(lambda rows: 1.0, **(shares | {"paths": 1}))
    tree, _, forks = simulate(lambda rows: 1.0, branching=lambda n: 0.8 if n else 0.0, **shares)
    assert tree < 1.02 * single
    assert forks < 0.2
    _, _, forks = simulate(lambda rows: 1.0, branching=lambda n: 0.05 if n else 0.0, **shares)
    assert forks > 2.5


def test_branches_that_pay_together_are_made() -> None:
    """Where the first one costs a jump and the others nothing: as of steps that are padded to a power of two."""
    length = DraftLength(4)
    shares, others = Shares(4, length.shares), Shares(4, length.others)
    for rows in range(1, 33):
        length.begin(rows)
        length.measured(rows, 1.0 if rows <= 5 else 1.06)
    length.begin(1)
    length.proposed(shares, 4, 0.0)
    one, two, three = (length.branches(shares, others, most) for most in (1, 2, 3))
    assert (one, two, three) == (0, 2, 3)


def test_never_slower_where_a_second_row_costs_a_jump() -> None:
    ratio, _, _ = simulate(lambda rows: 1.0 if rows == 1 else 2.5, lambda step: 0.5)
    assert ratio <= 1.02


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("choosing", [0.02, 0.08, 0.5])
def test_never_slower_where_choosing_to_draft_nothing_takes_time(choosing: float, share: float) -> None:
    ratio, _, _ = simulate(lambda rows: rows, lambda step: share, choosing=choosing)
    assert ratio <= 1.02


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.5, 20), min_size=4, max_size=20), st.lists(st.booleans(), max_size=12), st.integers(1, 5))
def test_the_choice_has_the_greatest_rate(seconds: list[float], held: list[bool], limit: int) -> None:
    """Also where it is found without looking at every number."""
    most, base = 5, 3
    length = DraftLength(most)
    for rows, each in enumerate(seconds, base):
        length._times.add(rows, each)
    length._steps = 1
    length.begin(base)
    texts = [Shares(most, length.shares) for _ in range(base)]
    for right in held:
        texts[0].observe(2, 2 * right)
    drafted, expected = 0, 0.0
    for shares in texts:
        rates, gain, survives = [], 0.0, 1.0
        for count in range(min(limit, most) + 1):
            rates.append((base + expected + gain) / length._times[base + drafted + count])
            survives *= shares[min(count, most - 1)]
            gain += survives
        gains = [shares[0], shares[0] * shares[1]]
        count = length.choose(shares, limit)
        assert rates[count] == pytest.approx(max(rates))
        if count:
            before = length._expected
            length.proposed(shares, min(count, 2), 0.0)
            assert length._expected - before == pytest.approx(sum(gains[: min(count, 2)]))
            drafted, expected = drafted + min(count, 2), length._expected


def test_drafts_that_hold_are_used() -> None:
    ratio, drafts, _ = simulate(lambda rows: 1 + 0.02 * (rows - 1), lambda step: 0.95)
    assert ratio < 0.2
    assert drafts > 6
    ratio, drafts, _ = simulate(lambda rows: 1 + 0.3 * (rows - 1), lambda step: 0.7)  # the best: 1 to 2 drafts
    assert ratio < 0.9
    assert 0.8 < drafts < 3.5


def test_what_guesses_cost_counts() -> None:
    ratio, drafts, _ = simulate(lambda rows: 1 + 0.02 * rows, lambda step: 0.5, most=3, proposal=lambda count: 0.35)
    assert ratio < 0.8  # as with heads: three cost what one does, and only three pay well
    assert drafts > 2.5
    ratio, drafts, _ = simulate(lambda rows: 1 + 0.02 * rows, lambda step: 0.8, proposal=lambda count: 0.3 * count)
    assert ratio < 0.85  # as with a draft model: few pay, eight do not
    assert 0.8 < drafts < 4.5
    ratio, _, _ = simulate(lambda rows: 1 + 0.02 * rows, lambda step: 0.3, proposal=lambda count: 0.6 * count)
    assert ratio <= 1.02


def test_a_change_is_noticed() -> None:
    ratio, _, _ = simulate(lambda rows: 1 + 0.1 * (rows - 1), lambda step: 0.9 if step < 200 else 0.0)
    assert ratio <= 1.02
    ratio, _, _ = simulate(lambda rows: 1 + 0.02 * (rows - 1), lambda step: 0.0 if step < 1000 else 0.9)
    assert ratio < 0.5


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
