"""Clusters of near-duplicates against Python sets: exact, and the same in any order, division, thread count and ISA."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import family_texts

from fastsft import _C, ops
from fastsft.ops import reference

Labels = npt.NDArray[np.int64]


def arena(texts: list[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    encoded = [t.encode() for t in texts]
    offsets = np.array([0, *itertools.accumulate(map(len, encoded))], np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


@pytest.mark.parametrize("unit", ["word", "char"])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_equal_reference(seed: int, verify: bool, unit: str) -> None:
    texts = family_texts(seed, families=6)
    for threshold, shape in ((0.7, {}), (0.4, {"bands": 40, "rows": 2}), (1.0, {}), (0.0, {"bands": 64, "rows": 1})):
        options: dict[str, Any] = {"threshold": threshold, "num_perm": 80, "ngram": 3, "unit": unit, "verify": verify}
        got = ops.near_duplicates(texts, **options, **shape)
        assert np.array_equal(got, reference.near_duplicates(texts, **options, **shape))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("aZ_9 \n.é日😀"), max_size=60), max_size=12), st.integers(1, 4))
def test_equal_reference_on_any_text(texts: list[str], ngram: int) -> None:
    for unit, limit in itertools.product(("word", "char"), (None, 1, 3)):
        options: dict[str, Any] = {"threshold": 0.4, "num_perm": 16, "bands": 8, "rows": 2, "ngram": ngram}
        got = ops.near_duplicates(texts, unit=unit, max_cluster=limit, **options)
        assert np.array_equal(got, reference.near_duplicates(texts, unit=unit, max_cluster=limit, **options))


@pytest.mark.parametrize("limit", [1, 2, 4, 7])
@pytest.mark.parametrize("verify", [True, False])
def test_capped_clusters_equal_reference(limit: int, verify: bool) -> None:
    for seed in range(5):
        texts = family_texts(seed, families=4, copies=20, length=40)
        options: dict[str, Any] = {"threshold": 0.3, "bands": 64, "rows": 2, "ngram": 2, "verify": verify}
        got = ops.near_duplicates(texts, max_cluster=limit, **options)
        assert np.array_equal(got, reference.near_duplicates(texts, max_cluster=limit, **options))
        assert not np.array_equal(got, ops.near_duplicates(texts, **options))
        sets = [frozenset(reference.shingles(t, 2, "word")) for t in texts]
        for label in set(got.tolist()):
            assert len({sets[i] for i in np.flatnonzero(got == label)}) <= limit


def jaccard(x: frozenset[Any], y: frozenset[Any]) -> float:
    return len(x & y) / len(x | y)


@pytest.mark.parametrize("mode", ["lsh", "all_pairs"])
def test_members_of_a_star_are_similar_to_its_centre(mode: str) -> None:
    """Texts that slide over a long sequence: without a limit one cluster of texts with nothing in common."""
    words = [f"w{i}" for i in range(3000)]
    texts = [" ".join(words[at : at + 100]) for at in range(0, 1500, 5)]
    options: dict[str, Any] = {"threshold": 0.7, "bands": 128, "rows": 1, "mode": mode}
    assert (ops.near_duplicates(texts, **options) == 0).all()
    capped = ops.near_duplicates(texts, max_cluster=5, **options)
    assert np.unique(capped, return_counts=True)[1].max() == 5
    assert len(np.unique(capped)) < 120
    sets = [frozenset(reference.shingles(t, 5, "word")) for t in texts]
    for label in np.unique(capped).tolist():
        members = [sets[i] for i in np.flatnonzero(capped == label)]
        assert any(all(jaccard(centre, m) >= 0.7 for m in members) for centre in members)
    identical = ops.near_duplicates(texts + texts[:1] * 500, max_cluster=5, **options)
    assert (identical[300:] == identical[0]).all()  # the same text counts once


def test_stars_of_texts_that_are_all_similar_are_full() -> None:
    """All but the last star, in both modes and in any order."""
    words = [f"w{i}" for i in range(20)]
    texts = [" ".join([*words, f"x{i}", f"y{i // 2}"]) for i in range(1050)]
    options: dict[str, Any] = {"threshold": 0.7, "ngram": 1, "max_cluster": 100}
    got = ops.near_duplicates(texts, bands=128, rows=1, **options)
    assert sorted(np.unique(got, return_counts=True)[1]) == [50] + 10 * [100]
    assert np.array_equal(got, ops.near_duplicates(texts, mode="all_pairs", **options))
    order = random.Random(0).sample(range(len(texts)), len(texts))
    mixed = ops.near_duplicates([texts[i] for i in order], bands=128, rows=1, **options)
    assert permuted(mixed, order) == permuted(got, list(range(len(texts))))


def test_a_star_s_members_share_a_band_with_its_centre() -> None:
    """Similar texts of one component, which are not candidates of each other."""
    texts = [" ".join([*"abcdefghij", f"x{i}"]) for i in range(12)]
    members = np.array([pair for i in range(11) for pair in (i, i + 1)])
    parent = np.arange(12)
    ops.link_similar(texts, members, np.arange(0, 23, 2), parent, threshold=0.5, ngram=1, max_cluster=11)
    expected = np.arange(12)
    reference.link_similar(texts, members, np.arange(0, 23, 2), expected, threshold=0.5, ngram=1, max_cluster=11)
    assert np.array_equal(parent, expected)
    assert np.bincount(parent).max() <= 3  # a text and its two neighbours


def permuted(labels: Labels, order: list[int]) -> set[frozenset[int]]:
    """The clusters, in the numbering before the texts were permuted."""
    return {frozenset(order[i] for i in np.flatnonzero(labels == label)) for label in np.unique(labels)}


@pytest.mark.parametrize("limit", [None, 3])
def test_invariant_to_order_threads_and_isa(limit: int | None) -> None:
    texts = family_texts(3, families=30)
    options: dict[str, Any] = {"threshold": 0.5, "bands": 40, "rows": 3, "ngram": 3, "max_cluster": limit}
    expected = permuted(ops.near_duplicates(texts, **options), list(range(len(texts))))
    assert len(expected) < len(texts)
    rng = random.Random(0)
    for isa, threads in itertools.product(_C.available_isas(), (1, 2, 4)):
        _C.set_isa(isa)
        _C.set_num_threads(threads)
        order = rng.sample(range(len(texts)), len(texts))
        got = ops.near_duplicates([texts[i] for i in order], **options)
        assert permuted(got, order) == expected
        assert all(got[i] == min(np.flatnonzero(got == got[i])) for i in range(len(texts)))


def test_pairs_at_the_threshold_are_linked() -> None:
    """5 of 8 unigrams in common; and thresholds that no double meets exactly."""
    texts = ["a b c d e x", "a b c d e y z", "q r s", "q r t"]
    every: dict[str, Any] = {"ngram": 1, "bands": 128, "rows": 1}
    assert ops.near_duplicates(texts, threshold=5 / 8, **every).tolist() == [0, 0, 2, 3]
    assert ops.near_duplicates(texts, threshold=np.nextafter(5 / 8, 1), **every).tolist() == [0, 1, 2, 3]
    assert ops.near_duplicates(texts[2:], threshold=2 / 4, **every).tolist() == [0, 0]
    for common, extra in itertools.product(range(1, 40), range(1, 40)):
        pair = [" ".join(f"c{i}" for i in range(common)), " ".join(f"c{i}" for i in range(common + extra))]
        for threshold, linked in ((common / (common + extra), True), ((common + 0.5) / (common + extra), False)):
            found = np.arange(2)
            ops.link_similar(pair, np.arange(2), np.array([0, 2]), found, threshold=threshold, ngram=1)
            assert (found[1] == 0) == linked


def test_arena_is_read_in_place() -> None:
    texts = family_texts(1)
    data, offsets = arena(texts)
    expected = ops.near_duplicates(texts)
    signatures = ops.minhash_signatures(texts)
    for form in ((data, offsets), (torch.from_numpy(data.copy()), torch.from_numpy(offsets))):
        assert np.array_equal(ops.near_duplicates(form), expected)
        assert np.array_equal(ops.minhash_signatures(form), signatures)
    shifted = np.concatenate([np.frombuffer(b"junk", np.uint8), data, np.frombuffer(b"more", np.uint8)])
    assert np.array_equal(ops.near_duplicates((shifted, offsets + 4)), expected)
    pa = pytest.importorskip("pyarrow")
    column = pa.array(["before", *texts], pa.large_string())[1:]
    _, sizes, values = column.buffers()
    begin = np.frombuffer(sizes, np.int64)[column.offset : column.offset + len(column) + 1]
    assert np.array_equal(ops.near_duplicates((np.frombuffer(values, np.uint8), begin)), expected)


@pytest.mark.parametrize("seed", range(3))
def test_links_in_pieces_equal_the_whole(seed: int) -> None:
    """Bands one at a time, in any order, each call with its members' texts only."""
    texts = family_texts(seed)
    options: dict[str, Any] = {"threshold": 0.5, "ngram": 3}
    keys = ops.lsh_keys(ops.minhash_signatures(texts, ngram=3, num_perm=96), bands=32, rows=3)
    whole = ops.near_duplicates(texts, num_perm=96, bands=32, rows=3, **options)
    parent = np.arange(len(texts))
    bands = list(keys)
    random.Random(seed).shuffle(bands)
    for band in bands:
        groups = [np.flatnonzero(band == key) for key in np.unique(band)]
        for part in (groups[::2], groups[1::2]):
            rows = np.unique(np.concatenate(part))
            members = np.searchsorted(rows, np.concatenate(part))
            offsets = np.array([0, *itertools.accumulate(map(len, part))])
            ops.link_similar([texts[i] for i in rows], members, offsets, parent, rows=rows, **options)
    while not np.array_equal(parent, parent[parent]):
        parent = parent[parent]
    assert np.array_equal(parent, whole)


