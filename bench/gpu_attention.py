"""Attention on a GPU: packed batches, single long documents, decoding; against torch's own kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from gpu_case import Case, Contestant, Entry, Setting, within_rule
from shapes import GSM8K_DECILES, LLAMA_8B, NL2BASH_DECILES, Heads, Mix, from_deciles, uniform
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from fastsft.ops import attention_plan, paged_attention, varlen_attention

Tensors = tuple[torch.Tensor, ...]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

DENSE = Heads("16 heads", query=16, key=16, dim=128)
TINY = Heads("tiny", query=4, key=1, dim=64)


def inputs(setting: Setting, mix: Mix, heads: Heads) -> Tensors:
    """q, k, v and the gradient of the output."""
    g = setting.generator()
    return tuple(
        torch.randn(mix.tokens, n, heads.dim, generator=g, device=setting.device).to(torch.bfloat16)
        for n in (heads.query, heads.key, heads.key, heads.query)
    )


def gradients(
    function: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, upstream: torch.Tensor
) -> Tensors:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def one_head_at_a_time(mix: Mix, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, upstream: torch.Tensor) -> Tensors:
    """Output and gradients from plain products, in the inputs' dtype; a single score matrix exists at a time."""
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    group = q.shape[1] // k.shape[1]
    begin = 0
    for n in mix.lengths:
        rows = slice(begin, begin + n)
        begin += n
        later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        for head in range(q.shape[1]):
            a, b, c, d = q[rows, head], k[rows, head // group], v[rows, head // group], upstream[rows, head]
            scale = a.shape[-1] ** -0.5
            p = (a @ b.T).mul_(scale).masked_fill_(later, float("-inf")).softmax(-1)
            out[rows, head] = p @ c
            dv[rows, head // group] += p.T @ d
            ds = (d @ c.T).sub_((d * out[rows, head]).sum(-1, keepdim=True)).mul_(p).mul_(scale)
            del p
            dq[rows, head] = ds @ b
            dk[rows, head // group] += ds.T @ a
    return out, dq, dk, dv


def rule(mix: Mix, tensors: Tensors) -> Callable[[Tensors], float]:
    """Judges by the heads of the first and the last key head: exact from float64, the yardstick SDPA by document."""
    keys = tensors[1].shape[1]
    group = tensors[0].shape[1] // keys
    kept_keys = sorted({0, keys - 1})
    kept = [h for key in kept_keys for h in range(key * group, (key + 1) * group)]
    which = (kept, kept_keys, kept_keys, kept)
    q, k, v, upstream = (x[:, heads].contiguous() for x, heads in zip(tensors, which, strict=True))

    def each(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.split(mix.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(*part) for part in parts])

    exact = one_head_at_a_time(mix, *(x.double() for x in (q, k, v, upstream)))
    judge = within_rule(exact, gradients(each, q, k, v, upstream))
    return lambda results: judge([x[:, heads] for x, heads in zip(results, (kept, *which[:3]), strict=True)])


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of one document, [T, H, D] in and out."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


# --- rivals: name -> what makes the function for a batch; a reason in place of those that are absent ------------------


def varlen_rival(mix: Mix, setting: Setting) -> Attention:
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters  # they differ between torch 2.10, 2.11 and 2.12
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    cu, longest = mix.cu_seqlens.to(setting.device), max(mix.lengths)
    return lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest, **options)


def flex_rival(mix: Mix, setting: Setting, *, mask_each_time: bool) -> Attention:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # or the backward pass could not be timed alone
    owner = torch.repeat_interleave(torch.arange(len(mix.lengths)), torch.tensor(mix.lengths)).to(setting.device)
    compiled, compiled_mask = torch.compile(flex_attention), torch.compile(create_block_mask)

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (owner[i] == owner[j]) & (i >= j)

    def mask() -> Any:
        return compiled_mask(visible, None, None, mix.tokens, mix.tokens, device=setting.device)

    kept = mask()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = compiled(q, k, v, block_mask=mask() if mask_each_time else kept, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    return run


def sdpa_rival(backend: SDPBackend) -> Attention:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return sdpa(q, k, v)

    return run


def add_rivals(case: Case, setting: Setting, makers: dict[str, Callable[[], Attention]], add: Any) -> None:
    """``add(name, attention)`` for each that is here."""
    for name, make in makers.items():
        if not setting.cuda:
            case.absent[name] = "needs CUDA"
            continue
        try:
            attention = make()
        except ImportError:
            case.absent[name] = "not installed"
        except Exception as error:  # a rival's failure must not end the run
            case.absent[name] = f"failed: {type(error).__name__}: {error}"
        else:
            add(name, attention)


# --- cases ------------------------------------------------------------------------------------------------------------


def training(mix: Mix, small: Mix, heads: Heads, mode: str) -> Callable[[Setting], Case]:
    """``mode``: forward, backward, or forward+backward."""

    def build(setting: Setting) -> Case:
        batch, shape = (small, TINY) if setting.small else (mix, heads)
        tensors = inputs(setting, batch, shape)
        q, k, v, upstream = tensors
        cu = batch.cu_seqlens.to(setting.device)
        plan = attention_plan(cu, total_q=batch.tokens)
        judge = rule(batch, tensors)
        products = {"forward": 2, "backward": 5, "forward+backward": 7}[mode]
        case = Case({}, flops=products * 2 * batch.causal_pairs * shape.query * shape.dim)

        def add(name: str, attention: Attention) -> None:
            case.contestants[name] = Contestant(timed(attention), lambda _: judge(gradients(attention, *tensors)))

        def timed(attention: Attention) -> Callable[[], Any]:
            if mode == "forward":
                return lambda: attention(q, k, v)
            if mode == "forward+backward":
                return lambda: gradients(attention, *tensors)
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            graph: list[torch.Tensor] = []  # made at the first call, where a failure is reported

            def backward() -> Any:
                if not graph:
                    graph.append(attention(*leaves))
                return torch.autograd.grad(graph[0], leaves, upstream, retain_graph=True)

            return backward

        add("fastsft", lambda q, k, v: varlen_attention(q, k, v, cu, plan=plan))
        if len(batch.lengths) == 1:
            rivals: dict[str, Callable[[], Attention]] = {
                "SDPA cuDNN": lambda: sdpa_rival(SDPBackend.CUDNN_ATTENTION),
                "SDPA flash": lambda: sdpa_rival(SDPBackend.FLASH_ATTENTION),
            }
        else:
            add("fastsft, plan made anew", lambda q, k, v: varlen_attention(q, k, v, cu))
            rivals = {
                "torch varlen_attn": lambda: varlen_rival(batch, setting),
                "FlexAttention": lambda: flex_rival(batch, setting, mask_each_time=False),
                "FlexAttention, mask made anew": lambda: flex_rival(batch, setting, mask_each_time=True),
            }
        if mode == "backward":
            for name in ("fastsft, plan made anew", "FlexAttention, mask made anew"):
                case.contestants.pop(name, None)
                rivals.pop(name, None)
        add_rivals(case, setting, rivals, add)
        return case

    return build


def decode(sequences: int, context: int, queries: int = 1) -> Callable[[Setting], Case]:
    """The last ``queries`` tokens of each sequence: with one, nothing but the cache matters to the time."""

    def build(setting: Setting) -> Case:
        count, length, heads = (3, 200, TINY) if setting.small else (sequences, context, LLAMA_8B)
        new = min(queries, 70) if setting.small else queries
        block_size = 16
        per_sequence = -(-length // block_size)
        g = setting.generator()
        shape = (count * per_sequence, block_size, heads.key, heads.dim)
        k, v = (torch.randn(shape, generator=g, device=setting.device).to(torch.bfloat16) for _ in range(2))
        q = torch.randn(count * new, heads.query, heads.dim, generator=g, device=setting.device).to(torch.bfloat16)
        table = torch.randperm(len(k), generator=g, device=setting.device).int().view(count, -1)
        cu = torch.arange(count + 1, dtype=torch.int32, device=setting.device) * new
        mask = None if new == 1 else causal_lower_right(new, length)
        lengths = torch.full((count,), length, dtype=torch.int32, device=setting.device)

        def gathered(x: torch.Tensor) -> torch.Tensor:
            return x[table.long()].flatten(1, 2)[:, :length].transpose(1, 2)

        def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            q = q.unflatten(0, (-1, new)).transpose(1, 2)
            out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1)

        def by_sequence(dtype: torch.dtype) -> torch.Tensor:
            rows = []
            for i in range(count):
                blocks = table[i].long()
                keys, values = (x[blocks].flatten(0, 1)[None, :length].transpose(1, 2).to(dtype) for x in (k, v))
                rows.append(attend(q[i * new : (i + 1) * new].to(dtype), keys, values))
            return torch.cat(rows)

        keys, values = gathered(k).contiguous(), gathered(v).contiguous()
        judge_all = within_rule([by_sequence(torch.float64)], [by_sequence(torch.bfloat16)])

        def judge(out: torch.Tensor) -> float:
            return judge_all([out])

        return Case(
            {
                "fastsft": Contestant(lambda: paged_attention(q, k, v, table, cu, lengths), judge),
                "gather + SDPA": Contestant(lambda: attend(q, gathered(k), gathered(v)), judge),
                "SDPA, already gathered": Contestant(lambda: attend(q, keys, values), judge),
            },
            flops=4 * count * heads.query * heads.dim * sum(range(length - new + 1, length + 1)),
            moved=2 * (2 * count * length * heads.key + 2 * count * new * heads.query) * heads.dim,
        )

    return build


TOKENS = 32 * 1024
MIXES = {
    "gsm8k lengths": from_deciles("gsm8k", GSM8K_DECILES, TOKENS),
    "nl2bash lengths": from_deciles("nl2bash", NL2BASH_DECILES, TOKENS),
}
SMALL = Mix("small", (64, 3, 130, 1))


def long_document(length: int, mode: str) -> Entry:
    build = training(uniform(1, length), uniform(1, 200), DENSE, mode)
    return Entry("attention", f"1 x {length // 1024}k causal, {mode}", build, quick=length == 8192)


ENTRIES = [
    *(
        Entry("attention", f"32k packed, {name}, {mode}", training(mix, SMALL, LLAMA_8B, mode), quick=i == 0)
        for i, (name, mix) in enumerate(MIXES.items())
        for mode in ("forward", "backward")
    ),
    Entry("attention", "512 x 64, forward+backward", training(uniform(512, 64), SMALL, LLAMA_8B, "forward+backward")),
    *(long_document(length, mode) for length in (8192, 16384) for mode in ("forward", "backward")),
    Entry("decode", "64 sequences x 4k", decode(64, 4096)),
    Entry("decode", "8 chunks of 512 at the end of 4k", decode(8, 4096, 512)),
]
