"""A byte-level BPE tokenizer's vocabulary as the native encoder reads it (``bpe.h``)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastsft import _C

CODE_POINTS = 0x110000
_LETTER, _NUMBER, _SPACE, _DIGIT, _KNOWN = 1, 2, 4, 8, 128  # CharClass of bpe.h

# The regular expressions of Qwen2 and, with {1,3}, of Llama 3: `pattern` of Split in tokenizer.json.
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_GPT4 % "": 1, _GPT4 % "{1,3}": 3}  # -> digits in a piece


class NotExactError(ValueError):
    """The native encoder cannot give this tokenizer's ids; the message says why."""


class PackedIds(NamedTuple):
    """Text i has ``ids[cu_seqlens[i] : cu_seqlens[i + 1]]``; none where ``exact[i]`` is False."""

    ids: npt.NDArray[np.int32]  # [T]
    cu_seqlens: npt.NDArray[np.int64]  # [N + 1]
    exact: npt.NDArray[np.bool_]  # [N]


class ByteBpe:
    """The ids that a ``tokenizers.Tokenizer`` gives a text, natively, for :func:`fastsft.ops.fim_rows`.

    Args:
        backend: byte-level BPE over GPT-2's, StarCoder's, Qwen2's or Llama 3's pieces; no normaliser, or NFC (whose
            texts :func:`fim_rows` gets, and of which every part is NFC again).

    Raises:
        NotExactError: another kind of tokenizer, or one whose ids differ on the texts that are compared here.
    """

    def __init__(self, backend: Any) -> None:
        spec = json.loads(backend.to_str())
        model, options = spec["model"], _split_of(spec)
        if model["type"] != "BPE" or model.get("byte_fallback"):
            raise NotExactError(f"the vocabulary is no byte-level BPE but {model['type']}")
        for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise NotExactError(f"the BPE has a {name}: {model[name]!r}")
        added = {token["id"]: token for token in spec["added_tokens"]}
        if any(token["single_word"] for token in added.values()):
            raise NotExactError("an added token is one only as a whole word, which a cut changes")
        # The tokenizer takes these out of a text before it splits it.
        self._added = re.compile("|".join(re.escape(token["content"]) for token in added.values()) or "(?!)")
        self._normalizer = backend.normalizer
        byte_of = bytes_of_letters()
        vocabulary: dict[str, int] = model["vocab"]
        size = 1 + max([*vocabulary.values(), *added])
        token_bytes = [b""] * size
        try:
            for token, number in vocabulary.items():
                if number not in added:
                    token_bytes[number] = token.translate(byte_of).encode("latin-1")
        except UnicodeEncodeError as error:
            raise NotExactError(f"the vocabulary has a token that is no string of bytes: {token!r}") from error
        merges = np.empty((len(model["merges"]), 3), np.int32)
        for row, pair in zip(merges, model["merges"], strict=True):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            row[:] = vocabulary[left], vocabulary[right], vocabulary[left + right]
        try:
            self.native = _C.ByteBpe(token_bytes, merges, _classes(), *options, bool(model.get("ignore_merges", False)))
        except ValueError as error:
            raise NotExactError(str(error)) from error
        if not _classes()[0]:
            classify(range(0x500))  # Latin, Greek, Cyrillic; the others when they are met
        _compare(self, backend)

    def normal(self, text: str) -> str:
        """The text as the tokenizer's normaliser leaves it: its ids stand for this."""
        if self._normalizer is None or text.isascii():
            return text
        normal: str = self._normalizer.normalize_str(text)
        return normal

    def encode(self, texts: Sequence[str]) -> PackedIds:
        """The ids of N texts, one after the other, on all threads. They are not exact, and none are given, of a text
        with an added token's in it or an unbroken run of more than 2048 letters or the like: only the tokenizer itself
        can encode those.

        Raises:
            ValueError: a text with a lone surrogate.
        """
        normal = [self.normal(text) for text in texts]
        pairs = zip(texts, normal, strict=True)
        added = np.array([bool(self._added.search(text) or self._added.search(n)) for text, n in pairs], bool)
        views = tuple("" if skip else text for text, skip in zip(normal, added, strict=True))
        found = _C.BpeTexts(self.native, views)
        while found.unknown:  # characters met for the first time
            classify(found.unknown)
            found = _C.BpeTexts(self.native, views)
        ids, exact = np.empty(found.num_tokens, np.int32), np.empty(len(views), np.uint8)
        cu_seqlens = np.empty(len(views) + 1, np.int64)
        found.write(ids, cu_seqlens, exact)
        return PackedIds(ids, cu_seqlens, exact.astype(bool) & ~added)


