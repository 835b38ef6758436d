"""Which records are worth training on, by their text alone, and what is masked in those that stay.

The rules are those of C4 (arXiv 1910.10683), Gopher (2112.11446) and StarCoder (2305.06161), each with a setting of its
own and all off by default; they look at what the model would learn to write.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fastsft.config import ConfigError, FilterOptions
from fastsft.data.problems import Problems
from fastsft.data.records import Record

# Only where a run begins: from each of its places, a run that ends no sentence would be gone through again.
_SENTENCE_END = re.compile(r"(?<![.!?。！？])[.!?。！？]+[\"'”’)\]]*(?=\s|$)")  # noqa: RUF001
_TERMINAL = re.compile(r"[.!?。！？:;][\"'”’)\]]*$")  # noqa: RUF001
_BULLET = re.compile(r"\s*[-*•‣◦]\s")
_ELLIPSIS = re.compile(r"(\.\.\.|…)\s*$")
_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_PLACEHOLDER = re.compile(
    r"lorem ipsum|(?:your|rest of (?:the|your)) code (?:goes )?here|\[insert [^\]\n]{1,40}\]|<insert [^>\n]{1,40}>",
    re.I,
)
_OPENING = re.compile(r"[ \t]*```[ \t]*([\w+#-]+)")
_CLOSING = re.compile(r"[ \t]*```[ \t]*")
_ALIASES = {"py": "python", "python3": "python", "js": "javascript", "ts": "typescript", "sh": "bash", "c++": "cpp"}

_ASSIGNED = ipaddress.ip_network("2000::/3")
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
_NUMBERS = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)")
_HEXADECIMAL = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:.])")


@dataclass(frozen=True)
class _Text:
    """What is measured of a record, each part at most once."""

    text: str

    @functools.cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @functools.cached_property
    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]

    def share(self, count: int, of: list[str]) -> float:
        return count / len(of) if of else 0.0


def _duplicates(t: _Text) -> float:
    return t.share(sum(n - 1 for n in Counter(map(str.strip, t.lines)).values()), t.lines)


def _symbols(t: _Text) -> float:
    return t.share(t.text.count("#") + t.text.count("...") + t.text.count("…"), t.words)


# What the settings min_NAME and max_NAME are limits of.
MEASURES: dict[str, Callable[[_Text], float]] = {
    "chars": lambda t: len(t.text),
    "words": lambda t: len(t.words),
    "mean_word": lambda t: sum(map(len, t.words)) / max(1, len(t.words)),
    "alphabetic": lambda t: t.share(sum(any(map(str.isalpha, w)) for w in t.words), t.words),
    "stop_words": lambda t: sum(w.lower() in _STOP_WORDS for w in t.words),
    "sentences": lambda t: len(_SENTENCE_END.findall(t.text)),
    "terminal": lambda t: t.share(sum(bool(_TERMINAL.search(line.rstrip())) for line in t.lines), t.lines),
    "symbols": _symbols,
    "bullets": lambda t: t.share(sum(bool(_BULLET.match(line)) for line in t.lines), t.lines),
    "ellipses": lambda t: t.share(sum(bool(_ELLIPSIS.search(line)) for line in t.lines), t.lines),
    "duplicate_lines": _duplicates,
    "line": lambda t: max(map(len, t.lines), default=0),
}


def written(record: Record) -> str:
    """The text that a record teaches: completions, the assistant's contents, texts, and infilling rows as a whole."""
    if record.kind == "messages":
        contents = (m.get("content") for m in record.messages if m["role"] == "assistant")
        return "\n".join(c for c in contents if isinstance(c, str))
    return record.parts[1] if record.kind == "prompt_completion" else record.text()


def apply(records: Iterable[Record], options: FilterOptions, problems: Problems) -> Iterator[Record]:
    """The records that pass, masked; the others are noted in ``problems`` with the setting that left them out.

    Raises:
        ConfigError: a language without a parser.
    """
    for language in {*options.fenced_languages, *([options.text_language] if options.text_language else [])}:
        _parser(_ALIASES.get(language, language))
    limits = [
        (name, value)
        for name, value in dataclasses.asdict(options).items()
        if name.partition("_")[0] in ("min", "max") and value is not None
    ]
    for record in records:
        reason = _refused(record, options, limits)
        if reason:
            problems.note(record.source, *reason)
            continue
        kept, masked = _masked(record, options.mask)
        for what, count in masked.items():
            problems.note(record.source, f"masked {what}", f"{count} of them")
        yield kept


