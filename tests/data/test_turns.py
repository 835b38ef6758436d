"""What the assistant wrote, and as what: parts of turns, turns of conversations, and rows without an exact answer."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from fastsft.config import load_config
from fastsft.data.prepare import prepare
from fastsft.data.records import DataError
from fastsft.models.template import CHATML
from fastsft.models.tokenizer import Tokenizer

# In the manner of Qwen3: reasoning is written of the last turn alone, and always as a block; tool calls as JSON.
QWEN3 = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') if m.content else '' %}"
    "{%- set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if m.content and '</think>' in m.content else '') %}"
    "{%- if loop.last %}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
    "{{- content }}"
    "{%- for c in m.tool_calls or [] %}{{- '\n<tool_call>\n' + (c | tojson) + '\n</tool_call>' }}{%- endfor %}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
# Reasoning between special tokens, in the manner of gpt-oss; the content always follows.
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{% if m.thinking %}{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|message|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
FORGETS_REASONING = CHATML  # reads the content alone
SPECIAL = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
WORDS = ["alpha", "beta", "gamma", "delta", "naïve", "你好", "def f(x):\n    return x"]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def prepared(tmp_path: Path, template: str, rows: list[dict[str, Any]], **data: Any) -> Any:
    folder = tmp_path / "tok"
    if not folder.exists():
        folder.mkdir()
        Tokenizer.train([*WORDS * 9, "<think>"], 420, SPECIAL, chat_template=template).save(folder)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(
        load_config(
            {"output": str(tmp_path / "run"), "tokenizer": {"path": str(folder)},
             "data": {"train": [str(path)], "eval_fraction": 0.0, **data}}
        )
    )  # fmt: skip


def marked(found: Any, index: int = 0) -> str:
    """The sample with each run of tokens of one weight as [weight:text]; weight 0 bare."""
    sample = found.train[index]
    text, last, run = "", 0.0, []
    for token, weight in [*zip(sample.ids.tolist(), sample.weights.tolist(), strict=True), (None, None)]:
        if weight != last and run:
            piece = found.tokenizer.decode(run, False)
            text += f"[{last:g}:{piece}]" if last else piece
            run = []
        last = weight
        run.append(token)
    return text


WEIGHTS = {"prompt": 0.0, "thinking": 0.25, "answer": 1.0, "tool_calls": 2.0, "control": 4.0}


def test_parts_of_a_turn(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    rows = [
        {"messages": [user("q"), assistant("<think>\nwhy\n</think>\n\nyes", tool_calls=[call])]},
        {"messages": [user("q"), assistant("yes", reasoning_content="why")]},
        {"messages": [user("q"), assistant("yes")]},
        {"messages": [user("q"), assistant("", tool_calls=[call, call])]},
    ]
    found = prepared(tmp_path, QWEN3, rows, weights=WEIGHTS)
    head, think = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "[0.25:<think>\nwhy\n</think>]"
    written = '\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    # A newline after the block and the one before a call are one token with what stands around them, or two.
    assert marked(found).startswith(head + think + "[1:\n\nyes][2:")
    assert marked(found).endswith("</tool_call>][4:<|im_end|>]\n")
    assert marked(found, 1) == head + think + "[1:\n\nyes][4:<|im_end|>]\n"
    assert marked(found, 2) == head + "[0.25:<think>\n\n</think>][1:\n\nyes][4:<|im_end|>]\n"
    assert marked(found, 3) == head + f"[0.25:<think>\n\n</think>][2:\n\n{written}{written}][4:<|im_end|>]\n".replace(
        "\n\n\n<", "\n\n\n<"
    )


# The same, with a turn's tool calls before its content.
CALLS_FIRST = QWEN3.replace("{{- content }}", "").replace(
    "</tool_call>' }}{%- endfor %}", "</tool_call>\n' }}{%- endfor %}{{- content }}"
)


@pytest.mark.parametrize("content", ["s", "search", "search done", "_call>"])
@pytest.mark.parametrize("form", ["plain", "function"])
def test_words_of_a_content_that_a_call_has_too(content: str, form: str, tmp_path: Path) -> None:
    call: dict[str, Any] = {"name": "search", "arguments": {"x": "search done"}}
    if form == "function":
        call = {"type": "function", "function": call}
    row = {"messages": [user("search"), assistant(content, reasoning_content="search", tool_calls=[call])]}
    text = marked(prepared(tmp_path, QWEN3, [row], weights=WEIGHTS))
    assert re.search(rf"</think>\]\[1:\n\n{content}\n?\]\[2:\n?<tool_call>", text), text
    (tmp_path / "tok" / "chat_template.jinja").write_text(CALLS_FIRST)
    with pytest.raises(DataError, match=r"turns cannot be told: .* behind its tool calls"):
        prepared(tmp_path, CALLS_FIRST, [row], weights=WEIGHTS)
    assert len(prepared(tmp_path, CALLS_FIRST, [row]).train) == 1  # of one weight: there is nothing to tell apart


def test_reasoning_between_special_tokens(tmp_path: Path) -> None:
    rows = [{"messages": [user("q"), assistant("yes", thinking="why")]}]
    found = prepared(tmp_path, CHANNELS, rows, weights=WEIGHTS)
    assert marked(found) == (
        "<|start|>user<|message|>q<|end|><|start|>assistant[4:<|channel|>][1:analysis][4:<|message|>][0.25:why]"
        "[4:<|end|><|start|>][1:assistant][4:<|message|>][1:yes][4:<|end|>]"
    )


def test_thinking_of_a_completion(tmp_path: Path) -> None:
    rows = [{"prompt": "q\n", "completion": "<think>why</think>yes"}, {"prompt": "q\n", "completion": "yes <think>"}]
    found = prepared(tmp_path, CHATML, rows, weights=WEIGHTS)
    assert marked(found) == "q\n[0.25:<think>why</think>][1:yes][4:<|endoftext|>]"
    assert marked(found, 1) == "q\n[1:yes <think>][4:<|endoftext|>]"
    plain = prepared(tmp_path, CHATML, rows)
    assert [s.tolist() for s in (plain.train[0].ids, plain.train[1].ids)] == [
        s.tolist() for s in (found.train[0].ids, found.train[1].ids)
    ]


def test_weights_of_turns(tmp_path: Path) -> None:
    turns = [user("a"), assistant("b", weight=0.5), user("c"), assistant("d", train=False), user("e"), assistant("f")]
    found = prepared(tmp_path, CHATML, [{"messages": turns, "weight": 3}])
    text = marked(found)
    assert "[1.5:b<|im_end|>]" in text
    assert "[3:f<|im_end|>]" in text
    assert "\nd<|im_end|>" in text
    same = Tokenizer.from_folder(tmp_path / "tok")
    assert text.replace("[1.5:", "").replace("[3:", "").replace("]", "") == same.render_chat(turns)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (assistant("x", weight=-1), "a message's weight: expected a number from 0 to .*, got -1"),
        (assistant("x", weight=True), "a message's weight: expected a number from 0 to .*, got True"),
        (assistant("x", train=1), "a message's train: expected true or false, got 1"),
        (assistant("x", train=True, weight=1), "a message has weight or train, not both"),
        ({"role": "user", "content": "x", "train": True}, "a message of the user: only what the assistant wrote"),
    ],
)
def test_bad_weights_of_messages(message: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: bad weight: {reason}"):
        prepared(tmp_path, CHATML, [{"messages": [message, assistant("y")]}])


TWO = {"messages": [user("a"), assistant("<think>\nwhy\n</think>\n\nb"), user("c"), assistant("d"), user("e")]}


def test_turns_in_samples_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompt is not a prefix: .*data\.turns = 'each'"):
        prepared(tmp_path, QWEN3, [TWO])
    found = prepared(tmp_path, QWEN3, [TWO], turns="each")
    first = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert [found.train[i].source.rpartition(":")[2] for i in range(len(found.train))] == ["1", "1"]
    assert marked(found) == first + "[1:<think>\nwhy\n</think>\n\nb<|im_end|>]\n"
    second = first + "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    assert marked(found, 1) == second + "[1:<think>\n\n</think>\n\nd<|im_end|>]\n"
    last = prepared(tmp_path, QWEN3, [TWO], turns="last")
    assert len(last.train) == 1
    assert marked(last) == marked(found, 1)


def test_last_turn_with_tags(tmp_path: Path) -> None:
    whole = prepared(tmp_path, CHATML, [TWO])
    last = prepared(tmp_path, CHATML, [TWO], turns="last")
    assert marked(whole).count("[1:") == 2
    assert marked(last).count("[1:") == 1
    assert marked(last).endswith("assistant\n[1:d<|im_end|>]\n")


def test_thinking_modes(tmp_path: Path) -> None:
    row = {"messages": [user("a"), assistant("b", reasoning_content="why")]}
    head = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert marked(prepared(tmp_path, QWEN3, [row])) == head + "[1:<think>\nwhy\n</think>\n\nb<|im_end|>]\n"
    assert marked(prepared(tmp_path, QWEN3, [row], thinking="drop")) == (
        head + "[1:<think>\n\n</think>\n\nb<|im_end|>]\n"
    )
    # The empty block is the generation prompt's, not the model's.
    assert marked(prepared(tmp_path, QWEN3, [row], thinking="empty")) == (
        head + "<think>\n\n</think>\n\n[1:b<|im_end|>]\n"
    )


def test_a_template_without_a_mode_or_reasoning(tmp_path: Path) -> None:
    row = {"messages": [user("a"), assistant("b", reasoning_content="why")]}
    with pytest.raises(DataError, match="it has no non-thinking mode"):
        prepared(tmp_path, FORGETS_REASONING, [row], thinking="empty")
    with pytest.raises(DataError, match=r"content lost: .* reasoning of a turn that is trained"):
        prepared(tmp_path, FORGETS_REASONING, [row])
    assert len(prepared(tmp_path, FORGETS_REASONING, [row], thinking="drop").train) == 1
    untrained = {"messages": [user("a"), assistant("b", reasoning_content="why", weight=0), user("c"), assistant("d")]}
    assert len(prepared(tmp_path, FORGETS_REASONING, [untrained]).train) == 1


def test_content_that_the_template_does_not_write(tmp_path: Path) -> None:
    template = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}"
    )
    rows = [{"messages": [user("a"), {"role": "tool", "content": "42"}, assistant("b")]}]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: content lost: .* content of message 1"):
        prepared(tmp_path, template, rows)


def test_calls_and_tools_that_the_template_does_not_write(tmp_path: Path) -> None:
    """The model would learn to say nothing where it should call."""
    template = re.sub("{% if ((tools)|message.'tool_calls'.) %}.*?{% endif %}", "", CHATML)  # where it refuses both
    call = {"type": "function", "function": {"name": "lookup", "arguments": {}}}
    turns = [user("a"), assistant("", tool_calls=[call]), {"role": "tool", "content": "lookup: 4"}, assistant("b")]
    with pytest.raises(DataError, match=r"jsonl:1: content lost: .* the tool_calls of message 1, 'lookup' for one"):
        prepared(tmp_path, template, [{"messages": turns}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: content lost: .* the tools, 'lookup' for one"):
        prepared(tmp_path, template, [{"messages": [user("a"), assistant("b")], "tools": [call]}])
    turns[1]["train"] = False
    assert "lookup" in marked(prepared(tmp_path, template, [{"messages": turns}]))


def test_a_lost_content_whose_words_stand_elsewhere(tmp_path: Path) -> None:
    template = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}"
    )
    rows = [{"messages": [user("run ls 42"), {"role": "tool", "content": "42"}, assistant("b")]}]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: content lost: .* content of message 1"):
        prepared(tmp_path, template, rows)
    # The same twice, and a system message that is written late, are no loss.
    moved = CHATML.replace("{% for message in messages %}", "{% for message in messages[1:] + messages[:1] %}")
    turns = [{"role": "system", "content": "s"}, user("b"), assistant("b"), user("b"), assistant("b")]
    (tmp_path / "tok" / "chat_template.jinja").write_text(moved)
    assert len(prepared(tmp_path, moved, [{"messages": turns}]).train) == 1


def test_tags_that_are_not_one_per_message(tmp_path: Path) -> None:
    template = CHATML.replace(
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{% generation %}{{ message['content'] }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}",
    )
    rows = [{"messages": [user("a"), assistant("b")]}]
    assert "[1:b<|im_end|>]" in marked(prepared(tmp_path, template, rows))
    with pytest.raises(DataError, match="turns cannot be told"):
        prepared(tmp_path, template, rows, weights={"thinking": 0.5})
    with pytest.raises(DataError, match="turns cannot be told"):
        prepared(tmp_path, template, rows, turns="last")
    mixed = {"messages": [user("a"), assistant("b", train=False), user("c"), assistant("d")]}
    with pytest.raises(DataError, match="turns cannot be told"):
        prepared(tmp_path, template, [mixed])
    assert "[0.5:b" in marked(prepared(tmp_path, template, [{"messages": [user("a"), assistant("b", weight=0.5)]}]))


def test_segments_add_up(tmp_path: Path) -> None:
    """Whatever the weights, the tokens are the same, and those with a weight are those of the plain mask."""
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        turns = []
        for _ in range(rng.randint(1, 3)):
            block = f"<think>{' '.join(rng.choices(WORDS, k=2))}</think>" if rng.random() < 0.5 else ""
            turns += [user(rng.choice(WORDS)), assistant(block + " ".join(rng.choices(WORDS, k=3)))]
        rows.append({"messages": turns})
    plain = prepared(tmp_path, CHATML, rows)
    weighted = prepared(tmp_path, CHATML, rows, weights=WEIGHTS)
    for i in range(len(rows)):
        assert plain.train[i].ids.tolist() == weighted.train[i].ids.tolist()
        assert ((plain.train[i].weights > 0) == (weighted.train[i].weights > 0)).all()
        text = marked(weighted, i)
        for message in rows[i]["messages"][1::2]:
            thought, _, spoken = message["content"].rpartition("</think>")
            assert f"[1:{spoken}][4:<|im_end|>]" in text
            assert not thought or f"[0.25:{thought}</think>]" in text


def test_a_share_of_bad_rows(tmp_path: Path) -> None:
    good, bad = {"messages": [user("a"), assistant("b")]}, {"messages": [user("a")]}
    rows = [good] * 18 + [bad] * 2
    with pytest.raises(DataError, match=r"rows\.jsonl:19: nothing to train on: .*data\.max_bad above 0"):
        prepared(tmp_path, CHATML, rows)
    with pytest.raises(DataError, match=r"2 of 20 rows are unusable, data\.max_bad allows 0\.09 .*rows\.jsonl:19"):
        prepared(tmp_path, CHATML, rows, max_bad=0.09)
    found = prepared(tmp_path, CHATML, rows, max_bad=0.1)
    assert found.report["skipped"] == {"nothing to train on": 2}
    assert len(found.train) == 18
    long = {"messages": [user("a"), assistant("b " * 3000)]}  # left out, but not wrong
    assert prepared(tmp_path, CHATML, [good, long]).report["skipped"] == {"too long": 1}
