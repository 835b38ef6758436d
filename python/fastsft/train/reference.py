"""The policy that an objective compares with: log-probabilities made once and kept on disk, or the model itself.

An objective over log-ratios needs one number a token: they are computed before the first step, in the store's own
order, and appended to a file; a killed process goes on at the last whole batch. An objective over whole distributions
(asft) needs the reference's hidden states: its model stays in memory and is run on every batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastsft.config import Config, ConfigError
from fastsft.data.batch import VarlenBatch
from fastsft.data.store import SampleStore
from fastsft.files import sync
from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder
from fastsft.models.weights import load_model
from fastsft.ops.objectives import OBJECTIVES
from fastsft.train.evaluate import batch_logprobs
from fastsft.train.parallel import Copies
from fastsft.train.start import fingerprint


class Reference:
    """What ``ops.linear_cross_entropy`` is given of the reference, batch by batch. One of the two is set.

    Args:
        logprobs: float32 [tokens of the store], at each token that of the next one of its sample.
        model: not trained.
    """

    def __init__(self, *, logprobs: npt.NDArray[np.float32] | None = None, model: Decoder | None = None) -> None:
        if (logprobs is None) == (model is None):
            raise ValueError("Reference: expected either logprobs or a model")
        self._logprobs, self._model = logprobs, model

    def inputs(self, batch: VarlenBatch) -> dict[str, Any]:
        if self._model is not None:
            with torch.no_grad():
                hidden = self._model(batch.ids, batch.position_ids, VarlenAttend(batch.cu_seqlens))
            return {"reference": (hidden, self._model.lm_head_weight)}
        if self._logprobs is None or batch.tokens is None:
            raise ValueError("batch: expected one that was taken from the store of the reference's log-probabilities")
        return {"ref_logprobs": torch.from_numpy(self._logprobs[batch.tokens])}


def open_reference(
    config: Config,
    parallel: Copies,
    store: SampleStore,
    *,
    folder: Path,
    origin: str,
    data: str,
    progress: Callable[[int, int], None],
) -> Reference:
    """What the configuration's objective compares with, where it needs anything but a copy of the model.

    Args:
        parallel: of the model that is trained, which is still what the run found: the reference, if none is named.
        folder: where log-probabilities are kept.
        origin, data: digest of that model, and key of the store's content.

    Raises:
        ConfigError: a reference of another vocabulary.
    """
    path = config.objective.reference
    if path is not None:
        vocabulary = parallel.model.config.vocab_size
        model = load_model(path, dtype=parallel.dtype)
        if model.config.vocab_size != vocabulary:
            raise ConfigError(
                f"objective.reference: expected the model's vocab_size {vocabulary}, got {model.config.vocab_size}"
            )
        if OBJECTIVES[config.objective.name].needs == "reference":
            return Reference(model=model)
        parallel, origin = Copies(model, parallel.world), fingerprint(model)
    capacity = config.train.tokens_per_batch
    name = cache_name(data, origin, capacity)
    found = reference_logprobs(
        store, parallel.model, folder / name, capacity=capacity, progress=progress, parallel=parallel
    )
    return Reference(logprobs=found)


def reference_logprobs(
    store: SampleStore,
    model: Decoder,
    path: Path,
    *,
    capacity: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    parallel: Copies | None = None,
) -> npt.NDArray[np.float32]:
    """float32 [tokens], mapped from ``path``; written there first if need be. Tokens without weight have 0.

    Args:
        path: names everything that the numbers depend on; see :func:`cache_name`.
        capacity: tokens of a batch; a longer sample is a batch of its own.
        progress: called with (tokens done, all).
        parallel: how processes that share the work hold the model.
    """
    parallel = parallel or Copies(model)
    if not parallel.world.from_main(path.is_file):
        with parallel.inference():
            _compute(store, parallel, path, capacity, progress)
    found: npt.NDArray[np.float32] = np.memmap(path, np.float32, "r") if store.num_tokens else np.zeros(0, np.float32)
    return found


def cache_name(data_key: str, fingerprint: str, capacity: int) -> str:
    """The capacity is part of it: sums of other batches are rounded otherwise."""
    digest = hashlib.blake2b(f"1 {data_key} {fingerprint} {capacity}".encode(), digest_size=12)
    return f"reference-{digest.hexdigest()}.f32"


def _compute(
    store: SampleStore, parallel: Copies, path: Path, capacity: int, progress: Callable[[int, int], None]
) -> None:
    """Batch by batch in the order of the store, as many at a time as there are processes; the first one writes."""
    world, partial = parallel.world, path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = world.from_main(lambda: partial.stat().st_size // 4 if partial.exists() else 0)
    left = [batch for batch in _consecutive(store.lengths, capacity) if batch[2] > done]
    with open(partial, "ab") if world.is_main else contextlib.nullcontext() as file:
        for first in range(0, len(left), world.size):
            members, _, _ = left[min(first + world.rank, len(left) - 1)]
            found = world.gather(batch_logprobs(parallel.model, store.batch(members)).numpy())
            if file is None:
                continue
            for (_, begin, end), logprobs in zip(left[first : first + world.size], found, strict=False):
                file.truncate(begin * 4)  # what a killed process had begun of this batch
                file.seek(begin * 4)
                file.write(logprobs.tobytes())
                file.flush()
                os.fsync(file.fileno())
                progress(end, store.num_tokens)
    world.from_main(lambda: _finish(partial, path))


def _finish(partial: Path, path: Path) -> None:
    os.replace(partial, path)
    sync(path.parent)


def _consecutive(lengths: npt.NDArray[np.int64], capacity: int) -> Iterator[tuple[npt.NDArray[np.int64], int, int]]:
    """Neighbours of up to ``capacity`` tokens: their numbers, and where their tokens begin and end."""
    first = begin = used = 0
    for number, length in enumerate(lengths.tolist()):
        if used and used + length > capacity:
            yield np.arange(first, number), begin, begin + used
            first, begin, used = number, begin + used, 0
        used += length
    if used:
        yield np.arange(first, len(lengths)), begin, begin + used
