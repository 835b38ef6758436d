"""Infilling samples: the original comes back, the rates are the asked ones, and a cut depends on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.data.fim import Spans, cut, draft_fim, draft_record
from fastsft.data.records import Record
from fastsft.data.segments import join
from fastsft.data.tokenise import encode
from fastsft.models.fim import Fim
from fastsft.models.tokenizer import Tokenizer

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
END = "<|endoftext|>"
TOKENIZER = Tokenizer.train(["def f(x): return x"], 300, MARKS)
TOKENIZER.backend.normalizer = None  # so that any text comes back as it was
FIM = Fim.find(TOKENIZER)
PRE, SUF, MID = (TOKENIZER.token_id(m) for m in MARKS)


def sample(parts: tuple[str, str, str], *, spm: bool, train_context: bool = True) -> tuple[list[int], list[float]]:
    (found,) = encode([draft_fim(parts, TOKENIZER, FIM, spm=spm, train_context=train_context)], TOKENIZER)
    whole = join(found)
    return whole.ids.tolist(), whole.weights.tolist()


def parts_of(ids: list[int], *, spm: bool) -> tuple[list[int], list[int], list[int]]:
    """The token ids of prefix, of suffix and of the middle; in suffix-first order the prefix is empty, and the middle
    begins with it."""
    assert [ids.count(m) for m in (PRE, SUF, MID)] == [1, 1, 1]
    assert ids[0] == PRE
    assert ids[-1] == TOKENIZER.eos_id
    suf, mid = ids.index(SUF), ids.index(MID)
    assert (suf == 1) >= spm
    return ids[1:suf], ids[suf + 1 : mid], ids[mid + 1 : -1]


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(codec="utf-8"), max_size=40) | st.text("if x:\n\t()[]'#é", max_size=40),
    st.booleans(), st.integers(0, 1000), st.sampled_from(["char", "token", "line", "syntax"]),
)  # fmt: skip
def test_restore_gives_the_document(text: str, spm: bool, index: int, spans: Spans) -> None:
    found = cut(text, seed=3, index=index, rate=1.0, spm_rate=float(spm), spans=spans, tokenizer=TOKENIZER)
    if not text:
        assert found is None
        return
    assert found is not None
    prefix, middle, suffix, order = found
    assert order is spm
    assert prefix + middle + suffix == text
    ids, weights = sample((prefix, middle, suffix), spm=spm)
    before, after, inside = parts_of(ids, spm=spm)
    assert TOKENIZER.decode([*before, *inside, *after], False) == text
    assert set(weights) == {1.0}


def test_order_of_the_parts() -> None:
    p, m, s = (TOKENIZER.encode(t) for t in ("pre", "mid", "suf"))
    end = TOKENIZER.eos_id
    assert sample(("pre", "mid", "suf"), spm=False)[0] == [PRE, *p, SUF, *s, MID, *m, end]
    assert sample(("pre", "mid", "suf"), spm=True)[0] == [PRE, SUF, *s, MID, *p, *m, end]


def test_infilling_rows_train_the_middle_only() -> None:
    record = Record("fim", "x:1", parts=("before", "after", "inside"), weight=2.0)
    (parts,) = encode([draft_record(record, TOKENIZER, FIM)], TOKENIZER)
    ids, weights, _ = (a.tolist() for a in join(parts))
    trained = [i for i, w in zip(ids, weights, strict=True) if w]
    assert TOKENIZER.decode(trained, False) == "inside" + END
    assert set(weights) == {0.0, 2.0}
    assert [TOKENIZER.decode(part) for part in parts_of(ids, spm=False)] == ["before", "after", "inside"]


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.5, 0.5), (0.9, 0.1), (0.25, 1.0)])
def test_rates(rate: float, spm_rate: float) -> None:
    count = 4000
    found = [cut("x" * 9, seed=7, index=i, rate=rate, spm_rate=spm_rate) for i in range(count)]
    chosen = [f for f in found if f is not None]
    spm = sum(f[3] for f in chosen)
    for k, n, p in ((len(chosen), count, rate), (spm, len(chosen), spm_rate)):
        assert abs(k - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-9
    # Two uniform places among 10, sorted: the first is i with probability (2 (10 - i) - 1) / 100.
    firsts = np.bincount([len(f[0]) for f in chosen], minlength=10) / len(chosen)
    expected = (2 * (10 - np.arange(10)) - 1) / 100
    assert (firsts > 0).all(), "the end of the text is a place to cut, too"
    assert np.abs(firsts - expected).max() <= 5 * math.sqrt(0.25 / len(chosen))


def test_cut_is_a_function_of_seed_and_index() -> None:
    text = "".join(map(chr, range(97, 123)))
    once = [cut(text, seed=1, index=i, rate=0.5, spm_rate=0.5) for i in range(50)]
    assert once == [cut(text, seed=1, index=i, rate=0.5, spm_rate=0.5) for i in reversed(range(50))][::-1]
    assert once != [cut(text, seed=2, index=i, rate=0.5, spm_rate=0.5) for i in range(50)]
    assert len(set(once)) > 10
    # A higher rate takes more documents and leaves the cuts of the others as they were.
    more = [cut(text, seed=1, index=i, rate=0.9, spm_rate=0.5) for i in range(50)]
    assert all(a == b for a, b in zip(once, more, strict=True) if a is not None)
    assert all(cut(text, seed=1, index=i, rate=0.0, spm_rate=0.5) is None for i in range(50))


CODE = "def f(a):\n    if a:\n        return [a, (1)]\n    return None\n\n\nx = f({1: 2})\n"


def middles(spans: Spans, text: str = CODE, count: int = 300) -> set[str]:
    found = [cut(text, seed=1, index=i, rate=1.0, spm_rate=0.5, spans=spans, tokenizer=TOKENIZER) for i in range(count)]
    return {f[1] for f in found if f is not None}


def test_spans() -> None:
    lines = CODE.splitlines(keepends=True)
    assert middles("line") == {"".join(lines[i:j]) for i in range(len(lines) + 1) for j in range(i, len(lines) + 1)}
    assert {"return [a, (1)]", "[a, (1)]", "(1)", "({1: 2})", "{1: 2}", "x = f({1: 2})", "(a)"} <= middles("syntax")
    ends = {0, *(end for _, end in TOKENIZER.encode_rendered([CODE])[0][1])}
    for middle in middles("token"):
        assert any(CODE[i:].startswith(middle) and i + len(middle) in ends for i in ends), middle
    assert len(middles("char")) > 200
    for spans in ("syntax", "tree_sitter"):
        if spans == "tree_sitter":
            pytest.importorskip("tree_sitter_python")
        assert len(middles(spans, "   ")) > 1, "no statement: as between characters"


def test_nodes_of_tree_sitter() -> None:
    pytest.importorskip("tree_sitter_python")
    found = middles("tree_sitter", count=900)
    assert {"return [a, (1)]", "[a, (1)]", "(1)", "({1: 2})", "{1: 2}", "x = f({1: 2})", "(a)", "a", "None"} <= found
    assert CODE not in found
