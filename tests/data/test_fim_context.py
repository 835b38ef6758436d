"""Packed rows rearranged and packed anew: every token is still there; repositories in the format's layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.data.fim_context import Refilled, draft_repository, refill
from fastsft.data.segments import join
from fastsft.data.tokenise import encode
from fastsft.models.fim import FORMATS, Fim
from fastsft.models.tokenizer import Tokenizer
from fastsft.ops.bpe import ByteBpe

CODE = "def add(a, b):\n    return a + b  # the sum\n\n\nclass A:\n    x = 12345\n    def f(self): return 'x'\n"
TOKENIZER = Tokenizer.train([CODE], 400, FORMATS["qwen"].tokens)
FIM, END = Fim.find(TOKENIZER), TOKENIZER.eos_id or 0
ENCODER = ByteBpe(TOKENIZER.backend)
MARKS = {*FIM.stop_ids} - {END}


def rows_of(lengths: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Each row holds documents of these lengths, all but a row's last followed by END."""
    text = TOKENIZER.encode(CODE * 4)
    rows = []
    for row in lengths:
        flat: list[int] = []
        for n in row:
            flat += [*text[:n], END]
        rows.append(flat[:-1])
    return np.array([i for row in rows for i in row], np.int32), np.cumsum([0, *map(len, rows)])


def fragments_of(found: Refilled) -> list[list[int]]:
    rows = found.fragments
    return [rows.tokens[a:b].tolist() for a, b in zip(rows.cu_seqlens[:-1], rows.cu_seqlens[1:], strict=True)]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=5), max_size=5),
    seed=st.integers(0, 1000),
    rate=st.sampled_from([0.0, 0.5, 1.0]),
    unit=st.sampled_from(["token", "character"]),
    capacity=st.sampled_from([60, 200]),
)
def test_nothing_is_lost(lengths: list[list[int]], seed: int, rate: float, unit: str, capacity: int) -> None:
    tokens, cu = rows_of(lengths)
    encoder = None if unit == "token" else ENCODER
    found = refill(tokens, cu, FIM, end_id=END, capacity=capacity, seed=seed, rate=rate, unit=unit, encoder=encoder)
    assert sorted(found.order.tolist()) == list(range(len(fragments_of(found))))
    sizes = np.diff(found.fragments.cu_seqlens)
    for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True):
        assert sizes[found.order[a:b]].sum() <= capacity
    texts = []
    for fragment, mode in zip(fragments_of(found), found.fragments.mode, strict=True):
        if mode > 0:
            assert fragment[-1] == END
            texts.append(FIM.restore(fragment, TOKENIZER) or "")
        else:
            assert not MARKS & set(fragment)
            texts.append(TOKENIZER.decode([i for i in fragment if i != END]))
    everything = sorted("".join(texts))
    assert everything == sorted(TOKENIZER.decode([i for i in tokens.tolist() if i != END]))
    plain = [f for f, mode in zip(fragments_of(found), found.fragments.mode, strict=True) if mode == 0]
    if rate == 0:
        assert sum(f.count(END) for f in plain) == int((tokens == END).sum())


def test_documents_stay_whole_and_draws_belong_to_the_row() -> None:
    tokens, cu = rows_of([[20, 30], [10, 40, 5]])
    options = {"end_id": END, "capacity": 200, "seed": 5, "rate": 1.0, "encoder": ENCODER}
    found = refill(tokens, cu, FIM, **options)
    assert (found.fragments.mode > 0).all()
    assert found.not_exact == 0
    text = TOKENIZER.encode(CODE * 4)
    restored = sorted(FIM.restore(f, TOKENIZER) or "" for f in fragments_of(found))
    assert restored == sorted(TOKENIZER.decode(text[:n]) for n in (20, 30, 10, 40, 5))
    alone = refill(tokens[cu[1] :], cu[1:] - cu[1], FIM, row_ids=np.array([1]), **options)
    assert all(fragment in fragments_of(found) for fragment in fragments_of(alone))


def test_a_row_that_is_one_long_document_is_rearranged_too() -> None:
    tokens, cu = rows_of([[100]])
    found = refill(tokens, cu, FIM, end_id=END, capacity=len(tokens), seed=0, rate=1.0, encoder=ENCODER)
    assert (found.fragments.mode > 0).all()
    assert len(fragments_of(found)) == 2


def test_what_cannot_be_done() -> None:
    tokens, cu = rows_of([[9]])
    with pytest.raises(ValueError, match="refill: capacity: expected more than 31, got 31"):
        refill(tokens, cu, FIM, end_id=END, capacity=31, seed=0, encoder=ENCODER)
    for broken in ([0, 5], [1, len(tokens)], [0, 7, 3, len(tokens)], [0, len(tokens) + 1], []):
        with pytest.raises(ValueError, match="refill: cu_seqlens: expected to ascend from 0 to the"):
            refill(tokens, np.array(broken, np.int64), FIM, end_id=END, capacity=64, seed=0, encoder=ENCODER)
    for ids in ([0, 1], [-1], [1 << 43]):
        with pytest.raises(ValueError, match=r"refill: row_ids: expected 1 numbers in \[0, 2\^43\)"):
            refill(tokens, cu, FIM, end_id=END, capacity=64, seed=0, encoder=ENCODER, row_ids=np.array(ids))


@pytest.mark.parametrize("spm", [False, True])
def test_repository(spm: bool) -> None:
    files = [("a.py", "x = 1"), ("b/c.py", "")]
    draft = draft_repository("me/it", files, ("ab", "cd", "ef"), TOKENIZER, FIM, spm=spm)
    (parts,) = encode([draft], TOKENIZER)
    ids, weights, _ = (a.tolist() for a in join(parts))
    last = (
        "<|fim_prefix|><|fim_suffix|>ef<|fim_middle|>abcd"
        if spm
        else "<|fim_prefix|>ab<|fim_suffix|>ef<|fim_middle|>cd"
    )
    expected = f"<|repo_name|>me/it\n<|file_sep|>a.py\nx = 1\n<|file_sep|>b/c.py\n{last}<|endoftext|>"
    assert TOKENIZER.decode(ids, False) == expected
    assert set(weights) == {1.0}
    assert draft.context is not None
    assert [draft.pieces[i].content for i in draft.context] == ["ab", "ef"]
    with pytest.raises(ValueError, match="no tokens for a repository"):
        draft_repository("x", files, ("", "", ""), Tokenizer.train([CODE], 300, FORMATS["qwen"].required), FIM)
    with pytest.raises(ValueError, match="expected at least one"):
        draft_repository("x", [], ("", "", ""), TOKENIZER, FIM)
