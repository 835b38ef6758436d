"""Penalties against their formulas over the whole vocabulary."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsft.ops.penalties import penalise

V = 12
ids = st.lists(st.integers(0, V - 1), max_size=15)


def expected(logits: torch.Tensor, text: list[int], prompt: int, r: float, f: float, p: float) -> torch.Tensor:
    out = logits.double()
    seen, counts = set(text), Counter(text[prompt:])
    for v in range(V):
        if v in seen:
            out[v] = out[v] / r if out[v] > 0 else out[v] * r
        out[v] -= f * counts[v] + (p if counts[v] else 0)
    return out


@settings(max_examples=200, deadline=None)
@given(ids, ids, st.lists(st.integers(0, V - 1), max_size=4), st.sampled_from([0.5, 1.0, 1.3]), st.integers(-2, 2))
def test_rows_against_the_formulas(prompt: list[int], text: list[int], draft: list[int], r: float, step: int) -> None:
    torch.manual_seed(len(text))
    logits = torch.randn(len(draft) + 1, V)
    logits[:, 3] = -torch.inf
    found = logits.clone()
    tokens = np.array([*prompt, *text, *draft], dtype=np.int32)
    first = len(prompt) + len(text)
    values = {"repetition": r, "frequency": 0.25 * step, "presence": -0.5 * step}
    penalise(found, tokens, prompt=len(prompt), first=first, **values)
    for j in range(len(draft) + 1):
        want = expected(logits[j], tokens[: first + j].tolist(), len(prompt), *values.values())
        torch.testing.assert_close(found[j].double(), want, rtol=1e-6, atol=1e-6)
        alone = logits[j : j + 1].clone()
        penalise(alone, tokens[: first + j], prompt=len(prompt), first=first + j, **values)
        assert torch.equal(alone[0], found[j])  # to the bit, whatever rows are beside it


def test_wrong_arguments() -> None:
    logits = torch.zeros(1, V)
    with pytest.raises(ValueError, match="tokens\\[1\\]"):
        penalise(logits, np.array([0, V], dtype=np.int32), prompt=0, first=2)
    with pytest.raises(ValueError, match="repetition"):
        penalise(logits, np.array([0], dtype=np.int32), prompt=0, first=1, repetition=0)
    with pytest.raises(ValueError, match="first"):
        penalise(logits, np.array([0], dtype=np.int32), prompt=2, first=1)
    with pytest.raises(ValueError, match="expected first"):
        penalise(logits, np.array([0], dtype=np.int32), prompt=0, first=2)
    assert torch.equal(logits, torch.zeros(1, V))
