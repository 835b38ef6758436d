"""The tensors of a Hugging Face folder as they are stored: found, held against the model, read when asked for."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# stored by old checkpoints, recomputed from the configuration
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")

_FLOATS = {"F64", "F32", "F16", "BF16"}
_LISTED = 20


def hf_name(name: str) -> str:
    """What transformers calls a parameter of ours."""
    return name if name.startswith("lm_head.") else f"model.{name}"


class Stored:
    """One tensor in an open safetensors file; nothing of it is read before it is asked for."""

    def __init__(self, handle: Any, name: str, file: Path) -> None:
        self.file = file
        self._handle = handle
        self._name = name
        header = handle.get_slice(name)
        self.shape: list[int] = list(header.get_shape())
        self.dtype: str = header.get_dtype()

    def read(self) -> torch.Tensor:
        tensor: torch.Tensor = self._handle.get_tensor(self._name)
        return tensor

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Part of the first axis."""
        part: torch.Tensor = self._handle.get_slice(self._name)[begin:end]
        return part


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Every tensor of the folder by its stored name."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        placed = None
        files = [SINGLE]
    elif index.is_file():
        placed = _read_index(index)
        files = sorted(set(placed.values()))
    else:
        raise ValueError(f"{folder}: found neither {SINGLE} nor {INDEX}; other weight formats are not read")
    stored: dict[str, Stored] = {}
    for name in files:
        file = folder / name
        try:
            handle = stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
            stored |= {key: Stored(handle, key, file) for key in sorted(handle.keys())}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not a readable safetensors file: {error}") from error
    for key, name in (placed or {}).items():
        if key not in stored or stored[key].file.name != name:
            raise ValueError(f"{index}: places {key} in {name}, which does not hold it")
    return stored


def _read_index(index: Path) -> dict[str, str]:
    try:
        placed = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: not a safetensors index: {error!r}") from error
    if not isinstance(placed, dict) or not all(isinstance(v, str) and Path(v).name == v for v in placed.values()):
        raise ValueError(f"{index}: weight_map: expected tensor names mapped to file names in this folder")
    return placed


def match(model: Decoder, stored: dict[str, Stored], folder: Path) -> dict[str, torch.Tensor]:
    """Stored name -> parameter, with one error for everything that does not fit."""
    wanted: dict[str, torch.Tensor] = {hf_name(name): parameter for name, parameter in model.named_parameters()}
    tied = model.config.tie_word_embeddings
    if tied and EMBEDDING not in stored and HEAD in stored:
        wanted[HEAD] = wanted.pop(EMBEDDING)
    problems = [f"missing: {name}" for name in wanted if name not in stored]
    for name, tensor in stored.items():
        parameter = wanted.get(name)
        if parameter is None:
            if not IGNORED.fullmatch(name) and not (tied and name == HEAD):
                problems.append(f"unexpected: {name} in {tensor.file.name}")
        elif tensor.shape != list(parameter.shape):
            problems.append(
                f"shape: {name} in {tensor.file.name}: expected {list(parameter.shape)}, got {tensor.shape}"
            )
        elif tensor.dtype not in _FLOATS:
            problems.append(f"type: {name} in {tensor.file.name}: expected floating point, got {tensor.dtype}")
    if problems:
        more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise ValueError(f"{folder}: the tensors do not fit config.json:\n  " + "\n  ".join(problems[:_LISTED] + more))
    return wanted


def check_tied(config: ModelConfig, stored: dict[str, Stored]) -> None:
    """A tied head that is stored beside its embedding has to equal it. transformers quietly unties such a model; its
    owner should decide."""
    if not (config.tie_word_embeddings and HEAD in stored and EMBEDDING in stored):
        return
    head = stored[HEAD]
    if not torch.equal(head.read(), stored[EMBEDDING].read()):
        raise ValueError(
            f"{head.file}: {HEAD} differs from {EMBEDDING} although config.json ties them; "
            "set tie_word_embeddings to false or remove one of the tensors"
        )