def test_keys_equal_reference() -> None:
    signatures = ops.minhash_signatures(family_texts(0), num_perm=64)
    for bands, rows in ((16, 4), (9, 7), (64, 1), (1, 64)):
        got = ops.lsh_keys(signatures, bands=bands, rows=rows)
        assert np.array_equal(got, reference.lsh_keys(signatures, bands=bands, rows=rows))
    assert np.array_equal(ops.lsh_keys(torch.from_numpy(signatures), bands=9, rows=7).numpy(), reference.lsh_keys(
        signatures, bands=9, rows=7))  # fmt: skip
    assert ops.lsh_keys(signatures[:0], bands=2, rows=3).shape == (2, 0)


def test_long_chains_of_parents_are_walked_once() -> None:
    """From the nearest row to the farthest: n * n / 2 steps, 80 billion, unless what was found is kept."""
    n = 400_000
    for rows in (np.arange(n), np.arange(n)[::-1].copy()):
        parent = np.maximum(np.arange(n) - 1, 0)
        empty = (np.zeros(0, np.uint8), np.zeros(n + 1, np.int64))
        ops.link_similar(empty, np.zeros(0, np.int64), np.zeros(1, np.int64), parent, rows=rows)
        assert (parent == 0).all()


def test_broken_parents_behind_others_are_found() -> None:
    for parent, message in (
        ([0, 0, 3, 2], r"parent\[2\]: .*\[0, 2\], got 3"),
        ([-1, 0, 1, 2], r"parent\[0\]: .*got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.link_similar(["a"] * 4, np.zeros(0, np.int64), np.zeros(1, np.int64), np.array(parent))


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="no times of threads")
def test_large_components_are_spread_over_threads() -> None:
    """Twelve of the same size, in each of which all pairs are compared, and nothing else."""
    steps = """
import os, numpy as np
from fastsft import ops
tail = [" ".join(f"t{i}_{j}" for j in range(150)) for i in range(200)]
texts = [" ".join(f"h{c}_{j}" for j in range(150)) + " " + t for c in range(12) for t in tail]
buckets = [list(range(200 * c, 200 * c + 200)) for c in range(12)] + [
    [200 * c + i, 200 * c + i + 1] for c in range(12) for i in range(15)]
members, offsets = np.concatenate(buckets), np.cumsum([0, *map(len, buckets)])
def spent(): return {t: int(open(f"/proc/self/task/{t}/schedstat").read().split()[0]) for t in os.listdir("/proc/self/task")}
before = spent()
parent = np.arange(len(texts))
ops.link_similar(texts, members, offsets, parent, ngram=1, threshold=0.5)
assert (parent == np.arange(len(texts))).all()
times = sorted(t - before.get(thread, 0) for thread, t in spent().items())
print(times[-2] / sum(times))
"""  # noqa: E501
    # Threads that wait must not spin, which counts as work.
    env = {**os.environ, "FASTSFT_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-c", steps], capture_output=True, text=True, check=True, timeout=120, env=env
    )
    assert float(done.stdout) > 0.1


