"""Options of the data side: what is read, left out, cut up for infilling, weighted and mixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastsft.config.section import Section

FIELD_NAMES = ("messages", "prompt", "completion", "prefix", "suffix", "middle", "text", "weight", "skills")
"""What a row may have, and so the keys of ``data.fields``."""


@dataclass(frozen=True)
class DedupOptions(Section):
    mode: Literal["none", "exact", "near"] = "none"
    threshold: float = 0.7
    """Jaccard similarity of the sets of word 5-grams from which two records are near duplicates."""
    num_perm: int = 128


@dataclass(frozen=True)
class DecontaminateOptions(Section):
    against: list[str] = field(default_factory=list)
    """Evaluation files, of rows with any fields; training rows that contain instances of theirs are left out."""
    fields: list[str] = field(default_factory=list)
    """Fields of these to compare with; empty: all that are strings."""
    rules: list[str] = field(default_factory=lambda: ["tulu3"])
    """Any of which drops a row: "13" (a shared 13-gram of words), "8:0.5" (more than half of an instance's words lie in
    shared 8-grams), "tulu3", "qwen2.5-coder", "gpt3"."""


@dataclass(frozen=True)
class FimOptions(Section):
    rate: float = 0.0
    """Probability that a ``text`` record is rearranged into prefix/suffix/middle (arXiv 2207.14255)."""
    spm_rate: float = 0.5
    """Among those, the probability of suffix-prefix-middle order, in a format that has both."""
    format: Literal[
        "auto", "qwen", "starcoder", "starcoder2", "santacoder", "codellama", "deepseek", "codegemma", "codestral",
        "granite", "granite4",
    ] = "auto"  # fmt: skip
    """How a sample is written; "auto": the format whose tokens the vocabulary has."""
    markers: list[str] = field(default_factory=list)
    """Instead of a format: the tokens before prefix, suffix and middle."""
    spans: Literal["char", "token", "line", "syntax", "tree_sitter"] = "char"
    """What the middle is: what lies between two random characters, tokens or lines, or a part of Python's syntax, found
    by a fast scan or by tree-sitter."""


@dataclass(frozen=True)
class WeightOptions(Section):
    """Loss weights of the tokens of a sample, by what they are."""

    prompt: float = 0.0
    """What the model did not write: prompts, and messages of others."""
    thinking: float = 1.0
    """A ``<think>`` block at the beginning of what the model wrote, or a message's reasoning."""
    answer: float = 1.0
    """What else the model wrote, and texts."""
    tool_calls: float = 1.0
    """What the template writes of a message's tool_calls."""
    control: float = 1.0
    """Special tokens that the model has to write: ends of turns and of texts."""


@dataclass(frozen=True)
class FilterOptions(Section):
    """What leaves a row out, and what is masked. Shares are in [0, 1]; a limit that is unset does nothing."""

    min_chars: int | None = None
    """Characters of what the model learns to write; so are all the following."""
    max_chars: int | None = None
    min_words: int | None = None
    """Words: what stands between whitespace."""
    max_words: int | None = None
    min_mean_word: float | None = None
    """Mean length of words. Gopher: 3 to 10."""
    max_mean_word: float | None = None
    min_alphabetic: float | None = None
    """Share of words with a letter. Gopher: 0.8."""
    min_stop_words: int | None = None
    """Of the, be, to, of, and, that, have, with. Gopher: 2."""
    min_sentences: int | None = None
    """C4: 3."""
    min_terminal: float | None = None
    """Share of lines that end in . ! ? : or ;."""
    max_symbols: float | None = None
    """Number signs and ellipses per word. Gopher: 0.1."""
    max_bullets: float | None = None
    """Share of lines that begin with a bullet. Gopher: 0.9."""
    max_ellipses: float | None = None
    """Share of lines that end in an ellipsis. Gopher: 0.3."""
    max_duplicate_lines: float | None = None
    """Share of lines that were there before. Gopher: 0.3."""
    max_line: int | None = None
    """Characters of the longest line. StarCoder: 1000."""
    placeholders: bool = False
    """Leave out text such as "lorem ipsum" and "your code here"."""
    text_language: str | None = None
    """Rows of the formats text and fim must parse as this language."""
    fenced_languages: list[str] = field(default_factory=list)
    """Code blocks marked as one of these languages must parse."""
    mask: list[Literal["email", "ip"]] = field(default_factory=list)
    """Replace e-mail addresses by <EMAIL> and public IP addresses by <IP_ADDRESS>, everywhere in a row."""


Format = Literal["auto", "messages", "prompt_completion", "text", "fim"]


@dataclass(frozen=True)
class SourceOptions(Section):
    """One of several sources of training rows, ``[[data.sources]]``."""

    name: str
    files: list[str]
    """As ``data.train``."""
    format: Format = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0
    """Times that an epoch goes through it: 0.5 is another half in every epoch, 2 is everything twice."""
    tag: str = "other"
    """Of ``data.ratios``."""
    cap: int | None = None
    """Rows kept, at most: a random choice by a hash of the content."""


@dataclass(frozen=True)
class DataOptions(Section):
    train: list[str] = field(default_factory=list)
    """Files of JSON lines or of one JSON list (.gz and .zst, too), Parquet files, folders of these, and Hugging Face
    ``datasets`` folders."""
    sources: list[SourceOptions] = field(default_factory=list)
    """Several sources, mixed; instead of ``train``."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Tag of sources = its part of an epoch's samples, e.g. {reasoning = 5, other = 1}; empty: as the weights say."""
    eval: list[str] = field(default_factory=list)
    """Held-out files. Empty: ``eval_fraction`` of the training records is held out instead."""
    eval_fraction: float = 0.02
    format: Format = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    """Names used in the file, e.g. {prompt = "question", completion = "answer"}; keys: messages, prompt,
    completion, prefix, suffix, middle, text, weight and skills."""
    max_length: int = 2048
    """Tokens a sample may have; see ``on_long``."""
    max_bad: float = 0.0
    """Share of rows that may be unusable (a broken line, no exact mask, ...): they are left out."""
    on_long: Literal["fail", "skip", "truncate"] = "skip"
    """A sample above ``max_length``."""
    weights: WeightOptions = field(default_factory=WeightOptions)
    skills: dict[str, float] = field(default_factory=dict)
    """Weight of the training rows with a skill, e.g. {loops = 2.0, recursion = 0.5}; 1 for others."""
    turns: Literal["all", "last", "each"] = "all"
    """Turns of the assistant's that are trained: all in one sample, the last alone, or each in a sample of its own."""
    thinking: Literal["keep", "drop", "empty"] = "keep"
    """Reasoning of messages: kept, removed, or removed and the template's own non-thinking mode switched on."""
    filters: FilterOptions = field(default_factory=FilterOptions)
    dedup: DedupOptions = field(default_factory=DedupOptions)
    decontaminate: DecontaminateOptions = field(default_factory=DecontaminateOptions)
    fim: FimOptions = field(default_factory=FimOptions)
