"""Fill-in-the-middle rows: cuts between characters, and between tokens with targets and positions.

Documents are the functions and classes of the standard library, 200 to 50,000 characters each, in the ids of a
byte-level BPE that is trained on them. Rivals: for characters, decode, cut and encode the three pieces with
``tokenizers``, the only way to the same ids so far; for tokens, numpy, one document at a time, which builds the same
three arrays. Gates, before any time is taken: every row of ours is the one that encoding the pieces whole gives. One
thread each; ``extra_info`` holds documents per second.
"""

from __future__ import annotations

import ast
import functools
import itertools
import os
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from fastsft import _C, ops
from fastsft.models.tokenizer import Tokenizer
from fastsft.ops.bpe import ByteBpe
from fastsft.ops.fim_rows import MIDDLE, PREFIX, SUFFIX

PRE, SUF, MID = 90_001, 90_002, 90_003
PSM, SPM = (PRE, PREFIX, SUF, SUFFIX, MID, MIDDLE), (PRE, SUF, SUFFIX, MID, PREFIX, MIDDLE)
DOCUMENTS, RIVAL_DOCUMENTS, VOCABULARY = 5000, 300, 32_000


@functools.cache
def texts() -> tuple[str, ...]:
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or len(found) >= DOCUMENTS:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = "".join(lines[node.lineno - 1 : node.end_lineno])
                if 200 <= len(text) <= 50_000:
                    found.append(text)
    return tuple(found[:DOCUMENTS])


@functools.cache
def tokenizer() -> Tokenizer:
    found = Tokenizer.train(texts(), VOCABULARY)
    found.backend.normalizer = None  # the rival may not pay for what the documents need not
    return found


@functools.cache
def documents() -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    ids = tokenizer().encode_batch(texts())
    cu = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    return ids, np.array([i for row in ids for i in row], np.int32), cu


@functools.cache
def encoder() -> ByteBpe:
    return ByteBpe(tokenizer().backend)


def ours(unit: str, rate: float) -> Any:
    _, tokens, cu = documents()
    return ops.fim_rows(
        tokens, cu, psm=PSM, spm=SPM, seed=0, rate=rate, unit=unit, encoder=None if unit == "token" else encoder()
    )


def lay_out(pieces: list[list[int]], spm: bool) -> list[int]:
    prefix, middle, suffix = pieces
    return [PRE, SUF, *suffix, MID, *prefix, *middle] if spm else [PRE, *prefix, SUF, *suffix, MID, *middle]


def decode_and_encode(rate: float) -> list[list[int]]:
    """What santacoder-style pipelines do, for the first RIVAL_DOCUMENTS."""
    backend, rng, rows = tokenizer().backend, np.random.default_rng(0), []
    for ids in documents()[0][:RIVAL_DOCUMENTS]:
        row = ids
        if rng.random() < rate:
            text = backend.decode(ids)
            x, y = np.sort(rng.integers(0, len(text), 2, endpoint=True))
            pieces = [backend.encode(part).ids for part in (text[:x], text[x:y], text[y:])]
            row = lay_out(pieces, rng.random() < 0.5)
        rows.append(row)
    return rows


def with_numpy(rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, targets and positions."""
    _, tokens, cu = documents()
    rng = np.random.default_rng(0)
    pre, suf, mid = (np.array([s], tokens.dtype) for s in (PRE, SUF, MID))
    end = np.array([-100], tokens.dtype)
    rows, targets, positions = [], [], []
    for begin, stop in itertools.pairwise(cu):
        row = tokens[begin:stop]
        if rng.random() < rate:
            x, y = np.sort(rng.integers(0, len(row), 2, endpoint=True))
            prefix, middle, suffix = row[:x], row[x:y], row[y:]
            row = np.concatenate(
                [pre, suf, suffix, mid, prefix, middle]
                if rng.random() < 0.5
                else [pre, prefix, suf, suffix, mid, middle]
            )
        rows.append(row)
        targets += [row[1:], end]
        positions.append(np.arange(len(row), dtype=tokens.dtype))
    return np.concatenate(rows), np.concatenate(targets), np.concatenate(positions)


@functools.cache
def gate(unit: str) -> None:
    """Every row against the pieces, encoded whole or sliced, that the reported cuts make."""
    ids, _, _ = documents()
    rows = ours(unit, 1.0)
    for b, text in enumerate(texts()):
        x, y = rows.cuts[b]
        data: Any = ids[b] if unit == "token" else text.encode()
        parts = (data[:x], data[x:y], data[y:])
        pieces = list(parts) if unit == "token" else [tokenizer().backend.encode(p.decode()).ids for p in parts]
        begin, end = rows.cu_seqlens[b], rows.cu_seqlens[b + 1]
        row = lay_out(pieces, rows.mode[b] == 2)
        assert rows.tokens[begin:end].tolist() == row, b
        assert rows.targets[begin:end].tolist() == [*row[1:], -100], b
        assert rows.position_ids[begin:end].tolist() == list(range(len(row))), b


@pytest.fixture(autouse=True)
def one_thread():
    threads = _C.num_threads()
    _C.set_num_threads(1)
    yield
    _C.set_num_threads(threads)


def run(benchmark, contestant, number, group):
    benchmark.group = group
    contestant()  # warm: buffers, and characters met for the first time
    benchmark.pedantic(contestant, rounds=9, iterations=1)
    benchmark.extra_info["documents_per_second"] = number / benchmark.stats["median"]
    benchmark.extra_info["tokens_per_document"] = len(documents()[1]) / len(documents()[0])


@pytest.mark.parametrize("contestant", ["fastsft", "tokenizers"])
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_characters(benchmark, rate, contestant):
    gate("character")
    group = f"FIM between characters, rate {rate}"
    if contestant == "fastsft":
        run(benchmark, lambda: ours("character", rate), DOCUMENTS, group)
    else:
        run(benchmark, lambda: decode_and_encode(rate), RIVAL_DOCUMENTS, group)


@pytest.mark.parametrize("contestant", ["fastsft", "numpy"])
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_tokens(benchmark, rate, contestant):
    gate("token")
    group = f"FIM between tokens with targets and positions, rate {rate}"
    run(
        benchmark,
        (lambda: ours("token", rate)) if contestant == "fastsft" else (lambda: with_numpy(rate)),
        DOCUMENTS,
        group,
    )
