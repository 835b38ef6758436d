"""Results as Markdown: the page docs/benchmarks.md, and the table of headline figures in the README."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsft.bench.results import OURS, Result, Row, seconds
from fastsft.bench.topics import TOPICS

INTRODUCTION = """\
{name}: {machine}, threads: at most {threads}, torch {torch}, {date}.{others}
Written by `python bench/record.py`, which CI holds against [the results](../{source}); no figure is typed by hand.

`fastsft bench TOPIC` measures the same on your machine, `fastsft bench list` shows the topics and
`fastsft bench compare A.json B.json` what changed between two runs. `pip install 'fastsft[rivals]'` brings the rivals;
what is not installed is left out. text-dedup, datatrove and the other engines need environments of their own (vLLM one
without the others), which `--rivals` names; `gpu-rivals` are those of [`make gpu-check`](benchmarks-gpu.md).

- Every bench checks that the results agree before it times them. Times are medians, with what 20 % and 80 % of the
  rounds stayed below, or ± half the interquartile range where a row is older.
- **x ours** is the time relative to fastsft's, in the same process or in turn, on the same inputs (for as much work,
  where a slow rival got fewer of them). Below 1 a rival is faster: such rows are **bold**, and listed first.
- **limit** is the share of what the machine can do at most: `stream` of the rate at which torch sums a large array on
  huge pages (`read`, of older rows: on ordinary pages, which can be slower by a third), `copy` of a copy's, read and
  written, `product` of a large matrix product in the same type, by torch or fastsft. What stays in the last-level
  cache from one step to the next is not read from memory, so that a model of its size can come to more than 100 %.
- Single rows vary by tens of percent on a shared machine: read ratios.
"""


def page(result: Result, source: str, suite: Path, pages: Mapping[str, str]) -> str:
    """``source``: the results' path, NAME/DATE.json at its end, to be linked; ``suite``: the folder of the benches,
    whose words head tables; ``pages``: of all machines, by name."""
    m, name = result.machine, Path(source).parent.name
    others = ", ".join(f"[{other}]({file})" for other, file in pages.items() if other != name)
    lines = [
        f"# Benchmarks{'' if pages[name] == 'benchmarks.md' else f' on {name}'}",
        "",
        INTRODUCTION.format(name=name, machine=f"{m['cpu']} ({m['isa']})", threads=m["threads"],
                            torch=m["versions"]["torch"], date=result.date, source=source,
                            others=f" Other machines: {others}." if others else ""),
        *_contents(result),
        *_lost(result),
    ]  # fmt: skip
    for name, groups in result.by_topic().items():
        lines += [f"## {name}", ""]
        benches = dict.fromkeys(rows[0].bench for rows in groups.values())
        for bench in benches:
            file = suite / f"bench_{bench}.py"
            mine = [rows for rows in groups.values() if rows[0].bench == bench]
            lines += [f"### {file.name}", "", f"{_first_words(file)} {_when(mine)} ([How](../bench/{file.name}).)", ""]
            lines += _table(mine)
    return "\n".join(lines)


def _contents(result: Result) -> list[str]:
    lines = ["| topic | | groups with rivals | of those a rival is faster in |", "|---|---|---|---|"]
    lost = {row.group for row in result.lost()}
    for name, groups in result.by_topic().items():
        contested = groups.keys() & result.contested()
        count = len(contested & lost)
        counts = f"{len(contested)} | {f'**{count}**' if count else 0}" if contested else "no rivals | "
        lines.append(f"| [{name}](#{name}) | {TOPICS[name].title} | {counts} |")
    return [*lines, ""]


def _lost(result: Result) -> list[str]:
    if not result.lost():
        return []
    lines = ["## Where a rival is faster", "", "| | rival | x ours |", "|---|---|---|"]
    lines += [f"| {_cell(row.group)} | {row.contestant} | **{row.times_ours:.2f}** |" for row in result.lost()]
    return [*lines, ""]


def _when(groups: Iterable[Sequence[Row]]) -> str:
    """Of which day and, where it was noted, of which commits the rows are."""
    rows = [row for rows in groups for row in rows]
    dates, commits = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("date", "commit"))
    named = [f"`{commit}`" for commit in commits if commit]
    at = f" at {', '.join(named)}{' and before' if '' in commits else ''}" if named else ""
    return f"Measured {', '.join(sorted(dates))}{at}."


def _table(groups: Iterable[Sequence[Row]]) -> list[str]:
    lines = ["| | | median | spread | x ours | limit | |", "|---|---|---|---|---|---|---|"]
    for rows in groups:
        for i, row in enumerate(rows):
            cells = ["" if i else _cell(row.group), row.contestant, seconds(row.median), _spread(row), _times(row)]
            shares = ", ".join(f"{share:.0%} {limit}" for limit, share in row.shares.items())
            notes = ", ".join(_note(key, value) for key, value in row.notes.items())
            lines.append(f"| {' | '.join([*cells, shares, notes])} |")
    return [*lines, ""]


def _spread(row: Row) -> str:
    if row.rounds == 1:
        return "one round"
    if row.p20 is None or row.p80 is None:
        return f"± {seconds(row.iqr / 2)}"
    return f"{seconds(row.p20)} to {seconds(row.p80)}"


def _times(row: Row) -> str:
    if row.times_ours is None:
        return ""
    return f"**{row.times_ours:.2f}**" if row.beats_us else f"{row.times_ours:.2f}"


def _note(key: str, value: Any) -> str:
    words = key.replace("_", " ")
    if isinstance(value, dict):  # one figure per contestant
        return f"{words}: {', '.join(_note(*item) for item in value.items())}"
    return f"{words} {value:,.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _first_words(file: Path) -> str:
    """The first sentence of the bench's own description."""
    paragraph = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    sentence, _, _ = " ".join(paragraph.split()).partition(". ")
    return f"{sentence.removesuffix('.').replace('``', '`')}."


