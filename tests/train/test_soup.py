"""The greedy soup against the recipe written out on whole state dicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_cases import MODEL, model_of

from fastsft.models import merge
from fastsft.models.decoder import Decoder
from fastsft.models.weights import load_model, save_model
from fastsft.train.soup import greedy_soup

TARGET = model_of(seed=99)


def loss_of(model: Decoder) -> float:
    """Distance to a fixed model: smooth, so that a mean can be better than each of its members."""
    pairs = zip(model.parameters(), TARGET.parameters(), strict=True)
    return float(sum(((a.detach() - b.detach()).double() ** 2).sum() for a, b in pairs))


def noisy(folder: Path, seed: int, scale: float) -> Path:
    """The target with independent noise on it."""
    model = model_of(seed=99)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.empty(p.shape).normal_(generator=generator))
    save_model(model, folder)
    return folder


def expected(models: list[Path]) -> tuple[list[tuple[tuple[int, ...], bool]], dict[str, torch.Tensor]]:
    """Recipe 1 of arXiv 2203.05482, on whole models in float64."""
    states = [load_model(m, dtype=torch.float64).state_dict() for m in models]

    def mean(chosen: list[int]) -> dict[str, torch.Tensor]:
        return {n: (sum(states[i][n] for i in chosen) / len(chosen)).float() for n in states[0]}

    def loss(chosen: list[int]) -> float:
        model = model_of()
        model.load_state_dict(mean(chosen))
        return loss_of(model)

    alone = [loss([i]) for i in range(len(models))]
    order = sorted(range(len(models)), key=alone.__getitem__)
    chosen, best = [order[0]], alone[order[0]]
    tried = [((i,), i == order[0]) for i in range(len(models))]
    for i in order[1:]:
        now = loss([*chosen, i])
        tried.append(((*chosen, i), now < best))
        if now < best:
            chosen, best = [*chosen, i], now
    return tried, mean(chosen)


def test_greedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three that help each other, and one so far away that it is tried and left out."""
    monkeypatch.setattr(merge, "_PIECE", 1000)
    models = [noisy(tmp_path / f"m{i}", i, s) for i, s in enumerate((0.02, 0.5, 0.01, 0.015))]
    steps: list[tuple[int, int]] = []
    trials = greedy_soup(models, tmp_path / "soup", loss_of, progress=lambda done, total: steps.append((done, total)))
    tried, mean = expected(models)
    assert [(t.members, t.kept) for t in trials] == tried
    kept = [t for t in trials if t.kept]
    assert set(kept[-1].members) == {0, 2, 3}
    assert [t.loss for t in kept] == sorted((t.loss for t in kept), reverse=True)
    assert steps == [(i, 7) for i in range(1, 8)]
    written = load_model(tmp_path / "soup")
    assert loss_of(written) == kept[-1].loss  # what was evaluated is what was written
    for name, tensor in written.state_dict().items():
        torch.testing.assert_close(tensor, mean[name], rtol=0, atol=1e-7)


def test_what_is_evaluated_is_rounded_as_written(tmp_path: Path) -> None:
    models = []
    for i in range(2):
        save_model(model_of(seed=i, dtype=torch.bfloat16), tmp_path / f"m{i}")
        models.append(tmp_path / f"m{i}")
    trials = greedy_soup(models, tmp_path / "soup", loss_of)
    assert loss_of(load_model(tmp_path / "soup")) == next(t for t in reversed(trials) if t.kept).loss


def test_a_copy_adds_nothing(tmp_path: Path) -> None:
    model = noisy(tmp_path / "m", 0, 0.1)
    trials = greedy_soup([model, model], tmp_path / "soup", loss_of)
    assert [t.kept for t in trials] == [True, False, False]


def test_refusals(tmp_path: Path) -> None:
    a = noisy(tmp_path / "a", 0, 0.1)
    save_model(model_of(intermediate_size=MODEL["intermediate_size"] + 8), tmp_path / "b")

    def never(model: Decoder) -> float:
        pytest.fail("evaluated before it was refused")

    for models, output, message in (
        ([a], "soup", "expected at least two"),
        ([a, tmp_path / "b"], "soup", "intermediate_size: 72 against 64"),
        ([a, a], "a", "expected the name of a new folder"),
    ):
        with pytest.raises(ValueError, match=message):
            greedy_soup(models, tmp_path / output, never)
    with pytest.raises(ValueError, match="no model has a finite held-out loss"):
        greedy_soup([a, a], tmp_path / "soup", lambda model: float("nan"))
    assert not (tmp_path / "soup").exists()
