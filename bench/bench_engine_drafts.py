"""Speculative decoding of code edits and infills against plain decoding, one request at a time.

The texts are real code and the guesses from the text are accepted where they hold; the draft model, a tenth of 120 M,
is made right on 80 % of the tokens (``engine_drafts.py``). The gate: the text. ``unlike_plain``: the share of
tokens, drawn at temperature 1, that differ from plain decoding's in the token or in a bit of its log-probability.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from bench_engine import CHILDREN, CLOCK, replay
from engine_case import Case
from engine_drafts import KINDS, METHODS

ROUNDS = 3
CONTESTANTS = {("fastsft" if name == "plain" else f"fastsft, {name}"): name for name in METHODS}


@pytest.fixture(scope="module", autouse=True)
def children() -> Iterator[None]:
    yield
    CHILDREN.close()


def methods(size: str) -> list[str]:
    return [method for method in METHODS if size == "120 M" or method != "draft model"]


@functools.cache
def measured(case: Case, kind: str) -> dict[str, list[dict[str, float]]]:
    """By method, over rounds after one that is not counted, in turn."""
    child = CHILDREN.of("fastsft, drafts", case)
    rounds = [{method: child.ask("seconds", kind, method) for method in methods(case.size)} for _ in range(ROUNDS + 1)]
    return {method: [each[method] for each in rounds[1:]] for method in methods(case.size)}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["30 M", "120 M"])
@pytest.mark.parametrize("format", ["bfloat16", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.timeout(7200)
def test_drafts(benchmark, threads, format, size, kind, contestant):
    case, method = Case(size, format, threads), CONTESTANTS[contestant]
    if method not in methods(size):
        pytest.skip("a model with this vocabulary is hardly smaller")
    found = measured(case, kind)[method]
    replay(benchmark, f"{kind} of code, {size} parameters, {format}, threads: {threads}", [x["seconds"] for x in found])
    benchmark.extra_info["tokens_per_second"] = found[0]["tokens"] / benchmark.stats["median"]
    if method != "plain":
        benchmark.extra_info |= {
            "accepted_per_draft": found[0]["accepted"] / max(1, found[0]["drafted"]),
            "unlike_plain": CHILDREN.of("fastsft, drafts", case).ask("unlike_plain", method),
        }
