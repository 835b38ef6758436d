"""A contestant of ``bench_engine.py``, in a process of its own:
``python bench/engine_contestants.py CONTESTANT SIZE FORMAT THREADS FOLDER``.

FOLDER holds the model. Each line on stdin is a JSON list of a method's name and its arguments; what the method returns
is printed as a line of JSON.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import engine_files as files
import engine_steps as steps
from engine_case import CONTEXT, Case


@dataclass
class Trace:
    """Greedy continuations: ``prefill`` seconds until each prompt has its first token, then those of every step."""

    tokens: list[list[int]]
    prefill: float
    steps: list[float]


class Fastsft:
    def __init__(self, case: Case, folder: Path) -> None:
        import torch

        from fastsft import LLM

        self.case = case
        quantization = {"int8": "w8a8", "int4": "int4"}.get(case.format)
        self.llm = LLM(folder, dtype=getattr(torch, case.activations), quantization=quantization)

    def generate(self, prompts: list[list[int]], new: int) -> Trace:
        from fastsft import SamplingParams
        from fastsft.engine.request import Request

        core = self.llm.core
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        found: list[list[int]] = [[] for _ in prompts]
        clock = Clock()
        for i, prompt in enumerate(prompts):
            core.add(Request(str(i), tuple(prompt), params))
        while core.busy:
            for update in core.step():
                found[int(update.request_id)] += update.token_ids
            clock.step(all(found))
        return clock.trace(found)

    def serve(self, prompts: list[list[int]], news: list[int]) -> Trace:
        """All at once; ``prefill`` is the whole time."""
        from fastsft import SamplingParams

        params = [SamplingParams(max_tokens=new, ignore_eos=True) for new in news]
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return Trace([list(o.outputs[0].token_ids) for o in outputs], time.perf_counter() - start, [])


class Transformers:
    def __init__(self, case: Case, folder: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(case.threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, case.format))

    def generate(self, prompts: list[list[int]], new: int) -> Trace:
        import torch
        from transformers import LogitsProcessor, LogitsProcessorList

        ids = torch.tensor(prompts)
        clock = Clock()

        class Stamp(LogitsProcessor):
            """Called once a step, when the logits are there."""

            def __call__(self, input_ids: Any, scores: Any) -> Any:
                clock.step(True)
                return scores

        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            eos_token_id=None, pad_token_id=0, logits_processor=LogitsProcessorList([Stamp()]),
        )  # fmt: skip
        return clock.trace(out[:, ids.shape[1] :].tolist())

    def serve(self, prompts: list[list[int]], news: list[int], batch: int) -> Trace:
        """In batches of ``batch``, in order of arrival, padded on the left and run until the longest is done."""
        import torch

        found: list[list[int]] = []
        start = time.perf_counter()
        for first in range(0, len(prompts), batch):
            those, theirs = prompts[first : first + batch], news[first : first + batch]
            width, new = max(map(len, those)), max(theirs)
            ids = torch.tensor([[0] * (width - len(p)) + p for p in those])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in those])
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
            found += [row[:n] for row, n in zip(out[:, width:].tolist(), theirs, strict=True)]
        return Trace(found, time.perf_counter() - start, [])


class LlamaCpp:
    """Through its C interface: one call of llama_decode a step, and numpy's argmax of the logits."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.stepper = steps.LlamaCpp(case, folder)

    def generate(self, prompts: list[list[int]], new: int) -> Trace:
        self.stepper.begin(len(prompts))
        length = len(prompts[0])
        rows = [(token, s, p) for s, prompt in enumerate(prompts) for p, token in enumerate(prompt)]
        wanted = list(range(length - 1, len(rows), length))
        found: list[list[int]] = [[] for _ in prompts]
        clock = Clock()
        for position in range(length, length + new):
            last = [int(x.argmax()) for x in self.stepper.decode(rows, wanted)]
            clock.step(True)
            for tokens, token in zip(found, last, strict=True):
                tokens.append(token)
            rows = [(token, s, position) for s, token in enumerate(last)]
            wanted = list(range(len(rows)))
        return clock.trace(found)


