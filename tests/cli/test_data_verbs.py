"""dedup and prepare, and what they and train tell of the rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli_cases import conversations, refusal, result_of, write

from fastsft import cli
from fastsft.data.batch import Sample
from fastsft.models.tokenizer import Tokenizer
from fastsft.verbs.data import coloured


def test_dedup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        "one two three four five six seven",
        "other words entirely in this one here",
        "one two three four five six seven",
    ]
    source, target, report = (
        write(tmp_path / "in.jsonl", [{"text": t} for t in texts]),
        tmp_path / "out.jsonl",
        tmp_path / "r.json",
    )
    result = result_of(capsys, "dedup", source, "--output", target, "--report", report)
    assert (result["records"], result["kept"], result["exact_duplicates"]) == (3, 2, 1)
    assert target.read_bytes() == b"".join(source.read_bytes().splitlines(keepends=True)[:2])
    assert json.loads(report.read_text()) == result
    target.unlink()
    cli.main(["dedup", str(source), "-o", str(target)])
    assert target.exists()
    capsys.readouterr()
    cli.main(["dedup", str(source), "--mode", "exact"])
    assert "3 records: 2 kept" in capsys.readouterr().out


def test_dedup_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", [{"content": "a b"}, {"content": "a b"}])
    target = tmp_path / "out.jsonl"
    for options in ([], ["--output", target]):
        assert result_of(capsys, "dedup", source, "--fields", "text", "content", *options)["kept"] == 1
    assert target.read_bytes() == source.read_bytes()[: source.stat().st_size // 2]
    cli.main(["dedup", str(target), "--fields", "text", "content"])
    shown = capsys.readouterr()
    assert shown.out == "1 records: 1 kept, 0 exact and 0 near duplicates\n"  # no empty table
    assert shown.err == ""
    message = refusal(capsys, "dedup", source, "--fields", "txt", "content")
    assert message == "dedup: unknown key 'fields.txt'; did you mean 'text'?"
    for threshold in ("0", "1.5", "nan"):
        message = refusal(capsys, "dedup", source, "--fields", "text", "content", "--threshold", threshold)
        assert "threshold: expected a number above 0 and at most 1, got" in message


def test_dedup_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "ask", "completion": c, "quality": q} for c, q in (("one", 1), ("two", 3.5), ("a third", 2))]
    sources = [write(tmp_path / f"{name}.jsonl", [row]) for name, row in zip("abc", rows, strict=True)]
    assert result_of(capsys, "dedup", *sources)["kept"] == 3
    best = ["--on", "prompt", "--keep", "score", "--score", "quality"]
    for i, (name, options) in enumerate(
        [
            ("a", ["--on", "prompt"]),
            ("c", ["--on", "prompt", "--keep", "source", "--prefer", sources[2], sources[0]]),
            ("b", best),
            ("b", [*best, "--memory", "1GiB"]),
        ]
    ):
        target = tmp_path / f"out{i}"
        assert result_of(capsys, "dedup", *sources, *options, "--output", target)["kept"] == 1
        for source in sources:
            assert (target / source.name).read_bytes() == (source.read_bytes() if source.stem == name else b"")
    index = ["--index", tmp_path / "index"]
    assert result_of(capsys, "dedup", *sources, "--on", "prompt", *index)["kept"] == 1
    for options, message in (
        (["--keep", "score", "--score", "qualty"], f"{sources[0]}:1: missing field: 'qualty' (--on-bad skip would"),
        (
            ["--keep", "score", "--score", "completion"],
            "a.jsonl:1: bad score: completion: expected a number",
        ),
        (["--score", "quality"], "score: expected with keep='score' only"),
        (["--keep", "source"], "prefer: expected files with keep='source'"),
        (["--keep", "source", "--prefer", "d.jsonl"], "prefer: expected files among"),
        (["--on", "promt"], "on: expected names among prompt"),
        (["--on", "user"], "a.jsonl:1: missing field: on: expected one of user"),
        ([*index, "--keep", "score"], "--index: expected --keep first"),
        ([*index, "--prefer", sources[0]], "--index: expected --keep first"),
    ):
        assert message in refusal(capsys, "dedup", *sources, *options)


def test_texts_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["dedup", str(write(tmp_path / "in.jsonl", [{"text": "x [/b] [red]y[/red]"}] * 2))])
    assert "x [/b] [red]y[/red]" in capsys.readouterr().out


def test_prepare(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = result_of(capsys, "prepare", trained / "run.toml")
    assert report["train"]["samples"] + report["eval"]["samples"] == report["rows"] == 40
    cli.main(["prepare", str(trained / "run.toml"), "--show", "1"])
    shown = capsys.readouterr().out
    assert "say number 0<|im_end|>\n<|im_start|>assistant\n«number 0!<|im_end|>»\n" in shown
    folder = shown.split("samples and report.json are in ")[1].splitlines()[0]
    assert json.loads((Path(folder) / "report.json").read_text()) == report
    assert (Path(folder) / "train" / "ids.npy").is_file()


def test_samples_are_shown_with_their_weights(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data.weights.prompt", "0.5", "--data.weights.control", "2"]
    cli.main(["prepare", str(trained / "run.toml"), "--show", "1", *options])
    shown = capsys.readouterr().out
    assert "say number 0<|im_end|>\n<|im_start|>assistant\n»«1: number 0!»«2: <|im_end|>»«0.5: \n»" in shown
    assert "«0.5: <|im_start|>user\n" in shown


def test_shown_samples_are_whole(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "你好 " * 20  # characters of several tokens, on a line longer than a terminal's
    data = write(tmp_path / "rows.jsonl", [{"text": text}])
    flags = ["--output", tmp_path / "x", "--data", data, "--data.eval-fraction", "0", "--data.max-length", "256"]
    cli.main([*map(str, ("prepare", trained / "run.toml", *flags, "--tokenizer.train-vocab", "262", "--show", "1"))])
    assert f"«{text}<|endoftext|>»" in capsys.readouterr().out


def test_left_out_rows_are_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = conversations(30)
    rows[2] = {"text": "number " * 300}
    data = write(tmp_path / "rows.jsonl", rows)
    with open(data, "a") as stream:
        stream.write("{broken\n")
    long, broken = f"1 x too long, e.g. {data}:3: too long: ", f"1 x broken JSON, e.g. {data}:31: broken JSON: "
    flags = ["--output", tmp_path / "x", "--data", data, "--data.max-bad", "0.9"]
    cli.main([*map(str, ("train", trained / "run.toml", *flags))])
    for text in capsys.readouterr():  # before the first step, and with the result
        assert f"left out: {long}" in text
        assert f"left out: {broken}" in text
    report = result_of(capsys, "train", trained / "run.toml", *flags)["data"]
    assert report["skipped"] == {"too long": 1, "broken JSON": 1}
    assert report["skipped_examples"]["too long"][0].startswith(f"{data}:3: ")
    cli.main([*map(str, ("dedup", data, "--on-bad", "skip"))])
    assert f"left out: {broken}" in capsys.readouterr().out


def test_a_setting_without_effect_is_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [trained / "run.toml", "--output", tmp_path / "x", "--data.fim.rate", "0.5"]
    line = "without effect: data.fim.rate = 0.5 is for rows of the format text, and there is none"
    cli.main([*map(str, ("prepare", *flags))])
    assert line in capsys.readouterr().out
    cli.main([*map(str, ("train", *flags))])
    for text in capsys.readouterr():  # before the first step, and with the result
        assert line in text
    data = write(tmp_path / "rows.jsonl", [*conversations(30), {"text": "number 7"}])
    cli.main([*map(str, ("prepare", *flags, "--data", data, "--data.eval-fraction", "0"))])
    assert "without effect" not in capsys.readouterr().out


def test_decontaminate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "one two three four five six seven eight nine ten"
    source = write(tmp_path / "in.jsonl", [{"text": words}, {"text": "other [b]words[/b]"}])
    against = write(tmp_path / "eval.jsonl", [{"task": "a/1", "prompt": words.upper()}, {"prompt": "too short"}])
    target, report = tmp_path / "out.jsonl", tmp_path / "r.json"
    result = result_of(capsys, "decontaminate", source, "--against", against, "-o", target, "--report", report)
    assert json.loads(report.read_text()) == result
    assert (result["records"], result["kept"], result["rules"]) == (2, 1, ["8:0.5"])
    assert result["dropped"] == [
        {"source": f"{source}:1", "evaluation": f"{against}:1 prompt", "rule": "8:0.5", "coverage": 1.0,
         "passage": words.upper()}
    ]  # fmt: skip
    assert target.read_bytes() == source.read_bytes().splitlines(keepends=True)[1]
    cli.main([*map(str, ("decontaminate", source, "--against", against, "--rules", "gpt3", "10"))])
    shown = capsys.readouterr().out
    assert "2 records: 1 kept, 1 dropped by 13, 10" in shown
    assert f"{against}: 1 of 2 rows found, 1 too short to be" in shown
    assert "in.jsonl:1" in shown
    name = f"a_file_with_a_rather_long_name_that_{'x' * 30}.jsonl"
    rows = [str(write(tmp_path / name, [{"text": words}])), "-o", str(tmp_path / "kept.jsonl")]
    cli.main(["decontaminate", *rows, "--against", str(against)])
    shown = capsys.readouterr().out
    table = [re.split("[│┃]", line)[1].strip() for line in shown.splitlines() if line[:1] in ("│", "┃")]
    assert f"{name}:1" in "".join(table)  # folded, its end is not cut off
    assert f"the rows that stay are in {tmp_path / 'kept.jsonl'}\n" in shown
    write(against, [{"prompt": f"{words} <b>bold</b> & more"}])
    cli.main([*map(str, ("decontaminate", source, "--against", against, "--report", tmp_path / "r.html"))])
    page = (tmp_path / "r.html").read_text()
    assert "1 of 2 records kept, 1 dropped by 8:0.5." in page
    assert f'<td>{against}</td><td class="n">1</td><td class="n">1</td>' in page
    assert f"<td>{against}:1 prompt</td><td>8:0.5</td>" in page
    assert "<b>" not in page


def test_decontaminate_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": "a b"}])
    against = write(tmp_path / "eval.jsonl", [{"prompt": "a b"}])
    before = source.read_bytes(), against.read_bytes()
    command = ("decontaminate", source, "--against", against)
    for flag in ("--output", "--report"):
        for path in (source, against):
            assert "expected another file than the inputs" in refusal(capsys, *command, flag, path)
        assert f"{flag}: no folder" in refusal(capsys, *command, flag, tmp_path / "no" / "out.jsonl")
    assert "rules: expected one of tulu3" in refusal(capsys, *command, "--rules", "tulu4")
    assert "did you mean 'text'?" in refusal(capsys, *command, "--fields", "txt", "content")
    assert "nowhere.jsonl" in refusal(capsys, "decontaminate", source, "--against", tmp_path / "nowhere.jsonl")
    assert "expected 'question' to be a string" in refusal(capsys, *command, "--against-fields", "question")
    assert (source.read_bytes(), against.read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.jsonl", "in.jsonl"]


def test_colours_are_those_of_segments() -> None:
    tokenizer = Tokenizer.train(["abc"], 262)
    ids = np.array([tokenizer.encode(letter)[0] for letter in "abcd"], np.int32)
    weights = np.array([0, 1, 1, 2], np.float32)
    sample = Sample(ids, weights, segments=np.array([0, 1, 2, 2], np.uint8))
    shown = coloured(sample, tokenizer, True)
    assert shown.plain == " thinking 1   answer 1   answer 2  \nabcd"
    styles = {shown.plain[s.start : s.end]: str(s.style).removeprefix("black on ") for s in shown.spans}
    assert [styles[letter] for letter in "abcd"] == ["dim", "cyan", "green", "green"]
    assert styles[" thinking 1 "] == "cyan"
    assert coloured(sample, tokenizer, False).plain == "a«1: bc»«2: d»"
