"""The optimizers: each rule against torch or its formula, exact state, and what all of them share."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import nn
from train_cases import NEEDS_MUON, collated, model_of, torch_adamw

from fastsft.config import ConfigError, OptimOptions
from fastsft.models.lora import LoraConfig, add_lora
from fastsft.train.evaluate import batch_loss
from fastsft.train.optim import MasterAdamW, MasterAdamW8bit, MasterMuon, MasterOptimizer

KINDS: list[Any] = [MasterAdamW, pytest.param(MasterMuon, marks=NEEDS_MUON), MasterAdamW8bit]
OPTIONS = OptimOptions(weight_decay=0.1, clip_norm=0.5)


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "kind" in request.fixturenames and request.getfixturevalue("kind") is MasterAdamW8bit:
        pytest.importorskip("bitsandbytes", reason="an optional extra")


def advance(model: nn.Module, optimizer: MasterOptimizer, steps: range, rate: float = 1e-3) -> None:
    for step in steps:
        batch_loss(model, collated(4, step), normalizer=9.0).backward()
        optimizer.collect()
        optimizer.step(rate, optimizer.grad_norm())


class Tensors(nn.Module):
    """Parameters of any names (dots are nested modules) and shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape).normal_(generator=generator).to(dtype)))

    def give(self, seed: int, size: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = (size * torch.empty(parameter.shape).normal_(generator=generator)).to(parameter.dtype)


# a matrix over several pieces with an odd rest, and small ones that share theirs
SHAPES = {"a": (1100, 1003), "norm": (7,), "b": (3, 5), "embed": (65, 9), "last": (1,)}


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_in_pieces_equals_torch(dtype: torch.dtype, clip: float) -> None:
    options = OptimOptions(lr=1e-2, weight_decay=0.3, clip_norm=clip)
    model, copy = Tensors(SHAPES, dtype), Tensors(SHAPES)
    copy.load_state_dict(model.state_dict())
    mine, other = MasterAdamW(model, options), torch_adamw(copy, options)
    for step in range(4):
        model.give(step)
        for p, q in zip(model.parameters(), copy.parameters(), strict=True):
            q.grad = p.grad.float().clone()
        exact = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
        mine.collect()
        norm = mine.grad_norm()
        assert float(norm) == pytest.approx(float(exact), rel=1e-4)
        mine.step(1e-2, norm)
        if clip:
            torch.nn.utils.clip_grads_with_norm_(copy.parameters(), clip, norm)
        other.step()
    for (name, p), q in zip(model.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(mine.masters[name], q, rtol=2e-6, atol=2e-6, msg=name)
        assert torch.equal(p, mine.masters[name].to(dtype)), name
        assert p.grad is None


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five quintic steps with Jordan's coefficients, in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.t()
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@NEEDS_MUON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_equals_its_formula(dtype: torch.dtype) -> None:
    """Nesterov momentum, orthogonalised, times lr * 0.2 * sqrt(max(rows, columns)); decay by lr alone."""
    shapes: dict[str, tuple[int, ...]] = {"wide": (24, 60), "tall": (60, 24), "norm": (24,)}
    model = Tensors(shapes, dtype)
    rate, momentum, decay = 0.01, 0.9, 0.5
    mine = MasterMuon(model, OptimOptions(weight_decay=decay, clip_norm=0.5, momentum=momentum))
    expected = {n: m.detach().double() for n, m in mine.masters.items()}
    buffers = {n: torch.zeros_like(w) for n, w in expected.items()}
    moved = dict(expected)
    for step, size in enumerate((1.0, 0.05, 10.0)):  # each divided by another number, or by none, when clipped
        model.give(step, size / 40)
        gradients = {n: p.grad.double() for n, p in model.named_parameters()}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        mine.collect()
        mine.step(rate, mine.grad_norm())
        for name in ("wide", "tall"):
            g = gradients[name] / max(1.0, float(norm) / 0.5)
            buffers[name] = momentum * buffers[name] + (1 - momentum) * g
            update = newton_schulz(momentum * buffers[name] + (1 - momentum) * g)
            moved[name] = rate * 0.2 * math.sqrt(60) * update
            expected[name] = expected[name] * (1 - rate * decay) - moved[name]
            # the root mean square of a step of AdamW: about 0.2 of the learning rate
            assert float(moved[name].norm()) / math.sqrt(24 * 60) == pytest.approx(0.2 * rate, rel=0.2)
    for name in ("wide", "tall"):
        # the iterations run in bfloat16
        error = (mine.masters[name] - expected[name]).norm()
        assert error <= 0.05 * moved[name].norm(), name
        assert torch.equal(getattr(model, name), mine.masters[name].to(dtype))


@NEEDS_MUON
@pytest.mark.parametrize("tied", [True, False])
def test_muon_steps_the_matrices_of_the_blocks_and_adamw_the_rest(tied: bool) -> None:
    ours, theirs = model_of(tie_word_embeddings=tied), model_of(tie_word_embeddings=tied)
    mine, other = MasterMuon(ours, OPTIONS), torch_adamw(theirs, OPTIONS)
    advance(ours, mine, range(1))
    batch_loss(theirs, collated(4, 0), normalizer=9.0).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    for group in other.param_groups:
        group["lr"] = 1e-3
    other.step()
    by_muon = {n.partition("/")[2] for n in mine.state() if n.startswith("momentum_buffer/")}
    assert by_muon == {n for n, _ in ours.named_parameters() if n.endswith("_proj.weight")}
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=2e-6, atol=2e-6) != (name in by_muon), name


def test_muon_needs_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ConfigError, match=r"optim: Muon needs torch 2.9 or newer, got "):
        MasterMuon(model_of(), OPTIONS)


