"""Code edits and infills for ``bench_engine_drafts.py``, and an engine that is made to write them.

A randomly initialised model would write neither. So the logits of the token that comes next in the true text are
raised above all others, in plain decoding as with drafts: every step costs what it costs, and a guess from the text is
accepted where it holds for real code. The draft model is made to be right on a share of the tokens.
"""

from __future__ import annotations

import itertools
import keyword
import random
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
from engine_case import Case, model_config

METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "n-gram": {"method": "ngram"},
    "suffix automaton": {"method": "suffix"},
    "draft model": {"method": "draft_model"},
}
RIGHT = 0.8  # share of tokens on which the draft model is
LONGEST = 320  # characters of an infill; an edit repeats a whole function
COUNT = 8


@dataclass(frozen=True)
class Task:
    prompt: list[int]
    answer: list[int]


def tasks(kind: str) -> list[Task]:
    """Of functions of the standard library, with a tokenizer trained on it. ``kind``: one of KINDS."""
    from fastsft.models.tokenizer import Tokenizer

    sources = corpus.natural(400, [Path(sysconfig.get_path("stdlib"))])
    tokenizer = Tokenizer.train(sources, 8192)
    fitting = [s for s in sources if 800 <= len(s) <= 2400]
    pairs = itertools.islice(filter(None, map(KINDS[kind], fitting)), COUNT)
    return [Task(*(tokenizer.encode_text([text])[0] for text in pair)) for pair in pairs]


def _edit(source: str) -> tuple[str, str] | None:
    """The name that occurs most renamed, a line put in, a line taken out."""
    names = Counter(n for n in re.findall(r"\b[a-z_]{4,}\b", source) if not keyword.iskeyword(n) and n != "self")
    if not names or (old := names.most_common(1)[0])[1] < 3:
        return None
    lines = re.sub(rf"\b{old[0]}\b", f"new_{old[0]}", source).splitlines()
    lines.insert(len(lines) // 2, "    # changed here")
    del lines[3 * len(lines) // 4]
    return f"# Rename {old[0]} to new_{old[0]}.\n{source}\n# Result:\n", "\n".join(lines)


def _infill(source: str) -> tuple[str, str]:
    """The lines in the middle, after what is before and behind them."""
    begin = source.index("\n", len(source) // 2 - LONGEST // 2) + 1
    end = source.find("\n", begin + LONGEST - 80) + 1 or len(source)
    return f"<prefix>{source[:begin]}<suffix>{source[end:]}<middle>", source[begin:end]


def _infill_of_copy(source: str) -> tuple[str, str] | None:
    """The lines in the middle of the edited function, with the one it was made from before it."""
    if (edit := _edit(source)) is None:
        return None
    prompt, middle = _infill(edit[1])
    return source + prompt, middle


KINDS: dict[str, Callable[[str], tuple[str, str] | None]] = {
    "edits": _edit,
    "infills": _infill,
    "infills of an edited copy": _infill_of_copy,
}


class Drafts:
    """A contestant: see ``engine_contestants.py``."""

    def __init__(self, case: Case, folder: Path) -> None:
        import torch

        from fastsft import LLM
        from fastsft.engine.packed_runner import PackedRunner
        from fastsft.models.tokenizer import Tokenizer
        from fastsft.models.weights import init_model, save_model

        small = folder.with_name("draft")
        if not small.exists():
            sizes = {
                "hidden_size": 256,
                "intermediate_size": 640,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
            }  # 12 M
            save_model(init_model({**model_config(case.size), **sizes}, seed=1), small)
            Tokenizer.from_folder(folder).save(small)
        self.llms = {}
        for name, config in METHODS.items():
            if name == "draft model":
                config = {**(config or {}), "model": small}
            quantization = {"int8": "w8a8", "int4": "int4"}.get(case.format)
            dtype = getattr(torch, case.activations)
            self.llms[name] = LLM(folder, dtype=dtype, quantization=quantization, speculative_config=config)
        self.kinds = {kind: tasks(kind) for kind in KINDS}
        self.text: list[int] = []
        forward, targets = PackedRunner.forward, [llm.core._runner for llm in self.llms.values()]

        def forced(runner: PackedRunner, inputs: Any, rows: torch.Tensor) -> torch.Tensor:
            logits = forward(runner, inputs, rows)
            first = int(inputs.context_lens_B[0]) - int(inputs.cu_seqlens[1])
            for row, at in zip(logits, rows.tolist(), strict=True):
                place = first + at + 1
                if place < len(self.text) and (runner in targets or random.Random(place).random() < RIGHT):
                    row[self.text[place]] = 1e9
            return logits

        PackedRunner.forward = forced  # type: ignore[method-assign]

    def seconds(self, kind: str, method: str) -> dict[str, float]:
        """Of all answers of a kind but for their first tokens; tokens; and the shares of drafts accepted."""
        from fastsft import SamplingParams
        from fastsft.engine.request import Request

        core = self.llms[method].core
        before, spent, count = core.stats(), 0.0, 0
        for number, task in enumerate(self.kinds[kind]):
            self.text = [*task.prompt, *task.answer]
            params = SamplingParams(max_tokens=len(task.answer), ignore_eos=True)
            core.add(Request(str(number), tuple(task.prompt), params))
            found: list[int] = []
            while core.busy:
                start = time.perf_counter()
                began = bool(found)
                for update in core.step():
                    found += update.token_ids
                if began:
                    spent += time.perf_counter() - start
            assert found == task.answer
            count += len(found) - 1
        after = core.stats()
        drafted = after.drafted_tokens - before.drafted_tokens
        accepted = after.accepted_tokens - before.accepted_tokens
        return {"seconds": spent, "tokens": count, "drafted": drafted, "accepted": accepted}

    def unlike_plain(self, method: str) -> float:
        """Share of tokens that differ from plain decoding's, or whose log-probabilities do in any bit: sampled at
        temperature 1, with nothing forced, after prompts that repeat themselves."""
        from fastsft import SamplingParams

        self.text = []
        prompts = [{"prompt_token_ids": task.prompt[:60] * 3} for task in self.kinds["edits"]]
        params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=7, logprobs=0)
        found: list[list[Any]] = []
        for name in ("plain", method):
            choices = [o.outputs[0] for o in self.llms[name].generate(prompts, params)]
            found.append([pair for c in choices for pair in zip(c.token_ids, c.logprobs or (), strict=True)])
        return sum(a != b for a, b in zip(*found, strict=True)) / len(found[0])
