"""A model folder's tokenizer and chat template: text to ids and back, conversations to text."""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

# ChatML as the Qwen models use it, with the generation tags that mark what the assistant wrote.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_OF_TEXT = "<|endoftext|>"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# How Qwen's tokenizers split text. Each digit stands alone, and a line's end is apart from the next line's indentation.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The files of a Hugging Face folder that belong to the tokenizer; copied byte for byte.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


class TemplateError(ValueError):
    """A chat template that cannot be parsed, or that refused the conversation."""


class Tokenizer:
    """Wraps a ``tokenizers.Tokenizer`` and the settings around it.

    ``eos_ids`` are all tokens that end a generation (from tokenizer_config.json and generation_config.json); ``eos_id``
    is the one that training appends.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_id: int | None = None,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        files: dict[str, bytes] | None = None,
    ) -> None:
        self.backend = backend
        self.eos_id = eos_id
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys([*(() if eos_id is None else (eos_id,)), *eos_ids]))
        self.chat_template = chat_template
        self._files = files or {}

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load from a model folder, or from a bare tokenizer.json.

        Raises:
            FileNotFoundError: no tokenizer.json there. ValueError: a file that cannot be parsed.
        """
        folder = Path(path)
        if folder.is_file():
            folder = folder.parent
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        if "tokenizer.json" not in files:
            raise FileNotFoundError(f"{folder}: no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{folder / 'tokenizer.json'}: not a tokenizer: {error}") from error
        # Many published files carry the settings of whoever saved them; both would silently change samples.
        backend.no_truncation()
        backend.no_padding()

        def parse(name: str) -> dict[str, Any]:
            try:
                return dict(json.loads(files[name])) if name in files else {}
            except ValueError as error:
                raise ValueError(f"{folder / name}: not valid JSON: {error}") from error

        config, generation = parse("tokenizer_config.json"), parse("generation_config.json")
        ids = generation.get("eos_token_id")
        template = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else None
        if template is None:
            template = _default_template(config.get("chat_template"))
        return cls(
            backend,
            eos_id=_special(backend, config.get("eos_token")),
            bos_id=_special(backend, config.get("bos_token")),
            eos_ids=[] if ids is None else [ids] if isinstance(ids, int) else list(ids),
            chat_template=template,
            files=files,
        )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = (),
        *,
        chat_template: str | None = CHATML,
        progress: bool = False,
    ) -> Tokenizer:
        """Train a byte-level BPE; the same texts give the same tokenizer.

        Normaliser, pre-tokeniser and decoder are those of the Qwen models: transformers builds them anew for a folder
        of model type qwen2, whatever tokenizer.json says, and reads the file for the other types.
        ``special_tokens`` are added to ``<|endoftext|>`` (the end of a document) and the ChatML markers.
        """
        backend = _untrained()
        names = list(dict.fromkeys([END_OF_TEXT, *CHATML_TOKENS, *special_tokens]))
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(names) + len(alphabet):
            raise ValueError(f"vocab_size: expected at least {len(names) + len(alphabet)}, got {vocab_size}")
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=names, initial_alphabet=sorted(alphabet), show_progress=progress
        )
        backend.train_from_iterator(texts, trainer)
        config: dict[str, Any] = {"eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
        if chat_template is not None:
            config["chat_template"] = chat_template
        eos, turn_end = names.index(END_OF_TEXT), names.index("<|im_end|>")  # special tokens come first
        files = {
            "tokenizer.json": backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
            "generation_config.json": (json.dumps({"eos_token_id": [eos, turn_end]}, indent=2) + "\n").encode(),
        }
        return cls(backend, eos_id=eos, eos_ids=[eos, turn_end], chat_template=chat_template, files=files)

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def files(self) -> dict[str, bytes]:
        """File name -> content, to be written beside a model."""
        return dict(self._files)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files as they were read."""
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    @property
    def marks_generation(self) -> bool:
        """Whether the chat template tags what the assistant writes."""
        return re.search(r"\{%-?\s*generation\b", self.chat_template or "") is not None

    @functools.cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer itself puts before every text (Llama's BOS)."""
        full, bare = self.encode("a", add_special_tokens=True), self.encode("a")
        for i in range(len(full)):
            if full[i : i + len(bare)] == bare:
                return tuple(full[:i])
        return ()

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        return tuple(t.content for t in self.backend.get_added_tokens_decoder().values() if t.special)

    def token_id(self, token: str) -> int | None:
        found: int | None = self.backend.token_to_id(token)
        return found

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, the half-open range of characters of ``text`` that it covers."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False, **extra: Any
    ) -> str:
        """The conversation as the model's template writes it."""
        return self.render_chat_with_spans(messages, add_generation_prompt=add_generation_prompt, **extra)[0]

    def render_chat_with_spans(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False, **extra: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The same, and the character ranges inside ``{% generation %}`` tags (none where the template has no tags).

        Raises:
            TemplateError: the folder has no template, or it failed on this conversation.
        """
        if self.chat_template is None:
            raise TemplateError(
                "the model's folder has no chat template (chat_template.jinja or tokenizer_config.json)"
            )
        template = _compile(self.chat_template)
        names = {"bos_token": self._token(self.bos_id), "eos_token": self._token(self.eos_id)}
        try:
            marked = template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **{**names, **extra}
            )
        except Exception as error:  # a template's own failure (None + str, a wrong key) is whatever Python raises
            raise TemplateError(f"chat template: {error}") from error
        return _take_spans(marked)

    def _token(self, token: int | None) -> str:
        return "" if token is None else str(self.backend.id_to_token(token))


def _untrained() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated")
    bytes_only = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_only])
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _special(backend: tokenizers.Tokenizer, entry: Any) -> int | None:
    token = entry.get("content") if isinstance(entry, dict) else entry
    found: int | None = None if token is None else backend.token_to_id(token)
    return found


def _default_template(entry: Any) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones of which "default" is meant."""
    if isinstance(entry, list):
        return {t["name"]: t["template"] for t in entry}.get("default")
    return entry if isinstance(entry, str) else None


# What {% generation %} leaves in the rendered text until the spans are taken out. A noncharacter cannot occur in text.
_BEGIN, _END = "\U0010fffe\x02", "\U0010fffe\x03"


def _take_spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for i, part in enumerate(marked.split(_BEGIN)):
        inside, tagged, outside = part.partition(_END) if i else ("", "", part)
        if i and not tagged:
            raise TemplateError("chat template: {% generation %} blocks may not be nested")
        if i:
            spans.append((length, length + len(inside)))
        pieces += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(pieces), spans


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> Any:
    """Compile as transformers does: sandboxed, immutable, trimmed blocks, loop controls, ``tojson`` without escapes."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from error
