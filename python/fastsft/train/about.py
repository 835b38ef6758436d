"""about.json of a run: what a report says beside the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import torch

from fastsft import info
from fastsft.models.decoder import Decoder
from fastsft.train.checkpoint import write_file


def write_about(path: Path, *, model: Decoder, total_steps: int, plan: str, rate: float, data: dict[str, Any]) -> None:
    """Environment, size and data of the run; written anew by each process of it.

    Args:
        rate: FLOP/s of the machine's matrix product, which MFU is measured against.
        data: the report of ``fastsft prepare``.
    """
    values = {
        "plan": plan,
        "total_steps": total_steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "matmul_flops_per_second": rate,
        "torch_threads": torch.get_num_threads(),
        "environment": info(),
        "data": data,
    }
    write_file(path, orjson.dumps(values, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode() + "\n")
