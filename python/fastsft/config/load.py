"""A run's configuration read from TOML, validated by pydantic, written back resolved beside every result."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsft.config.data import FIELD_NAMES, SourceOptions
from fastsft.config.errors import ConfigError, unknown_key
from fastsft.config.ranges import check_ranges
from fastsft.config.run import Config, StageOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    import pydantic


def load_config(source: Config | str | os.PathLike[str] | dict[str, Any]) -> Config:
    """Read and validate a run configuration.

    Args:
        source: a TOML file, the config.json of a run, or the same structure as nested dicts. A :class:`Config` is
            validated as well: building one in Python checks nothing.

    Returns:
        The configuration with every default filled in.

    Raises:
        ConfigError: an unreadable or malformed file, an unknown key (the nearest one is named), a value of the wrong
            type or out of range.
    """
    if isinstance(source, Config):
        source = to_dict(source)
    if isinstance(source, dict):
        return _validate(source, "config")
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
        return _validate(json.loads(text) if path.suffix == ".json" else tomllib.loads(text), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain nested dicts; ``load_config`` takes it back."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


@cache
def _adapter() -> pydantic.TypeAdapter[Config]:
    """Building it takes longer than most reads."""
    import pydantic

    return pydantic.TypeAdapter(Config)


def _validate(raw: dict[str, Any], where: str) -> Config:
    import pydantic

    raw = _without_paths(raw)
    try:
        config = _adapter().validate_python(raw)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(e, where) for e in error.errors())) from None
    leaves = dict(_leaves(to_dict(config)))
    for name, given in _leaves(raw):  # pydantic reads "3e-3" as a number and true as 1
        if any(isinstance(given, kind) != isinstance(leaves[name], kind) for kind in (str, bool)):
            expected = "true or false" if isinstance(leaves[name], bool) else "a number"
            raise ConfigError(f"{where}: {name}: expected {expected}, got {given!r}")
    for name, value in leaves.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {name}: expected a finite number, got {value!r}")
    tables = {f"data.sources.{i}.fields": source.fields for i, source in enumerate(config.data.sources)}
    for table, names in {"data.fields": config.data.fields, **tables}.items():
        for key in names:
            if key not in FIELD_NAMES:
                raise ConfigError(f"{where}: {unknown_key(f'{table}.{key}', FIELD_NAMES)}")
    check_ranges(config, where)
    return config


def _without_paths(node: Any) -> Any:
    """pathlib's paths, which callers in Python have, as the strings that a file has."""
    if isinstance(node, dict):
        return {key: _without_paths(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_without_paths(value) for value in node]
    return os.fspath(node) if isinstance(node, os.PathLike) else node


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all in nested dicts, and in lists of dicts, whose entries have their numbers as names."""
    for key, value in node.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            value = {str(i): entry for i, entry in enumerate(value)}
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _explain(error: Any, where: str) -> str:
    keys = [str(k) for k in error["loc"]]
    name = ".".join(keys)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: {unknown_key(name, _known_keys(keys[:-1]))}"
    return f"{where}: {name}: {error['msg']}, got {error['input']!r}"


_ENTRIES = {"sources": SourceOptions("", []), "stages": StageOptions("")}


def _known_keys(path: list[str]) -> list[str]:
    node: Any = Config()
    for key in path:
        if not key.isdecimal():  # an entry's number in its list
            node = _ENTRIES.get(key) or getattr(node, key, None)
    return [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
