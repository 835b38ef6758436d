"""What a run starts from: the model its configuration describes, checked before any data are prepared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from fastsft.config import Config, ConfigError, unknown_key
from fastsft.models.config import KNOWN_KEYS, ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.lora import LoraConfig, add_lora
from fastsft.models.weights import init_model, load_model
from fastsft.ops._attention_inputs import HEAD_DIMS
from fastsft.train.distributed import World
from fastsft.train.parallel import Copies


def architecture(config: Config) -> ModelConfig:
    """The model's architecture, without its weights.

    Raises:
        ConfigError: neither path nor init, or an unknown key in init. ValueError: see :class:`ModelConfig`.
    """
    options = config.model
    if options.path is not None:
        return ModelConfig.from_file(Path(options.path) / "config.json")
    if not options.init:
        raise ConfigError("model: give model.path, or model.init with the fields of a config.json")
    for key in options.init:
        if key not in KNOWN_KEYS:
            raise ConfigError(unknown_key(f"model.init.{key}", sorted(KNOWN_KEYS)))
    # The tokenizer may not be trained yet. Nothing but the range of pad_token_id depends on the size that it gives.
    return ModelConfig.from_hf({"vocab_size": 2**31 - 1, **options.init}, "model.init")


def check_fits(config: Config, model: ModelConfig) -> None:
    """Refuse what the model cannot train on.

    Raises:
        ConfigError: a head size without a kernel, or samples longer than the model has positions.
    """
    if model.head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise ConfigError(f"model: head_dim: expected one of {sizes}, got {model.head_dim}")
    if config.data.max_length > positions(model):
        raise ConfigError(
            f"data.max_length: expected at most the model's max_position_embeddings = {positions(model)}, "
            f"got {config.data.max_length}"
        )


def check_reference(config: Config) -> None:
    """Refuse an ``objective.reference`` that cannot run on the run's samples.

    Raises:
        ConfigError: no model's folder, or what :func:`check_fits` refuses in it.
    """
    path = config.objective.reference
    if path is None:
        return
    try:
        reference = ModelConfig.from_file(Path(path) / "config.json")
        check_fits(config, reference)
    except (OSError, ValueError) as error:
        raise ConfigError(f"objective.reference: {error}") from None


def positions(model: ModelConfig) -> int:
    """The longest sample. A config.json gives the positions before their extension by rope_scaling, or those after."""
    rope = model.rope
    original = rope.original_max_position_embeddings or model.max_position_embeddings
    return max(model.max_position_embeddings, int(original * rope.factor))


def build_model(config: Config, *, vocab_size: int) -> Decoder:
    """Read the model, or initialise it with at least ``vocab_size`` tokens, the tokenizer's."""
    options = config.model
    dtype = getattr(torch, options.dtype)
    if options.path is not None:
        return load_model(options.path, dtype=dtype)
    fields: dict[str, Any] = {"vocab_size": vocab_size, **options.init}
    if fields["vocab_size"] < vocab_size:
        raise ConfigError(
            f"model.init.vocab_size: expected at least the tokenizer's {vocab_size}, got {fields['vocab_size']}"
        )
    return init_model(ModelConfig.from_hf(fields, "model.init"), seed=config.seed, dtype=dtype)


def adapt(model: Decoder, config: Config) -> None:
    """Freeze the model and put ``config.lora``'s adapters on it.

    Raises:
        ConfigError: targets that the model does not have.
    """
    options = config.lora
    try:
        add_lora(model, LoraConfig(options.rank, options.alpha, tuple(options.targets)), seed=config.seed)
    except ValueError as error:
        raise ConfigError(f"lora.{error}") from None


def check_processes(config: Config, world: World) -> None:
    """Refuse more processes than a step has work for.

    Raises:
        ConfigError
    """
    if config.train.accumulation < world.size:
        raise ConfigError(
            f"train.accumulation: expected at least a micro-batch for each of the {world.size} processes, "
            f"got {config.train.accumulation}"
        )


def spread(model: Decoder, config: Config, world: World) -> Copies:
    """The model as the processes hold it; see ``train.parallel``."""
    if world.size > 1 and config.train.parallel == "fsdp":
        from fastsft.train.shards import Shards  # here: importing it takes a second

        return Shards(model, world)
    return Copies(model, world)


def fingerprint(model: Decoder) -> str:
    """Digest of the architecture and of every parameter: equal for the same model however its files are laid out."""
    digest = hashlib.blake2b(json.dumps(model.config.source, sort_keys=True).encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name}\0{parameter.dtype}\0{tuple(parameter.shape)}\0".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