def test_8_bit_moments_follow_adamw_at_a_quarter_of_the_size() -> None:
    pytest.importorskip("bitsandbytes", reason="an optional extra")
    shapes: dict[str, tuple[int, ...]] = {"w": (128, 96), "embed": (128, 96), "norm": (96,)}
    models = [Tensors(shapes, torch.bfloat16) for _ in range(2)]
    exact, small = MasterAdamW(models[0], OPTIONS), MasterAdamW8bit(models[1], OPTIONS)
    start = exact.masters["w"].detach().clone()
    for step in range(20):
        for model, optimizer in zip(models, (exact, small), strict=True):
            model.give(step)
            optimizer.collect()
            optimizer.step(3e-3, optimizer.grad_norm())  # not the library's default rate
    for name in ("embed", "norm"):
        assert torch.equal(exact.masters[name], small.masters[name]), name
    apart = (exact.masters["w"] - small.masters["w"]).norm() / (exact.masters["w"] - start).norm()
    assert 0 < apart < 0.1
    size = {kind: sum(t.nbytes for n, t in kind.state().items() if n.endswith("/w")) for kind in (exact, small)}
    assert size[small] - start.nbytes < 0.27 * (size[exact] - start.nbytes)


def test_8_bit_moments_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"optim: 8-bit moments need bitsandbytes \(pip install 'fastsft\[optim8bit"):
        MasterAdamW8bit(model_of(), OPTIONS)


