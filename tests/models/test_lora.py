"""LoRA against the dense model it stands for, in float64; what is frozen, what is computed, and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import LLAMA, QWEN2, adapted, randomise
from parity_table import TINY, logits, pair
from torch.nn import functional

from fastsft.models.layers import Linear
from fastsft.models.lora import BLOCK_LINEARS, LoraConfig, LoraLinear, add_lora, lora_layers, merge_lora
from fastsft.models.weights import init_model, load_model, save_model
from fastsft.ops import gemm

IDS = [torch.arange(3, 50), torch.arange(60, 3, -2)]
CONFIG = LoraConfig(rank=4, alpha=8.0)


def test_a_new_adapter_changes_no_bit_and_only_it_is_trained() -> None:
    model = init_model(QWEN2, seed=0)
    before, names = logits(model, IDS), [n for n, _ in model.named_parameters()]
    add_lora(model, CONFIG, seed=1)
    assert torch.equal(logits(model, IDS), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, _ in model.named_parameters()} - trained == set(names)
    assert len(trained) == 2 * len(BLOCK_LINEARS) * model.config.num_hidden_layers
    assert all(n.endswith(("lora_A", "lora_B")) for n in trained)


def test_first_values_are_kaiming_uniform_and_a_function_of_the_seed() -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        model = init_model(LLAMA, seed=0)
        torch.manual_seed(seed + 5)  # the global generator has no part in it
        add_lora(model, LoraConfig(rank=64), seed=seed)
        return [layer.lora_A.detach() for _, layer in lora_layers(model)]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for a in first:
        bound = a.shape[1] ** -0.5
        assert 0.99 * bound < a.abs().max() <= bound
        assert a.mean().abs() < 0.05 * bound
        assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("keys", [LLAMA, QWEN2, LLAMA | {"mlp_bias": True}], ids=["llama", "qwen2 biases", "mlp bias"])
def test_loss_and_gradients_equal_the_dense_model(keys: dict[str, Any], stabilised: bool, tmp_path: Path) -> None:
    """transformers in float64 with W + s B A as its weights: dA = s B' dW and dB = s dW A'."""
    theirs, ours = pair(keys, tmp_path)
    add_lora(ours, LoraConfig(rank=4, alpha=6.0, rank_stabilised=stabilised), seed=1)
    randomise(ours)
    scale = 6 / 2 if stabilised else 6 / 4
    dense = dict(theirs.double().named_parameters())
    layers = {name: (dense[f"model.{name}.weight"], layer) for name, layer in lora_layers(ours)}
    with torch.no_grad():
        for weight, layer in layers.values():
            weight += scale * layer.lora_B.double() @ layer.lora_A.double()
    ids = IDS[0]
    expected = theirs(ids[None], labels=ids[None], use_cache=False).loss
    expected.backward()
    loss = functional.cross_entropy(logits(ours, [ids])[:-1], ids[1:])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == {
        f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")
    }
    for name, (weight, layer) in layers.items():
        for got, want in (
            (layer.lora_A.grad, scale * layer.lora_B.double().t() @ weight.grad),
            (layer.lora_B.grad, scale * weight.grad @ layer.lora_A.double().t()),
        ):
            assert got is not None
            assert (got - want).abs().max() <= 2e-5 * want.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 31, 257])
def test_one_layer_is_as_exact_as_torch_in_its_type(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = Linear(72, 40, dtype=dtype)
    layer = LoraLinear(base, CONFIG)
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(rows, 72, dtype=dtype, requires_grad=True)

    def composed(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> Any:
        return functional.linear(x, w, b) + 2.0 * functional.linear(functional.linear(x, lora_a), lora_b)

    def with_gradients(out: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]

    parts = (layer.weight, layer.bias, layer.lora_A, layer.lora_B)
    exact, theirs = (
        with_gradients(composed(*copies), copies[0], *copies[3:])
        for copies in ([t.detach().to(kind).requires_grad_() for t in (x, *parts)] for kind in (torch.float64, dtype))
    )
    ours = with_gradients(layer(x), x, layer.lora_A, layer.lora_B)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        small = 2 * torch.finfo(dtype).eps * want.norm()
        assert got.dtype == dtype
        assert (got - want).norm() <= 2 * (other - want).norm() + small


@pytest.mark.parametrize("targets", [BLOCK_LINEARS, ("q_proj", "v_proj")], ids=len)
def test_a_frozen_weight_costs_no_product_and_keeps_no_input(
    targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "_NATIVE_TYPES", frozenset([torch.float32]))
    asked: list[tuple[list[int] | None, list[int] | None]] = []
    backward = gemm._linear_backward

    def watched(grad: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor | None) -> Any:
        asked.append((None if x is None else list(grad.t().shape), None if weight is None else list(weight.shape)))
        return backward(grad, x, weight)

    monkeypatch.setattr(gemm, "_linear_backward", watched)
    model = adapted(LoraConfig(rank=4, targets=targets), TINY | {"model_type": "llama", "num_hidden_layers": 2})
    logits(model, IDS).sum().backward()
    assert sum(x is not None for x, _ in asked) == 2 * len(targets)  # one for each A
    assert all(x is None or x[0] == 4 for x, _ in asked)
    # nothing before the first block wants a gradient, so what stands on its input computes none into it
    assert sum(weight is not None for _, weight in asked) == 2 * (7 + len(targets)) - (3 + len({*targets} & QKV))


QKV = {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit(dtype: torch.dtype) -> None:
    found = []
    for recompute in (False, True):
        model = adapted(CONFIG, dtype=dtype)
        model.activation_checkpointing = recompute
        logits(model, IDS).float().square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging_rounds_once(dtype: torch.dtype) -> None:
    model = adapted(LoraConfig(rank=3, alpha=5.0, targets=("v_proj", "down_proj")), QWEN2, dtype)
    exact = {
        f"{name}.weight": layer.weight.double() + 5 / 3 * layer.lora_B.double() @ layer.lora_A.double()
        for name, layer in lora_layers(model)
    }
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    merge_lora(model)
    plain = init_model(QWEN2, seed=0, dtype=dtype)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert str(model) == str(plain)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        if name in exact:
            # half a unit in the last place of the type, and what float32 arithmetic adds
            bound = exact[name].abs() * (torch.finfo(dtype).eps / 2 + 1e-6 * (dtype != torch.float64)) + 1e-7
            assert ((parameter - exact[name]).abs() <= bound).all(), name
            assert not torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name]), name


def test_a_merged_model_is_the_adapted_one_and_saved_as_any(tmp_path: Path) -> None:
    model = adapted(CONFIG)
    expected = logits(model, IDS).detach()
    with pytest.raises(ValueError, match=r"without adapters, got layers.0.self_attn.q_proj.lora_A: merge_lora it"):
        save_model(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    got = logits(load_model(tmp_path / "merged"), IDS)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="model: expected one with adapters, found none"):
        merge_lora(model)


def test_targets_by_end_of_name() -> None:
    model = init_model(LLAMA, seed=0)
    add_lora(model, LoraConfig(targets=("o_proj", "model.layers.1.mlp.up_proj", "o_proj")), seed=0)
    names = [f"layers.{i}.self_attn.o_proj" for i in range(3)]
    assert [n for n, _ in lora_layers(model)] == [*names[:2], "layers.1.mlp.up_proj", names[2]]
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        add_lora(model, CONFIG, seed=0)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "proj", "input_layernorm", "layers.9.mlp.up_proj", ""])
def test_targets_that_are_no_linear_layers_of_the_blocks(target: str) -> None:
    model = init_model(LLAMA, seed=0)
    with pytest.raises(ValueError, match=rf"targets: expected names of linear layers .*, got '{target}'"):
        add_lora(model, LoraConfig(targets=("q_proj", target)), seed=0)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 0}, "rank: expected a positive number, got 0"),
        ({"alpha": 0.0}, "alpha: expected a positive number, got 0.0"),
        ({"alpha": float("nan")}, "alpha: expected a positive number, got nan"),
        ({"alpha": float("inf")}, "alpha: expected a positive number, got inf"),
        ({"targets": ()}, "targets: expected names of linear layers, got none"),
    ],
)
def test_unusable_settings(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**keys)
