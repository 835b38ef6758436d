"""Several paths of guesses in a step: what a tree counts, what it saves, what is learned of it, and what it leaves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import as_prompts, assert_nothing_held, engine, prompts_of, write_model
from fake_model import FakeRunner, FakeTokenizer, next_token

from fastsft.engine.core import EngineCore
from fastsft.engine.detokenize import Detokenizer
from fastsft.engine.draft.guess import Guess
from fastsft.engine.draft.speculation import Speculation
from fastsft.engine.processors import Processors
from fastsft.engine.request import Request, SamplingParams
from fastsft.engine.sequence import Sequence
from fastsft.engine.tree import guesses_of, rows_of


def test_what_a_tree_counts() -> None:
    paths = [[1, 2, 3], [1, 4], [1, 2, 5], [6], []]
    assert rows_of(paths) == 4 + 3 + 4 + 2 + 1
    assert guesses_of(paths) == len({"1", "12", "123", "14", "125", "6"})
    assert guesses_of([[7, 7]]) == 2
    assert guesses_of([[]]) == 0


# --- what is learned ------------------------------------------------------------------------------------------------


class Digits(Guess):
    def propose(self, tokens: list[int], limit: int) -> list[int]:
        return [1, 2, 3, 4][:limit]

    def others(self, count: int) -> list[int]:
        return [5, 6, 7, 8][:count]


def text() -> Sequence:
    tokenizer: Any = FakeTokenizer()
    return Sequence("0", 0, [0, 0], 1, 100, SamplingParams(), Detokenizer(tokenizer, True), 0)


def test_the_paths_of_a_proposal() -> None:
    def proposal(paths: int, limit: int) -> list[list[int]]:
        drafter = Speculation(lambda sequence: Digits(), most=4, paths=paths, adaptive=False)
        drafter.begin(1)
        return drafter.propose(text(), limit)

    assert proposal(1, 9) == [[1, 2, 3, 4]]
    assert proposal(3, 9) == [[1, 2, 3, 4], [5], [1, 6]]
    assert proposal(9, 2) == [[1, 2], [5], [1, 6]]


@pytest.mark.parametrize(
    ("best", "accepted", "firsts", "others"),
    [
        (0, 4, [1, 1, 1, 1], {}),  # all of the first path
        (0, 3, [1, 1, 1, 0], {}),  # a place without another guess
        (0, 1, [1, 0], {1: 0}),  # neither guess of the second place
        (2, 2, [1, 0], {1: 1}),  # the other guess of the second place
        (1, 1, [0], {0: 1}),
        (0, 0, [0], {0: 0}),
    ],
)
def test_what_held_is_learned(best: int, accepted: int, firsts: list[int], others: dict[int, int]) -> None:
    drafter = Speculation(lambda sequence: Digits(), most=4, paths=3, adaptive=False)
    sequence = text()
    drafter.begin(1)
    paths = drafter.propose(sequence, 9)
    before = [drafter._length.others[i] for i in range(4)]
    drafter.observe(sequence, paths, best, accepted)
    shares, length = drafter._states[sequence], drafter._length
    assert shares.shares._tried == length.shares._tried == [1.0] * len(firsts) + [0.0] * (4 - len(firsts))
    assert shares.shares._held[: len(firsts)] == firsts
    for mine in (shares.others, length.others):
        assert {place: held for place, held in enumerate(mine._held) if mine._tried[place]} == others
    for place in range(4):
        change = length.others[place] - before[place]
        assert change > 0 if others.get(place) else change < 0 if place in others else change == 0
    assert length._accepted == accepted


@pytest.mark.parametrize(
    ("best", "accepted", "held", "others"),
    [(2, 1, 1, {}), (1, 0, 0, {}), (1, 1, 0, {0: 1}), (2, 2, 1, {1: 1}), (0, 1, 1, {})],
)
def test_what_held_of_a_text_that_ended_is_learned(best: int, accepted: int, held: int, others: dict[int, int]) -> None:
    """It may end before the place where the best path branches, and at that place."""
    drafter = Speculation(lambda sequence: Digits(), most=4, paths=3, adaptive=False)
    sequence = text()
    drafter.begin(1)
    paths = drafter.propose(sequence, 9)
    sequence.finish_reason = "stop"
    drafter.observe(sequence, paths, best, accepted)
    length = drafter._length
    assert sum(length.shares._held) == held
    assert {place: x for place, x in enumerate(length.others._held) if length.others._tried[place]} == others
    assert length._accepted == accepted


def test_a_step_that_had_no_blocks_for_a_path_is_measured() -> None:
    """Else a full cache would hide what drafting costs."""
    drafter = Speculation(lambda sequence: Digits(), most=4, paths=3, adaptive=False)
    sequence = text()
    drafter.begin(1)
    paths = drafter.propose(sequence, 9)[:2]
    drafter.observe(sequence, paths, 0, 4)
    drafter.measured(rows_of(paths), 1.0)
    assert drafter._length._times.count(rows_of(paths)) == 1


def test_rows_of_branches_are_those_of_the_step() -> None:
    """Else its time would be that of another number of rows."""
    drafter = Speculation(lambda sequence: Digits(), most=4, paths=4, adaptive=False)
    sequences = [text(), text()]
    drafter.begin(2)
    proposed = [drafter.propose(sequence, limit) for sequence, limit in zip(sequences, (9, 1), strict=True)]
    rows = sum(rows_of(paths) for paths in proposed)
    assert rows == 2 + drafter._length._rows == (5 + 2 + 3 + 4) + (2 + 2)
    for sequence, paths in zip(sequences, proposed, strict=True):
        drafter.observe(sequence, paths, 0, 0)
    drafter.measured(rows, 1.0)
    assert drafter._length._times.count(rows) == 1


# --- the engine -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2")


def test_other_guesses_save_steps(folder: Path, heads: Path) -> None:
    steps, texts, guesses = [], [], []
    for paths in (1, 2, 4):
        config = {"method": "heads", "model": heads, "adaptive": False, "num_speculative_paths": paths}
        llm = engine(folder, speculative_config=config)
        found = llm.generate(as_prompts(prompts_of([9])), SamplingParams(max_tokens=300, temperature=2.0, seed=1))
        steps.append(llm.core.stats().steps)
        guesses.append(llm.core.stats().drafted_tokens / steps[-1])
        texts.append(found[0].outputs[0].token_ids)
        assert_nothing_held(llm)
    assert texts[0] == texts[1] == texts[2]
    assert steps[0] > 1.03 * steps[1] > 1.03 * steps[2]
    assert guesses == pytest.approx([3, 4, 6], rel=0.1), "each branch has one guess of its own"


def test_keys_and_values_after_a_branch_are_those_of_a_fresh_prefill(folder: Path, heads: Path) -> None:
    """In every block that a sequence holds, to the bit, whichever path it took."""
    config = {"method": "heads", "model": heads, "adaptive": False, "num_speculative_paths": 4}
    llm = engine(folder, speculative_config=config)
    core, won = llm.core, 0
    assert core._drafter is not None
    observe = core._drafter.observe

    def counted(sequence: Sequence, paths: list[list[int]], best: int, accepted: int) -> None:
        nonlocal won
        won += best > 0
        observe(sequence, paths, best, accepted)

    core._drafter.observe = counted  # type: ignore[method-assign]
    for i, prompt in enumerate(prompts_of([9, 17])):
        core.add(Request(str(i), tuple(prompt), SamplingParams(max_tokens=90, temperature=2.0, seed=i)))
    source = random.Random(0)
    for _ in range(60):
        core.step()
        for sequence in core._scheduler.running:
            if sequence.generated and source.random() < 0.2:
                assert torch.equal(cache_of(llm, sequence), cache_after(folder, sequence))
    assert won > 5


def cache_of(llm: Any, sequence: Sequence) -> torch.Tensor:
    """What the cache holds for the sequence's computed tokens: [layers, ...] of its full blocks."""
    full = sequence.computed // llm.core._runner.block_size
    return llm.core._runner._cache[:, list(sequence.blocks[:full])].clone()


