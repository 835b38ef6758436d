"""What each token is: small samples written out by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from fastsft.config import DataOptions, load_config
from fastsft.data.batch import Sample, collate
from fastsft.data.prepare import Prepared, prepare
from fastsft.data.segments import Segment
from fastsft.data.store import SampleStore
from fastsft.models.tokenizer import Tokenizer

# Calls behind the content, and reasoning as a block.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.name + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIGNS = {"prompt": "p", "thinking": "t", "answer": "a", "tool_calls": "c", "control": "x"}
CHAT = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>why</think>yes", "tool_calls": [{"name": "f"}]},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "no", "weight": 0.5},
    ]
}


def prepared(tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> Prepared:
    folder = tmp_path / "tok"
    folder.mkdir(exist_ok=True)
    marks = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    Tokenizer.train(["abc"], 262, marks, chat_template=TEMPLATE).save(folder)  # a token for each byte
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"train": [str(path)], "eval_fraction": 0.0, **data}
    return prepare(
        load_config({"output": str(tmp_path / "run"), "tokenizer": {"path": str(folder)}, "data": given})
    )  # fmt: skip


def read(found: Prepared, index: int = 0) -> str:
    """The sample with each run of tokens of one segment as its sign and [text]."""
    sample, text = found.train[index], ""
    assert sample.segments is not None
    tokens = zip(sample.segments.tolist(), sample.ids.tolist(), strict=True)
    for segment, run in itertools.groupby(tokens, lambda pair: pair[0]):
        text += f"{SIGNS[Segment(segment).label]}[{found.tokenizer.decode([t for _, t in run], False)}]"
    return text


def test_names_are_those_of_the_weights() -> None:
    assert [segment.label for segment in Segment] == [*vars(DataOptions().weights)]


@pytest.mark.parametrize("weights", [{}, {"thinking": 0.5, "tool_calls": 2.0, "control": 0.0, "prompt": 1.0}])
def test_segments_do_not_depend_on_weights(weights: dict[str, float], tmp_path: Path) -> None:
    rows = [CHAT, {"prompt": "q", "completion": "<think>h</think>a"}, {"text": "abc"}]
    found = prepared(tmp_path, rows, weights=weights)
    assert read(found) == (
        "p[<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n]t[<think>why</think>]a[yes]c[<call>f</call>]"
        "x[<|im_end|>]p[\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n]a[no]x[<|im_end|>]p[\n]"
    )
    assert read(found, 1) == "p[q]t[<think>h</think>]a[a]x[<|endoftext|>]"
    assert read(found, 2) == "a[abc]x[<|endoftext|>]"
    levels = {**vars(DataOptions().weights), **weights}
    for i in range(3):
        sample = found.train[i]
        assert sample.segments is not None
        expected = [levels[Segment(s).label] for s in sample.segments.tolist()]
        if i == 0:
            expected[-4:] = [w * f for w, f in zip(expected[-4:], [0.5, 0.5, 0.5, 1.0], strict=True)]
        assert sample.weights.tolist() == expected


def test_infilling(tmp_path: Path) -> None:
    row = {"prefix": "ab", "suffix": "d", "middle": "c"}
    found = prepared(tmp_path, [row], weights={"prompt": 1.0, "answer": 2.0})
    assert read(found) == "p[<|fim_prefix|>ab<|fim_suffix|>d<|fim_middle|>]a[c]x[<|endoftext|>]"
    assert set(found.train[0].weights.tolist()) == {0.0, 1.0}
    text = prepared(tmp_path, [{"text": "abcd"}], fim={"rate": 1.0, "spm_rate": 0.0}, weights={"answer": 2.0})
    assert text.report["infilling"]["fim_rows"] == 1
    assert read(text) == "x[<|fim_prefix|>]a[ab]x[<|fim_suffix|>]a[cd]x[<|fim_middle|><|endoftext|>]"  # nothing between
    assert set(text.train[0].weights.tolist()) == {1.0}


def test_calls_that_cannot_be_told_from_the_content(tmp_path: Path) -> None:
    """Where both weigh the same, the row is usable, and the turn is answer."""
    template = TEMPLATE.replace(" + (m.content or '') }}", " }}").replace(
        "{{ '<|im_end|>\n' }}", "{{ (m.content or '') + '<|im_end|>\n' }}"
    )
    Tokenizer.train(["abc"], 262, chat_template=template).save(_made(tmp_path / "other"))
    path = tmp_path / "rows.jsonl"
    turns = [CHAT["messages"][0], {"role": "assistant", "content": "yes", "tool_calls": [{"name": "f"}]}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    found = prepare(
        load_config(
            {"output": str(tmp_path / "run"), "tokenizer": {"path": str(tmp_path / "other")},
             "data": {"train": [str(path)], "eval_fraction": 0.0}}
        )
    )  # fmt: skip
    assert read(found).endswith("assistant\n]a[<call>f</call>yes]x[<|im_end|>]p[\n]")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_batch_has_the_segment_of_each_target(tmp_path: Path) -> None:
    found = prepared(tmp_path, [{"prompt": "q", "completion": "ab"}, {"text": "c"}])
    p, a, x = Segment.PROMPT, Segment.ANSWER, Segment.CONTROL
    samples = [found.train[0], found.train[1]]
    for batch in (found.train.batch(found.train.lengths.argsort()[::-1]), collate(samples)):
        assert batch.targets.ne(-100).tolist() == [True, True, True, False, True, False]
        assert batch.segments.tolist()[:3] == [a, a, x]
        assert batch.segments.tolist()[4] == x
    assert SampleStore.from_samples(samples).batch(found.train.lengths.argsort()[::-1]).segments.equal(batch.segments)
    assert samples[0].segments is not None
    assert samples[0].segments.tolist() == [p, a, a, x]
    plain = collate([Sample(samples[0].ids, samples[0].weights)])
    assert set(plain.segments.tolist()[:-1]) == {a}
