"""Training rows that contain evaluation instances: which, which instance, and the words that they share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsft import ops
from fastsft.data.dedup_files import find_all
from fastsft.data.records import DataError, Problems, Record, Row, interpret, of_memory, read_rows
from fastsft.data.sources import Source, find_sources
from fastsft.data.text_batch import join_texts
from fastsft.data.texts import read_texts
from fastsft.data.writers import Output, check_target
from fastsft.ops._texts import Texts
from fastsft.progress import Progress

PathLike = str | os.PathLike[str]
Ints = npt.NDArray[np.int64]

# name -> rules. Words are those of ops.ngram_index, where the papers have tokens of their own.
PRESETS = {
    "tulu3": "8:0.5",  # arXiv 2411.15124: more than half of an instance lies in 8-grams of one training row
    "qwen2.5-coder": "10",  # arXiv 2409.12186: any 10-gram
    "gpt3": "13",  # arXiv 2005.14165: any 13-gram
}
_BATCH_BYTES = 1 << 22
_LONGEST_PASSAGE = 1000


@dataclass(frozen=True)
class Rule:
    """A row is dropped if more than the share ``coverage`` of the words of one evaluation instance lies in n-grams of
    ``ngram`` words that the row has too. With 0, any one shared n-gram drops it."""

    ngram: int
    coverage: float = 0.0

    def __str__(self) -> str:
        return f"{self.ngram}:{self.coverage:g}" if self.coverage else str(self.ngram)


def parse_rules(written: Sequence[str]) -> list[Rule]:
    """Rules from the names of :data:`PRESETS`, ``"N"`` (any shared N-gram) and ``"N:SHARE"``.

    Raises:
        ValueError: anything else, or no rule.
    """
    rules = []
    for text in written:
        match = re.fullmatch(r"([1-9][0-9]*)(?::(0|0?\.[0-9]+))?", PRESETS.get(text, text))
        if match is None:
            raise ValueError(
                f"decontaminate: rules: expected one of {', '.join(PRESETS)}, a length N such as 13, or N:SHARE with a "
                f"share in [0, 1) such as 8:0.5, got {text!r}"
            )
        rules.append(Rule(int(match[1]), float(match[2] or 0)))
    if not rules:
        raise ValueError("decontaminate: rules: expected at least one")
    return rules


@dataclass(frozen=True)
class Contamination:
    """Why a row is dropped. ``passage`` is the longest part of the instance all of whose n-grams are in the row."""

    source: str  # "train.jsonl:12"
    evaluation: str  # "HumanEval.jsonl.gz:3 prompt"
    rule: str
    coverage: float  # share of the instance's words
    passage: str


@dataclass(frozen=True)
class DecontaminationReport:
    """``keep[i]`` tells whether row i stays; ``dropped`` says why not, in the order of the rows."""

    keep: npt.NDArray[np.bool_]
    dropped: list[Contamination] = field(repr=False)
    rules: list[str]
    evaluation: list[dict[str, Any]]  # for each file: rows, found (in the training rows), without_ngrams (too short)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "records": len(self.keep),
            "kept": int(self.keep.sum()),
            "rules": self.rules,
            "evaluation": self.evaluation,
            "dropped": [asdict(d) for d in self.dropped],
        }


def decontaminate(
    records: Sequence[Record | str | dict[str, Any] | os.PathLike[str]] | PathLike,
    *,
    against: Sequence[PathLike] | PathLike,
    rules: Sequence[str] = ("tulu3",),
    against_fields: Sequence[str] = (),
    progress: Progress | None = None,
) -> DecontaminationReport:
    """Find the records, texts or rows of files that contain evaluation instances.

    An instance is one text field of a row of the evaluation files; a list of strings is one text, a line each. Texts
    are compared as sequences of words (see :func:`fastsft.ops.ngram_index`), exactly: there are no false hits.

    Args:
        records: one path to a JSONL(.gz, .zst) or Parquet file, datasets folder or folder of files; or a list of
            records, texts (strings), rows (dicts, as files have them) and files (:class:`pathlib.Path`). Files are
            read in batches.
        against: evaluation files, in the same formats; their rows need none of our fields.
        rules: any of which drops a row: names of :data:`PRESETS`, ``"13"`` (any shared 13-gram) or ``"8:0.5"`` (more
            than half of an instance's words lie in shared 8-grams).
        against_fields: fields of the evaluation rows, which all of them must have; by default every one that is a
            string or a list of strings, and conversations as a whole.
        progress: called with (stage, done, total).

    Returns:
        Which records stay, and of each of the others the instance that it contains and the words that they share.

    Raises:
        DataError: a file that cannot be read, a broken row, evaluation files without any text. ValueError: a rule that
            is none, a text with a lone surrogate.
    """
    finder = Finder([against] if isinstance(against, str | os.PathLike) else against, rules, against_fields)
    keep: list[npt.NDArray[np.bool_]] = []
    held: list[Record] = []

    def check_held() -> None:
        if held:
            places = [r.source for r in held]
            try:
                texts = join_texts([r.text() for r in held])
            except UnicodeEncodeError as error:
                place = places[[r.text() for r in held].index(error.object)]
                raise ValueError(f"decontaminate: {place}: expected text, got a lone surrogate") from None
            keep.append(finder.check(texts, places.__getitem__))
            held.clear()

    for i, given in enumerate([Path(records)] if isinstance(records, str | os.PathLike) else records):
        if isinstance(given, os.PathLike):
            check_held()
            for source in find_sources(given):
                for kept, _, _ in check_rows(source, finder, Problems("fail"), {}):
                    keep.append(kept)
                    _tell(progress, finder)
            continue
        held.append(of_memory(given, i))
        if len(held) == 1024:
            check_held()
            _tell(progress, finder)
    check_held()
    return finder.report(keep)


def decontaminate_files(
    paths: Sequence[Path],
    output: Path | None,
    problems: Problems,
    *,
    against: Sequence[PathLike],
    rules: Sequence[str] = ("tulu3",),
    against_fields: Sequence[str] = (),
    fields: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> DecontaminationReport:
    """The same for the rows of files, which are held batch by batch; of each row some 30 bytes stay in memory.

    Args:
        output: a file for one file, a dataset folder for a dataset, a folder of files of the same names for a folder or
            several paths: the rows that stay. Rows keep their format and order, lines their bytes. It has its name once
            all of it is on disk.
        fields: our field names and those of the files.

    Raises:
        DataError: also for an output that cannot take the rows.
    """
    sources, folder = find_all(paths)
    if output is not None:
        check_target(sources, output, folder=folder, ours=False)
    finder = Finder(against, rules, against_fields)
    keep: list[npt.NDArray[np.bool_]] = []
    places: list[list[tuple[Ints, Ints]]] = []
    for source in sources:
        places.append([(np.empty(0, np.int64), np.empty(0, np.int64))])
        for kept, starts, sizes in check_rows(source, finder, problems, fields or {}):
            keep.append(kept)
            places[-1].append((starts[kept], sizes[kept]))
            _tell(progress, finder)
    if output is not None:
        target = Output(output, folder=folder)
        for done, (source, mine) in enumerate(zip(sources, places, strict=True), 1):
            target.write(source, *map(np.concatenate, zip(*mine, strict=True)))
            if progress:
                progress("writing files", done, len(sources))
        target.finish()
    return finder.report(keep)


def check_rows(
    source: Source, finder: Finder, problems: Problems, fields: Mapping[str, str]
) -> Iterator[tuple[npt.NDArray[np.bool_], Ints, Ints]]:
    """For each batch of usable rows: which stay, and ``starts`` and ``sizes`` of all
    (:class:`~fastsft.data.text_batch.TextBatch`)."""
    for batch in read_texts(source, problems, fields=fields, batch_bytes=_BATCH_BYTES):

        def place(i: int, numbers: Ints = batch.numbers) -> str:
            return f"{source.path}:{numbers[i]}"

        yield finder.check(batch.texts, place), batch.starts, batch.sizes


class Finder:
    """Evaluation files and rules, and what was found of them so far."""

    def __init__(self, against: Sequence[PathLike], rules: Sequence[str], fields: Sequence[str]) -> None:
        self._rules = parse_rules(rules)
        self._texts: list[str] = []
        self._places: list[str] = []  # of each text
        self._rows: list[int] = []  # of each text: its row among those of all files
        self._files: list[tuple[str, int]] = []  # and the rows of all files up to its end
        count = 0
        for path in against:
            for row in read_rows(path, Problems("fail")):
                for name, text in instances(row, fields):
                    self._texts.append(text)
                    self._places.append(f"{row.source} {name}")
                    self._rows.append(count)
                count += 1
            self._files.append((os.fspath(path), count))
        if not self._texts:
            named = ", ".join(os.fspath(p) for p in against) or "against"
            raise DataError(f"{named}: no text to compare with")
        self._index = ops.ngram_index(self._texts, sorted({r.ngram for r in self._rules}))
        self._columns = [(rule, self._index.ngrams.index(rule.ngram)) for rule in self._rules]
        self._above = [min(r.coverage for r in self._rules if r.ngram == n) for n in self._index.ngrams]
        self._num_words = self._index.num_words
        self._found = np.zeros(len(self._texts), np.bool_)
        self.checked = 0  # texts
        self._dropped: list[Contamination] = []

    def check(self, texts: Texts, place: Callable[[int], str]) -> npt.NDArray[np.bool_]:
        """Which of the texts stay. ``place`` names one of them."""
        keep = np.ones(len(texts[1]) - 1, np.bool_)
        self.checked += len(keep)
        found = ops.ngram_overlap(texts, self._index, above=self._above)
        self._found |= found.found
        share = found.words / self._num_words[found.reference][:, None]
        for pair, (text, reference) in enumerate(zip(found.text.tolist(), found.reference.tolist(), strict=True)):
            keep[text] = False
            covered, rule, column = max(  # the first rule of those with the largest share
                ((s, rule, column) for rule, column in self._columns if (s := share[pair, column]) > rule.coverage),
                key=lambda broken: broken[0],
            )
            begin, end = found.passage[pair, column].tolist()
            passage = self._texts[reference].encode()[begin:end].decode()[:_LONGEST_PASSAGE]
            self._dropped.append(
                Contamination(place(text), self._places[reference], str(rule), round(float(covered), 4), passage)
            )
        return keep

    def report(self, keep: list[npt.NDArray[np.bool_]]) -> DecontaminationReport:
        rows = np.array(self._rows)
        smallest = min(r.ngram for r in self._rules)
        evaluation = []
        begin = 0
        for path, end in self._files:
            mine = (rows >= begin) & (rows < end)
            long = mine & (self._num_words >= smallest)
            evaluation.append(
                {"file": path, "rows": end - begin, "found": len(np.unique(rows[mine & self._found])),
                 "without_ngrams": end - begin - len(np.unique(rows[long]))}
            )  # fmt: skip
            begin = end
        everything = np.concatenate([np.empty(0, np.bool_), *keep])
        return DecontaminationReport(everything, self._dropped, [str(r) for r in self._rules], evaluation)


def instances(row: Row, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The texts of a row of an evaluation file, each with the name of its field.

    Raises:
        DataError: the row is no object, or a field that was asked for is no string and no list of strings.
    """
    if not isinstance(row.value, dict):
        raise DataError(f"{row.source}: not an object: got {type(row.value).__name__}")
    for name in fields:
        if _joined(row.value.get(name)) is None:
            got = type(row.value[name]).__name__ if name in row.value else f"{', '.join(row.value)} alone"
            raise DataError(f"{row.source}: expected {name!r} to be a string or a list of strings, got {got}")
    for name, value in row.value.items():
        text = _joined(value)
        if text is not None and (not fields or name in fields):
            yield name, text
        elif not fields and name in ("messages", "conversations"):
            record = interpret(row, Problems("fail"), format="messages", fields={})
            if record is not None:
                yield name, record.text()


def _joined(value: Any) -> str | None:
    """A string, or the lines of a list of them, such as the tests of MBPP and the choices of MMLU."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


def _tell(progress: Progress | None, finder: Finder) -> None:
    if progress:
        progress("comparing rows", finder.checked, 0)
