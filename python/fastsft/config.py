"""A run as dataclasses: read from TOML, validated by pydantic, written back resolved beside every result."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FIELD_NAMES = ("messages", "prompt", "completion", "prefix", "suffix", "middle", "text", "weight")
"""What a row may have, and so the keys of ``data.fields``."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model to train: a Hugging Face folder, or a fresh one from architecture fields."""

    path: str | None = None
    """Folder with config.json, *.safetensors and tokenizer.json."""
    init: dict[str, Any] = field(default_factory=dict)
    """Fields of a config.json (model_type, hidden_size, ...) for a randomly initialised model. Excludes ``path``."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. With bfloat16 the optimizer keeps float32 master weights."""


@dataclass(frozen=True)
class TokenizerOptions:
    path: str | None = None
    """tokenizer.json or its folder. Default: the model's folder."""
    train_vocab: int | None = None
    """Train a byte-level BPE of this size on the training texts (only for a freshly initialised model)."""


@dataclass(frozen=True)
class DedupOptions:
    mode: Literal["none", "exact", "near"] = "none"
    threshold: float = 0.7
    """Jaccard similarity of the sets of word 5-grams from which two records are near duplicates."""
    num_perm: int = 128


@dataclass(frozen=True)
class DecontaminateOptions:
    against: list[str] = field(default_factory=list)
    """Evaluation files, of rows with any fields; training rows that contain instances of theirs are left out."""
    fields: list[str] = field(default_factory=list)
    """Fields of these to compare with; empty: all that are strings."""
    rules: list[str] = field(default_factory=lambda: ["tulu3"])
    """Any of which drops a row: "13" (a shared 13-gram of words), "8:0.5" (more than half of an instance's words lie in
    shared 8-grams), "tulu3", "qwen2.5-coder", "gpt3"."""


@dataclass(frozen=True)
class FimOptions:
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
class WeightOptions:
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
class FilterOptions:
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
class SourceOptions:
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
class DataOptions:
    train: list[str] = field(default_factory=list)
    """JSONL, JSONL.gz, Parquet files or Hugging Face ``datasets`` folders."""
    sources: list[SourceOptions] = field(default_factory=list)
    """Several sources, mixed; instead of ``train``."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Tag of sources = its part of an epoch's samples, e.g. {reasoning = 5, other = 1}; empty: as the weights say."""
    eval: list[str] = field(default_factory=list)
    """Held-out files. Empty: ``eval_fraction`` of the training records is held out instead."""
    eval_fraction: float = 0.02
    format: Format = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    """Names used in the file, e.g. {prompt = "question", completion = "answer"}; keys: :data:`FIELD_NAMES`."""
    max_length: int = 2048
    """Tokens a sample may have; see ``on_long``."""
    max_bad: float = 0.0
    """Share of rows that may be unusable (a broken line, no exact mask, ...): they are left out."""
    on_long: Literal["fail", "skip", "truncate"] = "skip"
    """A sample above ``max_length``."""
    weights: WeightOptions = field(default_factory=WeightOptions)
    turns: Literal["all", "last", "each"] = "all"
    """Turns of the assistant's that are trained: all in one sample, the last alone, or each in a sample of its own."""
    thinking: Literal["keep", "drop", "empty"] = "keep"
    """Reasoning of messages: kept, removed, or removed and the template's own non-thinking mode switched on."""
    filters: FilterOptions = field(default_factory=FilterOptions)
    dedup: DedupOptions = field(default_factory=DedupOptions)
    decontaminate: DecontaminateOptions = field(default_factory=DecontaminateOptions)
    fim: FimOptions = field(default_factory=FimOptions)


@dataclass(frozen=True)
class OptimOptions:
    lr: float = 2e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled (AdamW), on matrices only: not on norms, biases and embeddings."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True)
class ScheduleOptions:
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    """Below 1 a fraction of all steps, otherwise a number of steps."""
    final: float = 0.0
    """Learning rate at the end as a fraction of the peak."""


