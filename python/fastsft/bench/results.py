"""What a run of the benches keeps: a row per contestant, the machine, and the limits that were measured on it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsft.bench.topics import TOPICS, topic_of

RATES = ("documents_per_second", "tokens_per_second")
SHARE = "share_of_"
OURS = "fastsft"


@dataclass
class Row:
    """Seconds of one contestant. Rows recorded before p20 and p80 were kept have only the interquartile range.

    ``extra`` is what the bench notes besides; its ``share_of_<limit>`` are shares of the machine's measured limits.
    ``times_ours``: how many times longer than fastsft it took, for as much work.
    """

    bench: str
    group: str
    contestant: str
    median: float
    iqr: float
    rounds: int
    extra: dict[str, Any]
    p20: float | None = None
    p80: float | None = None
    times_ours: float | None = None
    date: str = ""
    commit: str = ""

    @property
    def spread(self) -> tuple[float, float]:
        if self.p20 is None or self.p80 is None:
            return self.median - self.iqr / 2, self.median + self.iqr / 2
        return self.p20, self.p80

    @property
    def shares(self) -> dict[str, float]:
        """Limit -> share of it."""
        return {key.removeprefix(SHARE): value for key, value in self.extra.items() if _is_share(key, value)}

    @property
    def notes(self) -> dict[str, Any]:
        return {key: value for key, value in self.extra.items() if not _is_share(key, value)}

    @property
    def is_ours(self) -> bool:
        """fastsft, or a way of using it that the bench sets beside."""
        return self.contestant.startswith(OURS)

    @property
    def beats_us(self) -> bool:
        return self.times_ours is not None and not self.is_ours and self.times_ours < 1


def _ratio(row: Row) -> float:
    return 1.0 if row.times_ours is None else row.times_ours


def _is_share(key: str, value: Any) -> bool:
    return key.startswith(SHARE) and isinstance(value, int | float)


@dataclass
class Result:
    """``limits``: threads -> limit -> bytes or floating-point operations per second."""

    date: str
    machine: dict[str, Any]
    rows: list[Row]
    limits: dict[str, dict[str, float]] = field(default_factory=dict)

    def lost(self) -> list[Row]:
        """The fastest rival of each group in which one is faster than fastsft, the worst first."""
        fastest = {row.group: row for row in sorted(self.rows, key=_ratio, reverse=True) if row.beats_us}
        return sorted(fastest.values(), key=_ratio)

    def contested(self) -> set[str]:
        """Groups in which a rival took part."""
        return {row.group for row in self.rows if row.times_ours is not None and not row.is_ours}

    def groups(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found

    def by_topic(self) -> dict[str, dict[str, list[Row]]]:
        """Topic -> group -> rows, in the order of the topics."""
        found: dict[str, dict[str, list[Row]]] = {name: {} for name in TOPICS}
        for group, rows in self.groups().items():
            found[topic_of(rows[0].bench)][group] = rows
        return {name: groups for name, groups in found.items() if groups}

    def to_dict(self) -> dict[str, Any]:
        """Without what is not known."""
        rows = [{k: v for k, v in dataclasses.asdict(row).items() if v not in (None, "")} for row in self.rows]
        return {"date": self.date, "machine": self.machine, "limits": self.limits, "rows": rows}

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Result:
        """Raises ValueError where the file holds something else."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(**row) for row in raw["rows"]]
            return cls(raw["date"], raw["machine"], rows, raw.get("limits", {}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: expected results of fastsft bench: {error}") from None


def summarise(benchmarks: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows of pytest-benchmark's data, dated today, compared within their groups."""
    import numpy as np

    today = datetime.date.today().isoformat()
    rows = []
    for b in benchmarks:
        stats = b["stats"]
        p20, p80 = np.quantile(stats["data"], [0.2, 0.8]).tolist()
        rows.append(
            Row(
                bench=Path(b["fullname"].partition("::")[0]).stem.removeprefix("bench_"),
                group=b["group"] or b["name"],
                contestant=_contestant(b),
                median=stats["median"],
                iqr=stats["iqr"],
                rounds=stats["rounds"],
                extra=b["extra_info"],
                p20=p20,
                p80=p80,
                date=today,
            )
        )
    set_ratios(rows)
    return rows


def _contestant(b: dict[str, Any]) -> str:
    """The parameter of that name, or the name that the bench set itself; a bench without either has no rivals."""
    default = OURS if b["name"].startswith("test_") else b["name"]
    return str((b["params"] or {}).get("contestant", default))


def set_ratios(rows: Sequence[Row]) -> None:
    """``times_ours`` of each row in a group with fastsft: for as much work, where the slow ones got less of it and say
    how much they did in a second."""
    ours = {row.group: row for row in rows if row.contestant == OURS}
    for row in rows:
        if own := ours.get(row.group):
            rate = next((k for k in RATES if k in own.extra and k in row.extra), None)
            row.times_ours = own.extra[rate] / row.extra[rate] if rate else row.median / own.median


def merged(older: Result, fresh: Sequence[Row]) -> list[Row]:
    """The fresh groups in the place of the same ones, and the others as they were."""
    groups = {row.group for row in fresh}
    return [row for row in older.rows if row.group not in groups] + list(fresh)


def machine() -> dict[str, Any]:
    """Processor and versions; nothing else that would tell which machine it is."""
    import platform

    import torch

    from fastsft.info import info

    found = info()
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    said = {name.strip(): value.strip() for name, _, value in lines}
    model = said.get("model name", platform.machine())
    family = said.get("cpu family")  # cloud machines leave the generation out of the name
    return {
        "cpu": f"{model}, family {family}" if family else model,
        "architecture": platform.machine(),
        "isa": found["cpu"]["isa_active"],
        "threads": found["cpu"]["threads"],
        "torch_threads": torch.get_num_threads(),
        "versions": {"fastsft": found["fastsft"], "python": found["python"], "torch": found["packages"]["torch"]},
    }


def commit(root: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
