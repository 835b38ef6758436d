"""lm-evaluation-harness' own client for local servers, where it is installed, against the model's log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_cases import Reference, write_model
from serve_cases import MODEL, serving

from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams

pytest.importorskip("lm_eval")

PAIRS = [("the cat", " sat on"), ("on the mat", " the cat sat"), ("x", " y"), ("the cat sat on the mat", " mat")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("evaluated") / "llama", "llama")


@pytest.mark.parametrize("concurrent", [1, 3])
def test_local_completions(concurrent: int, folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    def ask(kind: str, arguments: list[Any]) -> list[Any]:
        return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]

    model, llm = Reference(folder), LLM(folder, num_blocks=64)
    greedy = llm.generate("the cat", SamplingParams(max_tokens=3, skip_special_tokens=False)).pop().outputs[0]
    with serving(folder) as server:
        client = LocalCompletionsAPI(
            model=MODEL, base_url=f"{server.url}/v1/completions", tokenizer_backend="huggingface", batch_size=2,
            tokenizer=str(folder), num_concurrent=concurrent, max_length=200,
        )  # fmt: skip
        pairs = [*PAIRS, ("the cat", greedy.text)]
        found = client.loglikelihood(ask("loglikelihood", pairs))
        for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
            before, after = client._encode_pair(context, continuation)
            rows = model.logprobs([*before, *after])[len(before) - 1 : -1]
            assert total == pytest.approx(sum(float(row[i]) for row, i in zip(rows, after, strict=True)), abs=1e-3)
            assert is_greedy == all(int(row.argmax()) == i for row, i in zip(rows, after, strict=True))
        assert found[-1][1]
        options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
        (text,) = client.generate_until(ask("generate_until", [("the cat", options)]))
        assert text == llm.generate("the cat", SamplingParams(max_tokens=6, stop="\n"))[0].outputs[0].text


def test_the_harness_measures_what_it_does_with_transformers(folder: Path, tmp_path: Path) -> None:
    """Tasks of its own kinds, from end to end, once with the server and once with transformers in its own process."""
    pytest.importorskip("accelerate", reason="its transformers backend needs it")
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    words = ["the cat", "the mat", "sat on", "on the"]
    rows = [{"text": f"{a} {b}", "choices": words, "answer": (i + j) % 4} for i, a in enumerate(words)
            for j, b in enumerate(words)]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path)}
    common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    kinds: dict[str, dict[str, Any]] = {
        "chosen": {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
                   "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        "rolled": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                   "metric_list": [{"metric": "bits_per_byte"}]},
        "written": {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{choices[answer]}}",
                    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
                    "metric_list": [{"metric": "exact_match"}]},
    }  # fmt: skip

    def measured(model: Any, names: list[str], **more: Any) -> tuple[dict[str, Any], list[Any]]:
        tasks = [ConfigurableTask(config={"task": name, **common, **kinds[name]}) for name in names]
        found = simple_evaluate(model=model, tasks=tasks, log_samples=True, bootstrap_iters=0, **more)
        answers = [sample["filtered_resps"] for name in names for sample in found["samples"][name]]
        return found["results"], answers

    with serving(folder) as server:
        options: dict[str, Any] = {"model": MODEL, "max_length": 200, "num_concurrent": 2}
        url = f"{server.url}/v1/completions"
        client = LocalCompletionsAPI(base_url=url, tokenizer_backend="huggingface", tokenizer=str(folder), **options)
        ours, answers = measured(client, list(kinds))
        chat = LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", **options)
        _, talked = measured(chat, ["written"], apply_chat_template=True)
    theirs, expected = measured(
        HFLM(pretrained=str(folder), dtype="float32", max_length=200, device="cpu"), list(kinds)
    )
    for name in kinds:
        for metric, value in theirs[name].items():
            assert ours[name][metric] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    assert answers[-len(rows) :] == expected[-len(rows) :]
    llm = LLM(folder, num_blocks=64)
    params = SamplingParams(max_tokens=5, stop="\n")
    assert talked == [[llm.chat([{"role": "user", "content": r["text"]}], params)[0].outputs[0].text] for r in rows]