@dataclass(frozen=True)
class TrainOptions:
    tokens_per_batch: int = 8192
    """Capacity of one packed micro-batch."""
    accumulation: int = 1
    """Micro-batches per optimizer step; normalised together by their summed token weights."""
    epochs: int = 1
    max_steps: int | None = None
    """Optimizer steps; ends the run before ``epochs`` do."""
    activation_checkpointing: bool = False
    eval_every: int = 100
    """Optimizer steps between evaluations; 0 evaluates only before the first and after the last step."""
    save_every: int = 100
    """Optimizer steps between checkpoints; 0 saves only the last."""
    keep: int = 2
    """Checkpoints kept."""


@dataclass(frozen=True)
class Config:
    """Everything that determines a run. The same Config and data give the same weights, bit for bit on a CPU."""

    output: str = "runs/run"
    """Folder of the run: checkpoints, metrics and the model."""
    seed: int = 0
    """Of everything random: initial weights, held-out rows, infilling, order."""
    model: ModelOptions = field(default_factory=ModelOptions)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    train: TrainOptions = field(default_factory=TrainOptions)

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


for _section in (
    ModelOptions, TokenizerOptions, DedupOptions, DecontaminateOptions, FimOptions, WeightOptions, FilterOptions,
    SourceOptions, DataOptions, OptimOptions, ScheduleOptions, TrainOptions,
):  # fmt: skip
    setattr(_section, "__pydantic_config__", {"extra": "forbid"})  # noqa: B010


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was expected and what came."""


def load_config(source: Config | str | os.PathLike[str] | dict[str, Any]) -> Config:
    """Read and validate a run configuration.

    Args:
        source: a TOML file, the config.json of a run, or the same structure as nested dicts. A :class:`Config` is
            validated as well: building one in Python checks nothing.

    Raises:
        ConfigError: an unreadable or malformed file, an unknown key (the nearest one is named), a value of the wrong
            type or out of range.
    """
    if isinstance(source, Config):
        source = to_dict(source)
    if isinstance(source, dict):
        return _validate(source, "config")
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
        return _validate(json.loads(text) if path.suffix == ".json" else tomllib.loads(text), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain nested dicts; ``load_config`` takes it back."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def _validate(raw: dict[str, Any], where: str) -> Config:
    import pydantic

    raw = _without_paths(raw)
    try:
        config = pydantic.TypeAdapter(Config).validate_python(raw)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(e, where) for e in error.errors())) from None
    leaves = dict(_leaves(to_dict(config)))
    for name, given in _leaves(raw):  # pydantic reads "3e-3" as a number and true as 1
        if any(isinstance(given, kind) != isinstance(leaves[name], kind) for kind in (str, bool)):
            expected = "true or false" if isinstance(leaves[name], bool) else "a number"
            raise ConfigError(f"{where}: {name}: expected {expected}, got {given!r}")
    for name, value in leaves.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {name}: expected a finite number, got {value!r}")
    tables = {f"data.sources.{i}.fields": source.fields for i, source in enumerate(config.data.sources)}
    for table, names in {"data.fields": config.data.fields, **tables}.items():
        for key in names:
            if key not in FIELD_NAMES:
                raise ConfigError(f"{where}: {unknown_key(f'{table}.{key}', FIELD_NAMES)}")
    _check_ranges(config, where)
    return config


def _without_paths(node: Any) -> Any:
    """pathlib's paths, which callers in Python have, as the strings that a file has."""
    if isinstance(node, dict):
        return {key: _without_paths(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_without_paths(value) for value in node]
    return os.fspath(node) if isinstance(node, os.PathLike) else node


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def unknown_key(name: str, known: Sequence[str]) -> str:
    """What to say about the dotted ``name`` whose last part is none of ``known``: the nearest one, or all of them."""
    near = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {name!r}; {hint}"


def _explain(error: Any, where: str) -> str:
    keys = [str(k) for k in error["loc"]]
    name = ".".join(keys)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: {unknown_key(name, _known_keys(keys[:-1]))}"
    return f"{where}: {name}: {error['msg']}, got {error['input']!r}"


def _known_keys(path: list[str]) -> list[str]:
    node: Any = Config()
    for key in path:
        node = SourceOptions("", []) if isinstance(node, list) else getattr(node, key, None)
    return [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []


def _check_ranges(config: Config, where: str) -> None:
    def check(ok: bool, name: str, expected: str, value: object) -> None:
        if not ok:
            raise ConfigError(f"{where}: {name}: expected {expected}, got {value!r}")

    m, d, o, s, t = config.model, config.data, config.optim, config.schedule, config.train
    if m.path is not None and m.init:
        raise ConfigError(f"{where}: model: give either path or init, not both")
    check(0 <= config.seed < 2**63, "seed", "an integer in [0, 2**63)", config.seed)
    if m.path is not None and config.tokenizer.train_vocab is not None:
        raise ConfigError(f"{where}: tokenizer.train_vocab: a model read from model.path keeps its own tokenizer")
    check(0 <= d.eval_fraction < 1, "data.eval_fraction", "a fraction in [0, 1)", d.eval_fraction)
    check(not (d.train and d.sources), "data.train", "nothing beside data.sources", d.train)
    names = [source.name for source in d.sources]
    check(len(set(names)) == len(names), "data.sources", "different names", names)
    for i, source in enumerate(d.sources):
        check(len(source.files) > 0, f"data.sources.{i}.files", "at least one file", source.files)
        check(0 <= source.weight < math.inf, f"data.sources.{i}.weight", "a finite number, at least 0", source.weight)
        check(source.cap is None or source.cap >= 1, f"data.sources.{i}.cap", "at least 1", source.cap)
    for name, limit in dataclasses.asdict(d.filters).items():
        if name.partition("_")[0] in ("min", "max") and limit is not None:
            check(limit >= 0, f"data.filters.{name}", "at least 0", limit)
    for tag, ratio in d.ratios.items():
        check(ratio > 0, f"data.ratios.{tag}", "more than 0", ratio)
    check(d.max_length >= 2, "data.max_length", "at least 2", d.max_length)
    check(0 <= d.max_bad <= 1, "data.max_bad", "a share in [0, 1]", d.max_bad)
    for name, value in dataclasses.asdict(d.weights).items():
        check(value >= 0, f"data.weights.{name}", "at least 0", value)
    check(0 < d.dedup.threshold <= 1, "data.dedup.threshold", "a similarity in (0, 1]", d.dedup.threshold)
    check(d.dedup.num_perm >= 1, "data.dedup.num_perm", "at least 1", d.dedup.num_perm)
    check(0 <= d.fim.rate <= 1, "data.fim.rate", "a probability", d.fim.rate)
    check(0 <= d.fim.spm_rate <= 1, "data.fim.spm_rate", "a probability", d.fim.spm_rate)
    check(len(set(d.fim.markers)) in (0, 3) and len(d.fim.markers) in (0, 3), "data.fim.markers",
          "three different tokens, or none", d.fim.markers)  # fmt: skip
    check(not d.fim.markers or d.fim.format == "auto", "data.fim.format", '"auto" beside data.fim.markers',
          d.fim.format)  # fmt: skip
    check(o.lr > 0, "optim.lr", "more than 0", o.lr)
    check(0 <= o.beta1 < 1, "optim.beta1", "a value in [0, 1)", o.beta1)
    check(0 <= o.beta2 < 1, "optim.beta2", "a value in [0, 1)", o.beta2)
    check(o.eps > 0, "optim.eps", "more than 0", o.eps)
    check(o.weight_decay >= 0, "optim.weight_decay", "at least 0", o.weight_decay)
    check(o.clip_norm >= 0, "optim.clip_norm", "at least 0", o.clip_norm)
    check(s.warmup >= 0, "schedule.warmup", "at least 0", s.warmup)
    check(0 <= s.final <= 1, "schedule.final", "a fraction in [0, 1]", s.final)
    check(t.tokens_per_batch >= d.max_length, "train.tokens_per_batch", f"at least data.max_length = {d.max_length}",
          t.tokens_per_batch)  # fmt: skip
    for name in ("accumulation", "epochs", "keep"):
        check(getattr(t, name) >= 1, f"train.{name}", "at least 1", getattr(t, name))
    check(t.max_steps is None or t.max_steps >= 1, "train.max_steps", "at least 1", t.max_steps)
    for name in ("eval_every", "save_every"):
        check(getattr(t, name) >= 0, f"train.{name}", "at least 0", getattr(t, name))
