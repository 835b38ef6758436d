"""Tokenised samples on disk, memory-mapped: ids, weights and segments; of each sample where it is from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import orjson

from fastsft.data.batch import Sample, VarlenBatch, lay_out, ranges, segments_of
from fastsft.files import sync, sync_tree

_MANIFEST = "manifest.json"
_BLOCK = 256  # samples looked at together
_OF_TOKENS = {"ids": np.int32, "weights": np.float32, "segments": np.uint8}
_COLUMNS = {**_OF_TOKENS, "lengths": np.int64, "origins": np.int32}


class SampleStore:
    """Random access to samples by number. Immutable once written."""

    def __init__(
        self,
        ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
        segments: npt.NDArray[np.uint8],
        offsets: npt.NDArray[np.int64],
        origins: npt.NDArray[np.int32],
        sources: list[str],
        skills: list[tuple[str, ...]],
        manifest: dict[str, Any],
    ) -> None:
        self._ids, self._weights, self._segments, self._offsets = ids, weights, segments, offsets
        self._sources, self.skills = sources, skills
        self.origins = origins
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SampleStore:
        """Map a folder that :func:`write_store` finished.

        Raises:
            FileNotFoundError: there is none. ValueError: its files do not fit its manifest.
        """
        folder = Path(path)
        manifest = json.loads((folder / _MANIFEST).read_text())
        ids, weights, segments, lengths, origins = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in _COLUMNS)
        sources = (folder / "sources.txt").read_text(encoding="utf-8").split("\n")[:-1]
        skills = [tuple(orjson.loads(line)) for line in (folder / "skills.jsonl").read_bytes().split(b"\n")[:-1]]
        found = {"tokens": len(ids), "samples": len(sources)}
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        of_tokens = {len(ids), len(weights), len(segments), int(offsets[-1])}
        of_samples = {len(lengths), len(origins), len(sources), len(skills)}
        if len(of_tokens) > 1 or len(of_samples) > 1 or any(manifest[k] != v for k, v in found.items()):
            raise ValueError(f"{folder}: damaged sample store: manifest says {manifest}, files hold {found}")
        return cls(ids, weights, segments, offsets, origins, sources, skills, manifest)

    @classmethod
    def from_samples(cls, samples: Iterable[Sample]) -> SampleStore:
        """In memory, for tests and small sets."""
        samples = list(samples)
        lengths = [len(s.ids) for s in samples]
        return cls(
            np.concatenate([s.ids for s in samples]).astype(np.int32) if samples else np.zeros(0, np.int32),
            np.concatenate([s.weights for s in samples]).astype(np.float32) if samples else np.zeros(0, np.float32),
            segments_of(samples),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.array([s.origin for s in samples], np.int32),
            [s.source for s in samples],
            [s.skills for s in samples],
            {"samples": len(samples), "tokens": int(sum(lengths))},
        )

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        begin, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return Sample(
            np.asarray(self._ids[begin:end]),
            np.asarray(self._weights[begin:end]),
            self._sources[index],
            int(self.origins[index]),
            np.asarray(self._segments[begin:end]),
            self.skills[index],
        )

    def batch(self, numbers: npt.NDArray[np.int64]) -> VarlenBatch:
        """The samples of these numbers, packed in this order."""
        begins = self._offsets[numbers]
        lengths = self._offsets[numbers + 1] - begins
        tokens = ranges(begins, lengths)
        sources = tuple(self._sources[i] for i in numbers.tolist())
        origins = tuple(self.origins[numbers].tolist())
        return lay_out(
            self._ids[tokens], self._weights[tokens], self._segments[tokens], lengths, sources, origins, tokens
        )

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self._offsets)

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1])

    @property
    def largest_id(self) -> int:
        """-1 for an empty store."""
        return int(self._ids.max(initial=-1))

    @property
    def trained_tokens(self) -> int:
        """Targets with a weight: a document's first token is never one."""
        return int(self.trained_counts().sum())

    def by_origin(self, count: int) -> list[dict[str, int]]:
        """Samples, tokens and trained tokens of each of ``count`` origins."""
        columns = {
            "samples": np.ones(len(self), np.int64),
            "tokens": self.lengths,
            "trained_tokens": self.trained_counts(),
        }
        members = [np.asarray(self.origins) == origin for origin in range(count)]
        return [{name: int(column[m].sum()) for name, column in columns.items()} for m in members]

    def trained_counts(self) -> npt.NDArray[np.int64]:
        """Of each sample its trained tokens.

        A block of samples at a time, since a count for every token would be twice their size.
        """
        counts = np.zeros(len(self), np.int64)
        for begin in range(0, len(self), _BLOCK):
            offsets = self._offsets[begin : begin + _BLOCK + 1]
            weighted = np.asarray(self._weights[offsets[0] : offsets[-1]]) > 0
            sums = np.concatenate([[0], np.cumsum(weighted)])
            starts, ends = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
            found = sums[ends] - sums[starts]
            filled = ends > starts
            found[filled] -= weighted[starts[filled]]
            counts[begin : begin + len(found)] = found
        return counts


def write_store(path: str | os.PathLike[str], samples: Iterable[Sample], **manifest: Any) -> SampleStore:
    """Write a store under a temporary name, sync it and rename it, so that it exists whole or not at all."""
    return join_stores(path, [SampleStore.from_samples(samples)], **manifest)


def join_stores(path: str | os.PathLike[str], stores: Iterable[SampleStore], **manifest: Any) -> SampleStore:
    """The samples of several stores in one, written like :func:`write_store` does; each is used once, then dropped.

    One process at a time: the temporary name is fixed, so that what a killed run left is overwritten.
    """
    folder = Path(path)
    stage = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    samples = tokens = 0
    with ExitStack() as files:
        columns = {name: files.enter_context(open(stage / f"{name}.npy", "wb")) for name in _COLUMNS}
        sources = files.enter_context(open(stage / "sources.txt", "w", encoding="utf-8"))
        skills = files.enter_context(open(stage / "skills.jsonl", "wb"))
        for name, stream in columns.items():
            _write_header(stream, _COLUMNS[name], 0)
        for store in stores:
            arrays = (store._ids, store._weights, store._segments, store.lengths, store.origins)
            for (name, stream), array in zip(columns.items(), arrays, strict=True):
                stream.write(np.ascontiguousarray(array, _COLUMNS[name]).data)
            sources.writelines(f"{s}\n" for s in store._sources)
            skills.writelines(orjson.dumps(s, option=orjson.OPT_APPEND_NEWLINE) for s in store.skills)
            samples, tokens = samples + len(store), tokens + store.num_tokens
        for name, stream in columns.items():
            stream.seek(0)
            _write_header(stream, _COLUMNS[name], tokens if name in _OF_TOKENS else samples)
    (stage / _MANIFEST).write_text(json.dumps({"samples": samples, "tokens": tokens, **manifest}, indent=2) + "\n")
    sync_tree(stage)
    shutil.rmtree(folder, ignore_errors=True)
    stage.rename(folder)
    sync(folder.parent)
    return SampleStore.open(folder)


def _write_header(stream: IO[bytes], dtype: type, length: int) -> None:
    """Of a .npy file; as long for one length as for another, since NumPy leaves room for the array to grow."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, header)
