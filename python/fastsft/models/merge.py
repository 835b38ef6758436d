"""Models made of models: the mean of several tuned ones, or a tuned one with layers of its base.

Tensors are combined and written a few rows at a time, so that memory does not follow the models' size. The result has
the first model's files: its layout of weights, their types, the configuration, the tokenizer and the chat template.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastsft.files import sync, sync_tree
from fastsft.models.config import ModelConfig
from fastsft.models.decoder import Decoder
from fastsft.models.skeleton import skeleton
from fastsft.models.stored import EMBEDDING, HEAD, IGNORED, INDEX, Stored, check_tied, hf_name, match, open_tensors
from fastsft.models.tokenizer import FILES, Tokenizer

_PIECE = 1 << 22  # elements combined at once: 32 MiB in float64
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NO_ARCHITECTURE = {"source", "text", "initializer_range", "pad_token_id"}


def soup(models: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> None:
    """The uniform soup (arXiv 2203.05482): every weight is the mean of the models', summed in float64.

    The models should have been tuned from the same start; the mean of unrelated ones is noise.

    Args:
        models: two or more Hugging Face folders; the weights are written in the types of the first.
        output: a new folder. It appears by one rename, whole or not at all.

    Raises:
        ValueError: fewer than two, a folder that cannot be loaded, models or tokenizers that differ (the message
            names the first difference), or ``output`` exists.
    """
    if len(models) < 2:
        raise ValueError(f"soup: models: expected at least two folders, got {len(models)}")
    with open_members(models) as members:
        everyone = range(len(models))
        members.write(output, lambda name: everyone, {"soup": "uniform", "models": [str(m) for m in models]})


def restore_layers(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    layers: Collection[int],
    output: str | os.PathLike[str],
) -> None:
    """Selective layer restoration (arXiv 2602.06665): the tuned model with whole decoder layers of its base, which can
    bring back the diversity of what it writes.

    Args:
        layers: numbers of the layers that are the base's in the result. Embeddings, head and last norm stay tuned.
        output: as for :func:`soup`; the weights are written in the types of ``tuned``.

    Raises:
        ValueError: as for :func:`soup`; no layer, or one that the models do not have.
    """
    with open_members([tuned, base]) as members:
        count = members.config.num_hidden_layers
        if not layers or not all(0 <= layer < count for layer in layers):
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {sorted(layers) or 'none'}")

        def chosen(name: str) -> Sequence[int]:
            found = _LAYER.match(name)
            return [1] if found and int(found[1]) in layers else [0]

        record = {"tuned": str(tuned), "base": str(base), "restored_layers": sorted(layers)}
        members.write(output, chosen, record)


def parse_layers(text: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7].

    Raises:
        ValueError: anything else than numbers and ascending ranges between commas.
    """
    layers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ValueError(f'layers: expected numbers and ranges such as "0-3,7", got {text!r}')
        layers |= set(range(first, last + 1))
    return sorted(layers)


