"""The demo: its corpus, its tasks, the comparison's honesty, the report, and the quick form end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsft.data.batch import Sample, collate
from fastsft.demo import baseline, corpus, pipeline, tasks
from fastsft.models.weights import init_model
from fastsft.report.html import write_report
from fastsft.train.evaluate import batch_loss
from fastsft.verify.passk import evaluate_tasks


def test_corpus_is_deterministic_and_whole() -> None:
    found = corpus.definitions(limit=300)
    assert found == corpus.definitions(limit=300)
    assert len(found) == 300
    assert len({d.source for d in found}) == 300
    for d in found:
        assert 100 <= len(d.text) <= 4000
        compile(d.text, d.source, "exec")  # dedented: every definition stands alone


def test_instruction_pairs_answer_what_they_ask() -> None:
    pairs = corpus.instruction_pairs(corpus.definitions(limit=600), longest=500)
    assert len(pairs) > 20
    for ask, answer in pairs:
        assert (ask["role"], answer["role"]) == ("user", "assistant")
        assert ask["content"].startswith("Write `def ")
        signature = re.match(r"Write `(.*?)`: ", ask["content"])
        assert signature is not None
        assert signature[1] in answer["content"]
        assert len(answer["content"]) <= 500


def test_canonical_answers_pass_their_own_checks() -> None:
    _, held_out, answers = tasks.build(10, 40, seed=3)
    report = evaluate_tasks(held_out, [[a] for a in answers], workers=2)
    assert report.pass_at[1] == 1.0, report.statuses
    # And the checks can fail: the answer of a task does not solve the next one.
    wrong = [[a.replace("return ", "return not ")] for a in answers]
    assert evaluate_tasks(held_out, wrong, workers=2).pass_at[1] == 0.0


def _passes(body: str, check: Any) -> bool:
    names: dict[str, Any] = {}
    exec(f"def f(x):\n    {body}", names)
    try:
        exec(check, names)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("constant", [2, 3, 12, 60, 97, 99])
@pytest.mark.parametrize("family", tasks.FAMILIES, ids=lambda f: f.ask)
def test_a_wrong_constant_or_operation_fails(family: tasks.Family, constant: int) -> None:
    check = compile(tasks._task(0, family, "f", constant).check, "check", "exec")
    assert _passes(family.body.format(c=constant), check)
    others = [c for c in range(300) if c != constant]
    assert not [c for c in others if _passes(family.body.format(c=c), check)]
    bodies = {f.body for f in tasks.FAMILIES} - {family.body}
    assert not [b for b in bodies if _passes(b.format(c=constant), check)]
    for right, wrong in ((">", ">="), (">", "<"), ("<", "<="), ("max", "min"), ("min", "max"), ("+", "-"), ("%", "//"),
                         (" *", " +"), ("[:{", "[1:{"), ("== 0", "!= 0"), ("[::-1]", "")):  # fmt: skip
        body = family.body.replace(right, wrong, 1).format(c=constant)
        assert body == family.body.format(c=constant) or not _passes(body, check), body


def test_training_and_held_out_tasks_share_neither_name_nor_number() -> None:
    train, held_out, answers = tasks.build(2000, 80, seed=0)
    assert tasks.build(2000, 80, seed=0) == (train, held_out, answers)
    assert tasks.build(2000, 80, seed=1)[1] != held_out

    def name(text: str) -> str:
        return text.partition("`")[2].partition("(")[0]

    trained = {name(c[0]["content"]) for c in train}
    tested = {name(t.prompt) for t in held_out}
    assert trained
    assert tested
    assert not trained & tested
    problems = {c[0]["content"].partition("that")[2] for c in train}
    assert not problems & {t.prompt.partition("that")[2] for t in held_out}
    assert len({t.prompt.partition("that")[2] for t in held_out}) == 80
    assert len({c[0]["content"] for c in train}) == 2000
    assert [t.task_id for t in held_out] == [f"demo/{i}" for i in range(80)]


def test_comparison_computes_the_same_loss_both_ways() -> None:
    architecture = {
        "model_type": "qwen2", "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }  # fmt: skip
    model = init_model(architecture, seed=0, dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def sample(length: int) -> Sample:
        ids = torch.randint(61, (length,), generator=generator).to(torch.int32)
        weights = torch.ones(length)
        weights[: length // 3] = 0
        return Sample(ids.numpy(), weights.numpy())

    batches = [collate([sample(n) for n in lengths]) for lengths in ((3, 17, 40, 9, 22), (31, 5, 5))]
    found = baseline.compare(model, batches, rows=2, rounds=1)
    assert found.loss_ours == pytest.approx(found.loss_padded, rel=1e-5)
    assert found.ours > 0
    assert found.padded > 0
    assert found.ratio == found.ours / found.padded
    assert 0 < found.padding_share < 0.9
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # left as it was

    # Not only the values: the padded gradient is the packed one.
    gradients = []
    for way in ("packed", "padded"):
        model.zero_grad()
        if way == "packed":
            batch_loss(model, batches[0], normalizer=10.0).backward()
        else:
            for group in baseline._groups(batches[0], 2):
                baseline._padded_loss(model, batches[0], group, 10.0).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


class _Links(HTMLParser):
    """Everything a browser would fetch, and all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "srcset", "data", "action") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {key}={value}")


