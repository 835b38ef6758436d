"""Texts around the threshold, and files of them."""

from __future__ import annotations

import json
import random
from typing import Any


def texts(count: int, seed: int = 0) -> list[str]:
    """Families of texts around the threshold, with exact copies."""
    rng = random.Random(seed)
    out: list[str] = []
    while len(out) < count:
        base = [f"w{rng.randrange(300)}" for _ in range(rng.randint(3, 80))]
        for _ in range(rng.choice((1, 1, 1, 2, 5, 12))):
            share = rng.choice((0, 0.01, 0.03, 0.05, 0.3))
            out.append(" ".join(f"x{rng.randrange(999)}" if rng.random() < share else w for w in base))
    rng.shuffle(out)
    return out[:count]


def rows_of(texts: list[str]) -> list[dict[str, Any]]:
    return [{"id": i, "text": t} for i, t in enumerate(texts)]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()
