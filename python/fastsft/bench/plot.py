"""One picture of a run: every contestant's time relative to fastsft's, on a logarithmic axis."""

from __future__ import annotations

from pathlib import Path

from fastsft.bench.results import Result

FORMATS = (".png", ".svg")
COLOURS = {"ours": "#2f6db3", "slower": "#8a8a8a", "faster": "#c0392b"}


def draw(result: Result, path: Path) -> None:
    """Needs matplotlib (the ``report`` extra). A rival left of 1 is faster than fastsft, and red."""
    import matplotlib
    from matplotlib.figure import Figure

    groups = {g: rows for g, rows in result.groups().items() if any(row.times_ours is not None for row in rows)}
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    for y, rows in enumerate(groups.values()):
        for row in rows:
            if row.times_ours is None:
                continue
            colour = COLOURS["ours" if row.is_ours else "faster" if row.beats_us else "slower"]
            axes.plot(row.times_ours, y, "o", color=colour, markersize=5)
            if row.contestant != "fastsft":
                axes.annotate(row.contestant, (row.times_ours, y), (0, 5), textcoords="offset points", ha="center",
                              fontsize=6, color=colour)  # fmt: skip
    axes.axvline(1, color=COLOURS["ours"], linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(groups)), list(groups), fontsize=7)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlabel("time relative to fastsft; left of the line a rival is faster")
    axes.set_title(f"{result.machine['cpu']}, {result.machine['threads']} threads, {result.date}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # words stay text
        figure.savefig(path, dpi=150)
