"""Rejection sampling: what a model can solve sometimes, as rows to train it on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from fastsft.files import sync
from fastsft.progress import Progress
from fastsft.synthesis.draw import DrawOptions, draw
from fastsft.synthesis.select import SelectOptions, select
from fastsft.verify.tasks import Task


def sample_tasks(
    model: str | os.PathLike[str],
    tasks: Sequence[Task],
    output: str | os.PathLike[str],
    *,
    drawing: DrawOptions,
    selection: SelectOptions,
    workers: int = 2,
    speculative_config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw samples, execute them, and write those that passed and were chosen as training rows.

    All samples, those that failed too, stay in the folder ``<output>.samples``: another selection from the same draws
    costs nothing. Killed at any instant, the same call goes on and ends with the same bytes.

    Args:
        output: a file of JSON lines; it is written whole or not at all, and replaced if it exists.
        workers, speculative_config: as for :func:`fastsft.synthesis.draw.draw`.

    Returns:
        The report, see :func:`fastsft.synthesis.select.select`.

    Raises:
        As :func:`fastsft.synthesis.draw.draw`, and :func:`fastsft.synthesis.select.select`.
    """
    target = Path(output)
    if target.is_dir():
        raise ValueError(f"output: expected the name of a file, got the folder {target}")
    select([], [], selection, completion=drawing.completion)  # its options, before hours of drawing
    folder = target.with_name(f"{target.name}.samples")
    drawn = draw(
        model, tasks, folder, drawing, workers=workers, speculative_config=speculative_config, progress=progress
    )
    rows, report = select(tasks, drawn, selection, completion=drawing.completion)
    stage = target.with_name(f".{target.name}.tmp")
    with open(stage, "wb") as stream:
        stream.writelines(orjson.dumps(row) + b"\n" for row in rows)
    sync(stage)
    stage.replace(target)
    sync(target.absolute().parent)
    return report
