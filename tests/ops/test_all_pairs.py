"""The similarity join against a product of sparse matrices, Python sets, and itself in another order."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import family_texts

from fastsft import _C, ops
from fastsft.ops import reference


def by_product(texts: list[str], threshold: float, ngram: int) -> dict[tuple[int, int], float]:
    """Common n-grams of all pairs as a product of sparse matrices."""
    sparse = pytest.importorskip("scipy.sparse")
    columns: dict[tuple[bytes, ...], int] = {}
    entries = [
        (i, columns.setdefault(s, len(columns)))
        for i, t in enumerate(texts)
        for s in reference.shingles(t, ngram, "word")
    ]
    row, column = np.array(entries).T
    matrix = sparse.csr_matrix((np.ones(len(row), np.int64), (row, column)), (len(texts), len(columns)))
    sizes = np.asarray(matrix.sum(1)).ravel()
    common = sparse.triu(matrix @ matrix.T, k=1).tocoo()
    value = common.data / (sizes[common.row] + sizes[common.col] - common.data)
    return {(int(i), int(j)): float(s) for i, j, s in zip(common.row, common.col, value, strict=True) if s >= threshold}


@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(("seed", "ngram"), [(0, 1), (1, 2), (2, 3), (3, 5)])
def test_equal_sparse_product(seed: int, ngram: int, threshold: float) -> None:
    texts = [t for t in family_texts(seed, families=25) if reference.shingles(t, ngram, "word")]
    pairs, similarity = ops.similar_pairs(texts, threshold=threshold, ngram=ngram)
    found = {(int(i), int(j)): float(s) for (i, j), s in zip(pairs, similarity, strict=True)}
    assert found == by_product(texts, threshold, ngram)
    assert len(found) > 50


def test_common_words_make_long_lists() -> None:
    """Few distinct words: the filters have little to go by, and n-grams that every text has are met."""
    rng = random.Random(0)
    texts = [" ".join(f"w{int(rng.paretovariate(0.7)) % 300}" for _ in range(rng.randrange(5, 80))) for _ in range(600)]
    for threshold in (0.3, 0.5, 0.8):
        pairs, similarity = ops.similar_pairs(texts, threshold=threshold, ngram=1)
        found = {(int(i), int(j)): float(s) for (i, j), s in zip(pairs, similarity, strict=True)}
        assert found == by_product(texts, threshold, 1)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("abc_9 \n.é日"), max_size=40), max_size=14),
    st.integers(1, 3),
    st.sampled_from([0.2, 0.5, 2 / 3, 0.75, 1.0]),
)
def test_equal_reference_on_any_text(texts: list[str], ngram: int, threshold: float) -> None:
    for unit in ("word", "char"):
        options: dict[str, Any] = {"threshold": threshold, "ngram": ngram, "unit": unit}
        for got, expected in zip(
            ops.similar_pairs(texts, **options), reference.similar_pairs(texts, **options), strict=True
        ):
            assert np.array_equal(got, expected)
        for limit in (None, 2):
            got = ops.near_duplicates(texts, mode="all_pairs", max_cluster=limit, **options)
            expected = reference.near_duplicates(texts, mode="all_pairs", max_cluster=limit, **options)
            assert np.array_equal(got, expected)


def test_same_pairs_on_every_isa_thread_count_and_order() -> None:
    texts = family_texts(5, families=40)
    pairs, similarity = ops.similar_pairs(texts, threshold=0.5, ngram=2)
    expected = {(i, j): s for (i, j), s in zip(map(tuple, pairs.tolist()), similarity.tolist(), strict=True)}
    clusters = ops.near_duplicates(texts, threshold=0.5, ngram=2, mode="all_pairs")
    stars = ops.near_duplicates(texts, threshold=0.5, ngram=2, mode="all_pairs", max_cluster=2)
    expected_stars = {frozenset(np.flatnonzero(stars == label).tolist()) for label in stars}
    assert not np.array_equal(stars, clusters)
    rng = random.Random(1)
    for name, count in itertools.product(_C.available_isas(), (1, 2, 4)):
        _C.set_isa(name)
        _C.set_num_threads(count)
        order = rng.sample(range(len(texts)), len(texts))
        mixed = [texts[i] for i in order]
        got, values = ops.similar_pairs(mixed, threshold=0.5, ngram=2)
        original = [tuple(sorted((order[i], order[j]))) for i, j in got.tolist()]
        assert dict(zip(original, values.tolist(), strict=True)) == expected
        assert np.array_equal(ops.near_duplicates(texts, threshold=0.5, ngram=2, mode="all_pairs"), clusters)
        stars = ops.near_duplicates(mixed, threshold=0.5, ngram=2, mode="all_pairs", max_cluster=2)
        assert {frozenset(order[i] for i in np.flatnonzero(stars == label)) for label in stars} == expected_stars


def test_clusters_with_bands_are_a_refinement() -> None:
    """What the bands find is among all pairs."""
    texts = family_texts(8, families=40)
    complete = ops.near_duplicates(texts, mode="all_pairs")
    banded = ops.near_duplicates(texts)
    assert all(len(set(complete[banded == label])) == 1 for label in set(banded.tolist()))
    assert np.array_equal(ops.near_duplicates(texts, bands=128, rows=1), complete)


def components(texts: list[str], **options: Any) -> Any:
    """Labels from every pair of similar texts."""
    label = np.arange(len(texts))
    for x, y in ops.similar_pairs(texts, **options)[0].tolist():
        if label[x] != label[y]:
            label[label == max(label[x], label[y])] = min(label[x], label[y])
    return label.tolist()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("changes", [3, 9, 25])
def test_clusters_of_many_similar_texts(changes: int, threads: int) -> None:
    """Lists of more than 512 texts, where most pairs are skipped: one cluster, several, and chains of weak links."""
    rng = random.Random(changes)
    heads = [[f"h{i}" for i in range(30)] + [f"{family}_{i}" for i in range(30)] for family in range(2)]
    texts = []
    for i in range(900):
        words = list(heads[i % 2])
        for _ in range(rng.randrange(changes)):
            words[rng.randrange(60)] = f"u{rng.randrange(40)}"
        texts.append(" ".join(words))
    _C.set_num_threads(threads)
    for threshold in (0.4, 0.8):
        options: dict[str, Any] = {"threshold": threshold, "ngram": 1}
        assert ops.near_duplicates(texts, mode="all_pairs", **options).tolist() == components(texts, **options)


def test_clusters_take_less_than_every_pair() -> None:
    texts = [" ".join([*(f"w{i}" for i in range(100)), f"u{i}"]) for i in range(3000)]
    start = time.perf_counter()
    assert (ops.near_duplicates(texts, mode="all_pairs") == 0).all()
    clusters = time.perf_counter() - start
    assert len(ops.similar_pairs(texts)[0]) == 3000 * 2999 // 2
    assert clusters < (time.perf_counter() - start) / 5


@pytest.mark.parametrize("unit", ["word", "char"])
def test_similarity_of_texts_read_in_pieces(unit: str) -> None:
    """Texts of more than 512 KiB, one of them another with some words changed."""
    rng = random.Random(3)
    words = [f"w{rng.randrange(60_000)}" for _ in range(240_000)]
    changed = [f"v{w}" if rng.random() < 0.02 else w for w in words]
    texts = [" ".join(words), "\n".join(changed), " ".join(words[100_000:])]
    sets = [set(zip(*(w[k:] for k in range(3)), strict=False)) for w in (words, changed, words[100_000:])]
    if unit == "char":
        sets = [{t[i : i + 3] for i in range(len(t) - 2)} for t in (" ".join(t.split()) for t in texts)]
    pairs, similarity = ops.similar_pairs(texts, threshold=0.01, ngram=3, unit=unit)
    assert pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert similarity.tolist() == [len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in pairs.tolist()]
    for i, j in pairs.tolist():
        found = np.arange(2)
        exact = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        ops.link_similar(
            [texts[i], texts[j]], np.arange(2), np.array([0, 2]), found, threshold=exact, ngram=3, unit=unit
        )
        assert found.tolist() == [0, 0]


def test_empty() -> None:
    for texts in ([], ["a"], ["a", "b"]):
        pairs, similarity = ops.similar_pairs(texts)
        assert pairs.shape == (0, 2)
        assert similarity.shape == (0,)
    assert ops.similar_pairs(["", ".", "a"])[0].tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, r"threshold: expected a number in \(0, 1\], got 0"),
        ({"threshold": 1.1}, r"threshold: expected a number in \(0, 1\], got 1.1"),
        ({"threshold": float("nan")}, "threshold: expected a number"),
        ({"ngram": 0}, "ngram: expected >= 1, got 0"),
        ({"unit": "line"}, "unit: expected one of .*, got 'line'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.similar_pairs(["a"], **options)
    with pytest.raises(ValueError, match=message):
        ops.near_duplicates(["a"], mode="all_pairs", **options)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode: expected 'lsh' or 'all_pairs', got 'fuzzy'"):
        ops.near_duplicates(["a"], mode="fuzzy")
