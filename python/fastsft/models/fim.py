"""Fill-in-the-middle formats: how each family of models writes prefix P, middle M and suffix S (arXiv 2207.14255).

A format is data: token names in the order in which they stand, ``P``, ``M`` and ``S`` between them. The seams are the
same in every family: the piece with which the document begins (the prefix, or the middle if the prefix is empty) is
encoded as the beginning of a text, SentencePiece's space before it included, the others as texts that go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastsft.models.tokenizer import Tokenizer
from fastsft.ops.fim_rows import MIDDLE, PREFIX, SUFFIX

_PIECES = {"P": PREFIX, "M": MIDDLE, "S": SUFFIX}


@dataclass(frozen=True)
class FimFormat:
    """The layout of one family. ``psm`` and ``spm`` are None where the family has no such order."""

    psm: tuple[str, ...] | None
    spm: tuple[str, ...] | None
    end: str | None  # written after the middle, and trained; None: the tokenizer's eos_token
    repository: str | None = None  # before the name of a repository
    file: str | None = None  # before the path of each of its files
    name_end: str = ""  # between the repository's name and the first file
    file_end: str = ""  # after each file but the last
    others: tuple[str, ...] = ()  # tokens that end an answer, too

    @property
    def tokens(self) -> tuple[str, ...]:
        """Every token that the format names, markers first."""
        layouts = [*(self.psm or ()), *(self.spm or ())]
        named = [*(t for t in layouts if t not in _PIECES), self.end, self.repository, self.file, *self.others]
        return tuple(dict.fromkeys(t for t in named if t is not None))

    @property
    def required(self) -> tuple[str, ...]:
        """Those without which the format cannot be written."""
        layouts = [*(self.psm or ()), *(self.spm or ())]
        return tuple(dict.fromkeys(t for t in [*layouts, self.end] if t is not None and t not in _PIECES))


def _classic(prefix: str, suffix: str, middle: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """PSM and the paper's second SPM variant, in which the middle continues the prefix."""
    return (prefix, "P", suffix, "S", middle, "M"), (prefix, suffix, "S", middle, "P", "M")