def cache_after(folder: Path, sequence: Sequence) -> torch.Tensor:
    fresh = engine(folder)
    fresh.core.add(Request("fresh", tuple(sequence.tokens[: sequence.computed]), SamplingParams(max_tokens=2)))
    fresh.core.step()
    (running,) = fresh.core._scheduler.running
    return cache_of(fresh, running)


class SecondPaths:
    """The first path is wrong, the second one right."""

    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner

    def begin(self, sequences: int) -> bool:
        return True

    def propose(self, sequence: Sequence, limit: int) -> list[list[int]]:
        token = next_token(self._runner.version, sequence.tokens, 0.0, 0, 0)
        return [[(token + 1) % 7], [token]]

    def observe(self, sequence: Sequence, paths: list[list[int]], best: int, accepted: int) -> None:
        assert (best, accepted) == (1, 1)

    def forget(self, sequence: Sequence) -> None:
        pass

    def measured(self, rows: int, seconds: float) -> None:
        pass


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_blocks_that_can_be_found_are_those_of_the_text(block_size: int) -> None:
    """A block that is let go alone would be evicted before those after it, which nobody could then find."""
    runner = FakeRunner(block_size=block_size, num_blocks=40)
    core = EngineCore(runner, FakeTokenizer(), drafter=SecondPaths(runner))  # type: ignore[arg-type]
    core.add(Request("0", (1, 2, 3), SamplingParams(max_tokens=24)))
    (sequence,) = core._live["0"]
    while core.busy:
        core.step()
        if sequence.finish_reason is None:
            keys = core._scheduler._keys(sequence, sequence.published)
            assert core._allocator.find(keys) == list(sequence.blocks[: sequence.published])
            assert core._allocator.num_cached == 0
    assert sequence.drafted == 2 * sequence.accepted > 20


@pytest.mark.parametrize("paths", [1, 3])
@pytest.mark.parametrize("method", ["heads", "draft_model"])
def test_what_guesses_were_drawn_from_is_not_kept(method: str, paths: int, folder: Path, heads: Path) -> None:
    """Whole rows of logits, of each text."""
    config = {"method": method, "model": heads if method == "heads" else folder, "num_speculative_paths": paths}
    core = engine(folder, speculative_config=config | {"adaptive": False}).core
    core.add(Request("0", tuple(prompts_of([9])[0]), SamplingParams(max_tokens=20)))
    for _ in range(3):
        core.step()
    drafter: Any = core._drafter
    (state,) = drafter._states.values()
    assert state.guess._drawn
    assert not (state.guess._logits if method == "draft_model" else state.guess._logits_KV is not None)


def test_a_guide_at_its_limits_stays_there_for_all_paths() -> None:
    class Exhausted:
        def follow(self, token: int) -> bool:
            return False

        def allowed(self, draft: list[int]) -> list[torch.Tensor]:
            raise AssertionError("it has no state")

    guide: Any = Exhausted()
    processors = Processors(SamplingParams(), [1], 5, [0], guide=guide)
    for draft in ([2], [3, 3]):
        rows = torch.zeros(1 + len(draft), 5)
        processors.apply(rows, [1, 2], draft)
        assert (rows == -torch.inf).all()
