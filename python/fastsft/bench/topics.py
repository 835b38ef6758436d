"""The topics of ``fastsft bench``: which files of the suite each runs, and what they want installed."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Topic:
    """``benches``: stems of ``bench_<stem>.py``. ``packages``: modules that these use and fastsft does not need."""

    title: str
    benches: tuple[str, ...]
    packages: tuple[str, ...] = ()


TOPICS: dict[str, Topic] = {
    "attention": Topic("packed and paged attention", ("attention", "kv_cache")),
    "loss": Topic("linear cross-entropy and the objectives on it", ("loss",)),
    "layers": Topic("RMSNorm, rotary embedding, SwiGLU", ("norm", "rope", "activation")),
    "gemm": Topic("matrix products of training and of decoding", ("gemm", "matvec")),
    "sampling": Topic("drawing tokens", ("sampling",)),
    "train": Topic(
        "training steps, whole runs, TRL with the plug-in",
        ("train", "plugin", "step", "loss_curve"),
        ("trl", "accelerate", "transformers"),
    ),
    "decode": Topic(
        "generation: decoding, prompts, drafts, batches of requests",
        ("engine", "decoder", "engine_requests", "engine_drafts"),
        ("transformers",),
    ),
    "serve": Topic(
        "a server under load, long prompts beside running ones", ("serve", "engine_workers"), ("fastapi", "uvicorn")
    ),
    "dedup": Topic(
        "near-duplicates: signatures, clusters, whole files",
        ("duplicates", "minhash", "all_pairs", "digest", "dedup_files", "dedup_large"),
        ("scipy", "datasketch", "rensa", "gaoya"),
    ),
    "decontaminate": Topic("n-grams shared with evaluation sets", ("overlap",)),
    "fim": Topic("fill-in-the-middle", ("fim", "fim_rows"), ("tree_sitter", "tree_sitter_python")),
    "pack": Topic("packing of sequences", ("pack",), ("trl", "datasets", "accelerate")),
    "jsonl": Topic("reading JSON Lines", ("jsonl",), ("pyarrow",)),
    "sandbox": Topic("executing generated code", ("sandbox",)),
    "endurance": Topic("long runs, and runs that are killed", ("endurance", "train_kills")),
}  # fmt: skip


def topic_of(bench: str) -> str:
    return next(name for name, topic in TOPICS.items() if bench in topic.benches)


def chosen(names: Sequence[str]) -> dict[str, Topic]:
    """The topics of these names; ``all`` is every one.

    Raises:
        ValueError: none, or an unknown one.
    """
    if not names:
        raise ValueError(f"expected all or topics among {', '.join(TOPICS)}")
    for name in names:
        if name not in TOPICS and name != "all":
            near = difflib.get_close_matches(name, [*TOPICS, "all", "list", "compare"], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are all, {', '.join(TOPICS)}"
            raise ValueError(f"unknown topic {name!r}; {hint}")
    return TOPICS if "all" in names else {name: TOPICS[name] for name in dict.fromkeys(names)}


def suite() -> Path:
    """The folder of the benches: that of the checkout, or the one that the wheel carries."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parents[1] / "bench"
    return checkout if (checkout / "bench_attention.py").is_file() else package / "bench" / "suite"


def missing(topics: Iterable[Topic]) -> list[str]:
    """Modules that the topics would use and that are not installed."""
    wanted = dict.fromkeys(name for topic in topics for name in topic.packages)
    return [name for name in wanted if importlib.util.find_spec(name) is None]
