"""A model folder's tokenizer and chat template: text to ids and back, conversations to text."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from fastsft.files import sync
from fastsft.models.control import CONTROL, ControlTokens, continuing, marking
from fastsft.models.template import CHATML, CHATML_TOKENS, Span, TemplateError, render
from fastsft.models.untrained import cut_runs, untrained
from fastsft.ops.bpe import ByteBpe, NotExactError

END_OF_TEXT = "<|endoftext|>"

# The files of a Hugging Face folder that belong to the tokenizer; copied byte for byte.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip

# What a chat template may ask for by name.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Wraps a ``tokenizers.Tokenizer`` and the settings around it.

    ``eos_ids`` are all tokens that end a generation (from tokenizer_config.json and generation_config.json); ``eos_id``
    is the one that training appends. ``named`` are the special tokens that a chat template may write (bos_token, ...).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_id: int | None = None,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        named: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        files: dict[str, bytes] | None = None,
    ) -> None:
        self.backend = backend
        self.eos_id = eos_id
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys([*(() if eos_id is None else (eos_id,)), *eos_ids]))
        known = {"bos_token": bos_id, "eos_token": eos_id}
        self.named = {n: str(backend.id_to_token(i)) for n, i in known.items() if i is not None} | dict(named or {})
        self.chat_template = chat_template
        self._files = files or {}

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load from a model folder, or from a tokenizer.json of any name and the settings beside it.

        Raises:
            FileNotFoundError: no tokenizer.json there. ValueError: a file that cannot be parsed.
        """
        given = Path(path)
        folder, main = (given.parent, given) if given.is_file() else (given, given / "tokenizer.json")
        if not main.is_file():
            raise FileNotFoundError(f"{given}: {'no tokenizer.json' if given.is_dir() else 'no such file or folder'}")
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        files["tokenizer.json"] = main.read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{main}: not a tokenizer: {error}") from error
        # Many published files carry the settings of whoever saved them; both would silently change samples.
        backend.no_truncation()
        backend.no_padding()

        def parse(name: str) -> dict[str, Any]:
            try:
                found = json.loads(files.get(name, b"{}"))
            except ValueError as error:
                raise ValueError(f"{folder / name}: not valid JSON: {error}") from error
            if not isinstance(found, dict):
                raise ValueError(f"{folder / name}: expected a JSON object, got {type(found).__name__}")
            return found

        config, generation = parse("tokenizer_config.json"), parse("generation_config.json")
        ends = generation.get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if not all(isinstance(end, int) for end in ends):
            raise ValueError(f"{folder / 'generation_config.json'}: eos_token_id: expected ids, got {ends}")
        try:
            template = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else None
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / 'chat_template.jinja'}: not UTF-8: {error}") from error
        if template is None:
            template = _default_template(config.get("chat_template"))
        named = _named({**parse("special_tokens_map.json"), **config})
        return cls(
            backend,
            eos_id=_id(backend, named.get("eos_token")),
            bos_id=_id(backend, named.get("bos_token")),
            eos_ids=ends,
            named=named,
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

        Raises:
            ValueError: a ``vocab_size`` below the number of bytes and special tokens.
        """
        backend = untrained()
        names = list(dict.fromkeys([END_OF_TEXT, *CHATML_TOKENS, *special_tokens]))
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(names) + len(alphabet):
            raise ValueError(f"vocab_size: expected at least {len(names) + len(alphabet)}, got {vocab_size}")
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=names, initial_alphabet=sorted(alphabet), show_progress=progress
        )
        backend.train_from_iterator(cut_runs(texts), trainer)
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
        """Write the files as they were read, to the disk itself."""
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)
            sync(Path(folder) / name)
        sync(Path(folder))

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
    def control(self) -> ControlTokens:
        return ControlTokens(self.backend)

    @functools.cached_property
    def _marking(self) -> tokenizers.Tokenizer:
        return marking(self.backend, self.control.names)

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        return continuing(self._marking)

    @functools.cached_property
    def _native(self) -> ByteBpe | NotExactError:
        try:
            return ByteBpe(self._marking)
        except NotExactError as error:
            return error

    @property
    def not_native(self) -> str | None:
        """Why there is no :attr:`byte_bpe`; None if there is one."""
        return str(self._native) if isinstance(self._native, NotExactError) else None

    @property
    def byte_bpe(self) -> ByteBpe:
        """The native encoder, for :func:`fastsft.ops.fim_rows`; its ids are those of :meth:`encode_text`.

        Raises:
            NotExactError: a tokenizer that cannot be encoded natively, such as SentencePiece's; the message says why.
        """
        if isinstance(self._native, NotExactError):
            raise NotExactError(str(self._native))
        return self._native

    def token_id(self, token: str) -> int | None:
        found: int | None = self.backend.token_to_id(token)
        return found

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a prompt: the text of a special token becomes that token."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of prompts, as :meth:`encode` gives them."""
        plain = [i for i, text in enumerate(texts) if self.control.first_in(text) is None]
        marked = [i for i, text in enumerate(texts) if self.control.first_in(text) is not None]
        found = dict(zip(plain, self.encode_text([texts[i] for i in plain]), strict=True))
        encodings = self.backend.encode_batch_fast([texts[i] for i in marked], add_special_tokens=False)
        found.update(zip(marked, (e.ids for e in encodings), strict=True))
        return [found[i] for i in range(len(texts))]

    def encode_text(self, texts: Sequence[str], *, continues: bool = False) -> list[list[int]]:
        """Ids of texts in which nothing is a control token: natively where that is exact, otherwise by the backend.

        Args:
            continues: each goes on where another text ended, so that nothing is put before it.

        Raises:
            ValueError: the tokenizer cannot do that exactly.
        """
        if not texts:
            return []
        backend = self._continuing if continues else self._marking
        if isinstance(self._native, NotExactError):
            return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        packed = self._native.encode(texts)  # which puts nothing before a text in either case
        cuts = packed.cu_seqlens.tolist()
        found: list[list[int]] = [packed.ids[a:b].tolist() for a, b in itertools.pairwise(cuts)]
        others = [i for i, exact in enumerate(packed.exact.tolist()) if not exact]
        encodings = backend.encode_batch_fast([texts[i] for i in others], add_special_tokens=False)
        for i, encoding in zip(others, encodings, strict=True):
            found[i] = encoding.ids
        return found

    def encode_rendered(self, texts: Sequence[str], *, continues: bool = False) -> list[tuple[list[int], list[Span]]]:
        """Ids of texts that :meth:`render` wrote and, for each id, the half-open range of characters that it covers.

        ``continues``: as in :meth:`encode_text`.
        """
        backend = self._continuing if continues else self._marking
        return [(e.ids, e.offsets) for e in backend.encode_batch(list(texts), add_special_tokens=False)]

    def head(self, text: str, count: int) -> str:
        """The beginning of a text: about its first ``count`` tokens."""
        offsets = self._marking.encode(text, add_special_tokens=False).offsets
        return text if len(offsets) <= count else text[: max((end for _, end in offsets[:count]), default=0)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def decode_inside(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """What they add to a text before them: SentencePiece's decoders leave out a space where a text begins."""
        before, length = self._letter
        return self.decode([*before, *ids], skip_special_tokens)[length:]

    @functools.cached_property
    def _letter(self) -> tuple[list[int], int]:
        """Ids of a text, and its length."""
        ids = self.encode("a")
        return ids, len(self.decode(ids))

    def render_chat(self, messages: Sequence[dict[str, Any]], **extra: Any) -> str:
        """The conversation as the model's template writes it; for ``extra`` see :meth:`render`."""
        return self.render(messages, **extra)[0].replace(CONTROL, "")

    def encode_chat(self, messages: Sequence[dict[str, Any]], **extra: Any) -> list[int]:
        """Its ids. The template writes every special token: none is added, and none is taken from a content."""
        return self.encode_rendered([self.render(messages, **extra)[0]])[0][0]

    def render(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False, **extra: Any
    ) -> tuple[str, list[Span]]:
        """The conversation for :meth:`encode_rendered`, control tokens marked, and the ranges inside generation tags.

        Args:
            extra: tools, documents and whatever else the template reads.

        Raises:
            TemplateError: the folder has no template, or it failed on this conversation.
        """
        if self.chat_template is None:
            raise TemplateError(
                "the model's folder has no chat template (chat_template.jinja or tokenizer_config.json)"
            )
        given = {"add_generation_prompt": add_generation_prompt, **extra}
        return render(self.chat_template, messages, self.control, self.named, given)


def _named(entries: Mapping[str, Any]) -> dict[str, str]:
    """The settings that name special tokens, each a string or an object with the token's details."""
    found = {name: entries.get(name) for name in _NAMED}
    texts = {name: entry.get("content") if isinstance(entry, dict) else entry for name, entry in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _id(backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    found: int | None = None if token is None else backend.token_to_id(token)
    return found


def _default_template(entry: Any) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones of which "default" is meant."""
    if isinstance(entry, list):
        entry = next((t.get("template") for t in entry if isinstance(t, dict) and t.get("name") == "default"), None)
    return entry if isinstance(entry, str) else None
