"""Which row of a cluster stays, and what is compared: files against the same records in memory."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dedup_cases import texts

from fastsft.data import dedup_files as module
from fastsft.data.dedup import DedupReport, dedup
from fastsft.data.dedup_files import dedup_files, plan_of
from fastsft.data.index import dedup_with_index
from fastsft.data.keep import Keep
from fastsft.data.link import LinkOptions
from fastsft.data.problems import DataError, Problems
from fastsft.data.records import Record, read_records
from fastsft.data.scan import SketchOptions

Rows = list[dict[str, Any]]


def rows_of(count: int, kind: str, seed: int) -> Rows:
    """Few prompts and few completions, some in letters of several bytes; scores and weights with ties."""
    rng = random.Random(seed)
    pool = [t.replace("w", rng.choice("wé語")) for t in texts(count, seed)]
    rows: Rows = []
    for i in range(count):
        one, other = pool[rng.randrange(count // 2)], pool[i]
        row: dict[str, Any] = {
            "pairs": {"prompt": one, "completion": other},
            "text": {"text": other},
            "fim": {"prefix": one, "suffix": other, "middle": "m" * (i % 2)},
            "messages": {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]},
        }[kind if kind != "mixed" else rng.choice(("pairs", "text", "fim", "messages"))]
        rows.append(row | {"quality": rng.choice((1, 2, 2.5, -3)), "weight": rng.choice((0.5, 1, 2))})
    return rows


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    elif path.suffix == ".dataset":
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(str(path))
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(rows)))
    return path


def run(paths: list[Path], output: Path | None = None, mode: str = "fail", **options: Any) -> DedupReport:
    return dedup_files(
        paths, output, Problems(mode), sketch=SketchOptions(), how=LinkOptions(), **options  # type: ignore[arg-type]
    )  # fmt: skip


CHOICES: list[dict[str, Any]] = [
    {"keep": "first"},
    {"keep": "longest"},
    {"keep": "score"},
    {"keep": "score", "score": "quality"},
    {"keep": "source", "prefer": [2, 0]},
    {"keep": "longest", "on": ["completion", "suffix", "assistant", "text"]},
    {"keep": "score", "score": "quality", "on": ["prompt", "prefix", "user", "text"]},
    {"keep": "source", "prefer": [1], "on": ["middle", "prefix", "prompt", "completion", "user", "text"]},
]


@pytest.mark.parametrize("memory", [None, 1 << 16])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("mixed", ".jsonl"), ("pairs", ".jsonl"), ("fim", ".jsonl"), ("text", ".jsonl"), ("pairs", ".parquet"),
     ("fim", ".parquet"), ("messages", ".parquet"), ("pairs", ".dataset")],
)  # fmt: skip
def test_what_stays_is_that_in_memory(
    kind: str, suffix: str, weighted: bool, memory: int | None, tmp_path: Path
) -> None:
    parts = [rows_of(120, kind, seed) for seed in range(2)]
    rng = random.Random(2)
    copies = [row | {"quality": rng.randrange(4), "weight": rng.randrange(3)} for row in [*parts[0], *parts[1]]]
    parts.append(rng.sample(copies, 100))
    if not weighted:  # then lines and columns are read natively
        parts = [[{k: v for k, v in row.items() if k != "weight"} for row in rows] for rows in parts]
    paths = [write(tmp_path / f"{name}{suffix}", rows) for name, rows in zip("abc", parts, strict=True)]
    records = list(read_records(paths, Problems("fail")))
    scores = {r.source: row["quality"] for r, row in zip(records, [row for rows in parts for row in rows], strict=True)}
    kept = set()
    for choice in CHOICES:
        prefer = [paths[i] for i in choice.get("prefer", ())]
        score = (lambda r: scores[r.source]) if "score" in choice else None
        expected = dedup(records, max_cluster=None, **{**choice, "prefer": prefer, "score": score})
        work = tmp_path / "work" if memory else None
        found = run(paths, **{**choice, "prefer": prefer}, memory=memory, work=work)
        assert np.array_equal(found.labels, expected.labels), choice
        assert np.array_equal(found.keep, expected.keep), choice
        assert (found.exact_duplicates, found.near_duplicates) == (expected.exact_duplicates, expected.near_duplicates)
        assert [found.texts[i] for i in (0, 150, 339)] == [expected.texts[i] for i in (0, 150, 339)]
        assert 30 < found.keep.sum() < 320
        kept.add(found.keep.tobytes())
    assert len(kept) >= 4


@pytest.mark.parametrize("keep", ["longest", "source"])
def test_ties_go_to_the_first(keep: Keep, tmp_path: Path) -> None:
    base = " ".join(f"w{i}" for i in range(60))
    rows = [{"text": f"{base} {end}"} for end in ("aaé", "bbc", "éé", "c", "aaé")]
    path = write(tmp_path / "a.jsonl", rows)
    report = run([path], keep=keep, prefer=[path] if keep == "source" else [])
    assert report.keep.tolist() == [True, False, False, False, False]


def test_the_kept_rows_are_written(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "completion": c, "quality": q} for c, q in (("x", 1), ("y", 3), ("z", 3))]
    for suffix in (".jsonl", ".parquet"):
        path, target = write(tmp_path / f"a{suffix}", rows), tmp_path / f"b{suffix}"
        run([path], target, on=["prompt"], keep="score", score="quality")
        assert [r.parts for r in read_records([target], Problems("fail"))] == [("one", "y")]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".dataset"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "bad score: quality: expected a number, got None"),
        (float("nan"), "bad score: quality: expected a number, got nan"),
        ("8", "bad score: quality: expected a number, got '8'"),
        (True, "bad score: quality: expected a number, got True"),
    ],
)  # fmt: skip
def test_scores_that_are_none(value: Any, message: str, suffix: str, tmp_path: Path) -> None:
    rows: Rows = [{"text": "a b", "quality": 1}, {"text": "c d", "quality": value}]
    if suffix == ".jsonl" and value != value:
        message = "broken JSON"  # which has no NaN
    elif isinstance(value, str | bool):
        rows[0]["quality"] = value  # a column has one type
        if suffix == ".jsonl":
            rows[0]["quality"] = 1
    where = 1 if isinstance(value, str | bool) and suffix != ".jsonl" else 2
    path = write(tmp_path / f"a{suffix}", rows)
    with pytest.raises(DataError, match=f"a{suffix}:{where}: {message}"):
        run([path], keep="score", score="quality")
    if where == 2:
        assert run([path], mode="skip", keep="score", score="quality").sources[:] == [f"{path}:1"]
    with pytest.raises(DataError, match=f"a{suffix}:1: missing field: 'qualty'"):
        run([path], keep="score", score="qualty")


def test_rows_without_the_compared_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}, {"text": "t"}])
    message = r"a\.jsonl:2: missing field: on: expected one of prompt, got a record with \['text'\]"
    with pytest.raises(DataError, match=message):
        run([path], on=["prompt"])
    assert run([path], mode="skip", on=["prompt"]).sources[:] == [f"{path}:1"]
    parquet = write(tmp_path / "a.parquet", [{"text": "t"}])
    with pytest.raises(DataError, match=r"a\.parquet:1: missing field: on: expected one of user"):
        run([parquet], on=["user"])


def test_wrong_choices(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    for options, message in (
        ({"keep": "newest"}, "keep: expected one of .*, got 'newest'"),
        ({"keep": "source"}, "prefer: expected files with keep='source' and only then"),
        ({"prefer": [path]}, "prefer: expected files with keep='source' and only then"),
        ({"keep": "source", "prefer": [tmp_path / "b"]}, r"prefer: expected files among .*a\.jsonl, got .*b"),
        ({"score": "quality"}, "score: expected with keep='score' only, got keep='first'"),
        ({"on": ["promt"]}, r"on: expected names among prompt, .*, text, system, .*, got 'promt'"),
        ({"on": "prompt"}, "on: expected names among .*, got 'prompt'"),
        ({"on": []}, r"on: expected names among .*, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run([path], **options)
    for on in (["promt"], "prompt", []):
        with pytest.raises(ValueError, match="on: expected names among"):
            dedup([Record("text", "a:1", parts=("a",))], on=on)


def test_stages_of_other_options_are_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted before the rows are written, then called with other options."""
    rows = [{"prompt": "p", "completion": c, "q": q, "r": -q} for c, q in (("one", 1), ("two two", 3), ("x", 2))]
    path, work = write(tmp_path / "a.jsonl", rows), tmp_path / "work"

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    calls: list[dict[str, Any]] = [
        {"on": ["prompt"]},
        {"on": ["completion"]},
        {},
        {"keep": "longest", "on": ["prompt"]},
        {"keep": "score", "score": "q", "on": ["prompt"]},
        {"keep": "score", "score": "r", "on": ["prompt"]},
        {"keep": "score", "on": ["prompt"]},
    ]
    for before in calls:
        for options in calls:
            with monkeypatch.context() as patch:
                patch.setattr(module, "write_kept", stop)
                with pytest.raises(KeyboardInterrupt):
                    run([path], tmp_path / "b.jsonl", memory=1 << 26, work=work, **before)
            assert len(list((work / "shards").iterdir())) == 1
            found = run([path], tmp_path / "b.jsonl", memory=1 << 26, work=work, **options)
            expected = run([path], **options)
            assert np.array_equal(found.keep, expected.keep), (before, options)
    sources, _ = module.find_all([path])
    plans = [plan_of(sources, SketchOptions(rating=r), None) for r in ("none", "score", "length")]
    plans += [
        plan_of(module.find_all([path], **o)[0], SketchOptions(), None) for o in ({"on": ["user"]}, {"score": "q"})
    ]
    assert len({json.dumps(p) for p in plans}) == len(plans)


