"""Rotary position embedding: frequencies from a Hugging Face configuration, and the tables for ``ops.apply_rope``.

Formulas: RoFormer (arXiv 2104.09864); position interpolation, "linear" (arXiv 2306.15595); YaRN (arXiv 2309.00071);
"llama3" (the Llama 3.1 model release). Frequencies are formed in float32 in the order of operations that the published
models were trained with: at position 131072 one unit in the last place of a frequency is 0.01 rad.

Shape suffixes: T packed tokens, R = K / 2 frequencies of a head of size K.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

SUPPORTED_TYPES = ("default", "linear", "llama3", "yarn")

_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "finetuned",  # the last says how the model came about and changes nothing
}  # fmt: skip

_LARGEST = 1e30  # whatever is below stays finite in float32


@dataclass(frozen=True)
class RopeConfig:
    """How angles follow from positions. Fields that ``rope_type`` does not use keep their defaults."""

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """YaRN: multiplies cos and sin, so scores scale by its square."""
    truncate: bool = True
    """YaRN: round the ramp's bounds to whole frequencies."""

    @staticmethod
    def from_hf(raw: Mapping[str, Any], max_position_embeddings: int, where: str = "config") -> RopeConfig:
        """Read a config.json's ``rope_scaling`` (older) or ``rope_parameters`` (transformers 5), with ``rope_theta``.

        Raises:
            ValueError: a rope type that depends on the sequence length or is unknown, per-layer parameters, an unknown,
                missing or ill-typed key. The message starts with ``where`` and names the key.
        """
        name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
        given = raw.get(name) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{where}: {name}: expected an object, got {given!r}")
        kind = given.get("rope_type", given.get("type")) or "default"
        if kind not in SUPPORTED_TYPES:
            raise ValueError(f"{where}: {name}.rope_type: supported are {', '.join(SUPPORTED_TYPES)}; got {kind!r}")
        for key in given:
            if key not in _KEYS:
                raise ValueError(f"{where}: {name}.{key}: unknown key; supported are {', '.join(sorted(_KEYS))}")
        partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise ValueError(f"{where}: partial_rotary_factor: only 1.0 is supported, got {partial!r}")

        read = _Reader(given, f"{where}: {name}")
        theta = given.get("rope_theta", raw.get("rope_theta"))
        theta = 10000.0 if theta is None else theta
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta <= _LARGEST:
            raise ValueError(f"{where}: rope_theta: expected a number above 1, got {theta!r}")
        if kind == "default":
            return RopeConfig(theta=theta)
        if kind == "linear":
            return RopeConfig(kind, theta, factor=read.number("factor"))

        # A top-level original_max_position_embeddings outranks the one among the rope keys, as in transformers.
        original = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        original = max_position_embeddings if original is None else original
        if isinstance(original, bool) or not isinstance(original, int) or not 1 <= original <= _LARGEST:
            raise ValueError(
                f"{where}: original_max_position_embeddings: expected a positive integer, got {original!r}"
            )
        if kind == "llama3":
            low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
            if high <= low:
                raise ValueError(f"{where}: {name}.high_freq_factor: expected above low_freq_factor={low}, got {high}")
            return RopeConfig(kind, theta, read.number("factor"), original, low, high)
        factor = read.number("factor", max_position_embeddings / original)
        return RopeConfig(
            kind,
            theta,
            factor,
            original,
            beta_fast=read.number("beta_fast", 32.0),
            beta_slow=read.number("beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(factor, read),
            truncate=bool(given.get("truncate", True)),
        )


class _Reader:
    """Positive numbers out of the rope object, with errors that name the key."""

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.given = given
        self.where = where

    def number(self, key: str, default: float | None = None) -> float:
        value = self.given.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
            raise ValueError(f"{self.where}.{key}: expected a positive number, got {value!r}")
        return value

    def optional(self, key: str) -> float | None:
        return None if self.given.get(key) is None else self.number(key)


def _yarn_attention_factor(factor: float, read: _Reader) -> float:
    """``attention_factor`` if given, else section 3.4 of the paper: 0.1 ln(factor) + 1, with DeepSeek's two weights."""

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = read.optional("attention_factor")
    if given is not None:
        return given
    mscale, mscale_all = read.optional("mscale"), read.optional("mscale_all_dim")
    if mscale is not None and mscale_all is not None:
        return temperature(mscale) / temperature(mscale_all)
    return temperature(1.0)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Angle per position step of each frequency: float32 [head_dim / 2], on the CPU."""
    exponent_R = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    wave_R = config.theta**exponent_R
    inv_freq_R = 1.0 / wave_R
    if config.rope_type == "linear":
        return inv_freq_R / config.factor
    if config.rope_type == "llama3":
        return _llama3(config, inv_freq_R)
    if config.rope_type == "yarn":
        return _yarn(config, head_dim, wave_R)
    return inv_freq_R


def _llama3(config: RopeConfig, inv_freq_R: torch.Tensor) -> torch.Tensor:
    """Slow frequencies divided by ``factor``, fast ones kept, a linear blend (in turns per old context) between."""
    factor, low, high = config.factor, config.low_freq_factor, config.high_freq_factor
    context = config.original_max_position_embeddings
    wavelength_R = 2 * math.pi / inv_freq_R
    blend_R = (context / wavelength_R - low) / (high - low)
    blended_R = (1 - blend_R) * inv_freq_R / factor + blend_R * inv_freq_R
    out_R = torch.where(wavelength_R > context / low, inv_freq_R / factor, blended_R)
    return torch.where(wavelength_R < context / high, inv_freq_R, out_R)


def _yarn(config: RopeConfig, head_dim: int, wave_R: torch.Tensor) -> torch.Tensor:
    """Frequencies of over ``beta_fast`` turns per old context kept, under ``beta_slow`` divided, a ramp between."""
    context = config.original_max_position_embeddings

    def index_of(turns: float) -> float:
        return (head_dim * math.log(context / (turns * 2 * math.pi))) / (2 * math.log(config.theta))

    low, high = index_of(config.beta_fast), index_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp_R = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    keep_R = 1 - ramp_R
    return 1.0 / (config.factor * wave_R) * (1 - keep_R) + 1.0 / wave_R * keep_R


class RotaryTable:
    """cos and sin for given positions, computed in float32 once per forward pass and shared by all layers."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self._scale = config.attention_factor
        self._inv_freq = {torch.device("cpu"): inverse_frequencies(config, head_dim)}

    def __call__(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """``position_ids`` int64 [T] -> cos, sin: ``dtype`` [T, R]."""
        device = position_ids.device
        if device not in self._inv_freq:
            self._inv_freq[device] = self._inv_freq[torch.device("cpu")].to(device)
        angle_TR = position_ids[:, None].float() * self._inv_freq[device]
        return (angle_TR.cos() * self._scale).to(dtype), (angle_TR.sin() * self._scale).to(dtype)
