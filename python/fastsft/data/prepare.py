"""From a run's files to tokenised train and evaluation stores, with a report of every row that was left out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsft.config import Config, ConfigError, DataOptions, FilterOptions, FimOptions, load_config
from fastsft.data import filters
from fastsft.data.cache import tokenise_to_store
from fastsft.data.fim import find_format
from fastsft.data.lock import hold
from fastsft.data.mixture import passes, sources_of
from fastsft.data.records import DataError, Problems, Record, read_records
from fastsft.data.selection import select
from fastsft.data.spool import Spool, write_spool
from fastsft.data.store import SampleStore
from fastsft.files import sync, sync_tree
from fastsft.models.fim import FORMATS
from fastsft.models.tokenizer import Tokenizer
from fastsft.progress import Progress

_VERSION = 14  # raise when the same inputs would give other samples


@dataclass(frozen=True)
class Prepared:
    """What training needs. ``report`` is JSON-serialisable: rows read and skipped (with places), duplicates, tokens."""

    train: SampleStore
    eval: SampleStore
    tokenizer: Tokenizer
    report: dict[str, Any]


def prepare(config: Config, *, progress: Progress | None = None) -> Prepared:
    """Read, deduplicate, split, tokenise and mask the data of a run; reuse what an identical run already wrote.

    Everything is a pure function of the configuration and the bytes of the files, and lies in
    ``<output>/data/<content hash>/``.

    Args:
        config: of the run; validated again.
        progress: called with (stage, done, total).

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
    counts = np.bincount(train.origins, minlength=len(sources_of(config.data)))
    passes(config.data, counts.tolist())  # a tag without a ratio is told now, not when training begins
    return Prepared(
        train,
        SampleStore.open(root / "eval"),
        Tokenizer.from_folder(root / "tokenizer"),
        json.loads((root / "report.json").read_text()),
    )


