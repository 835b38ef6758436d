"""The words of a text (see ``shingles.h``)."""

from __future__ import annotations

import re

# Spaces, punctuation, symbols and controls outside ASCII.
_SEPARATORS = (
    r"\u0080-\u00A9\u00AB-\u00B1\u00B4\u00B6-\u00B8\u00BB\u00BF\u00D7\u00F7\u037E\u0387\u055A-\u055F"
    r"\u0589-\u058A\u05BE\u05C0\u05C3\u05F3-\u05F4\u0609-\u060D\u061B-\u061F\u066A-\u066D\u06D4"
    r"\u0700-\u070D\u0964-\u0965\u0F04-\u0F14\u0F3A-\u0F3D\u104A-\u104F\u1360-\u1368\u1400\u1680"
    r"\u169B-\u169C\u17D4-\u17D6\u17D8-\u17DB\u1800-\u180A\u180E\u2000-\u206F\u207A-\u207E\u208A-\u208E"
    r"\u20A0-\u20CF\u2190-\u2BFF\u2E00-\u2E2E\u2E30-\u2E7F\u3000-\u3004\u3008-\u3020\u3030\u3036-\u3037"
    r"\u303D-\u303F\u309B-\u309C\u30A0\u30FB\uFD3E-\uFD3F\uFE00-\uFE1F\uFE30-\uFE6F\uFEFF\uFF01-\uFF0F"
    r"\uFF1A-\uFF20\uFF3B-\uFF40\uFF5B-\uFF65\uFFE0-\uFFEE\uFFF9-\uFFFD\U0001F000-\U0001FAFF"
)
# Characters of scripts written without spaces.
_ALONE = (
    r"\u0E01-\u0EFF\u1000-\u109F\u1780-\u17FF\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3041-\u30FF"
    r"\u31F0-\u31FF\u3400-\u4DBF\u4E00-\u9FFF\uF900-\uFAFF\uFF66-\uFF9F\U0001B000-\U0001B16F"
    r"\U00020000-\U0003FFFF"
)
_WORD = re.compile(f"(?![{_SEPARATORS}])[{_ALONE}]|(?:[a-z0-9_]|(?![{_SEPARATORS}{_ALONE}])[^\x00-\x7f])+")


def word_spans(data: bytes) -> list[tuple[int, int]]:
    """The bytes of each word. Bytes that are no UTF-8 are parts of words."""
    text = data.lower().decode(errors="surrogateescape")  # bytes.lower touches ASCII only
    ends = [0]
    for character in text:
        ends.append(ends[-1] + len(character.encode(errors="surrogateescape")))
    return [(ends[match.start()], ends[match.end()]) for match in _WORD.finditer(text)]


def words(data: bytes) -> list[bytes]:
    """In small letters."""
    lowered = data.lower()
    if data.isascii():
        return re.findall(rb"[a-z0-9_]+", lowered)
    return [lowered[begin:end] for begin, end in word_spans(data)]
