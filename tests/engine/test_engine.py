"""Generation against transformers, and against itself under every schedule."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    FAMILIES,
    VOCAB,
    Reference,
    as_prompts,
    assert_nothing_held,
    engine,
    prompts_of,
    tokenizer,
    write_model,
)

from fastsft.data.fim import draft_fim
from fastsft.data.segments import join
from fastsft.data.tokenise import encode
from fastsft.engine.detokenize import Detokenizer
from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams
from fastsft.models.fim import Fim
from fastsft.models.weights import load_model

pytest.importorskip("transformers")
LENGTHS = [1, 16, 33, 5, 17]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
DRAW = SamplingParams(temperature=1.0, max_tokens=20, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, Reference]:
    return {name: Reference(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def expected(references: dict[str, Reference]) -> dict[str, list[list[int]]]:
    return {n: [r.greedy(p, 24) for p in prompts_of(LENGTHS)] for n, r in references.items()}


def tokens(outputs: Any) -> list[list[int]]:
    return [list(o.token_ids) for request in outputs for o in request.outputs]


# --- greedy, under every schedule -----------------------------------------------------------------------------------

SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "block_size 64": {"block_size": 64, "num_blocks": 20},
    "one at a time": {"max_num_seqs": 1},
    "two at a time": {"max_num_seqs": 2},
    "preemption": {"num_blocks": 5},
    "chunks of 3": {"max_batched_tokens": 3},
    "chunks of 1": {"max_batched_tokens": 1},
    "chunks of 16": {"max_batched_tokens": 16},
    "chunks and preemption": {"max_batched_tokens": 7, "num_blocks": 5},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(
    family: str, schedule: str, folders: dict[str, Path], expected: dict[str, list[list[int]]]
) -> None:
    llm = engine(folders[family], **SCHEDULES[schedule])
    seen: list[tuple[int, int]] = []
    outputs = llm.generate(
        as_prompts(prompts_of(LENGTHS)), GREEDY, progress=lambda done, total: seen.append((done, total))
    )
    assert tokens(outputs) == expected[family]
    assert [list(o.prompt_token_ids) for o in outputs] == prompts_of(LENGTHS)
    assert {o.outputs[0].finish_reason for o in outputs} == {"length"}
    assert (llm.core.stats().preemptions > 0) == ("preemption" in schedule)
    assert seen[-1] == (5, 5)
    assert_nothing_held(llm)


def test_end_token_equals_transformers(folders: dict[str, Path], references: dict[str, Reference]) -> None:
    reference = references["llama"]
    (prompt,) = prompts_of([9])
    free = reference.greedy(prompt, 24)
    end = free[7]
    first = free.index(end)
    (out,) = engine(folders["llama"]).generate(
        {"prompt_token_ids": prompt}, SamplingParams(max_tokens=24, stop_token_ids=[end])
    )
    assert list(out.outputs[0].token_ids) == reference.greedy(prompt, 24, (end,)) == free[: first + 1]
    assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("stop", end)


# --- several continuations, seeds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_continuations_do_not_depend_on_the_schedule(schedule: str, folders: dict[str, Path]) -> None:
    """n > 1 shares the prompt's blocks; whatever the batch, text i is the one of seed + i alone."""
    prompts = as_prompts(prompts_of([17, 3, 16, 7, 4]))
    params = SamplingParams(n=3, temperature=1.0, max_tokens=12, seed=40, ignore_eos=True, top_p=0.95)
    together = engine(folders["qwen3"], **SCHEDULES[schedule])
    outputs = together.generate(prompts, params)
    assert [o.index for r in outputs for o in r.outputs] == [0, 1, 2] * 5
    alone = engine(folders["qwen3"])
    for prompt, output in zip(prompts, outputs, strict=True):
        for i in range(3):
            single = SamplingParams(temperature=1.0, max_tokens=12, seed=40 + i, ignore_eos=True, top_p=0.95)
            assert tokens(alone.generate(prompt, single)) == [list(output.outputs[i].token_ids)], (i, prompt)
    assert len({tuple(o.token_ids) for o in outputs[0].outputs}) == 3
    assert_nothing_held(together)


def test_shared_blocks_are_used_and_never_written_by_two(folders: dict[str, Path]) -> None:
    """A prompt of two full blocks and a part: with sharing, three continuations fit where three copies would not."""
    llm = engine(folders["llama"], num_blocks=5)
    params = SamplingParams(n=3, temperature=1.0, max_tokens=6, seed=1, ignore_eos=True)
    (out,) = llm.generate(as_prompts(prompts_of([42])), params)
    assert llm.core.stats().preemptions == 0
    wide = engine(folders["llama"]).generate(as_prompts(prompts_of([42])), params)
    assert tokens([out]) == tokens(wide)


