"""A run's loss: reductions and references against plain formulas; any split of a step gives the same gradient."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train_cases import model_of, random_samples

from fastsft.config import ConfigError, ObjectiveOptions, OptimOptions
from fastsft.data.batch import VarlenBatch
from fastsft.data.store import SampleStore
from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder
from fastsft.ops.objectives import OBJECTIVES
from fastsft.train.objective import Objective, check_objective
from fastsft.train.optim import MasterAdamW
from fastsft.train.reference import Reference, reference_logprobs
from fastsft.train.selfcheck import PackingError, check_packing
from fastsft.train.update import Update

STORE = SampleStore.from_samples(random_samples(15, 1))


def plain_logprobs(model: Decoder, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one sample in float64: its targets' log-probabilities and their weights."""
    sample = STORE[number]
    ids = torch.from_numpy(sample.ids.astype(np.int64))
    attend = VarlenAttend(torch.tensor([0, len(ids)], dtype=torch.int32))
    hidden = model(ids, torch.arange(len(ids)), attend)
    logits = F.linear(hidden, model.lm_head_weight).double()
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0], torch.from_numpy(sample.weights[1:]).double()


def objective_of(tmp_path: Path, **options: Any) -> Objective:
    made = ObjectiveOptions(**options)
    needs = OBJECTIVES[made.name].needs
    other = model_of(seed=5)
    if needs == "reference":
        return Objective(made, Reference(model=other))
    if needs:
        return Objective(made, Reference(logprobs=reference_logprobs(STORE, other, tmp_path / "r", capacity=50)))
    return Objective(made)


