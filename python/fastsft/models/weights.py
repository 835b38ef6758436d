"""Hugging Face model folders: config.json and safetensors in, the same out, byte for byte where nothing changed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastsft.files import sync
from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.skeleton import skeleton
from fastsft.models.stored import INDEX, SINGLE, check_tied, hf_name, match, open_tensors
from fastsft.models.tokenizer import FILES

_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def init_model(config: ModelConfig | Mapping[str, Any], *, seed: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """A randomly initialised model, as transformers does it: normal matrices, zero biases, norms of one.

    Args:
        config: the architecture, or the keys of a config.json.
        seed: the weights are a function of it and the sizes alone; they are drawn in float32 and then rounded.
        dtype: type of the parameters.

    Raises:
        ValueError: an unusable configuration; see :meth:`ModelConfig.from_hf`.
    """
    parsed = config if isinstance(config, ModelConfig) else ModelConfig.from_hf(config)
    model = _empty(parsed.with_keys(architectures=[parsed.architecture]), dtype, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                drawn = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(drawn.normal_(0, parsed.initializer_range, generator=generator))
        if parsed.pad_token_id is not None:
            model.embed_tokens.weight[parsed.pad_token_id] = 0
    return model


def load_model(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """Read a Hugging Face folder: config.json with model.safetensors, or shards with their index.

    Args:
        path: the folder.
        dtype: type of the parameters; stored float16, bfloat16, float32 and float64 weights are converted.
        device: where the parameters live.

    Raises:
        ValueError: no such folder or file, an unsupported configuration, a truncated or foreign file, or tensors that
            are missing, unexpected, of another shape or not floating point: all of them are listed with their files.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with config.json and *.safetensors")
    config = ModelConfig.from_file(folder / "config.json")
    model = _empty(config, dtype, device)
    with contextlib.ExitStack() as stack:
        stored = open_tensors(folder, stack)
        targets = match(model, stored, folder)
        with torch.no_grad():
            for name, parameter in targets.items():
                parameter.copy_(stored[name].read())
        check_tied(config, stored)
    return model


def save_model(
    model: Decoder,
    path: str | os.PathLike[str],
    *,
    files_from: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a Hugging Face folder that transformers, vLLM and :func:`load_model` read.

    Everything is written and synced under a temporary name first. A new folder then appears by one rename, whole or not
    at all. In a folder that exists the files are renamed into place one by one (each of them whole), other files stay,
    and weight files of an earlier save that are not part of this one are removed.

    Args:
        model: its parameters are stored in their own type; config.json is the one it was loaded with, except that a
            declared dtype follows the parameters.
        path: the folder.
        files_from: folder whose tokenizer, chat template and generation files are copied byte for byte.
        max_shard_bytes: above it the weights are split, in the model's order, into shards with an index.

    Raises:
        ValueError: ``files_from`` is no folder, ``max_shard_bytes`` is not positive, or the model has LoRA adapters.
    """
    if adapted := [name for name, _ in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]:
        raise ValueError(f"model: expected one without adapters, got {adapted[0]}: merge_lora it, or save_adapter")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}")
    if files_from is not None and not Path(files_from).is_dir():
        raise ValueError(f"files_from: expected a folder, got {os.fspath(files_from)!r}")
    target = Path(path).absolute()
    exists = target.is_dir()
    stage = target / f".save-{os.getpid()}.tmp" if exists else target.with_name(f".{target.name}-{os.getpid()}.tmp")
    stage.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        names = _write_weights(model, stage, max_shard_bytes)
        for name in FILES if files_from is not None else ():
            if (Path(files_from or "") / name).is_file():
                shutil.copyfile(Path(files_from or "") / name, stage / name)
                names.append(name)
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        (stage / "config.json").write_bytes(model.config.with_dtype(dtype).to_json().encode("utf-8"))
        names.append("config.json")
        for name in names:
            sync(stage / name)
        sync(stage)
        if exists:
            for name in names:
                os.replace(stage / name, target / name)
            for old in target.iterdir():
                if _WEIGHT_FILE.fullmatch(old.name) and old.name not in names:
                    old.unlink()
            sync(target)
        else:
            os.rename(stage, target)
            sync(target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _empty(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """A model with uninitialised parameters: torch's default initialisation of large matrices takes minutes."""
    with skeleton():
        model = Decoder(config)
    return model.to(dtype).to_empty(device=device)


def _write_weights(model: Decoder, stage: Path, max_shard_bytes: int) -> list[str]:
    """Write the weight files into ``stage``; return their names, the index last."""
    tensors = {hf_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        _save(shards[0], stage / SINGLE)
        return [SINGLE]
    names, placed = [], {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, stage / name)
        names.append(name)
        placed.update(dict.fromkeys(shard, name))
    metadata = {
        "total_parameters": sum(t.numel() for t in tensors.values()),
        "total_size": sum(t.nbytes for t in tensors.values()),
    }
    index = json.dumps({"metadata": metadata, "weight_map": placed}, indent=2, sort_keys=True) + "\n"
    (stage / INDEX).write_bytes(index.encode("utf-8"))
    return [*names, INDEX]


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    on_cpu = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, str(file), metadata={"format": "pt"})


def _shards(tensors: dict[str, torch.Tensor], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Fill shards in order; a tensor above the limit has one to itself."""
    shard: dict[str, torch.Tensor] = {}
    used = 0
    for name, tensor in tensors.items():
        if shard and used + tensor.nbytes > limit:
            yield shard
            shard, used = {}, 0
        shard[name] = tensor
        used += tensor.nbytes
    yield shard
