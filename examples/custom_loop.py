"""fastsft's two training ops in a loop of your own: packed attention and the fused linear cross-entropy.

    python examples/custom_loop.py

One attention layer learns to copy: each document is a random string of tokens twice over, and only the second half is
trained on. There is no padding, no mask tensor and no [tokens, vocabulary] logits.
"""

from __future__ import annotations

import torch
from torch import nn

from fastsft import ops

VOCAB, WIDTH, HEADS, HEAD_SIZE = 64, 128, 4, 32


class CopyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * HEAD_SIZE)
        self.head = nn.Linear(HEADS * HEAD_SIZE, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor, places: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(places)  # [T, WIDTH]
        q, k, v = self.qkv(x).view(-1, 3, HEADS, HEAD_SIZE).unbind(1)  # each [T, HEADS, HEAD_SIZE]
        return ops.varlen_attention(q, k, v, cu_seqlens).flatten(1)


def packed_batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """32 documents of 8 to 40 tokens end to end: ids, places, cu_seqlens, targets and a weight per target."""
    halves = torch.randint(4, 21, (32,), generator=generator).tolist()
    words = [torch.randint(VOCAB, (n,), generator=generator).repeat(2) for n in halves]
    # The target of a position is the next token; a document's last position has none, so its weight is 0.
    weights = [torch.tensor([0.0] * (n - 1) + [1.0] * n + [0.0]) for n in halves]
    cu_seqlens = torch.tensor([0, *(2 * n for n in halves)]).cumsum(0).to(torch.int32)
    places = [torch.arange(n).repeat(2) + torch.tensor([0] * n + [32] * n) for n in halves]
    ids = torch.cat(words)
    return ids, torch.cat(places), cu_seqlens, ids.roll(-1), torch.cat(weights)


def main(steps: int = 200) -> tuple[float, float]:
    """Train and return the first and the last loss."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = CopyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    for step in range(steps):
        ids, places, cu_seqlens, targets, weights = packed_batch(generator)
        hidden = model(ids, places, cu_seqlens)
        loss = ops.linear_cross_entropy(hidden, model.head.weight, targets, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4}  {len(ids)} tokens  loss {losses[-1]:.4f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
