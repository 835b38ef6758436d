"""Rows against the plain reference, and the ids at cuts between characters against the tokenizer itself."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from fastsft import _C, ops
from fastsft.ops import reference
from fastsft.ops.bpe import ByteBpe, NotExactError
from fastsft.ops.fim_rows import MIDDLE, PREFIX, SUFFIX, fim_cuts

PRE, SUF, MID, END = 200_001, 200_002, 200_003, 200_004
LAYOUTS: dict[str, Any] = {
    "psm": (PRE, PREFIX, SUF, SUFFIX, MID, MIDDLE, END),
    "spm": (PRE, SUF, SUFFIX, MID, PREFIX, MIDDLE, END),
    "plain": (PREFIX, END),
}
CODE = [
    "def add(a, b):\n    return a + b  # it's the sum\n\n\nclass Näme:\n\tx = 12345\r\n\tdef f(self): return 'x'\n",
    "for i in range(10):\n    print(f'{i:>3}', i ** 2)\n\n# 日本語のコメント\nwe'll = {\"a\": [1, 2, 3]}\n",
    "HELLO they'RE WE'LL  double  spaces   and\ttabs\t\tend   \n \n  \nx=1;y=2\n",
]
# What makes pre-tokenisers differ: apostrophes, runs of spaces and line ends, digits, letters outside ASCII, marks.
ALPHABET = [
    *"abXY  \n\n\r\t01'\"(){}._-=+", "\u00a0", "é", "ß", "日", "本", "٣", "½", "e\u0301", "😀", "\u2028", "\u017f",
    "'s", "'RE", "'ll", "\u0378", "\U0001e900", "ﬁ", "ǅ", "ª", "\u200d", "\x1c", "\x85", "def ", "return", "\r\n",
]  # fmt: skip
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILIES = ("gpt2", "starcoder", "qwen2", "llama3")


def splitter(family: str) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family in ("gpt2", "starcoder"))
    if family == "gpt2":
        return level
    if family == "starcoder":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    pattern = Regex(_GPT4 % ("" if family == "qwen2" else "{1,3}"))
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), level])


@cache
def backend(family: str) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    if family == "qwen2":
        found.normalizer = normalizers.NFC()
    found.pre_tokenizer, found.decoder = splitter(family), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(CODE * 3, trainer)
    return found


@cache
def encoder(family: str) -> ByteBpe:
    return ByteBpe(backend(family))


def encode(family: str, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in backend(family).encode_batch(texts)]


def packed(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    cu = np.cumsum([0, *map(len, rows)])
    return np.array([i for row in rows for i in row], np.int64), cu


def rows_of(found: Any) -> list[tuple[Any, ...]]:
    """As the reference writes them."""
    rows = []
    for b, (begin, end) in enumerate(zip(found.cu_seqlens[:-1], found.cu_seqlens[1:], strict=True)):
        assert found.position_ids[begin:end].tolist() == list(range(end - begin))
        bounds = [tuple(pair) for pair in found.bounds[b].reshape(3, 2).tolist()]
        left = found.middle_left[begin:end].tolist()
        tokens, targets = found.tokens[begin:end].tolist(), found.targets[begin:end].tolist()
        rows.append((tokens, targets, int(found.mode[b]), tuple(found.cuts[b].tolist()), bounds, left))
    return rows


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=12),
    seed=st.integers(0, 2**63 - 1),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
    spm_rate=st.sampled_from([0.0, 0.5, 1.0]),
    max_len=st.sampled_from([None, 0, 20]),
    train_context=st.booleans(),
    wide=st.booleans(),
)
def test_token_rows_equal_the_reference(lengths: list[int], wide: bool, **options: Any) -> None:
    tokens, cu = packed([[10 + n] * n for n in lengths])
    options |= LAYOUTS
    found = ops.fim_rows(tokens.astype(np.int64 if wide else np.int32), cu, middle_left=True, **options)
    expected = reference.fim_rows(tokens.tolist(), cu.tolist(), **options)
    untouched = [
        (e[0], e[1], e[2], f[3] if not e[2] else e[3], *e[4:]) for e, f in zip(expected, rows_of(found), strict=True)
    ]
    assert rows_of(found) == untouched, "the cut of a document that stays whole is not used"


def test_the_longest_row_that_fits() -> None:
    tokens, cu = packed([[10] * 16])
    for limit, mode in ((20, True), (19, False)):
        found = ops.fim_rows(tokens, cu, seed=0, rate=1.0, max_len=limit, **LAYOUTS)
        assert bool(found.mode[0] > 0) is mode
        assert len(found.tokens) == (20 if mode else 17)


def test_token_rows_are_those_of_fim_permute() -> None:
    tokens, cu = packed([list(range(100, 100 + n % 53)) for n in range(500)])
    marks = {"psm": LAYOUTS["psm"][:-1], "spm": LAYOUTS["spm"][:-1]}
    rows = ops.fim_rows(tokens, cu, seed=7, rate=0.8, **marks)
    permuted = ops.fim_permute(tokens, cu, sentinels=(PRE, SUF, MID), seed=7, rate=0.8)
    assert np.array_equal(rows.tokens, permuted.tokens)
    assert np.array_equal(rows.cu_seqlens, permuted.cu_seqlens)
    assert np.array_equal(rows.mode, permuted.mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_is_the_tokenizer(family: str) -> None:
    rng = random.Random(1)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 14))) for _ in range(5000)]
    ids, cu, exact = encoder(family).encode(texts)
    assert exact.all()
    for text, begin, end, expected in zip(texts, cu[:-1], cu[1:], encode(family, texts), strict=True):
        assert ids[begin:end].tolist() == expected, text


def test_texts_with_an_added_token_are_the_tokenizers() -> None:
    added = tokenizers.Tokenizer.from_str(backend("gpt2").to_str())
    added.add_tokens(["<tool>"])
    ids, cu, exact = ByteBpe(added).encode(["a<tool>b", "a<tool", "a<|end|>b", "", "x" * 3000, "y"])
    assert exact.tolist() == [False, True, False, True, False, True]
    assert cu.tolist() == [0, 0, len(ids) - 1, len(ids) - 1, len(ids) - 1, len(ids) - 1, len(ids)]
    assert ids.tolist() == added.encode("a<tool").ids + added.encode("y").ids
    with pytest.raises(ValueError, match=r"texts\[1\]: .* lone surrogate"):
        ByteBpe(added).encode(["a", "\ud800"])


@pytest.mark.parametrize("unit", ["character", "line", "syntax"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_piece_has_the_ids_the_tokenizer_gives_it(family: str, unit: str) -> None:
    """25,000 cuts per family between characters, with many short documents, in which both cuts share a window."""
    rng = random.Random(family)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 40))) for _ in range(2000)]
    texts += [rng.choice(CODE)[rng.randint(0, 60) :] for _ in range(1000)]
    if backend(family).normalizer:
        texts = [backend(family).normalizer.normalize_str(text) for text in texts]
    tokens, cu = packed(encode(family, texts))
    for seed in range(5 if unit == "character" else 1):
        found = ops.fim_rows(tokens, cu, seed=seed, rate=1.0, unit=unit, encoder=encoder(family), **LAYOUTS)
        mode, cuts = fim_cuts(texts, seed=seed, rate=1.0, unit=unit)
        data = [text.encode() for text in texts]
        pieces = [p.decode() for d, (x, y) in zip(data, cuts.tolist(), strict=True) for p in (d[:x], d[x:y], d[y:])]
        ids = encode(family, pieces)
        for b, text in enumerate(texts):
            prefix, middle, suffix = ids[3 * b : 3 * b + 3]
            psm = [PRE, *prefix, SUF, *suffix, MID, *middle, END]
            spm = [PRE, SUF, *suffix, MID, *prefix, *middle, END]
            row = found.tokens[found.cu_seqlens[b] : found.cu_seqlens[b + 1]].tolist()
            assert row == ([END], psm, spm)[found.mode[b]], (text, cuts[b])
            assert found.mode[b] == (mode[b] if text else 0)
            if text:
                assert found.cuts[b].tolist() == cuts[b].tolist()


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(
        st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(list("ab1 \n'."))), max_size=30), max_size=4
    ),
    family=st.sampled_from(FAMILIES),
    unit=st.sampled_from(["character", "line"]),
    seed=st.integers(0, 2**63 - 1),
    max_len=st.sampled_from([None, 12]),
    train_context=st.booleans(),
)
def test_text_rows_equal_the_reference(texts: list[str], family: str, **options: Any) -> None:
    if backend(family).normalizer:
        texts = [backend(family).normalizer.normalize_str(text) for text in texts]
    tokens, cu = packed(encode(family, texts))
    options |= {"rate": 0.9, **LAYOUTS}
    found = ops.fim_rows(tokens, cu, encoder=encoder(family), middle_left=True, **options)
    expected = reference.fim_rows(
        tokens.tolist(), cu.tolist(), decode=lambda ids: backend(family).decode(ids, skip_special_tokens=False),
        encode=lambda text: backend(family).encode(text).ids, **options,
    )  # fmt: skip
    for got, want in zip(rows_of(found), expected, strict=True):
        assert got[:3] + got[4:] == want[:3] + want[4:]
        assert got[2] == 0 or got[3] == want[3]


def test_given_spans_and_identities() -> None:
    text = "def add(a, b):\n    return a + b\n"
    tokens, cu = packed(encode("qwen2", [text, text]))
    options = {"seed": 3, "rate": 1.0, "spm_rate": 0.0, "unit": "character", "encoder": encoder("qwen2")}
    spans = np.array([[4, 7], [0, len(text)]])
    found = ops.fim_rows(tokens, cu, spans=spans, **options, **LAYOUTS)
    assert found.cuts.tolist() == spans.tolist()
    middle = found.tokens[found.cu_seqlens[1] + found.bounds[1, 2] : found.cu_seqlens[1] + found.bounds[1, 3]]
    assert backend("qwen2").decode(middle.tolist()) == text
    both = ops.fim_rows(tokens, cu, doc_ids=np.array([5, 9]), **options, **LAYOUTS)
    (alone,) = encode("qwen2", [text])
    one = ops.fim_rows(np.array(alone), np.array([0, len(alone)]), doc_ids=np.array([9]), **options, **LAYOUTS)
    assert both.tokens[both.cu_seqlens[1] :].tolist() == one.tokens.tolist()


def test_what_only_the_tokenizer_can_cut_is_left_and_told() -> None:
    special = backend("gpt2").token_to_id("<|end|>")
    ids = [encode("gpt2", ["ab"])[0], [*encode("gpt2", ["ab"])[0], special], encode("gpt2", ["a" * 5000])[0]]
    tokens, cu = packed(ids)
    found = ops.fim_rows(tokens, cu, seed=0, rate=1.0, unit="character", encoder=encoder("gpt2"), **LAYOUTS)
    assert found.mode[0] > 0
    assert found.mode[1:].tolist() == [-1, -1]
    assert found.cuts[1].tolist() == [-1, -1]
    assert 0 <= found.cuts[2, 0] <= found.cuts[2, 1] <= 5000
    for b in (1, 2):
        assert found.tokens[found.cu_seqlens[b] : found.cu_seqlens[b + 1]].tolist() == [*ids[b], END]


def _changed(change: str) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer.from_str(backend("gpt2").to_str())
    if change == "spaces":
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "pattern":
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+"), "isolated"), level])
    elif change == "normaliser":
        found.normalizer = normalizers.Lowercase()
    elif change == "dropout":
        found.model.dropout = 0.1
    elif change == "added word":
        found.add_tokens([tokenizers.AddedToken("add", single_word=True)])
    elif change == "added":  # an added token that the texts compared at the start hold
        found.add_tokens(["return"])
    elif change == "unigram":
        found = tokenizers.Tokenizer(models.Unigram([("a", 0.0)], unk_id=0))
    return found


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("spaces", "split by ByteLevel"), ("pattern", "in another way than GPT-2"),
        ("normaliser", "the normaliser is Lowercase"), ("dropout", "has a dropout"),
        ("added word", "only as a whole word"), ("added", "the ids of .* differ"),
        ("unigram", "not split"),
    ],
)  # fmt: skip
def test_other_tokenizers_are_refused(change: str, why: str) -> None:
    with pytest.raises(NotExactError, match=why):
        ByteBpe(_changed(change))


def test_same_bits_on_every_thread_count_and_torch_in_torch_out() -> None:
    tokens, cu = packed(encode("qwen2", CODE * 100))
    options: dict[str, Any] = {
        "seed": 1,
        "unit": "character",
        "encoder": encoder("qwen2"),
        "middle_left": True,
        **LAYOUTS,
    }
    results = []
    for count in (1, 3):
        _C.set_num_threads(count)
        results.append(ops.fim_rows(tokens, cu, **options))
    as_torch = ops.fim_rows(torch.from_numpy(tokens), torch.from_numpy(cu), **options)
    for one, three, other in zip(*results, as_torch, strict=True):
        assert np.array_equal(one, three)
        assert isinstance(other, torch.Tensor)
        assert np.array_equal(one, other.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 1.5}, r"rate: expected a number in \[0, 1\], got 1.5"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"max_len": -1}, "max_len: expected None or"),
        ({"unit": "word"}, "unit: expected one of"),
        ({"unit": "line"}, "encoder: expected one"),
        ({"tokens": torch.zeros(5)}, "tokens: expected int32 or int64, got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "expected to end with the 5 tokens given, got 4"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 5])}, "never to decrease, got 5 then 3 at document 1"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens: expected int32 or int64 \[B \+ 1\]"),
        ({"psm": (1, PREFIX, 2)}, "psm: expected each of 3 pieces once, got 0 of -2"),
        ({"spm": (PREFIX, MIDDLE, SUFFIX, -4)}, "spm: expected token ids and -1, -2, -3"),
        ({"spans": torch.tensor([[2, 6]])}, r"expected 0 <= begin <= end <= 5 at document 0, got \[2, 6\)"),
        ({"rate": 1.0, "doc_ids": torch.tensor([1, 2])}, "doc_ids"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {
        "tokens": torch.arange(5, dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 5]),
        "seed": 0,
        "rate": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        ops.fim_rows(**(arguments | LAYOUTS | change))
