"""A run's folder as a report reads it: finished, going on, or killed."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsft.config import ConfigError
from fastsft.train.metrics import read_metrics
from fastsft.train.watch import Watch

Row = dict[str, Any]
_PHASES = ("data", "forward_backward", "optimizer")
_POINTS = 500


@dataclass(frozen=True)
class Run:
    """``about`` is empty where a run ended before its first step."""

    name: str
    rows: list[Row]
    config: dict[str, Any]
    about: dict[str, Any]
    finished: bool

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises ConfigError: the folder is not one of a run."""
        if not _is_run(folder):
            runs = [p.name for p in sorted(folder.parent.glob("*")) if _is_run(p)]
            near = difflib.get_close_matches(folder.name, runs, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; runs beside it: {', '.join(runs)}" if runs else ""
            raise ConfigError(f"{folder}: expected a run's folder, found no run's config.json in it{hint}")
        about = folder / "about.json"
        return cls(
            folder.resolve().name,
            read_metrics(folder / "metrics.jsonl"),
            json.loads((folder / "config.json").read_text(encoding="utf-8")),
            json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {},
            (folder / "model").is_dir(),
        )

    @classmethod
    def read_all(cls, folders: Sequence[Path]) -> list[Run]:
        """Of several runs, each under a name of its own: its folder's, or the whole path where two of them are equal.

        Raises:
            ConfigError: as :meth:`read`; or a folder that is given twice.
        """
        found = [cls.read(folder) for folder in folders]
        paths = [folder.resolve() for folder in folders]
        for path in paths:
            if paths.count(path) > 1:
                raise ConfigError(f"{path}: expected different runs, got this one twice")
        names = [run.name for run in found]
        return [
            run if names.count(run.name) == 1 else dataclasses.replace(run, name=str(folder))
            for run, folder in zip(found, folders, strict=True)
        ]

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    def curve(self, key: str, kind: str = "step") -> tuple[list[float], list[float]]:
        """Steps and values, of long runs the means of stretches of steps."""
        return thinned([(row["step"], row[key]) for row in self.of(kind) if row.get(key) is not None])

    def parts(self, key: str) -> dict[str, tuple[list[float], list[float]]]:
        """The loss of each source, or of each segment, by step."""
        points: dict[str, list[tuple[float, float]]] = {}
        for row in self.of("step"):
            for name, loss in row.get(key, {}).items():
                if loss is None:  # how JSON has a NaN
                    continue
                points.setdefault(name, []).append((row["step"], loss))
        return {name: thinned(found) for name, found in sorted(points.items())}

    def seconds(self) -> dict[str, float]:
        """Of each phase, summed over all processes of the run."""
        total = dict.fromkeys(_PHASES, 0.0)
        for row in self.rows:
            for name, spent in row.get("phases", {}).items():
                total[name] += spent
            if row["kind"] in _SPENT:
                name = _SPENT[row["kind"]]
                total[name] = total.get(name, 0.0) + row["seconds"]
        return total

    def summary(self) -> dict[str, Any]:
        """What runs are compared by; None for what a run does not have."""
        steps, evals = self.of("step"), self.of("eval")
        planned = self.about.get("total_steps")
        early = Watch(steps).early(planned) if planned else None
        passed = self.of("pass_at_k")
        tokens, spent = sum(r["tokens"] for r in steps), sum(r["seconds"] for r in steps)
        return {
            "run": self.name,
            "state": "finished" if self.finished else "not finished",
            "steps": len(steps),
            "planned steps": planned,
            "tokens": tokens,
            "trained tokens": sum(r["trained_tokens"] for r in steps),
            "training loss": steps[-1]["loss"] if steps else None,
            "held-out loss before": evals[0]["loss"] if evals and evals[0]["step"] == 0 else None,
            "held-out loss": evals[-1]["loss"] if evals else None,
            "best held-out loss": min((r["loss"] for r in evals if r["loss"] is not None), default=None),
            "pass@k": passed[-1]["pass_at"] if passed else None,
            "early steps": early.steps if early else None,
            "early loss": early.loss if early else None,
            "early gradient norm": early.grad_norm if early else None,
            "signals": len(self.of("signal")),
            "tokens/s": tokens / spent if spent else None,
            "MFU": sum(r["mfu"] * r["seconds"] for r in steps) / spent if spent else None,
            "hours": sum(self.seconds().values()) / 3600,
        }


def _is_run(folder: Path) -> bool:
    """Whether the folder's config.json is that of a run; models have one too."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"output", "train"} <= found.keys()


_SPENT = {"eval": "evaluation", "save": "saving", "sample": "samples", "pass_at_k": "pass@k"}


def thinned(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most 500 points: the means of equal stretches."""
    size = -(-len(points) // _POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return tuple([sum(p[axis] for p in part) / len(part) for part in parts] for axis in (0, 1))  # type: ignore[return-value]


def differences(runs: list[Run]) -> list[tuple[str, list[Any]]]:
    """Dotted names of the settings in which the runs' configurations differ, with the value in each run."""
    flat = [dict(leaves(run.config)) for run in runs]
    names = sorted({name for one in flat for name in one} - {"output"})
    values = [(name, [one.get(name) for one in flat]) for name in names]
    return [(name, found) for name, found in values if any(v != found[0] for v in found)]


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
