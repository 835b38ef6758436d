"""A folder of results that grows line by line and survives a kill: what it was made for, and what is whole in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from fastsft.files import sync
from fastsft.models.tokenizer import FILES
from fastsft.verify.languages import Language
from fastsft.verify.tasks import Task

_PLAN = "plan.json"


def check_plan(folder: Path, plan: dict[str, Any], what: str) -> None:
    """Write what the folder is for, or compare it with what it was for.

    Raises:
        ValueError: that was something else; names the settings.
    """
    path = folder / _PLAN
    text = orjson.dumps(plan, option=orjson.OPT_INDENT_2) + b"\n"
    if path.is_file():
        before, now = orjson.loads(path.read_bytes()), orjson.loads(text)
        changed = [name for name in now if name != "options" and before.get(name) != now[name]]
        changed += [k for k, value in now["options"].items() if before.get("options", {}).get(k) != value]
        if changed:
            raise ValueError(
                f"{folder}: has {what} with other settings: {', '.join(changed)}. Restore them, "
                "choose another output, or remove the folder"
            )
        return
    stage = folder / f".{_PLAN}.tmp"
    stage.write_bytes(text)
    sync(stage)
    stage.replace(path)
    sync(folder)


def read_whole(path: Path, ids: Sequence[str | int], group: int) -> list[dict[str, Any]]:
    """The rows of all groups that are there whole, or of all. What a killed process left of another one is cut off.

    Args:
        ids: the task_id of each row when all is done.
        group: rows that are written together.
    """
    rows: list[dict[str, Any]] = []
    ends = [0]
    if path.is_file():
        with open(path, "rb") as stream:
            for line in stream:
                try:
                    row = orjson.loads(line) if line.endswith(b"\n") else None
                except orjson.JSONDecodeError:
                    row = None
                if not isinstance(row, dict) or len(rows) == len(ids) or row.get("task_id") != ids[len(rows)]:
                    break
                rows.append(row)
                ends.append(ends[-1] + len(line))
        whole = len(rows) if len(rows) == len(ids) else len(rows) // group * group
        os.truncate(path, ends[whole])
        sync(path)
        del rows[whole:]
    return rows


def digest_model(folder: Path) -> str:
    """Of the files that decide what is generated."""
    digest = hashlib.blake2b(digest_size=16)
    names = {path.name for pattern in ("*.safetensors", "*.safetensors.index.json") for path in folder.glob(pattern)}
    for name in sorted(names | {"config.json", *FILES}):
        path = folder / name
        if path.is_file():
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            with open(path, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def digest_tasks(tasks: Sequence[Task], languages: Mapping[str, Language] | None = None) -> str:
    """Of all that decides whether a sample of them passes: the tasks, and those of ``languages`` that they are in."""
    # json and not orjson: what a file escapes may be a lone surrogate, which is for the engine to refuse
    used = {task.language for task in tasks} & (languages or {}).keys()
    own = [dataclasses.asdict((languages or {})[name]) for name in sorted(used)]
    return digest_json([[dataclasses.astuple(task) for task in tasks], *own])


def digest_json(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
