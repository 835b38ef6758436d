"""What Prometheus sees. Names and units are vLLM's, with our prefix, so that its dashboards need no more than that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastsft.engine.request import Request, Update
from fastsft.engine.server.async_engine import AsyncEngine

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10,
            20, 40, 80)  # fmt: skip
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: AsyncEngine, model: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_OfEngine(engine, model))

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Any:
            made = Histogram(f"fastsft:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model)

        self._first = histogram("time_to_first_token_seconds", "Arrival of a request to its first token", _FIRST)
        self._between = histogram("inter_token_latency_seconds", "Between two tokens of a continuation", _BETWEEN)
        self._whole = histogram("e2e_request_latency_seconds", "Arrival of a request to its last token", _WHOLE)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self._generated = histogram("request_generation_tokens", "Tokens of a continuation", _TOKENS)
        self._ended = Counter(
            "fastsft:request_success", "Continuations that ended", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self._answers = Counter("fastsft:http_responses", "Answers", ["status"], registry=self.registry)
        self._model = model

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def answered(self, status: int) -> None:
        self._answers.labels(str(status)).inc()

    def observer(self, requests: Sequence[Request]) -> Callable[[Update | None], None]:
        """What to tell the updates of these requests, which have just arrived, and None of one that was given up."""
        arrival = time.perf_counter()
        last: dict[tuple[str, int], float] = {}
        tokens: dict[tuple[str, int], int] = {}
        prompts = {r.request_id: len(r.prompt_token_ids) for r in requests}

        def observe(update: Update | None) -> None:
            if update is None:
                self._ended.labels(self._model, "abort").inc()
                return
            now, key, count = time.perf_counter(), (update.request_id, update.index), len(update.token_ids)
            if key in last:
                for _ in range(count):
                    self._between.observe((now - last[key]) / count)
            elif count:
                self._first.observe(now - arrival)
                if update.request_id in prompts:
                    self._prompt.observe(prompts.pop(update.request_id))
            if count:
                last[key] = now
            tokens[key] = tokens.get(key, 0) + count
            if update.finish_reason is not None:
                self._whole.observe(now - arrival)
                self._generated.observe(tokens[key])
                self._ended.labels(self._model, update.finish_reason).inc()

        return observe


class _OfEngine(Collector):
    """Reads the engine's counts when they are asked for."""

    def __init__(self, engine: AsyncEngine, model: str) -> None:
        self._engine, self._model = engine, model

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.snapshot
        gauges = {
            "num_requests_running": ("Continuations that are computed", stats.running),
            "num_requests_waiting": ("Continuations that wait", stats.waiting),
            "num_tokens_waiting": ("Tokens that wait", stats.waiting_tokens),
            "kv_cache_usage_perc": ("Share of the cache's blocks in use", 1 - stats.free_blocks / stats.blocks),
            "warm_up_seconds": ("Time before the first request, on a GPU", stats.warm_up_seconds),
            "weight_version": ("Of the weights that are computed with", stats.weight_version),
        }
        counters = {
            "engine_steps": ("Steps", stats.steps),
            "graph_steps": ("Steps that were one launch of a CUDA graph", stats.graph_steps),
            "engine_failures": ("Steps that failed", self._engine.failures),
            "prefill_failures": ("Ends and failed steps of the prefill process", stats.prefill_failures),
            "num_preemptions": ("Continuations that had to give up their blocks", stats.preemptions),
            "prompt_tokens": ("Tokens of prompts", stats.prompt_tokens),
            "generation_tokens": ("Generated tokens", stats.generated_tokens),
            "prefix_cache_queries": ("Tokens of prompts that were looked for in the cache", stats.prompt_tokens),
            "prefix_cache_hits": ("Tokens that were found in the cache", stats.found_tokens),
            "spec_decode_num_draft_tokens": ("Guessed tokens that were checked", stats.drafted_tokens),
            "spec_decode_num_accepted_tokens": ("Guessed tokens that were right", stats.accepted_tokens),
        }
        for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in values.items():
                family = kind(f"fastsft:{name}", text, labels=["model_name"])
                family.add_metric([self._model], value)
                yield family