def test_seeds_are_independent_of_the_batch(folders: dict[str, Path]) -> None:
    llm = engine(folders["qwen2"])
    prompts = as_prompts(prompts_of([4, 19, 8]))
    whole = tokens(llm.generate(prompts, DRAW))
    assert tokens(llm.generate(prompts[::-1], DRAW)) == whole[::-1]
    assert tokens(llm.generate(prompts[1], DRAW)) == [whole[1]]
    assert tokens(llm.generate([prompts[1]] * 3, DRAW)) == [whole[1]] * 3
    each = [SamplingParams(temperature=1.0, max_tokens=20, seed=s, ignore_eos=True) for s in (1, 11, 3)]
    assert tokens(llm.generate(prompts, each))[1] == whole[1]
    free = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    assert tokens(llm.generate(prompts, free)) != tokens(llm.generate(prompts, free))


def test_draws_follow_the_distribution(folders: dict[str, Path], references: dict[str, Reference]) -> None:
    (prompt,) = prompts_of([6])
    probabilities = references["llama"].logprobs(prompt)[-1].exp()
    params = SamplingParams(n=64, temperature=1.0, max_tokens=1, seed=100, ignore_eos=True)
    llm = engine(folders["llama"], max_num_seqs=64)
    found = torch.zeros(VOCAB, dtype=torch.float64)
    for start in range(0, 2048, 64):
        each = SamplingParams(**{**params.__dict__, "seed": start})
        for ids in tokens(llm.generate({"prompt_token_ids": prompt}, each)):
            found[ids[0]] += 1
    top = probabilities > 0.02
    sigma = (probabilities * (1 - probabilities) / 2048).sqrt()
    assert top.sum() >= 3
    assert ((found / 2048 - probabilities).abs() <= 5 * sigma)[top].all()


# --- log-probabilities, limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_equal_transformers(
    temperature: float, folders: dict[str, Path], references: dict[str, Reference]
) -> None:
    (prompt,) = prompts_of([12])
    params = SamplingParams(temperature=temperature, top_k=5, seed=3, max_tokens=9, logprobs=4, ignore_eos=True)
    (out,) = engine(folders["qwen3"], max_batched_tokens=5).generate({"prompt_token_ids": prompt}, params)
    (one,) = out.outputs
    assert one.logprobs is not None
    assert len(one.logprobs) == len(one.token_ids) == 9
    theirs = references["qwen3"].logprobs([*prompt, *one.token_ids])
    for t, (token, shown) in enumerate(zip(one.token_ids, one.logprobs, strict=True)):
        row = theirs[len(prompt) - 1 + t]
        assert set(shown) == {token, *row.topk(4).indices.tolist()}
        for i, value in shown.items():
            assert value == pytest.approx(float(row[i]), abs=1e-4)
        assert temperature > 0 or token == int(row.argmax())


def test_logprobs_zero_reports_the_chosen_token_only(folders: dict[str, Path]) -> None:
    params = SamplingParams(max_tokens=3, logprobs=0)
    (out,) = engine(folders["llama"]).generate(as_prompts(prompts_of([4])), params)
    assert [list(d) for d in out.outputs[0].logprobs or ()] == [[t] for t in out.outputs[0].token_ids]


def test_min_tokens_bars_every_end(folders: dict[str, Path], references: dict[str, Reference]) -> None:
    (prompt,) = prompts_of([9])
    free = references["llama"].greedy(prompt, 24)
    end = free[0]
    llm = engine(folders["llama"])
    early = llm.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=24, stop_token_ids=[end]))
    assert tokens(early) == [[end]]
    one = SamplingParams(max_tokens=24, min_tokens=1, stop_token_ids=[end])
    assert tokens(llm.generate({"prompt_token_ids": prompt}, one))[0][0] != end
    params = SamplingParams(max_tokens=24, min_tokens=6, stop_token_ids=[end], logprobs=1)
    (out,) = llm.generate({"prompt_token_ids": prompt}, params)
    ids = out.outputs[0].token_ids
    assert len(ids) >= 6
    assert end not in ids[:6]
    row = references["llama"].logprobs(prompt)[-1]
    assert ids[0] == int(row.topk(2).indices[1])
    assert out.outputs[0].logprobs[0][end] == pytest.approx(float(row[end]), abs=1e-4), "of the unmodified distribution"


def test_generation_ends_where_the_cache_or_the_context_does(folders: dict[str, Path]) -> None:
    prompts = as_prompts(prompts_of([9]))
    params = SamplingParams(max_tokens=1000, ignore_eos=True)
    (small,) = engine(folders["llama"], num_blocks=2).generate(prompts, params)
    assert len(small.outputs[0].token_ids) == 16 * 2 - 9
    (large,) = engine(folders["llama"]).generate(prompts, params)
    assert len(large.outputs[0].token_ids) == 256 - 9
    assert small.outputs[0].finish_reason == large.outputs[0].finish_reason == "length"


