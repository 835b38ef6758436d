"""Hugging Face transformers: ``attn_implementation="fastsft"``, and :func:`enable` for everything else.

Importing this module registers the attention and its mask, for ``from_pretrained(..., attn_implementation="fastsft")``
and ``model.set_attn_implementation("fastsft")``.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from fastsft.integrations._attention import attention
from fastsft.integrations._layout import layout_mask

NAME = "fastsft"

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, layout_mask)