def test_an_index_of_prompts(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"prompt": p, "completion": "c"} for p in ("one", "two")])
    second = write(tmp_path / "b.jsonl", [{"prompt": p, "completion": "d"} for p in ("two", "three")])
    third = write(tmp_path / "c.jsonl", [{"prompt": "Three!", "completion": "e"}])

    def add(path: Path, on: list[str] | None) -> list[bool]:
        report = dedup_with_index(
            [path], None, Problems("fail"), tmp_path / "index", sketch=SketchOptions(), how=LinkOptions(), on=on
        )
        kept: list[bool] = report.keep.tolist()
        return kept

    assert add(first, ["prompt"]) == [True, True]
    assert add(second, ["prompt"]) == [False, True]
    assert add(third, ["prompt"]) == [False]
    with pytest.raises(DataError, match=r"made with on = \['prompt'\], got None"):
        add(write(tmp_path / "d.jsonl", [{"text": "x"}]), None)


@pytest.mark.timeout(600)
def test_on_ray(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    paths = [write(tmp_path / f"{seed}.jsonl", rows_of(200, "mixed", seed)) for seed in range(3)]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for choice in CHOICES:
            options = {**choice, "prefer": [paths[i] for i in choice.get("prefer", ())]}
            local = run(paths, **options)
            there = run(paths, **options, memory=1 << 26, work=tmp_path / "work", engine="ray")
            assert np.array_equal(there.labels, local.labels)
            assert np.array_equal(there.keep, local.keep)
    finally:
        ray.shutdown()
