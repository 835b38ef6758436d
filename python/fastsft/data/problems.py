"""What is wrong with the user's rows: stops the run, or is counted with the first places."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

_PLACES = 5  # kept of each kind


class DataError(ValueError):
    """A row that cannot be used; the message begins with file and line."""


@dataclass
class Problems:
    """Counts what was wrong, keeps the first few places of each kind, and stops the run if so asked.

    ``skip``: the setting that leaves unusable rows out, for the message; None where there is none.
    """

    mode: Literal["fail", "skip"]
    skip: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unusable: int = 0

    def add(self, source: str, reason: str, detail: str = "") -> None:
        """Note that the row at ``source`` is unusable. Raises DataError in mode "fail"."""
        if self.mode == "fail":
            self.refuse(f"{source}: {reason}{': ' if detail else ''}{detail}")
        self.unusable += 1
        self.note(source, reason, detail)

    def refuse(self, place: str) -> NoReturn:
        """Stop the run for an unusable row; ``place`` as it stands in ``examples``."""
        raise DataError(place + (f" ({self.skip} would leave such rows out and count them)" if self.skip else ""))

    def note(self, source: str, reason: str, detail: str = "") -> None:
        """Count it and keep the place, without stopping."""
        self.counts[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _PLACES:
            places.append(f"{source}: {reason}{': ' if detail else ''}{detail}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, for :meth:`merge`."""
        return {"counts": dict(self.counts), "examples": self.examples, "unusable": self.unusable}

    def merge(self, later: dict[str, Any]) -> None:
        """Add what was found in rows after these."""
        self.counts.update(later["counts"])
        self.unusable += later["unusable"]
        for reason, places in later["examples"].items():
            mine = self.examples.setdefault(reason, [])
            mine += places[: _PLACES - len(mine)]
