"""The hidden states that a step gives beside the logits: what the head multiplies, in the place asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_cases import BLOCK, SHAPE, model_of, tokens_of

from fastsft import ops
from fastsft.models.attend import VarlenAttend
from fastsft.models.packed import PackedDecoder, pack_decoder

WANTED = torch.tensor([599, 3, 3, 70])


def step(packed: PackedDecoder, tokens: list[int], hidden: torch.Tensor | None) -> torch.Tensor:
    kv_format = str(packed.dtype).removeprefix("torch.")
    blocks = -(-len(tokens) // BLOCK)
    options: dict[str, Any] = {"kv_format": kv_format, "block_size": BLOCK}
    bounds = [torch.tensor(x, dtype=torch.int32) for x in ([list(range(blocks))], [0, len(tokens)], [len(tokens)])]
    cache = packed.new_cache(blocks, **options)
    return packed.step(torch.tensor(tokens), cache, *bounds, WANTED, **options, hidden=hidden)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_they_are_what_the_head_multiplies(format: str) -> None:
    """Of more rows than go through a layer at once."""
    packed, (tokens,) = pack_decoder(model_of("llama"), format), tokens_of(600)
    hidden = torch.full((len(WANTED), SHAPE["hidden_size"]), torch.nan, dtype=packed.dtype)  # type: ignore[arg-type]
    logits = step(packed, tokens, hidden)
    assert torch.equal(logits, step(packed, tokens, None))
    again = ops.packed_linear(hidden, packed.weights.head)
    assert torch.equal(again, logits.to(packed.dtype))
    assert torch.equal(hidden[1], hidden[2])
    assert not torch.equal(hidden[0], hidden[1])


@torch.no_grad()
def test_they_are_those_of_training() -> None:
    model, (tokens,) = model_of("qwen3"), tokens_of(600)
    packed = pack_decoder(model, "float32")
    hidden = torch.empty(len(WANTED), model.config.hidden_size)
    step(packed, tokens, hidden)
    attend = VarlenAttend(torch.tensor([0, 600], dtype=torch.int32))
    expected = model(torch.tensor(tokens), torch.arange(600), attend)[WANTED]
    assert (hidden - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("shape", [(3, 96), (4, 95)])
def test_another_shape_is_refused(shape: tuple[int, int]) -> None:
    packed, (tokens,) = pack_decoder(model_of("llama"), "float32"), tokens_of(600)
    with pytest.raises(ValueError, match="decoder_step: hidden: "):
        step(packed, tokens, torch.empty(shape))
    with pytest.raises(ValueError, match="decoder_step: hidden: "):
        step(packed, tokens, torch.empty(4, 96, dtype=torch.bfloat16))