def _assert_self_contained(page: str) -> list[str]:
    links = _Links()
    links.feed(page)
    assert links.fetched == []
    assert re.findall(r"@import|url\((?!#)", page) == []
    addresses = re.findall(r'[\w:-]*="?https?://[^\s"<>]*', page)
    assert all(a.startswith("xmlns") for a in addresses), addresses
    return links.tags


def _results(evil: str) -> dict[str, Any]:
    losses = {"loss_before": 2.0, "loss_after": 1.0}
    return {
        "parameters": 1000, "dtype": "float32", "torch_threads": 1, "total_seconds": 1.0, "seconds": {"stage": 1.0},
        "info": {"cpu": {"isa_active": "base", "threads": 1, "cores": 1}}, "train": losses, "tune": losses,
        "pass_at_1": {k: {"pass_at": {"1": 0.5}, "tasks": [{}, {}]} for k in ("before", "after")},
        "speed": {"ours": 2.0, "padded": 1.0, "rows": 16, "padding_share": 0.25}, "layers": ["limits"],
        "prepare": {"dedup": {"records": 2, "kept": 1, "exact_duplicates": 1, "near_duplicates": 0,
                              "cluster_sizes": {"2": 1},
                              "clusters": [{"size": 2, "sources": [evil], "example": evil}]}},
        "answers": [{"prompt": evil, "answer": evil, "passed": False}],
        "samples": {"completions": [{"prompt": evil, "output": evil, "reference": evil}],
                    "infills": [{"prefix": evil, "suffix": evil, "output": evil, "reference": evil}]},
    }  # fmt: skip


def test_report_escapes_what_a_model_wrote(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script><img src='x' onerror=\"a()\">&amp;{{ 7 * 7 }}"
    metrics = [{"kind": "step", "step": i, "loss": 2.0 / i} for i in range(1, 4)]
    page = write_report(tmp_path, _results(evil), metrics, metrics).read_text(encoding="utf-8")
    tags = _assert_self_contained(page)
    assert "script" not in tags
    assert "img" not in tags
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8
    assert "&amp;amp;{{ 7 * 7 }}" in page


def test_report_explains_itself_in_words(tmp_path: Path) -> None:
    metrics = [{"kind": "step", "step": i, "loss": 2.0 / i} for i in range(1, 4)]
    page = write_report(tmp_path, _results("x"), metrics, metrics).read_text(encoding="utf-8")
    assert "share of the\n2 tasks" in page
    assert "batches of\n16 documents" in page
    assert "25 % of what it computes is padding" in page
    plots = re.findall(r'<svg role="img" aria-label="([^"]*)"', page)
    assert plots[0] == "training on code, loss, nats by step: training from 2 to 0.667"
    assert plots[3] == "training speed, same model and samples, tokens/s: padded PyTorch loop 1, fastsft 2"
    assert len(plots) == 5
    words = re.findall(r"<text[^>]*>([^<]*)</text>", page)  # text, not outlines
    assert {"training on code", "loss, nats", "held-out", "padded PyTorch loop", "0.50"} <= {w.strip() for w in words}


def test_demo_removes_nothing_but_a_demo(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        pipeline.run_demo(tmp_path, quick=True)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_quick_demo_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    output.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "fastsft", "demo", "--quick", "--json", "--output", str(output)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads((output / "results.json").read_text())
    assert results["train"]["loss_after"] < results["train"]["loss_before"]
    assert results["tune"]["loss_after"] < results["tune"]["loss_before"]
    assert results["prepare"]["dedup"]["exact_duplicates"] > 0
    tolerance = 1e-2 if results["dtype"] == "bfloat16" else 1e-4
    assert results["speed"]["loss_ours"] == pytest.approx(results["speed"]["loss_padded"], rel=tolerance)
    assert len(results["samples"]["completions"]) == 3
    assert results["samples"]["infills"]
    assert all(s["output"] for kind in results["samples"].values() for s in kind)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert _assert_self_contained(page).count("svg") == 5
    assert str(output) not in page  # paths of the machine stay out of what is passed on
