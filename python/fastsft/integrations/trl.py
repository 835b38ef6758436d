"""Hugging Face TRL: :class:`SFTTrainer`, and :func:`enable` for the log-probabilities of its other trainers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import trl as installed
from torch import Tensor
from trl.trainer import utils as trl_utils
from trl.trainer.sft_trainer import SFTTrainer as TheirSFTTrainer

from fastsft import ops
from fastsft.integrations import _loss, transformers
from fastsft.integrations._logprobs import LogProbFunction, is_top1
from fastsft.integrations._patches import original, replace_forward

__all__ = ["FusedSFTMixin", "LogProbFunction", "SFTTrainer", "disable", "enable", "enabled"]

_FUNCTION, _COMPACT = "_ChunkedLogProbFunction", "_use_triton"
_before: dict[str, Any] = {}


def enable() -> None:
    """Let fastsft compute the log-probabilities of every TRL trainer in this process (SFT, DPO, GRPO and others).

    TRL's fused head then projects the positions with a label and no others, on every device. The models' attention and
    layers are theirs: ``fastsft.integrations.transformers.enable(model, loss=False)``.

    Raises:
        RuntimeError: this TRL has no fused head; 1.16 and later are known to have it.
    """
    if _before:
        return
    for name in (_FUNCTION, _COMPACT):
        if not hasattr(trl_utils, name):
            raise RuntimeError(f"fastsft: trl.trainer.utils.{name}: not in TRL {installed.__version__}; 1.16 has it")
    _before.update({name: getattr(trl_utils, name) for name in (_FUNCTION, _COMPACT)})
    setattr(trl_utils, _FUNCTION, LogProbFunction)
    setattr(trl_utils, _COMPACT, lambda device: True)


def disable() -> None:
    """Undo :func:`enable`; nothing happens without it."""
    while _before:
        setattr(trl_utils, *_before.popitem())


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """:func:`enable` for the length of a ``with`` block."""
    enable()
    try:
        yield
    finally:
        disable()


class FusedSFTMixin:
    """To go before ``trl.SFTTrainer`` among the bases of a class: the model's attention, layers and loss by fastsft.

    The loss forms its gradients in the forward pass (three products with the vocabulary where TRL has four and more),
    from the positions with a label alone. Everything else is TRL's: data, collators, arguments, metrics, checkpoints.

    Where TRL itself needs logits (``compute_loss_func``, label smoothing, ``compute_metrics``, a mixture of experts'
    auxiliary loss, DeepSpeed's sequence parallelism) its own ``compute_loss`` runs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        base = self._base()
        _loss.check(base)
        transformers.enable(base, loss=False)
        replace_forward(base, sft_forward)
        for head in _loss.heads(base):
            replace_forward(head, _loss.head_forward)

    def _base(self: Any) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def compute_loss(
        self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs or not self._is_plain():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        inputs["use_cache"] = False
        out = model(
            **inputs,
            fused_lm_head=True,
            fastsft_objective=self.args.loss_type,
            num_items_in_batch=num_items_in_batch,
        )
        loss = out.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The number is of all processes' tokens, and their gradients are averaged.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._note(inputs, out, "train" if self.model.training else "eval")
        return loss

    def _is_plain(self: Any) -> bool:
        parallelism = self.accelerator.parallelism_config
        return (
            self.compute_loss_func is None
            and self.label_smoother is None
            and not self.aux_loss_enabled
            and not (parallelism is not None and parallelism.sp_enabled)
        )

    def _note(self: Any, inputs: dict[str, Any], out: Any, mode: str) -> None:
        """TRL's metrics, over all processes."""
        tokens = (
            inputs["attention_mask"].sum()
            if "attention_mask" in inputs
            else out.entropy.new_tensor(inputs["position_ids"].shape[1])
        )
        local = torch.stack(
            [x.detach().double() for x in (out.label_mask.sum(), out.entropy.sum(), out.is_top1.sum(), tokens)]
        )
        kept, entropy, right, seen = self.accelerator.gather_for_metrics(local[None]).sum(0).tolist()
        metrics = self._metrics[mode]
        metrics["entropy"].append(entropy / kept if kept else 0.0)
        metrics["mean_token_accuracy"].append(right / kept if kept else 0.0)
        if mode == "train":
            self._total_train_tokens += int(seen) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]


class SFTTrainer(FusedSFTMixin, TheirSFTTrainer):
    """``trl.SFTTrainer`` with the model's attention, layers and loss by fastsft; see :class:`FusedSFTMixin`."""


def sft_forward(self: Any, *args: Any, fastsft_objective: str | None = None, **kwargs: Any) -> Any:
    """TRL's fused forward with the loss by :func:`fastsft.ops.linear_cross_entropy`, when :class:`FusedSFTMixin` asks
    for it; TRL's own otherwise."""
    if fastsft_objective is None:
        return original(self)(*args, **kwargs)
    del kwargs["fused_lm_head"]
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    items = kwargs.pop("num_items_in_batch", None)
    hidden = self.base_model(*args, **kwargs).last_hidden_state
    targets = (_loss.next_labels(labels, -100) if shifted is None else shifted).to(hidden.device)
    loss, entropy, top1 = _loss.head_of(self)(
        hidden.flatten(0, -2),
        fused=_objective,
        targets=targets.flatten(),
        objective=fastsft_objective,
        normalizer=None if items is None else torch.as_tensor(items, dtype=torch.float32).sum().clamp(min=1),
        **_loss.scaling(self.config),
    )
    return trl_utils.FusedCausalLMOutput(loss=loss, entropy=entropy, is_top1=top1, label_mask=targets != -100)


def _objective(
    hidden: Tensor, weight: Tensor, *, targets: Tensor, bias: Tensor | None, objective: str, normalizer: Any,
    softcap: float, temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss; the entropy of each position with a label and 0 elsewhere; whether its target was likeliest."""
    options: dict[str, Any] = {"bias": bias, "softcap": softcap, "temperature": temperature}
    loss, aux = ops.linear_cross_entropy(
        hidden, weight, targets, objective=objective, normalizer=normalizer, return_aux=True, **options
    )
    kept = targets != -100
    return (
        loss,
        aux.entropy,
        is_top1(hidden[kept], weight, targets[kept], aux.logprob[kept], aux.entropy[kept], **options),
    )
