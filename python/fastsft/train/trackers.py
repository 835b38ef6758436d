"""What metrics.jsonl gets, sent on to TensorBoard, Weights & Biases and trackio, each step once.

A run that goes on from a checkpoint makes some steps again. TensorBoard is told where it begins anew and forgets what
came after. The others keep what they got; ``.tracked`` remembers how far that is, and what they have is not sent again:
the steps made again are the same ones.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastsft.config import ConfigError, LogOptions

_WIDTH = 12


def check_trackers(options: LogOptions) -> None:
    """Raises ConfigError: a tracker that is not installed."""
    for name in ("tensorboard", "wandb", "trackio"):
        if getattr(options, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(f'log.{name}: the package is not installed; pip install "fastsft[track]"')


class Trackers:
    """Args:
    folder: the run's.
    resumed_step: 0 for a run that begins.
    """

    def __init__(self, options: LogOptions, folder: Path, config: dict[str, Any], *, resumed_step: int) -> None:
        self._board: Any = None
        self._runs: list[Any] = []
        self._mark: int | None = None
        if options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else 0)
        if options.wandb or options.trackio:
            name = self._open_mark(folder / ".tracked", resumed_step)
            if options.wandb:
                import wandb

                self._runs.append(
                    wandb.init(
                        project=options.wandb, name=folder.name, id=name, resume="allow", dir=str(folder), config=config
                    )
                )  # fmt: skip
            if options.trackio:
                import trackio

                title = f"{folder.name}-{name}"
                self._runs.append(trackio.init(project=options.trackio, name=title, resume="allow", config=config))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of one line of metrics.jsonl, and the text of a sample."""
        numbers = dict(_numbers(values, f"{kind}/"))
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
            if kind == "sample":
                self._board.add_text(f"sample/{values['prompt']}", values["text"], step)
        if self._runs and numbers and step > self._sent:
            for run in self._runs:
                run.log(numbers, step=step)
            os.pwrite(self._mark, f"{step:{_WIDTH}}".encode(), 0)  # type: ignore[arg-type]

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        for run in self._runs:
            run.finish()
        if self._mark is not None:
            os.close(self._mark)

    def _open_mark(self, path: Path, resumed_step: int) -> str:
        """The name of the run at the trackers, the same after a resume. The file: the last step sent, and the name."""
        if not resumed_step or not path.exists():
            path.write_text(f"{-1:{_WIDTH}} {secrets.token_hex(4)}\n")
        self._mark = os.open(path, os.O_RDWR)
        sent, name = os.pread(self._mark, 100, 0).decode().split()
        self._sent = int(sent)
        return name


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value
