"""Several processes of one run, started as torchrun starts them, from a server that has already imported torch."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill_resume import PRELOAD


def _rank(environment: dict[str, str], log: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    target(*arguments)


class Ranks:
    """``size`` processes that run ``target(*arguments)``; what they print goes to ``<log>.<rank>``."""

    def __init__(self, size: int, log: Path, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        self.processes = []
        for rank in range(size):
            environment = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_rank, args=(environment, f"{log}.{rank}", target, arguments))
            process.start()
            self.processes.append(process)

    def join(self, timeout: float = 60) -> list[int | None]:
        """Exit statuses by rank. As torchrun does, the others are killed when one fails."""
        codes = []
        for process in self.processes:
            process.join(timeout)
            codes.append(process.exitcode)
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()

    def text(self, rank: int) -> str:
        return Path(f"{self.log}.{rank}").read_text()


def train_rank(config: dict[str, Any], stop_at: int | None = None, number: int = signal.SIGTERM) -> None:
    """A run to its end, or until the second process gets a signal in a step; the result lies beside the output."""
    import fastsft

    if stop_at is not None and os.environ["RANK"] == "1":
        signal_in_step(stop_at, number)
    result = fastsft.train(config)
    if os.environ["RANK"] == "0":
        found = {"loss": result.train_loss, "from": result.resumed_from}
        Path(config["output"] + ".json").write_text(json.dumps(found))


def signal_in_step(at: int, number: int) -> None:
    """This process sends itself a signal when step ``at`` begins, counted from 1."""
    from fastsft.train.update import Update

    original = Update.__call__

    def counted(self: Update, step: int, *arguments: Any) -> Any:
        if step + 1 == at:
            os.kill(os.getpid(), number)
        return original(self, step, *arguments)

    Update.__call__ = counted  # type: ignore[method-assign]


def poisoned_rank(config: dict[str, Any], index: int) -> None:
    """The loss of the first step's micro-batch ``index`` is NaN; prints the message, and whether it is right."""
    from fastsft.config import load_config
    from fastsft.train.distributed import joined
    from fastsft.train.objective import Objective
    from fastsft.train.trainer import NonFiniteError, Trainer

    with joined() as world:
        trainer = Trainer(load_config(config), progress=False, world=world)
        bad = trainer.stages[0].batches(0)[index]
        original = Objective.__call__

        def poisoned(self: Objective, model: Any, batch: Any, **keys: Any) -> Any:
            loss, aux = original(self, model, batch, **keys)
            same = batch.sources == bad.sources and bool(batch.weights.any()) and keys["divisor"] > 0
            return (loss * float("nan") if same else loss), aux

        Objective.__call__ = poisoned  # type: ignore[method-assign]
        before = {name: p.detach().clone() for name, p in trainer.parallel.named()}
        try:
            trainer.run()
        except NonFiniteError as error:
            same = all(bool((p == before[name]).all()) for name, p in trainer.parallel.named())
            named = [source for source in bad.sources if source in str(error)]
            right = same and named == list(bad.sources) and world.rank >= 0
            print("right:" if right else "wrong:", error)


def gradients_rank(dtype: str, mode: str, path: str) -> None:
    """Saves the gradients that the optimizer would step with, of steps with 1, 2 and 4 micro-batches."""
    import torch
    from train_cases import gradients_of_a_step

    from fastsft.train.distributed import joined

    with joined() as world:
        found = {count: gradients_of_a_step(getattr(torch, dtype), count, mode, world) for count in (1, 2, 4)}
        if world.is_main:
            torch.save(found, path)