class OpenVino:
    """GenAI's continuous batching, stepped by hand. Its cache is int8, as by default, except in float32."""

    def __init__(self, case: Case, folder: Path) -> None:
        import openvino_genai

        self.genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 1, CONTEXT, 64
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": case.threads}
        if case.format == "float32":
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        else:
            properties["INFERENCE_PRECISION_HINT"] = "bf16"
        path = files.openvino(folder, case.format)
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties)

    def generate(self, prompts: list[list[int]], new: int) -> Trace:
        import numpy as np
        from openvino import Tensor

        config = self.genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        clock = Clock()
        handles = [
            self.pipeline.add_request(i, Tensor(np.array([prompt], np.int64)), config)
            for i, prompt in enumerate(prompts)
        ]
        begun = False
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            begun = begun or all(handle.can_read() for handle in handles)
            clock.step(begun)
        return clock.trace([handle.read_all()[0].generated_ids for handle in handles])


class CTranslate2:
    def __init__(self, case: Case, folder: Path) -> None:
        import ctranslate2

        path = files.ctranslate2(folder, case.format)
        self.generator = ctranslate2.Generator(
            str(path), inter_threads=1, intra_threads=case.threads, compute_type=case.format
        )
        self.names: list[str] = json.loads((path / "vocabulary.json").read_text())

    def generate(self, prompts: list[list[int]], new: int) -> Trace:
        clock = Clock()
        last = len(prompts) - 1

        def told(result: Any) -> bool:
            if result.batch_id == last:
                clock.step(True)
            return False

        out = self.generator.generate_batch(
            [[self.names[i] for i in prompt] for prompt in prompts], max_length=new, min_length=new, beam_size=1,
            sampling_topk=1, include_prompt_in_result=False, end_token=[], callback=told,
        )  # fmt: skip
        return clock.trace([result.sequences_ids[0] for result in out])


class VLLM:
    """The engine core in this process, compiled, stepped by hand; a prompt is one step, and no prefix is kept."""

    def __init__(self, case: Case, folder: Path) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many threads as OMP_NUM_THREADS says
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        import vllm

        self.params = functools.partial(vllm.SamplingParams, temperature=0, ignore_eos=True, detokenize=False)
        self.engine = vllm.LLM(
            str(folder), dtype=case.format, skip_tokenizer_init=True, max_model_len=CONTEXT, max_num_seqs=64,
            max_num_batched_tokens=CONTEXT, enable_prefix_caching=False, disable_log_stats=True,
        ).llm_engine  # fmt: skip
        self.asked = itertools.count()

    def generate(self, prompts: list[list[int]], new: int) -> Trace:
        found: dict[str, list[int]] = {f"{next(self.asked)}": [] for _ in prompts}
        clock = Clock()
        for name, prompt in zip(found, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, self.params(max_tokens=new))
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
            clock.step(all(found.values()))
        return clock.trace(list(found.values()))


class Clock:
    """Seconds from step to step, those before every prompt has its first token taken together."""

    def __init__(self) -> None:
        self.stamps = [time.perf_counter()]

    def step(self, begun: bool) -> None:
        if begun:
            self.stamps.append(time.perf_counter())

    def trace(self, tokens: list[list[int]]) -> Trace:
        first, *rest = [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]
        return Trace(tokens, first, rest)


def drafts(case: Case, folder: Path) -> Any:
    from engine_drafts import Drafts  # it needs what a rival's environment may lack

    return Drafts(case, folder)


CONTESTANTS: dict[str, Callable[[Case, Path], Any]] = {
    "fastsft": Fastsft,
    "llama.cpp": LlamaCpp,
    "OpenVINO GenAI": OpenVino,
    "CTranslate2": CTranslate2,
    "vLLM": VLLM,
    "transformers": Transformers,
    "fastsft, step": steps.Verification.of_fastsft,
    "fastsft, drafts": drafts,
    "llama.cpp, step": steps.Verification.of_llama_cpp,
}


def main() -> None:
    name, size, format, threads, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    contestant = CONTESTANTS[name](Case(size, format, int(threads)), Path(folder))
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        found = getattr(contestant, method)(*arguments)
        print(json.dumps(asdict(found) if isinstance(found, Trace) else found), file=answers, flush=True)


if __name__ == "__main__":
    main()
