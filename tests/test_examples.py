"""Each example runs as its header says, on generated rows of the shape it names, with fewer steps."""

from __future__ import annotations

import json
import math
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsft import cli
from fastsft.demo import tasks
from fastsft.synthesis.plan import load_plan
from fastsft.verify.judge import judge
from fastsft.verify.tasks import read_tasks

EXAMPLES = Path(__file__).parents[1] / "examples"
VERBS = ("lists", "counts", "removes", "renames", "prints", "sorts", "copies", "moves")
THINGS = ("files", "folders", "lines", "words", "links", "users", "processes", "ports")


def _question(random: random.Random, i: int) -> dict[str, Any]:
    a, b = random.randint(2, 99), random.randint(2, 99)
    return {
        "question": f"Row {i}: Ann has {a} apples and buys {b}. How many?",
        "answer": f"{a}+{b}={a + b}\n#### {a + b}",
    }


def _conversation(random: random.Random, i: int) -> dict[str, Any]:
    verb, thing = random.choice(VERBS), random.choice(THINGS)
    ask = {"role": "user", "content": f"a command, number {i}, that {verb} all {thing} below {random.randint(1, 999)}"}
    return {"messages": [ask, {"role": "assistant", "content": f"{verb[:-1]} -{thing[0]} {i} | head"}]}


def _code(random: random.Random, i: int) -> dict[str, Any]:
    a, b, c = (random.choice(THINGS) for _ in range(3))
    return {"text": f"def f{i}({a}_a, {b}_b):\n    {c} = {a}_a * {random.randint(2, 999)} + {b}_b\n    return {c}\n"}


SHAPES: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "gsm8k": _question,
    "nl2bash": _conversation,
    "sft_code_fim": _code,
}


def test_every_example_is_tested() -> None:
    assert {p.stem for p in EXAMPLES.glob("*.toml")} == {*SHAPES, "iterative"}
    assert {p.name for p in EXAMPLES.glob("*.py")} == {
        "custom_loop.py", "transformers_loop.py", "trl_sft.py", "iterative_start.py"
    }  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_toml(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(SHAPES[name](draw, i)) + "\n" for i in range(150)))
    vocabulary = "320"  # the bytes and the markers take about 260
    cli.main(
        ["train", str(EXAMPLES / f"{name}.toml"), "--json", "--data", str(data), "--output", str(tmp_path / "run"),
         "--tokenizer.train-vocab", vocabulary, "--train.max-steps", "6", "--train.eval-every", "3"]
    )  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 6
    assert result["eval_after"]["loss"] < result["eval_before"]["loss"]
    # Untrained weights are small: every token is about equally likely.
    assert result["eval_before"]["loss"] == pytest.approx(math.log(320), rel=0.05)

    ask = {
        "gsm8k": ["--prompt", "Ann has"],
        "nl2bash": ["--chat", "lists files"],
        "sft_code_fim": ["--infill", "a", "b"],
    }
    cli.main(["generate", result["model_path"], *ask[name], "--max-tokens", "4", "--json"])
    assert 1 <= len(json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"]) <= 4


def test_the_iterative_example_starts_with_what_its_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model too small to learn anything; tests/synthesis has rounds that do."""
    monkeypatch.chdir(tmp_path)
    made = runpy.run_path(str(EXAMPLES / "iterative_start.py"))["main"](
        rows=60, sampled=12, held_out=6, hidden=32, layers=1, steps=2
    )
    plan = load_plan(EXAMPLES / "iterative.toml")
    assert made == Path(plan.model)
    assert made.is_dir()
    sampled, held_out = ([t for f in files for t in read_tasks(f)] for files in (plan.tasks, plan.held_out))
    assert (len(sampled), len(held_out)) == (12, 6)
    assert not {t.prompt for t in sampled} & {t.prompt for t in held_out}
    answers = tasks.build(60, 18, seed=0)[2]
    assert [r.status for r in judge(list(zip([*sampled, *held_out], answers, strict=True)))] == ["ok"] * 18


def test_headers_name_real_verbs_and_flags() -> None:
    for path in EXAMPLES.glob("*.toml"):
        commands = [x.lstrip("# ").split() for x in path.read_text().splitlines() if x.startswith("#   fastsft ")]
        assert commands
        for command in commands:
            assert command[1] in cli.VERBS
            assert command[2].startswith(("examples/", "runs/"))


def test_custom_loop_learns_to_copy() -> None:
    first, last = runpy.run_path(str(EXAMPLES / "custom_loop.py"))["main"](steps=60)
    assert first == pytest.approx(math.log(64), rel=0.1)
    assert last < 0.2


def test_transformers_loop_computes_transformers_own_loss() -> None:
    pytest.importorskip("transformers")
    from fastsft.integrations.transformers import disable, enable

    example = runpy.run_path(str(EXAMPLES / "transformers_loop.py"))
    torch.manual_seed(0)
    model = example["load"](None).train()
    documents = [torch.randint(256, (n,)) for n in (5, 17, 1, 2, 31)]
    enable(model)
    packed = model(**example["pack"]([d.tolist() for d in documents]), use_cache=False).loss
    packed.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    disable(model)
    model.set_attn_implementation("eager")
    losses = [
        torch.nn.functional.cross_entropy(model(d[None]).logits[0, :-1], d[1:], reduction="sum")
        for d in documents if len(d) > 1
    ]  # fmt: skip
    alone = torch.stack(losses).sum() / sum(len(d) - 1 for d in documents)
    alone.backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-3, atol=1e-6
    )
    first, last = example["main"](steps=10)
    assert last < 0.7 * first


def test_trl_sft_learns() -> None:
    pytest.importorskip("trl", minversion="1.16")
    first, last = runpy.run_path(str(EXAMPLES / "trl_sft.py"))["main"](steps=15)
    assert first == pytest.approx(math.log(258), rel=0.1)
    assert last < 0.4 * first
