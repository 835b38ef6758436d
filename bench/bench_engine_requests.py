"""200 requests of skewed lengths that share a system prompt: continuous batching with a prefix cache against batches of
transformers, which are padded and run until their longest is done.

Contestants and models are those of ``bench_engine.py``. The gate: in float32, equal tokens but for near ties; in
bfloat16 the first tokens of most. A fastsft engine serves one lot before it is timed, of other requests.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from bench_engine import CHILDREN, CLOCK, FIRST_TOKENS, leading, replay
from engine_case import Case, requests
from engine_children import takes_part

CONTESTANTS = {"fastsft": (), "transformers, batches of 8": (8,), "transformers, batches of 32": (32,)}
REQUESTS, ROUNDS = 200, 2


@pytest.fixture(scope="module", autouse=True)
def children() -> Iterator[None]:
    yield
    CHILDREN.close()


@functools.cache
def served(case: Case, contestant: str) -> tuple[list[float], list[list[int]]]:
    """Seconds of each round, and the tokens."""
    child = CHILDREN.of(contestant.partition(",")[0], case)
    prompts, news = requests(case.size, REQUESTS)
    child.ask("serve", [[1, *prompt] for prompt in prompts[:8]], [2] * 8, *CONTESTANTS[contestant])
    traces = []
    for turn in range(ROUNDS):
        # another first token: what a prefix cache holds of the round before is of no use
        asked = [[2 + turn, *prompt[1:]] for prompt in prompts]
        traces.append(child.ask("serve", asked, news, *CONTESTANTS[contestant]))
    return [trace["prefill"] for trace in traces], traces[0]["tokens"]


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("format", ["float32", "bfloat16"])
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.timeout(7200)
def test_requests(benchmark, format, contestant):
    case = Case("30 M", format, threads=2)
    if not takes_part(contestant.partition(",")[0], case):
        pytest.skip("not installed")
    seconds, tokens = served(case, contestant)
    first, agree = leading([tokens], [served(case, "fastsft")[1]])
    assert first >= FIRST_TOKENS[format]
    assert format != "float32" or agree >= 0.8
    replay(benchmark, f"{REQUESTS} requests, {case.size} parameters, {format}, threads: {case.threads}", seconds)
    generated = sum(map(len, tokens))
    benchmark.extra_info |= {"tokens_per_second": generated / benchmark.stats["median"], "leading_tokens": agree}
