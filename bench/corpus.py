"""The corpora of the near-duplicate benches, made from the Python sources of the machine that runs them.

``natural``: functions, methods and classes of 200 to 50,000 characters, cut by ``ast`` out of every ``*.py`` below the
given folders (by default the standard library and the installed packages), a fixed sample of them.
``mutants``: base texts and copies with words substituted, so that the Jaccard similarities of the pairs spread over 0.5
to 0.95.
``documents``: the texts of a file of training data where FASTSFT_BENCH_DATA names one, otherwise ``natural``, which
takes minutes for 100,000.
"""

from __future__ import annotations

import ast
import itertools
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastsft.data.records import Problems, read_records

SHORTEST, LONGEST = 200, 50_000


def default_folders() -> list[Path]:
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]


def definitions(paths: Iterable[Path]) -> Iterator[str]:
    """The source of each definition in the files that is neither too short nor too long."""
    for path in paths:
        try:
            source = path.read_text()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, OSError):  # the libraries' own tests hold broken files
            continue
        lines = source.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = "".join(lines[node.lineno - 1 : node.end_lineno])
                if SHORTEST <= len(text) <= LONGEST:
                    yield text


def natural(count: int, folders: Iterable[Path] | None = None, seed: int = 0) -> list[str]:
    """At most ``count`` definitions, sampled from the first 4 ``count`` of the files in random order."""
    rng = random.Random(seed)
    paths = sorted({p.resolve() for f in (default_folders() if folders is None else folders) for p in f.rglob("*.py")})
    rng.shuffle(paths)
    found = list(itertools.islice(definitions(paths), 4 * count))
    rng.shuffle(found)
    return found[:count]


def documents(count: int) -> list[str]:
    if path := os.environ.get("FASTSFT_BENCH_DATA"):
        return [r.text() for r in itertools.islice(read_records([path], Problems("skip")), count)]
    return natural(count)


def mutants(bases: list[str], seed: int = 0) -> list[str]:
    """Each base and a copy in which single words were replaced: at a rate of 1 - (2 J / (1 + J))^(1/5), two texts'
    word 5-grams have similarity J, drawn uniformly from 0.5 to 0.95."""
    rng = random.Random(seed)
    texts = []
    for base in bases:
        target = rng.uniform(0.5, 0.95)
        texts += [base, _replace_words(base, 1 - (2 * target / (1 + target)) ** 0.2, rng)]
    rng.shuffle(texts)
    return texts


def _replace_words(text: str, rate: float, rng: random.Random) -> str:
    return re.sub(r"\w+", lambda m: f"q{rng.randrange(10**6)}" if rng.random() < rate else m.group(), text)
