"""What of a record is compared with others, and the number that rates it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastsft.data.problems import Problems
from fastsft.data.records import FIELDS, ROLES, Record, Row, interpret

NAMES = (*(name for kind, names in FIELDS.items() if kind != "messages" for name in names), *ROLES)


def names_of(on: Sequence[str] | None) -> tuple[str, ...] | None:
    """``on`` in the order of :data:`NAMES`; refuses names of no field and no role."""
    if on is None:
        return None
    unknown = [on] if isinstance(on, str) or not on else [name for name in on if name not in NAMES]
    if unknown:
        raise ValueError(f"dedup: on: expected names among {', '.join(NAMES)}, got {unknown[0]!r}")
    return tuple(name for name in NAMES if name in on)


def text_of(record: Record, on: Sequence[str] | None) -> str | None:
    """The text of the fields and of the roles' turns named in ``on``, by default of the whole record; None if it has
    none of these."""
    if on is None:
        return record.text()
    if record.kind == "messages":
        chosen = [replace(record, messages=(m,)).text() for m in record.messages if m["role"] in on]
    else:
        chosen = [part for name, part in zip(FIELDS[record.kind], record.parts, strict=True) if name in on]
    return "\n".join(chosen) if chosen else None


def lacking(record: Record, on: Sequence[str] | None) -> str:
    """Why :func:`text_of` found nothing."""
    has = [m["role"] for m in record.messages] or list(FIELDS[record.kind])
    return f"expected one of {', '.join(on or ())}, got a record with {has}"


@dataclass(frozen=True)
class RowReader:
    """Rows to records with their compared text and their score; unusable ones go to ``problems``.

    ``score``: the field that rates a row; None: its weight does.
    """

    problems: Problems
    fields: Mapping[str, str]
    on: Sequence[str] | None = None
    score: str | None = None

    def read(self, row: Row) -> tuple[Record, str, float] | None:
        record = interpret(row, self.problems, format="auto", fields=dict(self.fields))
        if record is None:
            return None
        text = text_of(record, self.on)
        if text is None:
            self.problems.add(row.source, "missing field", f"on: {lacking(record, self.on)}")
            return None
        if self.score is None:
            return record, text, record.weight
        if self.score not in row.value:
            self.problems.add(row.source, "missing field", repr(self.score))
            return None
        score = row.value[self.score]
        if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
            self.problems.add(row.source, "bad score", f"{self.score}: expected a number, got {score!r:.80}")
            return None
        return record, text, float(score)