@pytest.mark.parametrize("mode", ["lsh", "all_pairs"])
def test_scratch_of_large_texts_is_given_back(mode: str) -> None:
    steps = f"""
from fastsft import ops
def resident(): return int(open("/proc/self/statm").read().split()[1]) >> 8
ops.near_duplicates(["a b", "a b"], mode={mode!r})
text = " ".join(f"w{{i}}" for i in range(4_200_000))
before = resident()
assert ops.near_duplicates([text, text + " z"], mode={mode!r}).tolist() == [0, 0]
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", steps], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 64, f"{done.stdout} MiB"


def test_empty_and_single() -> None:
    assert ops.near_duplicates([]).tolist() == []
    assert ops.near_duplicates(["a"]).tolist() == [0]
    assert ops.near_duplicates(["", "x", " .", "x"]).tolist() == [0, 1, 0, 1]
    nothing = np.arange(3)
    ops.link_similar([], np.empty(0, np.int64), np.zeros(1, np.int64), nothing, rows=np.empty(0, np.int64))
    assert nothing.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("text", {}, "texts: expected a sequence of str or"),
        (["a", 3], {}, r"near_duplicates: texts\[1\]: expected str, got int"),
        (["a", "b\ud800"], {}, r"texts\[1\]: expected text that UTF-8 can encode, got a lone surrogate"),
        (["a"], {"threshold": 1.5}, r"threshold: expected a number in \[0, 1\], got 1.5"),
        (["a"], {"threshold": float("nan")}, "threshold: expected a number"),
        (["a"], {"bands": 3}, "expected both or neither, got 3 and None"),
        (["a"], {"bands": 3, "rows": 50}, r"bands \* rows <= num_perm = 128, got 3 and 50"),
        (["a"], {"bands": 0, "rows": 5}, "expected both >= 1"),
        (["a"], {"max_cluster": 0}, "max_cluster: expected None or >= 1, got 0"),
        (["a"], {"num_perm": 0}, "num_perm: expected >= 1, got 0"),
        (["a"], {"ngram": 0}, "ngram: expected >= 1, got 0"),
        (["a"], {"unit": "line"}, "unit: expected one of .*, got 'line'"),
        ((np.zeros(3, np.uint8), np.array([0, 4])), {}, "to lie within the 3 bytes given, got 0 to 4"),
        ((np.zeros(3, np.uint8), np.array([0, 2, 1, 3])), {}, "never to decrease, got 2 then 1 at text 1"),
        ((np.zeros(3, np.int8), np.array([0, 3])), {}, "expected data as uint8"),
        ((np.zeros(3, np.uint8), np.array([0, 3], np.int32)), {}, "expected offsets as int64"),
        ((np.zeros(3, np.uint8), np.empty(0, np.int64)), {}, r"expected offsets int64 \[N \+ 1\], got none"),
    ],
)  # fmt: skip
def test_errors(texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.near_duplicates(texts, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": np.array([0, 3])}, r"members\[1\]: expected a text in \[0, 3\), got 3"),
        ({"bucket_offsets": np.array([0, 3])}, "bucket_offsets: expected to end with the number of members, 2"),
        ({"bucket_offsets": np.array([0, 3, 2])}, "never to decrease, got 3 then 2"),
        ({"parent": np.array([0, 2, 2])}, r"parent\[1\]: expected a row in \[0, 1\], got 2"),
        ({"parent": np.array([0])}, "one row for each of the 3 texts, got 1"),
        ({"rows": np.array([0, 1, 7])}, r"rows\[2\]: expected a row in \[0, 3\), got 7"),
        ({"rows": np.array([0, 1])}, "rows: expected one per text, 3, got 2"),
        ({"parent": np.array([0, 0, 2]), "max_cluster": 5}, "expected no row to be connected before"),
        ({"threshold": 2}, "threshold: expected a number"),
    ],
)
def test_link_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "members": np.array([0, 1]), "bucket_offsets": np.array([0, 2]), "parent": np.arange(3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.link_similar(["a", "b", "c"], **(arguments | change))
    frozen = np.arange(3)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="expected a writable array"):
        ops.link_similar(["a", "b", "c"], **(arguments | {"parent": frozen}))
