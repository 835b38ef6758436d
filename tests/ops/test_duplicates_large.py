"""Large buckets of candidates: the clusters are those of comparing all pairs, in time that follows the texts."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import numpy as np
import pytest

from fastsft import _C, ops
from fastsft.ops import reference


def with_header(count: int, header: int, tails: range, seed: int, common: int = 0) -> list[str]:
    """Single words: `header` that all texts have, and a tail whose length varies, of which `common` words are drawn
    from a few and the others are the text's own."""
    rng = random.Random(seed)
    texts = []
    for i in range(count):
        words = [f"h{j}" for j in range(header)]
        words += [f"c{rng.randrange(3 * common)}" for _ in range(common)]
        words += [f"t{i}_{j}" for j in range(rng.choice(tails))]
        texts.append(" ".join(words))
    return texts


CORPORA = {
    "similar to none": with_header(130, 40, range(10, 11), 0),
    "near the threshold": with_header(130, 40, range(2, 18), 1),
    "similar to all": with_header(130, 40, range(1, 3), 2),
    "subsets of few words": with_header(130, 24, range(0, 3), 3, common=12),
    "of any size": with_header(130, 20, range(0, 120), 4, common=4),
}


@pytest.mark.parametrize("limit", [None, 9])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
@pytest.mark.parametrize("corpus", CORPORA)
def test_equal_reference(corpus: str, threshold: float, limit: int | None) -> None:
    options: dict[str, Any] = {"threshold": threshold, "ngram": 1, "num_perm": 64, "max_cluster": limit}
    for shape in ({"bands": 16, "rows": 4}, {"bands": 64, "rows": 1}):
        got = ops.near_duplicates(CORPORA[corpus], **options, **shape)
        assert np.array_equal(got, reference.near_duplicates(CORPORA[corpus], **options, **shape))


@pytest.mark.parametrize("corpus", CORPORA)
def test_a_single_bucket(corpus: str) -> None:
    """Whatever comparing leaves undone, no other bucket makes up for."""
    members, parent, expected = np.arange(130), np.arange(130), np.arange(130)
    bucket = np.array([0, 130])
    ops.link_similar(CORPORA[corpus], members, bucket, parent, threshold=0.7, ngram=1)
    reference.link_similar(CORPORA[corpus], members, bucket, expected, threshold=0.7, ngram=1)
    assert np.array_equal(parent, expected)


@pytest.mark.parametrize("corpus", CORPORA)
def test_stars_of_all_pairs_equal_reference(corpus: str) -> None:
    for threshold, limit in ((0.7, 3), (0.6, 9)):
        options: dict[str, Any] = {"threshold": threshold, "ngram": 1, "max_cluster": limit, "mode": "all_pairs"}
        got = ops.near_duplicates(CORPORA[corpus], **options)
        assert np.array_equal(got, reference.near_duplicates(CORPORA[corpus], **options))


def test_large_components_are_the_same_on_any_number_of_threads() -> None:
    texts = with_header(1500, 60, range(2, 26), 1, common=4)
    texts += [f"{text} more" for text in texts[:100]]
    options: dict[str, Any] = {"ngram": 1, "bands": 16, "rows": 2}
    found = set()
    for isa, threads in itertools.product(_C.available_isas(), (1, 2)):
        _C.set_isa(isa)
        _C.set_num_threads(threads)
        found.add(ops.near_duplicates(texts, **options).tobytes())
    assert len(found) == 1
    labels = np.frombuffer(found.pop(), np.int64)
    assert 100 < (labels != np.arange(1600)).sum() < 1600
    assert np.array_equal(labels, ops.near_duplicates(texts, mode="all_pairs", ngram=1))


def test_time_follows_the_texts() -> None:
    """None of the 8,000 are similar, and a fifth of them meet in each band: all pairs would take ten seconds."""
    texts = with_header(8000, 157, range(36, 37), 5)
    begun = time.process_time()
    labels = ops.near_duplicates(texts, ngram=1, bands=16, rows=8)
    assert time.process_time() - begun < 2
    assert np.array_equal(labels, np.arange(8000))


def test_stars_of_all_pairs_do_not_list_the_pairs() -> None:
    """Of 4,000 texts that are all similar: eight million pairs."""
    texts = [" ".join([*(f"h{j}" for j in range(60)), f"t{i}"]) for i in range(4000)]
    begun = time.process_time()
    labels = ops.near_duplicates(texts, ngram=1, mode="all_pairs", max_cluster=100)
    assert time.process_time() - begun < 0.5
    assert sorted(np.unique(labels, return_counts=True)[1]) == 40 * [100]
