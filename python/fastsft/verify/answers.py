"""What a model writes to solve tasks: prompts out, code back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fastsft.verify.tasks import Task, extract_code


class Engine(Protocol):
    """:class:`fastsft.LLM`, as far as it is needed here."""

    def generate(self, prompts: Any, params: Any = None, *, progress: Any = False) -> list[Any]: ...

    def chat(self, messages: Any, params: Any = None, *, progress: Any = False) -> list[Any]: ...


def ask(
    llm: Engine,
    tasks: Sequence[Task],
    params: Any,
    *,
    completion: bool,
    progress: bool | Callable[[int, int], None] = False,
) -> list[Any]:
    """What the engine returns for each task.

    Args:
        params: sampling parameters, or a list with those of each task.
        completion: the prompt is continued as it is; otherwise it is a chat message that is answered.
        progress: as in ``LLM.generate``.

    Raises:
        ValueError: a prompt that the model cannot continue; its ``number`` is that of the task.
    """
    if completion:
        return llm.generate([task.prompt for task in tasks], params, progress=progress)
    return llm.chat([[{"role": "user", "content": task.prompt}] for task in tasks], params, progress=progress)


def code_of(text: str, *, completion: bool) -> str:
    """The part of a sample that is executed: all of a continuation, the first fenced block of an answer."""
    return text if completion else extract_code(text)


def codes_of(outputs: Sequence[Any], *, completion: bool) -> list[list[str]]:
    """The same of everything that :func:`ask` returned, by task."""
    return [[code_of(o.text, completion=completion) for o in output.outputs] for output in outputs]
