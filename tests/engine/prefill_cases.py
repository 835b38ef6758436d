"""What the tests of an engine with a prefill process share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine_cases import as_prompts, prompts_of

from fastsft.engine.core import EngineCore
from fastsft.engine.prefill import PrefillWorker
from fastsft.engine.request import SamplingParams


def worker_of(core: EngineCore) -> PrefillWorker:
    worker = core._handover.prefill
    assert isinstance(worker, PrefillWorker)
    return worker


def pid_of(worker: PrefillWorker) -> int:
    assert worker.pid is not None
    return worker.pid


def requests() -> tuple[list[dict[str, Any]], list[SamplingParams], list[str | None]]:
    (trunk,) = prompts_of([64], seed=1)
    prompts = [
        trunk[:k] + end for k, end in zip([0, 20, 33, 64, 64, 64], prompts_of([1, 90, 7, 30, 2, 1]), strict=True)
    ]
    params = [
        SamplingParams(temperature=i % 2 * 1.0, seed=i, n=1 + i % 3, max_tokens=20, ignore_eos=True, logprobs=2)
        for i in range(6)
    ]
    return as_prompts(prompts), params, [None, "a", None, "b", "a", "b"]


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
