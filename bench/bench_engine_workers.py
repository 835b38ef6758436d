"""Running sequences while long prompts arrive: the time between two of their tokens, with prompts in the engine's own
steps, whole or in chunks, and in a process of their own. Two CPUs in every case: one process on both, or one for each.

The gate: the same tokens in all cases. A round is the time between two steps of the running sequences; ``p99_ms`` is
what one in a hundred exceeds, ``prompt_ms`` the median time in which a long prompt got its first token.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from typing import Any

import pytest
import torch
from bench_engine import CLOCK, replay
from engine_case import Case, model_config, prompts

from fastsft import _C
from fastsft.engine.llm import LLM
from fastsft.engine.request import Request, SamplingParams
from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import init_model

CASE = Case("30 M", "bfloat16", threads=2)
RUNNING, TOKENS = 4, 400
ARRIVING, LENGTH, EVERY = 6, 1500, 50  # prompts, their tokens, steps between two of them
# threads of the engine's process, and its options
CONTESTANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (2, {}),
    "one process, chunks of 128": (2, {"max_batched_tokens": 128}),
    "prefill process": (1, {"prefill_threads": 1}),
}


@functools.cache
def served(contestant: str) -> tuple[list[float], list[float], dict[str, list[int]]]:
    """Seconds between steps, seconds to the first token of each long prompt, all tokens."""
    threads, options = CONTESTANTS[contestant]
    _C.set_num_threads(threads)
    torch.set_num_threads(1)
    model = init_model(model_config(CASE.size), seed=0, dtype=getattr(torch, CASE.activations))
    llm = LLM(model, Tokenizer.train(["text"], 300), num_blocks=1024, **options)
    core, clock = llm.core, time.perf_counter
    greedy = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    # The worker is there, and so are all pages of the cache.
    for prompt in prompts(CASE.size, 10, LENGTH, seed=9):
        llm.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=2, ignore_eos=True))
    for i, prompt in enumerate(prompts(CASE.size, RUNNING, 32, seed=1)):
        core.add(Request(f"running {i}", tuple(prompt), greedy))
    long = prompts(CASE.size, ARRIVING, LENGTH, seed=2)
    gaps, waits, tokens = [], [], {}
    begun: dict[str, float] = {}
    steps, last = 0, None
    while core.busy:
        updates, now = core.step(), clock()
        for update in updates:
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
            if update.request_id in begun:
                waits.append(now - begun.pop(update.request_id))
        if any(u.request_id == "running 0" for u in updates):
            if last is not None:
                gaps.append(now - last)
            last = now
            steps += 1
            if steps % EVERY == 0 and long:
                name = f"long {len(long)}"
                begun[name] = clock()
                core.add(Request(name, tuple(long.pop()), SamplingParams(max_tokens=4, ignore_eos=True)))
    return gaps, waits, tokens


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.timeout(1800)
def test_time_between_tokens(benchmark: Any, contestant: str) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    gaps, waits, tokens = served(contestant)
    assert tokens == served("one process")[2]
    assert len(waits) == ARRIVING
    replay(benchmark, f"{RUNNING} running, prompts of {LENGTH} tokens, {CASE.size} {CASE.format}, two CPUs", gaps)
    benchmark.extra_info |= {
        "p99_ms": statistics.quantiles(gaps, n=100)[98] * 1e3,
        "max_ms": max(gaps) * 1e3,
        "prompt_ms": statistics.median(waits) * 1e3,
    }
