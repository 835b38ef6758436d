"""The decoder-only transformer behind every supported family; what differs between them is in ``ModelConfig``.

Shape suffixes: T packed tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastsft.models.attend import Attend
from fastsft.models.config import ModelConfig
from fastsft.models.layers import DecoderLayer, RMSNorm
from fastsft.models.rope import RotaryTable


class Decoder(nn.Module):
    """Token ids to hidden states on one packed axis: no batch axis, no padding, no mask.

    Parameters carry Hugging Face's names without the leading ``model.``. The language model head is not applied here:
    the loss and the engine each project only the rows they need with ``lm_head_weight``.

    Args:
        config: the architecture. Weights are torch's default initialisation; see ``weights.init_model`` and
            ``weights.load_model``. Building under ``torch.device("meta")`` allocates nothing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Keep only each layer's input for the backward pass and run the layer again there."""
        # transformers hands the padding id on too: that embedding row gets no gradient from the input side
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self._rotary = RotaryTable(config.rope, config.head_dim)

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """The parameter [V, D] of the head, or of the embedding where the two are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attend: Attend,
        noise: torch.Tensor | None = None,
        accumulate_into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: int64 [T], in [0, V).
            position_ids: int64 [T], each token's place in its own document.
            attend: which keys each query sees and how; see ``models.attend``.
            noise: [T, D], added to the embeddings.
            accumulate_into: float32 [V, D]: takes the gradient of the embedding, added row by row in the backward pass;
                the parameter then gets none from here. Where the head is tied, one buffer can so take both gradients.

        Returns:
            [T, D] in the parameters' type.

        Raises:
            ValueError: the ids or positions are not int64 [T].
        """
        for name, tensor in (("input_ids", input_ids), ("position_ids", position_ids)):
            if tensor.dtype != torch.int64 or tensor.shape != input_ids.shape or tensor.ndim != 1:
                shape = list(input_ids.shape) if input_ids.ndim == 1 else ["T"]
                raise ValueError(f"{name}: expected int64 {shape}, got {tensor.dtype} {list(tensor.shape)}")
        if accumulate_into is None:
            x_TD = self.embed_tokens(input_ids)
        else:
            embedding = self.embed_tokens
            x_TD = _EmbedInto.apply(  # type: ignore[no-untyped-call]
                input_ids, embedding.weight, embedding.padding_idx, accumulate_into
            )
        if noise is not None:
            x_TD = x_TD + noise
        cos, sin = self._rotary(position_ids, x_TD.dtype)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                # no dropout anywhere, so there is no random state to put back
                x_TD = checkpoint(layer, x_TD, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD = layer(x_TD, cos, sin, attend)
        hidden_TD: torch.Tensor = self.norm(x_TD)
        return hidden_TD


class _EmbedInto(torch.autograd.Function):
    """``nn.Embedding`` without a dense [V, D] of its own for a gradient of T rows."""

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None, into: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.into = padding_idx, into
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        grad = grad.float()
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((ids == ctx.padding_idx)[:, None], 0.0)
        ctx.into.index_add_(0, ids, grad)
        return None, None, None, None
