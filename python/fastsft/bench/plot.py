"""One picture of a run: every rival's time relative to fastsft's, on a logarithmic axis."""

from __future__ import annotations

from pathlib import Path

from fastsft.bench.results import Result

FORMATS = (".png", ".svg")
LINE, SLOWER, FASTER = "#2f6db3", "#8a8a8a", "#c0392b"


def draw(result: Result, path: Path) -> None:
    """A row per group, a dot per rival, the fastest with its name; one left of the line is faster than fastsft: red.

    Needs matplotlib (the ``report`` extra).
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    contested = {group: rows for group, rows in result.groups().items() if group in result.contested()}
    figure = Figure(figsize=(9, 1.4 + 0.3 * len(contested)), layout="constrained")
    axes = figure.add_subplot()
    for y, rows in enumerate(contested.values()):
        rivals = [(row.times_ours, row) for row in rows if row.times_ours is not None and not row.is_ours]
        for times, row in rivals:
            axes.plot(times, y, "o", color=FASTER if row.beats_us else SLOWER, markersize=4)
        times, fastest = min(rivals, key=lambda pair: pair[0])
        axes.annotate(fastest.contestant, (times, y), (-3, 4), textcoords="offset points", fontsize=6)
    axes.axvline(1, color=LINE, linewidth=1.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_yticks(range(len(contested)), list(contested), fontsize=7)
    axes.set_ylim(len(contested) - 0.4, -0.8)
    axes.set_xlabel("time relative to fastsft's; left of the line a rival is faster")
    axes.set_title(f"{result.machine['cpu']}, {result.machine['threads']} threads, {result.date}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # words stay text
        figure.savefig(path, dpi=150)