class Members:
    """Model folders that are open at once and fit each other; made by :func:`open_members`."""

    def __init__(self, folders: Sequence[Path], config: ModelConfig, stored: list[dict[str, Stored]]) -> None:
        self.folders = folders
        self.config = config  # the first's
        self._stored = stored

    def mean(self, name: str, chosen: Sequence[int]) -> Iterator[torch.Tensor]:
        """A tensor's mean over the members numbered ``chosen``, in the first member's type, in pieces of rows."""
        like, sources = self._find(0, name), [self._find(i, name) for i in chosen]
        count = like.shape[0]
        step = max(1, _PIECE // max(1, math.prod(like.shape[1:])))
        for begin in range(0, count, step):
            end = min(begin + step, count)
            if len(sources) == 1:  # as it is: also what is NaN keeps its bits
                total = sources[0].rows(begin, end)
            else:
                total = sources[0].rows(begin, end).to(torch.float64, copy=True)
                for source in sources[1:]:
                    total += source.rows(begin, end)
                total /= len(sources)
            yield total.to(_DTYPES[like.dtype])

    @torch.no_grad()
    def load_mean(self, chosen: Sequence[int], model: Decoder) -> None:
        """Put the mean, rounded as it would be written, into a model's parameters."""
        for name, parameter in model.named_parameters():
            begin = 0
            for piece in self.mean(hf_name(name), chosen):
                parameter[begin : begin + len(piece)].copy_(piece)
                begin += len(piece)

    @staticmethod
    def check_output(output: str | os.PathLike[str]) -> None:
        """Refuse a folder that exists, before any work is done."""
        if Path(output).exists():
            raise ValueError(f"{output}: expected the name of a new folder, got one that exists")

    def write(
        self, output: str | os.PathLike[str], chosen: Callable[[str], Sequence[int]], record: dict[str, Any]
    ) -> None:
        """Write the folder in which the tensor ``name`` is the mean over the members ``chosen(name)``.

        ``record`` becomes merge.json: what the model was made of.
        """
        self.check_output(output)
        target = Path(output).absolute()
        first = self.folders[0]
        stage = target.with_name(f".{target.name}-{os.getpid()}.tmp")
        stage.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        try:
            for file in sorted({tensor.file for tensor in self._stored[0].values()}):
                self._rewrite(file, stage / file.name, chosen)
            for name in (*FILES, "config.json", INDEX):
                if (first / name).is_file():
                    shutil.copyfile(first / name, stage / name)
            (stage / "merge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            sync_tree(stage)
            os.rename(stage, target)
            sync(target.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _rewrite(self, file: Path, target: Path, chosen: Callable[[str], Sequence[int]]) -> None:
        """The file with other values. A safetensors file is the length of its header in 8 bytes, the header, which is
        JSON and the same here, and the tensors one after the other at the offsets that it names."""
        with open(file, "rb") as source, open(target, "wb") as stream:
            length = source.read(8)
            header = source.read(int.from_bytes(length, "little"))
            stream.write(length + header)
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            for name in sorted(entries, key=lambda n: entries[n]["data_offsets"]):
                for piece in self.mean(name, [0] if IGNORED.fullmatch(name) else chosen(name)):
                    stream.write(piece.contiguous().view(torch.uint8).numpy().data)

    def _find(self, member: int, name: str) -> Stored:
        """Of tied weights a folder may hold either one."""
        stored = self._stored[member]
        return stored[name] if name in stored else stored[{HEAD: EMBEDDING, EMBEDDING: HEAD}[name]]


@contextlib.contextmanager
def open_members(models: Sequence[str | os.PathLike[str]]) -> Iterator[Members]:
    """Open model folders that must have one architecture and one tokenizer.

    Raises:
        ValueError: a folder that cannot be loaded, or the first difference to the first folder.
    """
    folders = [Path(m) for m in models]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder with config.json and *.safetensors")
    configs = [ModelConfig.from_file(folder / "config.json") for folder in folders]
    tokenizers = [_tokenizer(folder) for folder in folders]
    for i, folder in enumerate(folders):
        difference = _config_difference(configs[0], configs[i]) or _tokenizer_difference(tokenizers[0], tokenizers[i])
        if difference is not None:
            raise ValueError(f"{folder} cannot be combined with {folders[0]}: {difference}")
    with skeleton():
        model = Decoder(configs[0])
    with contextlib.ExitStack() as stack:
        stored = [open_tensors(folder, stack) for folder in folders]
        for folder, tensors in zip(folders, stored, strict=True):
            match(model, tensors, folder)
            check_tied(configs[0], tensors)
        yield Members(folders, configs[0], stored)


def _config_difference(a: ModelConfig, b: ModelConfig) -> str | None:
    for field in dataclasses.fields(a):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if field.name not in _NO_ARCHITECTURE and ours != theirs:
            return f"config.json: {field.name}: {theirs!r:.200} against {ours!r:.200}"
    return None


def _tokenizer(folder: Path) -> dict[str, Any] | None:
    """What the ids mean, and how text becomes ids; None where the folder has no tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return None
    backend = Tokenizer.from_folder(folder).backend
    content = json.loads(backend.to_str())
    parts = {part: content.get(part) for part in ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder")}
    ids = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    return {"ids": ids, **parts}


def _tokenizer_difference(a: dict[str, Any] | None, b: dict[str, Any] | None) -> str | None:
    if a is None or b is None:
        return None if a is b else "one of them has no tokenizer.json"
    for i in sorted(a["ids"].keys() | b["ids"].keys()):
        if a["ids"].get(i) != b["ids"].get(i):
            return f"tokenizer.json: token {i}: {b['ids'].get(i)!r} against {a['ids'].get(i)!r}"
    for part in a:
        if a[part] != b[part]:
            return f"tokenizer.json: {part} differs"
    return None
