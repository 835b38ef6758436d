"""Held-out files as samples for a model that exists."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastsft.config import TrainOptions, load_config
from fastsft.data.records import Problems, read_records
from fastsft.data.store import SampleStore
from fastsft.data.tokenise import tokenise
from fastsft.models.config import ModelConfig
from fastsft.models.tokenizer import Tokenizer
from fastsft.train.start import positions


def read_held_out(
    files: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    model: ModelConfig,
    *,
    fields: Mapping[str, str] | None = None,
) -> tuple[SampleStore, dict[str, Any]]:
    """The samples of files in the formats of training data, and what was left out: rows above the model's positions.

    Args:
        fields: our names for the files' fields.

    Raises:
        DataError: a row that cannot be used. ConfigError: an unknown name in ``fields``.
    """
    longest, names = positions(model), dict(fields or {})
    options = {"train": [os.fspath(f) for f in files], "fields": names, "max_length": longest}
    config = load_config({"data": options, "train": {"tokens_per_batch": max(CAPACITY, longest)}})
    problems = Problems("fail")
    records = list(read_records(files, problems, fields=names))
    store = SampleStore.from_samples(tokenise(records, tokenizer, config, problems, limit="the model's context"))
    report = {"rows": len(records), "skipped": dict(problems.counts), "skipped_examples": problems.examples}
    return store, report


CAPACITY = TrainOptions().tokens_per_batch
"""Tokens of a batch, for :func:`fastsft.train.evaluate.evaluate_loss`."""