def classify(code_points: Iterable[int]) -> None:
    """Ask the tokenizers' own regular expressions what these characters are."""
    from tokenizers import Regex, pre_tokenizers

    table = _classes()
    points = [p for p in dict.fromkeys(code_points) if not 0xD800 <= p < 0xE000]
    text = "".join(map(chr, points))
    found = np.full(len(points), _KNOWN, np.uint8)
    for flag, name in ((_LETTER, r"\p{L}"), (_NUMBER, r"\p{N}"), (_SPACE, r"\s")):
        # Removes what is not of the class; "\0" is in none, and an empty text has no pieces.
        others = pre_tokenizers.Split(Regex(rf"[^{name}]+"), "removed")
        for _, (begin, end) in others.pre_tokenize_str(text):
            found[begin:end] |= flag
    # Between zeros, so that only a digit is a piece of one character.
    apart = "\0" + "\0".join(text) + "\0"
    for piece, (begin, end) in pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(apart):
        if end - begin == 1 and piece != "\0":
            found[begin // 2] |= _DIGIT
    table[points] = found


@functools.cache
def _classes() -> npt.NDArray[np.uint8]:
    """CharClass of every code point; those not met so far are 0. For the whole process, since nobody's differ."""
    return np.zeros(CODE_POINTS, np.uint8)


@functools.cache
def bytes_of_letters() -> dict[int, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest is moved behind U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in plain]
    # What is no such letter must not pass for a byte.
    none = dict.fromkeys(moved, 65533)
    return none | {b: b for b in plain} | {0x100 + i: b for i, b in enumerate(moved)}


def _split_of(spec: dict[str, Any]) -> tuple[bool, int, bool]:
    """(GPT-4 style, digits in a piece, digits apart) of a tokenizer.json."""
    if (spec["normalizer"] or {"type": "NFC"}) != {"type": "NFC"}:
        raise NotExactError(f"the normaliser is {spec['normalizer']['type']}")
    steps = spec["pre_tokenizer"]
    if steps is None:
        raise NotExactError("texts are not split before they are merged")
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    kinds = [step["type"] for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1]["add_prefix_space"]:
        raise NotExactError(f"texts are split by {' and '.join(kinds)}")
    by_gpt2 = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_gpt2:
        return False, 1, False
    if kinds == ["Digits", "ByteLevel"] and by_gpt2 and steps[0]["individual_digits"]:
        return False, 1, True
    if kinds == ["Split", "ByteLevel"] and not by_gpt2:
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in _PATTERNS and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            return True, _PATTERNS[pattern], False
    raise NotExactError(
        f"texts are split by {' and '.join(kinds)} in another way than GPT-2, StarCoder, Qwen2, Llama 3"
    )


# Every branch of the patterns, its neighbours, and characters on which engines are known to disagree.
_TEXTS: Sequence[str] = (
    "def add(a, b):\n    return a + b  # it's\n\n\tx=1\r\n\r\n  y", "I'll we've 'tis they'RE 'S'\u017f don''t 'x '1",
    "   \n  \n x\t \ty  ", "a1b22 c333 4444 55555 ½²③ ٣٤", "héllo wörld straße ﬁne 日本語 текст हिन्दी ไทย e\u0301",
    "\u00a0a\u2003b\u2028c\u3000\u0085d\u200b\ufeffe\x1c\x1d",
    "{}[]()<>!!==-->>_a_ __init__ a_b1 $x @y #z\n\n//", "😀👍🏽 ☃x",
    "!\n\n?\r\n \r\r\n a", " \u00a0\n\u00a0 .\n", "\0\x01\x7f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)  # fmt: skip


def _compare(encoder: ByteBpe, backend: Any) -> None:
    pieces = [p for t in _TEXTS for p in (t, *t.split("x"), *(t[i:] for i in range(1, len(t), 7)))]
    found = encoder.encode(pieces)
    for piece, begin, end, exact in zip(pieces, found.cu_seqlens, found.cu_seqlens[1:], found.exact, strict=False):
        if not exact or found.ids[begin:end].tolist() != backend.encode(piece, add_special_tokens=False).ids:
            raise NotExactError(f"the ids of {piece!r} differ")
