"""Rejection sampling of drafts: the law of its results, path by path and by chi-square, and an engine that uses it."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from engine_cases import (
    FAMILIES,
    SHAPE,
    VOCAB,
    as_prompts,
    assert_nothing_held,
    engine,
    prompts_of,
    tokenizer,
    write_model,
)
from scipy import stats

from fastsft.engine.detokenize import Detokenizer
from fastsft.engine.rejection import guess, judge, settle, uniform_of
from fastsft.engine.request import SamplingParams
from fastsft.engine.sampling import draw
from fastsft.engine.sequence import Sequence
from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import init_model, save_model

# --- the law, exactly -----------------------------------------------------------------------------------------------

V = 3
Tokens = tuple[int, ...]


def laws(most: int, seed: int) -> dict[Tokens, torch.Tensor]:
    """A distribution after each text of fewer than ``most`` tokens; some of them forbid a token."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for length in range(most):
        for text in product(range(V), repeat=length):
            weights = torch.rand(V, generator=generator, dtype=torch.float64) ** 2
            if (forbidden := int(torch.randint(2 * V, (1,), generator=generator))) < V:
                weights[forbidden] = 0
            found[text] = weights / weights.sum()
    return found


def probability(law: dict[Tokens, torch.Tensor], text: Tokens, begin: int = 0) -> float:
    result = 1.0
    for i in range(begin, len(text)):
        result *= float(law[text[:i]][text[i]])
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_every_path_of_accepting_and_rejecting(k: int, seed: int) -> None:
    p, q = laws(k + 1, seed), laws(k + 1, 100 + seed)
    law = dict.fromkeys(product(range(V), repeat=k + 1), 0.0)  # of the first k + 1 tokens; what judge leaves open: by p
    paths = 0
    for draft in product(range(V), repeat=k):
        if not (drawn := probability(q, draft)):
            continue
        q_KV = torch.stack([q[draft[:i]] for i in range(k)])
        p_KV = torch.stack([p[draft[:i]] for i in range(k)])
        holds = [min(1.0, float(p_KV[i, t] / q_KV[i, t])) for i, t in enumerate(draft)]
        reached = drawn
        for held in range(k + 1):
            mass = reached if held == k else reached * (1 - holds[held])
            if mass > 0:
                uniforms = [h * (1 - 1e-9) for h in holds[:held]]  # just below the boundary, and just above it
                uniforms += [holds[i] * (1 + 1e-9) + 1e-12 if i == held else 1e-9 for i in range(held, k)]
                found, rest_V = judge(draft, q_KV, p_KV, uniforms)
                assert found == held
                next_V = p[draft] if rest_V is None else rest_V
                for end in product(range(V), repeat=k + 1 - held):
                    text = draft[:held] + end
                    law[text] += mass * float(next_V[end[0]]) * probability(p, text, held + 1)
                paths += 1
            if held < k:
                reached *= holds[held]
    assert paths > 2**k
    for text, found_mass in law.items():
        assert found_mass == pytest.approx(probability(p, text), abs=1e-12)


def test_equal_distributions_hold_always() -> None:
    same_KV = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    assert judge([1], same_KV, same_KV, [1 - 2.0**-53]) == (1, None)
    above_KV = same_KV * (1 + 2.0**-52)  # rounding
    assert judge([1], above_KV, same_KV, [1 - 2.0**-54]) == (1, None)


def test_uniform_numbers() -> None:
    found = [uniform_of(3, place) for place in range(2000)]
    assert min(found) > 0
    assert max(found) < 1
    assert stats.kstest(found, "uniform").pvalue > 0.01


# --- the law of what a step draws -----------------------------------------------------------------------------------

PLACES, RUNS = 2, 1500
PARAMS = SamplingParams(temperature=0.8, top_k=4, max_tokens=10, ignore_eos=True)
P_VV, Q_VV = (torch.randn(5, 5, generator=torch.Generator().manual_seed(s)) for s in (1, 2))  # after each token


def by_hand(logits_V: torch.Tensor) -> torch.Tensor:
    """Four of five tokens, at temperature 0.8."""
    weights = (logits_V.double() / 0.8).exp()
    weights[logits_V.argmin()] = 0
    return weights / weights.sum()


def drafts_of(sequence: Sequence, count: int) -> tuple[list[int], torch.Tensor]:
    draft: list[int] = []
    probs = []
    for i in range(count):
        last = (sequence.tokens + draft)[-1]
        token, q_V = guess(Q_VV[last : last + 1], PARAMS, sequence.seed, sequence.generated + i)
        draft.append(token)
        probs.append(q_V)
    return draft, torch.stack(probs)


