"""A tokenizer before its training, and what it is trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import tokenizers

# How Qwen's tokenizers split text. Each digit stands alone, and a line's end is apart from the next line's indentation.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In training alone, a run of so many characters is cut: the library's time is quadratic in a long word of one letter.
_RUN = re.compile(r"\S{2000}|\s{2000}")


def untrained() -> tokenizers.Tokenizer:
    """A byte-level BPE without merges."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated")
    bytes_only = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_only])
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def cut_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces to train on."""
    for text in texts:
        begin = 0
        for run in _RUN.finditer(text):
            yield text[begin : run.end()]
            begin = run.end()
        yield text[begin:]
