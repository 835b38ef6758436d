"""``fastsft train`` and ``fastsft generate``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastsft.verbs.console import UsageError, print_json
from fastsft.verbs.planning import show_plan
from fastsft.verbs.speculating import read_speculation

if TYPE_CHECKING:
    from fastsft.config import Config


def train(config: Config, *, dry_run: bool = False, json: bool = False) -> None:
    """Run a configuration, or go on where it stopped.

    Args:
        dry_run: print what the run would do: steps, tokens, memory, time at best, the first batch.
        json: machine-readable result on the last line.
    """
    if dry_run:
        show_plan(config, json=json)
        return
    import fastsft
    from fastsft.train.distributed import joined

    with joined() as world:
        result = fastsft.train(config)
    if not world.is_main:
        return
    if json:
        print_json({**dataclasses.asdict(result), "model_path": str(result.model_path)})
        return
    from fastsft.data.notices import notices

    for line in notices(result.data):
        print(line)
    before, after = result.eval_before, result.eval_after
    losses = f"; held-out loss {before.loss:.4f} -> {after.loss:.4f}" if before and after else ""
    speed = "finished before" if result.tokens_per_second is None else f"{result.tokens_per_second:,.0f} tokens/s"
    if early := result.early:
        print(f"first {early.steps} steps: mean loss {early.loss:.4f}, mean gradient norm {early.grad_norm:.4g}")
    print(f"{result.steps} steps, {speed}{losses}\nmodel: {result.model_path}")


def generate(
    model: Path,
    /,
    *,
    prompt: str | None = None,
    chat: str | None = None,
    infill: tuple[str, str] | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    n: int = 1,
    stop: tuple[str, ...] = (),
    dtype: Literal["float32", "bfloat16"] = "float32",
    speculative_config: str | None = None,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Continue a prompt, answer a message, or fill in the middle.

    Args:
        model: folder with config.json, weights and tokenizer.
        prompt: text to continue.
        chat: a user message, written out by the model's chat template.
        infill: prefix and suffix; the model writes what is between them.
        max_tokens: most tokens to generate.
        temperature: 0 is greedy.
        top_k: draw among this many tokens; 0 is all.
        top_p: draw among the most probable tokens that have this share together.
        seed: makes a draw repeatable.
        n: continuations.
        stop: strings that end the text.
        dtype: of weights and cache.
        speculative_config: guess tokens and check several in a step: JSON such as '{"method": "ngram"}'
            (docs/engine.md).
        device: cpu, or cuda for a GPU, whose kernels are of --dtype bfloat16.
        json: machine-readable output.
    """
    import torch

    import fastsft

    if sum(x is not None for x in (prompt, chat, infill)) != 1:
        raise UsageError("generate: give exactly one of --prompt, --chat and --infill")
    params = fastsft.SamplingParams(
        n=n, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop, max_tokens=max_tokens
    )
    speculation = read_speculation("generate", speculative_config)
    llm = fastsft.LLM(model, dtype=getattr(torch, dtype), device=device, speculative_config=speculation)
    if infill is not None:
        result = llm.infill(*infill, params)
    elif chat is not None:
        result = llm.chat([{"role": "user", "content": chat}], params)[0]
    else:
        result = llm.generate(str(prompt), params)[0]
    if json:
        print_json(dataclasses.asdict(result))
        return
    for output in result.outputs:
        print(output.text if n == 1 else f"--- {output.index} ({output.finish_reason})\n{output.text}")
