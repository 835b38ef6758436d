"""Heads that guess further tokens from a decoder's last hidden state (Medusa, arXiv 2401.10774), and their folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from fastsft.models.layers import Linear

_CONFIG, _WEIGHTS = "config.json", "heads.safetensors"


class DraftHeads(nn.Module):
    """Head i, counted from 1, guesses token t + 1 + i where the decoder predicts token t + 1.

    Each is h + silu(W h + b), to which the decoder's own language model head is applied. W and b begin at zero, so that
    every head begins as that head itself.

    Args:
        count: how many.
        hidden_size: the decoder's D.
    """

    def __init__(self, count: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.heads = nn.ModuleList(Linear(hidden_size, hidden_size) for _ in range(count))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def __len__(self) -> int:
        return len(self.heads)

    def forward(self, hidden_TD: torch.Tensor, number: int) -> torch.Tensor:
        """[T, D] of head ``number``, counted from 0, for the language model head."""
        guess_TD: torch.Tensor = hidden_TD + F.silu(self.heads[number](hidden_TD))
        return guess_TD


def save_heads(heads: DraftHeads, folder: Path, *, vocab_size: int) -> None:
    """Write config.json and heads.safetensors into an existing folder."""
    config = {"kind": "residual_silu", "heads": len(heads), "hidden_size": heads.hidden_size, "vocab_size": vocab_size}
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / _WEIGHTS)


def load_heads(folder: str | os.PathLike[str], *, hidden_size: int, vocab_size: int) -> DraftHeads:
    """Read a folder of :func:`save_heads`, for a decoder of these sizes.

    Raises:
        ValueError: no such folder, heads of another kind or for another model, or tensors that do not fit the config.
    """
    root = Path(folder)
    try:
        config = json.loads((root / _CONFIG).read_text())
        tensors = safetensors.torch.load_file(root / _WEIGHTS)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{root}: expected a folder with {_CONFIG} and {_WEIGHTS}: {error}") from None
    expected = {"kind": "residual_silu", "hidden_size": hidden_size, "vocab_size": vocab_size}
    if not isinstance(config, dict):
        raise ValueError(f"{root / _CONFIG}: expected an object, got {config!r:.100}")
    for name, value in expected.items():
        if config.get(name) != value:
            raise ValueError(f"{root / _CONFIG}: {name}: expected {value!r}, got {config.get(name)!r}")
    count = config.get("heads")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{root / _CONFIG}: heads: expected an integer >= 1, got {count!r}")
    shapes: dict[str, tuple[int, ...]] = {f"heads.{i}.weight": (hidden_size, hidden_size) for i in range(count)}
    shapes |= {f"heads.{i}.bias": (hidden_size,) for i in range(count)}
    if (found := {name: tuple(tensor.shape) for name, tensor in tensors.items()}) != shapes:
        raise ValueError(f"{root / _WEIGHTS}: expected {shapes}, got {found}")
    heads = DraftHeads(count, hidden_size).to(next(iter(tensors.values())).dtype)
    heads.load_state_dict(tensors)
    return heads