_PIPES = _classic("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_BARE = _classic("<fim_prefix>", "<fim_suffix>", "<fim_middle>")

# Names, orders and separators are those of each model's card, tokenizer and published code.
FORMATS: dict[str, FimFormat] = {
    "qwen": FimFormat(
        *_PIPES, "<|endoftext|>", "<|repo_name|>", "<|file_sep|>", "\n", "\n", ("<|fim_pad|>", "<|im_end|>")
    ),
    "starcoder": FimFormat(*_BARE, "<|endoftext|>", "<reponame>", "<filename>", others=("<fim_pad>", "<gh_stars>")),
    "starcoder2": FimFormat(*_BARE, "<|endoftext|>", "<repo_name>", "<file_sep>", others=("<fim_pad>",)),
    "santacoder": FimFormat(
        *_classic("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), "<|endoftext|>", others=("<fim-pad>",)
    ),
    "codellama": FimFormat(*_classic("▁<PRE>", "▁<SUF>", "▁<MID>"), "▁<EOT>"),
    # The hole stands between prefix and suffix: it is the suffix's marker. Trained in this order alone.
    "deepseek": FimFormat(
        ("<｜fim▁begin｜>", "P", "<｜fim▁hole｜>", "S", "<｜fim▁end｜>", "M"),  # noqa: RUF001
        None,
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
        others=("<|EOT|>",),
    ),
    "codegemma": FimFormat(*_PIPES, "<|file_separator|>", file="<|file_separator|>"),
    # No marker before the middle, which goes on where the prefix ends.
    "codestral": FimFormat(None, ("[SUFFIX]", "S", "[PREFIX]", "P", "M"), "</s>"),
    "granite": FimFormat(*_BARE, "<|endoftext|>", "<reponame>", "<filename>", others=("<fim_pad>", "<gh_stars>")),
    "granite4": FimFormat(*_PIPES, "<|end_of_text|>", "<|reponame|>", "<|filename|>", others=("<|fim_pad|>",)),
}


class FimParts(NamedTuple):
    """Token ids of a document's pieces."""

    prefix: list[int]
    middle: list[int]
    suffix: list[int]


@dataclass(frozen=True)
class Fim:
    """A format in the ids of one vocabulary. Layouts hold token ids, and PREFIX, MIDDLE and SUFFIX for the pieces."""

    format: FimFormat
    psm: tuple[int, ...] | None
    spm: tuple[int, ...] | None
    end_id: int
    stop_ids: tuple[int, ...]  # what ends an answer: the end token and every other token that the format names

    @classmethod
    def find(cls, tokenizer: Tokenizer, name: str = "auto", markers: Sequence[str] = ()) -> Fim:
        """The format ``name``, or the one whose tokens this vocabulary has; or ``markers`` in the classic layouts.

        Args:
            name: a key of FORMATS, or "auto".
            markers: instead of a format, the tokens before prefix, suffix and middle.

        Raises:
            ValueError: no format or several fit, or a token is not in the vocabulary or not a special one.
        """
        if markers:
            if len(markers) != 3 or len(set(markers)) != 3:
                raise ValueError(f"markers: expected three different tokens, got {list(markers)}")
            return cls._of(FimFormat(*_classic(*markers), None), tokenizer, "markers")
        if name == "auto":
            name = detect(tokenizer)
        if name not in FORMATS:
            raise ValueError(f"format: expected 'auto' or one of {', '.join(FORMATS)}, got {name!r}")
        return cls._of(FORMATS[name], tokenizer, f"format {name!r}")

    @classmethod
    def _of(cls, format: FimFormat, tokenizer: Tokenizer, what: str) -> Fim:
        def number(token: str) -> int:
            found = tokenizer.token_id(token)
            if found is None:
                raise ValueError(f"{what}: {token!r} is not a token of this vocabulary")
            if token not in tokenizer.control.names:
                raise ValueError(f"{what}: {token!r} must be a special token in tokenizer.json")
            return found

        def layout(names: tuple[str, ...] | None) -> tuple[int, ...] | None:
            return None if names is None else tuple(_PIECES[n] if n in _PIECES else number(n) for n in names)

        psm, spm = layout(format.psm), layout(format.spm)
        end = tokenizer.eos_id if format.end is None else number(format.end)
        if end is None:
            raise ValueError("tokenizer: no eos_token in tokenizer_config.json, so a sample's end cannot be trained")
        present = (tokenizer.token_id(t) for t in format.tokens)
        return cls(format, psm, spm, end, tuple(dict.fromkeys([end, *(t for t in present if t is not None)])))

    def layout(self, spm: bool) -> tuple[int, ...]:
        """The order asked for, or the only one that the family has."""
        first, second = (self.spm, self.psm) if spm else (self.psm, self.spm)
        found = second if first is None else first
        if found is None:
            raise ValueError("format: expected at least one of the two orders")
        return found

    def inverse(self, ids: Sequence[int]) -> FimParts | None:
        """The pieces of a rearranged sample; None if it is none. What stands before the first marker (BOS) is left out.

        Where the middle directly follows the prefix (SPM), nothing tells them apart: the prefix is then empty, and the
        middle begins with it.
        """
        for layout in (self.psm, self.spm):
            if layout is not None and (found := _match(layout, [*ids], self.end_id)) is not None:
                return found
        return None

    def restore(self, ids: Sequence[int], tokenizer: Tokenizer) -> str | None:
        """The document of a rearranged sample; None if it is none."""
        found = self.inverse(ids)
        if found is None:
            return None
        if found.prefix or found.middle:
            return tokenizer.decode([*found.prefix, *found.middle, *found.suffix], False)
        # The suffix alone goes on where nothing stands, so that no space before it is SentencePiece's own.
        (anchor,) = tokenizer.encode_text(["a"])
        return tokenizer.decode([*anchor, *found.suffix], False).removeprefix("a")


def detect(tokenizer: Tokenizer) -> str:
    """The format whose tokens the vocabulary has: of several, the one with the most.

    Raises:
        ValueError: none, or several that lay a sample out differently.
    """
    known = {n: f for n, f in FORMATS.items() if all(tokenizer.token_id(t) is not None for t in f.required)}
    if not known:
        raise ValueError(
            "format: the vocabulary has the markers of no known format; give three markers, or a tokenizer of one of "
            f"{', '.join(FORMATS)}"
        )
    count = {n: sum(tokenizer.token_id(t) is not None for t in f.tokens) for n, f in known.items()}
    best = [n for n in known if count[n] == max(count.values())]
    layouts = {(known[n].psm, known[n].spm, known[n].end) for n in best}
    if len(layouts) > 1:
        raise ValueError(f"format: the vocabulary fits {' and '.join(map(repr, best))}; name the one that is meant")
    return best[0]


def _match(layout: tuple[int, ...], ids: list[int], end: int) -> FimParts | None:
    if ids and ids[-1] == end:
        ids.pop()
    found: dict[int, list[int]] = {PREFIX: [], MIDDLE: [], SUFFIX: []}
    piece, rest = None, ids
    for item in layout:
        if item < 0:
            piece = item
        elif item in rest:
            at = rest.index(item)
            if piece is not None:
                found[piece] = rest[:at]
            elif item != layout[0] and at:
                return None
            piece, rest = None, rest[at + 1 :]
        else:
            return None
    if any(item in rest for item in layout if item >= 0):
        return None
    found[MIDDLE] = rest
    return FimParts(found[PREFIX], found[MIDDLE], found[SUFFIX])
