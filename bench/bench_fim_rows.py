"""Fill-in-the-middle rows: cuts between characters, and between tokens with targets and positions.

Documents are the functions and classes of the standard library, 200 to 50,000 characters each, in the ids of a
byte-level BPE that is trained on them. Rivals: for characters, decode, cut and encode the three pieces with
``tokenizers``, the only way to the same ids so far; for tokens, numpy, one document at a time, which builds the same
three arrays. Gates, before any time is taken: every row of ours is the one that encoding the pieces whole gives. One
thread each; ``extra_info`` holds documents per second.

Packed rows of 8,192 tokens: ours keeps and repacks every token; the rival splits at the documents' ends, decodes,
encodes and cuts off what no longer fits, as Megatron-LM's fork for StarCoder does. Python syntax: the scan for
statements, blocks and brackets against tree-sitter's parse alone, without its choice of a node; the gate is the share
of the scan's spans that are nodes of the tree.
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
from fastsft.data.fim_context import refill
from fastsft.models.fim import FORMATS, Fim
from fastsft.models.tokenizer import Tokenizer
from fastsft.ops.bpe import ByteBpe
from fastsft.ops.fim_rows import MIDDLE, PREFIX, SUFFIX, fim_cuts

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
    found = Tokenizer.train(texts(), VOCABULARY, FORMATS["qwen"].required)
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


ROW = 8192


@functools.cache
def packed() -> tuple[np.ndarray, np.ndarray]:
    """Rows of ROW tokens, documents end to end with an end token behind each, cut wherever a row is full."""
    end = tokenizer().eos_id
    flat = [i for row in documents()[0] for i in [*row, end]]
    tokens = np.array(flat[: len(flat) // ROW * ROW], np.int32)
    return tokens, np.arange(0, len(tokens) + 1, ROW)


def refilled() -> Any:
    tokens, cu = packed()
    end = tokenizer().eos_id
    return refill(tokens, cu, Fim.find(tokenizer()), end_id=end, capacity=ROW, seed=0, rate=1.0, encoder=encoder())


def split_and_encode(rows: int) -> list[list[int]]:
    backend, end, rng = tokenizer().backend, tokenizer().eos_id, np.random.default_rng(0)
    out = []
    for row in packed()[0].reshape(-1, ROW)[:rows]:
        found: list[int] = []
        for piece in np.split(row, np.flatnonzero(row == end) + 1):
            text = backend.decode(piece[piece != end].tolist())
            x, y = np.sort(rng.integers(0, len(text), 2, endpoint=True))
            pieces = [backend.encode(part).ids for part in (text[:x], text[x:y], text[y:])]
            found += [*lay_out(pieces, rng.random() < 0.5), end]
        out.append(found[:ROW])
    return out


@pytest.mark.parametrize("contestant", ["fastsft", "tokenizers"])
def test_packed_rows(benchmark, contestant):
    tokens, _ = packed()
    benchmark.group = f"FIM between characters on packed rows of {ROW}, rate 1.0"
    rows = len(tokens) // ROW if contestant == "fastsft" else 12
    if contestant == "fastsft":  # gate: every byte is still there; a token's name has a letter for each of its bytes
        found = refilled()
        marks = {*Fim.find(tokenizer()).stop_ids}
        sizes = [
            sum(len(tokenizer().backend.id_to_token(i)) for i in ids.tolist() if i not in marks)
            for ids in (tokens, found.fragments.tokens)
        ]
        assert sizes[0] == sizes[1]
        assert found.not_exact == 0
    function = refilled if contestant == "fastsft" else lambda: split_and_encode(rows)
    function()
    benchmark.pedantic(function, rounds=9, iterations=1)
    benchmark.extra_info["tokens_per_second"] = rows * ROW / benchmark.stats["median"]


@pytest.mark.parametrize("contestant", ["fastsft", "tree-sitter"])
def test_syntax(benchmark, contestant):
    tree_sitter, language = pytest.importorskip("tree_sitter"), pytest.importorskip("tree_sitter_python")
    parser = tree_sitter.Parser(tree_sitter.Language(language.language()))
    data = [text.encode() for text in texts()]
    benchmark.group = "Spans of Python syntax"
    if contestant == "fastsft":
        spans = nodes = 0
        for source in data[:1000]:
            waiting, found = [parser.parse(source).root_node], set()
            while waiting:
                node = waiting.pop()
                found.add((node.start_byte, node.end_byte))
                waiting += node.children
            scanned = _C.code_spans(source)
            spans += len(scanned)
            nodes += sum(span in found for span in scanned)
        benchmark.extra_info["share_that_are_nodes"] = nodes / spans
        assert nodes >= 0.95 * spans
        function = lambda: fim_cuts(texts(), seed=0, rate=1.0, unit="syntax")  # noqa: E731
    else:
        function = lambda: [parser.parse(source) for source in data]  # noqa: E731
    benchmark.pedantic(function, rounds=9, iterations=1, warmup_rounds=1)
    benchmark.extra_info["documents_per_second"] = len(data) / benchmark.stats["median"]
