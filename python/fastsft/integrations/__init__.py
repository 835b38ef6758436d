"""Plug-ins for other trainers: ``fastsft.integrations.transformers`` and ``fastsft.integrations.trl``.

They import what they plug into, so nothing here is imported by ``import fastsft``.
"""
