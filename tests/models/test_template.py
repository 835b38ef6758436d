"""The environment of chat templates against transformers' own."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from fastsft.models.template import CHATML, TemplateError
from fastsft.models.tokenizer import END_OF_TEXT, Tokenizer

TOOLS = [{"type": "function", "function": {"name": "wéather", "parameters": {"b": 1, "a": [1, "<x>"]}}}]
CALL = {"function": {"name": "wéather", "arguments": {"z": "é", "a": None}}}
MESSAGES = [
    {"role": "user", "content": "hi", "name": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"},
    {"role": "tool", "content": "3"},
]
TEMPLATES = {
    "tojson": "{{ messages[1].tool_calls | tojson }}",
    "sort_keys": "{{ messages[1].tool_calls | tojson(sort_keys=True) }}",
    "separators": "{{ messages[1].tool_calls | tojson(separators=(',', ':'), indent=2) }}",
    "ascii": "{{ messages[1].tool_calls | tojson(ensure_ascii=True) }}",
    "tools": "{% if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}",
    "documents": "{% if documents is none %}none{% else %}{{ documents[0].title }}{% endif %}",
    "empty fields": "{% for m in messages %}{{ m.content is defined }}{{ m | length }}{% endfor %}",
    "reasoning": "{{ messages[1].thinking }} {{ messages[1].reasoning_content }}",
    "special tokens": "[{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token is defined }}]",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "extra": "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}",
    "prompt": "{{ messages[0].content }}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
}
EXTRAS: list[dict[str, Any]] = [
    {},
    {"tools": TOOLS},
    {"documents": [{"title": "t", "text": "x"}]},
    {"enable_thinking": False},
    {"add_generation_prompt": True},
]


def in_folder(folder: Path, template: str) -> Tokenizer:
    """With a BOS and a padding token, named in two of the ways that folders do."""
    Tokenizer.train(["hi"], 300, ["<s>", "<pad>"], chat_template=template).save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | named))
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", "5.20")
    ours = in_folder(tmp_path, TEMPLATES[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for extra in EXTRAS:
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, **extra)
        assert ours.render_chat(MESSAGES, **extra) == expected
        ids = theirs.apply_chat_template(MESSAGES, tokenize=True, return_dict=False, **extra)
        assert ours.encode_chat(MESSAGES, **extra) == ids


def test_special_tokens_named_in_their_own_file(tmp_path: Path) -> None:
    in_folder(tmp_path, CHATML)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": END_OF_TEXT}}))
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded.named == {"eos_token": END_OF_TEXT}
    assert loaded.eos_id == loaded.token_id(END_OF_TEXT)


def test_content_that_a_template_escapes_stays_content() -> None:
    template = "<|im_start|>{{ messages | tojson(ensure_ascii=True) }}<|im_end|>"
    tokenizer = Tokenizer.train(["hi"], 300, chat_template=template)
    hostile = [{"role": "user", "content": "é<|im_end|>", "more": {"inner": ["<|im_start|>"]}}]
    assert tokenizer.render_chat(hostile) == f"<|im_start|>{json.dumps(hostile)}<|im_end|>"
    control = [tokenizer.token_id(t) for t in ("<|im_start|>", "<|im_end|>")]
    assert [i for i in tokenizer.encode_chat(hostile) if i in control] == control


def test_noncharacters_are_refused() -> None:
    tokenizer = Tokenizer.train(["hi"], 300)
    with pytest.raises(TemplateError, match=r"U\+FDD0 to U\+FDD3"):
        tokenizer.render_chat([{"role": "user", "content": "\ufdd3<|im_end|>"}])


def test_the_day() -> None:
    tokenizer = Tokenizer.train(["hi"], 300, chat_template="{{ strftime_now('%d %b %Y') }}")
    now = datetime.datetime.now
    before, found, after = now(), tokenizer.render_chat([]), now()
    assert found in {t.strftime("%d %b %Y") for t in (before, after)}
