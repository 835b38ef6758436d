"""MinHash signatures, clusters and fill-in-the-middle on a GPU against the same ops on the CPU, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_case import Case, Contestant, Entry, Setting, same_bits
from shapes import GSM8K_DECILES, from_deciles

from fastsft import ops

PERMUTATIONS = 128


def documents(setting: Setting, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and offsets; every other document is a copy of one before, with a token in sixteen replaced."""
    mix = from_deciles("gsm8k", GSM8K_DECILES, tokens)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32_000, (mix.tokens,), generator=g, dtype=torch.int32)
    offsets = [0, *itertools.accumulate(mix.lengths)]
    for i in range(1, len(mix.lengths), 2):
        n = min(mix.lengths[i - 1], mix.lengths[i])
        ids[offsets[i] : offsets[i] + n] = ids[offsets[i - 1] : offsets[i - 1] + n]
    noise = torch.rand(mix.tokens, generator=g) < 1 / 16
    ids[noise] = torch.randint(0, 32_000, (int(noise.sum()),), generator=g, dtype=torch.int32)
    return ids.to(setting.device), mix.cu_seqlens.to(setting.device)


def against_cpu(op: Callable[..., Any], inputs: Sequence[torch.Tensor], moved: float | None = None) -> Case:
    on_cpu = [x.cpu() for x in inputs]

    def results(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        out = op(*tensors)
        return [out] if isinstance(out, torch.Tensor) else list(out)

    return Case(
        {
            "fastsft": Contestant(lambda: results(inputs), same_bits(results(on_cpu))),
            "fastsft on the CPU": Contestant(lambda: results(on_cpu), host=True),
        },
        moved=moved,
    )


def multiply_adds(ids: torch.Tensor, count: int) -> Callable[[], torch.Tensor]:
    """``count`` integer multiply-adds per token and nothing else: what the signatures cannot do without."""
    factor, summand = (torch.tensor(x, dtype=torch.int32, device=ids.device) for x in (0x5BD1E995, 0x1B873593))

    def chain(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        for _ in range(count):
            x = x * a + b
        return x

    run = torch.compile(chain) if ids.is_cuda else chain  # one kernel, not two per step
    return lambda: run(ids, factor, summand)


def signatures(setting: Setting) -> Case:
    inputs = documents(setting, 2000 if setting.small else 1 << 24)
    case = against_cpu(lambda ids, cu: ops.minhash_token_signatures(ids, cu, num_perm=PERMUTATIONS), inputs)
    case.contestants["the multiply-adds alone"] = Contestant(multiply_adds(inputs[0], PERMUTATIONS))
    return case


def clusters(setting: Setting) -> Case:
    inputs = documents(setting, 2000 if setting.small else 1 << 23)
    return against_cpu(ops.lsh_clusters, [ops.minhash_token_signatures(*inputs, num_perm=PERMUTATIONS)])


def fim(setting: Setting) -> Case:
    ids, cu = documents(setting, 2000 if setting.small else 1 << 25)
    moved = len(ids) * (4 + 4 + 8)  # a token read, a token and its source written
    op = lambda ids, cu: ops.fim_permute(ids, cu, sentinels=(32_000, 32_001, 32_002), seed=0)  # noqa: E731
    return against_cpu(op, [ids, cu], moved)


ENTRIES = [
    Entry("minhash", f"signatures, {PERMUTATIONS} permutations", signatures),
    Entry("minhash", "clusters (LSH)", clusters),
    Entry("minhash", "fill-in-the-middle", fim),
]
