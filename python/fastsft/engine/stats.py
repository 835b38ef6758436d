"""What an engine has done since its start, and how full it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Counts since the start, and what there is now."""

    steps: int
    graph_steps: int
    """Of them, those that were one launch of a CUDA graph."""
    warm_up_seconds: float
    """On a GPU: the time in which graphs were captured, before the first request."""
    waiting: int
    """Continuations that hold no blocks; ``waiting_tokens`` are theirs."""
    waiting_tokens: int
    running: int
    preemptions: int
    prompt_tokens: int
    """Of all requests accepted."""
    found_tokens: int
    """Not computed, because the cache had them: of prompts, and of what was preempted."""
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    """Of the drafted ones."""
    blocks: int
    free_blocks: int
    """Held by no sequence; ``cached_blocks`` of them can still be found by their contents."""
    cached_blocks: int
    evictions: int
    prefill_failures: int
    """Of the process that computes prompts; what it was at was computed again."""
    weight_version: int
