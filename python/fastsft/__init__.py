"""fastsft: native kernels, a trainer and an inference engine for supervised fine-tuning of code language models.

Everything below is imported on first use, so that ``import fastsft`` costs little beyond numpy and torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Bound at once: a submodule of the same name would otherwise replace the function when it is first imported.
from fastsft.info import info

if TYPE_CHECKING:
    from fastsft import ops
    from fastsft.config import Config, load_config
    from fastsft.data.decontaminate import decontaminate
    from fastsft.data.dedup import dedup
    from fastsft.data.prepare import prepare
    from fastsft.engine.llm import LLM
    from fastsft.engine.request import SamplingParams
    from fastsft.train import train

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Config",
    "SamplingParams",
    "__version__",
    "decontaminate",
    "dedup",
    "info",
    "load_config",
    "ops",
    "prepare",
    "train",
]

_HOME = {
    "LLM": "fastsft.engine.llm",
    "Config": "fastsft.config",
    "SamplingParams": "fastsft.engine.request",
    "decontaminate": "fastsft.data.decontaminate",
    "dedup": "fastsft.data.dedup",
    "load_config": "fastsft.config",
    "prepare": "fastsft.data.prepare",
}
_SUBPACKAGES = ("ops", "train")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastsft.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastsft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
