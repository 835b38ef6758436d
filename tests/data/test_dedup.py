"""Duplicates against brute-force Jaccard similarity."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsft.data.dedup import dedup, kept
from fastsft.data.records import DataError, Record


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    parts = text.split()
    return {tuple(parts[i : i + n]) for i in range(max(1, len(parts) - n + 1))}


def jaccard(a: str, b: str, n: int) -> float:
    x, y = grams(a, n), grams(b, n)
    return len(x & y) / len(x | y)


def families(seed: int) -> list[str]:
    """Texts with copies of which a tenth or nearly all words were replaced: far from the threshold on either side."""
    rng = random.Random(seed)
    texts = []
    for _ in range(12):
        base = words(rng, 120)
        texts.append(" ".join(base))
        for share in (0.01, 0.01, 0.6):
            copy = [f"x{rng.randrange(5000)}" if rng.random() < share else w for w in base]
            texts.append(" ".join(copy))
    rng.shuffle(texts)
    return texts


def brute_force(texts: list[str], threshold: float, n: int) -> list[int]:
    """Label = smallest index reachable over pairs above the threshold."""
    label = list(range(len(texts)))
    for _ in texts:
        for i in range(len(texts)):
            for j in range(i):
                if jaccard(texts[i], texts[j], n) >= threshold:
                    label[i] = label[j] = min(label[i], label[j])
    return label


@pytest.mark.parametrize("seed", [0, 1])
def test_near_duplicates_equal_brute_force(seed: int) -> None:
    texts = families(seed)
    pairs = [jaccard(a, b, 5) for i, a in enumerate(texts) for b in texts[:i]]
    assert not [p for p in pairs if 0.15 < p < 0.5], "the case must be decidable by 256 permutations"
    report = dedup(texts, threshold=0.32, num_perm=256)
    expected = brute_force(texts, 0.32, 5)
    assert report.labels.tolist() == expected
    assert report.keep.tolist() == [i == e for i, e in enumerate(expected)]
    assert report.exact_duplicates == len(texts) - len(set(texts))
    assert report.near_duplicates == len(set(texts)) - len(set(expected)) > 10


def test_exact_and_near_together() -> None:
    base = " ".join(f"w{i}" for i in range(60))
    texts = ["other text entirely here now", base, base, base + " end", "unrelated words of another kind", base]
    exact = dedup(texts, mode="exact")
    assert exact.labels.tolist() == [0, 1, 1, 3, 4, 1]
    assert (exact.exact_duplicates, exact.near_duplicates) == (2, 0)
    near = dedup(texts)
    assert near.labels.tolist() == [0, 1, 1, 1, 4, 1]
    assert (near.exact_duplicates, near.near_duplicates) == (2, 1)
    assert near.keep.tolist() == [True, True, False, False, True, False]
    records = [Record("text", f"a:{i}", parts=(t,)) for i, t in enumerate(texts)]
    assert [r.source for r in kept(records, near)] == ["a:0", "a:1", "a:4"]


def test_report() -> None:
    texts = ["a b c d e f"] * 3 + ["g h i j k l"] * 2 + ["m n o p q r"]
    report = dedup(texts, mode="exact")
    assert [c.tolist() for c in report.clusters()] == [[0, 1, 2], [3, 4]]
    assert report.histogram() == {1: 1, 2: 1, 3: 1}
    summary = json.loads(json.dumps(report.to_dict(examples=1)))
    assert summary["records"] == 6
    assert summary["kept"] == 3
    assert summary["clusters"] == [{"size": 3, "sources": ["#0", "#1", "#2"], "example": "a b c d e f"}]
    nothing = dedup([])
    assert nothing.clusters() == []
    assert nothing.histogram() == {}
    assert nothing.keep.tolist() == []


def test_conversations_and_file(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (chat, {"text": "other"}, chat | {"weight": 2})))
    report = dedup(path, mode="exact")
    assert report.keep.tolist() == [True, True, False]
    assert report.sources == [f"{path}:{i}" for i in (1, 2, 3)]
    path.write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: broken JSON"):
        dedup(path)


def test_a_list_may_name_files(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text('{"text": "one two"}\n')
    report = dedup([*files, "one two", Record("text", "x:1", parts=("three",))], mode="exact")
    assert report.keep.tolist() == [True, False, False, True]
    assert report.sources == [f"{files[0]}:1", f"{files[1]}:1", "#2", "x:1"]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="mode: expected 'near', 'all_pairs' or 'exact', got 'fuzzy'"):
        dedup(["a"], mode="fuzzy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold"):
        dedup(["a", "b"], threshold=1.5)
    with pytest.raises(ValueError, match="num_perm"):
        dedup(["a", "b"], num_perm=0)


def test_labels_name_the_first_of_a_cluster() -> None:
    rng = np.random.default_rng(0)
    texts = [f"text number {i}" for i in rng.integers(0, 20, 100)]
    report = dedup(texts, mode="exact")
    assert all(texts[i] == texts[label] and label <= i for i, label in enumerate(report.labels))
    assert all(report.labels[label] == label for label in report.labels)


def numbered(count: int) -> list[Record]:
    """Records that differ by a word in sixty, so that all are near duplicates."""
    base = [f"w{i}" for i in range(60)]
    return [Record("text", f"a.jsonl:{i}", parts=(" ".join([*base, f"x{i}"]),), weight=float(i)) for i in range(count)]


def test_which_record_stays() -> None:
    records = [
        *numbered(3),
        Record("text", "b.jsonl:1", parts=(numbered(1)[0].parts[0] + " and much more",)),
        Record("text", "b.jsonl:2", parts=("something else",)),
    ]

    def stay(**options: Any) -> list[str]:
        report = dedup(records, **options)
        assert report.labels.tolist() == [0, 0, 0, 0, 4]
        assert report.near_duplicates == 3
        return [r.source for r in kept(records, report)]

    assert stay() == ["a.jsonl:0", "b.jsonl:2"]
    assert stay(keep="longest") == ["b.jsonl:1", "b.jsonl:2"]
    assert stay(keep="score") == ["a.jsonl:2", "b.jsonl:2"]
    assert stay(keep="score", score=lambda r: -r.weight) == ["a.jsonl:0", "b.jsonl:2"]
    assert stay(keep="source", prefer=[Path("b.jsonl"), "a.jsonl"]) == ["b.jsonl:1", "b.jsonl:2"]
    assert stay(keep="source", prefer=["c.jsonl"]) == ["a.jsonl:0", "b.jsonl:2"]


def test_chosen_fields() -> None:
    pairs = [
        Record("prompt_completion", f"a:{i}", parts=(p, c))
        for i, (p, c) in enumerate([("ask one", "x"), ("ask one", "y"), ("Ask, one!", "z"), ("ask two", "x")])
    ]
    assert dedup(pairs).keep.all()
    by_prompt = dedup(pairs, on=["prompt"])
    assert by_prompt.labels.tolist() == [0, 0, 0, 3]
    assert (by_prompt.exact_duplicates, by_prompt.near_duplicates) == (1, 1)
    assert dedup(pairs, on=["completion"]).labels.tolist() == [0, 1, 2, 0]
    assert dedup(pairs, on=["completion", "prompt"]).keep.all()
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    chats = [Record("messages", "c:1", messages=turns), Record("messages", "c:2", messages=(turns[0], turns[0]))]
    assert dedup(chats[:1] * 2, on=["assistant"]).labels.tolist() == [0, 0]
    with pytest.raises(ValueError, match="on: c:2: expected one of assistant, got a record with"):
        dedup(chats, on=["assistant"])


@pytest.mark.parametrize("on", [("prompt", "complete"), "prompt", ["messages"]])
def test_unknown_fields(on: Any) -> None:
    pairs = [Record("prompt_completion", "a:1", parts=("ask", "x"))]
    with pytest.raises(ValueError, match=r"dedup: on: expected names among prompt, .*, text, .*, got '\w+'"):
        dedup(pairs, on=on)


def test_rows_as_files_have_them() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"completion": "b", "prompt": "a", "weight": 2}, {"text": "a"}]
    assert dedup(rows).labels.tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match=r"#1: expected a record, text, row \(dict\) or path, got int"):
        dedup(["a", 1])


def test_a_lone_surrogate_is_named() -> None:
    records = [Record("text", f"a:{i}", parts=(text,)) for i, text in enumerate(["x", "x", "y \ud800"])]
    with pytest.raises(ValueError, match="dedup: a:2: expected text, got a lone surrogate"):
        dedup(records)
    assert dedup(records, mode="exact").labels.tolist() == [0, 0, 2]


def test_large_clusters_are_cut() -> None:
    """A window that slides over a long text: each is similar to the next, the ends have nothing in common."""
    words = [f"w{i}" for i in range(15_000)]
    texts = [" ".join(words[at : at + 60]) for at in range(0, 2 * 1500, 2)]
    report = dedup(texts, num_perm=256)
    assert 150 < report.keep.sum() < 300
    for label in np.unique(report.labels).tolist():  # no two are further apart than both may be from a centre
        members = np.flatnonzero(report.labels == label)
        assert members[-1] - members[0] <= 2 * 4
    assert max(dedup(texts, num_perm=256, max_cluster=None).histogram()) == 1500
    assert dedup(texts, mode="all_pairs", max_cluster=None).labels.max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "newest"}, "keep: expected one of .*, got 'newest'"),
        ({"keep": "source"}, "prefer: expected files with keep='source' and only then"),
        ({"prefer": ["a"]}, "prefer: expected files with keep='source' and only then"),
        ({"score": len}, "score: expected with keep='score' only, got keep='first'"),
        ({"keep": "score", "score": lambda r: float("nan")}, "score: expected a number for every record, got NaN for"),
        ({"max_cluster": 0}, "max_cluster: expected None or >= 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_choices(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dedup(["a", "b"], **options)
