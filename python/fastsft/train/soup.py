"""The greedy soup: the mean of those models that improve it on held-out data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastsft.models.decoder import Decoder
from fastsft.models.merge import Members, open_members
from fastsft.models.skeleton import skeleton


@dataclass(frozen=True)
class Trial:
    """A soup that was tried: the numbers of its models, its held-out loss, and whether it replaced the one before."""

    members: tuple[int, ...]
    loss: float
    kept: bool


def greedy_soup(
    models: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    loss_of: Callable[[Decoder], float],
    *,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trial]:
    """Recipe 1 of arXiv 2203.05482, with a loss: models in the order of their own losses, each of which stays in the
    mean if the mean's loss falls.

    What is evaluated is the mean as it would be written, rounded to the types of the first folder. One model is in
    memory.

    Args:
        models, output: as for :func:`fastsft.models.merge.soup`.
        loss_of: the held-out loss of a model.
        dtype: what a mean is evaluated in.
        progress: called with (evaluations done, all).

    Returns:
        Every soup that was tried, in order: first each model alone, the best of which is where the soup begins.

    Raises:
        ValueError: as for :func:`fastsft.models.merge.soup`, before anything is evaluated; or no finite loss.
    """
    if len(models) < 2:
        raise ValueError(f"soup: models: expected at least two folders, got {len(models)}")
    with open_members(models) as members:
        members.check_output(output)
        with skeleton():
            model = Decoder(members.config)
        trials = _choose(members, model.to(dtype).to_empty(device="cpu"), loss_of, progress)
        chosen = next(t for t in reversed(trials) if t.kept).members
        record = {"soup": "greedy", "models": [str(models[i]) for i in chosen], "left_out": [
            str(m) for i, m in enumerate(models) if i not in chosen]}  # fmt: skip
        members.write(output, lambda name: chosen, record)
    return trials


def _choose(
    members: Members,
    model: Decoder,
    loss_of: Callable[[Decoder], float],
    progress: Callable[[int, int], None] | None,
) -> list[Trial]:
    count = len(members.folders)
    trials: list[Trial] = []

    def loss(chosen: tuple[int, ...]) -> float:
        members.load_mean(chosen, model)
        found = loss_of(model)
        if progress:
            progress(len(trials) + 1, 2 * count - 1)
        return found

    for i in range(count):
        trials.append(Trial((i,), loss((i,)), False))
    order = sorted((i for i in range(count) if math.isfinite(trials[i].loss)), key=lambda i: trials[i].loss)
    if not order:
        raise ValueError("soup: models: no model has a finite held-out loss")
    trials[order[0]] = best = Trial((order[0],), trials[order[0]].loss, True)
    for i in order[1:]:
        joined = (*best.members, i)
        found = loss(joined)
        trials.append(Trial(joined, found, found < best.loss))
        best = trials[-1] if trials[-1].kept else best
    return trials
