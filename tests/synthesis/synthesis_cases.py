"""Tasks whose answers are numbers, and an engine that knows some of them: a function of prompt and seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from fastsft.engine.request import CompletionOutput, PromptError, RequestOutput, SamplingParams
from fastsft.verify.sandbox import Limits, SandboxResult
from fastsft.verify.tasks import Task

TASKS = [Task(f"t/{i}", f"Set x to {i}.", f"assert x == {i}") for i in range(20)]


class Engine:
    """Answers ``x = i`` rightly with a probability that differs by task. Its calls are counted."""

    calls: list[list[str]] = []  # noqa: RUF012

    def __init__(self, model: Any, *, dtype: Any, device: str, speculative_config: Any) -> None:
        self.loaded = (model, dtype)

    def chat(self, messages: list[Any], params: list[SamplingParams], *, progress: Any) -> list[RequestOutput]:
        return self._answer([m[0]["content"] for m in messages], params, fence=True)

    def generate(self, prompts: list[str], params: list[SamplingParams], *, progress: Any) -> list[RequestOutput]:
        return self._answer(prompts, params, fence=False)

    def _answer(self, prompts: list[str], params: list[SamplingParams], *, fence: bool) -> list[RequestOutput]:
        for number, prompt in enumerate(prompts):
            if prompt.endswith("13."):
                raise PromptError(number, "too long")
        type(self).calls.append(prompts)
        results = []
        for prompt, p in zip(prompts, params, strict=True):
            wanted = int(prompt.rstrip(".").split()[-1])
            outputs = []
            for i in range(p.n):
                draw = random.Random((p.seed or 0) + i)
                value = wanted if draw.random() < wanted / 19 else wanted + 1
                text = (
                    f"x = {value}" + " " * draw.randint(0, 2) + draw.choice(["", "\n# by hand, slowly and with care"])
                )
                text = f"Sure:\n```python\n{text}\n```" if fence else text
                reason = "length" if draw.random() < 0.1 else "stop"
                ids = (1, 2)
                outputs.append(CompletionOutput(i, text, ids, reason, None, ({1: -0.25}, {2: -draw.random()})))
            results.append(RequestOutput(prompt, (0,), tuple(outputs)))
        return results


def judged_here(
    pairs: list[tuple[Task, str]], *, workers: int, languages: Any, limits: Limits, progress: Any
) -> list[SandboxResult]:
    """What the sandbox would say."""
    results = []
    for task, code in pairs:
        names: dict[str, Any] = {}
        exec(code, names)
        right = task.check == f"assert x == {names['x']}"
        results.append(SandboxResult("ok" if right else "error", "", "" if right else "AssertionError", 0.0, ()))
    return results


def model_files(folder: Path) -> Path:
    """Enough of a model to be told from another one."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(name)
    return folder
