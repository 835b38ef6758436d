"""Drafts from trained heads: the hidden states that they see, their guesses against torch, texts that do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import VOCAB, as_prompts, assert_nothing_held, engine, prompts_of, write_heads, write_model
from torch.nn import functional as F

from fastsft.engine.draft.heads import HeadsGuess, PackedHeads
from fastsft.engine.llm import LLM
from fastsft.engine.request import Request, SamplingParams
from fastsft.engine.sequence import Sequence
from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder
from fastsft.models.heads import DraftHeads, save_heads
from fastsft.models.packed import pack_decoder
from fastsft.models.weights import load_model

LENGTHS = [17, 16, 33, 1]
PARAMS = [
    SamplingParams(max_tokens=40, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(max_tokens=30, temperature=0.7, seed=4, n=3, logprobs=0),
    SamplingParams(max_tokens=35, temperature=1.0, seed=9, repetition_penalty=1.2, min_tokens=20, logprobs=1),
    SamplingParams(max_tokens=45, allowed_token_ids=[60, 61, 62], temperature=1, seed=2, stop=["<=<=<", "===="]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.mark.parametrize("options", [{}, {"num_blocks": 8}, {"max_num_seqs": 2}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize(("adaptive", "paths"), [(True, 1), (True, 3), (False, 1), (False, 2), (False, 4)])
def test_results_are_those_of_plain_decoding(
    adaptive: bool, paths: int, options: dict[str, Any], folder: Path, heads: Path
) -> None:
    config = {"method": "heads", "model": heads, "adaptive": adaptive, "num_speculative_paths": paths}
    llm: LLM = engine(folder, speculative_config=config, **options)
    found = llm.generate(as_prompts(prompts_of(LENGTHS)), PARAMS)
    assert found == engine(folder, **options).generate(as_prompts(prompts_of(LENGTHS)), PARAMS)
    stats = llm.core.stats()
    assert adaptive or 0 < stats.accepted_tokens < stats.drafted_tokens
    assert_nothing_held(llm)


@torch.no_grad()
def hidden_of(model: Decoder, tokens: list[int]) -> torch.Tensor:
    count = len(tokens)
    attend = VarlenAttend(torch.tensor([0, count], dtype=torch.int32))
    states: torch.Tensor = model(torch.tensor(tokens), torch.arange(count), attend)
    return states


@pytest.mark.parametrize("paths", [1, 3])
def test_each_sequence_has_the_state_that_its_last_token_was_drawn_from(paths: int, folder: Path, heads: Path) -> None:
    """Beside drafts that hold and that do not, prompts that are scored, forks and preemptions."""
    model = load_model(folder, dtype=torch.float32)
    config = {"method": "heads", "model": heads, "adaptive": False, "num_speculative_paths": paths}
    core = engine(folder, speculative_config=config, num_blocks=10).core
    hot = SamplingParams(max_tokens=60, temperature=2.0, seed=3)  # where noise decides, guesses hold more often
    for i, (prompt, params) in enumerate(zip(prompts_of([*LENGTHS, 9]), [*PARAMS, hot], strict=True)):
        core.add(Request(str(i), tuple(prompt), params))
    checked = 0
    while core.busy:
        core.step()
        for sequence in core._scheduler.running:
            if len(sequence.tokens) - sequence.computed == 1 and sequence.generated:
                expected = hidden_of(model, sequence.tokens)[-2]
                assert sequence.hidden_D is not None
                assert (sequence.hidden_D - expected).abs().max() <= 1e-4 * expected.abs().max()
                checked += 1
    stats = core.stats()
    assert checked > 50
    assert stats.accepted_tokens > 0
    assert stats.preemptions > 0


def test_guesses_are_those_of_the_heads(folder: Path, tmp_path: Path) -> None:
    packed = pack_decoder(folder, "float32")
    model = load_model(folder, dtype=torch.float32)
    made = write_heads(tmp_path, 0.3, seed=1)
    guess_of = PackedHeads(tmp_path, packed)
    hidden = torch.randn(64, generator=torch.Generator().manual_seed(2))
    expected = []
    for linear in made.heads:
        state = hidden + F.silu(hidden @ linear.weight.T + linear.bias)
        logits = state @ model.lm_head_weight.T
        mine = guess_of.logits(hidden, 3)[len(expected)]
        assert (mine - logits).abs().max() <= 1e-5 * logits.abs().max()
        expected.append(int(logits.argmax()))
    params: Any = SamplingParams()
    sequence = Sequence("0", 0, [5, 6], 1, 100, params, None, 3)  # type: ignore[arg-type]
    guess = HeadsGuess(guess_of, sequence, branches=2)
    assert guess.propose([5, 6], 3) == []
    sequence.hidden_D = hidden
    assert guess.propose([5, 6], 9) == expected
    second = [int(row.topk(2).indices[1]) for row in guess_of.logits(hidden, 3)]
    assert guess.others(2) == second[:2]
    assert guess.propose([5, 6], 2) == expected[:2]
    assert guess.others(2) == second[:2]
    assert len(set(expected)) > 1


def test_a_guess_has_the_noise_of_its_place(folder: Path, tmp_path: Path) -> None:
    """Heads that begin as the model's own give, drawn at its place, what a row with the same logits is drawn as."""
    save_heads(DraftHeads(2, 64), tmp_path, vocab_size=VOCAB)
    packed = pack_decoder(folder, "float32")
    heads = PackedHeads(tmp_path, packed)
    drawn = []
    for generated in range(1, 20):
        sequence = Sequence(
            "0",
            0,
            [5] * (1 + generated),
            1,
            100,
            SamplingParams(temperature=3.0),
            None,
            3,  # type: ignore[arg-type]
        )
        sequence.hidden_D = torch.ones(64)
        drawn.append(HeadsGuess(heads, sequence).propose(sequence.tokens, 2))
    assert len({first for first, _ in drawn}) > 5
    assert [second for _, second in drawn[:-1]] == [first for first, _ in drawn[1:]]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"method": "heads"}, "model: expected a folder"),
        ({"method": "heads", "model": "nowhere"}, "model: expected a folder, got 'nowhere'"),
        ({"method": "heads", "model": "heads", "corpus": []}, "corpus: unknown to heads"),
    ],
)
def test_wrong_configurations(config: dict[str, Any], named: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"speculative_config: {named}"):
        engine(folder, speculative_config=config)


def test_heads_of_another_model(folder: Path, tmp_path: Path) -> None:
    save_heads(DraftHeads(1, 48), tmp_path, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"speculative_config: model: .*hidden_size: expected 64, got 48"):
        engine(folder, speculative_config={"method": "heads", "model": tmp_path})