def _refused(record: Record, options: FilterOptions, limits: list[tuple[str, float]]) -> tuple[str, str] | None:
    text = written(record)
    measured = _Text(text)
    for name, limit in limits:
        bound, _, measure = name.partition("_")
        found = MEASURES[measure](measured)
        if found < limit if bound == "min" else found > limit:
            return f"filters.{name}", f"{found:.4g}"
    if options.placeholders and (match := _PLACEHOLDER.search(text)):
        return "filters.placeholders", repr(match[0])
    if options.text_language and record.kind in ("text", "fim"):
        wrong = syntax_error(text, options.text_language)
        if wrong:
            return "filters.text_language", wrong
    if options.fenced_languages:
        accepted = {_ALIASES.get(language, language) for language in options.fenced_languages}
        for name, code in _fenced(text):
            language = _ALIASES.get(name.lower(), name.lower())
            if language in accepted and (wrong := syntax_error(code, language)):
                return "filters.fenced_languages", f"{language}, {wrong}"
    return None


def _fenced(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of each Markdown block that names its language and is closed."""
    name: str | None = None
    block: list[str] = []
    for line in text.split("\n"):
        if name is None:
            opening = _OPENING.match(line)
            name = opening and opening[1]
        elif _CLOSING.fullmatch(line):
            yield name, "".join(block)
            name, block = None, []
        else:
            block.append(line + "\n")


def syntax_error(code: str, language: str) -> str | None:
    """Where code does not parse, or None: Python by ``ast``, other languages by their tree-sitter grammar.

    Raises:
        ConfigError: a language without a parser.
    """
    return _parser(_ALIASES.get(language, language))(code)


@functools.cache
def _parser(language: str) -> Callable[[str], str | None]:
    if language == "python":
        return _python_error
    import importlib

    try:
        import tree_sitter

        grammar = importlib.import_module(f"tree_sitter_{language}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"data.filters: expected python or a language whose tree-sitter grammar is installed (pip install "
            f"tree-sitter tree-sitter-{language}), got {language!r}: {error}"
        ) from None
    parser = tree_sitter.Parser(tree_sitter.Language(grammar.language()))

    def error_in(code: str) -> str | None:
        root = parser.parse(code.encode("utf-8", "replace")).root_node
        return f"line {_first_error(root).start_point[0] + 1}" if root.has_error else None

    return error_in


def _first_error(node: Any) -> Any:
    """The first node, from the top, that is an error or missing."""
    while not (node.is_error or node.is_missing):
        inner = next((child for child in node.children if child.has_error or child.is_missing), None)
        if inner is None:
            break
        node = inner
    return node


def _python_error(code: str) -> str | None:
    import ast

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes and the like: those are no errors
            ast.parse(code)
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte
        return f"line {getattr(error, 'lineno', None) or 1}: {getattr(error, 'msg', None) or error}"
    except (RecursionError, MemoryError):
        return "line 1: nested too deeply"
    return None


def _masked(record: Record, kinds: Iterable[str]) -> tuple[Record, Counter[str]]:
    counts: Counter[str] = Counter()

    def mask(value: Any) -> Any:
        if isinstance(value, str):
            for kind in kinds:
                value = _MASKS[kind](value, counts)
        elif isinstance(value, dict):
            return {key: mask(inner) for key, inner in value.items()}
        elif isinstance(value, list | tuple):
            return type(value)(mask(inner) for inner in value)
        return value

    kept = dataclasses.replace(record, parts=mask(record.parts), messages=mask(record.messages)) if kinds else record
    return kept, counts


def _mask_emails(text: str, counts: Counter[str]) -> str:
    text, found = _EMAIL.subn("<EMAIL>", text) if "@" in text else (text, 0)
    if found:
        counts["e-mail"] += found
    return text


def _mask_addresses(text: str, counts: Counter[str]) -> str:
    def replaced(match: re.Match[str]) -> str:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        # In code, x[::2] and its like are addresses too, but not in the range of those that are assigned.
        public = address.is_global and (address.version == 4 or address in _ASSIGNED)
        if not public:
            return match[0]
        counts["ip"] += 1
        return "<IP_ADDRESS>"

    return _HEXADECIMAL.sub(replaced, _NUMBERS.sub(replaced, text))


_MASKS = {"email": _mask_emails, "ip": _mask_addresses}
