"""A trained tokenizer means the same to transformers, whatever family the model beside it belongs to."""

from __future__ import annotations

import inspect
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from parity_table import TINY

from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import init_model, save_model

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
TEXTS = [
    "",
    " ",
    "\n",
    "def f(x, y=12):\n    return x[:98] + 3.14159e-07\n\n\nclass A:\n\n        pass\n",
    "1234567890 0x1F 1_000 ٣٤ ² Ⅷ",
    " a\t\tb  \n  \r\n\r\n   c   ",
    "it's IT'S we'll don't (they've)",
    "naïve café cafe\u0301 你好 世界 👩🏽\u200d💻 🇨🇭 ﬁ \u00a0 \u200b\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|fim_prefix|>a<|fim_suffix|> b<|fim_middle|><|endoftext|>",
    "<|im_start|x ||| <= != ->:\n",
]
CHATS = [
    [{"role": "user", "content": "add 93 to x"}, {"role": "assistant", "content": "return x + 93\n"}],
    [{"role": "system", "content": " s "}, {"role": "user", "content": "\n\tcafe\u0301 <|im_end|>"}],
]


@cache
def trained() -> Tokenizer:
    corpus = [*TEXTS, *(inspect.getsource(module) for module in (random, inspect))]
    return Tokenizer.train(corpus, 1200, MARKS)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_transformers_reads_the_same_ids(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = trained()
    save_model(init_model(TINY | {"model_type": family, "vocab_size": ours.vocab_size}, seed=0), tmp_path)
    ours.save(tmp_path)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, inspect.getsource(random_texts), *random_texts(200)]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False) == theirs.encode(text)
        assert ours.decode(ids, False) == theirs.decode(ids)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for chat in CHATS:
        for prompt in (False, True):
            text = ours.render_chat(chat, add_generation_prompt=prompt)
            assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt) == text
            found = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=True)
            assert found["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id
    assert len(theirs) == ours.vocab_size


def random_texts(count: int) -> list[str]:
    """Texts in which everything that a pre-tokeniser tells apart stands next to everything else."""
    rng = random.Random(0)
    letters = "ab Z19_.,(\n\r\t'sé你e\u0301\u00a0²🙂<|"
    return ["".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(count)]


def test_digits_and_line_ends_stand_alone() -> None:
    """A number is its digits, and a prompt cut after a line's end has the tokens of the whole text."""
    ours = trained()
    assert len(ours.encode("2047")) == 4
    text = "def f(x):\n    if x:\n        return 1\n    return 2\n"
    for end in (i + 1 for i, c in enumerate(text) if c == "\n"):
        head = ours.encode(text[:end])
        assert ours.encode(text)[: len(head)] == head


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer_config.json", b"[1]", "expected a JSON object, got list"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id: expected ids"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_a_broken_file_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    trained().save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        Tokenizer.from_folder(tmp_path)


def test_a_missing_folder_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"other\.json: no such file"):
        Tokenizer.from_folder(tmp_path / "other.json")


@pytest.mark.parametrize("entry", [[{"name": "tool_use"}], ["x"], 7])
def test_no_default_template(entry: object, tmp_path: Path) -> None:
    trained().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    assert Tokenizer.from_folder(tmp_path).chat_template is None


def test_long_runs_take_linear_time() -> None:
    """Two million of one letter, as a line of zeros in base64 has, took the library longer than four minutes."""
    ids = Tokenizer.train(["A" * 2_000_000, " " * 300_000 + "\n", "some words"], 300).encode("A" * 5000)
    assert len(ids) < 100
