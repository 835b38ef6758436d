"""Which rows are dropped, by Python sets over the same words, and the evidence that is given."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

import fastsft
from fastsft.config import load_config
from fastsft.data.decontaminate import PRESETS, Rule, decontaminate, decontaminate_files, parse_rules
from fastsft.data.notices import notices
from fastsft.data.prepare import prepare
from fastsft.data.records import DataError, Problems, Record


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def sentence(rng: random.Random, count: int) -> list[str]:
    return [f"word{rng.randrange(10**6)}" for _ in range(count)]


def corpus(seed: int, rows: int = 400) -> tuple[list[str], list[str]]:
    """Texts, some with a part of one of the evaluation texts in the middle."""
    rng = random.Random(seed)
    evaluation = [" ".join(sentence(rng, rng.randrange(4, 60))) for _ in range(30)]
    texts = []
    for _ in range(rows):
        words = sentence(rng, 40)
        if rng.random() < 0.5:
            source = rng.choice(evaluation).split()
            begin = rng.randrange(len(source))
            words[20:20] = source[begin : begin + rng.randrange(1, 60)]
        texts.append(", ".join(words).upper())
    return texts, evaluation


def covered(text: str, instance: str, n: int) -> float:
    have, words = (re.findall(r"\w+", t.lower()) for t in (text, instance))
    grams = {tuple(have[i : i + n]) for i in range(len(have) - n + 1)}
    inside = {i + k for i in range(len(words) - n + 1) if tuple(words[i : i + n]) in grams for k in range(n)}
    return len(inside) / len(words)


@pytest.mark.parametrize("rules", [["tulu3"], ["10"], ["gpt3", "5:0.75"], ["8:0.2", "3:0.9"]])
def test_rows_dropped_are_those_of_sets(rules: list[str], tmp_path: Path) -> None:
    texts, evaluation = corpus(1)
    against = write(tmp_path / "eval.jsonl.gz", [{"question": e, "id": i} for i, e in enumerate(evaluation)])
    report = decontaminate(texts, against=against, rules=rules)
    parsed = parse_rules(rules)
    expected = [any(covered(t, e, r.ngram) > r.coverage for e in evaluation for r in parsed) for t in texts]
    assert (~report.keep).tolist() == expected
    assert 20 < sum(expected) < 200
    found = {d.evaluation for d in report.dropped}
    for d in report.dropped:
        text = texts[int(d.source.removeprefix("#"))]
        line = re.fullmatch(rf"{re.escape(str(against))}:(\d+) question", d.evaluation)
        assert line is not None
        instance = evaluation[int(line[1]) - 1]
        rule = next(r for r in parsed if str(r) == d.rule)
        assert d.coverage == round(covered(text, instance, rule.ngram), 4) > rule.coverage
        assert d.passage in instance
        assert covered(text, d.passage, rule.ngram) == 1
    short = sum(len(e.split()) < min(r.ngram for r in parsed) for e in evaluation)
    (file,) = report.evaluation
    assert (file["rows"], file["without_ngrams"]) == (30, short)
    assert len(found) <= file["found"] <= 30 - short


def test_rules() -> None:
    assert parse_rules(["tulu3", "13", "5:.25"]) == [Rule(8, 0.5), Rule(13), Rule(5, 0.25)]
    assert [str(r) for r in parse_rules(list(PRESETS.values()))] == list(PRESETS.values())
    for wrong in ("tulu", "0", "8:1", "8:-0.5", "8:", "", "8:0.5:1", "8:2"):
        with pytest.raises(ValueError, match=r"rules: expected one of tulu3, .*, got "):
            parse_rules([wrong])
    with pytest.raises(ValueError, match="at least one"):
        parse_rules([])


def test_half_is_not_more_than_half(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(16)]
    against = write(tmp_path / "eval.jsonl", [{"q": " ".join(words)}])
    texts = [" ".join(words[:8]), " ".join(words[:9])]
    assert decontaminate(texts, against=against, rules=["8:0.5"]).keep.tolist() == [True, False]


def test_files_keep_their_bytes(tmp_path: Path) -> None:
    texts, evaluation = corpus(2)
    lines = [json.dumps({"id": i, "text": t}, separators=(",", ":" + " " * (i % 3))) for i, t in enumerate(texts)]
    source, target = tmp_path / "train.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))  # no newline at the end
    against = write(tmp_path / "eval.jsonl", [{"q": e} for e in evaluation])
    report = decontaminate_files([source], target, Problems("fail"), against=[against], rules=["8"])
    assert report.keep.tolist() == decontaminate(texts, against=[against], rules=["8"]).keep.tolist()
    assert target.read_text() == "".join(f"{line}\n" for line, stays in zip(lines, report.keep, strict=True) if stays)
    dropped = [i for i, stays in enumerate(report.keep) if not stays]
    assert [d.source for d in report.dropped] == [f"{source}:{i + 1}" for i in dropped]
    assert not [p for p in tmp_path.iterdir() if p.name not in ("train.jsonl", "out.jsonl", "eval.jsonl")]
    assert decontaminate(source, against=[against], rules=["8"]).dropped == report.dropped
    again = decontaminate_files([target], None, Problems("fail"), against=[against], rules=["8"])
    assert again.keep.all()


def test_parquet_and_several_files(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts, evaluation = corpus(3)
    first, second = tmp_path / "a.parquet", write(tmp_path / "b.jsonl", [{"text": t} for t in texts[200:]])
    pq.write_table(pa.table({"text": texts[:200], "n": list(range(200))}), first)
    against = tmp_path / "eval.parquet"
    pq.write_table(pa.table({"q": evaluation}), against)
    report = decontaminate_files([first, second], tmp_path / "out", Problems("fail"), against=[against], rules=["8"])
    expected = decontaminate(texts, against=against, rules=["8"])
    assert report.keep.tolist() == expected.keep.tolist()
    kept = [i for i, stays in enumerate(expected.keep) if stays]
    assert pq.read_table(tmp_path / "out" / "a.parquet")["n"].to_pylist() == [i for i in kept if i < 200]
    written = (tmp_path / "out" / "b.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in written] == [texts[i] for i in kept if i >= 200]


SOLUTION = "def solve(a, b): total = a * b + 7 return [total for _ in range(a)] if b else None"
PROMPT = "Write a function that multiplies two numbers and repeats the sum of the product and seven"


def test_lists_of_strings(tmp_path: Path) -> None:
    """MBPP's tests and MMLU's choices; other lists are no text."""
    tests = ["assert first_repeated_char('abcabc') == 'a'", "assert first_repeated_char('abc') is None"]
    rows = [{"test_list": tests, "ids": [1, 2], "empty": [], "mixed": ["a", 1]}, {"choices": [SOLUTION, PROMPT]}]
    against = write(tmp_path / "eval.jsonl", rows)
    texts = ["\n".join(tests), tests[0], SOLUTION + PROMPT, "nothing of it"]
    report = decontaminate(texts, against=against, rules=["7"])
    assert report.keep.tolist() == [False, True, False, True]
    assert [d.evaluation for d in report.dropped] == [f"{against}:1 test_list", f"{against}:2 choices"]
    only = write(tmp_path / "only.jsonl", rows[:1])
    assert not decontaminate(texts[:1], against=only, against_fields=["test_list"]).keep[0]
    for field in ("ids", "empty", "mixed"):
        with pytest.raises(DataError, match=f"expected '{field}' to be a string or a list of strings, got list"):
            decontaminate(texts, against=only, against_fields=[field])


def test_fields_of_evaluation_rows(tmp_path: Path) -> None:
    row = {"task_id": "x/1", "prompt": PROMPT, "canonical_solution": SOLUTION, "level": 3}
    against = write(tmp_path / "eval.jsonl", [row])
    texts = [f"Please: {PROMPT}.", f"```\n{SOLUTION}\n```"]
    assert decontaminate(texts, against=against).keep.tolist() == [False, False]
    assert decontaminate(texts, against=against, against_fields=["prompt"]).keep.tolist() == [False, True]
    for field, got in (("level", "got int"), ("solution", "got task_id, prompt, canonical_solution, level alone")):
        with pytest.raises(DataError, match=f"eval.jsonl:1: expected '{field}' to be a string or .*, {got}"):
            decontaminate(texts, against=against, against_fields=["prompt", field])
    talk = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": SOLUTION}]
    against = write(tmp_path / "talks.jsonl", [{"messages": talk}])
    report = decontaminate([f"{PROMPT} {SOLUTION}", "nothing of it"], against=against)
    assert report.keep.tolist() == [False, True]
    assert report.dropped[0].evaluation == f"{against}:1 messages"
    for rows in ([], [{"n": 1}]):
        with pytest.raises(DataError, match="no text to compare with"):
            decontaminate(texts, against=write(tmp_path / "none.jsonl", rows))


def test_records_of_every_kind(tmp_path: Path) -> None:
    against = write(tmp_path / "eval.jsonl", [{"prompt": PROMPT}])
    records = [
        Record("messages", "a:1", messages=({"role": "user", "content": PROMPT},)),
        Record("prompt_completion", "a:2", parts=(PROMPT[:40], PROMPT[41:])),  # a newline stands between them
        Record("fim", "a:3", parts=(PROMPT[:20], PROMPT[40:], PROMPT[20:40])),
        Record("text", "a:4", parts=("something else",)),
    ]
    report = fastsft.decontaminate(records, against=[against])
    assert report.keep.tolist() == [False, False, False, True]
    assert [d.source for d in report.dropped] == ["a:1", "a:2", "a:3"]


def test_code_in_a_call_and_in_reasoning(tmp_path: Path) -> None:
    """Escapes of JSON, "\\n" between two lines say, must not become parts of words."""
    code = "def f(a, b):\n    if a:\n        return a\n    for c in b:\n        yield c\n"
    against = write(tmp_path / "eval.jsonl", [{"solution": code}])
    ask = {"role": "user", "content": "please"}
    arguments = {"path": "a.py", "text": code}
    answers = [
        {"role": "assistant", "tool_calls": [{"function": {"name": "write", "arguments": arguments}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "write", "arguments": json.dumps(arguments)}}]},
        {"role": "assistant", "content": "done", "reasoning_content": code},
        {"role": "assistant", "content": "done"},
    ]
    report = decontaminate([{"messages": [ask, answer]} for answer in answers], against=against)
    assert report.keep.tolist() == [False, False, False, True]
    assert [(d.source, d.coverage) for d in report.dropped] == [("#0", 1.0), ("#1", 1.0), ("#2", 1.0)]


def test_text_that_is_none(tmp_path: Path) -> None:
    against = write(tmp_path / "eval.jsonl", [{"prompt": PROMPT}])
    with pytest.raises(ValueError, match="decontaminate: #1: expected text, got a lone surrogate"):
        decontaminate(["fine", "\ud800"], against=against)


def test_prepare_leaves_them_out(tmp_path: Path) -> None:
    against = write(tmp_path / "eval.jsonl", [{"prompt": PROMPT, "canonical_solution": SOLUTION}])
    rows = [{"text": f"row {i}: {PROMPT if i == 3 else 'number ' * 5}"} for i in range(12)]
    data = write(tmp_path / "rows.jsonl", rows)
    raw = {"output": str(tmp_path / "run"), "tokenizer": {"train_vocab": 300},
           "data": {"train": [data], "eval_fraction": 0.0, "decontaminate": {"against": [against]}}}  # fmt: skip
    prepared = prepare(load_config(raw))
    assert len(prepared.train) == 11
    assert prepared.report["decontaminate"]["evaluation"][0]["found"] == 1
    line = f"left out: 1 x in evaluation files, e.g. {data}:4: 100% of {against}:1 prompt"
    assert line in notices(prepared.report)
    write(against, [{"prompt": "Another prompt of eight words or even more of them"}])
    assert len(prepare(load_config(raw)).train) == 12  # what the evaluation file holds is part of the run's key