# --- what all share -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip_continues_bitwise(kind: Any, dtype: torch.dtype, adapters: bool) -> None:
    def fresh() -> Any:
        model = model_of(dtype=dtype, intermediate_size=96)
        if adapters:
            add_lora(model, LoraConfig(rank=4), seed=1)
        return model

    whole, resumed = fresh(), fresh()
    optimizer = kind(whole, OPTIONS)
    advance(whole, optimizer, range(3))
    state = {k: v.clone() for k, v in optimizer.state().items()}
    other = kind(resumed, OPTIONS)
    if dtype == torch.float32:  # others come from their masters
        resumed.load_state_dict(whole.state_dict())
    other.load_state(state)
    assert state.keys() == other.state().keys()
    assert all(torch.equal(state[k], v) for k, v in other.state().items())
    advance(whole, optimizer, range(3, 6))
    advance(resumed, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_cost_nothing_and_stay(kind: Any, dtype: torch.dtype) -> None:
    model = model_of(dtype=dtype, intermediate_size=96)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    add_lora(model, LoraConfig(rank=4), seed=1)
    optimizer = kind(model, OPTIONS)
    advance(model, optimizer, range(2), 1e-2)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(optimizer.masters) == trained
    assert {n.partition("/")[2] for n in optimizer.state()} == trained
    for name, parameter in model.named_parameters():
        assert (name in before) != (name in trained)
        if name in before:
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_a_gradient_is_passed_over(kind: Any, dtype: torch.dtype) -> None:
    model = Tensors({"a": (64, 65), "b": (64, 65), "c": (7,), "d": (7,)}, dtype)
    optimizer = kind(model, OPTIONS)
    model.give(0)
    model.b.grad = model.c.grad = None
    before = {k: v.clone() for k, v in optimizer.state().items()} | {"b": model.b.clone(), "c": model.c.clone()}
    optimizer.collect()
    optimizer.step(0.1, optimizer.grad_norm())
    after = optimizer.state() | {"b": model.b, "c": model.c}
    for key, value in after.items():
        name = key.rpartition("/")[2]
        if name in ("b", "c"):
            assert torch.equal(value, before[key]), key
        elif key.startswith("step/"):
            assert float(value) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_twice(kind: Any) -> None:
    models = [model_of(dtype=torch.bfloat16, intermediate_size=96) for _ in range(2)]
    for model in models:
        advance(model, kind(model, OPTIONS), range(3))
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_micro_batches_add_up_in_float32_and_reuse_their_memory() -> None:
    model = Tensors({"a": (33, 70), "norm": (9,)}, torch.bfloat16)
    optimizer = MasterAdamW(model, OPTIONS)
    addresses = set()
    for step in range(3):
        exact = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in model.named_parameters()}
        for part in range(4):
            model.give(10 * step + part)
            for name, parameter in model.named_parameters():
                exact[name] += parameter.grad.float()
            optimizer.collect()
            assert all(p.grad is None for p in model.parameters())
        for one in optimizer.trained:
            assert one.gradient is not None
            assert torch.equal(one.gradient, exact[one.name])
        addresses.add(optimizer.trained[0].gradient.data_ptr())
        optimizer.step(1e-3, optimizer.grad_norm())
        assert all(one.gradient is None for one in optimizer.trained)
    assert len(addresses) == 1


def test_the_norm_of_a_large_gradient_keeps_its_digits() -> None:
    """One float32 sum over as many elements is almost a percent off."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1 << 25))])
    model[0].grad = torch.full((1 << 25,), 0.01)
    norm = MasterAdamW(model, OPTIONS).grad_norm()
    assert float(norm) == pytest.approx(0.01 * math.sqrt(1 << 25), rel=5e-4)


def test_no_gradient_at_all() -> None:
    optimizer = MasterAdamW(model_of(), OPTIONS)
    assert float(optimizer.grad_norm()) == 0
    before = [p.detach().clone() for p in optimizer.masters.values()]
    optimizer.step(1.0, optimizer.grad_norm())
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.masters.values(), strict=True))


@NEEDS_MUON
def test_a_state_of_another_optimizer_is_refused() -> None:
    model = model_of(dtype=torch.bfloat16)
    state = MasterAdamW(model, OPTIONS).state()
    name = "layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=rf"momentum_buffer/{name}: expected torch.float32 \[64, 48\], found none"):
        MasterMuon(model, OPTIONS).load_state(state)
    with pytest.raises(ValueError, match=rf"exp_avg/{name}: expected torch.float32 \[64, 48\], got .*\[2, 2\]"):
        MasterAdamW(model, OPTIONS).load_state(state | {f"exp_avg/{name}": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=rf"master/{name}: expected torch.float32 \[64, 48\], got torch.bfloat16"):
        MasterAdamW(model, OPTIONS).load_state(state | {f"master/{name}": torch.zeros(64, 48, dtype=torch.bfloat16)})
