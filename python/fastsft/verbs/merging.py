"""``fastsft soup`` and ``fastsft restore-layers``: new models from the weights of others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsft.verbs.console import UsageError, print_json

if TYPE_CHECKING:
    from fastsft.train.soup import Trial


def soup(
    models: tuple[Path, ...],
    /,
    *,
    output: Path,
    greedy: bool = False,
    data: tuple[Path, ...] = (),
    fields: dict[str, str] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    json: bool = False,
) -> None:
    """Average the weights of models that were tuned from the same start.

    Args:
        models: two or more folders; the first gives types, configuration, tokenizer and template of the result.
        output: new folder of the result.
        greedy: begin with the best model, and add the others, best first, if the mean's held-out loss falls.
        data: held-out files of --greedy, in the formats of training data.
        fields: names used in these files, as in data.fields of a run.
        dtype: what --greedy evaluates in.
        json: machine-readable output.
    """
    from fastsft.models.merge import soup as uniform

    if greedy != bool(data):
        raise UsageError("soup: give --greedy and --data together, or neither of them")
    if not greedy:
        uniform(models, output)
        result: dict[str, Any] = {"soup": "uniform", "models": [str(m) for m in models], "model_path": str(output)}
    else:
        trials = _greedy(models, output, data, fields or {}, dtype)
        kept = next(t for t in reversed(trials) if t.kept)
        result = {
            "soup": "greedy", "models": [str(models[i]) for i in kept.members], "model_path": str(output),
            "loss": kept.loss,
            "tried": [{"models": [str(models[i]) for i in t.members], "loss": t.loss, "kept": t.kept} for t in trials],
        }  # fmt: skip
    if json:
        print_json(result)
        return
    if greedy:
        _show_trials(models, trials)
    print(f"mean of {len(result['models'])} of {len(models)} models: {output}")


def _greedy(
    models: tuple[Path, ...],
    output: Path,
    data: tuple[Path, ...],
    fields: dict[str, str],
    dtype: str,
) -> list[Trial]:
    import functools

    import torch

    from fastsft.data.notices import notices
    from fastsft.models.config import ModelConfig
    from fastsft.models.decoder import Decoder
    from fastsft.models.tokenizer import Tokenizer
    from fastsft.progress import bars
    from fastsft.train.evaluate import evaluate_loss
    from fastsft.train.held_out import CAPACITY, read_held_out
    from fastsft.train.soup import greedy_soup

    if not models:
        raise UsageError("soup: give the folders of two models or more")
    config = ModelConfig.from_file(models[0] / "config.json")
    store, report = read_held_out(data, Tokenizer.from_folder(models[0]), config, fields=fields)
    if not store.lengths.size:
        raise UsageError("; ".join([f"soup: {', '.join(map(str, data))}: no usable row", *notices(report)]))

    def loss_of(model: Decoder) -> float:
        found = evaluate_loss(model, store, capacity=CAPACITY)
        if found is None:
            raise UsageError(f"soup: {', '.join(map(str, data))}: no row with a target")
        return found.loss

    with bars() as tell:
        progress = functools.partial(tell, "held-out loss")
        return greedy_soup(models, output, loss_of, dtype=getattr(torch, dtype), progress=progress)


def _show_trials(models: tuple[Path, ...], trials: list[Trial]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("mean of", "held-out loss", "")
    for trial in trials:
        table.add_row(", ".join(str(models[i]) for i in trial.members), f"{trial.loss:.4f}", "kept" * trial.kept)
    Console().print(table, markup=False)


def restore_layers(tuned: Path, base: Path, /, *, layers: str, output: Path, json: bool = False) -> None:
    """Put chosen layers of a tuned model back to those of its base.

    Args:
        tuned: folder of the tuned model; it gives everything that is not restored.
        base: folder of the model that it was tuned from.
        layers: numbers and ranges from 0, such as 0-3,7.
        output: new folder of the result.
        json: machine-readable output.
    """
    from fastsft.models.merge import parse_layers
    from fastsft.models.merge import restore_layers as restore

    numbers = parse_layers(layers)
    restore(tuned, base, numbers, output)
    if json:
        print_json({"restored_layers": numbers, "model_path": str(output)})
    else:
        print(f"layers {', '.join(map(str, numbers))} of {base}, everything else of {tuned}: {output}")
