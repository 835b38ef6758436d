"""From a run's files to tokenised train and evaluation stores, with a report of every row that was left out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from fastsft.config import Config, ConfigError, DataOptions, FilterOptions, FimOptions, load_config
from fastsft.data import filters
from fastsft.data.cache import tokenise_to_store
from fastsft.data.decontaminate import decontaminate
from fastsft.data.dedup import dedup, kept
from fastsft.data.fim import find_format
from fastsft.data.lock import hold
from fastsft.data.mixture import passes, sources_of
from fastsft.data.records import DataError, Problems, Record, read_records
from fastsft.data.store import SampleStore
from fastsft.models.fim import FORMATS
from fastsft.models.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # stage, done, total
_VERSION = 10  # raise when the same inputs would give other samples


@dataclass(frozen=True)
class Prepared:
    """What training needs. ``report`` is JSON-serialisable: rows read and skipped (with places), duplicates, tokens."""

    train: SampleStore
    eval: SampleStore
    tokenizer: Tokenizer
    report: dict[str, Any]
    passes: tuple[Fraction, ...] | None = None
    """Of an epoch through each source; None: every sample once."""


def prepare(config: Config, *, progress: Progress | None = None) -> Prepared:
    """Read, deduplicate, split, tokenise and mask the data of a run; reuse what an identical run already wrote.

    Everything is a pure function of the configuration and the bytes of the files, and lies in
    ``<output>/data/<content hash>/``.

    Raises:
        DataError: an unusable row (up to a share of data.max_bad), or no usable row at all; names file and line.
        ConfigError: an invalid setting, no files, no tokenizer, or another process works in the output folder.
    """
    config = load_config(config)
    tell = progress or (lambda stage, done, total: None)
    if not config.data.train and not config.data.sources:
        raise ConfigError("data.train: expected at least one file")
    key = _content_key(config)
    root = Path(config.output) / "data" / key
    if (root / "report.json").is_file():
        return _open(config, root)
    with hold(Path(config.output)):
        _build(config, key, root, tell)
    return _open(config, root)


def _open(config: Config, root: Path) -> Prepared:
    train = SampleStore.open(root / "train")
    sources = len(sources_of(config.data))
    weights = passes(config.data, np.bincount(train.origins, minlength=sources).tolist())
    return Prepared(
        train,
        SampleStore.open(root / "eval"),
        Tokenizer.from_folder(root / "tokenizer"),
        json.loads((root / "report.json").read_text()),
        tuple(weights),
    )


def _build(config: Config, key: str, root: Path, tell: Progress) -> None:
    options = config.data
    problems = Problems("skip" if options.max_bad else "fail", skip="data.max_bad above 0")
    records = list(_counted(_read_sources(options, problems), tell, "reading"))
    report: dict[str, Any] = {"key": key, "rows": len(records) + problems.unusable}
    _check_share(problems, report["rows"], options.max_bad)
    if options.filters != FilterOptions():
        records = list(_counted(filters.apply(records, options.filters, problems), tell, "filtering", len(records)))
    if options.dedup.mode != "none":
        found = dedup(
            records,
            threshold=options.dedup.threshold,
            num_perm=options.dedup.num_perm,
            mode=options.dedup.mode,
            seed=config.seed,
            progress=tell,
        )
        records = list(kept(records, found))
        report["dedup"] = found.to_dict()
    if options.decontaminate.against:
        clean = decontaminate(
            records,
            against=options.decontaminate.against,
            rules=options.decontaminate.rules,
            against_fields=options.decontaminate.fields,
            progress=tell,
        )
        records = [r for r, stays in zip(records, clean.keep, strict=True) if stays]
        report["decontaminate"] = clean.to_dict()
    records, report["capped"] = _cap(records, options, config.seed)
    if options.eval:
        held_out = read_records(options.eval, problems, format=options.format, fields=options.fields)
        train_records, eval_records = records, list(held_out)
    else:
        train_records, eval_records = split(records, options.eval_fraction, config.seed)
    tokenizer = load_tokenizer(config, (r.text() for r in train_records), tell)
    root.mkdir(parents=True, exist_ok=True)
    stores = {
        name: tokenise_to_store(
            root / name, part, tokenizer, config, problems, functools.partial(tell, f"tokenising {name}")
        )
        for name, part in (("train", train_records), ("eval", eval_records))
    }
    _check_share(problems, report["rows"] + (len(eval_records) if options.eval else 0), options.max_bad)
    if len(stores["train"]) == 0:
        raise DataError(
            f"{', '.join(f for s in sources_of(options) for f in s.files)}: no usable row; {_summary(problems)}"
        )
    (root / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(root / "tokenizer")
    for name, store in stores.items():
        report[name] = {"samples": len(store), "tokens": store.num_tokens, "trained_tokens": store.trained_tokens}
    report["sources"] = _by_source(options, stores["train"])
    if options.fim.rate > 0:
        report["without_effect"] = _idle(options.fim, tokenizer, any(r.kind == "text" for r in train_records))
    report["skipped"] = dict(problems.counts)
    report["skipped_examples"] = problems.examples
    # The report comes last: its presence says that everything before it is complete.
    stage = root / "report.json.tmp"
    with open(stage, "w") as stream:
        stream.write(json.dumps(report, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    stage.replace(root / "report.json")


def _idle(options: FimOptions, tokenizer: Tokenizer, has_texts: bool) -> list[str]:
    """Settings of ``data.fim`` that change nothing in this run."""
    if not has_texts:
        return [f"without effect: data.fim.rate = {options.rate} is for rows of the format text, and there is none"]
    if None in ((found := find_format(tokenizer, options)).psm, found.spm):
        order = "psm" if found.spm is None else "spm"
        return [f"without effect: data.fim.spm_rate = {options.spm_rate}; this format has the order {order} alone"]
    return []


# What happened to rows that are counted and used.
def split(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Hold out about ``fraction`` of the records by a hash of their content: equal rows fall on the same side."""
    limit = int(fraction * 2**64)
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        sides[int.from_bytes(_digest(record, str(seed)), "little") < limit].append(record)
    return sides


