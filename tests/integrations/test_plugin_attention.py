"""attn_implementation="fastsft" against transformers' own eager attention, which computes masks in full."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

transformers = pytest.importorskip("transformers")

from plugin_cases import COMMON, CONFIGS, VOCABULARY, assert_same_gradients, build, ids  # noqa: E402

import fastsft.integrations.transformers  # noqa: E402, F401
from fastsft.integrations._attention import attention  # noqa: E402

FAMILY = pytest.mark.parametrize("family", CONFIGS)


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Any, Any]]:
    return {name: (build(config, "fastsft"), build(config, "eager")) for name, config in CONFIGS.items()}


def padding(left: int, right: int, rows: int = 3, length: int = 17) -> torch.Tensor:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :left] = 0
    mask[1, length - right :] = 0
    mask[2, :left] = 0
    mask[2, length - right :] = 0
    return mask


def loss(model: Any, kept: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
    """Sees every logit of tokens that are kept, and sends gradients through all of them."""
    logits = model(**inputs).logits
    weight = torch.linspace(-1, 1, VOCABULARY) * torch.linspace(0.5, 1.5, logits.shape[1])[:, None]
    each = (logits * weight).sum(-1)
    return (each if kept is None else each * kept).sum()


def compare(ours: Any, eager: Any, kept: torch.Tensor | None = None, **inputs: Any) -> None:
    losses = [loss(m, kept, **inputs) for m in (ours, eager)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for model, value in zip((ours, eager), losses, strict=True):
        model.zero_grad()
        value.backward()
    assert_same_gradients(ours, eager)


@FAMILY
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (0, 4), (5, 4)])
def test_padding(pairs: dict[str, tuple[Any, Any]], family: str, left: int, right: int) -> None:
    mask = padding(left, right)
    compare(*pairs[family], kept=mask, input_ids=ids(3, 17), attention_mask=mask, use_cache=False)


@FAMILY
@pytest.mark.parametrize("rows", [1, 3])
def test_documents_by_positions(pairs: dict[str, tuple[Any, Any]], family: str, rows: int) -> None:
    lengths = [[7, 10], [3, 9, 5], [1, 1, 15]][:rows]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    compare(*pairs[family], input_ids=ids(rows, 17), position_ids=positions, use_cache=False)


def test_a_document_may_begin_in_its_middle_at_the_beginning_of_a_row(pairs: dict[str, tuple[Any, Any]]) -> None:
    positions = torch.cat([torch.arange(5, 9), torch.arange(6)])[None]
    compare(*pairs["mistral"], input_ids=ids(1, 10), position_ids=positions, use_cache=False)


@FAMILY
def test_packed_documents_are_what_they_are_alone(pairs: dict[str, tuple[Any, Any]], family: str) -> None:
    """By the keys that padding-free collators emit."""
    ours, eager = pairs[family]
    lengths = [4, 9, 1, 12, 2]
    tokens = ids(1, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = ours(
        input_ids=tokens, position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=12, max_length_k=12,
        seq_idx=torch.repeat_interleave(torch.arange(5, dtype=torch.int32), torch.tensor(lengths))[None],
        use_cache=False,
    ).logits  # fmt: skip
    alone = torch.cat([eager(input_ids=t).logits for t in tokens.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@FAMILY
@pytest.mark.parametrize("left", [0, 5])
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}])
def test_generate(pairs: dict[str, tuple[Any, Any]], family: str, left: int, how: dict[str, Any]) -> None:
    """Prefill, then one token at a time from a cache; windows are shorter than what is generated."""
    mask = padding(left, 0)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, **how}
    ours, theirs = (m.generate(ids(3, 17), **options) for m in pairs[family])
    assert torch.equal(ours, theirs)


@FAMILY
@pytest.mark.parametrize("left", [0, 5])
def test_a_prompt_in_parts(pairs: dict[str, tuple[Any, Any]], family: str, left: int) -> None:
    """Fewer queries than keys, aligned at the end."""
    tokens, mask = ids(3, 17), padding(left, 0)
    found = []
    for model in pairs[family]:
        cache, parts = None, []
        for begin, end in ((0, 3), (3, 11), (11, 12), (12, 17)):
            out = model(
                input_ids=tokens[:, begin:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            parts.append(out.logits)
        found.append(torch.cat(parts, 1)[mask.bool()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_bfloat16_and_activations_in_float32() -> None:
    """PEFT keeps norms in float32; attention answers in the model's type."""
    model = build(CONFIGS["qwen3"], "fastsft").to(torch.bfloat16)
    layer = model.model.layers[0].self_attn
    query, key, value = (torch.randn(2, h, 9, 32) for h in (4, 2, 2))
    out, probabilities = attention(layer, query, key, value, None, scaling=0.2)
    assert (out.dtype, probabilities) == (torch.bfloat16, None)
    assert (out.shape, out.is_contiguous()) == ((2, 9, 4, 32), True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(out.float(), expected.transpose(1, 2), rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(layer.float(), query, key, value)[0].dtype == torch.bfloat16
    assert attention(layer, query, key, value)[0].dtype == torch.float32


def test_values_of_a_smaller_head() -> None:
    query, key, value = torch.randn(1, 2, 9, 48), torch.randn(1, 2, 9, 48), torch.randn(1, 2, 9, 24)
    out, _ = attention(torch.nn.Identity(), query, key, value, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_without_causality() -> None:
    query, key, value = (torch.randn(2, 2, n, 32) for n in (5, 9, 9))
    out, _ = attention(torch.nn.Identity(), query, key, value, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


WINDOWS: dict[str, Any] = {
    "by the layer alone": transformers.OlmoeConfig(**COMMON, num_experts=2, num_experts_per_tok=1, sliding_window=6),
    "by the mask alone": transformers.PhimoeConfig(**COMMON, num_local_experts=2, sliding_window=6),
}  # fmt: skip


@pytest.mark.parametrize("who", WINDOWS)
def test_a_window_that_only_one_of_mask_and_layer_has_is_refused(who: str) -> None:
    """transformers' other attentions go by the mask. Where the window is too long to matter, so do we."""
    ours, eager = (build(WINDOWS[who], attention) for attention in ("fastsft", "eager"))
    short = {"input_ids": ids(2, 6), "use_cache": False}
    torch.testing.assert_close(ours(**short).logits, eager(**short).logits, rtol=1e-5, atol=1e-5)
    packed = {**short, "input_ids": ids(2, 12), "position_ids": torch.arange(6).repeat(2)[None].expand(2, -1)}
    torch.testing.assert_close(ours(**packed).logits, eager(**packed).logits, rtol=1e-5, atol=1e-5)
    for mask in (None, padding(5, 4)):
        with pytest.raises(ValueError, match="sliding_window: expected what the model's mask says"):
            ours(input_ids=ids(3, 17), attention_mask=mask, use_cache=False)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="sliding_window: expected what the model's mask says"):
        torch.compile(ours.model, backend="aot_eager")(input_ids=ids(3, 17), use_cache=False)


@pytest.mark.parametrize("left", [0, 5])
def test_a_mask_that_no_layer_uses_is_not_refused(left: int) -> None:
    """Qwen2-MoE without a window makes one of 0 tokens all the same."""
    config = transformers.Qwen2MoeConfig(**COMMON, num_experts=2, num_experts_per_tok=1)
    ours, eager = (build(config, attention) for attention in ("fastsft", "eager"))
    mask = padding(left, 0)
    compare(ours, eager, kept=mask, input_ids=ids(3, 17), attention_mask=mask, use_cache=False)
    compare(ours, eager, input_ids=ids(3, 17), use_cache=False)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(*(m.generate(ids(3, 17), **options) for m in (ours, eager)))


@pytest.fixture(scope="module")
def in_chunks() -> tuple[Any, Any]:
    config = transformers.Llama4TextConfig(
        **COMMON, head_dim=16, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=6,
        no_rope_layers=[1, 1],
    )  # fmt: skip
    return build(config, "fastsft"), build(config, "eager")


def test_chunks(in_chunks: tuple[Any, Any]) -> None:
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None].expand(3, -1)
    for how in ({}, {"position_ids": positions}):
        compare(*in_chunks, input_ids=ids(3, 17), use_cache=False, **how)
    mask = padding(3, 4, length=9)
    compare(*in_chunks, kept=mask, input_ids=ids(3, 9), attention_mask=mask[:, :9], use_cache=False)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("position", [3, 5, 6, 8, 12])
def test_chunks_with_a_cache_are_refused_after_the_first_one(
    in_chunks: tuple[Any, Any], cache: str, position: int
) -> None:
    """One token at a time the mask has one query, and no neighbours between which it could be cut."""
    ours, eager = in_chunks
    tokens = ids(2, 14)
    if cache == "dynamic":
        past = transformers.DynamicCache(config=ours.config)
    else:
        past = transformers.StaticCache(config=ours.config, max_cache_len=14)
    eager(input_ids=tokens[:, :position], past_key_values=past)
    step = {"input_ids": tokens[:, position : position + 1], "past_key_values": past}
    if position < 6:
        expected = eager(input_ids=tokens, use_cache=False).logits[:, position : position + 1]
        torch.testing.assert_close(ours(**step).logits, expected, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="attention_mask: expected full or sliding-window attention"):
            ours(**step)


def test_chunks_by_bounds_of_documents_are_refused_where_one_is_longer(in_chunks: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="sliding_window: expected what the model's mask says"):
        in_chunks[0](input_ids=ids(1, 10), cu_seq_lens_q=torch.tensor([0, 3, 10], dtype=torch.int32), use_cache=False)


def test_packed_rows_compiled_in_one_graph(pairs: dict[str, tuple[Any, Any]]) -> None:
    """Windows and caps too. (Padded rows: with the loss, in test_plugin_enable.py.)"""
    torch.compiler.reset()
    ours, eager = pairs["gemma2"]
    positions = torch.cat([torch.arange(7), torch.arange(10)])[None].expand(3, -1)
    inputs = {"input_ids": ids(3, 17), "position_ids": positions, "use_cache": False}
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(compiled, eager(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_layers_compiled_one_by_one(pairs: dict[str, tuple[Any, Any]]) -> None:
    torch.compiler.reset()
    ours, theirs = copy.deepcopy(pairs["qwen3"][0]), pairs["qwen3"][1]
    for layer in ours.model.layers:
        layer.compile(fullgraph=True, backend="eager")
    tokens = ids(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    found, expected = (model(tokens, attention_mask=mask).logits[mask.bool()] for model in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
