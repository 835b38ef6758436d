"""attn_implementation="fastsft": what is ambiguous or not computed is refused, naming the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint

transformers = pytest.importorskip("transformers")

from plugin_cases import COMMON, CONFIGS, build, ids  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
)

import fastsft.integrations.transformers  # noqa: E402, F401
from fastsft.integrations._attention import attention  # noqa: E402
from fastsft.integrations._layout import check_positions, layout_in, layout_mask  # noqa: E402


@pytest.fixture(scope="module")
def llama() -> Any:
    return build(CONFIGS["llama"], "fastsft")


ONE = torch.ones(1, 10, dtype=torch.long)
RESTART = torch.cat([torch.arange(4), torch.arange(6)])[None]
BOUNDS = torch.tensor([0, 4, 10], dtype=torch.int32)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"position_ids": RESTART, "attention_mask": ONE}, "position_ids: they restart or jump within"),
        ({"position_ids": RESTART, "use_cache": True}, "position_ids: they restart or jump within"),
        ({"position_ids": torch.tensor([[0, 1, 2, 7, 8, 9, 10, 11, 12, 13]])}, "position_ids: they jump to a number"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1]])}, "got zeros between ones"),
        ({"attention_mask": torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()}, "attention_mask: expected a 2-D mask"),
        (
            {"attention_mask": torch.tensor([[0] * 4 + [1] * 6]), "cu_seq_lens_q": BOUNDS},
            "attention_mask: expected neither padding nor a cache with cu_seq_lens_q",
        ),
        ({"input_ids": ids(2, 10), "cu_seq_lens_q": BOUNDS}, "cu_seq_lens_q: expected one packed row with it"),
    ],
)  # fmt: skip
def test_ambiguous_inputs_are_refused(llama: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama(**{"input_ids": ids(1, 10), "use_cache": False, **inputs})


@pytest.mark.parametrize("kind", [transformers.OPTConfig, transformers.BioGptConfig])
def test_models_that_make_their_mask_without_positions_need_bounds_for_documents(kind: Any) -> None:
    model = build(kind(**COMMON, ffn_dim=96, word_embed_proj_dim=64), "fastsft")
    inputs = {"input_ids": ids(1, 10), "position_ids": RESTART, "use_cache": False}
    with pytest.raises(ValueError, match="for models that make their mask without position_ids"):
        model(**inputs)
    packed = model(**inputs, cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS).logits
    alone = [model(input_ids=x, use_cache=False).logits for x in inputs["input_ids"].split([4, 6], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "option", [{"dropout": 0.1}, {"s_aux": torch.ones(2)}, {"position_bias": torch.ones(1)}, {"cache": object()},
               {"output_attentions": True}, {"is_causal": False, "sliding_window": 4}],
)  # fmt: skip
def test_what_is_not_computed_is_refused(option: dict[str, Any]) -> None:
    x = torch.randn(1, 2, 5, 32)
    with pytest.raises(ValueError, match=f"fastsft attention: {list(option)[-1]}: expected"):
        attention(torch.nn.Identity(), x, x, x, **option)
    wide = torch.randn(1, 2, 5, 300)
    with pytest.raises(ValueError, match="a head size of at most 256"):
        attention(torch.nn.Identity(), wide, wide, wide)


def test_masks_with_functions_of_their_own_are_refused() -> None:
    model = build(CONFIGS["llama"], "fastsft")
    shape = {"config": model.config, "inputs_embeds": torch.randn(1, 6, 64), "attention_mask": None}
    with pytest.raises(ValueError, match="or_mask_function: expected neither"):
        create_causal_mask(**shape, past_key_values=None, or_mask_function=lambda b, h, q, k: q == k)
    with pytest.raises(ValueError, match="expected a causal mask"):
        create_bidirectional_mask(**shape)


def test_models_that_compute_with_the_mask_themselves_are_refused() -> None:
    config = transformers.DogeConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastsft")
    tokens = ids(2, 9)
    with pytest.raises(ValueError, match=r"attention_mask: .* own code computes with it \(__getitem__\)"):
        model(tokens, attention_mask=torch.ones_like(tokens))


def test_a_mask_says_nothing_but_where_it_lies_and_may_be_moved() -> None:
    mask = layout_mask(2, 5, 5)
    assert len(mask.shape) == mask.ndim == mask.dim() == 4
    assert mask.device.type == "cpu"
    # what checkpointing on a GPU and FSDP's mixed precision ask of their arguments
    assert mask.get_device() == -1
    assert (torch.is_floating_point(mask), mask.is_floating_point(), torch.is_complex(mask)) == (False, False, False)
    x = torch.ones(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(lambda x, _: 2 * x, x, mask, use_reentrant=True).sum().backward()
    for copied in (mask.to("cpu"), mask.clone(), mask.detach()):
        assert type(copied) is type(mask)
        assert layout_in(copied).equal(layout_in(mask))
    for compute in (
        lambda: mask + 1, lambda: mask.sum(-1), lambda: mask[..., :3], lambda: mask.shape[-1], lambda: [*mask.shape],
        lambda: mask.size(-1), lambda: torch.nn.functional.pad(mask, (0, 1)), lambda: mask == 0, lambda: mask.T,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="attention_mask: expected a model that only hands it to its attention"):
            compute()


def test_attention_probabilities_are_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"output_attentions"):
        llama(input_ids=ids(1, 5), output_attentions=True)


def test_a_compiled_graph_stops_at_what_is_refused() -> None:
    torch.compiler.reset()

    def part_of_a_model(mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        layout = layout_mask(1, 10, 10, mask_function=causal_mask_function, attention_mask=mask)
        check_positions(*layout[0, 0, :2], positions, 1, 10)
        return layout

    compiled = torch.compile(part_of_a_model, fullgraph=True, backend="aot_eager")
    one_by_one = torch.arange(10)[None]
    bounds = [[0, 0, 0, 10, 10, 10]] * 2  # nothing before, the content, nothing after
    assert compiled(ONE, one_by_one)[0, 0, :2].tolist() == bounds
    with pytest.raises(RuntimeError, match="zeros between ones"):
        compiled(torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1]]), one_by_one)
    with pytest.raises(RuntimeError, match="they restart or jump within"):
        compiled(ONE, RESTART)
