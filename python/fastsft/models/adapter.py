"""LoRA adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors, out and in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastsft.files import sync
from fastsft.models.decoder import Decoder
from fastsft.models.layers import Linear
from fastsft.models.lora import LoraConfig, LoraLinear, add_lora, lora_layers, target_layers
from fastsft.models.stored import hf_name

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."

# Keys that say nothing about the function of the adapted model. Dropout acts in PEFT's training alone.
_SILENT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "bias", "init_lora_weights"}
# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA, LoftQ, ...) subtract from them.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")
_LISTED = 20


def save_adapter(model: Decoder, path: str | os.PathLike[str], *, base: str | None = None) -> None:
    """Write the adapters of a model for PEFT, vLLM and :func:`load_adapter`, in their own type.

    Args:
        path: the folder; made if missing, each of the two files is replaced as a whole.
        base: path or name of the base model, for who loads the adapter by itself.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model: expected one with adapters, found none")
    config = next(iter(layers.values())).config
    keys = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": list(config.targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": config.rank_stabilised,
    }
    tensors = {n: p.detach().to("cpu").contiguous() for n, p in _parameters(layers).items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    staged = {name: folder / f".{name}-{os.getpid()}.tmp" for name in (WEIGHTS, CONFIG)}
    try:
        save_file(tensors, str(staged[WEIGHTS]), metadata={"format": "pt"})
        staged[CONFIG].write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
        for name, file in staged.items():
            sync(file)
            os.replace(file, folder / name)
        sync(folder)
    finally:
        for file in staged.values():
            file.unlink(missing_ok=True)


def load_adapter(model: Decoder, path: str | os.PathLike[str]) -> LoraConfig:
    """Put the adapters of a PEFT folder on a model, which is frozen, or into the same adapters that it has already.

    Their values are converted to the model's type. Tensors of whole modules (``modules_to_save``, or embeddings that
    PEFT stored along) are accepted where they equal the model's own.

    Args:
        model: the base model that the adapter was trained on; nothing in the folder proves that.
        path: the folder.

    Raises:
        ValueError: a missing or malformed file, another method than plain LoRA on linear layers of the blocks (the key
            is named), tensors that are missing, unexpected, of another shape, not floating point or, of whole modules,
            different, or a model with other adapters. The model is as before.
    """
    config, stored = read_adapter(model, path)
    adapted = dict(lora_layers(model))
    if any(layer.config != config for layer in adapted.values()):
        raise ValueError(f"{path}: expected the adapters that the model has, got {config}")
    if not adapted:
        add_lora(model, config, seed=0)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            for parameter, value in zip((layer.lora_A, layer.lora_B), stored[name], strict=True):
                parameter.copy_(value)
    return config


def read_adapter(
    model: Decoder, path: str | os.PathLike[str]
) -> tuple[LoraConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A PEFT folder's adapters of a model, as they are stored, by the names of its layers: A [R, in] and B [out, R].

    Args:
        model: the base model; on the meta device, tensors of whole modules cannot be compared and are refused.
        path: the folder.

    Raises:
        ValueError: as for :func:`load_adapter`.
    """
    folder = Path(path)
    config = _config(folder / CONFIG)
    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: not a readable safetensors file: {error}") from error
    layers = target_layers(model, config.targets)
    _check(model, stored, _shapes(layers, config.rank), folder)
    return config, {n: (stored[_name(n, "lora_A")], stored[_name(n, "lora_B")]) for n in layers}


def _config(file: Path) -> LoraConfig:
    """PEFT's configuration, or a ValueError that names the key at fault."""
    try:
        keys = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not readable JSON: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"{file}: expected an object, got {type(keys).__name__}")

    def read(key: str, default: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = keys.get(key, default)
        if not fits(value):
            raise ValueError(f"{file}: {key}: expected {expected}, got {value!r}")
        return value

    for key in sorted(keys.keys() - _SILENT - _READ):
        read(key, None, "what switches it off (only plain LoRA is supported)", lambda value: not value)
    read("peft_type", None, "'LORA'", lambda value: value == "LORA")
    read("bias", "none", "'none'", lambda value: value == "none")
    read("init_lora_weights", True, "one that leaves the base weights alone", lambda value: value in _PLAIN_INITS)
    return LoraConfig(
        rank=read("r", None, "a positive integer", lambda value: type(value) is int and value > 0),
        alpha=float(read("lora_alpha", None, "a positive number", _is_positive)),
        targets=tuple(read("target_modules", None, "a list of module names", _is_names)),
        rank_stabilised=read("use_rslora", False, "true or false", lambda value: isinstance(value, bool)),
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _parameters(layers: Mapping[str, LoraLinear]) -> dict[str, torch.Tensor]:
    """PEFT's name -> parameter."""
    return {_name(path, part): getattr(layer, part) for path, layer in layers.items() for part in ("lora_A", "lora_B")}


def _shapes(layers: Mapping[str, Linear], rank: int) -> dict[str, list[int]]:
    """PEFT's name -> shape, of adapters on these layers."""
    return {_name(path, "lora_A"): [rank, layer.in_features] for path, layer in layers.items()} | {
        _name(path, "lora_B"): [layer.out_features, rank] for path, layer in layers.items()
    }


def _name(path: str, part: str) -> str:
    return f"{_PREFIX}{hf_name(path)}.{part}.weight"


def _check(model: Decoder, stored: Mapping[str, torch.Tensor], shapes: Mapping[str, list[int]], folder: Path) -> None:
    """One error for everything that does not fit."""
    own: dict[str, torch.Tensor] = {_PREFIX + hf_name(n): p.detach() for n, p in model.named_parameters()}
    own[f"{_PREFIX}lm_head.weight"] = model.lm_head_weight.detach()  # a tied one too
    problems = [f"missing: {name}" for name in shapes if name not in stored]
    for name, tensor in stored.items():
        if name not in shapes:
            if name not in own:
                problems.append(f"unexpected: {name}")
            elif own[name].is_meta:
                problems.append(f"whole module: {name}: expected adapters alone")
            elif own[name].shape != tensor.shape or not torch.equal(own[name].cpu(), tensor.to(own[name].dtype)):
                problems.append(f"whole module: {name}: expected the base model's own values")
        elif list(tensor.shape) != shapes[name]:
            problems.append(f"shape: {name}: expected {shapes[name]}, got {list(tensor.shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"type: {name}: expected floating point, got {tensor.dtype}")
    if problems:
        more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise ValueError(f"{folder}: the tensors do not fit the model:\n  " + "\n  ".join(problems[:_LISTED] + more))
