"""generate and eval."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_cases import conversations, refusal, result_of, write

from fastsft import cli, progress
from fastsft.models.heads import DraftHeads, save_heads
from fastsft.models.weights import load_model


def test_generate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "run" / "model"
    options = ["--n", "2", "--temperature", "1", "--seed", "3", "--max-tokens", "5"]
    result = result_of(capsys, "generate", model, "--prompt", "say", *options)
    assert [o["index"] for o in result["outputs"]] == [0, 1]
    assert all(len(o["token_ids"]) <= 5 for o in result["outputs"])
    cli.main(["generate", str(model), "--chat", "say number 3", "--max-tokens", "3"])
    cli.main(["generate", str(model), "--infill", "say", "3", "--max-tokens", "3"])


def test_generate_with_guesses(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By each method: what is generated is the same."""
    model = trained / "run" / "model"
    config = load_model(model).config
    heads = tmp_path / "heads"
    heads.mkdir()
    save_heads(DraftHeads(3, config.hidden_size), heads, vocab_size=config.vocab_size)
    command = ["generate", model, "--prompt", "say number say number", "--temperature", "1", "--seed", "3"]
    plain = result_of(capsys, *command, "--max-tokens", "40")["outputs"][0]
    methods: tuple[dict[str, Any], ...] = (
        {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 3},
        {"method": "suffix", "corpus": ["number 3!"], "min_match": 1},
        {"method": "draft_model", "model": str(model)},
        {"method": "heads", "model": str(heads)},
    )
    for options in methods:
        given = json.dumps(options | {"adaptive": False})
        found = result_of(capsys, *command, "--max-tokens", "40", "--speculative-config", given)["outputs"][0]
        assert (found["text"], found["token_ids"]) == (plain["text"], plain["token_ids"]), options
        assert found["drafted_tokens"] > 0, options


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "say"], ["serve", "--port", "0"]], ids=["generate", "serve"]
)
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("ngram", """expected a JSON object such as '{"method": "ngram"}', got 'ngram'"""),
        ('["ngram"]', "expected a JSON object"),
        ("{}", "method: expected one of ngram, suffix, draft_model, heads, got None"),
        ('{"method": "eagle"}', "method: expected one of ngram, .*, got 'eagle'"),
        ('{"method": "ngram", "model": "x"}', "model: unknown to ngram; it has num_speculative_tokens, "),
        ('{"method": "ngram", "num_speculative_tokens": 0}', "num_speculative_tokens: expected an integer >= 1, got 0"),
        ('{"method": "draft_model"}', "model: expected a folder, got None"),
        ('{"method": "draft_model", "model": "nowhere"}', "nowhere"),
        ('{"method": "heads", "model": "nowhere"}', "nowhere"),
    ],
)
def test_wrong_guesses_are_told(
    command: list[str], config: str, says: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command[0] == "serve":
        pytest.importorskip("uvicorn", reason="part of the serve extra")
    verb, *options = command
    message = refusal(capsys, verb, trained / "run" / "model", *options, "--speculative-config", config)
    assert re.search(says, message), message


def test_eval_with_guesses(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "run" / "model"
    tasks = write(tmp_path / "tasks.jsonl", [{"task_id": c, "prompt": "say number", "check": ""} for c in "abc"])
    command = ["eval", model, "--tasks", tasks, "--n", "2", "--max-tokens", "20", "--temperature", "1"]
    plain, guessed = (tmp_path / name for name in ("plain", "guessed"))
    guesses = ["--speculative-config", '{"method": "ngram", "prompt_lookup_min": 1, "adaptive": false}']
    result_of(capsys, *command, "--output", plain)
    result_of(capsys, *command, "--output", guessed, *guesses)
    for name in ("samples.jsonl", "completions.jsonl", "plan.json"):
        assert (plain / name).read_bytes() == (guessed / name).read_bytes()
    rejecting = [
        "--speculative-config",
        json.dumps({"method": "draft_model", "model": str(model), "acceptance": "rejection"}),
    ]
    assert "acceptance: expected 'noise'" in refusal(capsys, *command, *rejecting)
    assert "--speculative-config: expected" in refusal(capsys, "eval", model, "--data", tasks, *guesses)
    rows = [tmp_path / name for name in ("plain.jsonl", "guessed.jsonl")]
    for path, more in zip(rows, ([], guesses), strict=True):
        result_of(capsys, "sample", model, tasks, "--output", path, "--n", "2", "--max-tokens", "20", *more)
    assert rows[0].read_bytes() == rows[1].read_bytes()


def test_eval(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "run" / "model"
    tasks = write(tmp_path / "tasks.jsonl", [{"task_id": "a", "prompt": "say", "check": "assert True"},
                                              {"task_id": "b", "prompt": "say", "check": "assert False"}])  # fmt: skip
    result = result_of(capsys, "eval", model, "--data", trained / "rows.jsonl", "--tasks", tasks, "--max-tokens", "4")
    assert result["loss"]["samples"] == 40
    assert 3 < result["loss"]["loss"] < 7
    assert 0 <= result["tasks"]["pass_at"]["1"] <= 0.5  # the second check cannot pass
    assert result["tasks"]["tasks"][1]["failure"]
    cli.main(["eval", str(model), "--data", str(trained / "rows.jsonl")])
    assert "held-out loss" in capsys.readouterr().out
    cli.main(["eval", str(model), "--tasks", str(tasks), "--max-tokens", "4", "--completion"])
    assert "failed, e.g. " in capsys.readouterr().out


def test_eval_tells_what_packing_costs(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In float32 the engine computes the loss that the trainer's forward does; fewer bits are further from it."""
    command = [
        "eval",
        trained / "run" / "model",
        "--data",
        trained / "rows.jsonl",
        "--weights",
        "float32",
        "int8",
        "int4",
    ]
    loss = result_of(capsys, *command)["loss"]
    assert list(loss["weights"]) == ["float32", "int8", "int4"]
    assert loss["weights"]["float32"] == pytest.approx(loss["loss"], rel=1e-5)
    errors = [abs(value - loss["loss"]) for value in loss["weights"].values()]
    assert errors[0] < errors[1] < errors[2] < 0.3
    larger = result_of(capsys, *command[:4], "--weights", "int4", "--group-size", "64")["loss"]["weights"]["int4"]
    assert loss["weights"]["int4"] != larger == pytest.approx(loss["loss"], abs=0.3)
    cli.main([*map(str, command), "bfloat16"])
    assert "weights in bfloat16: " in capsys.readouterr().out
    assert "--weights: expected --data" in refusal(capsys, "eval", command[1], "--tasks", "x", "--weights", "int8")


def test_eval_stops_where_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = write(tmp_path / "tasks.jsonl", [{"task_id": "a", "prompt": "say", "check": "", "prefix": "x = 1"}])
    everything = [c for i in range(32, 127) if (c := chr(i)) != "-"]  # so that nothing is left of a sample
    options = ["--completion", "--max-tokens", "4", "--stop", *everything]
    result = result_of(capsys, "eval", trained / "run" / "model", "--tasks", tasks, *options)
    assert result["tasks"]["pass_at"]["1"] == 1.0


def test_eval_tells_of_left_out_rows(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = trained / "run" / "model", conversations(30)
    rows[2] = {"text": "number " * 300}
    data = write(tmp_path / "rows.jsonl", rows)
    cli.main(["eval", str(model), "--data", str(data)])
    told = re.search(rf"left out: 1 x too long, e\.g\. {data}:3: too long: (.*)", capsys.readouterr().out)
    assert told is not None
    assert re.fullmatch(r"\d+ tokens, the model's context is 256", told[1])
    loss = result_of(capsys, "eval", model, "--data", data)["loss"]
    assert (loss["rows"], loss["samples"], loss["skipped"]) == (30, 29, {"too long": 1})
    assert loss["skipped_examples"]["too long"][0].startswith(f"{data}:3: ")
    write(data, rows[2:3])
    message = refusal(capsys, "eval", model, "--data", data)
    assert f"no usable row; left out: 1 x too long, e.g. {data}:1: too long: {told[1]}" in message


def test_eval_reads_rows_up_to_the_models_context(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the default of data.max_length is."""
    model = shutil.copytree(trained / "run" / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20_000}))
    data = write(tmp_path / "rows.jsonl", [{"text": "number " * 2500}])
    assert result_of(capsys, "eval", model, "--data", data)["loss"]["tokens"] > 2048


@pytest.mark.parametrize("form", [[], ["--completion"]], ids=["chat", "completion"])
def test_eval_names_the_task_whose_prompt_is_none(
    form: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for prompt, problem in (
        ("number " * 300, r"\d+ tokens leave no room to generate: .*, the model's context is 256"),
        ("\ud800", r"expected text, got a lone surrogate at character \d+"),
    ):
        given = [{"task_id": name, "prompt": p, "check": ""} for name, p in (("a/0", "say"), ("a/1", prompt))]
        tasks = write(tmp_path / "tasks.jsonl", given)
        message = refusal(capsys, "eval", trained / "run" / "model", "--tasks", tasks, *form)
        assert re.fullmatch(f"eval: task a/1: {problem}", message), message


def test_eval_shows_how_far_each_stage_is(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def recorded() -> Iterator[Any]:
        yield lambda stage, done, total: told.setdefault(stage, []).append((done, total))

    monkeypatch.setattr(progress, "bars", recorded)
    tasks = write(tmp_path / "tasks.jsonl", [{"task_id": c, "prompt": "say", "check": ""} for c in "abc"])
    options = ["--data", trained / "rows.jsonl", "--tasks", tasks, "--n", "2", "--max-tokens", "2"]
    cli.main([*map(str, ("eval", trained / "run" / "model", *options))])
    assert list(told) == ["held-out loss", "tasks sampled", "generated", "executed"]
    assert told["executed"] == [(done, 6) for done in range(1, 7)]
    assert all(steps[-1][0] == steps[-1][1] for steps in told.values())
