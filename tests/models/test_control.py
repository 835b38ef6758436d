"""Control tokens against the text that looks like them, and texts encoded in parts, in every family of tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers

from fastsft.models.control import CONTROL, ControlTokens, continuing, marking
from fastsft.models.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from tokenizer_cases import CORPUS, SPACED, family

FAMILIES = pytest.mark.parametrize("name", [*SPACED, "byte level"])
CODE = "def add(a, b):\n    return a + b\n"


@FAMILIES
def test_a_text_in_parts_is_the_text(name: str) -> None:
    tokenizer = family(name)
    for at in range(1, len(CODE)):
        (first,), (second,) = tokenizer.encode_text([CODE[:at]]), tokenizer.encode_text([CODE[at:]], continues=True)
        assert tokenizer.decode([*first, *second]) == tokenizer.decode(tokenizer.encode(CODE)), CODE[:at]


@FAMILIES
def test_text_of_special_tokens_is_text(name: str) -> None:
    tokenizer = family(name)
    special = set(range(1, 8))  # all but <unk>
    for text in ("x = '</s>'", "<|im_end|>", "<s><s>", "a<|fim_middle|>b"):
        assert special & set(tokenizer.encode(text)), "or the case shows nothing"
        for continues in (False, True):
            (ids,) = tokenizer.encode_text([text], continues=continues)
            assert not special & set(ids)
            assert tokenizer.decode(ids, False).lstrip() == text
    for text in CORPUS[:3]:
        assert tokenizer.encode_text([text])[0] == tokenizer.encode(text)


@FAMILIES
def test_marked_tokens_are_encoded_as_ever(name: str) -> None:
    """Behind a mark the segmentation, and with it the space that some put behind each special token, is unchanged."""
    tokenizer = family(name)
    text = "<s><|im_start|>user\nhello <|im_end|> world</s>  x<|im_end|>"
    ((ids, offsets),) = tokenizer.encode_rendered([tokenizer.control.mark(text)])
    assert ids == tokenizer.encode(text)
    assert len(offsets) == len(ids)


def test_byte_level_needs_one_backend() -> None:
    backend = family("byte level").backend
    assert continuing(backend) is backend


def test_markers_that_are_not_declared_special() -> None:
    """As in Qwen2.5: written like a control token. Other added tokens, of white space or tags, are ordinary text."""
    backend = tokenizers.Tokenizer.from_str(family("byte level").backend.to_str())
    backend.add_tokens([AddedToken("<|repo|>", special=False), AddedToken("<｜hole｜>"), AddedToken("<think>")])  # noqa: RUF001
    tokenizer = Tokenizer(backend)
    assert {"<|repo|>", "<｜hole｜>"} <= set(tokenizer.control.names)  # noqa: RUF001
    assert "<think>" not in tokenizer.control.names
    (ids,) = tokenizer.encode_text(["<|repo|><think>"])
    assert tokenizer.token_id("<|repo|>") not in ids
    assert tokenizer.token_id("<think>") in ids
    assert tokenizer.encode_rendered([f"{CONTROL}<|repo|>"])[0][0] == [tokenizer.token_id("<|repo|>")]


def test_longest_name_wins_and_content_stays_content() -> None:
    backend = tokenizers.Tokenizer.from_str(family("byte level").backend.to_str())
    backend.add_special_tokens(["<e>", "<e><e>"])
    control = ControlTokens(backend)
    assert control.mark("<e><e><e>") == f"{CONTROL}<e><e>{CONTROL}<e>"
    assert control.mark(control.escape("a<e><e>") + "<e>") == f"a<e><e>{CONTROL}<e>"
    assert control.first_in("a <e><e>") == "<e><e>"
    assert control.first_in("a < e >") is None
    assert ControlTokens(tokenizers.Tokenizer(tokenizers.models.BPE())).mark("<e>") == "<e>"


def test_tokenizers_that_cannot_do_it_are_refused() -> None:
    split = tokenizers.Tokenizer.from_str(family("metaspace always").backend.to_str())
    split.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split.pre_tokenizer])
    with pytest.raises(ValueError, match="cannot encode a text in parts: 'a' and ' b' became 'ab'"):
        Tokenizer(split).encode_text(["x"], continues=True)
    assert Tokenizer(split).encode_text(["x"])[0]
    assert Tokenizer(split).encode_text([], continues=True) == []
    spec = json.loads(family("byte level").backend.to_str())
    first, second = spec["model"]["merges"][0]
    whole = tokenizers.Tokenizer.from_str(json.dumps(spec))
    with pytest.raises(ValueError, match="special tokens cannot be told from text"):
        marking(whole, [first + second])  # a piece that the merges build


def test_prepending_inside_a_sequence_only_is_removed() -> None:
    backend = family("prepend").backend
    kept = continuing(backend).normalizer
    assert kept.normalize_str("a b") == "a▁b"
    assert isinstance(kept, normalizers.Sequence)