def load_tokenizer(config: Config, texts: Iterator[str], tell: Progress) -> Tokenizer:
    """The run's tokenizer: trained on the texts, or read from a folder."""
    options = config.tokenizer
    if options.train_vocab is not None:
        tell("training tokenizer", 0, 1)
        fim = config.data.fim
        markers = fim.markers or FORMATS["qwen" if fim.format == "auto" else fim.format].required
        tokenizer = Tokenizer.train(texts, options.train_vocab, markers)
        tell("training tokenizer", 1, 1)
        return tokenizer
    folder = options.path or config.model.path
    if folder is None:
        raise ConfigError("tokenizer: give tokenizer.path, tokenizer.train_vocab or model.path")
    return Tokenizer.from_folder(folder)


def _read_sources(options: DataOptions, problems: Problems) -> Iterator[Record]:
    for origin, source in enumerate(sources_of(options)):
        for record in read_records(source.files, problems, format=source.format, fields=source.fields):
            yield dataclasses.replace(record, origin=origin) if origin else record


def _cap(records: list[Record], options: DataOptions, seed: int) -> tuple[list[Record], int]:
    """At most ``cap`` records of each source, those with the smallest hashes; how many were left out."""
    left_out: set[int] = set()
    for origin, source in enumerate(sources_of(options)):
        if source.cap is not None:
            members = [i for i, record in enumerate(records) if record.origin == origin]
            members.sort(key=lambda i: _digest(records[i], f"cap {seed}"))
            left_out |= set(members[source.cap :])
    return [r for i, r in enumerate(records) if i not in left_out], len(left_out)


def _digest(record: Record, key: str) -> bytes:
    return hashlib.blake2b(record.canonical(), digest_size=8, key=key.encode()).digest()


def _by_source(options: DataOptions, store: SampleStore) -> list[dict[str, Any]]:
    sources = sources_of(options)
    counts = store.by_origin(len(sources))
    return [{"name": source.name, **found} for source, found in zip(sources, counts, strict=True)]


def _counted(items: Iterator[Any], tell: Progress, stage: str, total: int = 0) -> Iterator[Any]:
    done = 0
    for done, item in enumerate(items, 1):
        if done % 256 == 0:
            tell(stage, done, total)
        yield item
    tell(stage, done, done)


def _check_share(problems: Problems, rows: int, allowed: float) -> None:
    if problems.unusable > allowed * rows:
        raise DataError(
            f"{problems.unusable} of {rows} rows are unusable, data.max_bad allows {allowed:.3g} of them: "
            f"{_summary(problems)}"
        )


def _summary(problems: Problems) -> str:
    counts = ", ".join(f"{n} x {reason}" for reason, n in problems.counts.most_common())
    places = "; ".join(p for places in problems.examples.values() for p in places[:2])
    return f"{counts}. {places}" if counts else "the files are empty"


def _content_key(config: Config) -> str:
    """Hash of everything the samples depend on: settings, data files, tokenizer files."""
    digest = hashlib.blake2b(digest_size=12)
    free = ("weight", "tag")  # with data.ratios they say how often samples are drawn, and not what they are
    sources = [{k: v for k, v in dataclasses.asdict(source).items() if k not in free} for source in config.data.sources]
    settings = {
        "version": _VERSION,
        "seed": config.seed,
        "data": {**dataclasses.asdict(config.data), "ratios": None, "sources": sources},
        "tokenizer": dataclasses.asdict(config.tokenizer),
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for path in [*(f for source in sources_of(config.data) for f in source.files), *config.data.eval,
                 *config.data.decontaminate.against]:  # fmt: skip
        where = Path(path)
        if not where.exists():
            raise DataError(f"{where}: no such file or folder")
        for file in sorted(where.rglob("*")) if where.is_dir() else [where]:
            if file.is_file():
                # name and size, so that no bytes can wander from one file to the next unnoticed
                digest.update(f"{file.relative_to(where)}\0{file.stat().st_size}\0".encode())
                with open(file, "rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
    folder = config.tokenizer.path or config.model.path
    if folder is not None and config.tokenizer.train_vocab is None:
        for name, content in sorted(Tokenizer.from_folder(folder).files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
