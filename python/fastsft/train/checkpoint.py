"""Checkpoints that exist whole or not at all.

``step-N`` is written under a temporary name: every file is synced, a manifest with the SHA-256 of each comes last, the
folder is synced and renamed, and so is its parent. Reading takes the newest folder whose manifest verifies. A process
killed at any instant therefore leaves the previous checkpoint or the new one, never half of one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsft.files import sync, sync_tree
from fastsft.train.distributed import World

_NAME = re.compile(r"step-(\d+)$")
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    step: int
    state: dict[str, Any]  # trainer.json


Fill = Callable[[Path], Mapping[str, str] | None]
"""Writes files into the folder it is given, and returns the SHA-256 of those that need not be read again for it."""


def write(root: Path, step: int, state: dict[str, Any], fill: Fill, *, keep: int, world: World | None = None) -> Path:
    """Write ``step-<step>`` under ``root`` and then remove all but the newest ``keep`` up to it.

    Later ones go too: the run continues from before them only when they were damaged.

    Args:
        state: JSON-serialisable; becomes trainer.json.
        fill: writes the model and optimizer files.
        world: processes that write together: each calls this and fills in its part, and the folder gets its name when
            all have done so.

    Raises:
        OSError: disk full, no permission, ...; what was saved before is untouched.
    """
    world = world or World()
    target = root / f"step-{step:08d}"
    stage = world.from_main(lambda: _begin(root, target))
    try:
        digests = {name: digest for part in world.gather(fill(stage)) for name, digest in (part or {}).items()}
        world.from_main(lambda: _finish(stage, target, state, digests))
    except BaseException:
        if world.is_main:
            shutil.rmtree(stage, ignore_errors=True)
        raise
    if world.is_main:
        folders = _folders(root)
        upto = [f for f in folders if _step(f) <= step]
        for old in [*folders[: -len(upto)], *upto[keep:]]:
            shutil.rmtree(old)
    return target


def _begin(root: Path, target: Path) -> Path:
    """An empty folder of a temporary name."""
    root.mkdir(parents=True, exist_ok=True)
    stage = root / f".{target.name}.tmp-{os.getpid()}"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    return stage


def _finish(stage: Path, target: Path, state: dict[str, Any], digests: Mapping[str, str]) -> None:
    (stage / "trainer.json").write_text(json.dumps(state, indent=2) + "\n")
    names = sorted(str(p.relative_to(stage)) for p in stage.rglob("*") if p.is_file())
    manifest = {name: digests.get(name) or sha256(stage / name) for name in names}
    (stage / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    sync_tree(stage)
    if target.exists():  # the same step again, after a resume from an older checkpoint
        shutil.rmtree(target)
    os.rename(stage, target)
    sync(target.parent)


class Writer:
    """Writes the checkpoints of a run one after the other: each before :meth:`write` returns, or beside what follows.

    Args:
        background: write in a thread. ``fill`` must then hold copies of what the run goes on to change.
        world: see :func:`write`; several processes write in the foreground.
    """

    def __init__(self, root: Path, *, keep: int, background: bool, world: World | None = None) -> None:
        self._write = functools.partial(write, root, keep=keep, world=world)
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._last: Future[Path] | None = None

    def write(self, step: int, state: dict[str, Any], fill: Fill) -> None:
        """See the function :func:`write`. In the background, a failure of the one before is raised here."""
        self.wait()
        if self._pool is None:
            self._write(step, state, fill)
        else:
            self._last = self._pool.submit(self._write, step, state, fill)

    def wait(self) -> None:
        """Until everything is on disk; raises what went wrong."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """The same without raising, for a run that ends for another reason."""
        if self._pool is not None:
            self._pool.shutdown()


def latest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies. Broken ones are reported through ``warn``; unfinished ones are removed."""
    if not root.is_dir():
        return None
    for stale in root.glob(".step-*.tmp-*"):
        shutil.rmtree(stale)
    for folder in _folders(root):
        fault = verify(folder)
        if fault is None:
            return Checkpoint(folder, _step(folder), json.loads((folder / "trainer.json").read_text()))
        warn(f"checkpoint {folder} is damaged ({fault}); falling back to the one before")
    return None


def verify(folder: Path) -> str | None:
    """None if every file matches the manifest, otherwise what is wrong."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{_MANIFEST}: {error}"
    if "trainer.json" not in manifest:
        return f"{_MANIFEST} does not list trainer.json"
    for name, digest in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256(file) != digest:
            return f"{name} does not match its checksum"
    return None


def replace_folder(stage: Path, target: Path) -> None:
    """Put a finished folder in another's place. A kill in between leaves one of them under a temporary name, which the
    next call removes."""
    sync_tree(stage)
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(stage, target)
    sync(target.parent)
    for stale in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)


def write_file(path: Path, content: str) -> None:
    """Replace a file as a whole."""
    stage = path.with_name(f".{path.name}.tmp")
    stage.write_text(content)
    sync(stage)
    os.replace(stage, path)
    sync(path.parent)


def _folders(root: Path) -> list[Path]:
    return sorted((p for p in root.iterdir() if _NAME.match(p.name)), key=_step, reverse=True)


def _step(folder: Path) -> int:
    match = _NAME.match(folder.name)
    return int(match.group(1)) if match else -1


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
