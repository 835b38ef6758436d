"""Each family's layout as its card writes it, found from the vocabulary, and undone."""

from __future__ import annotations

import functools
from typing import get_args, get_type_hints

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import family
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from fastsft import ops
from fastsft.config import FimOptions
from fastsft.data.fim import draft_fim
from fastsft.data.segments import join
from fastsft.data.tokenise import encode
from fastsft.models.fim import FORMATS, Fim, FimParts, detect
from fastsft.models.tokenizer import Tokenizer
from fastsft.ops.bpe import NotExactError

SENTENCEPIECE = ("codellama", "codestral", "codegemma")

# (format, suffix first) -> the sample of "ab", "cd", "ef", written down by hand
EXPECTED = {
    ("qwen", False): "<|fim_prefix|>ab<|fim_suffix|>ef<|fim_middle|>cd<|endoftext|>",
    ("qwen", True): "<|fim_prefix|><|fim_suffix|>ef<|fim_middle|>abcd<|endoftext|>",
    ("starcoder", False): "<fim_prefix>ab<fim_suffix>ef<fim_middle>cd<|endoftext|>",
    ("starcoder2", True): "<fim_prefix><fim_suffix>ef<fim_middle>abcd<|endoftext|>",
    ("granite", False): "<fim_prefix>ab<fim_suffix>ef<fim_middle>cd<|endoftext|>",
    ("granite4", False): "<|fim_prefix|>ab<|fim_suffix|>ef<|fim_middle|>cd<|end_of_text|>",
    ("santacoder", True): "<fim-prefix><fim-suffix>ef<fim-middle>abcd<|endoftext|>",
    ("codellama", False): "▁<PRE>ab▁<SUF>ef▁<MID>cd▁<EOT>",
    ("codellama", True): "▁<PRE>▁<SUF>ef▁<MID>abcd▁<EOT>",
    ("deepseek", False): "<｜fim▁begin｜>ab<｜fim▁hole｜>ef<｜fim▁end｜>cd<｜end▁of▁sentence｜>",  # noqa: RUF001
    ("deepseek", True): "<｜fim▁begin｜>ab<｜fim▁hole｜>ef<｜fim▁end｜>cd<｜end▁of▁sentence｜>",  # noqa: RUF001
    ("codegemma", False): "<|fim_prefix|>ab<|fim_suffix|>ef<|fim_middle|>cd<|file_separator|>",
    ("codestral", False): "[SUFFIX]ef[PREFIX]abcd</s>",
    ("codestral", True): "[SUFFIX]ef[PREFIX]abcd</s>",
}