# --- the README -------------------------------------------------------------------------------------------------------

# (what is told, the group that tells it). The rival shown is the fastest of the group.
HEADLINES = (
    ("attention of a packed batch, forward and backward, bf16, GSM8K's lengths",
     "varlen_attention Qwen2.5-0.5B gsm8k bfloat16 forward+backward"),
    ("linear cross-entropy, forward and backward, bf16, vocabulary 152k, a third masked",
     "linear_cross_entropy fwd+bwd bf16, V 151936, 33% masked"),
    ("training step, 76 M parameters, vocabulary 152k, bf16",
     "training, 76 M parameters, vocabulary 152k, bf16, one thread"),
    ("training step, 122 M parameters, float32", "training, 122 M parameters, vocabulary 32k, f32, one thread"),
    ("decoding, one sequence, 120 M parameters, int8", "decode batch 1, 120 M parameters, int8, threads: 1"),
    ("decoding, 32 sequences, 120 M parameters, bf16", "decode batch 32, 120 M parameters, bfloat16, threads: 1"),
    ("a prompt of 512 tokens, 120 M parameters, bf16", "prompt of 512, 120 M parameters, bfloat16, threads: 1"),
    ("near-duplicates among 100,000 functions, file to file", "deduplication of a file of 100000 functions"),
    ("fill-in-the-middle between characters", "FIM between characters, rate 1.0"),
    ("packing 100,000 documents into rows of 8,192 tokens", "pack_sequences 100000 lengths, log-normal, capacity 8192"),
    ("matrix product of a linear layer, bf16, 120 M parameters", "linear forward, 120M MLP in, torch.bfloat16"),
)  # fmt: skip


def headlines(result: Result) -> str:
    """A short table of representative groups, each against its fastest rival, and the count of what is lost.

    Raises:
        ValueError: a group of the table was not measured, or without rivals.
    """
    groups = result.groups()
    lines = ["| | fastsft | fastest rival | its time for as much | rival / fastsft |", "|---|---|---|---|---|"]
    for told, group in HEADLINES:
        rows = groups.get(group, [])
        ours = next((row for row in rows if row.contestant == OURS), None)
        rival = min((r for r in rows if not r.is_ours), key=lambda r: r.times_ours or float("inf"), default=None)
        if ours is None or rival is None:
            raise ValueError(f"the README's table wants {group!r}, which was not measured against a rival")
        its = ours.median * (rival.times_ours or 0)  # for as much work
        lines.append(f"| {told} | {seconds(ours.median)} | {rival.contestant} | {seconds(its)} | {_times(rival)} |")
    m = result.machine
    lines += [
        "",
        f"{m['cpu']} ({m['isa']}), threads: at most {m['threads']}, {result.date}. Bold: the rival is faster, "
        f"as in {len(result.lost())} of {len(result.contested())} groups, "
        "[which are listed](docs/benchmarks.md#where-a-rival-is-faster).",
    ]
    return "\n".join(lines)


def between(text: str, name: str, table: str) -> str:
    """``text`` with the table between its markers ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"expected the markers {begin.strip()} and {end}")
    return f"{head}{begin}{table}\n{end}{tail}"
