"""Fine-tune every weight of a Hugging Face model in a loop of your own, on packed documents.

    python examples/transformers_loop.py path/or/name/of/a/model

transformers computes the model; its attention is fastsft's, over the documents of one packed row, and its loss is
fastsft's: no padding, no mask tensor and no [tokens, vocabulary] logits. Without a name, a tiny model with random
weights stands in, so that the loop can be tried without a download.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers

from fastsft import ops


def packed_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
    *, scaling: float, cu_seq_lens_q: torch.Tensor, **rest: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What transformers calls in each layer, with tensors of [1, heads, T, D]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return ops.varlen_attention(q, k, v, cu_seq_lens_q, scale=scaling)[None], None


transformers.AttentionInterface.register("fastsft", packed_attention)


def load(name: str | None) -> Any:
    if name:
        return transformers.AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastsft", dtype="bfloat16")
    config = transformers.Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation="fastsft",
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def packed_loss(model: Any, documents: list[torch.Tensor]) -> torch.Tensor:
    """Mean negative log-likelihood of the documents' tokens, each predicted from those before it."""
    lengths = torch.tensor([len(d) for d in documents])
    ends = lengths.cumsum(0)
    ids = torch.cat(documents)
    targets = ids.roll(-1)
    targets[ends - 1] = -100  # a document's last token predicts nothing
    cu_seqlens = torch.cat([torch.zeros(1), ends]).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    hidden = model.model(input_ids=ids[None], position_ids=positions[None], cu_seq_lens_q=cu_seqlens, use_cache=False)
    return ops.linear_cross_entropy(hidden.last_hidden_state[0], model.lm_head.weight, targets)


def main(name: str | None = None, steps: int = 20) -> tuple[float, float]:
    """Train and return the first and the last loss."""
    torch.manual_seed(0)
    model = load(name)
    texts = [f"def add_{n}(x):\n    return x + {n}\n" for n in range(16)]
    if name:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        documents = [torch.tensor(tokenizer.encode(text)) for text in texts]
    else:
        documents = [torch.tensor(list(text.encode())) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if name else 3e-3)
    losses: list[float] = []
    for step in range(steps):
        loss = packed_loss(model, documents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step:3}  loss {losses[-1]:.4f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main(*sys.argv[1:2])