def _build(config: Config, key: str, root: Path, tell: Progress) -> None:
    """Stage by stage; each lies in ``root`` once it is finished, and is not done again after a kill."""
    options = config.data
    root.mkdir(parents=True, exist_ok=True)
    rows = _spool(root / "rows", config, lambda p: _read_sources(options, p), tell, filtered=True)
    problems = Problems("skip" if options.max_bad else "fail", skip="data.max_bad above 0")
    problems.merge(rows.manifest["unusable"])
    report: dict[str, Any] = {"key": key, "rows": rows.manifest["read"] + problems.unusable}
    _check_share(problems, report["rows"], options.max_bad)
    problems.merge(rows.manifest["filtered"])
    train, held, chosen = _selected(root / "selection", config, rows, root / "duplicates", tell)
    report |= chosen
    parts = {"train": rows.take(train), "eval": rows.take(held)}
    if options.eval:
        parts["eval"] = _spool(
            root / "eval-rows", config,
            lambda p: read_records(options.eval, p, format=options.format, fields=options.fields), tell,
        )  # fmt: skip
        problems.merge(parts["eval"].manifest["unusable"])
    tokenizer = _saved_tokenizer(root / "tokenizer", config, parts["train"], tell)
    # Held-out losses of runs with other weights of skills compare with each other.
    configs = {"train": config, "eval": dataclasses.replace(config, data=dataclasses.replace(options, skills={}))}
    stores = {
        name: tokenise_to_store(
            root / name, part, tokenizer, configs[name], problems, functools.partial(tell, f"tokenising {name}")
        )
        for name, part in parts.items()
    }
    _check_share(problems, report["rows"] + (len(parts["eval"]) if options.eval else 0), options.max_bad)
    if len(stores["train"]) == 0:
        raise DataError(
            f"{', '.join(f for s in sources_of(options) for f in s.files)}: no usable row; {_summary(problems)}"
        )
    for name, store in stores.items():
        report[name] = {"samples": len(store), "tokens": store.num_tokens, "trained_tokens": store.trained_tokens}
    report["sources"] = _by_source(options, stores["train"])
    report["without_effect"] = _idle_skills(options, stores["train"])
    if options.fim.rate > 0:
        texts = stores["train"].manifest["infilled"].get("texts", 0)
        report["without_effect"] += _idle(options.fim, tokenizer, texts)
        infilled = sum((Counter(store.manifest["infilled"]) for store in stores.values()), Counter[str]())
        report["infilling"] = {name: infilled[name] for name in ("texts", "fim_rows", "pieces")}
        report["infilling"]["why_pieces"] = tokenizer.not_native
    report["skipped"] = dict(problems.counts)
    report["skipped_examples"] = problems.examples
    # The report comes last: its presence says that everything before it is complete.
    stage = root / "report.json.tmp"
    with open(stage, "w") as stream:
        stream.write(json.dumps(report, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    for name in ("rows", "eval-rows", "selection", "duplicates"):
        shutil.rmtree(root / name, ignore_errors=True)
    stage.replace(root / "report.json")


def _spool(
    folder: Path,
    config: Config,
    read: Callable[[Problems], Iterator[Record]],
    tell: Progress,
    *,
    filtered: bool = False,
) -> Spool:
    """The usable rows on disk; the manifest has what was wrong with the others, and what the filters left out."""
    if not folder.is_dir():
        options = config.data
        unusable = Problems("skip" if options.max_bad else "fail", skip="data.max_bad above 0")
        left_out = Problems("skip")
        count = itertools.count()
        records = _counted((r for r, _ in zip(read(unusable), count, strict=False)), tell, "reading")
        if filtered and options.filters != FilterOptions():
            records = filters.apply(records, options.filters, left_out)
        write_spool(
            folder, records,
            lambda: {"read": next(count), "unusable": unusable.to_dict(), "filtered": left_out.to_dict()},
        )  # fmt: skip
    return Spool(folder)


def _selected(
    folder: Path, config: Config, rows: Spool, work: Path, tell: Progress
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], dict[str, Any]]:
    """As :func:`select`, once."""
    if not folder.is_dir():
        train, held, report = select(config, rows, work, tell)
        with _stage(folder) as stage:
            np.save(stage / "train.npy", train)
            np.save(stage / "eval.npy", held)
            (stage / "report.json").write_text(json.dumps(report))
    report = json.loads((folder / "report.json").read_text())
    return np.load(folder / "train.npy"), np.load(folder / "eval.npy"), report


def _saved_tokenizer(folder: Path, config: Config, records: Sequence[Record], tell: Progress) -> Tokenizer:
    """The run's tokenizer, trained at most once."""
    if not folder.is_dir():
        tokenizer = load_tokenizer(config, (r.text() for r in records), tell)
        with _stage(folder) as stage:
            tokenizer.save(stage)
    return Tokenizer.from_folder(folder)


@contextmanager
def _stage(folder: Path) -> Iterator[Path]:
    """A folder that has its name once all that was written into it is on disk."""
    stage = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    yield stage
    sync_tree(stage)
    stage.rename(folder)
    sync(folder.parent)


def _idle(options: FimOptions, tokenizer: Tokenizer, texts: int) -> list[str]:
    """Settings of ``data.fim`` that change nothing in this run."""
    if not texts:
        return [f"without effect: data.fim.rate = {options.rate} is for rows of the format text, and there is none"]
    if None in ((found := find_format(tokenizer, options)).psm, found.spm):
        order = "psm" if found.spm is None else "spm"
        return [f"without effect: data.fim.spm_rate = {options.spm_rate}; this format has the order {order} alone"]
    return []


def _idle_skills(options: DataOptions, store: SampleStore) -> list[str]:
    found = {skill for skills in store.skills for skill in skills}
    idle = sorted(options.skills.keys() - found)
    return [f"without effect: data.skills.{skill}: no training row has this skill" for skill in idle]


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
    """Hash of everything the samples depend on: settings, data files, tokenizer files; not of where these lie."""
    digest = hashlib.blake2b(digest_size=12)
    data = dataclasses.asdict(config.data)
    for source in data["sources"]:
        # with data.ratios, weight and tag say how often samples are drawn, and not what they are
        source |= {"weight": None, "tag": None, "files": len(source["files"])}
    data |= {"ratios": None, "train": len(data["train"]), "eval": len(data["eval"])}
    data["decontaminate"]["against"] = len(data["decontaminate"]["against"])
    settings = {
        "version": _VERSION,
        "seed": config.seed,
        "data": data,
        "tokenizer": {**dataclasses.asdict(config.tokenizer), "path": None},
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
                digest.update(f"{file.relative_to(where)}\0{where.suffixes}\0{file.stat().st_size}\0".encode())
                with open(file, "rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
    folder = config.tokenizer.path or config.model.path
    if folder is not None and config.tokenizer.train_vocab is None:
        for name, content in sorted(Tokenizer.from_folder(folder).files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