def step_gradients(objective: Objective, batches: list[VarlenBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    model = model_of()
    optimizer = MasterAdamW(model, OptimOptions())
    seen: dict[str, torch.Tensor] = {}

    def step(rate: float, norm: torch.Tensor) -> None:
        seen.update({n: m.grad.clone() for n, m in optimizer.masters.items() if m.grad is not None})

    optimizer.step = step  # type: ignore[method-assign]
    return Update(model, optimizer, objective, seed=0)(0, batches, 1.0).loss, seen


@torch.no_grad()
@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_reductions_by_their_formulas(reduction: Any) -> None:
    model = model_of()
    batch = STORE.batch(np.arange(15))
    objective = Objective(ObjectiveOptions(reduction=reduction, constant=37.0 if reduction == "constant" else None))
    loss, _ = objective(model, batch, divisor=objective.divisor([batch]))
    sums = [
        (float((-logprob * w).sum()), float(w.sum())) for logprob, w in (plain_logprobs(model, i) for i in range(15))
    ]
    expected = {
        "token": sum(s for s, _ in sums) / sum(w for _, w in sums),
        "sequence": sum(s / w for s, w in sums) / 15,
        "constant": sum(s for s, _ in sums) / 37,
    }[reduction]
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_any_split_gives_the_same_gradient(name: str, reduction: Any, tmp_path: Path) -> None:
    constant = 37.0 if reduction == "constant" else None
    objective = objective_of(tmp_path, name=name, reduction=reduction, constant=constant)
    loss, whole = step_gradients(objective, [STORE.batch(np.arange(15))])
    for parts in ([[7, 0, 3], [1, 2, 4, 5, 6], [8, 9, 10, 11, 12, 13, 14]], [[i] for i in range(15)]):
        split_loss, split = step_gradients(objective, [STORE.batch(np.array(p)) for p in parts])
        assert split_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
        for parameter, gradient in whole.items():
            assert float((split[parameter] - gradient).norm()) <= 2e-6 * float(gradient.norm()), parameter


@torch.no_grad()
def test_reference_logprobs_are_the_models(tmp_path: Path) -> None:
    model = model_of(seed=5)
    found = reference_logprobs(STORE, model, tmp_path / "r.f32", capacity=50)
    begin = 0
    for number in range(15):
        logprobs, weights = plain_logprobs(model, number)
        expected = torch.where(weights > 0, logprobs, 0.0)
        torch.testing.assert_close(
            torch.from_numpy(found[begin : begin + len(expected)].copy()).double(), expected, rtol=1e-5, atol=1e-6
        )
        assert found[begin + len(expected)] == 0, "nothing follows a sample's last token"
        begin += len(expected) + 1


def test_reference_logprobs_go_on_where_a_process_was_killed(tmp_path: Path) -> None:
    model = model_of(seed=5)
    whole = reference_logprobs(STORE, model, tmp_path / "whole.f32", capacity=50).tobytes()
    for left in range(0, len(whole), 97):
        (tmp_path / "r.f32.partial").write_bytes(whole[:left])
        assert reference_logprobs(STORE, model, tmp_path / "r.f32", capacity=50).tobytes() == whole
        (tmp_path / "r.f32").unlink()


def test_noise_on_embeddings() -> None:
    """Within its bound, a function of (seed, step, micro-batch), and not the same in two of them."""
    model = model_of()
    batch = STORE.batch(np.arange(3))

    def noise(seed: int, step: int, index: int) -> torch.Tensor:
        update = Update(model, MasterAdamW(model, OptimOptions()), Objective(ObjectiveOptions(neftune=5.0)), seed=seed)
        made = update._noise(step, index, batch)
        assert made is not None
        return made

    first = noise(0, 0, 0)
    assert torch.equal(first, noise(0, 0, 0))
    assert not any(torch.equal(first, noise(*other)) for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    bounds = batch.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(bounds):
        bound = 5.0 / ((end - begin) * model.config.hidden_size) ** 0.5
        part = first[begin:end]
        assert 0.9 * bound < float(part.abs().max()) <= bound
        assert abs(float(part.mean())) < 0.2 * bound
    changed, _ = step_gradients(Objective(ObjectiveOptions(neftune=5.0)), [batch])
    assert changed != step_gradients(Objective(ObjectiveOptions()), [batch])[0]


@pytest.mark.parametrize("name", ["nll", "pear_sequence"])
def test_self_check_finds_a_leak(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = np.arange(6)
    objective = objective_of(tmp_path, name=name)
    check_packing(model_of(), objective, STORE, members)
    check_packing(model_of(dtype=torch.bfloat16), objective, STORE, members)

    def one_document(self: VarlenAttend, cu_seqlens: torch.Tensor, **named: Any) -> None:
        plain(self, cu_seqlens[[0, -1]], **named)

    plain = VarlenAttend.__init__
    monkeypatch.setattr(VarlenAttend, "__init__", one_document)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(PackingError, match=r"6 samples .* gradient by \d.*row:1, row:2"):
            check_packing(model_of(dtype=dtype), objective, STORE, members)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(n for n, o in OBJECTIVES.items() if o.needs == "ref_logprobs"))
def test_self_check_where_the_model_is_its_own_reference(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As every run without objective.reference begins: the log-ratios are rounding alone."""
    model = model_of(dtype=dtype)
    own = Reference(logprobs=reference_logprobs(STORE, model, tmp_path / "own", capacity=50))
    check_packing(model, Objective(ObjectiveOptions(name=name), own), STORE, np.arange(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "dtf"}, "unknown key 'objective.dtf'; did you mean 'dft'"),
        ({"name": "power", "args": {"beta": 1}}, r"objective\.args: .*expected for 'power' only \['alpha'\]"),
        ({"name": "power", "args": {"alpha": -1}}, r"objective\.args: .*expected more than 0"),
        ({"name": "dft", "label_smoothing": 0.1}, r"objective\.label_smoothing: expected 0 beside 'dft'"),
        ({"name": "dft", "reference": "x"}, r"objective\.reference: expected none: 'dft' compares with nothing"),
        ({"name": "f_divergence", "args": {"level": "sequence"}, "reduction": "sequence"}, "sums by sample"),
    ],
)
def test_what_an_objective_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_objective(ObjectiveOptions(**options))