@pytest.mark.parametrize("k", [1, 3])
def test_two_tokens_by_chi_square(k: int) -> None:
    """Over as many steps as they take: a place whose draft was not reached is drafted again with the same noise."""
    begun = [Sequence("r", 0, [0], 1, 20, PARAMS, Detokenizer(tokenizer(), True), seed) for seed in range(RUNS)]
    steps = 0
    while left := [s for s in begun if s.generated < PLACES]:
        drafts, rows = [], []
        for s in left:
            draft, s.draft_probs_KV = drafts_of(s, k)
            drafts.append(draft)
            rows += [s.tokens[-1], *draft]
        before = [s.cumulative_logprob for s in left]
        draw(left, P_VV[rows].clone(), (), [[d] for d in drafts])
        steps += 1
        if steps == 1:  # of all tokens that came
            for s, was in zip(left, before, strict=True):
                text = s.tokens
                want = sum(float(torch.log_softmax(P_VV[a].double(), -1)[b]) for a, b in pairwise(text))
                assert s.cumulative_logprob - was == pytest.approx(want, abs=1e-5)
    counts = torch.zeros(5, 5, dtype=torch.float64)
    for s in begun:
        counts[s.tokens[1], s.tokens[2]] += 1
    p_VV = torch.stack([by_hand(row) for row in P_VV])
    expected = RUNS * p_VV[0][:, None] * p_VV
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3
    assert 1 < steps <= PLACES


# --- the engine -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_model(tmp_path_factory.mktemp("small"), "qwen3")


def config_of(model: Any) -> dict[str, Any]:
    return {
        "method": "draft_model", "model": model, "acceptance": "rejection", "adaptive": False,
        "num_speculative_tokens": 3,
    }  # fmt: skip


@pytest.mark.parametrize("which", ["small", "same"])
def test_an_engine(which: str, small: Any, folder: Any) -> None:
    prompts = as_prompts(prompts_of([5, 20, 33]))
    params = [
        SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.0, top_p=0.9, seed=3, n=3, logprobs=0),
        SamplingParams(max_tokens=30, ignore_eos=True),
        SamplingParams(max_tokens=25, temperature=0.7, seed=8, min_tokens=20, allowed_token_ids=[60, 61, 62]),
    ]
    llm = engine(folder, speculative_config=config_of(folder if which == "same" else small))
    found = llm.generate(prompts, params)
    assert llm.generate(prompts, params) == found
    assert_nothing_held(llm)
    plain = engine(folder)
    assert found[1] == plain.generate(prompts[1:2], params[1])[0]  # greedy
    drafted, accepted = (sum(getattr(o, n) for o in found[0].outputs) for n in ("drafted_tokens", "accepted_tokens"))
    assert accepted > 0.9 * drafted if which == "same" else 0 < accepted < drafted
    for output in found[0].outputs:
        whole = {"prompt_token_ids": [*prompts[0]["prompt_token_ids"], *output.token_ids]}
        scored = plain.generate([whole], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
        assert output.logprobs == scored[-len(output.token_ids) :]
    assert set(found[2].outputs[0].token_ids) <= {60, 61, 62}


def test_a_draft_model_with_fewer_tokens_than_the_model(
    tmp_path: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(init_model(SHAPE | FAMILIES["llama"] | {"vocab_size": 320}, seed=1), tmp_path)
    Tokenizer.from_folder(small).save(tmp_path)
    llm = engine(tmp_path, speculative_config=config_of(small))
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.0, seed=3)
    seen = []

    def watched(draft: list[int], q_KV: torch.Tensor, *rest: Any) -> list[int]:
        seen.append(q_KV)
        return settle(draft, q_KV, *rest)

    monkeypatch.setattr("fastsft.engine.sampling.settle", watched)
    output = llm.generate(as_prompts(prompts_of([9])), params)[0].outputs[0]
    assert output.drafted_tokens > 0
    assert len(output.token_ids) == 30
    for q_KV in seen:
        assert q_KV.shape[1] == 320
        assert (q_KV[:, :VOCAB] > 0).all()  # as every softmax
        assert (q_KV[:, VOCAB:] == 0).all()


def test_wrong_acceptance(folder: Any) -> None:
    with pytest.raises(ValueError, match="speculative_config: acceptance: expected 'noise' or 'rejection', got 'luck'"):
        engine(folder, speculative_config=config_of(folder) | {"acceptance": "luck"})
