"""A small architecture, and what the tests of model folders compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from parity_table import TINY
from safetensors.torch import load_file, save_file

from fastsft.models.decoder import Decoder

LLAMA = TINY | {"model_type": "llama"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def equal_weights(a: Decoder, b: Decoder) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


def edited(folder: Path, edit: Any) -> None:
    """Apply ``edit`` to the tensors of a single-file folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
