"""``fastsft check``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from fastsft.verbs.console import UsageError, print_json


def check(model: Path, /, *, dtype: Literal["float32", "bfloat16"] = "float32", json: bool = False) -> None:
    """Compare a model folder with what transformers makes of it: weights, logits, tokens, chat template.

    Exits with 1 if anything differs.

    Args:
        model: folder with config.json, weights and tokenizer.
        dtype: what both compute in, whatever the folder holds.
        json: machine-readable output.
    """
    import torch

    from fastsft.models.check import check_folder

    if not model.is_dir():
        raise UsageError(f"check: {model}: expected a folder with config.json and *.safetensors")
    try:
        from transformers.utils import logging

        quiet: Any = logging
        quiet.disable_progress_bar()
        findings = check_folder(model, dtype=getattr(torch, dtype))
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UsageError(
            "check: compares with transformers, which is not installed: pip install transformers"
        ) from None
    wrong = sum(f.ok is False for f in findings)
    if json:
        print_json({"ok": not wrong, "findings": [dataclasses.asdict(f) for f in findings]})
    else:
        for finding in findings:
            mark = {True: "ok", False: "WRONG", None: "-"}[finding.ok]
            print(f"{mark:<6} {finding.what}: {finding.detail}")
    if wrong:
        raise SystemExit(1)
