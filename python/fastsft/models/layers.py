"""The parts of one decoder layer, named as in Hugging Face checkpoints.

Shape suffixes: T packed tokens, D hidden size, H query heads, G key/value heads, K head size, F MLP width.
"""

from __future__ import annotations

import torch
from torch import nn

from fastsft.models.attend import Attend
from fastsft.models.config import ModelConfig
from fastsft.ops import apply_rope, linear, rms_norm, swiglu


class RMSNorm(nn.Module):
    """``ops.rms_norm`` with its weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """``nn.Linear`` on ``ops.linear``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions, optional biases and query/key norms."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.head_dim = K
        self.window = config.windows[layer]
        self.q_proj = Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = Linear(D, G * K, bias=config.qkv_bias)
        self.o_proj = Linear(H * K, D, bias=config.o_bias)
        self.q_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_TD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        q_THK = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TGK = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TGK = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        q_THK, k_TGK = apply_rope(q_THK, cos, sin), apply_rope(k_TGK, cos, sin)
        out_THK = attend(self.layer, q_THK, k_TGK, v_TGK, self.window)
        out_TD: torch.Tensor = self.o_proj(out_THK.flatten(1))
        return out_TD


class MLP(nn.Module):
    """Gated linear unit with SiLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, width, bias=config.mlp_bias)
        self.up_proj = Linear(D, width, bias=config.mlp_bias)
        self.down_proj = Linear(width, D, bias=config.mlp_bias)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        h_TF = swiglu(self.gate_proj(x_TD), self.up_proj(x_TD))
        out_TD: torch.Tensor = self.down_proj(h_TF)
        return out_TD


class DecoderLayer(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_TD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos, sin, attend)
        out_TD: torch.Tensor = x_TD + self.mlp(self.post_attention_layernorm(x_TD))
        return out_TD
