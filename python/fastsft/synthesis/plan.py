"""What an iterative run consists of, read from TOML."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsft.config import Config, ConfigError, load_config, unknown_key
from fastsft.synthesis.draw import DrawOptions
from fastsft.synthesis.select import SelectOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    import pydantic


@dataclass(frozen=True)
class Plan:
    """Rounds of sampling, execution and training (expert iteration, arXiv 1705.08439; with language models STaR,
    arXiv 2203.14465, and ReST-EM, arXiv 2312.06585)."""

    output: str
    """Folder of all rounds."""
    model: str
    """Folder of the model that the first round samples from."""
    tasks: list[str]
    """Files of tasks that every round samples."""
    held_out: list[str]
    """Files of other tasks, for pass@1 before the first round and after each."""
    rounds: int = 3
    seed: int = 0
    """Of everything random, in every round."""
    restart: bool = False
    """Train the first model anew in every round, as STaR and ReST-EM do, instead of the newest one."""
    data: list[str] = field(default_factory=list)
    """Files of rows that every round trains on besides."""
    draw: DrawOptions = field(default_factory=DrawOptions)
    select: SelectOptions = field(default_factory=SelectOptions)
    run: dict[str, Any] = field(default_factory=dict)
    """How a round trains: a configuration of ``fastsft train`` without output, seed, model and training rows."""

    def training(self, number: int, model: Path, rows: list[Path]) -> Config:
        """The run of round ``number``, which trains ``model``."""
        given = {key: dict(value) if isinstance(value, Mapping) else value for key, value in self.run.items()}
        given |= {"output": str(self.folder(number) / "run"), "seed": self.seed_of(number)}
        given["model"] = {**given.get("model", {}), "path": str(model)}
        given["data"] = {**given.get("data", {}), "train": [*map(str, rows), *self.data]}
        return load_config(given)

    def folder(self, number: int) -> Path:
        return Path(self.output) / f"round-{number}"

    def seed_of(self, number: int) -> int:
        """Different for every round of every seed, as long as there are not more than a thousand."""
        return 1000 * self.seed + number


@cache
def _adapter() -> pydantic.TypeAdapter[Plan]:
    import pydantic

    return pydantic.TypeAdapter(Plan)


# what a round sets itself
_SET = {"draw": ("seed",), "select": ("seed",), "run": ("output", "seed"), "run.model": ("path", "init"),
        "run.data": ("train", "sources")}  # fmt: skip


def load_plan(source: str | os.PathLike[str] | Mapping[str, Any]) -> Plan:
    """Read and validate a plan: a TOML file or the same as nested dicts.

    Raises:
        ConfigError: an unreadable file, an unknown key (the nearest one is named), a value of the wrong type or out of
            range, or a key that each round sets itself.
    """
    import pydantic

    where = "plan" if isinstance(source, Mapping) else str(source)
    raw = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    for table, keys in _SET.items():
        node: Any = raw
        for part in table.split("."):
            node = node.get(part, {}) if isinstance(node, Mapping) else {}
        for key in keys:
            if isinstance(node, Mapping) and key in node:
                raise ConfigError(f"{where}: {table}.{key}: expected nothing, each round sets it; got {node[key]!r}")
    sections: dict[str, Any] = {"": Plan, "draw": DrawOptions, "select": SelectOptions}
    tables = {name: raw.get(name, {}) if name else raw for name in sections}
    for table, given in tables.items():
        names = [f.name for f in dataclasses.fields(sections[table])]
        for key in given if isinstance(given, Mapping) else ():
            if key not in names:
                raise ConfigError(f"{where}: {unknown_key(f'{table}.{key}'.lstrip('.'), names)}")
    try:
        plan = _adapter().validate_python(raw)
    except pydantic.ValidationError as error:
        places = [(".".join(map(str, e["loc"])), e) for e in error.errors()]
        wrong = [f"{where}: {place}: {e['msg']}, got {e['input']!r:.200}" for place, e in places]
        raise ConfigError("\n".join(wrong)) from None
    for table, given in tables.items():  # pydantic reads "3" as a number and true as 1
        for key, value in given.items():
            found = getattr(getattr(plan, table) if table else plan, key)
            if any(isinstance(value, kind) != isinstance(found, kind) for kind in (str, bool)):
                expected = "true or false" if isinstance(found, bool) else "a number"
                raise ConfigError(f"{where}: {f'{table}.{key}'.lstrip('.')}: expected {expected}, got {value!r}")
    if not 1 <= plan.rounds < 1000:
        raise ConfigError(f"{where}: rounds: expected a number from 1 to 999, got {plan.rounds}")
    if plan.seed < 0:
        raise ConfigError(f"{where}: seed: expected at least 0, got {plan.seed}")
    for name in ("tasks", "held_out"):
        if not getattr(plan, name):
            raise ConfigError(f"{where}: {name}: expected at least one file")
    try:
        plan.training(1, Path(plan.model), [])
    except ConfigError as error:
        raise ConfigError(f"{where}: run: {str(error).removeprefix('config: ')}") from None
    return plan


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
