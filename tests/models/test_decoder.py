"""The decoder against transformers (eager, float32), and against itself on packed and recomputed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity_table import CASES, TINY, logits, measure, pair, reference

from fastsft.models.attend import VarlenAttend
from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.weights import init_model, load_model

GRADIENT_CASES = [
    "llama tied GQA",
    "llama attention_bias mlp_bias",
    "llama pad token",
    "llama rope yarn",
    "qwen2 untied GQA",
    "qwen3 tied MHA",
    "mistral window 7",
]


def documents(lengths: list[int], vocab: int = TINY["vocab_size"]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]


def loss_of(model: Decoder, docs: list[torch.Tensor]) -> torch.Tensor:
    """Mean next-token loss over all documents."""
    targets = torch.cat([torch.cat([d[1:], d.new_full((1,), -100)])[: len(d)] for d in docs])
    return F.cross_entropy(logits(model, docs), targets, ignore_index=-100)


def gradients(model: Decoder, docs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, docs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    got = measure(*pair(CASES[name], tmp_path))
    assert got.magnitude > 1
    assert got.max_error < 1e-5
    assert got.tokens_equal == got.tokens


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs, ours = pair(CASES[name], tmp_path)
    (ids,) = documents([41])
    ids[7] = 5  # the pad token of one case: as an input it gets no gradient, as a target it does
    theirs(ids[None], labels=ids[None], use_cache=False).loss.backward()
    got = gradients(ours, [ids])
    expected = {n.removeprefix("model."): p.grad for n, p in theirs.named_parameters()}
    assert got.keys() == expected.keys()
    for key, grad in expected.items():
        assert (got[key] - grad).abs().max() <= 2e-5 * grad.abs().max(), key


@pytest.mark.parametrize("name", ["llama tied GQA", "qwen3 window 6 by layer_types", "llama rope yarn"])
def test_packed_documents_equal_each_alone(name: str, tmp_path: Path) -> None:
    _, model = pair(CASES[name], tmp_path)
    docs = documents([1, 31, 0, 17, 2, 64])
    packed = logits(model, docs)
    alone = torch.cat([logits(model, [d]) for d in docs])
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()

    got = gradients(model, docs)
    total = sum(max(len(d) - 1, 0) for d in docs)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for d in docs:
        if len(d) > 1:
            for n, grad in gradients(model, [d]).items():
                expected[n] += grad * ((len(d) - 1) / total)
    for n, grad in expected.items():
        assert (got[n] - grad).abs().max() <= 2e-5 * grad.abs().max(), n


def test_one_document_does_not_move_with_its_neighbours(tmp_path: Path) -> None:
    """Bit for bit on row-independent products: only attention could leak."""
    _, model = pair(CASES["mistral window 7"], tmp_path)
    first, second, other = documents([20, 30, 20])
    with torch.no_grad():
        a = logits(model, [first, second])[20:]
        b = logits(model, [other, second])[20:]
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama rope llama3", "llama rope yarn"])
def test_positions_beyond_the_original_context(name: str, tmp_path: Path) -> None:
    """Explicit positions far out: the angles, not only the frequencies, follow transformers."""
    theirs, ours = pair(CASES[name], tmp_path)
    (ids,) = documents([24])
    positions = torch.arange(24) + 100_000
    with torch.no_grad():
        expected = theirs(ids[None], position_ids=positions[None], use_cache=False).logits[0]
        attend = VarlenAttend(torch.tensor([0, 24], dtype=torch.int32))
        got = F.linear(ours(ids, positions, attend), ours.lm_head_weight)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama tied GQA", "qwen3 untied GQA"])
def test_activation_checkpointing_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    _, model = pair(CASES[name], tmp_path)
    docs = documents([13, 40])
    plain = gradients(model, docs)
    model.activation_checkpointing = True
    calls = count_layer_calls(model)
    recomputed = gradients(model, docs)
    assert calls == [0, 1, 2, 2, 1, 0]  # forward, then each layer once more from the back
    for key, grad in plain.items():
        assert torch.equal(grad, recomputed[key]), key
    calls.clear()
    with torch.no_grad():
        loss_of(model, docs)
    assert calls == [0, 1, 2]


def count_layer_calls(model: Decoder) -> list[int]:
    calls: list[int] = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    return calls


@pytest.mark.parametrize("name", ["llama tied GQA", "qwen2 untied GQA", "qwen3 tied MHA"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(name: str, tmp_path: Path) -> None:
    theirs, exact = pair(CASES[name], tmp_path)
    (ids,) = documents([60])
    ours = load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        want = logits(exact, [ids])
        ours_error = (logits(ours, [ids]).float() - want).norm()
        theirs_error = (theirs.to(torch.bfloat16)(ids[None], use_cache=False).logits[0].float() - want).norm()
    assert ours_error <= 2 * theirs_error
    assert ours_error <= 0.1 * want.norm()


def test_attend_sees_the_layer_the_window_and_ungrouped_heads() -> None:
    keys = TINY | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
    seen: list[Any] = []

    def attend(layer: int, q: Any, k: Any, v: Any, window: Any) -> torch.Tensor:
        seen.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape), window))
        return torch.zeros_like(q)

    model = init_model(keys, seed=0)
    model(torch.arange(5), torch.arange(5), attend)
    shapes = ((5, 4, 32), (5, 2, 32), (5, 2, 32))
    assert seen == [(0, *shapes, None), (1, *shapes, None), (2, *shapes, (8, 0))]


def test_empty_batch() -> None:
    model = init_model(TINY | {"model_type": "llama"}, seed=0)
    none = torch.zeros(0, dtype=torch.int64)
    out = model(none, none, VarlenAttend(torch.zeros(1, dtype=torch.int32)))
    assert out.shape == (0, TINY["hidden_size"])


def test_bad_input_names_the_argument() -> None:
    model = init_model(TINY | {"model_type": "llama"}, seed=0)
    attend = VarlenAttend(torch.tensor([0, 4], dtype=torch.int32))
    ids = torch.arange(4)
    with pytest.raises(ValueError, match=r"input_ids: expected int64 \[4\], got torch.int32 \[4\]"):
        model(ids.int(), ids, attend)
    with pytest.raises(ValueError, match=r"input_ids: expected int64 \['T'\], got torch.int64 \[1, 4\]"):
        model(ids[None], ids[None], attend)
    with pytest.raises(ValueError, match=r"position_ids: expected int64 \[4\], got torch.int64 \[3\]"):
        model(ids, ids[:3], attend)


def test_building_on_the_meta_device_allocates_nothing() -> None:
    keys = TINY | {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_hf(keys))
    assert sum(p.numel() for p in model.parameters()) > 50e9


def test_parameter_names_are_transformers_names() -> None:
    for name in ("llama tied GQA", "qwen3 untied GQA", "llama attention_bias mlp_bias"):
        theirs = [n.removeprefix("model.") for n, _ in reference(CASES[name]).named_parameters()]
        assert [n for n, _ in init_model(CASES[name], seed=0).named_parameters()] == theirs
