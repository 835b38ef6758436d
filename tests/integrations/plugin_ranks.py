"""A process of ``test_plugin_ranks.py``: ``python plugin_ranks.py RANK PORT``, of two."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from plugin_cases import CONFIGS, build, ids
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastsft.integrations.transformers import enable

ROWS = 4


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels of both processes' rows; unlike numbers of labels."""
    tokens = ids(ROWS, 17)
    mask = torch.ones_like(tokens)
    mask[0, 9:] = 0
    mask[3, :6] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[3, 6] = -100  # would be predicted from padding
    return tokens, mask, labels


def alone() -> dict[str, torch.Tensor]:
    """The gradients of one process without any of it."""
    model = build(CONFIGS["qwen3"], "eager").train()
    tokens, mask, labels = batch()
    model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def wrapped(how: str) -> Any:
    model = enable(build(CONFIGS["qwen3"], "eager").train())
    if how == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if how == "fsdp, head apart":
        fully_shard(model.lm_head)
    return fully_shard(model)


def main(rank: int, port: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    expected = alone()
    tokens, mask, labels = batch()
    total = (labels[:, 1:] != -100).sum()
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for how in ("ddp", "fsdp", "fsdp, head apart"):
        model = wrapped(how)
        # Gradients are averaged over the processes.
        loss = (
            2
            * model(
                input_ids=tokens[mine], attention_mask=mask[mine], labels=labels[mine], num_items_in_batch=total
            ).loss
        )
        loss.backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.full_tensor() if how != "ddp" else parameter.grad
            reference = expected[name.removeprefix("module.")]
            limit = 1e-4 * float(reference.abs().max())
            torch.testing.assert_close(gradient, reference, rtol=0, atol=limit, msg=f"{how}: {name}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
