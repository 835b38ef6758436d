"""MinHash: bits of the plain reference, unbiased against exact Jaccard, as precise as datasketch."""

from __future__ import annotations

import inspect
import itertools
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import mutants

from fastsft import _C, ops
from fastsft.ops import reference

datasketch = pytest.importorskip("datasketch")

SOURCES = [inspect.getsource(m) for m in (inspect, random, pytest.raises, st.text, np.pad, datasketch.MinHash)]
TEXTS = [
    "",
    " \t\n .;",
    "a",
    "Hello, World_1 of   code",
    "def f(x):\n    return x + 1  # Größe — Überraschung",
    "naïve 日本語のテキスト x" * 3,
    "x" * 64,
    "x" * 63 + " " + "y" * 65,
    "word " * 40,
    "a_very_long_identifier_of_more_than_sixteen_bytes and_another_one_that_is_longer_than_thirty_two",
    "A-Z boundaries: @[`{ /09: aZ zA _",
    "\x00nul\x7f bytes \x0b\x0c vertical",
    "😀🧪 four byte",
    *SOURCES,
]


def jaccard(x: set[tuple[bytes, ...]], y: set[tuple[bytes, ...]]) -> float:
    return len(x & y) / len(x | y)


@pytest.mark.parametrize("unit", ["word", "char"])
@pytest.mark.parametrize(("ngram", "num_perm", "seed"), [(5, 128, 0), (1, 7, 3), (13, 65, 2**64 - 1)])
def test_bits_equal_reference(unit: str, ngram: int, num_perm: int, seed: int) -> None:
    texts = [t[:3000] for t in TEXTS]
    got = ops.minhash_signatures(texts, num_perm=num_perm, ngram=ngram, unit=unit, seed=seed)
    expected = reference.minhash_signatures(texts, num_perm=num_perm, ngram=ngram, unit=unit, seed=seed)
    assert got.dtype == np.uint32
    assert np.array_equal(got, expected)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.sampled_from("aZ_9 \n.é日😀\x1f"), max_size=150), max_size=4), st.integers(1, 4))
def test_bits_equal_reference_on_any_text(texts: list[str], ngram: int) -> None:
    for unit in ("word", "char"):
        got = ops.minhash_signatures(texts, num_perm=3, ngram=ngram, unit=unit)
        assert np.array_equal(got, reference.minhash_signatures(texts, num_perm=3, ngram=ngram, unit=unit))


def test_same_bits_on_every_isa_and_thread_count() -> None:
    texts = TEXTS * 10
    results = []
    for name in _C.available_isas():
        for n in (1, 3):
            _C.set_isa(name)
            _C.set_num_threads(n)
            for unit in ("word", "char"):
                signatures = ops.minhash_signatures(texts, num_perm=200, unit=unit)
                results.append((unit, signatures.tobytes(), ops.lsh_clusters(signatures).tobytes()))
    assert len(set(results)) == 2


def packed(lengths: list[int], vocabulary: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return tokens, torch.tensor([0, *itertools.accumulate(lengths)])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("ngram", "num_perm"), [(5, 128), (1, 7), (13, 65), (400, 3)])
def test_token_bits_equal_reference(ngram: int, num_perm: int, dtype: torch.dtype) -> None:
    tokens, cu = packed([0, 1, 4, 5, 0, 130, 12, 13, 300, 0], 50, ngram, dtype)
    got = ops.minhash_token_signatures(tokens, cu, num_perm=num_perm, ngram=ngram, seed=3)
    expected = reference.minhash_token_signatures(tokens.tolist(), cu.tolist(), num_perm=num_perm, ngram=ngram, seed=3)
    assert got.dtype == torch.uint32
    assert np.array_equal(got.numpy(), expected)
    as_numpy = ops.minhash_token_signatures(tokens.numpy(), cu.int().numpy(), num_perm=num_perm, ngram=ngram, seed=3)
    assert np.array_equal(as_numpy, expected)


def test_token_signatures_of_wide_and_negative_ids() -> None:
    """The low 32 bits count, so that an id has the same hash in either dtype."""
    wide = torch.tensor([5, -1, 2**32 + 7, 2**31])
    narrow = torch.tensor([5, -1, 7, -(2**31)], dtype=torch.int32)
    got = [ops.minhash_token_signatures(x, torch.tensor([0, 4]), ngram=2) for x in (wide, narrow)]
    assert torch.equal(got[0].view(torch.int32), got[1].view(torch.int32))


