"""Low-rank adaptation (LoRA, arXiv 2106.09685): frozen linear layers, each beside a trained product of thin matrices.

Shape suffixes as in ``layers``; R is the rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastsft.models.decoder import Decoder
from fastsft.models.layers import Linear
from fastsft.models.skeleton import skeleton
from fastsft.ops import linear

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of a block. Adapters on the MLP matter most: on attention alone they fall short of full
fine-tuning at any rank (Schulman et al., LoRA Without Regret, 2025)."""


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how strongly.

    Raises:
        ValueError: a rank or alpha that is not positive, or no targets.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = BLOCK_LINEARS
    """Ends of module names, as PEFT's ``target_modules``: ``q_proj``, or ``model.layers.0.self_attn.q_proj``. Kept
    sorted, each once."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732) and not by alpha / rank."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: expected a positive number, got {self.rank}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha: expected a positive number, got {self.alpha}")
        if not self.targets:
            raise ValueError("targets: expected names of linear layers, got none")
        object.__setattr__(self, "targets", tuple(sorted(set(self.targets))))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class LoraLinear(Linear):
    """``x W^T + bias + scale (x A^T) B^T`` with A [R, in] and B [out, R] trained, W and the bias frozen.

    W + scale B A is never formed. A and B have W's type: the products run at its rate, and the digits that bfloat16
    lacks are in the optimizer's float32 masters, as those of a fully trained model are.
    """

    def __init__(self, base: Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and draw another weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_empty(config.rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))
        self.config = config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        x_TR = linear(x, self.lora_A)
        return torch.addmm(linear(x, self.weight, self.bias), x_TR, self.lora_B.t(), alpha=self.config.scale)

    @torch.no_grad()
    def effective_weight(self) -> torch.Tensor:
        """The base weight plus the adapter, in float32."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.to(exact).addmm(self.lora_B.to(exact), self.lora_A.to(exact), alpha=self.config.scale)

    @torch.no_grad()
    def merged(self) -> Linear:
        """The base layer with the adapter added into its own weight: in float32, rounded once."""
        self.weight.copy_(self.effective_weight())
        with skeleton():
            layer = Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight, layer.bias = self.weight, self.bias
        return layer


def add_lora(model: Decoder, config: LoraConfig, *, seed: int) -> None:
    """Freeze the model and put adapters on the target layers, in place. The model's function does not change: B is 0.

    Args:
        seed: A is uniform in +-1/sqrt(in) (Kaiming's with slope sqrt(5), as PEFT draws it), in float32, a function of
            the seed, the targets and the sizes.

    Raises:
        ValueError: the model has adapters already, or a target that names no linear layer of the blocks.
    """
    if next(lora_layers(model), None) is not None:
        raise ValueError("model: expected one without adapters; merge_lora folds those that it has")
    targets = target_layers(model, config.targets)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path, base in targets.items():
        layer = LoraLinear(base, config)
        drawn = torch.empty(layer.lora_A.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            layer.lora_A.copy_(drawn)
        _put(model, path, layer)


def merge_lora(model: Decoder) -> None:
    """Fold the adapters into their layers, in place: a plain model, all of it trainable.

    Raises:
        ValueError: the model has no adapters (they are folded once).
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model: expected one with adapters, found none")
    for path, layer in layers.items():
        _put(model, path, layer.merged())
    model.requires_grad_(True)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(module name, layer) of all that are adapted, in the model's order."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            yield name, layer


def target_layers(model: Decoder, targets: Iterable[str]) -> dict[str, Linear]:
    """Module name -> layer of what the targets name, in the model's order.

    Raises:
        ValueError: a target that names no linear layer of the blocks.
    """
    unused = set(targets)
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, Linear):
            hits = {t for t in targets if f".model.{path}".endswith(f".{t}")}
            if hits:
                found[path] = layer
                unused -= hits
    if unused:
        raise ValueError(
            f"targets: expected names of linear layers of the blocks ({', '.join(BLOCK_LINEARS)}), "
            f"got {', '.join(map(repr, sorted(unused)))}"
        )
    return found


def _put(model: Decoder, path: str, layer: Linear) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
