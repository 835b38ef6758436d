"""Fields of JSON Lines."""

from __future__ import annotations

from collections.abc import Sequence

import orjson


def jsonl_fields(
    data: bytes, fields: Sequence[str], *, without: Sequence[str] = (), separator: str = ""
) -> list[list[str] | None]:
    """The strings of each line, None where a line is not one object with all the fields and none of the others.

    The kernel may leave lines undecided that have strings here, never the other way round.
    """
    found: list[list[str] | None] = []
    for line in data.split(b"\n")[: -1 if data.endswith(b"\n") or not data else None]:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = None
        if isinstance(row, dict) and not row.keys() & set(without) and all(type(row.get(f)) is str for f in fields):
            found.append([row[f] + separator * (f != fields[-1]) for f in fields])
        else:
            found.append(None)
    return found