def test_token_signatures_opcheck() -> None:
    tokens, cu = packed([3, 0, 9], 50, 0, torch.int64)
    torch.library.opcheck(
        torch.ops.fastsft.minhash_token_signatures,
        (tokens, cu, 16, 5, 0),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("tokens", "cu", "options", "message"),
    [
        (torch.zeros(3), torch.tensor([0, 3]), {}, r"tokens: expected int32 or int64 \[T\], got torch.float32\[3\]"),
        (torch.zeros(3, dtype=torch.int64), torch.tensor(3), {}, r"cu_seqlens: expected int32 or int64 \[N \+ 1\]"),
        (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 4]), {}, "offsets from 0 to the 3 .* got 0 to 4"),
        (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2, 1, 3]), {}, "to decrease, got 2 then 1 at text 1"),
        (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]), {"ngram": 0}, "ngram: expected >= 1, got 0"),
        (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]), {"num_perm": 0}, "num_perm: expected >= 1, got 0"),
        (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]), {"seed": 2**63}, "seed: expected an integer in"),
    ],
)  # fmt: skip
def test_token_signature_errors(tokens: torch.Tensor, cu: torch.Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.minhash_token_signatures(tokens, cu, **options)


def test_normalisation() -> None:
    def same(x: str, y: str, unit: str) -> bool:
        a, b = ops.minhash_signatures([x, y], unit=unit, ngram=2)
        return bool(np.array_equal(a, b))

    assert same("Foo(bar, BAZ)", "foo bar\tbaz", "word")
    assert not same("foo_bar baz", "foo bar_baz", "word")
    assert not same("a b", "b a", "word")
    assert same(" Foo\n\tbar ", "foo bar", "char")
    assert not same("foo bar", "foobar", "char")
    assert not same("É", "é", "char")  # only ASCII is folded
    assert (ops.minhash_signatures(["", ",;"]) == 0xFFFFFFFF).all()


def test_unbiased_and_as_precise_as_datasketch() -> None:
    """Against exact Jaccard: mean error within 4 standard errors of 0 and RMSE as theory has it, sqrt(J(1-J)/k)."""
    num_perm, pairs = 128, mutants(600, seed=1)
    left = ops.minhash_signatures([x for x, _ in pairs], num_perm=num_perm)
    right = ops.minhash_signatures([y for _, y in pairs], num_perm=num_perm)
    sets = [tuple(reference.shingles(t, 5, "word") for t in pair) for pair in pairs]
    exact = np.array([jaccard(x, y) for x, y in sets])
    assert ((exact > 0.2) & (exact < 0.9)).sum() > 300  # the pairs do cover the range
    error = (left == right).mean(1) - exact
    variance = (exact * (1 - exact)).mean() / num_perm
    assert abs(error.mean()) < 4 * np.sqrt(variance / len(pairs))
    assert 0.85 < np.sqrt((error**2).mean() / variance) < 1.15

    def theirs(shingles: set[tuple[bytes, ...]]) -> datasketch.MinHash:
        return datasketch.MinHash.bulk([[b" ".join(s) for s in shingles]], num_perm=num_perm)[0]

    other = np.array([theirs(x).jaccard(theirs(y)) for x, y in sets[:200]]) - exact[:200]
    assert np.sqrt((error[:200] ** 2).mean()) < 1.3 * np.sqrt((other**2).mean())


def test_seeds_are_independent() -> None:
    (x, y) = mutants(1, seed=5)[0]
    estimates = [float(np.equal(*ops.minhash_signatures([x, y], num_perm=64, seed=s)).mean()) for s in range(200)]
    exact = jaccard(reference.shingles(x, 5, "word"), reference.shingles(y, 5, "word"))
    assert abs(np.mean(estimates) - exact) < 4 * np.sqrt(exact * (1 - exact) / 64 / 200)


def test_real_sources() -> None:
    functions = [
        f"def f{i}(a, b):\n    total = a * {i} + b\n    return [total, {i * i}] * len(str(a))" for i in range(50)
    ]
    texts = [*SOURCES, *functions, SOURCES[0].replace("self", "this"), SOURCES[1] + "\n# end"]
    labels = ops.lsh_clusters(ops.minhash_signatures(texts), threshold=0.6)
    assert labels[-1] == 1
    assert labels[: len(SOURCES)].tolist() == list(range(len(SOURCES)))


def test_empty_input() -> None:
    signatures = ops.minhash_signatures([])
    assert signatures.shape == (0, 128)
    assert ops.lsh_clusters(signatures).shape == (0,)
    assert ops.lsh_clusters(ops.minhash_signatures(["", "x y", " "])).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("text", {}, "expected a sequence of str or .*, got str"),
        (["a", 3], {}, r"texts\[1\]: expected str, got int"),
        (["a", "b\ud800"], {}, r"texts\[1\]: expected text that UTF-8 can encode, got a lone surrogate"),
        (["a"], {"num_perm": 0}, "num_perm: expected >= 1, got 0"),
        (["a"], {"ngram": 0}, "ngram: expected >= 1, got 0"),
        (["a"], {"unit": "line"}, "unit: expected one of .*, got 'line'"),
        (["a"], {"seed": -1}, "seed: expected an integer"),
    ],
)
def test_signature_errors(texts: list[str], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.minhash_signatures(texts, **options)


PIECE = 1 << 19  # larger texts are hashed in pieces of about this size


@pytest.mark.parametrize("ngram", [1, 2, 5, 300])
@pytest.mark.parametrize("unit", ["word", "char"])
def test_large_texts_equal_their_small_parts(unit: str, ngram: int) -> None:
    """A signature is the least of those of parts that overlap by a shingle; every n-gram counts, at any place."""
    rng = random.Random(ngram)
    plain = [f"w{rng.randrange(10**6)}" for _ in range(2 * PIECE // 7)]
    mixed = [rng.choice(["é", "日本", "A", "b_9", "😀x"]) + str(rng.randrange(10**6)) for _ in range(PIECE // 4)]
    single = [chr(97 + rng.randrange(26)) + chr(0x4E00 + rng.randrange(20000)) for _ in range(PIECE // 3)]
    for words, space in ((plain, " "), (mixed, " \n\t "), (single, " "), ([*plain[:9], "x" * PIECE, *plain], "  ")):
        parts = [" ".join(words[at : at + 5000 + ngram]) for at in range(0, len(words), 5000)]
        options: dict[str, Any] = {"ngram": ngram, "unit": unit}
        expected = ops.minhash_signatures([*parts[:-1], " ".join(words[-5000 - ngram :])], **options).min(0)
        assert np.array_equal(ops.minhash_signatures([space.join(words)], **options)[0], expected)


@pytest.mark.parametrize("unit", ["word", "char"])
def test_large_texts_at_any_border(unit: str) -> None:
    """Spaces, letters and characters of several bytes around the place where a piece may end."""
    for shift in range(12):
        for middle in ("   ", " a b ", "日 本", "xyz", "\u00e9\u00e9", " 日 "):
            head, tail = "q " * (PIECE // 2 - 6) + "r" * shift, " and the end"
            small = "q " * 20 + "r" * shift
            options: dict[str, Any] = {"ngram": 4, "unit": unit}
            got, expected = ops.minhash_signatures([head + middle + tail, small + middle + tail], **options)
            assert np.array_equal(got, expected)


def test_large_texts_with_fewer_units_than_n() -> None:
    texts = [" " * PIECE + "a" + " " * PIECE + "B" + " " * PIECE, "a b", " " * (2 * PIECE), ""]
    for unit in ("word", "char"):
        got = ops.minhash_signatures(texts, ngram=5, unit=unit)
        assert np.array_equal(got[::2], got[1::2])


@pytest.mark.parametrize("text", ['"word " * (12 << 20)', '"x" * (60 << 20)'])
def test_large_texts_take_little_scratch(text: str) -> None:
    steps = f"""
import resource
from fastsft import ops
text = {text}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
ops.minhash_signatures(["a b"])
before = peak()
ops.minhash_signatures([text])
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", steps], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 2 * 60, f"{done.stdout} MiB for 60 MiB"