# --- text -----------------------------------------------------------------------------------------------------------


def test_text_prompt_and_decoding(folders: dict[str, Path]) -> None:
    llm = engine(folders["llama"])
    (out,) = llm.generate("the cat", GREEDY)
    assert out.prompt == "the cat"
    assert list(out.prompt_token_ids) == tokenizer().encode("the cat")
    assert out.outputs[0].text == tokenizer().decode(list(out.outputs[0].token_ids))


@pytest.mark.parametrize("skip", [True, False])
def test_detokenizer_equals_decoding_the_whole(skip: bool) -> None:
    """Characters spread over tokens, broken bytes, special tokens: in the end, the text of all ids."""
    texts = ["héllo 你好 👩🏽\u200d💻 x", "\ufffd literal", "plain", "<|im_end|>mid<|im_end|>"]
    cases = [tokenizer().encode(t) for t in texts]
    cases += [c[:-1] for c in cases] + [[*cases[0][:-3], 0, *cases[2]]]
    for ids in cases:
        detokenizer = Detokenizer(tokenizer(), skip)
        for token in ids:
            before = detokenizer.text
            detokenizer.push(token)
            assert detokenizer.text.startswith(before)
        detokenizer.flush()
        assert detokenizer.text == tokenizer().decode(ids, skip), ids


def test_progress_bar(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    llm = engine(folders["llama"])
    llm.generate(["the cat", "sat"], GREEDY, progress=True)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert "tokens/s" in shown.err
    assert shown.out == ""  # which is for results
    llm.generate("the cat", GREEDY)
    assert capsys.readouterr().err == ""
    counts: list[tuple[int, int]] = []
    engine(folders["qwen3"]).chat([{"role": "user", "content": "cat"}], GREEDY, progress=lambda *c: counts.append(c))
    assert counts[-1] == (1, 1)


def test_chat_and_infill_prompts(folders: dict[str, Path]) -> None:
    llm = engine(folders["qwen3"])
    messages = [{"role": "user", "content": "cat"}]
    one, two = llm.chat([messages, messages], SamplingParams(max_tokens=2, ignore_eos=True))
    assert one.prompt == two.prompt == "<|im_start|>user\ncat<|im_end|>\n<|im_start|>assistant\n"
    assert llm.chat(messages, SamplingParams(max_tokens=2, ignore_eos=True))[0] == one
    out = llm.infill("the ", " mat", SamplingParams(max_tokens=2, ignore_eos=True))
    assert tokenizer().decode(list(out.prompt_token_ids), False) == "<|fim_prefix|>the <|fim_suffix|> mat<|fim_middle|>"
    with pytest.raises(ValueError, match="infill: order: expected 'psm' or 'spm', got 'mps'"):
        llm.infill("a", "b", order="mps")  # type: ignore[arg-type]
    for nothing in ([], "cat"):
        with pytest.raises(ValueError, match="chat: messages: expected a list of at least one message"):
            llm.chat(nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"infill: format: expected 'auto' or one of qwen, .*, got 'gpt'"):
        llm.infill("a", "b", format="gpt")
    with pytest.raises(ValueError, match="infill: markers: '<PRE>' is not a token"):
        llm.infill("a", "b", markers=("<PRE>", "<SUF>", "<MID>"))


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_infill_asks_as_training_lays_out(order: Any, folders: dict[str, Path]) -> None:
    llm, given = engine(folders["qwen3"]), tokenizer()
    layout = draft_fim(("the ", "cat", " mat"), given, Fim.find(given), spm=order == "spm",
                       train_context=True)  # fmt: skip
    (parts,) = encode([layout], given)
    prompt = llm.infill("the ", " mat", SamplingParams(max_tokens=1), order=order).prompt_token_ids
    assert [*prompt, *given.encode_text(["cat"], continues=True)[0], given.eos_id] == join(parts)[0].tolist()


def test_loaded_model_and_bfloat16(folders: dict[str, Path]) -> None:
    llm = LLM(load_model(folders["llama"], dtype=torch.bfloat16), tokenizer(), num_blocks=20)
    assert llm.core._runner.kv_format == "bfloat16"
    a = tokens(llm.generate(as_prompts(prompts_of(LENGTHS)), GREEDY))
    assert a == tokens(engine(folders["llama"], dtype=torch.bfloat16).generate(as_prompts(prompts_of(LENGTHS)), GREEDY))


@pytest.mark.parametrize("options", [{}, {"prefill_threads": 1}], ids=["alone", "shared"])
def test_the_cache_has_its_memory_before_the_first_request(options: dict[str, Any], folders: dict[str, Path]) -> None:
    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    llm = LLM(folders["llama"], kv_cache_bytes=64 << 20, **options)
    before = faults()
    llm.core._runner._cache.fill_(1)
    assert faults() - before < 16, "of 32 huge pages, or 16,384 others"
