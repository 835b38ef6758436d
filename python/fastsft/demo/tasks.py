"""Small programming tasks whose answers can be executed: families of functions over names and constants."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastsft.verify.tasks import Task

_ADJECTIVES = ("total", "final", "base", "net", "next", "last", "main", "raw", "best", "local", "new", "old")
_NOUNS = ("price", "score", "value", "count", "level", "index", "width", "rate", "cost", "point", "size", "limit")


@dataclass(frozen=True)
class Family:
    """``ask`` and ``body`` are formatted with {c}; ``call`` is what the function must compute, over x and c."""

    ask: str
    body: str
    call: str
    inputs: Callable[[int], Sequence[object]]


def _numbers(c: int) -> Sequence[object]:
    """Every number on both sides of c, of its multiples' and of its divisors' borders."""
    return [*range(-3, 2 * c + 4), -c, 1000 + c]


def _lists(c: int) -> Sequence[object]:
    return [[], [c], [c + 1, c, c - 1, c], [-c, 1000], list(range(-3, 2 * c + 4))]


def _texts(c: int) -> Sequence[object]:
    """Texts shorter than c, of its length and longer, in which neighbouring characters differ."""
    letters = string.ascii_letters * (c // len(string.ascii_letters) + 2)
    return ["", "a", "Hello World", letters[: c - 1], letters[:c], letters[: c + 1], letters[: c + 9]]


FAMILIES = (
    Family("adds {c} to x", "return x + {c}", "x + c", _numbers),
    Family("subtracts {c} from x", "return x - {c}", "x - c", _numbers),
    Family("multiplies x by {c}", "return x * {c}", "x * c", _numbers),
    Family("returns the remainder of x divided by {c}", "return x % {c}", "x % c", _numbers),
    Family("returns the larger of x and {c}", "return max(x, {c})", "max(x, c)", _numbers),
    Family("returns the smaller of x and {c}", "return min(x, {c})", "min(x, c)", _numbers),
    Family("tells whether x is greater than {c}", "return x > {c}", "x > c", _numbers),
    Family("tells whether x is divisible by {c}", "return x % {c} == 0", "x % c == 0", _numbers),
    Family("squares x and adds {c}", "return x * x + {c}", "x * x + c", _numbers),
    Family("adds {c} to every element of the list x", "return [v + {c} for v in x]", "[v + c for v in x]", _lists),
    Family("keeps the elements of the list x above {c}", "return [v for v in x if v > {c}]",
           "[v for v in x if v > c]", _lists),
    Family("sums the list x and adds {c}", "return sum(x) + {c}", "sum(x) + c", _lists),
    Family("counts the elements of the list x below {c}", "return sum(1 for v in x if v < {c})",
           "sum(1 for v in x if v < c)", _lists),
    Family("repeats the string x {c} times", "return x * {c}", "x * c", _texts),
    Family("returns the first {c} characters of the string x", "return x[:{c}]", "x[:c]", _texts),
    Family("reverses the string x and repeats it {c} times", "return x[::-1] * {c}", "x[::-1] * c", _texts),
)  # fmt: skip

Conversation = list[dict[str, str]]


def build(count: int, held_out: int, *, seed: int) -> tuple[list[Conversation], list[Task], list[str]]:
    """Training conversations, held-out tasks, and the latter's canonical answers.

    Each (family, name, constant) is drawn at most once. Of a held-out task, neither the function name nor the pair of
    family and constant occurs in a training conversation.
    """
    names = [f"{a}_{n}" for a, n in itertools.product(_ADJECTIVES, _NOUNS)]
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    names = [names[i] for i in rng.permutation(len(names))]
    kept, fresh = names[: -len(names) // 5], names[-len(names) // 5 :]
    problems = list(itertools.product(FAMILIES, range(2, 100)))
    if held_out > len(problems) // 2:
        raise ValueError(f"tasks: expected at most {len(problems) // 2} held-out tasks, got {held_out}")
    problems = [problems[i] for i in rng.permutation(len(problems))]
    picks = [(family, fresh[rng.integers(len(fresh))], c) for family, c in problems[:held_out]]
    every = [(family, name, c) for family, c in problems[held_out:] for name in kept]
    if count > len(every):
        raise ValueError(f"tasks: expected at most {len(every)} training tasks, got {count}")
    train = [_conversation(*every[i]) for i in rng.choice(len(every), count, replace=False)]
    return train, [_task(i, *pick) for i, pick in enumerate(picks)], [_answer(*pick) for pick in picks]


def _ask(family: Family, name: str, constant: int) -> str:
    return f"Write a function `{name}(x)` that {family.ask.format(c=constant)}."


def _answer(family: Family, name: str, constant: int) -> str:
    return f"def {name}(x):\n    {family.body.format(c=constant)}"


def _conversation(family: Family, name: str, constant: int) -> Conversation:
    return [
        {"role": "user", "content": _ask(family, name, constant)},
        {"role": "assistant", "content": _answer(family, name, constant)},
    ]


def _task(number: int, family: Family, name: str, constant: int) -> Task:
    # The expected values come from `call`, not from the answer's text.
    expected: Callable[[object], object] = eval(f"lambda x, c={constant}: {family.call}")
    cases = [(x, expected(x)) for x in family.inputs(constant)]
    check = f"for x, expected in {cases!r}:\n    assert {name}(x) == expected, x"
    return Task(f"demo/{number}", _ask(family, name, constant), check)
