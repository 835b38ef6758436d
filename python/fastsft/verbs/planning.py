"""``fastsft train --dry-run``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsft.verbs.console import print_json

if TYPE_CHECKING:
    from fastsft.config import Config

_SHOWN = 4


def show_plan(config: Config, *, json: bool) -> None:
    """Print what a run would do, and the first documents of its first batch."""
    from rich.console import Console
    from rich.table import Table

    from fastsft.data.notices import notices
    from fastsft.progress import bars
    from fastsft.train.plan import make_plan
    from fastsft.verbs.data import coloured

    with bars() as tell:
        plan = make_plan(config, progress=tell)
    if json:
        print_json(plan.to_dict())
        return
    console = Console(markup=False, highlight=False)
    trained = "" if plan.trained_parameters == plan.parameters else f" ({plan.trained_parameters:,} trained)"
    console.print(f"{plan.parameters:,} parameters{trained}, {plan.dtype}; {plan.objective}: {plan.reduction}")
    heads = ("stage", "steps", "epochs", "samples", "tokens", "trained", "warm-up", "peak rate", "last rate")
    table = Table(*heads, box=None)
    for s in plan.stages:
        about = "" if s.exact else "about "
        table.add_row(
            s.name, f"{about}{s.steps:,}", f"{s.epochs}", f"{s.samples:,}", f"{s.tokens:,}", f"{s.trained_tokens:,}",
            f"{s.warmup_steps:,}", f"{s.peak_rate:.3g}", f"{s.last_rate:.3g}",
        )  # fmt: skip
    console.print(table)
    console.print(f"up to {plan.tokens_per_step:,} tokens a step", soft_wrap=True)
    total = sum(plan.memory.values())
    parts = ", ".join(f"{name} {_size(size)}" for name, size in plan.memory.items())
    console.print(f"memory: about {_size(total)} of tensors, and the program's own: {parts}", soft_wrap=True)
    console.print(
        f"time: at least {_time(plan.seconds)}, at most {plan.tokens_per_second:,.0f} "
        f"tokens/s: what the matrix products take at {plan.matmul_flops_per_second / 1e9:,.0f} GFLOP/s",
        soft_wrap=True,
    )
    for line in notices(plan.prepared.report):
        console.print(line, soft_wrap=True)
    for line in plan.unusual:
        console.print(f"unusual: {line}", soft_wrap=True)
    console.print(f"\nfirst batch: {len(plan.first_batch)} samples", style="bold")
    for number in plan.first_batch[:_SHOWN]:
        sample = plan.prepared.train[number]
        console.print(f"\n{sample.source}", style="bold")
        console.print(coloured(sample, plan.prepared.tokenizer, console.is_terminal), soft_wrap=True)


def _time(seconds: float) -> str:
    import datetime

    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