@functools.cache
def tokenizer_of(tokens: tuple[str, ...], sentencepiece: bool = False) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if sentencepiece:  # Llama's: every space a letter, one put before each text, unknown characters as bytes
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet, tokens = [], (*(f"<0x{b:02X}>" for b in range(256)), *tokens)
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    names = ["<unk>", "<eos>", *tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=len(names) + 300, special_tokens=names, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(["def add(a, b):\n    return a + b\n", "ab cd ef"] * 9, trainer)
    if sentencepiece:  # the byte pieces are ordinary ones
        import json

        spec = json.loads(backend.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return Tokenizer(backend, eos_id=1)


def tokenizer_for(name: str) -> Tokenizer:
    return tokenizer_of(FORMATS[name].tokens, name in SENTENCEPIECE)


def sample(name: str, parts: tuple[str, str, str], spm: bool) -> list[int]:
    tokenizer = tokenizer_for(name)
    (found,) = encode([draft_fim(parts, tokenizer, Fim.find(tokenizer, name), spm=spm, train_context=True)], tokenizer)
    return join(found)[0].tolist()


@pytest.mark.parametrize(("name", "spm"), list(EXPECTED))
def test_layout(name: str, spm: bool) -> None:
    tokenizer = tokenizer_for(name)
    pieces = [tokenizer.backend.id_to_token(i) for i in sample(name, ("ab", "cd", "ef"), spm)]
    marks = FORMATS[name].required
    assert "".join(p if p in marks else p.replace("▁", "") for p in pieces) == EXPECTED[name, spm]
    if name == "codellama" and not spm:  # SentencePiece's space stands before the prefix alone
        written = "".join(f" {p} " if p in marks else p for p in pieces)
        assert written == " ▁<PRE> ▁ab ▁<SUF> ef ▁<MID> cd ▁<EOT> "


def test_every_format_is_laid_out_and_offered() -> None:
    assert {name for name, _ in EXPECTED} == set(FORMATS)
    assert {"auto", *FORMATS} == set(get_args(get_type_hints(FimOptions)["format"]))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.booleans(), *[st.text(max_size=12)] * 3)
def test_the_inverse_restores_the_text(name: str, spm: bool, prefix: str, middle: str, suffix: str) -> None:
    tokenizer = tokenizer_for(name)
    fim = Fim.find(tokenizer, name)
    ids = sample(name, (prefix, middle, suffix), spm)
    if "\u2581" in prefix + middle + suffix and name in SENTENCEPIECE:
        return  # the letter that stands for a space there
    assert fim.restore(ids, tokenizer) == prefix + middle + suffix
    assert fim.restore(ids[:-1], tokenizer) == prefix + middle + suffix, "the end token may be missing"
    parts = fim.inverse([7, *ids])
    assert parts is not None
    if fim.layout(spm) == fim.psm:
        inside = tokenizer.encode_text([middle], continues=bool(prefix))[0]
        assert parts.middle == inside
        assert parts.suffix == tokenizer.encode_text([suffix], continues=True)[0]


def test_what_is_no_sample_has_no_inverse() -> None:
    tokenizer = tokenizer_for("qwen")
    fim = Fim.find(tokenizer)
    pre, suf, mid = (tokenizer.token_id(t) for t in ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"))
    assert fim.inverse([]) is None
    assert fim.inverse(tokenizer.encode("ab cd")) is None
    assert fim.inverse([pre, 300, suf, 301]) is None
    assert fim.inverse([pre, 300, mid, 301, suf, 302]) is None
    assert fim.inverse([pre, 300, suf, 301, mid, 302, suf]) is None
    assert fim.inverse([pre, 300, suf, 301, mid, 302]) == FimParts([300], [302], [301])
    assert fim.restore([300, 301], tokenizer) is None


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_found_from_the_vocabulary(name: str) -> None:
    found = Fim.find(tokenizer_for(name))
    assert found == Fim.find(tokenizer_for(name), name)
    stops = {tokenizer_for(name).backend.id_to_token(i) for i in found.stop_ids}
    assert stops == set(FORMATS[name].tokens)


def test_our_own_vocabulary_is_qwen() -> None:
    assert detect(Tokenizer.train(["ab"], 300, FORMATS["qwen"].required)) == "qwen"


def test_what_cannot_be_told_is_an_error() -> None:
    both = tokenizer_of((*FORMATS["santacoder"].required, *FORMATS["starcoder"].required))
    with pytest.raises(ValueError, match=r"fits 'starcoder' and .*'santacoder'.*; name the one that is meant"):
        detect(both)
    assert Fim.find(both, "santacoder").psm != Fim.find(both, "starcoder").psm
    with pytest.raises(ValueError, match="the markers of no known format"):
        detect(tokenizer_of(("<|fim_prefix|>", "<|fim_middle|>")))
    with pytest.raises(ValueError, match=r"format 'codestral': '\[SUFFIX\]' is not a token of this vocabulary"):
        Fim.find(both, "codestral")
    with pytest.raises(ValueError, match="format: expected 'auto' or one of qwen"):
        Fim.find(both, "gpt")


def test_own_markers() -> None:
    tokenizer = tokenizer_of(("<A>", "<B>", "<C>"))
    fim = Fim.find(tokenizer, markers=("<A>", "<B>", "<C>"))
    a, b, c = (tokenizer.token_id(t) for t in ("<A>", "<B>", "<C>"))
    assert fim.psm == (a, -1, b, -3, c, -2)
    assert fim.spm == (a, b, -3, c, -1, -2)
    assert fim.end_id == tokenizer.eos_id
    with pytest.raises(ValueError, match="markers: expected three different tokens"):
        Fim.find(tokenizer, markers=("<A>", "<A>", "<C>"))
    with pytest.raises(ValueError, match="markers: 'ab' must be a special token"):
        Fim.find(tokenizer, markers=("<A>", "ab", "<C>"))
    with pytest.raises(ValueError, match="no eos_token"):
        Fim.find(Tokenizer(tokenizer.backend), markers=("<A>", "<B>", "<C>"))


@pytest.mark.parametrize("name", ["prepend", "metaspace first", "byte level"])
def test_the_inverse_in_other_vocabularies(name: str) -> None:
    tokenizer = family(name)
    fim = Fim.find(tokenizer, markers=("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"))
    for parts in (("a", "b", "c"), ("", " b", ""), ("", "", " c"), (" a ", " b ", " c "), ("", "b", " c")):
        if tokenizer.decode(tokenizer.encode_text(["".join(parts)])[0], False) != "".join(parts):
            continue  # the vocabulary itself loses the first space
        for spm in (False, True):
            (found,) = encode([draft_fim(parts, tokenizer, fim, spm=spm, train_context=True)], tokenizer)
            assert fim.restore(join(found)[0].tolist(), tokenizer) == "".join(parts), (parts, spm)


@pytest.mark.parametrize("name", ["prepend", "metaspace first", "unigram", "byte level with a space"])
def test_what_is_no_byte_level_bpe_is_refused(name: str) -> None:
    with pytest.raises(NotExactError):
        family(name).byte_bpe  # noqa: B018


def test_rows_of_text_with_a_control_tokens_name() -> None:
    tokenizer = Tokenizer.train(["ab <|im_end|> cd"], 300, FORMATS["qwen"].required)
    fim = Fim.find(tokenizer)
    text = "ab <|im_end|> cd" * 3
    (ids,) = tokenizer.encode_text([text])
    for seed in range(20):
        rows = ops.fim_rows(
            np.array(ids), np.array([0, len(ids)]), psm=fim.layout(False), seed=seed, rate=1.0, unit="character",
            encoder=tokenizer.byte_bpe,
        )  # fmt: skip
        assert fim.restore(rows.tokens.tolist(), tokenizer) == text
        begin, end = rows.cuts[0]
        expected = tokenizer.encode_text([text[:begin], text[begin:end], text[end:]])
        bounds = rows.bounds[0].reshape(3, 2).tolist()
        assert [rows.tokens[a:b].tolist() for a, b in bounds] == expected
